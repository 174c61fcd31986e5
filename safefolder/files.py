"""Files and folders that are written whole or not at all.

Every write goes to a new name beside the old one, is synced to the disk, and is then renamed over it, so a crash,
a full disk or a `kill -9` leaves either the whole old content or the whole new one. Where the old one is a symbolic
link, that stays, and what it points to is written.

A folder is replaced whole, so it must be known that nothing else is in it: see `replacing_folder`.
"""

import contextlib
import errno
import fnmatch
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import safetensors


def scratch(path: Path) -> Path:
    """The name beside `path` that its next content is written to before it takes the place."""
    return _beside(_target(path), "writing")


def _target(path: str | Path) -> Path:
    """What is written: where a symbolic link leads to a folder, that folder. A link to a file is replaced itself."""
    end = Path(os.path.realpath(path))
    # The folder may have stepped aside, see `replacing`.
    return end if end.is_dir() or _beside(end, "previous").is_dir() else Path(path)


# What ends the hidden names that files of ours have for the moment.
_HIDDEN = ("writing", "mode")


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
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def recover(path: Path) -> None:
    """Finish a folder exchange that was cut between its two renames (see `replacing`)."""
    path = _target(path)
    previous = _beside(path, "previous")
    if not path.exists() and previous.exists():
        os.replace(previous, path)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a scratch path beside `path` to write a file or a folder to; on success it takes `path`'s place.

    On any error the scratch is removed and what was at `path` stays. A folder cannot be renamed over a full one,
    so the old folder first steps aside to `.NAME.previous`; a reader that finds only that name takes it back.

    Raises:
        ValueError: the disk is full or the place cannot be written to; nothing already saved was touched.
    """
    given, path = path, _target(path)
    new = scratch(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        recover(path)
        _remove(new)
        yield new
        _share(new, path.name)
        _sync(new)
        if path.is_dir():
            previous = _beside(path, "previous")
            _remove(previous)
            os.replace(path, previous)
            os.replace(new, path)
            _remove(previous)
        else:
            os.replace(new, path)
        _sync_entries(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            _remove(new)
            recover(path)
        if isinstance(error, OSError) or _is_write_failure(error):
            raise ValueError(_why(given, error)) from error
        raise


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
    recover(folder)
    check_replaceable(folder, names, is_own)
    with replacing(folder) as new:
        new.mkdir()
        yield new
        check_replaceable(folder, names, is_own)


def check_replaceable(folder: Path, names: Sequence[str], is_own: Callable[[Path], bool] | None = None) -> None:
    """Raise ValueError for a folder that `replacing_folder` would not replace."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file, expected a folder, or a name for a new one")
    if os.path.samefile(folder, os.curdir):
        raise ValueError(f"{folder} is the folder that this program runs in, expected another, which can be replaced")
    allowed = [*names, *(f".{name}.{what}" for name in names for what in _HIDDEN)]
    others = sorted(
        path.name
        for path in folder.iterdir()
        if (path.is_dir() and not path.is_symlink())
        or not any(fnmatch.fnmatchcase(path.name, each) for each in allowed)
    )
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


def _share(path: Path, name: str) -> None:
    """Let those read tensors who may read what else this process writes; the safetensors library lets nobody.

    `name` is what the file or folder at `path` will be called.
    """
    written = [(each, each.name) for each in path.rglob("*")] if path.is_dir() else [(path, name)]
    written = [(each, called) for each, called in written if called.endswith(".safetensors") and each.is_file()]
    if not written:
        return
    probe = _beside(path, "mode")
    try:
        probe.touch()
        mode = stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)
    for file, _ in written:
        file.chmod(stat.S_IMODE(file.stat().st_mode) | mode)


def _sync_entries(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_write_failure(error: BaseException) -> bool:
    # torch.save's zip writer and safetensors report a full disk through errors of their own.
    return isinstance(error, safetensors.SafetensorError) or (
        isinstance(error, RuntimeError) and ("PytorchStreamWriter" in str(error) or "file write" in str(error))
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
