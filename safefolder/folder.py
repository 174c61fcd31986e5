"""A model as a folder: `config.json` with plain data, and tensors in safetensors files.

    config.json                        {"format": 1, "class": ..., the rest is the class's own}
    model.safetensors                  the tensors; or, where they are larger than a shard may be:
    model-00001-of-00002.safetensors   ... each shard
    model.safetensors.index.json       {"metadata": {"total_size"}, "weight_map": {tensor: shard}}

Shards and index are as `huggingface_hub` plans and reads them. Nothing in a folder is ever run, and an index can name
no file outside its folder.
"""

import glob
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from safefolder import hub, packaged
from safefolder.cards import PICTURES
from safefolder.files import is_there, of_one, recover, replacing_folder
from safefolder.tensors import (
    MOST_CONFIG_BYTES,
    few,
    index_of,
    read_index,
    read_json,
    read_tensors,
    shard_name,
    wrapped_by,
)

FORMAT = 1
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = index_of(WEIGHTS_NAME)
SHARD_NAMES = "model-?????-of-?????.safetensors"
CARD_NAME = "README.md"
# What may lie beside a model and belongs to it; anything else in its folder stays at home.
BESIDE = (CARD_NAME, "elbo.json", *PICTURES)
MAX_SHARD_SIZE = 5 * 10**9
_SHARD = shard_name(".safetensors")


