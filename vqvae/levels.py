"""Images as people have them, made the uint8 levels that models work on.

    uint8 "b c h w"                 as they are: tensors, or arrays of numpy's
    floats "b c h w" in [0, 1]      times 255, rounded
    PIL images                      one, or a list of them; of mode "L" for greys and "RGB" for colour
    a list of tensors or arrays     "c h w" each

An axis that is missing, or that stands elsewhere, is not guessed: the error says what to write. Nor is a colour image
turned to grey, or one of another size scaled: what would be lost is for the caller to say.
"""

import sys
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from safefolder.arrays import from_numpy

# What Pillow calls an image of one channel, and of three.
MODES = {1: "L", 3: "RGB"}


@runtime_checkable
class PILImage(Protocol):
    """What this module knows of an image of Pillow's, which is not imported for it."""

    @property
    def mode(self) -> str: ...
    @property
    def size(self) -> tuple[int, int]: ...
    def convert(self, mode: str) -> Any: ...


Images = (
    UInt8[Tensor, "b c h w"] | Float[Tensor, "b c h w"] | UInt8[np.ndarray, "b c h w"] | Float[np.ndarray, "b c h w"]
    | PILImage | Sequence[Any]
)  # fmt: skip


def to_levels(
    images: Images, *, num_channels: int, size: int, device: torch.device | None = None
) -> UInt8[Tensor, "b c h w"]:
    """Check square images of so many channels and pixels a side, and give them as levels.

    Args:
        device: where those go that are no tensor yet, as levels.

    Raises:
        ValueError: another shape, type, mode or size, or floats outside [0, 1].
    """
    tensor = images if isinstance(images, Tensor) else _tensor(images, num_channels, size)
    expected = (num_channels, size, size)
    if tensor.ndim != 4 or tuple(tensor.shape[1:]) != expected:
        raise ValueError(
            f"expected images of shape (b, {', '.join(map(str, expected))}), got {tuple(tensor.shape)}"
            + _remedy(tuple(tensor.shape), expected, is_tensor=not isinstance(images, np.ndarray))
        )
    levels = _levels(tensor)
    return levels if isinstance(images, Tensor) else levels.to(device)


def _levels(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.uint8:
        return tensor
    if not tensor.is_floating_point():
        raise ValueError(f"expected images as uint8, or as floats in [0, 1], got {tensor.dtype}")
    if tensor.numel():
        low, high = tensor.aminmax()
        if not (low >= 0 and high <= 1):  # also False for NaN
            raise ValueError(
                f"float images must lie in [0, 1], got {float(low):.4g} to {float(high):.4g}; "
                "undo the normalisation, or pass uint8"
            )
    return (tensor.float() * 255).round().to(torch.uint8)


def _tensor(images: Any, num_channels: int, size: int) -> Tensor:
    if isinstance(images, np.ndarray):
        return _of_array(images)
    if _is_pil(images):
        return _of_pil(images, num_channels, size)[None]
    holds_images = hasattr(images, "images")  # a batch, which is a sequence too
    if isinstance(images, Sequence) and not holds_images and not isinstance(images, str | bytes):
        return _stacked(images, num_channels, size)
    inside = ": pass its images" if holds_images else ""
    raise ValueError(f"got images as {type(images).__name__}, expected a tensor, an array, or PIL images{inside}")


def _stacked(images: Sequence[Any], num_channels: int, size: int) -> Tensor:
    if not images:
        return torch.empty(0, num_channels, size, size, dtype=torch.uint8, device="cpu")
    found: list[Tensor] = []
    for image in images:
        if isinstance(image, Tensor):
            found.append(image)
        elif isinstance(image, np.ndarray):
            found.append(_of_array(image))
        elif _is_pil(image):
            found.append(_of_pil(image, num_channels, size))
        else:
            raise ValueError(
                f"got images as a list with {type(image).__name__}, expected tensors, arrays, or PIL images in it"
            )
    first = found[0]
    for other in found:
        if other.shape != first.shape or other.dtype != first.dtype:
            raise ValueError(
                f"got images of {first.dtype} {tuple(first.shape)} and {other.dtype} {tuple(other.shape)} in one list, "
                f"expected all of one type and of shape ({num_channels}, {size}, {size})"
            )
    return torch.stack([each.to(first.device) for each in found])


def _is_pil(image: Any) -> bool:
    """Whether it is one of Pillow's, which then was imported by whoever made it."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(image, pillow.Image)


def _of_pil(image: Any, num_channels: int, size: int) -> Tensor:
    mode = MODES.get(num_channels)
    if image.mode != mode:
        raise ValueError(
            f"got a PIL image of mode {image.mode!r}, expected {mode!r} for a model of {num_channels} "
            f"channel{'s' if num_channels > 1 else ''}: image.convert({mode!r})"
        )
    if image.size != (size, size):
        raise ValueError(
            f"got a PIL image of {image.size[0]} x {image.size[1]} pixels, expected {size} x {size}: "
            f"image.resize(({size}, {size})), or PIL.ImageOps.fit(image, ({size}, {size})) to keep its proportions"
        )
    pixels = from_numpy(np.asarray(image))
    return pixels[None] if num_channels == 1 else pixels.permute(2, 0, 1)


def _of_array(array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "biuf":
        raise ValueError(f"expected images as uint8, or as floats in [0, 1], got {array.dtype}")
    return from_numpy(array)


def _remedy(shape: tuple[int, ...], expected: tuple[int, int, int], *, is_tensor: bool) -> str:
    """What to write for images whose axes are others."""
    channels, *sides = expected
    last = (*sides, channels)
    permute = "permute" if is_tensor else "transpose"
    if shape == expected:
        return "; one image needs an axis of the batch: images[None]"
    if len(shape) == 4 and shape[1:] == last:
        return f"; channels come before rows and columns: images.{permute}(0, 3, 1, 2)"
    if shape == last:
        return f"; one image needs an axis of the batch, and channels come first: images.{permute}(2, 0, 1)[None]"
    if channels == 1 and shape == tuple(sides):
        return "; one image needs axes of the batch and of the channel: images[None, None]"
    if channels == 1 and shape[1:] == tuple(sides):
        return "; greys have an axis of one channel too: images[:, None]"
    return ""
