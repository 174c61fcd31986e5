"""Tokenizers of taming-transformers and of latent diffusion's first stage: `.ckpt` files of VQGAN and Gumbel VQGAN.

The networks are those of `vqvae.vqgan`. All sizes are in the weights' shapes; the yaml beside a checkpoint adds the
resolution it was trained at, and says of options that leave no trace in the weights that they are off. Attention is
where the weights have it: at the resolutions that the yaml names, of images of the training's size.

VQGAN's codes are the nearest of its codebook. Gumbel VQGAN's are the largest of its logits; there they may also be
drawn, from the posterior that these logits are (`GumbelQuantizer`). A yaml's `remap` renumbers codes for a transformer;
here codes are those of the whole codebook.

Losses, and averages of the weights that a file keeps beside them, are left where they are.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vqvae.interop.layout import ATTENTION, RESNET, assembled, few, sizes, to_diffusers
from vqvae.interop.pickles import read_pickle
from vqvae.likelihoods import NormalConfig
from vqvae.quantizers import GumbelQuantizerConfig, VectorQuantizerConfig
from vqvae.vqgan import VQGAN, VQGANConfig

CLASSES = ("VQModel", "VQNoDiscModel", "VQModelInterface", "GumbelVQ")
# What `params` may hold that says nothing of networks or quantizer.
LEFT_ASIDE = ("loss.", "model_ema.")
CODEBOOK = "quantize.embedding.weight"
GUMBEL = {
    "quantize.embed.weight": "quantizer.codebook",
    "quantize.proj.weight": "quantizer.to_logits.weight",
    "quantize.proj.bias": "quantizer.to_logits.bias",
}
# Options of `ddconfig` without a trace in the weights, and the one value of each that a VQGAN has.
FIXED = {
    "double_z": False,
    "resamp_with_conv": True,
    "give_pre_end": False,
    "tanh_out": False,
    "use_linear_attn": False,
}


def import_taming(checkpoint: str | Path, config: str | Path | None = None, *, image_size: int | None = None) -> VQGAN:
    """A VQGAN or Gumbel VQGAN as a model of ours, in eval mode.

    It can be trained on: its codebook stays where it is until gradients move it. A Gumbel one's temperature stays
    at 1/16, where that of a new `GumbelQuantizer` ends.

    Args:
        checkpoint: the `.ckpt`, read without running what is in it; see `vqvae.interop.pickles`.
        config: its yaml; without it `checkpoint`'s name with .yaml, or the one yaml in its folder, if there is one.
        image_size: height and width, any multiple of 2^(levels − 1); without it the yaml's resolution.

    Raises:
        ValueError: missing, corrupt, of another kind, or with options that no `VQGAN` has, by name; or neither a yaml
            nor an `image_size`.
    """
    checkpoint = Path(checkpoint)
    held = read_pickle(checkpoint)
    state = held.get("state_dict", held) if isinstance(held, dict) else None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{checkpoint} has no state_dict of tensors, expected a checkpoint of taming-transformers")
    path = _beside(checkpoint) if config is None else Path(config)
    params = {} if path is None else _params(path)
    weights = {name: tensor for name, tensor in state.items() if not name.startswith(LEFT_ASIDE)}
    if weights.pop("quantize.used", None) is not None and params.get("remap", "unknown") is not None:
        raise ValueError(
            f"{checkpoint} renumbers its codes (quantize.used), which a VQGAN does not; for codes of the whole "
            "codebook give a config whose params have remap: null"
        )
    num_levels = 1 + max((int(m[1]) for name in weights if (m := re.match(r"decoder\.up\.(\d+)\.", name))), default=0)
    gumbel = "quantize.proj.weight" in weights
    quantizer = GUMBEL if gumbel else {CODEBOOK: "quantizer.codebook"}
    if lacking := quantizer.keys() - weights.keys():
        raise ValueError(f"{checkpoint} has no {few(lacking)}, expected a VQGAN or Gumbel VQGAN of taming-transformers")
    named = to_diffusers(
        weights, lambda name: quantizer.get(name) or _name(name, num_levels), checkpoint, "VQGAN of taming-transformers"
    )
    if gumbel:
        named["quantizer.to_logits.weight"] = named["quantizer.to_logits.weight"].flatten(1)
    found = sizes(named, checkpoint)
    num_codes, dim = named["quantizer.codebook"].shape
    if path is not None:
        _check(params, {**found, "num_codes": num_codes, "dim": dim}, path)
    if image_size is None:
        image_size = params.get("ddconfig", {}).get("resolution")
        if not isinstance(image_size, int):
            raise ValueError(
                f"the weights in {checkpoint} do not tell the size of images: give image_size, or config, the yaml "
                "that came with it"
            )
    return assembled(
        VQGANConfig(
            image_size=image_size,
            likelihood=NormalConfig(),
            quantizer=(
                GumbelQuantizerConfig(
                    num_codes=num_codes,
                    dim=dim,
                    kl_weight=float(params.get("kl_weight", 1e-8)),
                    entropy_weight=0.0,
                    temperature=1 / 16,
                    final_temperature=1 / 16,
                )
                if gumbel
                else VectorQuantizerConfig(num_codes=num_codes, dim=dim, revival="off")
            ),
            **found,
        ),
        named,
        checkpoint,
    )


def _beside(checkpoint: Path) -> Path | None:
    named = [path for ending in (".yaml", ".yml") if (path := checkpoint.with_suffix(ending)).is_file()]
    if named:
        return named[0]
    others = sorted(path for path in checkpoint.parent.iterdir() if path.suffix in (".yaml", ".yml"))
    if len(others) > 1:
        raise ValueError(
            f"{checkpoint.parent} has {len(others)} yaml files ({few(path.name for path in others)}); say by config "
            f"which is that of {checkpoint.name}"
        )
    return others[0] if others else None


def _params(path: Path) -> dict[str, Any]:
    """`model.params` of a yaml, with what this library cannot follow refused."""
    import yaml  # brought by huggingface-hub; most who import have no checkpoint of this kind

    if not path.is_file():
        raise ValueError(f"no file at {path}, expected the yaml of a checkpoint")
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be read as yaml: {reason}") from error
    model = plain.get("model") if isinstance(plain, Mapping) else None
    params = model.get("params") if isinstance(model, Mapping) else None
    networks = params.get("ddconfig") if isinstance(params, Mapping) else None
    if not (isinstance(model, Mapping) and isinstance(params, Mapping) and isinstance(networks, Mapping)):
        raise ValueError(f"{path} has no model.params.ddconfig, expected the yaml of a VQGAN of taming-transformers")
    kind = str(model.get("target", CLASSES[0])).rsplit(".", 1)[-1]
    if kind not in CLASSES:
        raise ValueError(f"{path} is of {kind}, expected {' or '.join(CLASSES)}")
    for name, value in FIXED.items():
        if networks.get(name, value) != value:
            raise ValueError(f"{path}: got {name}={networks[name]!r}, expected {value}: a VQGAN here has no other")
    if networks.get("attn_type", "vanilla") not in ("vanilla", "none"):
        raise ValueError(f"{path}: got attn_type={networks['attn_type']!r}, expected 'vanilla' or 'none'")
    return dict(params)


def _check(params: Mapping[str, Any], found: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError where a yaml is of another model than the weights."""
    networks = params["ddconfig"]
    expected = {
        "n_embed": found["num_codes"],
        "embed_dim": found["dim"],
        "z_channels": found["latent_channels"],
        "num_res_blocks": found["num_blocks"],
        "in_channels": found["num_channels"],
        "out_ch": found["num_channels"],
    }
    said = {**networks, **{name: value for name, value in params.items() if name in expected}}
    if "ch" in networks and "ch_mult" in networks:
        expected["channels"] = found["channels"]
        said["channels"] = tuple(networks["ch"] * factor for factor in networks["ch_mult"])
    for name, value in expected.items():
        if said.get(name, value) != value:
            raise ValueError(
                f"{path} has {name}={said[name]!r} and the weights {value!r}; give the yaml that came with them"
            )


