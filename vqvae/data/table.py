"""Encoded images in Arrow tables: parquet files, and Hugging Face data sets.

The layout is Hugging Face's image feature: a column of structs {bytes, path}, one encoded image
each; a plain binary column will do. Labels are whole numbers in a column of class labels (by the
Hugging Face schema) or one called "label" or "labels".

The encoded bytes stay in Arrow's memory and are decoded batch by batch. Those of parquet files are
read once and held up to 1 GiB, as their pages are compressed and can't be used from the disk. Of
larger ones a row group is read when an image of it is asked for, and the last two are kept. Reading
in order then reads each group once (once in each worker), but a shuffle reads a whole group for
nearly every image: tokenize such a set, which goes in order, and train on the codes; or have it
memory-mapped, by `load_images("hf:FOLDER")`.

Needs the extra `parquet`.
"""

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.dataset
import pyarrow.parquet
import torch
from jaxtyping import Int64
from torch import Tensor

from vqvae.data.decode import read
from vqvae.data.folder import held_out
from vqvae.data.images import MAX_LABEL, EncodedImages, check_shape, check_split

LABEL_COLUMNS = ("label", "labels")
TEST_PARTS = ("test", "validation", "valid", "val")

# Encoded images above this many bytes are not held in memory.
HELD_BYTES = 1 << 30
_HELD_GROUPS = 2

# How many rows are tried for the first image, which sets the default size and channels.
_FIRST_ROWS = 64


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
        file, number, _ = self.groups[group].tolist()
        try:
            with pyarrow.parquet.ParquetFile(self.files[file]) as opened:
                # Threads would be those of the process that a worker was forked from.
                column = opened.read_row_group(number, columns=[self.name], use_threads=False).column(0)
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the system's; Arrow's own, of a damaged file, have no number
            # Kept, or each image of the group would have it read again.
            return ValueError(f"row group {number} of {self.files[file]} can't be read: {str(error).splitlines()[0]}")
        return column

    def stamps(self, rows: np.ndarray) -> Iterator[bytes]:
        """What tells these rows from others: which row groups of which files they are in."""
        known = {}
        for group in np.unique(np.searchsorted(self.ends, rows, side="right")).tolist():
            file, number, num_rows = self.groups[group].tolist()
            if file not in known:
                status = Path(self.files[file]).stat()
                known[file] = f"{status.st_size} {status.st_mtime_ns}"
            yield f"{Path(self.files[file]).name}\0{number} {num_rows} {known[file]}".encode()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": {}}


class ImageTable(EncodedImages):
    """A column of encoded images, decoded when asked for.

    column: structs with a binary field `bytes` (and, where that is null, the `path` of a file),
    or binary. rows: which of its rows make up the set, in which order. labels: int64, one for
    each of `rows`. To `digest` a row is its encoded bytes; of a column above 1 GiB only how many
    they are, and of row groups that are read when asked for the file's name, size and time of
    change. Raises ValueError where there are no rows or no image can be read.
    """

    def __init__(
        self,
        column: pyarrow.ChunkedArray | RowGroups,
        rows: np.ndarray,
        shape: tuple[int, int, int],
        labels: Int64[Tensor, " n"] | None = None,
        num_classes: int | None = None,
        class_names: tuple[str, ...] | None = None,
        *,
        name: str = "table",
    ):
        super().__init__(shape, labels, num_classes, class_names, name)
        if len(rows) == 0:
            raise ValueError(f"got no rows in {name}; expected at least one image")
        self.column, self.rows = column, rows
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
        return _source(self.column[int(self.rows[index])])

    def _stamps(self, indices: range) -> Iterator[bytes]:
        rows = self.rows[indices.start : indices.stop : indices.step]
        yield rows.astype("<i8").tobytes()
        if isinstance(self.column, RowGroups):
            yield from self.column.stamps(rows)
            return
        whole = self.column.nbytes <= HELD_BYTES
        for row in rows.tolist():
            value = self.column[row]
            path, data = b"", value
            if isinstance(value, pyarrow.StructScalar):
                path, data = repr(value.get("path")).encode(), value["bytes"] if value.is_valid else None
            held = None if data is None else data.as_buffer()
            yield path + b"\0" + (b"-" if held is None else bytes(held) if whole else b"%d" % held.size)


