"""A tokenized set as one parquet file, which most tools for data read.

    codes       fixed_size_list<uint16 or uint32>: the grid in raster order
    label       int64, where the set has labels
    key         string: what the source called the image; bytes that are no UTF-8 as \\xNN; of an absolute path, which
                sets made by versions before may have, the last part

The schema's metadata has `grid` (JSON, to reshape the codes with), `num_codes`, `class_names` (JSON) and the
`tokenizer`'s fingerprint.

Needs the extra `parquet`.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import safefolder
from vqvae.tokens import origins
from vqvae.tokens.dataset import CodeDataset

# Rows that are written at once.
_ROWS = 65_536
# By which a file of ours is known.
_NOTES = {b"grid", b"num_codes", b"tokenizer"}


@contextlib.contextmanager
def one_parquet(path: Path) -> Iterator[None]:
    """Be the only one who writes a parquet file of codes there, until the block is left.

    Raises:
        ValueError: the extra is missing; something else is there; or it cannot be written, by anybody or now.
    """
    _, parquet = _import()
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is no regular file; expected one, or a name that is free")
    if os.path.isfile(path) and os.path.getsize(path):
        try:
            notes = parquet.read_schema(path).metadata or {}
        except Exception:  # pyarrow has many kinds for a file that is no parquet
            notes = {}
        if not notes.keys() >= _NOTES:
            raise ValueError(f"{path} is there, and is no parquet file of codes; name another, or remove it")
    with safefolder.locks.one_writer(path):
        yield


def write_parquet(dataset: CodeDataset, path: str | Path) -> None:
    """Write a set to a parquet file, whole or not at all, with the memory of one shard.

    Raises:
        ValueError: the extra is missing, or the disk is full.
    """
    pyarrow, parquet = _import()
    path = Path(path)
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder; expected the name of a file")
    places = prod(dataset.grid)
    code = pyarrow.from_numpy_dtype(dataset.dtype)
    fields: list[Any] = [pyarrow.field("codes", pyarrow.list_(code, places))]
    if dataset.num_classes is not None:
        fields.append(pyarrow.field("label", pyarrow.int64()))
    fields.append(pyarrow.field("key", pyarrow.string()))
    notes = {
        "grid": json.dumps(dataset.grid),
        "num_codes": str(dataset.num_codes),
        "class_names": json.dumps(dataset.class_names),
        "tokenizer": dataset.tokenizer["fingerprint"],
    }
    schema = pyarrow.schema(fields, metadata=notes)
    with safefolder.files.replacing(path) as scratch, parquet.ParquetWriter(scratch, schema) as writer:
        for shard in range(dataset.num_shards):
            codes, labels, keys = dataset.shard(shard)
            for at in range(0, len(codes), _ROWS):
                part = slice(at, at + _ROWS)
                flat = pyarrow.array(codes[part].reshape(-1))
                columns: list[Any] = [pyarrow.FixedSizeListArray.from_arrays(flat, places)]
                if labels is not None:
                    columns.append(pyarrow.array(labels[part]))
                texts = (key.decode("utf-8", "backslashreplace") for key in keys[part])
                columns.append(pyarrow.array([origins.key_without_places(text) for text in texts]))
                writer.write_table(pyarrow.table(columns, schema=schema))


def _import() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"parquet needs more packages ({error}): pip install 'vqvae-priors[parquet]'") from error
    return pyarrow, parquet
