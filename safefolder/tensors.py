"""Tensors of a folder, in one file or in shards that an index names; and JSON that others may have written.

    NAME                  model.safetensors, or what another project calls its own
    NAME.index.json       {"weight_map": {tensor: file}}, where there are several files

An index can name no file outside its folder. What is read is held to bounds before it is believed, and each error is
one short line: it says what is wrong and never repeats what a file holds at length.
"""

import contextlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from safefolder.messages import shown

LFS_POINTER = b"version https://git-lfs"
# A config is kilobytes, an index of a hundred thousand tensors a dozen megabytes.
MOST_CONFIG_BYTES = 1 << 20
MOST_JSON_BYTES = 64 << 20
MOST_JSON_DEPTH = 100
MOST_DIGITS = 100
# Of a safetensors file: names, shapes and places of some two hundred thousand tensors.
MOST_HEADER_BYTES = 16 << 20
MOST_CHARACTERS = 200

# Numbers that can be copied into a model's; torch has others, packed in bits or quantised, which cannot.
NUMBERS: Mapping[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "complex64", "complex128"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
        *("float16", "bfloat16", "float32", "float64"),
    )
}

# Parts of a name that torch's wrappers put there, and what puts them there.
WRAPPERS = {
    "_orig_mod": "torch.compile",
    "module": "DataParallel or DistributedDataParallel",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module": "checkpoint_wrapper",
}


def few(names: Sequence[str], between: str = ", ") -> str:
    """The first three, each in one line that is not long, and how many more."""
    first = (_line(name) for name in names[:3])
    return between.join(first) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def in_short(error: BaseException) -> str:
    """The first line of an error, of at most 200 characters; its type where it says nothing."""
    return _line((str(error).strip() or type(error).__name__).splitlines()[0])


def _line(text: str) -> str:
    text = "".join(each if each.isprintable() else " " for each in text[: 2 * MOST_CHARACTERS])
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 3] + "..."


def index_of(name: str) -> str:
    """The name of the index of what would be called `name` in one file."""
    return f"{name}.index.json"


def shard_name(suffix: str) -> re.Pattern[str]:
    """What a shard may be called: a plain name with this suffix, which is none of another folder."""
    return re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*" + re.escape(suffix))


def read_bytes(path: Path, most_bytes: int) -> bytes:
    """A file of at most so many bytes, whole.

    Raises:
        ValueError: a larger one, or none: a folder, or a pipe or device, which might never end.
        OSError: it cannot be opened.
    """
    # Opening a pipe would wait for its writer.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    status = os.fstat(handle)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, handle)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is a folder" if stat.S_ISDIR(status.st_mode) else "it is no file but a pipe or device")
        # It may grow meanwhile.
        with open(handle, "rb", closefd=False) as file:
            if status.st_size > most_bytes or len(data := file.read(most_bytes + 1)) > most_bytes:
                size = max(status.st_size, most_bytes + 1)
                raise ValueError(f"it has {size:,} bytes, expected at most {most_bytes:,}")
    return data


def read_json(path: Path, label: str | None = None, *, most_bytes: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """The object that a JSON file holds: the one way to read a file that others may have written.

    All numbers in it are finite, no key is there twice, no text has half a character of UTF-16, and lists and objects
    are at most `MOST_JSON_DEPTH` deep, so that who walks through it needs no care. A byte-order mark is passed over.

    Args:
        label: what errors call the file.
        most_bytes: what is larger is not read.

    Raises:
        ValueError: missing, no such JSON in UTF-8, no object, larger, or no regular file.
    """
    label = str(path) if label is None else label
    try:
        plain = _parsed(read_bytes(path, most_bytes))
    except RecursionError:
        raise ValueError(f"{label} cannot be read as JSON: it is nested too deeply") from None
    except OSError as error:
        raise ValueError(f"{label} cannot be read as JSON: {error.strerror or in_short(error)}") from error
    except (ValueError, MemoryError) as error:  # of JSON and of UTF-8
        raise ValueError(f"{label} cannot be read as JSON: {in_short(error)}") from error
    if not isinstance(plain, dict):
        raise ValueError(f"{label} holds a {type(plain).__name__}, expected an object")
    return plain


def _parsed(data: bytes) -> Any:
    text = data.decode("utf-8-sig")
    plain = json.loads(
        text, object_pairs_hook=_object, parse_int=_integer, parse_float=_real, parse_constant=_no_number
    )
    if text.count("[") + text.count("{") > MOST_JSON_DEPTH:
        level = [plain]
        for _ in range(MOST_JSON_DEPTH):
            parts = [part.values() if isinstance(part, dict) else part for part in level]
            level = [each for part in parts for each in part if isinstance(each, dict | list)]
        if level:
            raise ValueError(f"it is nested too deeply, expected at most {MOST_JSON_DEPTH} levels")
    if re.search(r"\\u[dD][89a-fA-F]", text):
        json.dumps(plain, ensure_ascii=False).encode()  # an error where half of a pair is alone
    return plain


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"it has the key {shown(twice)} twice")
    return made


