"""The files of a tokenized set: shards and index, each written whole or not at all, and checked before it is trusted.

Any process may write any shard, and whoever finds all of them there writes the index; the ranks of one job share the
work so. Two jobs at a time would have each do all of it, see `jobs`. What killed processes left is swept up once the
set is whole.

A run that goes on from a shard reads all of it and compares its checksums. What is damaged is made again, and so is
what lies in another shard's place, or in that of one that the index pins. All else that is there and of another
tokenizer, source or layout is refused, as it is somebody's.
"""

import contextlib
import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import safetensors.numpy

import safefolder
from safefolder.files import sweep
from safefolder.messages import shown
from vqvae.tokens import headers, origins
from vqvae.tokens.headers import Header
from vqvae.tokens.index import MAX_BYTES, checksum, read_plain
from vqvae.tokens.layout import INDEX_NAME, Plan, shard_name
from vqvae.tokens.plain import DamagedError, ForeignError

# What versions before this called files of theirs for the moment; the folder that ends so is of this one.
_FILES = r"codes-\d{5,}\.safetensors|index\.json"
_LEFT = re.compile(rf"\.{{1,2}}({_FILES})(\.[0-9a-f]{{1,8}}|(\.[0-9a-f]{{1,8}})?\.(writing|mode))")
_LEFT_FOLDER = re.compile(rf"\.({_FILES})\.writing")


