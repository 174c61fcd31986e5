"""Files and folders that are written whole or not at all.

Every write goes to a new name beside the old one, is synced to the disk, and is then renamed over it, so a crash,
a full disk or a `kill -9` leaves either the whole old content or the whole new one. Where the old one is a symbolic
link, that stays, and what it points to is written. Names are each writer's own; what reads before it writes, as adding
to a file does, takes `safefolder.locks.one_writer` besides.

A folder is replaced whole, so it must be known that nothing else is in it: see `replacing_folder`.
"""

import contextlib
import errno
import fnmatch
import itertools
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import safetensors
from filelock import FileLock, Timeout

from safefolder.locks import one_writer

# Two renames take no time; who waits longer has met a disk that fails.
_EXCHANGE_SECONDS = 60.0
_ATTEMPTS = 1000
Found = TypeVar("Found")


def _target(path: str | Path) -> Path:
    """What is written: where a symbolic link leads to a folder, that folder. A link to a file is replaced itself."""
    end = Path(os.path.realpath(path))
    # The folder may have stepped aside, see `replacing`.
    return end if end.is_dir() or _beside(end, "previous").is_dir() else Path(path)


def _beside(path: Path, what: str) -> Path:
    """A hidden sibling on the same file system, so that a rename is atomic."""
    return path.parent / f".{path.name}.{what}"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Push a file, or a folder's files and then its own entries, to the disk."""
    if path.is_dir():
        for child in path.iterdir():
            _sync(child)
    _sync_itself(path)


def _sync_itself(path: Path) -> None:
    """Push a file's content, or a folder's own entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A place for the next content of `path` that no other process has, and that is removed in the end.

        .NAME.writing/TOKEN/NAME     the content
        .NAME.writing/TOKEN/.lock    locked while its writer lives

    What killed writers left there is removed first.
    """
    everyone = _beside(path, "writing")
    own, lock = _claimed(everyone)
    try:
        for left in everyone.iterdir():
            if left != own:
                _sweep(left)
        yield own / path.name
    finally:
        with contextlib.suppress(OSError):
            _remove(own)
        lock.release()
        with contextlib.suppress(OSError):
            everyone.rmdir()


def _claimed(everyone: Path) -> tuple[Path, FileLock]:
    """A folder of its own among those of all writers, and the lock that says that its writer lives."""
    for attempt in itertools.count(1):
        own = everyone / secrets.token_hex(4)
        lock = FileLock(own / ".lock", timeout=0, thread_local=False)
        try:
            if everyone.is_file():  # what a version before this one left
                everyone.unlink()
            own.mkdir(parents=True)
            lock.acquire()
        except (FileNotFoundError, FileExistsError, Timeout):
            # Another writer removed what is empty, or swept this away as one that had ended, before it was locked.
            if attempt == _ATTEMPTS:
                raise
        else:
            return own, lock
    raise AssertionError("counting ends at no number")


def _sweep(left: Path) -> None:
    """Remove a scratch place unless its writer is at work."""
    with contextlib.suppress(OSError), FileLock(left / ".lock", timeout=0, thread_local=False):
        _remove(left)


def sweep(path: Path) -> None:
    """Remove what writers of `path` left that were killed; what others are at work on stays."""
    everyone = _beside(_target(path), "writing")
    with contextlib.suppress(OSError):
        for left in everyone.iterdir():
            _sweep(left)
        everyone.rmdir()


def recover(path: Path) -> None:
    """Finish a folder exchange that was cut between its two renames (see `replacing`)."""
    path = _target(path)
    previous = _beside(path, "previous")
    if path.exists() or not previous.exists():
        return
    # It may be under way: a writer has this lock then.
    with one_writer(path, wait=_EXCHANGE_SECONDS):
        if not path.exists() and previous.exists():
            os.replace(previous, path)


def is_there(folder: Path, name: str = "") -> bool:
    """Whether there is a folder, or a file of this name in it, also while another folder takes its place."""
    folder = _target(folder)
    # In this order: whatever is not at the first when it is asked for was put at the second before, and then back.
    return any((each / name).exists() for each in (folder, _beside(folder, "previous"), folder))


def of_one(folder: Path, read: Callable[[], Found]) -> Found:
    """What is read of a folder, all of it of one, though another may take its place meanwhile."""
    while True:
        before = _identity(folder)
        try:
            found = read()
        except (ValueError, OSError):
            if _identity(folder) == before:
                raise
        else:
            if _identity(folder) == before:
                return found


