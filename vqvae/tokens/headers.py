"""The header of a shard: read from a file that anybody may have made, checked in itself, and its checksums compared.

    8 bytes     how long the JSON is
    JSON        {tensor: {"dtype", "shape", "data_offsets"}, ..., "__metadata__": {"about": JSON}}
    tensors     without gaps, to the end of the file

That is a safetensors file; what is more here is that its tensors are those of a shard, and what "about" says.
"""

import io
import json
import os
import zlib
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from vqvae.tokens.layout import CLASS_NAME
from vqvae.tokens.plain import DamagedError, ForeignError, loads, opened

# The limit that safetensors itself sets.
_MAX_HEADER = 100_000_000
_SIZES = {"U8": 1, "U16": 2, "U32": 4, "I64": 8}
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


def read_header(path: Path) -> Header:
    """The header of a shard whose file has the size that it says.

    Raises:
        DamagedError, ForeignError: it is none.
        OSError: no such file, or it cannot be read.
    """
    with opened(path) as file:
        return _header(file)


def read_checked(path: Path) -> tuple[Header, bool]:
    """The header of a shard, and whether its tensors are those that were written, by their checksums.

    Raises:
        DamagedError, ForeignError, OSError: as `read_header`.
    """
    with opened(path) as file:
        header = _header(file)
        return header, _holds_its_bytes(file, header)


def _holds_its_bytes(file: io.BufferedReader, header: Header) -> bool:
    block = memoryview(bytearray(_BLOCK))
    for name, (kind, shape, start) in header.tensors.items():
        file.seek(start)
        found, left = 0, prod(shape) * _SIZES[kind]
        while left and (num := file.readinto(block[: min(left, _BLOCK)])):
            found, left = zlib.crc32(block[:num], found), left - num
        if header.about["crc32"].get(name) != found:
            return False
    return True


def _header(file: io.BufferedReader) -> Header:
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER):
        raise DamagedError(f"it has {size} bytes, fewer than its header says")
    text = file.read(length)
    try:
        plain = loads(text.decode())
        about = loads(plain.pop("__metadata__", {}).get("about", "null"))
        if not isinstance(about, dict) or about.get("class") != CLASS_NAME:
            raise ForeignError("it holds something else")
        if about["crc32"]["about"] != checksum(about):
            raise DamagedError("what it says of itself is not what was written")
        if not all(_is_pair_of_texts(each) for each in about["unreadable"]):
            raise DamagedError("what it says could not be read is no list of pairs of texts")
        tensors = _tensors(plain, size - 8 - length)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise DamagedError(f"its header is damaged ({' '.join(str(error).split())[:200]})") from error
    placed = {name: (kind, shape, 8 + length + at) for name, (kind, shape, at) in tensors.items()}
    return Header(tensors=placed, about=about, crc32=zlib.crc32(text, zlib.crc32(start)))


def _tensors(plain: dict[str, Any], size: int) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """The tensors of a header, which fill `size` bytes without gaps."""
    tensors, places = {}, []
    for name, each in plain.items():
        kind, shape, (start, stop) = each["dtype"], each["shape"], each["data_offsets"]
        if not _are_counts([*shape, start, stop]) or not start <= stop <= size:
            raise DamagedError(f"its {name[:20]} has not a shape and a place in the file")
        if kind not in _KINDS[name] or stop - start != prod(shape) * _SIZES[kind]:
            raise DamagedError(f"its {name[:20]} has not the bytes of its shape")
        tensors[name] = kind, tuple(shape), start
        places.append((start, stop))
    if {"codes", "key_bytes", "key_ends"} - tensors.keys():
        raise DamagedError("it lacks codes or keys")
    rows = tensors["codes"][1][:1]
    for name in tensors.keys() & {"key_ends", "labels"}:
        if not rows or tensors[name][1] != rows:
            raise DamagedError(f"its {name} are not one for each row")
    if len(tensors["key_bytes"][1]) != 1:
        raise DamagedError("its keys are no row of bytes")
    # Sorted by both ends, as an empty one may lie where another begins.
    ends = [(0, 0), *sorted(places), (size, size)]
    if any(stop != start for (_, stop), (start, _) in pairwise(ends)):
        raise DamagedError(f"its tensors do not fill the {size} bytes behind its header")
    return tensors


def _are_counts(numbers: list[Any]) -> bool:
    """Whether all are whole numbers from 0 on that a file can have; few enough for a shape and its place."""
    return len(numbers) <= 64 and all(type(each) is int and 0 <= each < 1 << 63 for each in numbers)


def _is_pair_of_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(each, str) for each in value)


def checksum(about: dict[str, Any]) -> int:
    """Of what a shard says of itself, its checksums apart."""
    rest = {name: value for name, value in about.items() if name != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())
