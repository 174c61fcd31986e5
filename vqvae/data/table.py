"""Encoded images in Arrow tables: parquet files, and Hugging Face data sets.

Parquet files are read in place, by pyarrow: `datasets` would first write all of them again as Arrow
files into its cache.

The layout is Hugging Face's image feature: a column of structs {bytes, path}, one encoded image
each; a plain binary column will do. A row without bytes may name a file: of parquet files one that
lies, after links, in the folder of the file that the row is in, or below; of Hugging Face sets one
in their local folder, or in the caches of `datasets` and the hub. No other is read. Labels are in a
column of class labels (by the Hugging Face schema) or one called "label" or "labels": whole
numbers, or the names of classes (`vqvae.data.labels`).

The encoded bytes stay in Arrow's memory and are decoded batch by batch. Those of parquet files are
read once and held up to 1 GiB, as their pages are compressed and can't be used from the disk. Of
larger ones a row group is read when an image of it is asked for, and the last two are kept. Reading
in order then reads each group once (once in each worker), but a shuffle reads a whole group for
nearly every image: tokenize such a set, which goes in order, and train on the codes; or have it
memory-mapped, by `load_images("hf:FOLDER")`.

    table_parts.py    parquet files one after another, and tables in memory
    table_rows.py     row groups, and the files that rows name
    table_columns.py  which column holds images, and what the labels are

Needs the extra `parquet`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.dataset

from vqvae.data.files import check_regular
from vqvae.data.folder import held_out
from vqvae.data.images import FIRST, EncodedImages, Size, check_split, shape_of, wanted
from vqvae.data.labels import NONE, Classes, Given
from vqvae.data.splits import Layout, layout, named_parts
from vqvae.data.table_columns import given_labels, holds_bytes, image_column, label_column, with_names
from vqvae.data.table_parts import Table, of_files, of_memory, reading
from vqvae.data.table_rows import RowFiles, RowGroups

# Encoded images above this many bytes are not held in memory.
HELD_BYTES = 1 << 30


class ImageTable(EncodedImages):
    """A column of encoded images, decoded when asked for.

    column: structs with a binary field `bytes` (and, where that is null, the `path` of a file),
    or binary. rows: which of its rows make up the set, in which order. files: where those that rows
    name may lie. To `digest` a row is its encoded bytes, or the path, size and time of change of the
    file that it names; of a column above 1 GiB only how many bytes they are, and of row groups that
    are read when asked for the parquet file's name, size and time of change. Raises ValueError where
    no image can be read.
    """

    def __init__(
        self,
        column: pyarrow.ChunkedArray | RowGroups,
        rows: np.ndarray,
        shape: tuple[int, int, int],
        classes: Classes,
        given: Given,
        *,
        name: str,
        files: RowFiles,
    ):
        super().__init__(name, shape, classes, given)
        self.column, self.rows, self.files = column, rows, files
        self.check_readable()

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, index: int) -> str:
        """The row's number, and the path that it names."""
        row = int(self.rows[range(len(self))[index]])
        try:
            value = self.column[row]
            path = value["path"].as_py() if isinstance(value, pyarrow.StructScalar) and value.is_valid else None
        except (KeyError, ValueError, OSError):
            path = None  # there is no such field, or the row group can't be read
        return f"row {row} ({path})" if path else f"row {row}"

    def _encoded(self, index: int) -> Path | BytesIO:
        row = int(self.rows[index])
        return _source(self.column[row], row, self.files)

    def _stamps(self, indices: range, times: bool) -> Iterator[bytes]:
        rows = self.rows[indices.start : indices.stop : indices.step]
        yield rows.astype("<i8").tobytes()
        if isinstance(self.column, RowGroups):
            yield from self.column.stamps(rows, times)
            return
        whole = self.column.nbytes <= HELD_BYTES
        for row in rows.tolist():
            value = self.column[row]
            path, data = b"", value
            if isinstance(value, pyarrow.StructScalar):
                path, data = repr(value.get("path")).encode(), value["bytes"] if value.is_valid else None
            held = data.as_buffer() if data is not None and data.is_valid else None
            if held is None:
                yield path + b"\0-" + self._file_stamp(value, row, times)
            else:
                yield path + b"\0" + (bytes(held) if whole else b"%d" % held.size)

    def _file_stamp(self, value: pyarrow.Scalar, row: int, times: bool) -> bytes:
        """Size and time of the file that a row names; nothing where there is none."""
        try:
            source = _source(value, row, self.files)
            if not isinstance(source, Path):
                return b""
            status = check_regular(source)
        except (OSError, ValueError):
            return b""
        return b"%d" % status.st_size + (b" %d" % status.st_mtime_ns if times else b"")


