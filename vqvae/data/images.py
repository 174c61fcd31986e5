"""What every set of images is: a length, 8-bit images of one shape, and batches of them.

Images stay uint8, "c h w", from here to the model. A set in memory is `ImageTensors`; a set of
encoded images, decoded batch by batch, derives from `EncodedImages` (a folder, a table). An
encoded image that can't be read is left out of its batch and named in `Batch.skipped`.

There are two reasons for that: what is there is no image, or it can't be had at this moment (a disk
that fails, a folder that is not mounted, a link to nothing). Training goes on without either. What
is kept for good must not lack images for the second reason: `Images.read` raises it.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vqvae.data.augmentation import LARGE, Augment, Variation
from vqvae.data.batch import Batch, Item, places
from vqvae.data.cache import Cache
from vqvae.data.decoding import as_array, as_tensor, fit, picture, read, read_sized, size_of
from vqvae.data.labels import MAX_LABEL, Classes, Given

SPLITS = ("train", "test")

# Height and width, or of square images the side.
Size = int | Sequence[int]
# Pixels; a slip of the keyboard would fill the memory.
MAX_SIDE = 1 << 14
# Images that are tried for the first that can be read, which sets the default size and channels.
FIRST = 64


class Images(Dataset[Any], ABC):
    """A set of 8-bit images of one shape.

        images[0]                                               # (image,), or (image, label) where there are labels
        images[:8].images, images[[5, 3]].labels                # a `Batch`

    shape: (c, h, w) of every image.
    split: "train" or "test" of a source; None of a set that is neither.
    num_classes, class_names: None where the set has no labels, or labels without names.
    name: what to call the set in print.
    uses_workers: whether its images are made when they are asked for, so that processes that read ahead help.
    labels: int64, "n"; None where it has none, or has them elsewhere.
    label_note: why labels that are there are not used, in a sentence; "" where all that are there are used.
    """

    shape: tuple[int, int, int]
    split: str | None = None
    num_classes: int | None
    class_names: tuple[str, ...] | None
    name: str
    labels: Tensor | None = None
    label_note: str = ""
    uses_workers: bool = False

    @abstractmethod
    def __len__(self) -> int: ...

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice | Sequence[int] | np.ndarray | Tensor) -> Batch: ...

    def __getitem__(self, index: Any) -> Any:
        """One image with its label, (image, label), or (image,) where the set has none; or several as a `Batch`.

        index: a number, from the end where it is below 0; or a slice, or numbers in a list, an array or a tensor.
        Raises IndexError past the end, and ValueError where the one image can't be read, or for another index.
        """
        if isinstance(index, slice):
            try:
                return self.__getitems__(range(len(self))[index])
            except TypeError as error:
                raise ValueError(f"got the slice {index}; expected whole numbers in it") from error
        if isinstance(index, tuple):
            raise ValueError(f"got several indices, {len(index)}; expected one, or a list of them: images[[5, 3]]")
        found = places(index, len(self))
        return self.__getitems__(found) if found.ndim else self.__getitems__(found[None])[0]

    @abstractmethod
    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The images at `indices`, in that order, less those that can't be read."""

    def read(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """As `__getitems__`, but only what is no image is left out.

        Raises OSError, with the image's key as its file name, where one can't be had.
        """
        return self.__getitems__(indices)

    def varied(self, indices: Sequence[int] | np.ndarray, variation: Variation) -> Batch:
        """As `__getitems__`, with each image as it is shown in one epoch of training."""
        parts = []
        for index in places(indices, len(self)).tolist():
            part = self.__getitems__([index])
            images = [variation.shown(image, index) for image in part.images]  # one, or none that can be read
            parts.append(replace(part, images=torch.stack(images)) if images else part)
        return Batch.joined(parts)

    def cached(self, cache: Cache) -> "Images":
        """The same set, which keeps shrunk copies of large image files; itself where it reads none.

        What it gives stays the same to the bit. A cache is for one set: its entries go by the images' numbers.
        """
        return self

    def original_size(self, index: int) -> tuple[int, int]:
        """Height and width that image `index` has at its source, before it was scaled and cropped; by its header.

        Raises IndexError past the end, ValueError for what is no image, and OSError where it can't be had.
        """
        range(len(self))[index]
        return self.shape[1:]

    def original(self, index: int) -> UInt8[Tensor, "c h w"]:
        """Image `index` as large as it is at its source, upright and in the channels of the set. Raises as above."""
        return self[index][0]

    def key(self, index: int) -> str:
        """What the source calls image `index`, so that a person finds it again: a path, a row; else its number."""
        return str(range(len(self))[index])

    def digest(self, indices: range, *, times: bool = True) -> str:
        """32 hexadecimal digits that change where the set has other images or labels at `indices`.

        Where the source lies is no part of it. Of files the images are told by their names, sizes and times of change.
        times: False leaves the times out, so that files that were copied are the same, and a file that was changed and
        has kept its size is too. Raises OSError where it can't be found out.
        """
        digest = blake2b(repr((self.num_classes, self.class_names)).encode(), digest_size=16)
        if self.labels is not None:
            digest.update(
                self.labels[indices.start : indices.stop : indices.step].cpu().numpy().astype("<i8").tobytes()
            )
        for part in self._stamps(indices, times):
            digest.update(len(part).to_bytes(8))
            digest.update(part)
        return digest.hexdigest()

    def _stamps(self, indices: range, times: bool) -> Iterator[bytes]:
        """What tells the images at `indices` from others, cheaper than to decode them; here what they are called.

        times: with the times at which files were changed.
        """
        return (self.key(index).encode("utf-8", "surrogateescape") for index in indices)


class ImageTensors(Images):
    """Images held in memory: a batch is one fancy index.

        ImageTensors(torch.zeros(10, 3, 32, 32, dtype=torch.uint8)).shape     # (3, 32, 32)

    labels: int64, "n", from 0; or None. class_names: one for each label, or None.
    """

    def __init__(
        self,
        images: UInt8[Tensor, "n c h w"],
        labels: Int64[Tensor, " n"] | None = None,
        class_names: tuple[str, ...] | None = None,
        *,
        name: str = "images",
    ):
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) == 0:
            raise ValueError(
                f"got images of {images.dtype} with shape {tuple(images.shape)}; "
                'expected at least one, as uint8 "n c h w"'
            )
        if labels is not None and labels.shape != images.shape[:1]:
            raise ValueError(f"got {tuple(labels.shape)} labels for {len(images)} images; expected one an image")
        self.images, self.labels, self.name = images, labels, name
        self.shape = (images.shape[1], images.shape[2], images.shape[3])
        self.num_classes, self.class_names = _classes(labels, class_names)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> Batch:
        chosen = torch.from_numpy(places(indices, len(self)))
        return Batch(
            self.images.index_select(0, chosen),
            None if self.labels is None else self.labels.index_select(0, chosen),
        )

    def _stamps(self, indices: range, times: bool) -> Iterator[bytes]:
        yield self.images[indices.start : indices.stop : indices.step].cpu().numpy().tobytes()


