"""The files of a tokenized set: shards and index, each written whole or not at all, and checked before it is trusted.

Any process may write any shard, and whoever finds all of them there writes the index. What is written follows from the
plan and the images alone, so it does no harm where two do it, at the same moment too: each writes to a name of its own,
which then takes the place. Names of processes that were killed are swept up once the set is whole; a process that is
still writing then finds its own gone, and the shard there.

A run that goes on from a shard reads all of it and compares its checksums.
"""

import contextlib
import json
import os
import re
import secrets
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

import safefolder
from vqvae.tokens.layout import CLASS_NAME, FORMAT, INDEX_NAME, Plan

# The limit that safetensors itself sets.
_MAX_HEADER = 100_000_000
_SIZES = {"U8": 1, "U16": 2, "U32": 4, "I64": 8}
_DTYPES = {"uint16": "U16", "uint32": "U32"}
_BLOCK = 1 << 20
# What files of ours are called for the moment.
_LEFT = re.compile(
    r"\.{1,2}(codes-\d{5,}\.safetensors|index\.json)(\.[0-9a-f]{1,8}|(\.[0-9a-f]{1,8})?\.(writing|mode))"
)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The codes of one slice of a shard's images.

    Attributes:
        first: the first image of the slice, counted in the source.
        codes: `"k *grid"`, of the images that could be read, in order; int64, or as on the disk.
        labels: int64, one for each of them; None where the source has none.
        keys: what the source calls each of them.
        skipped: (key, reason) of each image that could not be read.
    """

    first: int
    codes: np.ndarray
    labels: np.ndarray | None
    keys: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A whole set: images that were encoded, in how many shards, and (key, reason) of those that could not be read."""

    num_rows: int
    num_shards: int
    unreadable: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Header:
    """What the header of a shard says: where each tensor lies in the file, and what the shard is of."""

    tensors: dict[str, tuple[str, tuple[int, ...], int]]
    about: dict[str, Any]

    @property
    def num_rows(self) -> int:
        return self.tensors["codes"][1][0]


class _DamagedError(Exception):
    """A file that is no whole shard: cut, or overwritten."""


class _ForeignError(Exception):
    """A file of the same format that holds something else."""


def write_shard(plan: Plan, shard: int, parts: Sequence[Encoded]) -> None:
    """Write one shard, of the parts that its slices gave.

    Raises:
        ValueError: the disk is full or the folder cannot be written to; no shard that is there was touched.
    """
    parts = sorted(parts, key=lambda part: part.first)
    slices = list(plan.slices(shard))
    assert [(part.first, len(part.codes) + len(part.skipped)) for part in parts] == [
        (images.start, len(images)) for images in slices
    ], f"the parts are not those of shard {shard}"
    codes = np.concatenate([part.codes.reshape(-1, *plan.grid) for part in parts])
    assert not codes.size or (codes.min() >= 0 and codes.max() < plan.num_codes), "codes outside the codebook"
    keys = [key.encode("utf-8", "surrogateescape") for part in parts for key in part.keys]
    tensors = {
        "codes": codes.astype(plan.dtype),
        "key_bytes": np.frombuffer(b"".join(keys), np.uint8),
        "key_ends": np.fromiter(accumulate(map(len, keys)), np.int64, len(keys)),
    }
    if plan.has_labels:
        labels = [part.labels for part in parts if part.labels is not None]
        tensors["labels"] = np.concatenate(labels).astype(np.int64)
        assert len(tensors["labels"]) == len(codes), "labels of some parts are missing"
    about: dict[str, Any] = {
        **plan.about(shard),
        "unreadable": [list(each) for part in parts for each in part.skipped],
        "crc32": {name: zlib.crc32(np.ascontiguousarray(each).data) for name, each in tensors.items()},
    }
    about["crc32"]["about"] = _checksum(about)
    try:
        with _replacing(plan.path(shard)) as scratch:
            # One entry of metadata: the library writes several in no fixed order. And not by its `save_file`, which
            # writes by way of a file of its own in the folder, where a kill leaves it.
            scratch.write_bytes(safetensors.numpy.save(tensors, {"about": json.dumps(about, sort_keys=True)}))
    except ValueError:
        if not is_done(plan, shard):
            raise


