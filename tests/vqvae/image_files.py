"""Random pixels; as image files, in archives and in parquet files; and as the tensors expected of them."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vqvae.data import Images, load_images

RNG = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    """Random levels; the generator starts anew with each test, see conftest.py."""
    return RNG.integers(0, 256, shape, np.uint8)


def save(path: Path, pixels: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def chw(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1).copy())


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_parquet(path: Path, *, note: str | None = None, options: Any = None, **columns: Any) -> Path:
    """note: what Hugging Face writes of the columns. options: of pyarrow, as `row_group_size`."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table(columns)
    if note is not None:
        table = table.replace_schema_metadata({"huggingface": note})
    parquet.write_table(table, path, **(options or {}))
    return path


def both(source: str | Path, **options: Any) -> tuple[Images, Images]:
    """The images to train on, and those to test on."""
    return load_images(source, "train", **options), load_images(source, "test", **options)