def parquet(
    source: str | Path,
    split: str = "train",
    *,
    size: int | None = None,
    channels: int | None = None,
) -> ImageTable:
    """The images of a .parquet file, or of a folder of train*.parquet and test*.parquet files.

    In a folder, validation*.parquet or val*.parquet may stand for test. Of a single file, or a
    folder without test files, about one row in ten is held out for test, by a hash of the row's
    number. `size`: scale and crop to `size` by `size`; by default all take the first training
    image's height and width. `channels`: 1 or 3; by default 1 where that image is grey, else 3.
    Raises ValueError for a missing or damaged file, and for one without a column of images.
    """
    source = Path(source)
    check_split(split)
    check_shape((channels, size, size))
    if source.is_dir():
        parts = {"train": sorted(source.glob("train*.parquet"))}
        if not parts["train"]:
            raise ValueError(f"{source} holds no train*.parquet; expected at least one")
        for part in TEST_PARTS:
            if files := sorted(source.glob(f"{part}*.parquet")):
                parts["test"] = files
                break
    elif source.is_file():
        parts = {"train": [source]}
    else:
        raise ValueError(f"{source} does not exist; expected a parquet file or a folder of them")
    try:
        tables = {
            part: pyarrow.dataset.dataset(list(map(str, files)), format="parquet") for part, files in parts.items()
        }
        return _images(tables, split, size, channels, str(source))
    except (pyarrow.ArrowException, OSError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"{source} can't be read as parquet: {first}") from error


def hugging_face(
    name: str,
    split: str = "train",
    *,
    size: int | None = None,
    channels: int | None = None,
) -> ImageTable:
    """The images of a data set on the Hugging Face hub, "owner/name", or in a local folder.

    Fetched and cached by `datasets`. Its splits train and test are used; validation stands for
    test, and where there is neither, rows are held out. `split`, `size`, `channels`: as `parquet`.
    Raises ValueError where the set can't be had or has no column of images.
    """
    check_split(split)
    check_shape((channels, size, size))
    # Here and not above: it takes a second to import, and parquet files don't need it.
    import datasets

    try:
        splits = datasets.load_dataset(name)
    except Exception as error:
        # The hub's client, the network and the file readers each have errors of their own.
        raise ValueError(
            f"{name} can't be had from Hugging Face ({' '.join(str(error).split())}); expected "
            "the name of a public data set, or of a folder that `datasets` can load"
        ) from error
    parts = {part: splits[part] for part in ("train", *TEST_PARTS) if part in splits}
    if "train" not in parts:
        raise ValueError(f"{name} has the splits {', '.join(map(str, splits))}; expected train among them")
    tables = {"train": _table(parts.pop("train"))}
    if parts:
        tables["test"] = _table(next(iter(parts.values())))
    return _images(tables, split, size, channels, name)


def _table(part: Any) -> pyarrow.dataset.Dataset:
    return pyarrow.dataset.dataset(
        part.with_format("arrow")[:].replace_schema_metadata(part.features.arrow_schema.metadata)
    )


def _images(
    parts: dict[str, pyarrow.dataset.Dataset],
    split: str,
    size: int | None,
    channels: int | None,
    name: str,
) -> ImageTable:
    image = _image_column(parts["train"].schema, name)
    if size is None or channels is None:
        first_size, first_channels = _first(parts["train"], image, name)
        shape = (channels or first_channels, *(first_size if size is None else (size, size)))
    else:
        shape = (channels, size, size)
    part = parts.get(split, parts["train"])
    column = _column(part, image)
    rows = np.arange(len(column))
    if "test" not in parts:
        held = held_out(str(row).encode() for row in range(len(rows)))
        rows = rows[held == (split == "test")]
    if not len(rows):
        raise ValueError(f"{name} has {len(column)} row(s), none of them for split={split!r}")
    labels, num_classes, class_names, unlabelled = _labels(parts, part, image)
    if labels is not None:
        labels = labels[rows]
    images = ImageTable(column, rows, shape, labels, num_classes, class_names, name=name)
    images.unlabelled = unlabelled
    return images


def _column(part: pyarrow.dataset.Dataset, image: str) -> pyarrow.ChunkedArray | RowGroups:
    """The column of images, in memory if it is small or mapped."""
    if isinstance(part, pyarrow.dataset.FileSystemDataset):
        groups, num_bytes = [], 0
        for file, path in enumerate(part.files):
            known = pyarrow.parquet.read_metadata(path)
            for number in range(known.num_row_groups):
                group = known.row_group(number)
                groups.append((file, number, group.num_rows))
                chunks = [group.column(each) for each in range(group.num_columns)]
                num_bytes += sum(
                    each.total_uncompressed_size for each in chunks if each.path_in_schema.split(".")[0] == image
                )
        if num_bytes > HELD_BYTES:
            return RowGroups(part.files, image, groups)
    return part.to_table(columns=[image]).column(0)


