"""Where the bytes of a file are: in memory, or on a disk; and whether a place there can hold a file.

A path comes from a user, and may lead to anything: a folder, a named pipe that nobody writes to, a device without an
end, a link to itself. What is read or written here is a plain file, which is looked at before any work is done.
"""

import errno
import os
import stat
import weakref
from pathlib import Path

RECOVER = "recover() gets the blocks that are whole"

_SHOWN = 200
# That are made on the way to a file.
_MOST_FOLDERS = 100
_KINDS = (
    (stat.S_ISREG, "a file"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
)


class DamagedFile(ValueError):  # noqa: N818 - it names what the caller has, as FileNotFound does
    """A file that cannot be read: not of this format, newer, cut short or changed. Arguments: reason, advice."""

    def __init__(self, reason: str, advice: str = RECOVER):
        super().__init__(reason, advice)  # both are arguments, so that the error survives a pickle

    def __str__(self) -> str:
        return "; ".join(self.args)


class Memory:
    name = "this data"

    def __init__(self, data: bytes):
        self.data = data
        self.size = len(data)

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]

    def close(self) -> None:
        self.data = b""


class FileOnDisk:
    """A file read by position, so that threads and forked workers share no seek pointer."""

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()  # a worker may stand in another folder
        self.name = shown(path)
        check_readable(path)
        try:
            # Without waiting, should it have become a pipe since.
            self._handle = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise ValueError(f"could not read {self.name}: {error.strerror}") from error
        self.close = weakref.finalize(self, os.close, self._handle)
        status = os.fstat(self._handle)
        self.size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise ValueError(f"could not read {self.name}: it is no file any more")

    def read(self, offset: int, length: int) -> bytes:
        parts = []
        while length > 0:  # one call gives 2 GiB at most
            try:
                part = os.pread(self._handle, length, offset)
            except OSError as error:
                raise DamagedFile(f"{self.name}: byte {offset} could not be read: {error.strerror}") from error
            if not part:
                raise DamagedFile(f"{self.name} ends at byte {offset} now, it had {self.size} when it was opened")
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


Storage = Memory | FileOnDisk


def shown(path: str | Path) -> str:
    """A path as a sentence can hold it."""
    text = str(path)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}... ({len(text):,} characters)"


def check_readable(path: str | Path) -> None:
    """ValueError unless a plain file is there, which may be read."""
    kind = _kind(Path(path), "read")
    if kind != "a file":
        raise ValueError(f"no file at {shown(path)}{f': it is {kind}' if kind else ''}; give the name of one")
    if not os.access(path, os.R_OK):
        raise ValueError(f"could not read {shown(path)}: permission denied; give the name of another, or its rights")


def file_to_write(path: str | Path) -> Path:
    """Where a file is written: at the end of a link, if there is one.

    Raises:
        ValueError: there is something else than a file, or none can be written there.
    """
    kind = _kind(Path(path), "write")
    if kind not in (None, "a file"):
        raise ValueError(f"{shown(path)} is there and is no plain file but {kind}; give the name of a file")
    target = Path(os.path.realpath(path))
    _check_writable(path, target.parent, [f".{target.name}.writing"])
    return target


def check_folder_to_write(path: str | Path) -> None:
    """ValueError unless files can be written into the folder, which need not be there yet."""
    kind = _kind(Path(path), "write")
    if kind not in (None, "a folder"):
        raise ValueError(f"{shown(path)} is no folder but {kind}; give the name of a folder")
    _check_writable(path, Path(os.path.realpath(path)), [])


def _kind(path: Path, verb: str) -> str | None:
    """What is there, None for nothing. ValueError where even that cannot be told."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "a link that leads nowhere" if path.is_symlink() else None
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a link that leads in a circle"
        raise ValueError(f"could not {verb} {shown(path)}: {error.strerror}; give another name") from error
    return next((name for test, name in _KINDS if test(mode)), "a device")


def _check_writable(path: str | Path, folder: Path, names: list[str]) -> None:
    """ValueError unless these names can be made in a folder, or in one that can be made."""
    missing = names
    while not folder.exists() and folder != folder.parent:
        folder, missing = folder.parent, [folder.name, *missing]
    if len(missing) > _MOST_FOLDERS:
        raise ValueError(f"could not write {shown(path)}: {len(missing):,} folders on the way are missing")
    if not folder.is_dir():
        raise ValueError(f"could not write {shown(path)}: {shown(folder)} is no folder; give another name")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"could not write {shown(path)}: permission denied in {shown(folder)}; give another name")
    for name in missing:
        try:
            os.lstat(folder / name)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ValueError(f"could not write {shown(path)}: {error.strerror}; give another name") from error
