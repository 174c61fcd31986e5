"""Names out of a file of the codec, as places in a folder.

Whoever wrote the file chose its names, so they are not to be believed: a name may be an absolute path, lead out of the
folder, be endless or empty, or be another image's too. What comes out lies within the folder, ends in .png, can be
written, and is no other image's, even where upper and lower case are the same to the disk.
"""

import os
import re
import unicodedata
from pathlib import Path, PurePosixPath

from vqvae.data.folder import SUFFIXES

# Bytes of one part of a path, which may be 255 on most disks: what is written first has a longer name.
_MOST_BYTES = 200
_MOST_PARTS = 16


class Places:
    """Gives each image of a file a place within a folder."""

    def __init__(self) -> None:
        self._files: set[str] = set()
        self._folders: set[str] = set()
        self._next: dict[str, int] = {}

    def place(self, name: str | None, number: int) -> PurePosixPath:
        """A path within the folder, that no other image has: of the image's name, or of its number without one."""
        parts = _parts(name or "") or [f"{number:06}"]
        if any(_key("/".join(parts[:i])) in self._files for i in range(1, len(parts))):
            parts = [_cut("_".join(parts))]  # another image has the name of its folder
        folder, last = parts[:-1], parts[-1]
        stem, dot, suffix = last.rpartition(".")
        stem = stem if stem and dot + suffix.lower() in SUFFIXES else last
        first = _key("/".join([*folder, stem]))
        while True:
            count = self._next.get(first, 0)
            self._next[first] = count + 1
            path = PurePosixPath(*folder, f"{_cut(stem)}{f'-{count}' if count else ''}.png")
            key = _key(str(path))
            if key not in self._files and key not in self._folders:
                break
        self._files.add(key)
        self._folders |= {_key("/".join(folder[:i])) for i in range(1, len(folder) + 1)}
        return path


def _parts(name: str) -> list[str]:
    # A backslash is a border too, and a drive no folder, for whoever unpacks on Windows.
    parts = [part for part in re.split(r"[/\\]", name) if not re.fullmatch(r"\s*|\.+|[A-Za-z]:", part)]
    clean = ["".join("_" if c in '<>:"|?*' or not c.isprintable() else c for c in part) for part in parts]
    return [_cut(part.rstrip(". ") or "_") for part in clean[-_MOST_PARTS:]]


def _cut(part: str) -> str:
    """At most so many bytes, in whole characters, and with the suffix that it had."""
    if len(part.encode()) <= _MOST_BYTES:
        return part
    stem, dot, suffix = part.rpartition(".")
    end = dot + suffix if stem and dot + suffix.lower() in SUFFIXES else ""
    return part.encode()[: _MOST_BYTES - len(end)].decode("utf-8", "ignore") + end


def _key(path: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def check_place(folder: Path, place: PurePosixPath, *, replace: bool) -> Path:
    """Where an image goes.

    Raises:
        ValueError: there is something already, and it may not be replaced; or a link or a file lies in the way.
    """
    path = folder
    for part in place.parts[:-1]:
        path = path / part
        if path.is_symlink() or (os.path.lexists(path) and not path.is_dir()):
            raise ValueError(f"{path} is no folder of its own, so nothing is written into it; take another --output")
    path = path / place.name
    if path.is_dir():
        raise ValueError(f"{path} is a folder, where an image should go; take another --output")
    if not replace and os.path.lexists(path):
        raise ValueError(f"{path} is there already; pass --force to replace what is there, or take another --output")
    return path
