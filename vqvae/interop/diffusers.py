"""Models of diffusers' class `VQModel`, in and out: amused, Kandinsky's MoVQ, latent diffusion's vq-f4 and the like.

A `VQModel` folder is `config.json` and `diffusion_pytorch_model.safetensors` (or shards of it, or a pickled `.bin`).
Reading and writing one needs no diffusers. Its encoder, its decoder and its codebook are those of `vqvae.vqgan`, weight
for weight; its nearest code is that of `VectorQuantizer`. Pictures go in as 2y/255 − 1, and its `decode` gives μ of a
discretised normal, μ = 127.5 (1 + f), which is its point and not quite its mean. A `VQModel` has no scale for that: an
imported model's starts where a new one's does, and `vqvae.interop.fit_scale` finds the one of most likelihood.

Files written before diffusers 0.18 have other names for attention's weights; these are read, the present ones written.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from safefolder.files import replacing_folder
from safefolder.hub import download, is_hub_id
from safefolder.messages import shown
from safefolder.tensors import MOST_CONFIG_BYTES, few, index_of, is_file, read_json, read_tensors
from vqvae.interop.pickles import read_pickle
from vqvae.interop.state_dicts import Tell, check_weights_of, plain_names
from vqvae.interop.weight_names import (
    CODEBOOK,
    MOST_LEVELS,
    MOST_PIXELS,
    NEAREST,
    WITHIN,
    assembled,
    check_kinds,
    to_diffusers,
)
from vqvae.levels import height_and_width
from vqvae.likelihoods import Normal
from vqvae.model import VQVAE
from vqvae.quantizers import EMAVectorQuantizer, VectorQuantizer
from vqvae.vqgan import VQGAN, DiffusersConfig

CLASS = "VQModel"
CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLED = "diffusion_pytorch_model.bin"
# What a file may be called in one piece or in several.
SAFE_FILES = (WEIGHTS, index_of(WEIGHTS), "diffusion_pytorch_model-?????-of-?????.safetensors")
PICKLED_FILES = (PICKLED, index_of(PICKLED), "diffusion_pytorch_model-?????-of-?????.bin")

DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
# All keys that a file may have: of what kind they are, and what diffusers takes where they are left out.
FIELDS: dict[str, tuple[str, Any]] = {
    "in_channels": ("an integer", 3),
    "out_channels": ("an integer", 3),
    "down_block_types": ("a list of texts", ["DownEncoderBlock2D"]),
    "up_block_types": ("a list of texts", ["UpDecoderBlock2D"]),
    "block_out_channels": ("a list of integers", [64]),
    "layers_per_block": ("an integer", 1),
    "act_fn": ("a text", "silu"),
    "latent_channels": ("an integer", 3),
    "sample_size": ("an integer or null", 32),
    "num_vq_embeddings": ("an integer", 256),
    "norm_num_groups": ("an integer", 32),
    "vq_embed_dim": ("an integer or null", None),
    "scaling_factor": ("a number", 0.18215),
    "norm_type": ("a text", "group"),
    "mid_block_add_attention": ("true or false", True),
    "lookup_from_codebook": ("true or false", False),
    "force_upcast": ("true or false", False),
}
KINDS = {name: kind for name, (kind, _) in FIELDS.items()}
DEFAULTS = {name: default for name, (_, default) in FIELDS.items()}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
DEFAULT_IMAGE_SIZE = 256


def import_diffusers(
    folder_or_hub_id: str | Path,
    *,
    image_size: int | tuple[int, int] | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    tell: Tell | None = None,
) -> VQGAN:
    """A `VQModel` as a model of ours, in eval mode: its codes are theirs, and `decode` gives their picture.

    It can be trained on: its codebook stays where it is until gradients move it.

    Args:
        folder_or_hub_id: a folder that its `save_pretrained` wrote, or `owner/name` on the hub.
        image_size: side, or height and width, any multiples of 2^(levels − 1). Without it the file's `sample_size`
            where that is such a multiple, more than 32, which is what files hold that do not say, and at most 4096;
            else 256.
        revision: a branch, tag or commit of the hub.
        subfolder: where in the folder or repository the model is, such as "vqvae", "vqgan" or "movq".
        tell: called with a sentence where the weights have names that others were put before; e.g. `print`.

    Raises:
        ValueError: missing, corrupt, another class, or options that no `VQGAN` has, by name.
    """
    folder = _folder(folder_or_hub_id, revision, subfolder)
    path = folder / CONFIG
    plain = _config(path)
    _check_design(plain, path)
    found = plain_names(_weights(folder), folder, tell)
    weights = to_diffusers(found, _present_name, NEAREST, folder, CLASS)
    return assembled(lambda: _ours(plain, image_size), weights, folder)


def export_diffusers(model: VQVAE, folder: str | Path) -> None:
    """Write a folder for `VQModel.from_pretrained`, whole or not at all, with the model's codes and pictures.

    The likelihood's scale has no place there, nor have a moving-average codebook's statistics. Of unit vectors
    (`normalize=True`) the nearest to a feature is the one nearest to the feature's direction, so their codes are the
    same but for ties; a `VQModel` that is trained on would not keep their length.

    Args:
        folder: a `VQModel` of these two files that is there already is replaced; where anything else is in it, nothing
            is written.

    Raises:
        ValueError: an architecture that `VQModel` has not; says why not, and what to do. Or the folder has other files.
    """
    config = _theirs(model)
    within = {ours: theirs for theirs, ours in WITHIN.items()}
    codebook = model.quantizer.table
    assert isinstance(codebook, Tensor)
    tensors = {CODEBOOK: codebook}
    for name, tensor in model.state_dict().items():
        if name.startswith(("encoder.", "decoder.")):
            first = ".".join(name.split(".", 2)[:2])
            tensors[name.replace(first, within[first], 1) if first in within else name] = tensor
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing_folder(folder, (CONFIG, WEIGHTS), _is_theirs) as scratch:
        (scratch / CONFIG).write_text(json.dumps({"_class_name": CLASS, **config}, indent=2) + "\n", encoding="utf-8")
        safetensors.torch.save_file(plain, scratch / WEIGHTS, metadata={"format": "pt"})


def _folder(source: str | Path, revision: str | None, subfolder: str | None) -> Path:
    folder = Path(source)
    if not folder.exists():
        if not isinstance(source, str) or not is_hub_id(source):
            raise ValueError(f"no folder at {folder}, expected one of a {CLASS}, or owner/name on the hub")
        prefix = "" if subfolder is None else f"{subfolder}/"
        folder = download(source, [prefix + name for name in (CONFIG, *SAFE_FILES)], revision=revision)
        if not any(any((folder / prefix).glob(name)) for name in SAFE_FILES):
            folder = download(source, [prefix + name for name in (CONFIG, *PICKLED_FILES)], revision=revision)
    elif revision is not None:
        raise ValueError(f"{folder} is a folder here, which has no revision {revision!r}; leave revision out")
    if subfolder is not None:
        folder /= subfolder
    if not is_file(folder / CONFIG):
        parts = sorted(path.parent for path in folder.glob(f"*/{CONFIG}")) if folder.is_dir() else []
        hint = ""
        if theirs := [part.name for part in parts if _is_theirs(part)]:
            hint = f'; it has folders with one, so give subfolder="{theirs[0]}" or the like'
        elif parts:
            hint = f"; it has folders with one, {few([part.name for part in parts])}, which are of others"
        raise ValueError(f"{folder} has no {CONFIG}, expected a folder that {CLASS}.save_pretrained wrote{hint}")
    return folder


def _is_theirs(folder: Path) -> bool:
    try:
        return read_json(folder / CONFIG, most_bytes=MOST_CONFIG_BYTES).get("_class_name") == CLASS
    except ValueError:
        return False


def _config(path: Path) -> dict[str, Any]:
    plain = read_json(path, most_bytes=MOST_CONFIG_BYTES)
    kind = plain.get("_class_name")
    if kind is None and "class" in plain and "format" in plain:
        raise ValueError(
            f"{path} is of a {_text(plain['class'])} that this library saved, so there is nothing to import: "
            "from_pretrained and the commands read it as it is"
        )
    if kind != CLASS:
        raise ValueError(f"{path} is of {_text(kind) if kind else 'no class of diffusers'}, expected {CLASS}")
    fields = {name: value for name, value in plain.items() if not name.startswith("_")}
    if unknown := fields.keys() - DEFAULTS.keys():
        raise ValueError(f"{path} has {few(sorted(unknown))}, which this version does not know and so cannot follow")
    check_kinds(fields, KINDS, path)
    return {**DEFAULTS, **fields}


def _text(value: Any) -> str:
    return few([value]) if isinstance(value, str) else shown(value)


def _check_design(plain: Mapping[str, Any], source: Path) -> None:
    """Raise ValueError for options that no `VQGAN` has."""

    def expect(name: str, known: Any) -> Any:
        if plain[name] not in known:
            raise ValueError(f"{source}: got {name}={shown(plain[name])}, expected {' or '.join(map(repr, known))}")
        return plain[name]

    expect("act_fn", ("silu",))
    expect("out_channels", (plain["in_channels"],))
    spatial = expect("norm_type", ("group", "spatial")) == "spatial"
    num_levels = len(plain["block_out_channels"])
    if plain["sample_size"] is not None and plain["sample_size"] < 1:
        raise ValueError(
            f"{source}: got sample_size={shown(plain['sample_size'])}, expected pixels along a side, or null"
        )
    if num_levels > MOST_LEVELS:
        raise ValueError(f"{source}: got {num_levels:,} block_out_channels, expected at most {MOST_LEVELS}")
    for name, kinds in (("down_block_types", DOWN), ("up_block_types", UP)):
        if unknown := [kind for kind in plain[name] if kind not in kinds]:
            raise ValueError(f"{source}: got {name} with {shown(unknown[0])}, expected {' or '.join(map(repr, kinds))}")
        if len(plain[name]) != num_levels:
            raise ValueError(
                f"{source}: got {len(plain[name])} {name}, expected one for each of {num_levels} block_out_channels"
            )
    if spatial and plain["vq_embed_dim"] not in (None, plain["latent_channels"]):
        raise ValueError(
            f"{source}: got vq_embed_dim={plain['vq_embed_dim']}, expected latent_channels for spatial norms"
        )


def _ours(plain: Mapping[str, Any], image_size: int | tuple[int, int] | None) -> VQGAN.Config:
    channels, size = tuple(plain["block_out_channels"]), plain["sample_size"]
    if image_size is None:
        fits = (
            size is not None and DEFAULTS["sample_size"] < size <= MOST_PIXELS and size % 2 ** (len(channels) - 1) == 0
        )
        image_size = size if fits else DEFAULT_IMAGE_SIZE
    dim = plain["latent_channels"] if plain["vq_embed_dim"] is None else plain["vq_embed_dim"]
    return VQGAN.Config(
        image_size=image_size,
        num_channels=plain["in_channels"],
        likelihood=Normal.Config(),
        quantizer=VectorQuantizer.Config(num_codes=plain["num_vq_embeddings"], dim=dim, revival="off"),
        channels=channels,
        num_blocks=plain["layers_per_block"],
        down_attention=tuple(level for level, kind in enumerate(plain["down_block_types"]) if DOWN[kind]),
        up_attention=tuple(level for level, kind in enumerate(reversed(plain["up_block_types"])) if UP[kind]),
        mid_attention=plain["mid_block_add_attention"],
        latent_channels=plain["latent_channels"],
        spatial_norm=plain["norm_type"] == "spatial",
        num_groups=plain["norm_num_groups"],
        diffusers=DiffusersConfig(
            scaling_factor=plain["scaling_factor"],
            lookup_from_codebook=plain["lookup_from_codebook"],
            force_upcast=plain["force_upcast"],
            sample_size=size,
        ),
    )


def _weights(folder: Path) -> dict[str, Tensor]:
    if any(is_file(folder / name) for name in SAFE_FILES[:2]):
        return read_tensors(folder, WEIGHTS)
    if any(is_file(folder / name) for name in PICKLED_FILES[:2]):
        return read_tensors(folder, PICKLED, read=_pickled)
    found = sorted(path.name for path in folder.iterdir() if path.name != CONFIG)
    raise ValueError(
        f"{folder} has no {WEIGHTS} and no {PICKLED}, in one file or with an index; it has "
        f"{few(found) or 'its config alone'}. Of variants such as fp16 none is read: save the model again without one"
    )


def _pickled(path: Path, _: str) -> dict[str, Tensor]:
    weights = read_pickle(path)
    if not isinstance(weights, dict):
        raise ValueError(f"{path} has no weights by name, expected a {CLASS}")
    check_weights_of(weights, path, f"a {CLASS}")
    return weights


def _present_name(name: str) -> str:
    found = re.fullmatch(r"(.+\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)", name)
    return f"{found[1]}.{OLD_ATTENTION[found[2]]}.{found[3]}" if found else name


def _theirs(model: VQVAE) -> dict[str, Any]:
    """The config of a `VQModel` like this model. Raises ValueError where there is none."""
    config = model.config
    if not isinstance(config, VQGAN.Config):
        raise ValueError(
            f"a {type(model).__name__} has other networks than a {CLASS}, whose weights have no place in one: train a "
            "VQGAN, or export ONNX or torch.export programs"
        )
    quantizer = config.quantizer
    if not isinstance(quantizer, VectorQuantizer.Config | EMAVectorQuantizer.Config):
        raise ValueError(
            f"{type(model.quantizer).__name__} finds codes otherwise than a {CLASS}, which takes the nearest of one "
            "codebook: train with VectorQuantizer or EMAVectorQuantizer, or export ONNX or torch.export programs"
        )
    if not isinstance(config.likelihood, Normal.Config):
        raise ValueError(
            f"the decoder gives the parameters of a {type(model.likelihood).__name__}, where that of a {CLASS} gives a "
            "picture: train with Normal.Config, or export ONNX or torch.export programs"
        )
    if config.spatial_norm and quantizer.dim != config.latent_channels:
        raise ValueError(
            f"got codes of width {quantizer.dim} and latent_channels={config.latent_channels}; spatial norms of a "
            f"{CLASS} need them equal"
        )
    down, up = ({has: kind for kind, has in kinds.items()} for kinds in (DOWN, UP))
    levels = range(len(config.channels))
    own = config.diffusers
    return {
        "in_channels": config.num_channels,
        "out_channels": config.num_channels,
        "down_block_types": [down[level in config.down_attention] for level in levels],
        "up_block_types": [up[level in config.up_attention] for level in reversed(levels)],
        "block_out_channels": list(config.channels),
        "layers_per_block": config.num_blocks,
        "act_fn": "silu",
        "latent_channels": config.latent_channels,
        "sample_size": max(height_and_width(config.image_size)) if own.sample_size is None else own.sample_size,
        "num_vq_embeddings": quantizer.num_codes,
        "norm_num_groups": config.num_groups,
        "vq_embed_dim": quantizer.dim,
        "scaling_factor": own.scaling_factor,
        "norm_type": "spatial" if config.spatial_norm else "group",
        "mid_block_add_attention": config.mid_attention,
        "lookup_from_codebook": own.lookup_from_codebook,
        "force_upcast": own.force_upcast,
    }