def _source(value: pyarrow.Scalar, row: int, files: RowFiles) -> Path | BytesIO:
    found = value.as_py()
    if isinstance(found, dict):
        name, found = found.get("path"), found["bytes"]
        if found is None and name:
            return files.path(row, name)
    if found is None:
        raise ValueError("the row holds no image")
    return BytesIO(found)


def parquet(
    source: str | Path, split: str = "train", *, size: Size | None = None, channels: int | None = None
) -> ImageTable:
    """The images of a .parquet file, or of a folder of them.

    In a folder the names of files, or of the folders that they are in, say which are to test on
    (`vqvae.data.splits`). Where nothing is named so, about one row in ten is held out for test, by
    a hash of the row's number. `size`: scale and crop to `size`; by default all take the
    first training image's height and width. `channels`: 1 or 3; by default 1 where that image is
    grey, else 3.
    Raises ValueError for a missing or damaged file, for one without a column of images, and for a
    folder that can be read in two ways.
    """
    source = Path(source)
    if source.is_dir():
        return tables_of(layout(source), split, size=size, channels=channels)
    return _images({"train": of_files([source], str(source))}, split, size, channels, str(source))


def tables_of(found: Layout, split: str, *, size: Size | None, channels: int | None) -> ImageTable:
    """`parquet` for a folder of which it is known what it holds.

    Images beside the parquet files are theirs, if rows name files.
    """
    name = str(found.folder)
    parts = found.parts("parquet files", split, beside=("images",))
    tables = {part: of_files(each.paths, name) for part, each in parts.items()}
    if "images" in found.kinds and not _name_files(tables["train"], name):
        found.parts("parquet files", split)  # which is an error
    return _images(tables, split, size, channels, name)


def hugging_face(
    name: str, split: str = "train", *, size: Size | None = None, channels: int | None = None
) -> ImageTable:
    """The images of a data set on the Hugging Face hub, "owner/name", or in a local folder.

    Fetched and cached by `datasets`. Its splits train and test are used, and others by the names in
    `vqvae.data.splits`; where nothing is there to test on, rows are held out. `split`, `size`,
    `channels`: as `parquet`. Raises ValueError where the set can't be had or has no column of images.
    """
    check_split(split)
    wanted(size, channels)
    if not name.strip():
        raise ValueError("got no name of a data set; expected hf:OWNER/NAME")
    # Here and not above: it takes a second to import, and parquet files don't need it.
    import datasets
    import huggingface_hub

    try:
        splits = datasets.load_dataset(name)
    except Exception as error:
        # The hub's client, the network and the file readers each have errors of their own.
        raise ValueError(
            f"{name} can't be had from Hugging Face ({' '.join(str(error).split())}); expected "
            "the name of a public data set, or of a folder that `datasets` can load"
        ) from error
    known = datasets.config
    caches = (
        known.HF_DATASETS_CACHE,
        known.DOWNLOADED_DATASETS_PATH,
        known.EXTRACTED_DATASETS_PATH,
        huggingface_hub.constants.HF_HUB_CACHE,
    )
    folders = (Path(name) if Path(name).is_dir() else None, *map(Path, caches))
    tables = {
        part: of_memory(splits[each], folders) for part, each in named_parts(name, list(map(str, splits))).items()
    }
    return _images(tables, split, size, channels, name)


