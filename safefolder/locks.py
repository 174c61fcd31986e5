"""One writer at a time, by a lock of the operating system, which ends with its process however that ends.

The lock is a hidden file while it is held: `.NAME.lock` beside what is written, or `.lock` in a folder that is written
into. What is only read needs none: files and folders are replaced whole (`safefolder.files`).

What the lock cannot do. On a network disk machines see each other's locks where the server has a lock service (NFS 4,
or NFS 3 with lockd; SMB); a mount with `nolock` or `local_lock` keeps apart the processes of one machine only. Where a
file system has no locks at all, `filelock` warns and takes a marker file instead, which a killed process of another
machine leaves behind: the error then names it, and it can be removed by hand.
"""

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

_ATTEMPTS = 100


@contextlib.contextmanager
def one_writer(path: str | Path, *, inside: bool = False, wait: float = 0.0) -> Iterator[None]:
    """Be the only one who writes `path` until the block is left; other processes and threads are refused.

    Folders that are missing on the way are made, and those that stayed empty are removed again.

    Args:
        path: a file or a folder, which need not be there yet. Where it is a link, the lock is that of what it leads to.
        inside: lock it from inside, for a folder that is written into and not replaced.
        wait: seconds until the other is asked to be waited for by hand.

    Raises:
        ValueError: another one writes it, or the lock cannot be made there.
    """
    place = Path(os.path.realpath(path))
    name = place / ".lock" if inside else place.with_name(f".{place.name}.lock")
    made: list[Path] = []
    # Shared by threads, or each would hold a lock of its own.
    lock = FileLock(name, thread_local=False)
    try:
        for attempt in itertools.count(1):
            made += [folder for folder in (name.parent, *name.parent.parents) if not folder.exists()]
            try:
                name.parent.mkdir(parents=True, exist_ok=True)
                lock.acquire(timeout=wait)
                break
            except FileNotFoundError:
                # Another one, who had made the folder, removed it in between, as it was still empty.
                if attempt == _ATTEMPTS:
                    raise
    except Timeout as error:
        raise ValueError(
            f"{path} is being written by another process (it holds {name}); wait until that has ended, or name another "
            "place"
        ) from error
    except OSError as error:
        _remove_empty(made)
        raise ValueError(f"could not write {path}: {error.strerror or error}; nothing was changed") from error
    try:
        yield
    finally:
        # While it is held: whoever opened it in the meantime sees that it is gone, and makes another.
        with contextlib.suppress(OSError):
            name.unlink()
        lock.release()
        _remove_empty(made)


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in sorted(set(folders), key=lambda each: -len(each.parts)):
            folder.rmdir()
