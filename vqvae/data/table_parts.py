"""The parts of a set as rows: parquet files one after another, or tables in memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.dataset
import pyarrow.parquet

from vqvae.data.files import check_regular
from vqvae.data.table_columns import ReadColumn
from vqvae.data.table_rows import RowFiles, first_line

# Rows of a file; one that says that it has more is damaged.
_MAX_ROWS = 1 << 28


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A parquet file, or a table in memory.

    folders: where files that rows name may lie, as for `RowFiles`. metadata: of a parquet file.
    """

    schema: pyarrow.Schema
    num_rows: int
    column: ReadColumn
    folders: tuple[Path | None, ...]
    metadata: Any = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """One part of a set: the rows of some sources, one after another."""

    data: pyarrow.dataset.Dataset
    sources: list[Rows]

    @property
    def num_rows(self) -> int:
        return sum(source.num_rows for source in self.sources)

    @property
    def files(self) -> RowFiles:
        ends = accumulate(source.num_rows for source in self.sources)
        return RowFiles([source.folders for source in self.sources], list(ends))


def of_files(paths: list[Path], name: str) -> Table:
    """Parquet files. Raises ValueError for what is none; `name` is that of the set."""
    sources = []
    for path in paths:
        try:
            check_regular(path)
        except (OSError, ValueError) as error:
            reason = "it does not exist" if isinstance(error, FileNotFoundError) else error
            raise ValueError(f"{path} can't be read: {reason}; expected a parquet file or a folder of them") from error
        with reading(path), pyarrow.parquet.ParquetFile(path) as opened:
            metadata = opened.metadata
            if not 0 <= metadata.num_rows <= _MAX_ROWS:
                raise ValueError(f"{path} says that it has {metadata.num_rows:,} rows; expected at most {_MAX_ROWS:,}")
            sources.append(
                Rows(
                    schema=opened.schema_arrow,
                    num_rows=metadata.num_rows,
                    column=partial(_file_column, path, metadata.num_rows),
                    folders=(path.parent,),
                    metadata=metadata,
                )
            )
    with reading(name):
        files = list(map(str, paths))
        data = pyarrow.dataset.dataset(files, format="parquet", schema=sources[0].schema if sources else None)
        return Table(data=data, sources=sources)


def _file_column(path: Path, num_rows: int, name: str) -> pyarrow.ChunkedArray:
    with reading(path), pyarrow.parquet.ParquetFile(path) as opened:
        column = opened.read(columns=[name]).column(name)
        if len(column) != num_rows:
            raise ValueError(f"{path} has {len(column):,} rows of {name}, and says that it has {num_rows:,}")
        return column


def of_memory(part: Any, folders: tuple[Path | None, ...]) -> Table:
    """A split of a Hugging Face set, and the folders in which files may lie that its rows name."""
    table = part.with_format("arrow")[:].replace_schema_metadata(part.features.arrow_schema.metadata)
    rows = Rows(schema=table.schema, num_rows=len(table), column=table.column, folders=folders)
    return Table(data=pyarrow.dataset.dataset(table), sources=[rows])


@contextmanager
def reading(name: str | Path) -> Iterator[None]:
    """What Arrow makes of a damaged file is a ValueError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and not isinstance(error, pyarrow.ArrowException):
            raise
        raise ValueError(f"{name} can't be read as parquet: {first_line(error)}") from error
