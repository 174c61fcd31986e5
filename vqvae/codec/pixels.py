"""What a caller has for an image, as a tensor: tensors, numpy arrays, and pictures of Pillow."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from vqvae.codec.tiles import MAX_CHANNELS

AnyImage = Tensor | np.ndarray | Image.Image
_EXPECTED = 'expected uint8 "c h w", or a picture of Pillow in mode L or RGB'


def as_images(images: Any) -> Iterator[UInt8[Tensor, "c h w"]]:
    """Image by image, on the CPU, with memory of its own where it was no tensor.

    Raises:
        ValueError: nothing to go through, or what is no image of 8 bits a channel, channels first.
    """
    if not isinstance(images, Image.Image | str | bytes):
        with contextlib.suppress(TypeError):
            return map(as_image, iter(images))
    raise ValueError(f"got {type(images).__name__}, expected a list of images, or an array of them")


def as_image(image: Any) -> UInt8[Tensor, "c h w"]:
    """One image. Errors as `as_images`."""
    if isinstance(image, Image.Image):
        if image.mode not in ("L", "RGB"):
            raise ValueError(f'got a picture of mode {image.mode}, {_EXPECTED}; image.convert("RGB") or "L" makes one')
        pixels = np.array(image)
        image = pixels[None] if image.mode == "L" else rearrange(pixels, "h w c -> c h w")
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        image = torch.from_numpy(image.copy())  # an array may be one that nobody may write to, or run backwards
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3:
        raise ValueError(_no_image(image))
    if image.shape[0] > MAX_CHANNELS and image.shape[-1] <= MAX_CHANNELS:
        raise ValueError(
            f"got an image of {image.shape[0]} channels, {tuple(image.shape)}, {_EXPECTED}; it has its channels last"
        )
    return image.cpu()


def _no_image(image: Any) -> str:
    if not isinstance(image, Tensor | np.ndarray):
        return f"got {type(image).__name__} for an image, {_EXPECTED}"
    how = ""
    if image.ndim == 2:
        how = "; image[None] gives a grey one its channel"
    elif "float" in str(image.dtype):
        how = "; (image * 255).round() makes levels of floats in [0, 1]"
    return f"got an image of {image.dtype} {tuple(image.shape)}, {_EXPECTED}{how}"