def _integer(text: str) -> int:
    if (digits := len(text.lstrip("-"))) > MOST_DIGITS:
        raise ValueError(f"it has a number of {digits} digits, expected at most {MOST_DIGITS}")
    return int(text)


def _real(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _no_number(text)
    return value


def _no_number(text: str) -> None:
    raise ValueError(f"it has the number {text[:20]}, expected finite numbers")


def check_is_content(path: Path, label: str | None = None) -> None:
    """Raise ValueError where a file is missing, no regular one, or only Git LFS's pointer to it."""
    label = str(path) if label is None else label
    if not is_file(path):
        is_other = os.path.lexists(path)
        raise ValueError(f"{label} is no file, expected one" if is_other else f"no file at {label}")
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{label} is a pointer of Git LFS, not the file itself; fetch that with: git lfs pull")


def is_file(path: Path) -> bool:
    """Whether a regular file is there; what is no name of a file on this system is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def read_safetensors(path: Path, label: str | None = None) -> dict[str, Tensor]:
    """The tensors of one file, mapped from it. Raises ValueError where there is no such file."""
    label = str(path) if label is None else label
    check_is_content(path, label)
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > MOST_HEADER_BYTES:
            raise ValueError(f"its header is of {header:,} bytes, expected at most {MOST_HEADER_BYTES:,}")
        tensors = safetensors.torch.load_file(path)
    except Exception as error:  # a damaged header makes safetensors and torch stumble in many ways
        reason = in_short(error) if path.stat().st_size else "it is empty"
        raise ValueError(f"{label} is corrupt or no safetensors file: {reason}") from error
    if odd := [name for name, tensor in tensors.items() if tensor.dtype not in NUMBERS.values()]:
        raise ValueError(f"{label} holds {few(odd)} in {tensors[odd[0]].dtype}, which is no type of a model's weights")
    return tensors


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
    if is_file(folder / name):
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
    present = [file for file in inside if is_file(folder / file)]
    if missing := sorted(set(inside) - set(present)):
        problems.append(f"missing {few(missing)}")
    lacking, unlisted, damaged = [], [], []
    tensors: dict[str, Tensor] = {}
    for file in present:
        try:
            held = read(folder / file, file)
        except ValueError as error:
            damaged.append(str(error))
            continue
        lacking += [f"{tensor} in {file}" for tensor in sorted(promised[file] - held.keys())]
        unlisted += [f"{tensor} in {file}" for tensor in sorted(held.keys() - promised[file])]
        tensors |= held
    if damaged:
        problems.append(few(damaged, "; "))
    if lacking:
        problems.append(f"promised and not there: {few(lacking)}")
    if unlisted:
        problems.append(f"there and not promised: {few(unlisted)}")
    if problems:
        raise ValueError(f"{label}/{index_of(name)} does not fit its shards: " + "; ".join(problems))
    return tensors


def unwrapped(name: str) -> str:
    """A weight's name without the parts that torch's wrappers put there."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def wrapped_by(own: Collection[str], given: Collection[str]) -> str | None:
    """Why names are not those of a model, where it is only that a wrapper's parts are in them; else None.

    Args:
        own: names of the model's weights.
        given: names that were read.
    """
    other = set(given) - set(own)
    if not other or not {unwrapped(name) for name in other} <= set(own):
        return None
    parts = sorted({part for name in other for part in name.split(".") if part in WRAPPERS})
    said = " and ".join(f"{part!r}, which {WRAPPERS[part]} puts there" for part in parts)
    return f"their names hold {said}: save the model itself, not what wraps it"
