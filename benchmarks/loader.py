"""How many images a second each kind of set gives, as a small markdown table.

    python benchmarks/loader.py [--num-workers 2] [--seconds 3]

Sets in memory: the embedded images. Decoded on the way: folders of JPEG and PNG, 256 pixels scaled
to 64, and a parquet file of 32-pixel JPEG (with the extra `parquet`), all made here of random
blotches. A trainer starves where it takes more images a second than its line gives.
"""

import argparse
import tempfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vqvae.data import Images, batches, load_images

NUM_FILES = 256
BATCH_SIZE = 64


def blotches(size: int, generator: np.random.Generator) -> Image.Image:
    """A picture that compresses about as a photograph does: blurred noise with a little fine noise."""
    dots = Image.fromarray(generator.integers(0, 256, (9, 9, 3), np.uint8))
    coarse = dots.resize((size, size), Image.Resampling.BICUBIC)
    fine = generator.normal(0, 4, (size, size, 3))
    return Image.fromarray((np.asarray(coarse) + fine).clip(0, 255).astype(np.uint8))


def make_folder(folder: Path, suffix: str) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(NUM_FILES):
        blotches(256, generator).save(folder / f"{number}{suffix}")
    return folder


def make_parquet(path: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    generator = np.random.default_rng(0)
    rows = []
    for number in range(8 * NUM_FILES):
        encoded = BytesIO()
        blotches(32, generator).save(encoded, "JPEG")
        rows.append({"bytes": encoded.getvalue(), "path": f"{number}.jpg"})
    pyarrow.parquet.write_table(pyarrow.table({"image": rows}), path)
    return path


def rate(images: Images, num_workers: int, seconds: float) -> float:
    """Images a second, after a first batch that starts the workers."""
    stream = batches(images, BATCH_SIZE, seed=0, num_workers=num_workers)
    next(stream)
    num, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        num += len(next(stream).images)
    passed = time.perf_counter() - start
    stream.close()
    return num / passed


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how fast images are loaded.")
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3, help="for each measurement")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    embedded = load_images("fashion-mini")
    print(f"fashion-mini, train: {len(embedded)} images decoded in {time.perf_counter() - start:.2f} s\n")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sets = {
            "fashion-mini (memory)": embedded,
            "folder, JPEG 256 -> 64": load_images(make_folder(folder / "jpeg", ".jpg")),
            "folder, PNG 256 -> 64": load_images(make_folder(folder / "png", ".png")),
        }
        try:
            sets["parquet, JPEG 32"] = load_images(make_parquet(folder / "images.parquet"))
        except ImportError as error:
            print(f"no parquet: {error}\n")
        print(f"| set | images/s, no workers | images/s, {arguments.num_workers} workers |")
        print("|---|---|---|")
        for name, images in sets.items():
            here = f"{rate(images, 0, arguments.seconds):,.0f}"
            # A set in memory takes no workers.
            ahead = "" if "memory" in name else f"{rate(images, arguments.num_workers, arguments.seconds):,.0f}"
            print(f"| {name} | {here} | {ahead} |")


if __name__ == "__main__":
    main()
