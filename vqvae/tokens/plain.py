"""Files and JSON of a tokenized set, which anybody may have written.

`safefolder.tensors.read_json` does as much for others' JSON, and refuses halves of UTF-16 characters; here these stand
for the bytes of file names that are no UTF-8, as `os.fsdecode` gives them.
"""

import io
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_MOST_LEVELS = 100


class DamagedError(Exception):
    """A file that is not whole: cut, overwritten, or a link to one that is none of the set's."""


class ForeignError(Exception):
    """A file that holds something else."""


def opened(path: Path) -> io.BufferedReader:
    """A regular file of a folder, open.

    Raises:
        DamagedError: it is a link that leads out.
        ForeignError: it is no regular file.
        OSError: there is none, or it cannot be read.
    """
    if not is_inside(path):
        raise DamagedError("it is a link to a file outside its folder")
    # A pipe of that name would have us wait for who writes to it.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ForeignError("it is no regular file")
    return open(handle, "rb")


def is_inside(path: Path) -> bool:
    """Whether a file lies in its folder, and is no link that leads elsewhere.

    The cache of the Hugging Face hub keeps the files of `snapshots/REVISION` as links to its `blobs`, which will do.
    """
    if not path.is_symlink():
        return True
    place, folder = Path(os.path.realpath(path)), Path(os.path.realpath(path.parent))
    blobs = [parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots"]
    return any(place.is_relative_to(each) for each in (folder, *blobs))


def read_text(path: Path, most_bytes: int) -> str:
    """The text of a file of at most so many bytes. Errors as `opened`; and ValueError: a larger one, or no UTF-8."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most_bytes:
            raise ValueError(f"it has {size:,} bytes, expected at most {most_bytes:,}")
        return file.read(size).decode()


def loads(text: str) -> Any:
    """JSON in which no name comes twice, every number is one, and nothing is nested deeply.

    Raises:
        ValueError: other JSON, or none.
    """
    try:
        found = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [found]
    for _ in range(_MOST_LEVELS):
        parts = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [each for part in parts for each in part]
        if not level:
            return found
    raise ValueError("it is nested too deeply")


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = list(pairs)
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number")
