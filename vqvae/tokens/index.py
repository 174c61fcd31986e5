"""The index of a tokenized set: read from a file that anybody may have made, every number of it checked.

Files that it names are those that the format says, and lie in its folder; no number in it makes anybody allocate.
"""

import json
import os
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from reprlib import repr as shown
from typing import Any

from vqvae.tokens import origins
from vqvae.tokens.layout import CLASS_NAME, FORMAT, INDEX_NAME, MAX_NUMBER, Layout, code_dtype, shard_name
from vqvae.tokens.plain import DamagedError, ForeignError, loads, read_text

# Of the file: some hundred bytes for each shard, and for each image that could not be read.
MAX_BYTES = 1 << 27
# What a grid may come to; also how long a row is.
_MAX_GRID = 1 << 31
_MAX_AXES = 16
_MAX_CLASSES = 1 << 31
_AGAIN = "remove it and run `vqvae tokenize` again"


@dataclass(frozen=True, kw_only=True)
class Index(Layout):
    """What an index says.

    Attributes:
        source: where the images came from, as the file notes it; see `origins`.
        rows: of each shard.
        checksums: of the header of each shard; None of one that a version before this wrote.
        unreadable: (key, reason) of each image that could not be read.
    """

    source: origins.Note
    rows: tuple[int, ...]
    checksums: tuple[int | None, ...]
    unreadable: tuple[tuple[str, str], ...]


def read_plain(folder: Path) -> dict[str, Any] | None:
    """What the index in a folder says, unchecked; None where there is none.

    Raises:
        ValueError: it is no JSON, or no file that is read.
    """
    path = folder / INDEX_NAME
    if not os.path.lexists(path):
        return None
    try:
        found = loads(read_text(path, MAX_BYTES))
    except (ValueError, OSError, DamagedError, ForeignError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)[:200]
        raise ValueError(f"{path} cannot be read as JSON: {reason}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {shown(found)}, expected an object")
    return found


def read_index(folder: Path) -> Index:
    """The index of a tokenized set.

    Raises:
        ValueError: there is none, or it is damaged, or of something else.
    """
    path = folder / INDEX_NAME
    try:
        plain = read_plain(folder)
    except ValueError as error:
        raise ValueError(f"{error}; run `vqvae tokenize` again to mend it") from error
    if plain is None:
        splits = [name for name in ("train", "test") if (folder / name / INDEX_NAME).is_file()]
        if splits:
            raise ValueError(f"{folder} holds {' and '.join(splits)}; name one of them, as {folder / splits[0]}")
        has_shards = folder.is_dir() and any(folder.glob("codes-*.safetensors"))
        hint = "run `vqvae tokenize` again to finish it" if has_shards else "expected a folder that it wrote"
        raise ValueError(f"{folder} has no {INDEX_NAME} of `vqvae tokenize`; {hint}")
    if plain.get("class") != CLASS_NAME:
        raise ValueError(f"{path} is of something else; expected a folder that `vqvae tokenize` wrote")
    version = plain.get("format")
    if type(version) is int and version > FORMAT:
        raise ValueError(
            f"{folder} is of format {shown(version)}, this version reads format {FORMAT}; upgrade vqvae-priors"
        )
    try:
        return _index(_Fields(plain))
    except _WrongError as error:
        raise ValueError(f"the index of {folder} is damaged ({error}); {_AGAIN}") from error


