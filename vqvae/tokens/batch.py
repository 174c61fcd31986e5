"""`CodeBatch`: codes with their labels, as one thing and as a sequence of rows."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

# A row: its codes "*grid", and its label where the set has labels. A row without is still a tuple, as it is of torch's
# `TensorDataset`, since torch's default collate takes no None.
Row = tuple[Tensor] | tuple[Tensor, int]


@dataclass(frozen=True, eq=False)
class CodeBatch(Sequence[Row]):
    """Codes with what belongs to them; also a sequence of rows, which `torch.utils.data.default_collate` takes.

        batch.codes.shape, batch[0], len(batch)                 # (b, *grid), (codes, label), b
        batch[:8], batch[[5, 3]]                                # a `CodeBatch` each

    Attributes:
        codes: int64, "b *grid".
        labels: int64, "b"; None where the set has no labels.
    """

    codes: Int64[Tensor, "b *grid"]
    labels: Int64[Tensor, " b"] | None

    def __len__(self) -> int:
        return len(self.codes)

    @overload
    def __getitem__(self, index: int) -> Row: ...  # pyrefly: ignore
    @overload
    def __getitem__(self, index: slice) -> "CodeBatch": ...  # pyrefly: ignore
    def __getitem__(self, index: Any) -> Any:
        """One row; of a slice, or of a list, an array or a tensor of indices, a batch of them."""
        if isinstance(index, slice):
            rows = range(len(self))[index]
            chosen: Any = slice(rows.start, rows.stop, rows.step) if rows.step > 0 else torch.tensor(rows)
        elif is_one(index):
            row = range(len(self))[operator.index(index)]
            return (self.codes[row],) if self.labels is None else (self.codes[row], int(self.labels[row]))
        else:
            chosen = torch.from_numpy(as_indices(index))
        return CodeBatch(self.codes[chosen], None if self.labels is None else self.labels[chosen])

    def to(self, *args: Any, **options: Any) -> "CodeBatch":
        """As `Tensor.to`, of both."""
        return CodeBatch(
            self.codes.to(*args, **options), None if self.labels is None else self.labels.to(*args, **options)
        )

    def pin_memory(self) -> "CodeBatch":
        """What a DataLoader with `pin_memory` asks for."""
        return CodeBatch(self.codes.pin_memory(), None if self.labels is None else self.labels.pin_memory())


def is_one(index: Any) -> bool:
    """Whether it is the index of one row, and not several of them."""
    return isinstance(index, int | np.integer) or (isinstance(index, Tensor | np.ndarray) and index.ndim == 0)


def as_indices(indices: Any) -> np.ndarray:
    """Indices as int64 "n".

    Raises:
        ValueError: they are no whole numbers, as booleans are none.
    """
    try:
        chosen = np.asarray(indices)
    except (TypeError, ValueError):
        chosen = np.asarray("")
    if chosen.shape == (0,):
        return np.empty(0, np.int64)  # of no numbers, whatever their type
    if chosen.ndim != 1 or chosen.dtype.kind not in "iu":
        hint = "; of a mask, take mask.nonzero()[0]" if chosen.dtype == bool else ""
        raise ValueError(
            f"got {type(indices).__name__} to choose rows by; expected a whole number, a slice, or whole numbers in a "
            f"list, an array or a tensor of one axis{hint}"
        )
    return chosen.astype(np.int64, copy=False)
