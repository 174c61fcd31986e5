"""The members of a tar file, found from header to header, and its end."""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

# Bytes of what belongs to a header: names and attributes, some hundred. The time that Python's reader takes grows with
# their square.
_MAX_HEADER = 1 << 15


class _Headers:
    """A file as the reader of headers gets it, who would believe whatever sizes they say."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.size = file.seek(0, os.SEEK_END)
        file.seek(0)
        self.tell = file.tell

    def read(self, length: int) -> bytes:
        if not 0 <= length <= _MAX_HEADER:
            raise ValueError(f"{length:,} bytes are said to belong to a header")
        return self.file.read(length)

    def seek(self, position: int) -> int:
        return self.file.seek(min(position, self.size))  # from where on there is nothing to read


def members(path: Path, file: IO[bytes]) -> Iterator[tuple[str, int, int]]:
    """Name, start and size of every file in an archive; the size is below 0 where it is no plain run of bytes.

    Folders are passed over. `file` is that of `path`, and may be read elsewhere meanwhile. Raises ValueError where the
    archive is cut or damaged, what follows the last header is not the end of one, or members have the same name; and
    OSError where the system fails.
    """
    places: dict[str, tuple[int, int]] = {}
    repeated: list[str] = []
    headers: Any = _Headers(file)
    end = 0
    try:
        with tarfile.open(fileobj=headers, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # pyrefly: ignore  (or it keeps every header)
                if archive.offset <= end or member.size < 0:
                    raise ValueError(f"the header at byte {member.offset:,} has a size below 0")
                end = archive.offset
                if member.isdir():
                    continue
                start, size = 0, -1
                if member.islnk():
                    start, size = places.get(member.linkname, (start, size))
                elif member.isreg() and not member.issparse():
                    start, size = member.offset_data, member.size
                if member.name in places:
                    repeated.append(member.name)
                places[member.name] = start, size
                yield member.name, start, size
            end = archive.offset
    except OSError:
        raise
    except Exception as error:
        # Its errors, and what a damaged header drives it to: ValueError, OverflowError, RecursionError, ...
        raise _damaged(path, str(error) or type(error).__name__) from error
    # The reader takes a damaged header for the end. What is left has to be the empty blocks of a real one.
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise _damaged(path, f"it stops at byte {end:,} without the empty blocks that end an archive")
    while block:
        if block.count(0) != len(block):
            raise _damaged(path, f"from byte {end:,} on there is no header, but there is data")
        block = file.read(1 << 20)
    if repeated:
        raise ValueError(
            f"{path}: {len(repeated):,} of its {len(repeated) + len(places):,} members have the name of one before, as "
            f"{repeated[0]}; expected names that differ, as other readers of such archives do too"
        )


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} is cut, damaged, or no plain tar file ({why}); get or make it again")


def read_bytes(file: IO[bytes], start: int, length: int) -> bytes:
    """Bytes of an archive; none where the member is no plain run of them."""
    file.seek(start)
    return file.read(max(0, length))
