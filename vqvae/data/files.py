"""Regular files, and the names of all files under a folder.

What is named like an image may be a pipe, which waits for ever when it is opened, or a device, which never ends. Only
regular files are opened, after links.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# Characters of a name that may be of any length.
_SHOWN = 200


def check_regular(path: Path) -> os.stat_result:
    """What the system says of a regular file.

    Raises ValueError where `path` leads to something else, and OSError where to nothing.
    """
    status = os.stat(path)
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        raise ValueError(f"it is {_KINDS.get(kind, 'something else')} and no regular file")
    return status


def read_bytes(path: Path, most: int) -> bytes:
    """The bytes of a regular file.

    Raises as `check_regular`, before anything is opened, ValueError for a file of more than `most` bytes, and OSError
    where not all of them can be read, which is no fault of an image.
    """
    size = check_regular(path).st_size
    if size > most:
        raise ValueError(f"the file has {size:,} bytes; expected at most {most:,}")
    # Without a buffer: there is one read.
    with path.open("rb", buffering=0) as file:
        data = file.read()
    if len(data) < size:
        raise OSError(errno.EIO, f"only {len(data):,} of the {size:,} bytes of the file could be read")
    return data


def names_of(folder: Path, *, follow: bool = True, unreadable: Callable[[str], None] | None = None) -> Iterator[str]:
    """Paths from `folder`, with "/" between their parts, of all that is no folder in it, at any depth and in no order.

    What is hidden (its name begins with a dot) is passed over. A folder that is there several times, by links, is gone
    through once, by its own name if it has one here; so circles end.

    Args:
        follow: go through links to folders too.
        unreadable: is told of folders that cannot be read; without it they are an error.

    Raises:
        OSError: a folder cannot be read.
        ValueError: folders lie so deep that the system takes no path to them.
    """
    base = os.fspath(folder)
    seen: set[tuple[int, int]] = set()
    # Links come after everything else, so that the order in which a disk lists them changes nothing.
    waiting, linked = [""], list[str]()
    while waiting or linked:
        if not waiting:
            linked.sort(reverse=True)
            waiting.append(linked.pop())
        prefix = waiting.pop()
        here = os.path.join(base, prefix.rstrip("/"))
        try:
            status = os.stat(here)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(here) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if not is_folder(entry):
                        yield prefix + entry.name
                    elif not entry.is_symlink():
                        waiting.append(f"{prefix}{entry.name}/")
                    elif follow:
                        linked.append(f"{prefix}{entry.name}/")
        except OSError as error:
            if unreadable is not None:
                unreadable(prefix.rstrip("/") or ".")
            elif error.errno == errno.ENAMETOOLONG:
                raise ValueError(
                    f"{shown(here)} has {len(os.fsencode(here)):,} bytes, a longer path than the system takes; "
                    "expected folders that lie less deep, or have shorter names"
                ) from error
            else:
                raise


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:
        return False  # a link that leads to itself, or to where nobody may look


def shown(name: str) -> str:
    """A name that may be anything, as it may be shown in an error."""
    return name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..."