def save(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, max_shard_size: int = MAX_SHARD_SIZE
) -> None:
    """Write `config.json` and `model.safetensors`, or its shards, into `folder`: all or nothing.

    Args:
        folder: a model of this library that is there already is replaced. Where anything else is in its folder, a card,
            figures and pictures (`BESIDE`) among it, nothing is written: those tell of the model that is there. Where
            it is a symbolic link, what that points to is written.
        config: plain data, with the class under "class".
        tensors: by name.
        max_shard_size: bytes of tensors in one file; a single tensor that is larger gets a file to itself.

    Raises:
        ValueError: the disk is full, the place cannot be written to, or something else is there; nothing already there
            was touched.
    """
    if max_shard_size < 1:
        raise ValueError(f"got max_shard_size={max_shard_size}, expected a number of bytes >= 1")
    text = json.dumps({"format": FORMAT, **config}, indent=2) + "\n"
    shards = _plan(tensors, max_shard_size)
    with replacing_folder(folder, (CONFIG_NAME, WEIGHTS_NAME, INDEX_NAME, SHARD_NAMES), _is_ours) as scratch:
        (scratch / CONFIG_NAME).write_text(text, encoding="utf-8")
        for file, names in shards.items():
            # Weights of a compiled or strided module may share storage or be non-contiguous; a file holds plain
            # copies, and memory those of one file at a time.
            plain = {name: tensors[name].detach().cpu().contiguous().clone() for name in names}
            safetensors.torch.save_file(plain, scratch / file, metadata={"format": "pt"})
            del plain
        if len(shards) > 1:
            weight_map = {name: file for file, names in shards.items() for name in names}
            total = sum(_num_bytes(tensor) for tensor in tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (scratch / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _is_ours(folder: Path) -> bool:
    """Other libraries' folders have files of the same names."""
    try:
        return bool(read_config(folder))
    except ValueError:
        return False


def _plan(tensors: Mapping[str, Tensor], max_shard_size: int) -> dict[str, list[str]]:
    """Files, and the names of the tensors in each."""
    if sum(_num_bytes(tensor) for tensor in tensors.values()) <= max_shard_size:
        return {WEIGHTS_NAME: list(tensors)}
    from huggingface_hub import split_torch_state_dict_into_shards

    # By sizes alone: what shares storage is written as copies.
    sizes = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()}
    return split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_size).filename_to_tensors


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def load(
    source: str | Path,
    *,
    part: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the config and the weights from a folder, or where no such folder exists from a hub id `owner/name`, or from
    the name of a packaged model (`safefolder.packaged`).

    The other options are those of `HubOptions`.

    Args:
        part: the folder in which a run has the model, should the source be a run and no model itself.

    Raises:
        ValueError: the folder is missing, incomplete, corrupt, foreign, or of a newer format; or an option was given
            that a folder on this machine has no use for.
    """
    place = None if subfolder is None else _inside(subfolder)
    folder = _named(source)
    if not is_there(folder) and isinstance(source, str) and hub.is_hub_id(source):
        names = [CONFIG_NAME, WEIGHTS_NAME, INDEX_NAME]
        prefixes = ["" if place is None else f"{place}/", *([f"{part}/"] if part and place is None else [])]
        patterns = [glob.escape(prefix) + name for prefix in prefixes for name in (*names, SHARD_NAMES)]
        folder = hub.download(
            source,
            patterns,
            revision=revision,
            local_files_only=local_files_only,
            token=token,
            cache_dir=cache_dir,
        )
        if part and place is None and _is_run_with(folder, part):
            place = PurePosixPath(part)
        label = source + ("" if place is None else f"/{place}") + ("" if revision is None else f" at {revision!r}")
        return _read(folder if place is None else folder / place, label)
    given = {"revision": revision, "token": token, "cache_dir": cache_dir}
    if is_there(folder) and (extra := [name for name, value in given.items() if value is not None]):
        raise ValueError(
            f"{folder} is a folder on this machine, which has no {' and no '.join(extra)}; leave that out, "
            "or name a model on the hub"
        )
    if part and place is None:
        place = PurePosixPath(part) if _is_run_with(folder, part) else None
    if place is not None:
        folder = folder / place
    if not is_there(folder):
        raise ValueError(f"no model folder at {folder}{packaged.advice(source)}")
    if part and (folder / "state").is_dir():
        raise ValueError(
            f"{folder} is a run whose {part} is not finished: go on with `vqvae train --resume --run {folder}`"
        )
    return _read(folder, str(folder))


def _named(source: str | Path) -> Path:
    """What is named as a folder, once an exchange there is over."""
    if not isinstance(source, str | Path) or not str(source):
        raise ValueError(f"got {source!r}, expected a folder's path, or the hub id of a model, owner/name")
    try:
        recover(Path(source))
    except OSError as error:  # a name that is too long, for one
        raise ValueError(f"{str(source)[:200]!r} cannot be looked at: {error.strerror}") from error
    return packaged.find(source) or Path(source)


def _is_run_with(folder: Path, part: str) -> bool:
    """Whether it is a run with this part, and no model itself."""
    return is_there(folder / part, CONFIG_NAME) and not is_there(folder, CONFIG_NAME)


def _inside(subfolder: str) -> PurePosixPath:
    """A path that stays inside the folder it is joined to."""
    path = PurePosixPath(subfolder)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\\" in subfolder:
        raise ValueError(f"got subfolder={subfolder!r}, expected the path of a folder inside the source")
    return path


def has_part(source: str | Path, name: str) -> bool:
    """Whether a run, here or on the hub, has a model in its folder `name`; of the hub only configs are fetched.

    Raises:
        ValueError: the hub has no such repository, or cannot be reached and the cache lacks it.
    """
    folder = Path(source)
    if is_there(folder) or not isinstance(source, str) or not hub.is_hub_id(source):
        return is_there((packaged.find(source) or folder) / name)
    return _is_run_with(hub.download(source, [CONFIG_NAME, f"{glob.escape(name)}/{CONFIG_NAME}"]), name)


def _read(folder: Path, label: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    def read() -> tuple[dict[str, Any], dict[str, Tensor]]:
        _weight_files(folder, label)
        return read_config(folder, label), read_tensors(folder, WEIGHTS_NAME, label)

    config, tensors = of_one(folder, read)
    if packaged.is_packaged(folder):  # half of the bytes are to save room, and not to compute with
        tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    return config, tensors


def _weight_files(folder: Path, label: str) -> list[str]:
    """The single file of weights or else the index; ValueError where the folder lacks a file that every model has."""
    files = [name for name in (WEIGHTS_NAME, INDEX_NAME) if (folder / name).is_file()]
    for name, found in ((CONFIG_NAME, (folder / CONFIG_NAME).is_file()), (WEIGHTS_NAME, bool(files))):
        if not found:
            raise ValueError(f"{label} has no {name}: expected a folder that save_pretrained wrote")
    if len(files) > 1:
        raise ValueError(f"{label} has both {WEIGHTS_NAME} and {INDEX_NAME}; remove the one that is of another model")
    return files


def read_config(folder: Path, label: str | None = None) -> dict[str, Any]:
    """The config of a folder, without its weights.

    Raises:
        ValueError: it is corrupt, foreign, or of a newer format; `label` is what the error calls the folder.
    """
    label = str(folder) if label is None else label
    config = read_json(folder / CONFIG_NAME, f"{label}/{CONFIG_NAME}", most_bytes=MOST_CONFIG_BYTES)
    if "format" not in config or "class" not in config:
        raise ValueError(f"{label}/{CONFIG_NAME} is not of this library: it has no 'format' and 'class'")
    if not isinstance(config["class"], str):
        raise ValueError(f"{label}/{CONFIG_NAME} is not of this library: its class is {str(config['class'])[:100]!r}")
    if type(config["format"]) is not int or config["format"] < 1:
        raise ValueError(f"{label}/{CONFIG_NAME} is not of this library: its format is {config['format']!r}")
    if config["format"] > FORMAT:
        raise ValueError(
            f"{label} is of format {config['format']}, this version reads format {FORMAT}; upgrade vqvae-priors"
        )
    return config


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy `tensors` into `module`; every name, every shape and every kind of number must match.

    Raises:
        ValueError: names the first missing, extra, mis-shaped and mis-typed entries, and counts the others; or those
            that hold NaN.
    """
    check_weights(module.state_dict(), tensors, source)
    if wrong := [name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.isnan().any()]:
        raise ValueError(f"the weights in {source} are damaged: {few(sorted(wrong))} hold NaN")
    with torch.no_grad():
        module.load_state_dict(dict(tensors))


def check_weights(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """What `load_weights` checks, of a module with this state, which may be on the device "meta". Errors as there."""
    problems = []
    if missing := sorted(own.keys() - tensors.keys()):
        problems.append(f"missing {few(missing)}")
    if extra := sorted(tensors.keys() - own.keys()):
        problems.append(f"unknown {few(extra)}")
    if problems and (reason := wrapped_by(own, tensors)):
        raise ValueError(f"the weights in {source} do not fit its config: {reason}")
    shapes, kinds = [], []
    for name in sorted(own.keys() & tensors.keys()):
        got, expected = tensors[name], own[name]
        if got.shape != expected.shape:
            shapes.append(f"{name} is {tuple(got.shape)}, expected {tuple(expected.shape)}")
        # Copying would turn one into the other without a word; other widths of the same kind are a choice.
        if _kind(got.dtype) != _kind(expected.dtype):
            kinds.append(f"{name} is {got.dtype}, expected {_kind(expected.dtype)}")
    problems += [few(each, "; ") for each in (shapes, kinds) if each]
    if problems:
        raise ValueError(f"the weights in {source} do not fit its config: " + "; ".join(problems))


def _kind(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "booleans"
    if dtype.is_complex:
        return "complex numbers"
    return "floating point" if dtype.is_floating_point else "integers"


def members(folder: Path) -> list[str]:
    """The names of a model's files in its folder: config, weights and, where there are shards, their index.

    Raises:
        ValueError: it is no folder that `save` wrote, or a shard is missing.
    """
    folder = Path(folder)
    return of_one(folder, lambda: _members(folder))


def _members(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ValueError(f"no model folder at {folder}")
    files = _weight_files(folder, str(folder))
    read_config(folder)
    shards: list[str] = []
    if INDEX_NAME in files:
        shards = sorted(set(read_index(folder, WEIGHTS_NAME).values()))
        if wrong := [file for file in shards if not _SHARD.fullmatch(file) or not (folder / file).is_file()]:
            raise ValueError(f"{folder / INDEX_NAME} names {few(wrong)}, which the folder does not have")
    return [CONFIG_NAME, *files, *shards]


def stale_patterns(prefix: str = "") -> list[str]:
    """What a new model in a repository's folder takes the place of: weights, whole or in shards, and their figures."""
    beside = [name for name in BESIDE if name != CARD_NAME]
    return [glob.escape(prefix) + name for name in (WEIGHTS_NAME, INDEX_NAME, SHARD_NAMES, *beside)]


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "A model of vqvae-priors",
    token: str | bool | None = None,
) -> str:
    """Upload a folder that `save` wrote, in one commit, with its card, elbo.json and pictures where it has them.

    Weights and figures that lay there before go; other files stay. The options are those of `upload`, and so is what
    comes back: the address of the repository at this commit.

    Raises:
        ValueError: it is no folder that `save` wrote, or the hub could not be written to.
    """
    folder = Path(folder)
    names = [*members(folder), *(name for name in BESIDE if (folder / name).is_file())]
    return hub.upload(
        {name: folder / name for name in names},
        repo_id,
        message=message,
        replaces=stale_patterns(),
        private=private,
        revision=revision,
        token=token,
    )
