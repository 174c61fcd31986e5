"""Images and a tokenizer that tell who worked on them; for tests of tokenizing on Ray.

Ray's processes import this module by its name, as they do the library.
"""

import collections
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vqvae import VQVAE
from vqvae.data import Batch
from vqvae.data.folder import ImageFiles


class WatchedFiles(ImageFiles):
    """Images that take a while, and leave a file named by the process that read them and by which they were."""

    watched: Path
    seconds: float

    @classmethod
    def of(cls, images: ImageFiles, watched: Path, seconds: float = 0.0, **changed: Any) -> "WatchedFiles":
        found = cls.__new__(cls)
        found.__dict__.update(images.__dict__, watched=watched, seconds=seconds, **changed)
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
    """A tokenizer that leaves a file named by its process for each batch, and is slow.

    Where it leaves its files, and how slow it is, are options, as those are what travels.
    """

    def __init__(self, *, watched: str, seconds: float, **options: Any):
        super().__init__(**options)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        (Path(self.config.watched) / f"encoded.{os.getpid()}.{time.monotonic_ns()}").touch()
        time.sleep(self.config.seconds)
        return super().encode(images)


def watched_by(folder: Path, what: str) -> collections.Counter[int]:
    """How many files each process left."""
    return collections.Counter(int(path.name.split(".")[1]) for path in folder.glob(f"{what}.*"))