def _images(parts: dict[str, Table], split: str, size: Size | None, channels: int | None, name: str) -> ImageTable:
    check_split(split)
    sides, channels = wanted(size, channels)
    image = image_column(parts["train"].sources[0].schema, name)
    for source in (each for table in parts.values() for each in table.sources):
        if source.schema.names.count(image) != 1 or not holds_bytes(source.schema.field(image).type):
            raise ValueError(f"{name} has a column {image} of encoded images in some files and not in all of them")
    shape = shape_of(sides, channels, _first(parts["train"], image, name), name)
    part = parts.get(split, parts["train"])
    with reading(name):
        column = _column(part, image)
    if len(column) != part.num_rows:
        raise ValueError(f"{name} has {len(column):,} rows, and says that it has {part.num_rows:,}")
    rows = np.arange(len(column))
    if "test" not in parts:
        held = held_out(str(row).encode() for row in range(len(rows)))
        rows = rows[held == (split == "test")]
    if not len(rows):
        raise ValueError(f"{name} has {len(column)} row(s), none of them for split={split!r}")
    with reading(name):
        given, classes = _labels(parts, image)
    here = given[id(part)].at(rows)
    images = ImageTable(column, rows, shape, classes, here, name=name, files=part.files)
    images.split = split
    return images


def _column(part: Table, image: str) -> pyarrow.ChunkedArray | RowGroups:
    """The column of images, in memory if it is small or mapped."""
    if isinstance(part.data, pyarrow.dataset.FileSystemDataset):
        groups = [
            (file, number, source.metadata.row_group(number))
            for file, source in enumerate(part.sources)
            for number in range(source.metadata.num_row_groups)
        ]
        # Of columns only where it matters: over what some damaged files say of them pyarrow ends the process.
        if sum(group.total_byte_size for *_, group in groups) > HELD_BYTES and _num_bytes(part, image) > HELD_BYTES:
            return RowGroups(part.data.files, image, [(file, number, group.num_rows) for file, number, group in groups])
    return part.data.to_table(columns=[image]).column(0)


def _num_bytes(part: Table, image: str) -> int:
    """Bytes of the encoded images in parquet files, unpacked."""
    num_bytes = 0
    for metadata in (source.metadata for source in part.sources):
        paths = [metadata.schema.column(each).path for each in range(metadata.num_columns)]
        places = [place for place, path in enumerate(paths) if path.split(".")[0] == image]
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            num_bytes += sum(group.column(place).total_uncompressed_size for place in places)
    return num_bytes


def _first_rows(part: Table, image: str, name: str) -> pyarrow.ChunkedArray:
    with reading(name):
        return part.data.head(FIRST, columns=[image], batch_readahead=0, fragment_readahead=0).column(0)


def _name_files(part: Table, name: str) -> bool:
    """Whether rows name files instead of bytes."""
    image = image_column(part.sources[0].schema, name)
    found = _first_rows(part, image, name).to_pylist()
    return any(isinstance(each, dict) and each["bytes"] is None and each.get("path") for each in found)


def _first(part: Table, image: str, name: str) -> Iterator[Callable[[], Path | BytesIO]]:
    """The first images, each when it is asked for."""
    files = part.files
    for row, value in enumerate(_first_rows(part, image, name)):
        yield partial(_source, value, row, files)


def _labels(parts: dict[str, Table], image: str) -> tuple[dict[int, Given], Classes]:
    """What each part says of labels; and the classes, counted over all parts, as splits may lack one."""
    sources = [source for part in parts.values() for source in part.sources]
    label = label_column((source.schema for source in sources), image)
    if label is None:
        return {id(part): Given(codes=np.full(part.num_rows, NONE, np.int64)) for part in parts.values()}, Classes()
    given = {
        id(part): Given.joined(
            [given_labels(source.schema, label, source.num_rows, source.column) for source in part.sources]
        )
        for part in parts.values()
    }
    classes = Classes.of(Given.joined(list(given.values())))
    return given, with_names(classes, sources[0].schema, label)