def checksum(plain: Mapping[str, Any]) -> int:
    """CRC-32 of an index, less its own and what it notes of where source and tokenizer were, which anybody may mend."""
    rest = {name: value for name, value in plain.items() if name not in ("crc32", "source")}
    rest["tokenizer"] = {name: value for name, value in plain["tokenizer"].items() if name != "source"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


class _WrongError(Exception):
    """What is wrong with an index."""


class _Fields:
    """An object of JSON, whose values have to be what they are said to be."""

    def __init__(self, plain: Any, of: str = ""):
        if not isinstance(plain, dict):
            raise _WrongError(f"{of or 'it'} is {shown(plain)}, expected an object")
        self.plain, self.of = plain, of

    def get(self, name: str, fits: Callable[[Any], bool], expected: str) -> Any:
        where = f"{self.of} {name}".strip()
        if name not in self.plain:
            raise _WrongError(f"{where} is missing")
        value = self.plain[name]
        if not fits(value):
            raise _WrongError(f"{where} is {shown(value)}, expected {expected}")
        return value

    def number(self, name: str, least: int, most: int = MAX_NUMBER) -> int:
        return self.get(name, _is_number(least, most), f"a whole number from {least} to {most}")

    def text(self, name: str) -> str:
        return self.get(name, _is_text, "a text")

    def array(self, name: str) -> list[Any]:
        return self.get(name, lambda value: isinstance(value, list), "a list")


def _is_number(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _index(fields: _Fields) -> Index:
    fields.number("format", FORMAT, FORMAT)
    grid = _numbers(fields, "grid", _MAX_AXES, _MAX_GRID)
    if not grid or prod(grid) > _MAX_GRID:
        raise _WrongError(f"grid is {shown(list(grid))}, expected axes whose product is at most {_MAX_GRID}")
    image_shape = _numbers(fields, "image_shape", 3, MAX_NUMBER)
    if len(image_shape) != 3:
        raise _WrongError(f"image_shape is {shown(list(image_shape))}, expected three numbers")
    num_codes = fields.number("num_codes", 1, 1 << 32)
    fields.get(
        "dtype", lambda value: value == str(code_dtype(num_codes)), f"{code_dtype(num_codes)}, of {num_codes} codes"
    )
    num_classes, class_names = _classes(fields)
    num_images, shard_size = fields.number("num_images", 0), fields.number("shard_size", 1)
    rows, checksums = _shards(fields, num_images, shard_size)
    unreadable = tuple(
        (fields.text("key"), fields.text("reason"))
        for fields in (_Fields(each, "of what is unreadable one") for each in fields.array("unreadable"))
    )
    if not sum(rows) == fields.number("num_rows", 0) == num_images - len(unreadable):
        raise _WrongError(
            f"its numbers contradict each other: {num_images} images, {sum(rows)} rows in shards, {len(unreadable)} "
            f"unreadable, and num_rows is {fields.plain['num_rows']}"
        )
    batch_size, split = fields.number("batch_size", 1), fields.text("split")
    tile = fields.number("tile", 1) if "tile" in fields.plain else None
    tokenizer = _tokenizer(_Fields(fields.plain.get("tokenizer"), "tokenizer"))
    source = fields.get("source", origins.is_note, "a name, or a name and a relative path")
    if "crc32" in fields.plain and fields.plain["crc32"] != checksum(fields.plain):
        raise _WrongError("its checksum differs")
    return Index(
        grid=grid,
        num_codes=num_codes,
        num_classes=num_classes,
        class_names=class_names,
        batch_size=batch_size,
        shard_size=shard_size,
        tile=tile,
        tokenizer=tokenizer,
        source=source,
        split=split,
        num_images=num_images,
        image_shape=(image_shape[0], image_shape[1], image_shape[2]),
        rows=rows,
        checksums=checksums,
        unreadable=unreadable,
    )


def _numbers(fields: _Fields, name: str, longest: int, most: int) -> tuple[int, ...]:
    fits = _is_number(1, most)
    return tuple(
        fields.get(
            name,
            lambda value: isinstance(value, list) and len(value) <= longest and all(map(fits, value)),
            f"at most {longest} whole numbers from 1 to {most}",
        )
    )


def _classes(fields: _Fields) -> tuple[int | None, tuple[str, ...] | None]:
    fits = _is_number(1, _MAX_CLASSES)
    num = fields.get("num_classes", lambda value: value is None or fits(value), f"null, or 1 to {_MAX_CLASSES}")
    names = fields.get(
        "class_names",
        lambda value: value is None or (isinstance(value, list) and len(value) == num and all(map(_is_text, value))),
        f"null, or {num} texts",
    )
    return num, None if names is None else tuple(names)


def _tokenizer(fields: _Fields) -> dict[str, Any]:
    fields.text("class")
    fields.get("config", lambda value: isinstance(value, dict), "an object")
    for name in ("fingerprint", *({"any_size"} & fields.plain.keys())):
        fields.get(
            name,
            lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None,
            "64 hexadecimal digits",
        )
    fields.get("source", lambda value: value is None or origins.is_note(value), "null, or as the source of images")
    return fields.plain


def _shards(fields: _Fields, num_images: int, shard_size: int) -> tuple[tuple[int, ...], tuple[int | None, ...]]:
    """Rows, and checksums of headers, of each shard: those that the images make, each once and in order."""
    rows, checksums = [], []
    shards, num = fields.array("shards"), -(-num_images // shard_size)
    if len(shards) != num:
        raise _WrongError(f"shards are {len(shards)}, expected {num}, {shard_size} images in each")
    for number, plain in enumerate(shards):
        shard = _Fields(plain, f"of shard {number}")
        name = shard_name(number)
        shard.get("file", lambda value, name=name: value == name, name)
        rows.append(shard.number("rows", 0, min(shard_size, num_images - number * shard_size)))
        checksums.append(shard.number("crc32", 0, (1 << 32) - 1) if "crc32" in shard.plain else None)
    return tuple(rows), tuple(checksums)