def _name(name: str, num_levels: int) -> str | None:
    """A weight's name in diffusers' layout; None for one that no VQGAN has."""
    start, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
        return None
    if start in ("quant_conv", "post_quant_conv"):
        return name
    net, _, place = start.partition(".")
    if net not in ("encoder", "decoder"):
        return None
    levels, resample = ("down", "downsample") if net == "encoder" else ("up", "upsample")
    if place in ("conv_in", "conv_out", "norm_out"):
        return f"{net}.{'conv_norm_out' if place == 'norm_out' else place}.{leaf}"
    if (m := re.fullmatch(r"mid\.(block_1|block_2|attn_1)\.(\w+)", place)) is not None:
        part = {"block_1": "resnets.0", "block_2": "resnets.1", "attn_1": "attentions.0"}[m[1]]
        new = (ATTENTION if m[1] == "attn_1" else RESNET).get(m[2])
        return new and f"{net}.mid_block.{part}.{new}.{leaf}"
    if (m := re.fullmatch(rf"{levels}\.(\d+)\.(.+)", place)) is None:
        return None
    # Both count levels from the finest; diffusers counts the decoder's in the order they run.
    level = f"{net}.{levels}_blocks.{int(m[1]) if net == 'encoder' else num_levels - 1 - int(m[1])}"
    if m[2] == f"{resample}.conv":
        return f"{level}.{resample}rs.0.conv.{leaf}"
    if (part := re.fullmatch(r"(block|attn)\.(\d+)\.(\w+)", m[2])) is None:
        return None
    names, parts = (RESNET, "resnets") if part[1] == "block" else (ATTENTION, "attentions")
    new = names.get(part[3])
    return new and f"{level}.{parts}.{part[2]}.{new}.{leaf}"