class EncodedImages(Images):
    """Images kept as JPEG, PNG and the like, and decoded to one shape when asked for.

    A deriving class says where the encoded image is (`_encoded`), what to call it (`key`), and what tells it from
    others (`_stamps`).
    """

    uses_workers = True
    _cache: Cache | None = None

    def __init__(self, name: str, shape: tuple[int, int, int], classes: Classes, given: Given):
        """given: the labels of these images alone, which are used if those of the whole source, `classes`, are."""
        self.name, self.shape, self.labels = name, shape, classes.labels(given)
        self.num_classes, self.class_names, self.label_note = classes.num_classes, classes.class_names, classes.note

    @abstractmethod
    def _encoded(self, index: int) -> Path | BytesIO:
        """Where to read image `index` from; 0 <= index < len(self).

        Raises ValueError where there is none, and OSError with its number where it can't be had.
        """

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> Batch:
        return self._batch(indices)

    def read(self, indices: Sequence[int] | np.ndarray) -> Batch:
        return self._batch(indices, strict=True)

    def varied(self, indices: Sequence[int] | np.ndarray, variation: Variation) -> Batch:
        return self._batch(indices, variation=variation)

    def cached(self, cache: Cache) -> "Images":
        found = copy.copy(self)
        found._cache = cache
        return found

    def original_size(self, index: int) -> tuple[int, int]:
        return size_of(self._encoded(range(len(self))[index]))

    def original(self, index: int) -> UInt8[Tensor, "c h w"]:
        picture = read(self._encoded(range(len(self))[index]))
        return fit(picture, (picture.height, picture.width), self.shape[0])

    def _batch(
        self, indices: Sequence[int] | np.ndarray, strict: bool = False, variation: Variation | None = None
    ) -> Batch:
        images: list[Tensor] = []
        kept: list[int] = []
        skipped: list[tuple[str, str]] = []
        for index in places(indices, len(self)).tolist():
            image = self._decoded(index, variation)
            if strict and isinstance(image, OSError):
                raise OSError(image.errno, reason(image), self.key(index)) from image
            if isinstance(image, Exception):
                skipped.append((self.key(index), reason(image)))
            else:
                images.append(image)
                kept.append(index)
        stacked = torch.stack(images) if images else torch.empty((0, *self.shape)).byte()
        labels = None if self.labels is None else self.labels[torch.tensor(kept).long()]
        return Batch(stacked, labels, tuple(skipped))

    def _decoded(self, index: int, variation: Variation | None = None) -> Tensor | OSError | ValueError:
        """The image; or why it can't be had, which is an OSError, or is none."""
        try:
            if variation is None or not variation.augment.moves:
                image = self._fitted(index)
                return image if variation is None else variation.mirrored(image, index)
            channels, height, width = self.shape
            found = Image.fromarray(self._picture(index, variation.augment))
            return fit(found, (height, width), channels, variation.view(index, *found.size, (height, width)))
        except (OSError, ValueError) as error:
            return error

    def _fitted(self, index: int) -> UInt8[Tensor, "c h w"]:
        """The image as it comes out of the set."""
        channels, height, width = self.shape
        cover = max(height, width)

        def make() -> tuple[np.ndarray, bool]:
            found, sides = read_sized(self._encoded(index), lambda *_: float(cover))
            return as_array(fit(found, (height, width), channels)), cover / min(sides) <= LARGE

        return as_tensor(self._kept("fitted", index, repr(self.shape), make), channels)

    def _picture(self, index: int, augment: Augment) -> UInt8[np.ndarray, "..."]:
        """The whole picture, "h w" or "h w c", as crops are cut out of it."""
        channels, height, width = self.shape

        def scale(across: int, down: int) -> float:
            return augment.scale(across, down, (height, width))

        def make() -> tuple[np.ndarray, bool]:
            found, is_large = picture(self._encoded(index), scale, channels, LARGE)
            return np.array(found), is_large

        return self._kept("pictures", index, repr((self.shape, augment.to_plain())), make)

    def _kept(self, kind: str, index: int, about: str, make: Callable[[], tuple[np.ndarray, bool]]) -> np.ndarray:
        """Pixels out of the cache; or as they are made, and kept there if they come of a large image."""
        cache = self._cache
        if cache is None:
            return make()[0]
        digest = blake2b(f"{self.split} {about}".encode(), digest_size=16)
        for part in self._stamps(range(index, index + 1), times=True):
            digest.update(part)
        of = digest.digest()
        pixels = cache.get(kind, index, of)
        if pixels is None:
            pixels, is_large = make()
            if is_large:
                cache.put(kind, index, of, pixels)
        return pixels

    def check_readable(self) -> None:
        """Raise ValueError where not one image of the set can be read."""
        first = ""
        for index in range(len(self)):
            image = self._decoded(index)
            if not isinstance(image, Exception):
                return
            first = first or f"{self.key(index)}: {reason(image)}"
        raise ValueError(f"none of the {len(self)} images of {self.name} can be read ({first})")