def _identity(folder: Path) -> tuple[int, int, int] | None:
    """What tells a folder from another that takes its place; None where there is none."""
    recover(folder)
    try:
        status = folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a scratch path of the same name to write a file or a folder to; on success it takes `path`'s place.

    On any error the scratch is removed and what was at `path` stays. Of several at the same time each has a scratch of
    its own, and the last to end stays, whole. A folder cannot be renamed over a full one, so the old folder first steps
    aside to `.NAME.previous`; a reader that finds only that name takes it back.

    Raises:
        ValueError: the disk is full or the place cannot be written to; nothing already saved was touched.
    """
    given, path = path, _target(path)
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ValueError(f"{given} is a device or a pipe, which would be replaced; name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        recover(path)
        with _scratch(path) as new:
            yield new
            if path.is_dir() and not new.is_dir():
                raise ValueError(
                    f"{given} is a folder, and what was to be written there is a file; nothing was changed, name a file"
                )
            _share(new)
            _sync(new)
            if path.is_dir():
                _exchange(new, path)
            else:
                os.replace(new, path)
            _sync_itself(path.parent)
    except BaseException as error:
        if isinstance(error, OSError) or _is_write_failure(error):
            raise ValueError(_why(given, error)) from error
        raise


def _exchange(new: Path, path: Path) -> None:
    """Put a folder in the place of another."""
    with one_writer(path, wait=_EXCHANGE_SECONDS):
        previous = _beside(path, "previous")
        try:
            _remove(previous)
            os.replace(path, previous)
            os.replace(new, path)
        except BaseException:
            if not path.exists():
                os.replace(previous, path)
            raise
        _remove(previous)


@contextlib.contextmanager
def replacing_folder(
    folder: str | Path, names: Sequence[str], is_own: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """`replacing` for a folder, which is made; one that is there is replaced if all in it is what this writer writes.

    It is looked at before the writing and again after it. Where a file is among its things that is not, or a folder,
    nothing is written and nothing is lost; nor is a card, a figure or a picture that was put beside a model, as these
    tell of the model that is there and not of the one that would replace it.

    Args:
        names: of all files that the writer may write; they may hold the wildcards of `fnmatch`.
        is_own: whether a folder with no other names is the writer's, where other kinds of folder have the same names.

    Raises:
        ValueError: something else is there, by name; or as `replacing`.
    """
    folder = Path(folder)
    check_replaceable(folder, names, is_own)
    with replacing(folder) as new:
        new.mkdir()
        yield new
        check_replaceable(folder, names, is_own)


def check_replaceable(folder: Path, names: Sequence[str], is_own: Callable[[Path], bool] | None = None) -> None:
    """Raise ValueError for a folder that `replacing_folder` would not replace."""
    of_one(folder, lambda: _check_replaceable(folder, names, is_own))


def _check_replaceable(folder: Path, names: Sequence[str], is_own: Callable[[Path], bool] | None) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file, expected a folder, or a name for a new one")
    if os.path.samefile(folder, os.curdir):
        raise ValueError(f"{folder} is the folder that this program runs in, expected another, which can be replaced")
    others = sorted(path.name for path in folder.iterdir() if not _is_named(path, names))
    if others:
        raise ValueError(
            f"{folder} holds other things, {', '.join(others[:3])}{' and more' if len(others) > 3 else ''}, which "
            "writing there would remove; take another folder, or move them away"
        )
    if is_own is not None and any(folder.iterdir()) and not is_own(folder):
        raise ValueError(
            f"{folder} holds something else under the same names, which writing there would replace; take another "
            "folder, or move it away"
        )


def _is_named(path: Path, names: Sequence[str]) -> bool:
    """Whether it is a file of one of these names, or what a write of one left that was cut off."""
    hidden = re.fullmatch(r"\.(.+)\.(writing|mode)", path.name)
    name = path.name if hidden is None else hidden.group(1)
    return (hidden is not None or not path.is_dir() or path.is_symlink()) and any(
        fnmatch.fnmatchcase(name, each) for each in names
    )


def _share(path: Path) -> None:
    """Let those read tensors who may read what else this process writes; the safetensors library lets nobody."""
    written = [each for each in (path.rglob("*") if path.is_dir() else [path]) if each.suffix == ".safetensors"]
    if not any(each.is_file() for each in written):
        return
    probe = path.parent / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    for file in written:
        if file.is_file():
            file.chmod(stat.S_IMODE(file.stat().st_mode) | mode)


def _is_write_failure(error: BaseException) -> bool:
    # torch.save's zip writer and safetensors report a full disk through errors of their own.
    return isinstance(error, safetensors.SafetensorError) or (
        isinstance(error, RuntimeError)
        and any(each in str(error) for each in ("PytorchStreamWriter", "inline_container", "file write"))
    )


def _why(path: Path, error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = "no space is left on the disk"
    else:
        reason = str(error) or type(error).__name__
    return f"could not write {path}: {reason}; what was saved there before is untouched"


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")