@dataclass(frozen=True, kw_only=True)
class Slice:
    """What is known of the images of one slice of a shard, besides their pixels or codes.

    Attributes:
        first: the first image of the slice, counted in the source.
        labels: int64, one for each image that could be read, in order; None where the source has none.
        keys: what the source calls each that could be read.
        skipped: (key, reason) of each that could not. Of absolute paths there are, as in keys, only the last parts.
    """

    first: int
    labels: np.ndarray | None
    keys: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Encoded(Slice):
    """A slice and its codes, `"k *grid"`, of the images that could be read; int64, or as on the disk."""

    codes: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A whole set: images that were encoded, in how many shards, and (key, reason) of those that could not be read."""

    num_rows: int
    num_shards: int
    unreadable: tuple[tuple[str, str], ...]


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
    about["crc32"]["about"] = headers.checksum(about)
    with safefolder.files.replacing(plan.path(shard)) as scratch:
        # One entry of metadata: the library writes several in no fixed order. And not by its `save_file`, which writes
        # by way of a file of its own.
        scratch.write_bytes(safetensors.numpy.save(tensors, {"about": json.dumps(about, sort_keys=True)}))


def missing(plan: Plan, rank: int = 0, world_size: int = 1) -> list[int]:
    """The shards of one rank (every `world_size`-th) that are still to be made.

    Raises:
        ValueError: what is there belongs to another tokenizer, source or layout.
    """
    check_folder(plan, rank, world_size)
    pinned = _pinned(plan)
    shards = range(rank, plan.num_shards, world_size)
    return [shard for shard in shards if _ours(plan, shard, pinned, check=True) is None]


def is_done(plan: Plan, shard: int) -> bool:
    """Whether a shard is there and whole, to the last bit; one that is cut or damaged is not.

    Raises:
        ValueError: it is whole, but of another tokenizer, source or layout; or it cannot be read.
    """
    return _ours(plan, shard, _pinned(plan), check=True) is not None


def finish(plan: Plan) -> Summary | None:
    """Write the index if every shard is there; None if some are still missing. Any number of processes may call it.

    An index that is there stays if it says the same, whatever it notes of where source and tokenizer were, unless that
    is noted as versions before did it, by absolute paths.

    Raises:
        ValueError: a shard of something else; or the index cannot be written.
    """
    pinned = _pinned(plan)
    shards: list[dict[str, Any]] = []
    unreadable: list[tuple[str, str]] = []
    for shard in range(plan.num_shards):
        header = _ours(plan, shard, pinned)
        if header is None:
            return None
        shards.append({"file": shard_name(shard), "rows": header.num_rows, "crc32": header.crc32})
        # Versions before this kept what they were told.
        unreadable += [
            (origins.key_without_places(key), origins.without_places(reason))
            for key, reason in header.about["unreadable"]
        ]
    num_rows = sum(shard["rows"] for shard in shards)
    index = {
        **plan.index(),
        "num_rows": num_rows,
        "shards": shards,
        "unreadable": [{"key": key, "reason": reason} for key, reason in unreadable],
    }
    index["crc32"] = checksum(index)
    found = _found(plan)
    if not _says(found, index, as_before=False):
        try:
            _write_index(plan, index)
        except ValueError:
            # In a place that cannot be written to, one of a version before is as good.
            if not _says(found, index, as_before=True):
                raise
    # Only tidy: where nothing can be removed, as the place is read-only, all is as good.
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(plan.folder)):
            if entry.is_dir(follow_symlinks=False):
                if match := _LEFT_FOLDER.fullmatch(entry.name):
                    sweep(plan.folder / match[1])
            elif _LEFT.fullmatch(entry.name):
                os.unlink(entry.path)
    return Summary(num_rows=num_rows, num_shards=len(shards), unreadable=tuple(unreadable))


def _write_index(plan: Plan, index: Mapping[str, Any]) -> None:
    text = json.dumps(index, indent=1, sort_keys=True) + "\n"
    if len(text) > MAX_BYTES:
        raise ValueError(
            f"the index of {plan.folder} has {len(text):,} bytes, for {len(index['shards']):,} shards and "
            f"{len(index['unreadable']):,} images that could not be read, and is read up to {MAX_BYTES:,}; give a "
            "larger shard_size, or a source with fewer that are no images"
        )
    safefolder.files.write_text(plan.folder / INDEX_NAME, text)


def _found(plan: Plan) -> dict[str, Any] | None:
    """What the index in the folder says; None where there is none, or it is damaged and will be written anew."""
    try:
        return read_plain(plan.folder)
    except ValueError:
        return None


def _says(found: Mapping[str, Any] | None, index: Mapping[str, Any], *, as_before: bool) -> bool:
    """Whether an index that was found differs from what it should say in its notes at most.

    as_before: also one that has absolute paths in them, and no checksums of headers, as versions before had it.
    """
    if found is None:
        return False
    if as_before:
        shards, unreadable = found.get("shards"), found.get("unreadable")
        if (
            not isinstance(shards, list)
            or not isinstance(unreadable, list)
            or len(unreadable) != len(index["unreadable"])
        ):
            return False
        if not any(isinstance(shard, dict) and "crc32" in shard for shard in shards):
            plain = [{"file": shard["file"], "rows": shard["rows"]} for shard in index["shards"]]
            index = {**index, "shards": plain}
        index = {**index, "unreadable": unreadable, "crc32": found.get("crc32")}
        found = {"crc32": None, **found}
    elif any(origins.names_a_place(each) for each in _notes(found)):
        return False
    return _without_notes(found) == _without_notes(index)


def _notes(index: Mapping[str, Any]) -> list[Any]:
    """Where source and tokenizer were loaded from."""
    tokenizer = index.get("tokenizer")
    return [index.get("source"), tokenizer.get("source") if isinstance(tokenizer, dict) else None]


def _without_notes(index: Mapping[str, Any]) -> dict[str, Any]:
    """An index less where its source and its tokenizer were loaded from, which does not change what they are."""
    tokenizer = index.get("tokenizer")
    if isinstance(tokenizer, dict):
        tokenizer = tokenizer.get("fingerprint")
    return {**{name: value for name, value in index.items() if name != "source"}, "tokenizer": tokenizer}


def _pinned(plan: Plan) -> dict[str, int]:
    """The checksums of headers by which the index in the folder pins its shards, if it is the plan's."""
    found = _found(plan)
    if found is None or not _has(_without_notes(found), _without_notes(plan.index())):
        return {}
    shards = found.get("shards")
    return {
        shard["file"]: shard["crc32"]
        for shard in (shards if isinstance(shards, list) else [])
        if isinstance(shard, dict) and isinstance(shard.get("file"), str) and type(shard.get("crc32")) is int
    }


