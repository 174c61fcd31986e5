"""Make the embedded images, vqvae/assets/fashion-mini, from the four idx.gz files of Fashion-MNIST.

    python -m benchmarks embed_fashion_mnist FOLDER_WITH_THE_IDX_FILES

How the mosaics are laid out stands in vqvae/data/builtin.py. Each split is put in order class by
class, from an image to its nearest neighbour (in squared error) not yet taken. Why so: on 2,000
images, in bits per pixel, lossless WebP of most effort takes 3.89 of mosaics as they come, 3.83
class by class, 3.76 with tiles transposed besides; with neighbours in the three channels the
20,000 take 3.62. PNG, compressed best, takes 3.96 class by class. About ten minutes on one core.
"""

import sys
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image
from tyro.conf import Positional

from vqvae.data.builtin import COLUMNS, STRIP, fashion_mini, fashion_mnist

QUICK = ""
LENGTHS = {"train": 20_000, "test": 2_000}
ASSETS = Path(__file__).parents[1] / "vqvae" / "assets" / "fashion-mini"


def neighbours(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Indices of all images: by class, then each followed by the nearest that is left."""
    order: list[int] = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        pixels = images[members].reshape(len(members), -1).astype(np.float32)
        squares = (pixels**2).sum(1)
        left = np.ones(len(members), bool)
        here = 0
        for _ in members:
            left[here] = False
            order.append(int(members[here]))
            distances = np.where(left, squares - 2 * pixels @ pixels[here], np.inf)
            here = int(distances.argmin())
    return np.array(order, np.uint16)


def mosaic(images: np.ndarray) -> np.ndarray:
    """Up to STRIP images as one RGB picture."""
    whole = 3 * COLUMNS
    tiles = np.zeros((-(-len(images) // whole) * whole, 28, 28), np.uint8)
    tiles[: len(images)] = images
    return rearrange(tiles, "(r s c) h w -> (r w) (s h) c", s=COLUMNS, c=3)


def main(folder: Positional[Path]) -> None:
    """Embed a part of Fashion-MNIST.

    Args:
        folder: holds the four idx.gz files
    """
    ASSETS.mkdir(parents=True, exist_ok=True)
    for old in [*ASSETS.glob("*.webp"), *ASSETS.glob("*.npy")]:
        old.unlink()
    for split, length in LENGTHS.items():
        whole = fashion_mnist(split, root=folder)
        first = whole[:length]
        assert first.labels is not None
        images, labels = first.images[:, 0].numpy(), first.labels.numpy()
        order = neighbours(images, labels)
        np.save(ASSETS / f"{split}-order.npy", order)
        np.save(ASSETS / f"{split}-labels.npy", labels.astype(np.uint8))
        for strip, start in enumerate(range(0, length, STRIP)):
            picture = Image.fromarray(mosaic(images[order[start : start + STRIP]]))
            path = ASSETS / f"{split}-{strip:02}.webp"
            picture.save(path, lossless=True, quality=100, method=6, exact=True)
            print(path.name, path.stat().st_size, file=sys.stderr, flush=True)
        embedded = fashion_mini(split)
        assert embedded.images.equal(first.images)
        assert embedded.labels is not None
        assert embedded.labels.equal(first.labels)
    size = sum(path.stat().st_size for path in ASSETS.iterdir())
    print(f"{size:,} bytes in {ASSETS}", file=sys.stderr)
