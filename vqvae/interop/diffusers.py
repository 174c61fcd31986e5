"""Models of diffusers' class `VQModel`, in and out: amused, Kandinsky's MoVQ, latent diffusion's vq-f4 and the like.

A `VQModel` folder is `config.json` and `diffusion_pytorch_model.safetensors` (or shards of it, or a pickled `.bin`).
Reading and writing one needs no diffusers. Its encoder, its decoder and its codebook are those of `vqvae.vqgan`, weight
for weight; its nearest code is that of `VectorQuantizer`. Pictures go in as 2y/255 − 1, and what its `decode` gives is
the mean of a discretised normal, y = 127.5 (1 + f). A `VQModel` has no scale for that: an imported model's starts where
a new one's does, and `vqvae.interop.fit_scale` finds the one of most likelihood.

Files written before diffusers 0.18 have other names for attention's weights; these are read, the present ones written.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

import safefolder
from safefolder.hub import download, is_hub_id
from vqvae.interop.layout import WITHIN, assembled, few, to_diffusers
from vqvae.interop.pickles import check_is_content, read_pickle
from vqvae.likelihoods import NormalConfig
from vqvae.model import VQVAE
from vqvae.quantizers import EMAVectorQuantizerConfig, VectorQuantizerConfig
from vqvae.vqgan import VQGAN, DiffusersConfig, VQGANConfig

CLASS = "VQModel"
CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
PICKLED = "diffusion_pytorch_model.bin"
CODEBOOK = "quantize.embedding.weight"

DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
# What diffusers takes for keys that a file leaves out; also all keys there are.
DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 3,
    "sample_size": 32,
    "num_vq_embeddings": 256,
    "norm_num_groups": 32,
    "vq_embed_dim": None,
    "scaling_factor": 0.18215,
    "norm_type": "group",
    "mid_block_add_attention": True,
    "lookup_from_codebook": False,
    "force_upcast": False,
}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
DEFAULT_IMAGE_SIZE = 256


def import_diffusers(
    folder_or_hub_id: str | Path,
    *,
    image_size: int | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
) -> VQGAN:
    """A `VQModel` as a model of ours, in eval mode: its codes are theirs, and `decode` gives their picture.

    It can be trained on: its codebook stays where it is until gradients move it.

    Args:
        folder_or_hub_id: a folder that its `save_pretrained` wrote, or `owner/name` on the hub.
        image_size: height and width, any multiple of 2^(levels − 1). Without it the file's `sample_size` where that is
            such a multiple and more than 32, which is what files hold that do not say; else 256.
        revision: a branch, tag or commit of the hub.
        subfolder: where in the folder or repository the model is, such as "vqvae", "vqgan" or "movq".

    Raises:
        ValueError: missing, corrupt, another class, or options that no `VQGAN` has, by name.
    """
    folder = _folder(folder_or_hub_id, revision, subfolder)
    plain = _config(folder)
    config = _ours(plain, folder / CONFIG, image_size)
    weights = to_diffusers(_weights(folder), _present_name, folder, CLASS)
    if CODEBOOK not in weights:
        raise ValueError(f"{folder} has no {CODEBOOK}, expected all weights of a {CLASS}")
    weights["quantizer.codebook"] = weights.pop(CODEBOOK)
    return assembled(config, weights, folder)


def export_diffusers(model: VQVAE, folder: str | Path) -> None:
    """Write a `VQModel` folder, whole or not at all: `VQModel.from_pretrained(folder)` has the model's codes and means.

    The likelihood's scale has no place there, nor have a moving-average codebook's statistics.

    Raises:
        ValueError: an architecture that `VQModel` has not; says why not, and what to do.
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
    with safefolder.replacing(Path(folder)) as scratch:
        scratch.mkdir()
        (scratch / CONFIG).write_text(json.dumps({"_class_name": CLASS, **config}, indent=2) + "\n", encoding="utf-8")
        safetensors.torch.save_file(plain, scratch / WEIGHTS, metadata={"format": "pt"})


def _folder(source: str | Path, revision: str | None, subfolder: str | None) -> Path:
    folder = Path(source)
    if not folder.exists():
        if not isinstance(source, str) or not is_hub_id(source):
            raise ValueError(f"no folder at {folder}, expected one of a {CLASS}, or owner/name on the hub")
        prefix = "" if subfolder is None else f"{subfolder}/"
        names = (CONFIG, WEIGHTS, INDEX, "diffusion_pytorch_model-*.safetensors", PICKLED)
        folder = download(source, [prefix + name for name in names], revision=revision)
    elif revision is not None:
        raise ValueError(f"{folder} is a folder here, which has no revision {revision!r}; leave revision out")
    if subfolder is not None:
        folder /= subfolder
    if not (folder / CONFIG).is_file():
        parts = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}")) if folder.is_dir() else []
        hint = f'; it has folders with one, so give subfolder="{parts[0]}" or the like' if parts else ""
        raise ValueError(f"{folder} has no {CONFIG}, expected a folder that {CLASS}.save_pretrained wrote{hint}")
    return folder


def _json(path: Path) -> dict[str, Any]:
    check_is_content(path)
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(plain, dict):
        raise ValueError(f"{path} holds a {type(plain).__name__}, expected an object")
    return plain


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    plain = _json(path)
    kind = plain.get("_class_name")
    if kind != CLASS:
        raise ValueError(f"{path} is of {kind or 'no class of diffusers'}, expected {CLASS}")
    fields = {name: value for name, value in plain.items() if not name.startswith("_")}
    if unknown := fields.keys() - DEFAULTS.keys():
        raise ValueError(f"{path} has {few(unknown)}, which this version does not know and so cannot follow")
    return {**DEFAULTS, **fields}


