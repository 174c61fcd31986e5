"""Rows of parquet files: read by their groups, and the files that they name instead of bytes."""

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from vqvae.data.files import shown

_HELD_GROUPS = 2


class RowGroups:
    """A column of parquet files, of which the last row groups that were asked for are in memory.

    column[row] is what pyarrow's column gives. Raises ValueError where the row's group is damaged, and OSError where
    the file can't be read.
    """

    def __init__(self, files: list[str], name: str, rows: list[tuple[int, int, int]]):
        self.files, self.name = files, name
        # File, group in the file, and rows up to its end.
        self.groups = np.array(rows, np.int64).reshape(-1, 3)
        self.ends = np.cumsum(self.groups[:, 2])
        self._held: dict[int, pyarrow.ChunkedArray | ValueError] = {}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, row: int) -> pyarrow.Scalar:
        group = int(np.searchsorted(self.ends, row, side="right"))
        found = self._held.pop(group, None)
        if found is None:
            while len(self._held) >= _HELD_GROUPS:
                del self._held[next(iter(self._held))]
            found = self._read(group)
        self._held[group] = found  # now the last to go
        if isinstance(found, ValueError):
            raise ValueError(str(found))
        return found[int(row - self.ends[group] + self.groups[group, 2])]

    def _read(self, group: int) -> pyarrow.ChunkedArray | ValueError:
        file, number, num_rows = self.groups[group].tolist()
        try:
            with pyarrow.parquet.ParquetFile(self.files[file]) as opened:
                # Threads would be those of the process that a worker was forked from.
                column = opened.read_row_group(number, columns=[self.name], use_threads=False).column(0)
            if len(column) != num_rows:
                raise pyarrow.ArrowInvalid(f"it has {len(column):,} rows, and {num_rows:,} are said to be there")
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the system's; Arrow's own, of a damaged file, have no number
            # Kept, or each image of the group would have it read again.
            return ValueError(f"row group {number} of {self.files[file]} can't be read: {first_line(error)}")
        return column

    def stamps(self, rows: np.ndarray, times: bool) -> Iterator[bytes]:
        """What tells these rows from others: which row groups of which files they are in."""
        known: dict[int, str] = {}
        for group in np.unique(np.searchsorted(self.ends, rows, side="right")).tolist():
            file, number, num_rows = self.groups[group].tolist()
            if file not in known:
                status = Path(self.files[file]).stat()
                known[file] = f"{status.st_size} {status.st_mtime_ns}" if times else f"{status.st_size}"
            yield f"{Path(self.files[file]).name}\0{number} {num_rows} {known[file]}".encode()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": {}}


class RowFiles:
    """Files that rows name instead of bytes, of which only those inside some folders are read.

    Args:
        folders: of each file of rows, the folders in which such files may lie, after links. Relative paths go out from
            the first, unless that is None.
        ends: rows up to the end of each file of rows.
    """

    def __init__(self, folders: Sequence[Sequence[Path | None]], ends: Sequence[int]):
        self.bases = [None if some[0] is None else os.path.abspath(some[0]) for some in folders]
        self.inside = [
            tuple(os.path.join(os.path.realpath(folder), "") for folder in some if folder is not None)
            for some in folders
        ]
        self.ends = np.array(ends, np.int64)

    def path(self, row: int, name: Any) -> Path:
        """Where the file lies that a row names. Raises ValueError where it lies elsewhere."""
        at = int(np.searchsorted(self.ends, row, side="right"))
        base = self.bases[at]
        if not isinstance(name, str) or (base is None and not os.path.isabs(name)):
            raise ValueError(f"it holds no bytes, and names no file ({shown(repr(name))})")
        folder, last = os.path.split(os.path.join(base or "", name))
        path = os.path.join(_real(folder), last)
        if last in ("", ".", "..") or os.path.islink(path):
            path = os.path.realpath(path)
        if not path.startswith(self.inside[at]):
            raise ValueError("it names a file outside the folder of its data set, which is not read")
        return Path(path)


@lru_cache(maxsize=1024)
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__
