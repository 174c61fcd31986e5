"""The header of a shard: read from a file that anybody may have made, checked in itself, and its checksums compared.

    8 bytes     how long the JSON is
    JSON        {tensor: {"dtype", "shape", "data_offsets"}, ..., "__metadata__": {"about": JSON}}
    tensors     without gaps, to the end of the file

That is a safetensors file, which safetensors' own parser reads and checks, and this module only where it has to know
more: that the tensors are those of a shard, what "about" says, and where in the file each tensor lies, as shards are
read in place.
"""

import io
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors import SafetensorError

from vqvae.tokens.layout import CLASS_NAME
from vqvae.tokens.plain import DamagedError, ForeignError, loads, opened

# The limit that safetensors itself sets.
_MAX_HEADER = 100_000_000
DTYPES = {name: np.dtype(each) for name, each in (("U8", "u1"), ("U16", "u2"), ("U32", "u4"), ("I64", "i8"))}
_KINDS = {"codes": ("U16", "U32"), "key_bytes": ("U8",), "key_ends": ("I64",), "labels": ("I64",)}
_BLOCK = 1 << 18


@dataclass(frozen=True, kw_only=True)
class Header:
    """What the header of a shard says.

    Attributes:
        tensors: kind, shape and place in the file of each.
        about: what the shard is of, see `Plan.about`; with what could not be read, and the checksums.
        crc32: of the header itself.
    """

    tensors: dict[str, tuple[str, tuple[int, ...], int]]
    about: dict[str, Any]
    crc32: int

    @property
    def num_rows(self) -> int:
        return self.tensors["codes"][1][0]


def read_header(path: Path, *, check: bool) -> tuple[Header, bool]:
    """The header of a shard; and, to `check`, whether its tensors are those that were written, by their checksums.

    Raises:
        DamagedError, ForeignError: it is none, or the file has not the size that it says.
        OSError: no such file, or it cannot be read.
    """
    with opened(path) as file:
        header = _header(path, file)
        return header, not check or _holds_its_bytes(file, header)


def _holds_its_bytes(file: io.BufferedReader, header: Header) -> bool:
    block = memoryview(bytearray(_BLOCK))
    for name, (kind, shape, start) in header.tensors.items():
        file.seek(start)
        found, left = 0, prod(shape) * DTYPES[kind].itemsize
        while left and (num := file.readinto(block[: min(left, _BLOCK)])):
            found, left = zlib.crc32(block[:num], found), left - num
        if header.about["crc32"].get(name) != found:
            return False
    return True


def _header(path: Path, file: io.BufferedReader) -> Header:
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER):
        raise DamagedError(f"it has {size} bytes, fewer than its header says")
    text = file.read(length)
    try:
        with safetensors.safe_open(path, "numpy") as found:
            about = loads((found.metadata() or {}).get("about", "null"))
            # In the order of the file, which has no gaps.
            parts = [(name, found.get_slice(name)) for name in found.offset_keys()]
            kinds = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts}
        if not isinstance(about, dict) or about.get("class") != CLASS_NAME:
            raise ForeignError("it holds something else")
        if about["crc32"]["about"] != checksum(about):
            raise DamagedError("what it says of itself is not what was written")
        if not all(_is_pair_of_texts(each) for each in about["unreadable"]):
            raise DamagedError("what it says could not be read is no list of pairs of texts")
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise DamagedError(f"its header is damaged ({' '.join(str(error).split())[:200]})") from error
    _check_tensors(kinds)
    tensors, at = {}, 8 + length
    for name, (kind, shape) in kinds.items():
        tensors[name] = kind, shape, at
        at += prod(shape) * DTYPES[kind].itemsize
    return Header(tensors=tensors, about=about, crc32=zlib.crc32(text, zlib.crc32(start)))


def _check_tensors(kinds: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Raise DamagedError for tensors that are not those of a shard."""
    for name, (kind, _) in kinds.items():
        if kind not in _KINDS.get(name, ()):
            raise DamagedError(f"it has {name[:20]!r} of {kind[:20]}")
    if {"codes", "key_bytes", "key_ends"} - kinds.keys():
        raise DamagedError("it lacks codes or keys")
    rows = kinds["codes"][1][:1]
    for name in kinds.keys() & {"key_ends", "labels"}:
        if not rows or kinds[name][1] != rows:
            raise DamagedError(f"its {name} are not one for each row")
    if len(kinds["key_bytes"][1]) != 1:
        raise DamagedError("its keys are no row of bytes")


def _is_pair_of_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(each, str) for each in value)


def checksum(about: dict[str, Any]) -> int:
    """Of what a shard says of itself, its checksums apart."""
    rest = {name: value for name, value in about.items() if name != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())
