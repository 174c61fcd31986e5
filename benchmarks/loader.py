"""Images a second out of each kind of set, with workers that decode and without.

    python -m benchmarks loader [--num-workers 2] [--seconds 3]

The embedded images are in memory. Decoded on the way: folders of JPEG and PNG, 256 pixels scaled to 64, of PNG of 28
pixels, and a parquet file of 32-pixel JPEG, all made here of random blotches. A trainer starves where it takes more
images a second than its line gives. One thread of arithmetic.
"""

import tempfile
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import harness
from vqvae.data import batches, load_images

MEMORY = "fashion-mini (memory)"
# What is decoded: its folder here, and the options of `load_images`.
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "folder, JPEG 256 -> 64": ("jpeg", {"size": 64}),
    "folder, PNG 256 -> 64": ("png", {"size": 64}),
    "folder, PNG 28": ("small-png", {"size": 28, "channels": 1}),
    "parquet, JPEG 32": ("parquet", {}),
}
BATCH_SIZE = 64
QUICK = "--seconds 0.1 --num-workers 1"


def blotches(generator: np.random.Generator, width: int, height: int) -> Image.Image:
    """A picture that compresses about as a photograph does: blurred noise with a little fine noise."""
    dots = Image.fromarray(generator.integers(0, 256, (9, 9 * width // height, 3), np.uint8))
    coarse = dots.resize((width, height), Image.Resampling.BICUBIC)
    fine = generator.normal(0, 4, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) + fine).clip(0, 255).astype(np.uint8))


def make_folder(folder: Path, suffix: str, num: int, width: int, height: int, mode: str = "RGB") -> None:
    """A folder of pictures."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(num):
        blotches(generator, width, height).convert(mode).save(folder / f"{number:06}{suffix}", quality=90)


def make_files(folder: Path) -> None:
    """All of `FILES`."""
    import pyarrow
    import pyarrow.parquet

    make_folder(folder / "jpeg", ".jpg", 256, 256, 256)
    make_folder(folder / "png", ".png", 256, 256, 256)
    make_folder(folder / "small-png", ".png", 1000, 28, 28, "L")
    generator = np.random.default_rng(0)
    rows = []
    for number in range(2048):
        encoded = BytesIO()
        blotches(generator, 32, 32).save(encoded, "JPEG")
        rows.append({"bytes": encoded.getvalue(), "path": f"{number}.jpg"})
    (folder / "parquet").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"image": rows}), folder / "parquet" / "train.parquet")


def images_per_second(name: str, folder: str, num_workers: int, seconds: float) -> float:
    """Of one set, after a first batch that starts the workers."""
    where, options = FILES.get(name, ("", {}))
    images = load_images(Path(folder) / where, **options) if where else load_images("fashion-mini")
    stream = batches(images, BATCH_SIZE, seed=0, num_workers=num_workers)
    next(stream)
    num, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        num += len(next(stream).images)
    passed = time.perf_counter() - start
    stream.close()
    return num / passed


def main(num_workers: int = 2, seconds: float = 3) -> None:
    """Measure each set once."""
    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder))
        table = harness.Table("set", "images/s, no workers", f"images/s, {num_workers} workers")
        for name in (MEMORY, *FILES):
            # A set in memory takes no workers.
            numbers = (0,) if name == MEMORY else (0, num_workers)
            speeds = [harness.in_child(images_per_second, name, folder, number, seconds) for number in numbers]
            table.row(name, *(f"{speed:,.0f}" for speed in speeds), *[""] * (2 - len(speeds)))
