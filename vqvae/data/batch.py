"""Images with what belongs to them: a batch, which is a sequence of its items."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

# An image and its label, as an int; the image alone where there are no labels.
Item = tuple[UInt8[Tensor, "c h w"], int] | tuple[UInt8[Tensor, "c h w"]]

# Images that are named of a batch in which none can be read.
_NAMED = 3


@dataclass(frozen=True, eq=False)
class Batch(Sequence[Item]):
    """Images with what belongs to them.

        batch = load_images("fashion-mini")[:8]
        batch.images.shape, batch.labels.shape, len(batch)      # (8, 1, 28, 28), (8,), 8
        image, label = batch[0]
        DataLoader(load_images("fashion-mini"), batch_size=8)   # torch's own collate function takes batches too

    As a sequence it is of the items (image, label), or (image,) where the set has no labels, that could be read. Going
    through it warns of each that could not, as nothing of `skipped` is in the items; to ask a batch in which none could
    be read for an item is a ValueError that names them.

    images: uint8, "b c h w".
    labels: int64, "b"; None where the set has no labels.
    skipped: (name, reason) of each image that should have been here and could not be read.
    """

    images: UInt8[Tensor, "b c h w"]
    labels: Int64[Tensor, " b"] | None
    skipped: tuple[tuple[str, str], ...] = ()

    @classmethod
    def joined(cls, batches: "Sequence[Batch]") -> "Batch":
        """One after another, of one set; at least one."""
        labels = [each.labels for each in batches if each.labels is not None]
        return cls(
            torch.cat([each.images for each in batches]),
            torch.cat(labels) if labels else None,
            tuple(skipped for each in batches for skipped in each.skipped),
        )

    def __len__(self) -> int:
        return len(self.images)

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> "Batch": ...

    def __getitem__(self, index: Any) -> Any:
        """An item, or a batch of some of them, with all of `skipped`."""
        if isinstance(index, slice):
            chosen = torch.tensor(range(len(self))[index], dtype=torch.int64)
            return Batch(self.images[chosen], None if self.labels is None else self.labels[chosen], self.skipped)
        if self.skipped and not len(self.images):
            raise ValueError(_none_read(self.skipped))
        index = range(len(self))[index]
        image = self.images[index]
        return (image,) if self.labels is None else (image, int(self.labels[index]))

    def __iter__(self) -> Iterator[Item]:
        for name, reason in self.skipped:
            # From here, not from the caller's line: collating goes through a batch twice, and once is enough.
            warnings.warn(f"{name} is left out, as it can't be read as an image: {reason}", stacklevel=1)
        return map(self.__getitem__, range(len(self)))

    def pin_memory(self) -> "Batch":
        """The same in page-locked memory, as a DataLoader asks for it."""
        return Batch(self.images.pin_memory(), None if self.labels is None else self.labels.pin_memory(), self.skipped)


def _none_read(skipped: tuple[tuple[str, str], ...]) -> str:
    if len(skipped) == 1:
        (name, reason), *_ = skipped
        return f"{name} can't be read as an image: {reason}"
    named = "; ".join(f"{name}: {reason}" for name, reason in skipped[:_NAMED])
    more = f"; and {len(skipped) - _NAMED:,} more" if len(skipped) > _NAMED else ""
    return f"none of the {len(skipped):,} images of this batch can be read ({named}{more})"


def places(indices: Any, num: int) -> np.ndarray:
    """Places in a set of `num` images as int64, from 0, of whatever numbers them: a sequence, an array, a tensor.

    Places below 0 count from the end. Raises IndexError beyond the set, and ValueError for what are no whole numbers.
    """
    if isinstance(indices, Tensor):
        indices = indices.detach().cpu().numpy()
    try:
        found = np.asarray(indices)
    except (TypeError, ValueError):
        found = np.asarray("")
    if found.shape == (0,):
        return np.empty(0, np.int64)  # of no numbers, whatever their type
    if found.ndim > 1 or found.dtype.kind not in "iu":
        kind = f"{found.dtype} {found.shape}" if isinstance(indices, np.ndarray) else type(indices).__name__
        hint = "; of a mask, take mask.nonzero()[0]" if found.dtype == bool and found.ndim == 1 else ""
        raise ValueError(
            f"got {kind} to choose images by; expected a whole number, a slice, or whole numbers in a list, an array "
            f"or a tensor of one axis{hint}"
        )
    outside = (found < -num) | (found >= num)
    if outside.any():
        raise IndexError(f"got image {found[outside].flat[0]} of a set of {num:,}")
    found = found.astype(np.int64)
    return np.where(found < 0, found + num, found)