def wanted(size: Size | None, channels: int | None) -> tuple[tuple[int, int] | None, int | None]:
    """(height, width) and channels that a caller asks for. None stands for what is still to be found out, and passes.

    Raises ValueError for what can be none: strings, floats, three sides, or sides of over `MAX_SIDE` pixels.
    """
    sides, number = _whole(size), _whole(channels)
    if size is not None and (sides is None or sides.shape not in ((), (2,))):
        raise ValueError(f"got size={size!r}; expected the side of the images in pixels, or their height and width")
    if channels is not None and (number is None or number.ndim):
        raise ValueError(f"got channels={channels!r}; expected 1 (grey) or 3 (RGB)")
    num = None if number is None else int(number)
    if num not in (None, 1, 3):
        raise ValueError(f"got channels={num}; expected 1 (grey) or 3 (RGB)")
    if sides is None:
        return None, num
    height, width = np.broadcast_to(sides, 2).tolist()
    if min(height, width) < 1:
        raise ValueError(f"got size={size!r}; expected at least 1 pixel")
    if max(height, width) > MAX_SIDE:
        raise ValueError(f"got size={size!r}; expected at most {MAX_SIDE:,} pixels")
    return (height, width), num


def shape_of(
    size: tuple[int, int] | None, channels: int | None, encoded: Iterable[Callable[[], Path | BytesIO]], name: str
) -> tuple[int, int, int]:
    """(c, h, w) as asked for; what is not (None) is that of the first encoded image that can be read.

    encoded: each gives an image, or raises as `EncodedImages._encoded` does. Raises ValueError where none can be read.
    """
    if size is not None and channels is not None:
        return channels, *size
    reason = "there is none"
    for each in encoded:
        try:
            found = read(each())
        except (OSError, ValueError) as error:
            reason = str(error)
            continue
        return channels or (1 if found.mode == "L" else 3), *(size or (found.height, found.width))
    raise ValueError(f"{name} has no readable image among its first {FIRST} ({reason})")


def _whole(value: Any) -> np.ndarray | None:
    """Whole numbers as an array; None for anything else."""
    if value is None:
        return None
    try:
        found = np.asarray(value.cpu() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError):
        return None
    return found if found.dtype.kind in "iu" else None


def check_split(split: str) -> None:
    """Raise ValueError unless `split` is one that sets have."""
    if split not in SPLITS:
        raise ValueError(f"got split={split!r}; expected one of {', '.join(map(repr, SPLITS))}")


def _classes(labels: Tensor | None, class_names: tuple[str, ...] | None) -> tuple[int | None, tuple[str, ...] | None]:
    if labels is None:
        return None, None
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, -1)
    known = min(high, MAX_LABEL) + 1 if class_names is None else len(class_names)
    if low < 0 or high >= known:
        raise ValueError(f"got labels from {low} to {high}; expected 0 to {known - 1}")
    return known, class_names


def reason(error: Exception) -> str:
    """What an error says, on one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__
