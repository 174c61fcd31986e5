"""Tensors of a folder, in one file or in shards that an index names; and JSON, read with one line for what is wrong.

    NAME                  model.safetensors, or what another project calls its own
    NAME.index.json       {"weight_map": {tensor: file}}, where there are several files

An index can name no file outside its folder.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

LFS_POINTER = b"version https://git-lfs"


def few(names: Sequence[str], between: str = ", ") -> str:
    """The first three, and how many more."""
    return between.join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def index_of(name: str) -> str:
    """The name of the index of what would be called `name` in one file."""
    return f"{name}.index.json"


def shard_name(suffix: str) -> re.Pattern[str]:
    """What a shard may be called: a plain name with this suffix, which is none of another folder."""
    return re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*" + re.escape(suffix))


def read_json(path: Path, label: str | None = None) -> dict[str, Any]:
    """The object that a JSON file holds; `label` is what errors call it.

    Raises:
        ValueError: missing, no JSON in UTF-8, or no object.
    """
    label = str(path) if label is None else label
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # of JSON and of UTF-8
        raise ValueError(f"{label} cannot be read as JSON: {error}") from error
    if not isinstance(plain, dict):
        raise ValueError(f"{label} holds a {type(plain).__name__}, expected an object")
    return plain


def check_is_content(path: Path, label: str | None = None) -> None:
    """Raise ValueError where a file is missing, or only Git LFS's pointer to it."""
    label = str(path) if label is None else label
    if not path.is_file():
        raise ValueError(f"no file at {label}")
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{label} is a pointer of Git LFS, not the file itself; fetch that with: git lfs pull")


def read_safetensors(path: Path, label: str | None = None) -> dict[str, Tensor]:
    """The tensors of one file, mapped from it. Raises ValueError where there is no such file."""
    label = str(path) if label is None else label
    check_is_content(path, label)
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        reason = str(error) if path.stat().st_size else "it is empty"
        raise ValueError(f"{label} is corrupt or no safetensors file: {reason}") from error


def read_index(folder: Path, name: str, label: str | None = None) -> dict[str, str]:
    """Tensors and the files they are in. Raises ValueError where there is no such index; file names are not checked."""
    label = f"{folder if label is None else label}/{index_of(name)}"
    weight_map = read_json(folder / index_of(name), label).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{label} has no 'weight_map' from names of tensors to files")
    return weight_map


def read_tensors(
    folder: Path,
    name: str,
    label: str | None = None,
    read: Callable[[Path, str], Mapping[str, Tensor]] = read_safetensors,
) -> dict[str, Tensor]:
    """The tensors of the file `name`, or else of the shards that its index names.

    Args:
        label: what errors call the folder.
        read: for a file of another kind than safetensors.

    Raises:
        ValueError: corrupt; or all that is wrong with the shards, in one error.
    """
    label = str(folder) if label is None else label
    if (folder / name).is_file():
        return dict(read(folder / name, f"{label}/{name}"))
    promised: dict[str, set[str]] = {}
    for tensor, file in read_index(folder, name, label).items():
        promised.setdefault(file, set()).add(tensor)
    suffix = Path(name).suffix
    known = shard_name(suffix)
    problems = []
    if outside := sorted(repr(file) for file in promised if not known.fullmatch(file)):
        problems.append(f"it names {few(outside)}, expected {suffix} files of this folder")
    inside = sorted(file for file in promised if known.fullmatch(file))
    if missing := [file for file in inside if not (folder / file).is_file()]:
        problems.append(f"missing {few(missing)}")
    lacking, unlisted = [], []
    tensors: dict[str, Tensor] = {}
    for file in inside:
        if file in missing:
            continue
        try:
            held = read(folder / file, file)
        except ValueError as error:
            problems.append(str(error))
            continue
        lacking += [f"{tensor} in {file}" for tensor in sorted(promised[file] - held.keys())]
        unlisted += [f"{tensor} in {file}" for tensor in sorted(held.keys() - promised[file])]
        tensors |= held
    if lacking:
        problems.append(f"promised and not there: {few(lacking)}")
    if unlisted:
        problems.append(f"there and not promised: {few(unlisted)}")
    if problems:
        raise ValueError(f"{label}/{index_of(name)} does not fit its shards: " + "; ".join(problems))
    return tensors
