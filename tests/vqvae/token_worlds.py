"""Small tokenizers, images of several kinds on the disk, and spoiled sets of codes; for tests of tokenized sets."""

import functools
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
from image_files import save
from PIL import Image

from vqvae import VQVAE, exits, tokens
from vqvae.cli.tokenizing import tokenize as command
from vqvae.data import Images, load_images
from vqvae.quantizers import FSQ, ResidualQuantizer, VectorQuantizer
from vqvae.tokens import CodeBatch, Tokenized, Tokenizing, TokenizingOnRay, layout
from vqvae.tokens.index import checksum
from vqvae.tokens.layout import Plan

QUANTIZERS = {
    "plain": VectorQuantizer.Config(num_codes=16, dim=4),
    "residual": ResidualQuantizer.Config(depth=3, quantizer=VectorQuantizer.Config(num_codes=16, dim=4)),
    "many": FSQ.Config(levels=(9, 9, 9, 9, 9, 9)),  # 531,441 codes
}
SIZES = {"batch_size": 4, "shard_size": 9}
SHARD, OTHER = "codes-00001.safetensors", "codes-00000.safetensors"


def tokenizer(kind: str = "plain", seed: int = 0) -> VQVAE:
    torch.manual_seed(seed)
    quantizer = QUANTIZERS[kind]
    return VQVAE(image_size=8, num_channels=3, width=8, num_blocks=1, quantizer=quantizer).eval()


def loaded(images: Images | Path) -> Images:
    return images if isinstance(images, Images) else load_images(images, size=8, channels=3)


def tokenize(
    images: Images | Path, folder: Path, model: Any = None, *, progress: Any = None, timings: Any = None, **options: Any
) -> Tokenized:
    """`vqvae.tokens.tokenize` with a small tokenizer and in small shards, unless told otherwise."""
    sizes = Tokenizing(**{**SIZES, **options})
    return tokens.tokenize(model or tokenizer(), loaded(images), folder, sizes, progress=progress, timings=timings)


def plan(images: Images | Path, folder: Path, model: Any = None, **options: Any) -> Plan:
    """`vqvae.tokens.layout.plan`, likewise."""
    return layout.plan(model or tokenizer(), loaded(images), folder, Tokenizing(**{**SIZES, **options}))


def tokenize_on_ray(images: Images | Path, folder: Path, model: Any = None, **options: Any) -> Tokenized:
    """`vqvae.tokens.tokenize_on_ray`, likewise."""
    others = {name: options.pop(name) for name in ("session", "open_images", "progress") if name in options}
    sizes = TokenizingOnRay(**{**SIZES, **options})
    return tokens.tokenize_on_ray(model or tokenizer(), loaded(images), folder, sizes, **others)


def call(*args: object) -> int:
    """`vqvae tokenize` with these arguments."""
    later = functools.wraps(command)(lambda *told, **options: functools.partial(command, *told, **options))
    return exits.parsed(lambda: tyro.cli(later, args=[str(each) for each in args]))()


@contextmanager
def refused(match: str) -> Iterator[None]:
    """What is done in the block is a ValueError of one line, and no long one."""
    with pytest.raises(ValueError, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800


@contextmanager
def process(source: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that tokenizes these images, to folders that it is told; see tokenizing_process.py."""
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])])}
    args = [sys.executable, "-W", "ignore", str(here / "tokenizing_process.py"), str(source)]
    with subprocess.Popen(args, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as found:
        try:
            assert found.stdout is not None
            assert found.stdout.readline() == "ready\n"
            yield found
        finally:
            found.kill()


# Images


def photos(folder: Path, num: int = 20, broken: Sequence[int] = ()) -> Path:
    """A folder of images of two classes, and one to test on; some are no images."""
    generator = torch.Generator().manual_seed(7)
    for number in range(num):
        pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8, generator=generator).numpy()
        path = save(folder / "train" / "ab"[number >= num // 2] / f"{number:03}.png", pixels)
        if number in broken:
            path.write_bytes(b"broken")
    save(folder / "test" / "a" / "0.png", pixels)
    return folder


def encoded(seed: int) -> bytes:
    """An image; all are of one size."""
    stream = io.BytesIO()
    levels = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(seed)).byte()
    Image.fromarray(levels.numpy()).save(stream, "BMP")
    return stream.getvalue()


def archive(path: Path, images: Sequence[bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for number, data in enumerate(images):
            member = tarfile.TarInfo(f"{number:03}.bmp")
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def table(path: Path, rows: Sequence[Any]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"image": rows}), path, row_group_size=5)
    return path


# Sets


def joined(batches: Sequence[CodeBatch]) -> CodeBatch:
    """Batches one after another, as one."""
    labels = [batch.labels for batch in batches if batch.labels is not None]
    return CodeBatch(torch.cat([batch.codes for batch in batches]), torch.cat(labels) if labels else None)


def equal(left: CodeBatch, right: CodeBatch) -> bool:
    same_labels = left.labels is right.labels is None or torch.equal(left.labels, right.labels)
    return torch.equal(left.codes, right.codes) and same_labels


def copied(source: Path, folder: Path) -> Path:
    """A copy of a tokenized set in a folder that is made."""
    folder.mkdir(parents=True)
    for name, data in contents(source).items():
        (folder / name).write_bytes(data)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def changed_index(folder: Path, change: Callable[[dict[str, Any]], Any], *, signed: bool = True) -> None:
    """Another index, whose own checksum fits if it is signed."""
    index = json.loads((folder / "index.json").read_text())
    change(index)
    if signed and "crc32" in index:
        index["crc32"] = checksum(index)
    (folder / "index.json").write_text(json.dumps(index))


def as_before(index: dict[str, Any]) -> None:
    """An index as versions before wrote it: with absolute paths, and without checksums."""
    index.pop("crc32")
    for shard in index["shards"]:
        shard.pop("crc32")
    index["source"] = index["tokenizer"]["source"] = "/home/somebody/photos"
