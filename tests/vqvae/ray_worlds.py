"""A folder of images, a small tokenizer, and images that tell who read them; for tests of tokenizing on Ray.

Ray's processes import this module by its name, as they do the library.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from image_files import noise, save

from vqvae import VQVAE
from vqvae.data import Batch
from vqvae.data.folder import ImageFiles, image_folder
from vqvae.quantizers import VectorQuantizer

NUM_IMAGES = 203
BROKEN = (0, 70, 202)


def tokenizer(seed: int = 0) -> VQVAE:
    torch.manual_seed(seed)
    quantizer = VectorQuantizer.Config(num_codes=64, dim=8)
    return VQVAE(image_size=16, num_channels=3, width=16, num_blocks=1, quantizer=quantizer)


def photos(folder: Path) -> ImageFiles:
    """Two classes of files, three of which cannot be read; one more file for test."""
    for index in range(NUM_IMAGES):
        path = folder / "train" / ("even" if index < 100 else "odd") / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, noise(16, 16, 3))
        if index in BROKEN:
            path.write_bytes(path.read_bytes()[:100])
    save(folder / "test" / "even" / "0.png", noise(16, 16, 3))
    return image_folder(folder, split="train", size=16, channels=3)


class WatchedFiles(ImageFiles):
    """Images that take a while, and leave a file named by the process that read them and by which they were."""

    watched: Path
    seconds: float

    @classmethod
    def of(cls, images: ImageFiles, watched: Path, seconds: float) -> "WatchedFiles":
        found = cls.__new__(cls)
        found.__dict__.update(images.__dict__, watched=watched, seconds=seconds)
        return found

    def copy(self) -> "WatchedFiles":
        """What a node opens for itself."""
        return WatchedFiles.of(self, self.watched, self.seconds)

    def read(self, indices: Sequence[int] | np.ndarray) -> Batch:
        for index in indices:
            (self.watched / f"read.{os.getpid()}.{index}").touch()
        time.sleep(self.seconds)
        return super().read(indices)


class WatchedTokenizer(VQVAE):
    """A tokenizer that leaves a file named by its process for each batch, and may be slow.

    Where it leaves its files, and how slow it is, are options, as those are what travels.
    """

    def __init__(self, *, watched: str, seconds: float, **options: Any):
        super().__init__(**options)

    @classmethod
    def of(cls, watched: Path, seconds: float) -> "WatchedTokenizer":
        torch.manual_seed(0)
        return cls(**vars(tokenizer().config), watched=str(watched), seconds=seconds)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        (Path(self.config.watched) / f"encoded.{os.getpid()}.{time.monotonic_ns()}").touch()
        time.sleep(self.config.seconds)
        return super().encode(images)


def watched_by(folder: Path, what: str) -> dict[int, int]:
    """How many files each process left."""
    found: dict[int, int] = {}
    for path in folder.glob(f"{what}.*"):
        pid = int(path.name.split(".")[1])
        found[pid] = found.get(pid, 0) + 1
    return found