def _checksum(about: dict[str, Any]) -> int:
    """Of what a shard says of itself, its checksums apart."""
    rest = {name: value for name, value in about.items() if name != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """`safefolder.replacing`, through a name that no other process uses."""
    own = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with safefolder.replacing(own) as scratch:
            yield scratch
    except ValueError as error:
        raise ValueError(str(error).replace(str(own), str(path))) from error
    try:
        os.replace(own, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            own.unlink()
        raise ValueError(f"could not write {path}: {error.strerror}; what was there before is untouched") from error


def missing(plan: Plan, rank: int = 0, world_size: int = 1) -> list[int]:
    """The shards of one rank (every `world_size`-th) that are still to be made.

    Raises:
        ValueError: what is there belongs to another tokenizer, source or layout.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"got rank={rank}; expected 0 to {world_size - 1} (world_size - 1)")
    try:
        _check_folder(plan)
    except OSError as error:
        raise ValueError(f"{plan.folder} cannot be read: {error.strerror or error}") from error
    return [shard for shard in range(rank, plan.num_shards, world_size) if not is_done(plan, shard)]


def is_done(plan: Plan, shard: int) -> bool:
    """Whether a shard is there and whole, to the last bit; one that is cut or damaged is not.

    Raises:
        ValueError: it is whole, but of another tokenizer, source or layout; or it cannot be read.
    """
    header = _done(plan, shard)
    try:
        return header is not None and holds_its_bytes(plan.path(shard), header)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ValueError(f"{plan.path(shard)} cannot be read: {error.strerror or error}") from error


def holds_its_bytes(path: Path, header: Header) -> bool:
    """Whether the tensors of a shard are those that were written, by their checksums.

    Raises:
        OSError: the file cannot be read.
    """
    expected = header.about["crc32"]
    with path.open("rb") as file:
        for name, (kind, shape, start) in header.tensors.items():
            file.seek(start)
            found, left = 0, prod(shape) * _SIZES[kind]
            while left and (block := file.read(min(left, _BLOCK))):
                found, left = zlib.crc32(block, found), left - len(block)
            if expected.get(name) != found:
                return False
    return True


def finish(plan: Plan) -> Summary | None:
    """Write the index if every shard is there; None if some are still missing. Any number of processes may call it.

    An index that is there stays if it says the same, whatever it notes of where source and tokenizer were.

    Raises:
        ValueError: a shard of something else; or the index cannot be written.
    """
    rows, unreadable = [], []
    for shard in range(plan.num_shards):
        header = _done(plan, shard)
        if header is None:
            return None
        rows.append(header.num_rows)
        unreadable += [(key, reason) for key, reason in header.about["unreadable"]]
    index = {
        **plan.index(),
        "num_rows": sum(rows),
        "shards": [{"file": plan.path(shard).name, "rows": num} for shard, num in enumerate(rows)],
        "unreadable": [{"key": key, "reason": reason} for key, reason in unreadable],
    }
    path = plan.folder / INDEX_NAME
    if not _says(path, index):
        try:
            with _replacing(path) as scratch:
                scratch.write_text(json.dumps(index, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        except ValueError:
            if not _says(path, index):
                raise
    # Only tidy: where nothing can be removed, as the place is read-only, all is as good.
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(plan.folder)):
            if _LEFT.fullmatch(entry.name):
                os.unlink(entry.path)
    return Summary(num_rows=sum(rows), num_shards=len(rows), unreadable=tuple(unreadable))


def _says(path: Path, index: dict[str, Any]) -> bool:
    """Whether an index is there and differs in its notes at most."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and _without_notes(found) == _without_notes(index)


def _without_notes(index: dict[str, Any]) -> dict[str, Any]:
    """An index less where its source and its tokenizer were loaded from, which does not change what they are."""
    tokenizer = index.get("tokenizer")
    if isinstance(tokenizer, dict):
        tokenizer = tokenizer.get("fingerprint")
    return {**{name: value for name, value in index.items() if name != "source"}, "tokenizer": tokenizer}


def read_header(path: Path) -> Header:
    """The header of a shard whose file has the size that it says.

    Raises:
        ValueError: no shard of this library, or one that is cut or damaged.
        OSError: no such file.
    """
    try:
        return _header(path)
    except (_DamagedError, _ForeignError) as error:
        raise ValueError(
            f"{path} is no whole shard of codes: {error}; run `vqvae tokenize` again to mend the set"
        ) from error


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a tokenized set, as plain data.

    Raises:
        ValueError: there is none, or it is damaged, or of something else.
    """
    path = folder / INDEX_NAME
    if not path.is_file():
        splits = [name for name in ("train", "test") if (folder / name / INDEX_NAME).is_file()]
        if splits:
            raise ValueError(f"{folder} holds {' and '.join(splits)}; name one of them, as {folder / splits[0]}")
        has_shards = folder.is_dir() and any(folder.glob("codes-*.safetensors"))
        hint = "run `vqvae tokenize` again to finish it" if has_shards else "expected a folder that it wrote"
        raise ValueError(f"{folder} has no {INDEX_NAME} of `vqvae tokenize`; {hint}")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}; run `vqvae tokenize` again to mend it") from error
    if not isinstance(index, dict) or index.get("class") != CLASS_NAME:
        raise ValueError(f"{path} is of something else; expected a folder that `vqvae tokenize` wrote")
    if index.get("format") != FORMAT:
        raise ValueError(
            f"{folder} is of format {index.get('format')}, this version reads format {FORMAT}; upgrade vqvae-priors"
        )
    return index


def _check_folder(plan: Plan) -> None:
    """Raise ValueError if the folder holds what no run of this plan wrote."""
    place = next(each for each in (plan.folder, *plan.folder.parents) if each.exists() or each == each.parent)
    if place.exists() and not place.is_dir():
        raise ValueError(f"{place} is a file; expected a folder, or a name that is free")
    path = plan.folder / INDEX_NAME
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            pass  # damaged, and will be written anew
        else:
            found = _without_notes(found) if isinstance(found, dict) else {}
            _compare(plan, "codes", found, _without_notes(plan.index()))
    known = {plan.path(shard).name for shard in range(plan.num_shards)}
    for path in sorted(plan.folder.glob("codes-*.safetensors")):
        if path.name not in known:
            with contextlib.suppress(_DamagedError, _ForeignError):
                _compare(plan, path.name, _header(path).about, _of_all_shards(plan))
            raise _foreign(plan, f"{path.name}, and this source makes {plan.num_shards} shard(s)")


def _of_all_shards(plan: Plan) -> dict[str, Any]:
    return {name: value for name, value in plan.about(0).items() if name not in ("first", "stop", "images")}


def _compare(plan: Plan, what: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise ValueError unless what a file says is as expected."""
    for name, value in expected.items():
        if found.get(name) == value:
            continue
        if name == "images":
            raise _foreign(
                plan,
                f"{what} of other images than {plan.source} has now, by their names, labels, sizes or times of change; "
                "to go on, have the source as it was",
            )
        text = f"{what} with {name} {found.get(name)!r}, expected {value!r}"
        if name in ("batch_size", "shard_size"):
            text += f"; to go on, give {name}={found.get(name)!r}"
        raise _foreign(plan, text)


def _done(plan: Plan, shard: int) -> Header | None:
    path = plan.path(shard)
    try:
        header = _header(path)
    except (FileNotFoundError, _DamagedError):
        return None
    except _ForeignError as error:
        raise _foreign(plan, f"{path.name}, but {error}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    _compare(plan, path.name, header.about, plan.about(shard))
    if plan.has_labels != ("labels" in header.tensors):
        raise _foreign(plan, f"{path.name} {'without' if plan.has_labels else 'with'} labels")
    unreadable = header.about.get("unreadable")
    if not isinstance(unreadable, list) or header.num_rows + len(unreadable) != len(plan.images(shard)):
        return None
    kind, shape, _ = header.tensors["codes"]
    if kind != _DTYPES[str(plan.dtype)] or shape[1:] != plan.grid:
        return None
    return header


def _foreign(plan: Plan, what: str) -> ValueError:
    return ValueError(f"{plan.folder} holds {what}; name another folder, or remove this one")


def _header(path: Path) -> Header:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise _DamagedError(f"it has {size} bytes, fewer than its header says")
        text = file.read(length)
    try:
        plain = dict(json.loads(text))
        about = json.loads(plain.pop("__metadata__", {}).get("about", "null"))
        if not isinstance(about, dict) or about.get("class") != CLASS_NAME:
            raise _ForeignError("it holds something else")
        if about["crc32"]["about"] != _checksum(about):
            raise _DamagedError("what it says of itself is not what was written")
        tensors = {}
        ends = [0]
        for name, each in plain.items():
            kind, shape, (start, stop) = each["dtype"], tuple(each["shape"]), each["data_offsets"]
            if stop - start != prod(shape) * _SIZES[kind] or min(start, *shape) < 0:
                raise _DamagedError(f"its {name} has not the bytes of its shape")
            tensors[name] = kind, shape, 8 + length + start
            ends.append(stop)
        rows = tensors["codes"][1][0]
        if tensors["key_ends"][:2] != ("I64", (rows,)) or tensors["key_bytes"][0] != "U8":
            raise _DamagedError("its keys are not one for each row")
        if "labels" in tensors and tensors["labels"][:2] != ("I64", (rows,)):
            raise _DamagedError("its labels are not one for each row")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise _DamagedError(f"its header is damaged ({error})") from error
    if size != 8 + length + max(ends):
        raise _DamagedError(f"it has {size} bytes, expected {8 + length + max(ends)}")
    return Header(tensors=tensors, about=about)
