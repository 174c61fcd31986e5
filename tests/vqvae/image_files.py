"""Random pixels, saved as image files, and as the tensors expected of them."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

RNG = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    """Random levels; the generator starts anew with each test, see conftest.py."""
    return RNG.integers(0, 256, shape, np.uint8)


def save(path: Path, pixels: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def chw(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1).copy())