def _features(schema: pyarrow.Schema) -> dict[str, dict]:
    """What Hugging Face notes of each column beside the schema; empty for other files."""
    try:
        note = json.loads((schema.metadata or {})[b"huggingface"])
        return {name: each for name, each in note["info"]["features"].items() if "_type" in each}
    except (KeyError, TypeError, AttributeError, ValueError):
        return {}


def _image_column(schema: pyarrow.Schema, name: str) -> str:
    noted = {each for each, feature in _features(schema).items() if feature["_type"] == "Image"}
    fitting = [field.name for field in schema if _holds_bytes(field.type)]
    structs = [each for each in fitting if pyarrow.types.is_struct(schema.field(each).type)]
    for choice in ([each for each in fitting if each in noted], structs, fitting):
        if choice:
            return "image" if "image" in choice else choice[0]
    found = ", ".join(f"{field.name} ({field.type})" for field in schema) or "none"
    raise ValueError(
        f"{name} has no column of encoded images; columns: {found}; expected one of "
        "struct<bytes: binary, path: string> or binary"
    )


def _holds_bytes(kind: pyarrow.DataType) -> bool:
    if pyarrow.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_bytes(kind.field(index).type)
    return any(
        test(kind)
        for test in (
            pyarrow.types.is_binary,
            pyarrow.types.is_large_binary,
            pyarrow.types.is_binary_view,
        )
    )


def _source(value: pyarrow.Scalar) -> Path | BytesIO:
    found = value.as_py()
    if isinstance(found, dict):
        if found["bytes"] is None and found.get("path"):
            return Path(found["path"])
        found = found["bytes"]
    if found is None:
        raise ValueError("the row holds no image")
    return BytesIO(found)


def _first(part: pyarrow.dataset.Dataset, image: str, name: str) -> tuple[tuple[int, int], int]:
    """Size (height, width) and channels of the first image that can be read."""
    reason = "no rows"
    for value in part.head(_FIRST_ROWS, columns=[image], batch_readahead=0, fragment_readahead=0).column(0):
        try:
            found = read(_source(value))
        except (OSError, ValueError) as error:
            reason = str(error)
            continue
        return (found.height, found.width), 1 if found.mode == "L" else 3
    raise ValueError(f"{name} has no readable image in its first {_FIRST_ROWS} rows ({reason})")


def _labels(
    parts: dict[str, pyarrow.dataset.Dataset], part: pyarrow.dataset.Dataset, image: str
) -> tuple[Tensor | None, int | None, tuple[str, ...] | None, int]:
    """Labels of every row of `part`; with classes counted over all parts, as splits may lack one.

    And how many rows have none, where that is why there are no labels.
    """
    schema = part.schema
    features = _features(schema)
    noted = [each for each, feature in features.items() if feature["_type"] == "ClassLabel"]
    fitting = [
        each
        for each in (*noted, *LABEL_COLUMNS)
        if each != image and each in schema.names and _is_label(schema.field(each).type)
    ]
    if not fitting:
        return None, None, None, 0
    label = fitting[0]
    columns = {
        id(each): each.to_table(columns=[label]).column(0) for each in parts.values() if label in each.schema.names
    }
    values = {key: column.cast(pyarrow.int64()).fill_null(-1).to_numpy().copy() for key, column in columns.items()}
    together = np.concatenate(list(values.values()))
    if id(part) not in values or together.min() < 0:
        # -1 and null stand for "not known": labels that only some images have are no labels.
        missing = sum(each.count_rows() for each in parts.values() if id(each) not in values)
        unlabelled = int((together < 0).sum()) + missing
        return None, None, None, unlabelled if (together >= 0).any() else 0
    if together.max() > MAX_LABEL:
        raise ValueError(f"the column {label} has the label {together.max()}; expected at most {MAX_LABEL}")
    num_classes = int(together.max()) + 1
    names = features.get(label, {}).get("names")
    class_names = tuple(names) if names is not None and len(names) >= num_classes else None
    labels = torch.from_numpy(values[id(part)])
    return labels, num_classes if class_names is None else len(class_names), class_names, 0


def _is_label(kind: pyarrow.DataType) -> bool:
    return pyarrow.types.is_integer(kind)