def _ours(plain: Mapping[str, Any], source: Path, image_size: int | None) -> VQGANConfig:
    def expect(name: str, known: Any) -> Any:
        if plain[name] not in known:
            raise ValueError(f"{source}: got {name}={plain[name]!r}, expected {' or '.join(map(repr, known))}")
        return plain[name]

    expect("act_fn", ("silu",))
    expect("out_channels", (plain["in_channels"],))
    spatial = expect("norm_type", ("group", "spatial")) == "spatial"
    channels = tuple(plain["block_out_channels"])
    for name, kinds in (("down_block_types", DOWN), ("up_block_types", UP)):
        if unknown := [kind for kind in plain[name] if kind not in kinds]:
            raise ValueError(f"{source}: got {name} with {unknown[0]!r}, expected {' or '.join(map(repr, kinds))}")
        if len(plain[name]) != len(channels):
            raise ValueError(
                f"{source}: got {len(plain[name])} {name}, expected one for each of {len(channels)} block_out_channels"
            )
    factor = 2 ** (len(channels) - 1)
    if image_size is None:
        size = plain["sample_size"]
        fits = isinstance(size, int) and size > DEFAULTS["sample_size"] and size % factor == 0
        image_size = size if fits else DEFAULT_IMAGE_SIZE
    dim = plain["latent_channels"] if plain["vq_embed_dim"] is None else plain["vq_embed_dim"]
    if spatial and dim != plain["latent_channels"]:
        raise ValueError(f"{source}: got vq_embed_dim={dim}, expected latent_channels for spatial norms")
    try:
        return VQGANConfig(
            image_size=image_size,
            num_channels=plain["in_channels"],
            likelihood=NormalConfig(),
            quantizer=VectorQuantizerConfig(num_codes=plain["num_vq_embeddings"], dim=dim, revival="off"),
            channels=channels,
            num_blocks=plain["layers_per_block"],
            down_attention=tuple(level for level, kind in enumerate(plain["down_block_types"]) if DOWN[kind]),
            up_attention=tuple(level for level, kind in enumerate(reversed(plain["up_block_types"])) if UP[kind]),
            mid_attention=plain["mid_block_add_attention"],
            latent_channels=plain["latent_channels"],
            spatial_norm=spatial,
            num_groups=plain["norm_num_groups"],
            diffusers=DiffusersConfig(
                scaling_factor=plain["scaling_factor"],
                lookup_from_codebook=plain["lookup_from_codebook"],
                force_upcast=plain["force_upcast"],
                sample_size=plain["sample_size"],
            ),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} does not fit a VQGAN: {error}") from error


def _weights(folder: Path) -> dict[str, Tensor]:
    if (folder / WEIGHTS).is_file():
        return _safetensors(folder / WEIGHTS)
    if (folder / INDEX).is_file():
        places = _json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict):
            raise ValueError(f"{folder / INDEX} has no weight_map, expected one from names to files")
        weights: dict[str, Tensor] = {}
        for file in sorted(set(places.values())):
            if Path(file).name != file:
                raise ValueError(f"{folder / INDEX} names {file}, expected files of its own folder")
            weights |= _safetensors(folder / file)
        if weights.keys() != places.keys():
            differing = few(weights.keys() ^ places.keys())
            raise ValueError(f"{folder}: {differing} stand in the index or in a shard, not in both")
        return weights
    if (folder / PICKLED).is_file():
        weights = read_pickle(folder / PICKLED)
        if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
            raise ValueError(f"{folder / PICKLED} is no dict of tensors, expected the weights of a {CLASS}")
        return weights
    raise ValueError(f"{folder} has no {WEIGHTS}, no {INDEX} and no {PICKLED}; expected one of them")


def _safetensors(path: Path) -> dict[str, Tensor]:
    check_is_content(path)
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is corrupt or no safetensors file: {error}") from error


def _present_name(name: str) -> str:
    found = re.fullmatch(r"(.+\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)", name)
    return f"{found[1]}.{OLD_ATTENTION[found[2]]}.{found[3]}" if found else name


def _theirs(model: VQVAE) -> dict[str, Any]:
    """The config of a `VQModel` like this model. Raises ValueError where there is none."""
    config = model.config
    if not isinstance(config, VQGANConfig):
        raise ValueError(
            f"a {type(model).__name__} has other networks than a {CLASS}, whose weights have no place in one: train a "
            "VQGAN, or export ONNX or torch.export programs"
        )
    quantizer = config.quantizer
    if not isinstance(quantizer, VectorQuantizerConfig | EMAVectorQuantizerConfig):
        raise ValueError(
            f"{type(model.quantizer).__name__} finds codes otherwise than a {CLASS}, which takes the nearest of one "
            "codebook: train with VectorQuantizer or EMAVectorQuantizer, or export ONNX or torch.export programs"
        )
    if quantizer.normalize:
        raise ValueError(
            f"a {CLASS} does not normalise vectors before it compares them: train with normalize=False, or export ONNX "
            "or torch.export programs"
        )
    if not isinstance(config.likelihood, NormalConfig):
        raise ValueError(
            f"the decoder gives the parameters of a {type(model.likelihood).__name__}, where that of a {CLASS} gives a "
            "picture: train with NormalConfig, or export ONNX or torch.export programs"
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
        "sample_size": config.image_size if own.sample_size is None else own.sample_size,
        "num_vq_embeddings": quantizer.num_codes,
        "norm_num_groups": config.num_groups,
        "vq_embed_dim": quantizer.dim,
        "scaling_factor": own.scaling_factor,
        "norm_type": "spatial" if config.spatial_norm else "group",
        "mid_block_add_attention": config.mid_attention,
        "lookup_from_codebook": own.lookup_from_codebook,
        "force_upcast": own.force_upcast,
    }
