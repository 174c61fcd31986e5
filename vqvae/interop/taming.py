"""Tokenizers of taming-transformers and of latent diffusion's first stage: `.ckpt` files of VQGAN and Gumbel VQGAN.

The networks are those of `vqvae.vqgan`. All sizes are in the weights' shapes; the yaml beside a checkpoint adds the
resolution it was trained at, and says of options that leave no trace in the weights that they are off. Attention is
where the weights have it, which must be at the resolutions that the yaml names, of images of the training's size.

VQGAN's codes are the nearest of its codebook. Gumbel VQGAN's are the largest of its logits; there they may also be
drawn, from the posterior that these logits are (`GumbelQuantizer`). A yaml's `remap` renumbers codes for a transformer;
here codes are those of the whole codebook.

Losses, and averages of the weights that a file keeps beside them, are left where they are.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from safefolder.messages import shown
from safefolder.tensors import few, is_file
from vqvae.interop.plain_yaml import read_yaml
from vqvae.interop.state_dicts import Tell, find_weights, read_checkpoint
from vqvae.interop.weight_names import MOST_PIXELS, NEAREST, Layout, assembled, check_kinds, count, sizes, to_diffusers
from vqvae.likelihoods import Normal
from vqvae.quantizers import GumbelQuantizer, VectorQuantizer
from vqvae.vqgan import VQGAN

LAYOUT = Layout(
    levels={"encoder": "down", "decoder": "up"},
    block="block",
    middle=("block_1", "attn_1", "block_2"),
    finest_first=True,
)
KIND = "VQGAN or Gumbel VQGAN of taming-transformers"
CLASSES = ("VQModel", "VQNoDiscModel", "VQModelInterface", "GumbelVQ")
# What `params` may hold that says nothing of networks or quantizer.
LEFT_ASIDE = ("loss.", "model_ema.")
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
KINDS = {
    **dict.fromkeys(("ch", "resolution"), "an integer"),
    **dict.fromkeys(("ch_mult", "attn_resolutions"), "a list of integers"),
    "kl_weight": "a number",
}
YAML = (".yaml", ".yml")
CHECKPOINTS = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")


def import_taming(
    checkpoint: str | Path,
    config: str | Path | None = None,
    *,
    image_size: int | tuple[int, int] | None = None,
    tell: Tell | None = None,
) -> VQGAN:
    """A VQGAN or Gumbel VQGAN as a model of ours, in eval mode.

    It can be trained on: its codebook stays where it is until gradients move it. A Gumbel one's temperature stays
    at 1/16, where that of a new `GumbelQuantizer` ends.

    Args:
        checkpoint: the `.ckpt`, read without running what is in it; see `vqvae.interop.pickles`.
        config: its yaml; without it `checkpoint`'s name with .yaml, or the one yaml of a tokenizer in its folder, if
            there is one that has not another checkpoint's name.
        image_size: side, or height and width, any multiples of 2^(levels − 1); without it the yaml's resolution.
        tell: called with a sentence where the weights lie elsewhere than under `state_dict`, or under names that others
            were put before, as those of a first stage are in latent diffusion's checkpoints; e.g. `print`.

    Raises:
        ValueError: missing, corrupt, of another kind, or with options that no `VQGAN` has, by name; or neither a yaml
            nor an `image_size`.
    """
    checkpoint = Path(checkpoint)
    weights = find_weights(read_checkpoint(checkpoint), checkpoint, f"a {KIND}", tell)
    return taming_model(weights, checkpoint, config, image_size)


def taming_model(
    weights: Mapping[str, Tensor], checkpoint: Path, config: str | Path | None, image_size: int | tuple[int, int] | None
) -> VQGAN:
    """What `import_taming` makes of weights that were found in a checkpoint."""
    path = _beside(checkpoint) if config is None else Path(config)
    params = {} if path is None else _params(path)
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(LEFT_ASIDE)}
    if weights.pop("quantize.used", None) is not None and params.get("remap", "unknown") is not None:
        raise ValueError(
            f"{checkpoint} renumbers its codes (quantize.used), which a VQGAN does not; for codes of the whole "
            "codebook give a config whose params have remap: null"
        )
    num_levels = count(weights, "decoder.up.", checkpoint)
    gumbel = "quantize.proj.weight" in weights
    named = to_diffusers(
        weights, lambda name: LAYOUT.name(name, num_levels), GUMBEL if gumbel else NEAREST, checkpoint, KIND
    )
    if gumbel and named["quantizer.to_logits.weight"].ndim > 2:
        named["quantizer.to_logits.weight"] = named["quantizer.to_logits.weight"].flatten(1)
    found = sizes(named, checkpoint)
    num_codes, dim = named["quantizer.codebook"].shape
    if path is not None:
        _check(params, {**found, "num_codes": num_codes, "dim": dim}, path)
    if image_size is None:
        image_size = params.get("ddconfig", {}).get("resolution", 0)
        if not 0 < image_size <= MOST_PIXELS:
            raise ValueError(
                f"neither the weights in {checkpoint} nor a yaml tell the size of images: give image_size, or config, "
                "the yaml that came with them"
            )
    return assembled(
        lambda: VQGAN.Config(
            image_size=image_size,
            likelihood=Normal.Config(),
            quantizer=(
                GumbelQuantizer.Config(
                    num_codes=num_codes,
                    dim=dim,
                    kl_weight=float(params.get("kl_weight", 1e-8)),
                    entropy_weight=0.0,
                    temperature=1 / 16,
                    final_temperature=1 / 16,
                )
                if gumbel
                else VectorQuantizer.Config(num_codes=num_codes, dim=dim, revival="off")
            ),
            **found,
        ),
        named,
        checkpoint,
    )


def _beside(checkpoint: Path) -> Path | None:
    """The yaml that is named like the checkpoint, or else the only one that can be its own."""
    named = [path for ending in YAML if (path := checkpoint.with_suffix(ending)).is_file()]
    if named:
        return named[0]
    files = sorted(checkpoint.parent.iterdir())
    taken = {path.stem for path in files if path.suffix in CHECKPOINTS}
    others = [path for path in files if path.suffix in YAML and path.stem not in taken and _is_of_a_tokenizer(path)]
    if len(others) > 1:
        raise ValueError(
            f"{checkpoint.parent} has {len(others)} yaml files ({few([path.name for path in others])}); say by config "
            f"which is that of {checkpoint.name}"
        )
    return others[0] if others else None


def _is_of_a_tokenizer(path: Path) -> bool:
    try:
        return bool(_model(path))
    except ValueError:
        return False


def _model(path: Path) -> dict[str, Any]:
    """`model` of a yaml whose `params.ddconfig` there is. Raises ValueError for another."""
    if not is_file(path):
        raise ValueError(f"no file at {path}, expected the yaml of a checkpoint")
    plain = read_yaml(path)
    model = plain.get("model") if isinstance(plain, Mapping) else None
    params = model.get("params") if isinstance(model, Mapping) else None
    networks = params.get("ddconfig") if isinstance(params, Mapping) else None
    if not (isinstance(model, Mapping) and isinstance(networks, Mapping)):
        raise ValueError(f"{path} has no model.params.ddconfig, expected the yaml of a VQGAN of taming-transformers")
    return dict(model)


def _params(path: Path) -> dict[str, Any]:
    """`model.params` of a yaml, with what this library cannot follow refused."""
    model = _model(path)
    params = dict(model["params"])
    networks = params["ddconfig"]
    check_kinds(params, KINDS, path)
    check_kinds(networks, KINDS, path)
    kind = str(model.get("target", CLASSES[0])).rsplit(".", 1)[-1]
    if kind not in CLASSES:
        raise ValueError(f"{path} is of {few([kind])}, expected {' or '.join(CLASSES)}")
    for name, value in FIXED.items():
        if networks.get(name, value) != value:
            raise ValueError(f"{path}: got {name}={shown(networks[name])}, expected {value}: a VQGAN here has no other")
    if networks.get("attn_type", "vanilla") not in ("vanilla", "none"):
        raise ValueError(f"{path}: got attn_type={shown(networks['attn_type'])}, expected 'vanilla' or 'none'")
    return params


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
    if "resolution" in networks and "attn_resolutions" in networks:
        has_any = networks.get("attn_type", "vanilla") != "none"
        levels = [networks["resolution"] >> level for level in range(len(found["channels"]))]
        at = tuple(level for level, size in enumerate(levels) if has_any and size in networks["attn_resolutions"])
        for name in ("down_attention", "up_attention"):
            expected[name], said[name] = found[name], at
    for name, value in expected.items():
        if said.get(name, value) != value:
            raise ValueError(
                f"{path} has {name}={shown(said[name])} and the weights {value!r}; give the yaml that came with them"
            )
