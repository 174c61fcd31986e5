"""The images of a set as large as they are, those of equal size together.

    found = by_size(load_images("photos", channels=3), multiple=8)
    found.sets[192, 256][:4].images                             # uint8 (4, 3, 192, 256)

Sides are padded to a multiple by repeating the last row and column, so that images that differ by less go together.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from vqvae.data.images import MAX_SIDE, EncodedImages, Images, ImageTensors, reason

Size = tuple[int, int]
# How images of `by_size` come to their size, in words, for whoever reports figures of them.
PADDED = "as large as they are, padded by the last row and column"


@dataclass(frozen=True, kw_only=True)
class BySize:
    """The images of a set by size.

    sets: those of one padded size (height, width), by it, in the order of the whole set.
    unusable: (key, reason) of what is no image by its header.
    """

    sets: dict[Size, Images]
    unusable: tuple[tuple[str, str], ...]


def by_size(images: Images, *, multiple: int = 1, watch: Callable[[], object] | None = None) -> BySize:
    """The images of a set at their own sizes, upright, in the channels of the set. Sizes are read from headers.

    watch: called after each image. Raises OSError, with the image's key as its file name, where one can't be had.
    """
    if not isinstance(images, EncodedImages):
        _, height, width = images.shape
        found = images.read(range(len(images)))
        padded = torch.stack([_padded(image, _up((height, width), multiple)) for image in found.images])
        whole = ImageTensors(padded, found.labels, images.class_names, name=images.name)
        whole.split = images.split
        return BySize(sets={(padded.shape[2], padded.shape[3]): whole}, unusable=())
    places: dict[Size, list[int]] = {}
    unusable: list[tuple[str, str]] = []
    for index in range(len(images)):
        try:
            size = images.original_size(index)
            if max(size) > MAX_SIDE:
                raise ValueError(f"its sides of {size[0]}x{size[1]} are over {MAX_SIDE:,} pixels")
            places.setdefault(_up(size, multiple), []).append(index)
        except ValueError as error:
            unusable.append((images.key(index), reason(error)))
        except OSError as error:
            raise OSError(error.errno, reason(error), images.key(index)) from error
        if watch is not None:
            watch()
    sets: dict[Size, Images] = {size: _OneSize(images, np.array(places[size]), size) for size in sorted(places)}
    return BySize(sets=sets, unusable=tuple(unusable))


class _OneSize(EncodedImages):
    """Some images of a set that are of one size, once padded."""

    def __init__(self, images: EncodedImages, indices: np.ndarray, size: Size):
        self.images, self.indices = images, indices
        self.name, self.shape, self.split = images.name, (images.shape[0], *size), images.split
        self.num_classes, self.class_names, self.label_note = images.num_classes, images.class_names, images.label_note
        self.labels = None if images.labels is None else images.labels[torch.from_numpy(indices)]

    def __len__(self) -> int:
        return len(self.indices)

    def key(self, index: int) -> str:
        return self.images.key(self._at(index))

    def _at(self, index: int) -> int:
        return int(self.indices[range(len(self))[index]])

    def _encoded(self, index: int) -> Path | BytesIO:
        return self.images._encoded(self._at(index))

    def _stamps(self, indices: range, times: bool) -> Iterator[bytes]:
        for index in indices:
            at = self._at(index)
            yield from self.images._stamps(range(at, at + 1), times)

    def _fitted(self, index: int) -> UInt8[Tensor, "c h w"]:
        image = self.images.original(self._at(index))
        (_, height, width), (rows, columns) = self.shape, image.shape[1:]
        if rows > height or columns > width:
            raise ValueError(f"it has {rows}x{columns} pixels now, and had others when it was looked at")
        return _padded(image, (height, width))


def _up(size: Size, multiple: int) -> Size:
    return -(-size[0] // multiple) * multiple, -(-size[1] // multiple) * multiple


def _padded(image: UInt8[Tensor, "c h w"], size: Size) -> UInt8[Tensor, "c h2 w2"]:
    below, right = (padded - side for padded, side in zip(size, image.shape[1:], strict=True))
    return torch.from_numpy(np.pad(image.numpy(), ((0, 0), (0, below), (0, right)), mode="edge"))
