"""Sets known by name: Fashion-MNIST (whole, or the part that ships with the package) and CIFAR-10.

Fashion-MNIST: 28 x 28 greys of ten kinds of clothing, 60,000 to train on and 10,000 to test.
(Xiao, Rasul, Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
Algorithms", 2017; MIT licence.) CIFAR-10: 32 x 32 colour, 50,000 and 10,000. (Krizhevsky,
"Learning Multiple Layers of Features from Tiny Images", 2009.) Both come through torchvision,
which downloads them and checks what it got.

`fashion_mini` is the first 20,000 and the first 2,000 of Fashion-MNIST, packed as mosaics:

    tile t of a split  =  image order[t], transposed
    mosaic m           =  tiles  m STRIP ... (m + 1) STRIP - 1,  of which tile 3 i + c is
                          channel c at place i, row by row, COLUMNS to a row

Any viewer opens them. The order puts images that look alike one after the other, so that the
three colour channels predict each other; what that saves stands in the script that makes them,
benchmarks/embed_fashion_mnist.py.
"""

import gzip
import math
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from vqvae.data.decoding import fit
from vqvae.data.images import ImageTensors, check_split

# The mosaics of the embedded set: tiles in one file, places in one row of it.
STRIP = 600
COLUMNS = 10

CACHE = Path("~/.cache/vqvae-priors")

FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def fashion_mini(split: str = "train") -> ImageTensors:
    """The first 20,000 training or 2,000 test images of Fashion-MNIST, from inside the package."""
    check_split(split)
    folder = files("vqvae") / "assets" / "fashion-mini"
    # Memory is the images and one mosaic at a time.
    with (folder / f"{split}-order.npy").open("rb") as stream:
        order = np.load(stream, allow_pickle=False)
    with (folder / f"{split}-labels.npy").open("rb") as stream:
        labels = np.load(stream, allow_pickle=False)
    images = np.empty((len(order), 28, 28), np.uint8)
    for strip, start in enumerate(range(0, len(order), STRIP)):
        tiles = order[start : start + STRIP]
        with (folder / f"{split}-{strip:02}.webp").open("rb") as stream, Image.open(stream) as image:
            images[tiles] = _tiles(np.asarray(image))[: len(tiles)]
    levels = torch.from_numpy(images).unsqueeze(1)
    return _of(split, levels, torch.from_numpy(labels.astype(np.int64)), FASHION_CLASSES, "fashion-mini")


def _tiles(mosaic: np.ndarray) -> np.ndarray:
    return rearrange(mosaic, "(r w) (s h) c -> (r s c) h w", w=28, h=28)


def fashion_mnist(split: str = "train", *, root: str | Path | None = None) -> ImageTensors:
    """The whole Fashion-MNIST.

    root: a folder that holds the four idx files, packed (.gz) or not, directly or in
    FashionMNIST/raw as torchvision keeps them. Where it doesn't, and by default (in
    ~/.cache/vqvae-priors), torchvision downloads them there.
    Raises ValueError where they can't be downloaded, or are damaged.
    """
    check_split(split)
    folder = CACHE.expanduser() if root is None else Path(root)
    raw = folder / "FashionMNIST" / "raw"
    part = {"train": "train", "test": "t10k"}[split]
    names = (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte")
    found = [_find(folder, name) or _find(raw, name) for name in names]
    if None in found:
        # Here and not above: torchvision takes a second to import.
        from torchvision.datasets import FashionMNIST

        try:
            FashionMNIST(folder, download=True)
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"Fashion-MNIST is not in {folder} and could not be downloaded ({_line(error)}); "
                f"pass as root a folder that holds {names[0]}.gz, {names[1]}.gz and their like"
            ) from error
        found = [_find(raw, name) for name in names]
    images, labels = (read_idx(path) for path in found if path is not None)
    return _of(split, images.unsqueeze(1), labels.long(), FASHION_CLASSES, "fashion-mnist")


def cifar10(split: str = "train", *, root: str | Path | None = None) -> ImageTensors:
    """CIFAR-10, in its Python version.

    root: a folder that holds `cifar-10-batches-py`, or its files themselves, or the
    `cifar-10-python.tar.gz` that they come in. Where it doesn't, and by default (in
    ~/.cache/vqvae-priors), torchvision downloads them there. Its files are pickles, which can run
    code: torchvision opens them only after their checksums have proved them the published ones.
    Raises ValueError where they can't be downloaded, or are damaged.
    """
    check_split(split)
    # Here and not above: torchvision takes a second to import.
    from torchvision.datasets import CIFAR10

    class Bare(CIFAR10):
        base_folder = ""

    folder = CACHE.expanduser() if root is None else Path(root)
    try:
        if (folder / "data_batch_1").is_file():
            data = Bare(folder, train=split == "train")
        else:
            data = CIFAR10(folder, train=split == "train", download=True)
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"CIFAR-10 is not whole in {folder} and could not be downloaded ({_line(error)}); pass "
            "as root a folder that holds cifar-10-batches-py or cifar-10-python.tar.gz"
        ) from error
    images = rearrange(torch.from_numpy(data.data), "n h w c -> n c h w").contiguous()
    return _of(split, images, torch.tensor(data.targets), tuple(data.classes), "cifar10")


def _of(
    split: str | None, images: Tensor, labels: Tensor | None, class_names: tuple[str, ...] | None, name: str
) -> ImageTensors:
    found = ImageTensors(images, labels, class_names, name=name)
    found.split = split
    return found


def refitted(images: ImageTensors, size: tuple[int, int] | None, channels: int | None) -> ImageTensors:
    """`images` scaled and cropped to `size` (height, width), with `channels`; None leaves as it is."""
    old_channels, height, width = images.shape
    new_size = size or (height, width)
    new_channels = channels or old_channels
    if (new_channels, *new_size) == images.shape:
        return images
    fitted = torch.empty((len(images), new_channels, *new_size), dtype=torch.uint8)
    for old, new in zip(images.images, fitted, strict=True):
        pixels = old[0] if old_channels == 1 else rearrange(old, "c h w -> h w c")
        new.copy_(fit(Image.fromarray(pixels.numpy()), new_size, new_channels))
    return _of(images.split, fitted, images.labels, images.class_names, images.name)


def read_idx(path: str | Path) -> UInt8[Tensor, "..."]:
    """A tensor of bytes from a file in the idx format, gzipped where its name ends in .gz.

    The format: two zero bytes, 8 (for bytes), the number of axes, each length in four bytes from
    the highest, and the data. Raises ValueError for anything else.
    """
    path = Path(path)
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path} can't be read ({_line(error)}); expected an idx file") from error
    axes = data[3] if data[:3] == b"\0\0\x08" and len(data) > 3 else 0
    start = 4 + 4 * axes
    shape = [int.from_bytes(data[at : at + 4]) for at in range(4, start, 4)]
    if not axes or len(data) != start + math.prod(shape):
        raise ValueError(f"{path} holds {len(data)} bytes that are no idx file; expected a whole one")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=start).reshape(shape)


def _find(folder: Path, name: str) -> Path | None:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    return None


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
