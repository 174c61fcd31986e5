"""What a prior over grids of codes and one over grids of vectors share.

A grid has `math.prod(grid)` positions, taken in raster order (row-major, the last axis fastest). Its model knows where
it lives, which labels it takes, and how to be saved and loaded; what stands at a position is its subclasses' affair.
"""

import json
import math
import numbers
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from priors.sampling import check_range
from safefolder import SavedModel, arrays
from safefolder.arrays import Labels
from safefolder.configured import ConfiguredOptions
from safefolder.options import Given

# That of images of 16,384 x 16,384 pixels at 8 to a code. Some models hold numbers of each position.
MAX_POSITIONS = 1 << 22


_DIGESTS = re.compile("[0-9a-f]{64} ([0-9a-f]{32}|None)")


class TrainedOn(NamedTuple):
    """What a model over latents was trained on, by hexadecimal digests, so that it is not taken for another's.

    Attributes:
        tokenizer: of the tokenizer whose latents they were (`vqvae.fingerprint.of_tokenizer`).
        images: of the images that it encoded (`vqvae.data.Images.digest`); None where there were none at hand.
    """

    tokenizer: str
    images: str | None

    @classmethod
    def from_plain(cls, plain: Any) -> "TrainedOn | None":
        """What a config.json says. ValueError for anything but what `save_pretrained` writes."""
        if plain is None:
            return None
        fields = plain if isinstance(plain, dict) else {}
        tokenizer, images = fields.get("tokenizer"), fields.get("images")
        if (
            not isinstance(tokenizer, str)
            or not isinstance(images, str | None)
            or not _DIGESTS.fullmatch(f"{tokenizer} {images}")
        ):
            raise ValueError(f"got trained_on {str(plain)[:100]}, expected digests of a tokenizer and of images")
        return cls(tokenizer, images)


# Bytes of the names of classes in a config.json, of which 2^20 are read.
_MOST_NAMES = 1 << 18


def _readable(name: str) -> str:
    """A name as JSON can hold it: bytes of a file's name that are no UTF-8 become a mark."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class GridModel(SavedModel):
    """A distribution over grids, of codes (`Prior`) or of vectors (`ContinuousPrior`).

    Args:
        grid: sizes of the grid, any number of axes, e.g. (7, 7) or (7, 7, 2).
        num_classes: number of labels; None for a model without labels.

    Attributes: `grid`, e.g. (7, 7); `num_classes`, None for an unconditional model; `trained_on`, on what, and
    `class_names`, what its classes are called, where that is known: `vqvae train` sets both, and they are saved beside
    the weights.
    """

    class Config(ConfiguredOptions):
        """Abstract: the sizes of one kind of model of grids, as plain data."""

    run_part = "prior"
    card_name = "prior"
    summary = "A prior over the latents of an image tokenizer: it samples them, and says how probable they are."
    _noted = ("trained_on", "class_names")

    @classmethod
    def check_options(cls, options: ConfiguredOptions) -> None:
        options.put(grid=check_grid(options.grid))
        if getattr(options, "num_classes", None) is not None:
            check_size(options.num_classes, "num_classes")

    def __init__(self, *, grid: Given[Sequence[int]] = (7, 7), num_classes: Given[int | None] = None):
        super().__init__()
        self.grid = tuple(grid)
        self.num_classes = num_classes
        self.trained_on: TrainedOn | None = None
        self.class_names: tuple[str, ...] | None = None
        # Says where the model lives and how precise it is, also for one that has no weights.
        self.register_buffer("_anchor", torch.zeros(1), persistent=False)

    @property
    def num_positions(self) -> int:
        """Positions of the grid, i.e. codes or vectors an image."""
        return math.prod(self.grid)

    @property
    def device(self) -> torch.device:
        """The device that the model lives on."""
        return self._anchor.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of its log-probabilities: float32, or float64 after `.double()`."""
        return torch.promote_types(self._anchor.dtype, torch.float32)

    @abstractmethod
    def _log_prob(self, values: Tensor, labels: Tensor | None, /) -> Tensor:
        """Nats "b" of what stands on grids, checked and flattened, "b n" or "b n d", and labels "b"."""

    def card_tags(self) -> list[str]:
        return ["prior", "image-generation", "likelihood"]

    def card_facts(self) -> dict[str, object]:
        classes = "none" if self.num_classes is None else f"{self.num_classes:,}"
        return {**super().card_facts(), "classes": classes}

    def usage_lines(self) -> list[str]:
        return ["latents = prior.sample(4)", "nats = -prior.log_prob(latents)  # of each image"]

    def _notes(self) -> dict[str, Any]:
        notes: dict[str, Any] = {} if self.trained_on is None else {"trained_on": self.trained_on._asdict()}
        names = [] if self.class_names is None else list(map(_readable, self.class_names))
        # So many that a config would be refused when it is read are not kept.
        return {**notes, "class_names": names} if names and len(json.dumps(names)) <= _MOST_NAMES else notes

    def _read_notes(self, notes: Mapping[str, Any]) -> None:
        self.trained_on = TrainedOn.from_plain(notes.get("trained_on"))
        names = notes.get("class_names")
        is_list = isinstance(names, list) and all(isinstance(each, str) for each in names)
        if names is not None and not (is_list and len(names) == self.num_classes):
            raise ValueError(
                f"got class_names {str(names)[:100]}, expected names of {self.num_classes} classes, or none"
            )
        self.class_names = None if names is None else tuple(names)

    def _check_num(self, num: int) -> int:
        """How many grids to sample."""
        if not isinstance(num, numbers.Integral) or isinstance(num, bool) or num < 0:
            raise ValueError(f"got num={num!r}, expected an integer >= 0")
        return int(num)

    def _check_labels(self, labels: Labels | None, num: int) -> Tensor | None:
        """Labels "b" as int64, `num_classes` for "no label"; None for a model without classes. One label is all's."""
        if labels is None:
            return None if self.num_classes is None else torch.tensor(self.num_classes, device=self.device).expand(num)
        if self.num_classes is None:
            raise ValueError("got labels, expected none: this prior was made without num_classes")
        found = arrays.labels_for(labels, num, self.device).to(self.device)
        # One for all is looked at once, however many grids there are.
        check_range(found if any(found.stride()) else found[:1], self.num_classes, "labels")
        return found


def check_size(size: int, name: str) -> int:
    """The size as Python's integer; ValueError unless it is one >= 1."""
    if not isinstance(size, numbers.Integral) or isinstance(size, bool) or size < 1:
        raise ValueError(f"got {name}={size!r}, expected an integer >= 1")
    return int(size)


def check_grid(grid: Sequence[int]) -> tuple[int, ...]:
    """The grid as a tuple; ValueError unless it has one axis or more, each >= 1, and at most `MAX_POSITIONS` in all."""
    sizes = grid.tolist() if isinstance(grid, np.ndarray) else grid
    if isinstance(sizes, str) or not isinstance(sizes, Sequence) or len(sizes) == 0:
        raise ValueError(f"got grid={grid!r}, expected its sizes, e.g. (7, 7)")
    checked = tuple(check_size(size, "a grid size") for size in sizes)
    if math.prod(checked) > MAX_POSITIONS:
        raise ValueError(f"got a grid of {math.prod(checked):,} positions, expected at most {MAX_POSITIONS:,}")
    return checked