def check_folder(plan: Plan, rank: int = 0, world_size: int = 1) -> None:
    """Raise ValueError for a rank that is none, and if the folder holds what no run of this plan wrote."""
    if not 0 <= rank < world_size:
        raise ValueError(f"got rank={rank}; expected 0 to {world_size - 1} (world_size - 1)")
    place = next(each for each in (plan.folder, *plan.folder.parents) if each.exists() or each == each.parent)
    if place.exists() and not place.is_dir():
        raise ValueError(f"{place} is a file; expected a folder, or a name that is free")
    path = plan.folder / INDEX_NAME
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no regular file; expected a folder that `vqvae tokenize` wrote, or a free name")
    if (found := _found(plan)) is not None:
        _compare(plan, "codes", _without_notes(found), _without_notes(plan.index()))
    known = {plan.path(shard).name for shard in range(plan.num_shards)}
    try:
        for path in sorted(plan.folder.glob("codes-*.safetensors")):
            if path.name not in known:
                with contextlib.suppress(DamagedError, ForeignError):
                    header, _ = headers.read_header(path, check=False)
                    _compare(plan, path.name, header.about, plan.of_all(plan.tokenizer["fingerprint"]))
                raise _foreign(plan, f"{path.name}, and this source makes {plan.num_shards} shard(s)")
    except OSError as error:
        raise ValueError(f"{plan.folder} cannot be read: {error.strerror or error}") from error


def _compare(plan: Plan, what: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
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
        text = f"{what} with {name} {shown(found.get(name))}, expected {shown(value)}"
        if name in ("batch_size", "shard_size"):
            text += f"; to go on, give {name}={shown(found.get(name))}"
        raise _foreign(plan, text)


def _foreign(plan: Plan, what: str) -> ValueError:
    return ValueError(f"{plan.folder} holds {what}; name another folder, or remove this one")


def _ours(plan: Plan, shard: int, pinned: Mapping[str, int], *, check: bool = False) -> Header | None:
    """The header of a shard that is there, its tensors too if they are to be checked; None where it is to be made.

    Raises:
        ValueError: it is of something else.
    """
    path = plan.path(shard)
    try:
        header, is_whole = headers.read_header(path, check=check)
    except (FileNotFoundError, DamagedError):
        return None
    except ForeignError as error:
        raise _foreign(plan, f"{path.name}, but {error}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    if _is_misplaced(plan, shard, header.about) or _is_no_longer(path.name, header, pinned, plan.about(shard)):
        return None
    _compare(plan, path.name, header.about, plan.about(shard))
    if plan.has_labels != ("labels" in header.tensors):
        raise _foreign(plan, f"{path.name} {'without' if plan.has_labels else 'with'} labels")
    kind, shape, _ = header.tensors["codes"]
    fits = header.num_rows + len(header.about["unreadable"]) == len(plan.images(shard))
    if not fits or not is_whole or headers.DTYPES[kind] != plan.dtype or shape[1:] != plan.grid:
        return None
    return header


def _is_misplaced(plan: Plan, shard: int, about: Mapping[str, Any]) -> bool:
    """Whether it is another shard of the same set, under this one's name."""
    first = about.get("first")
    other = first // plan.shard_size if type(first) is int else shard
    return other != shard and 0 <= other < plan.num_shards and _has(about, plan.about(other))


def _is_no_longer(name: str, header: Header, pinned: Mapping[str, int], expected: Mapping[str, Any]) -> bool:
    """Whether it is something else in the place of a shard that the index pins."""
    return pinned.get(name, header.crc32) != header.crc32 and not _has(header.about, expected)


def _has(found: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    return all(found.get(name) == value for name, value in expected.items())
