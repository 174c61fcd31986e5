"""Images as people have them, made the uint8 levels that models work on.

    uint8 "b c h w"                 as they are: tensors, or arrays of numpy's
    floats "b c h w" in [0, 1]      times 255, rounded
    PIL images                      one, or a list of them; of mode "L" for greys and "RGB" for colour
    a list of tensors or arrays     "c h w" each

An axis that is missing, or that stands elsewhere, is not guessed: the error says what to write. Nor is a colour image
turned to grey, or one scaled or cropped whose sides no model takes: what would be lost is for the caller to say. What
`padded` adds at the lower and right borders is for the caller to crop again.
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


def height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """The sides of an image of this `image_size`: of a square one it is one number."""
    return (size, size) if isinstance(size, int) else size


def times(size: int | tuple[int, int]) -> str:
    """An `image_size` as people write it: 64x64."""
    return "x".join(map(str, height_and_width(size)))


def to_levels(
    images: Images, *, num_channels: int, size: tuple[int, int], factor: int = 1, device: torch.device | None = None
) -> UInt8[Tensor, "b c h w"]:
    """Check images of so many channels, and give them as levels.

    Args:
        size: height and width that a message names; those of no images at all.
        factor: what divides height and width.
        device: where those go that are no tensor yet, as levels.

    Raises:
        ValueError: another shape, type or mode, sides that the factor does not divide, or floats outside [0, 1].
    """
    tensor = images if isinstance(images, Tensor) else _tensor(images, num_channels, size)
    if tensor.ndim != 4 or tensor.shape[1] != num_channels:
        raise ValueError(
            f"expected images of shape (b, {num_channels}, h, w), such as (b, {num_channels}, {size[0]}, {size[1]}), "
            f"got {tuple(tensor.shape)}"
            + _remedy(tuple(tensor.shape), num_channels, is_tensor=not isinstance(images, np.ndarray))
        )
    height, width = tensor.shape[2:]
    if height < 1 or width < 1 or height % factor or width % factor:
        raise ValueError(
            f"expected images whose height and width are multiples of {factor}, such as {times(size)}, got "
            f"{height}x{width}: scale or crop them, or give pad=True to encode or reconstruct"
        )
    levels = _levels(tensor)
    return levels if isinstance(images, Tensor) else levels.to(device)


def padded(levels: UInt8[Tensor, "b c h w"], factor: int) -> UInt8[Tensor, "b c h2 w2"]:
    """The images with their last row and column repeated until the factor divides height and width."""
    height, width = levels.shape[2:]
    below, right = -height % factor, -width % factor
    if not below and not right:
        return levels
    levels = torch.cat([levels, levels[:, :, -1:].expand(-1, -1, below, -1)], 2)
    return torch.cat([levels, levels[..., -1:].expand(-1, -1, -1, right)], 3)


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


def _tensor(images: Any, num_channels: int, size: tuple[int, int]) -> Tensor:
    if isinstance(images, np.ndarray):
        return _of_array(images)
    if _is_pil(images):
        return _of_pil(images, num_channels)[None]
    holds_images = hasattr(images, "images")  # a batch, which is a sequence too
    if isinstance(images, Sequence) and not holds_images and not isinstance(images, str | bytes):
        return _stacked(images, num_channels, size)
    inside = ": pass its images" if holds_images else ""
    raise ValueError(f"got images as {type(images).__name__}, expected a tensor, an array, or PIL images{inside}")


def _stacked(images: Sequence[Any], num_channels: int, size: tuple[int, int]) -> Tensor:
    if not images:
        return torch.empty(0, num_channels, *size, dtype=torch.uint8, device="cpu")
    found: list[Tensor] = []
    for image in images:
        if isinstance(image, Tensor):
            found.append(image)
        elif isinstance(image, np.ndarray):
            found.append(_of_array(image))
        elif _is_pil(image):
            found.append(_of_pil(image, num_channels))
        else:
            raise ValueError(
                f"got images as a list with {type(image).__name__}, expected tensors, arrays, or PIL images in it"
            )
    first = found[0]
    for other in found:
        if other.shape != first.shape or other.dtype != first.dtype:
            raise ValueError(
                f"got images of {first.dtype} {tuple(first.shape)} and {other.dtype} {tuple(other.shape)} in one list, "
                f"expected all of one type and of one shape, such as ({num_channels}, {size[0]}, {size[1]})"
            )
    return torch.stack([each.to(first.device) for each in found])


def _is_pil(image: Any) -> bool:
    """Whether it is one of Pillow's, which then was imported by whoever made it."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(image, pillow.Image)


def _of_pil(image: Any, num_channels: int) -> Tensor:
    mode = MODES.get(num_channels)
    if image.mode != mode:
        raise ValueError(
            f"got a PIL image of mode {image.mode!r}, expected {mode!r} for a model of {num_channels} "
            f"channel{'s' if num_channels > 1 else ''}: image.convert({mode!r})"
        )
    pixels = from_numpy(np.asarray(image))
    return pixels[None] if num_channels == 1 else pixels.permute(2, 0, 1)


def _of_array(array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "biuf":
        raise ValueError(f"expected images as uint8, or as floats in [0, 1], got {array.dtype}")
    return from_numpy(array)


def _remedy(shape: tuple[int, ...], channels: int, *, is_tensor: bool) -> str:
    """What to write for images whose axes are others."""
    permute = "permute" if is_tensor else "transpose"
    if len(shape) == 3 and shape[0] == channels:
        return "; one image needs an axis of the batch: images[None]"
    if len(shape) == 4 and shape[3] == channels:
        return f"; channels come before rows and columns: images.{permute}(0, 3, 1, 2)"
    if len(shape) == 3 and shape[2] == channels:
        return f"; one image needs an axis of the batch, and channels come first: images.{permute}(2, 0, 1)[None]"
    if channels == 1 and len(shape) == 2:
        return "; one image needs axes of the batch and of the channel: images[None, None]"
    if channels == 1 and len(shape) == 3:
        return "; greys have an axis of one channel too: images[:, None]"
    return ""
