"""What a prior over grids of codes and one over grids of vectors share.

A grid has `math.prod(grid)` places, taken in raster order (row-major, the last axis fastest). Its model knows where it
lives, which labels it takes, and how to be saved and loaded; what stands at a place is its subclasses' affair.
"""

import inspect
import math
import numbers
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, Unpack

import numpy as np
import torch
from torch import Tensor, nn

import safefolder
from priors.sampling import check_range
from safefolder import arrays
from safefolder.arrays import Labels

AnyModel = TypeVar("AnyModel", bound="GridModel")
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


class GridModel(nn.Module, ABC):
    """A distribution over grids, of codes (`Prior`) or of vectors (`ContinuousPrior`).

    Attributes: `grid`, e.g. (7, 7); `num_classes`, None for an unconditional model; `trained_on`, on what, where that
    is known: `train.py` sets it, and it is saved beside the weights.
    """

    def __init__(self, *, grid: Sequence[int], num_classes: int | None = None):
        super().__init__()
        self.grid = check_grid(grid)
        self.num_classes = None if num_classes is None else check_size(num_classes, "num_classes")
        self.trained_on: TrainedOn | None = None
        # Says where the model lives and how precise it is, also for one that has no weights.
        self.register_buffer("_anchor", torch.zeros(1), persistent=False)

    @abstractmethod
    def config_fields(self) -> dict[str, Any]:
        """What config.json needs, as JSON values, to build this model anew."""

    @classmethod
    @abstractmethod
    def _from_config_fields(cls: type[AnyModel], fields: dict[str, Any]) -> AnyModel:
        """The model that `config_fields` describes, with fresh weights."""

    def check_loaded(self) -> None:
        """ValueError where tensors of the right shapes, read from a file, are none that this model could have saved."""

    @property
    def num_places(self) -> int:
        """Places of the grid, i.e. codes or vectors an image."""
        return math.prod(self.grid)

    @property
    def device(self) -> torch.device:
        """The device that the model lives on."""
        return self._anchor.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of its log-probabilities: float32, or float64 after `.double()`."""
        return torch.promote_types(self._anchor.dtype, torch.float32)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode inside; after it every submodule is in the mode that it was in. Not for several threads."""
        training = [part for part in self.modules() if part.training]
        try:
            for part in training:
                part.training = False
            yield
        finally:
            for part in training:
                part.training = True

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors; an earlier model is replaced whole, and anything else refused."""
        config = {"class": type(self).__name__, "format": 1, **self.config_fields()}
        if self.trained_on is not None:
            config["trained_on"] = self.trained_on._asdict()
        safefolder.save(Path(folder), config, dict(self.state_dict()))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        figures: Mapping[str, Any] | None = None,
    ) -> str:
        """Put the model and its card on the hub, in one commit, and say where; see `safefolder.push`."""
        return safefolder.push_pretrained(
            self, repo_id, private=private, revision=revision, token=token, figures=figures
        )

    def card_facts(self) -> dict[str, object]:
        """What a model card says that it is made of."""
        classes = "none" if self.num_classes is None else f"{self.num_classes:,}"
        return {**safefolder.model_facts(self), "classes": classes}

    def model_card(
        self, figures: Mapping[str, Any] | None = None, *, source: str = "owner/name", revision: str | None = None
    ) -> str:
        """The README.md of the model on the hub at `source`, with figures where some were measured, as in elbo.json."""
        kind = type(self)
        usage = safefolder.python(
            safefolder.import_line(kind),
            "",
            f"prior = {safefolder.loading(kind, source, revision=revision)}",
            "latents = prior.sample(4)",
            "nats = -prior.log_prob(latents)  # of each image",
        )
        return safefolder.card(
            title=source.rpartition("/")[2],
            summary="A prior over the latents of an image tokenizer: it draws them, and says how probable they are.",
            facts=self.card_facts(),
            usage=usage,
            tags=["prior", "image-generation", "likelihood"],
            figures=figures,
        )

    @classmethod
    def from_pretrained(cls: type[AnyModel], folder: str | Path, **hub: Unpack[safefolder.HubOptions]) -> AnyModel:
        """Load a model from its folder, from that of a run, or from a hub id: `cls` or a subclass, whichever was saved.

        It comes in evaluation mode, on the CPU, with the type of weights that was saved; nothing else that the caller
        has set plays a part. `hub` says which revision, which folder inside, and how it is fetched:
        `safefolder.HubOptions`.
        Raises ValueError where there is no such model, or its weights do not fit its config.
        """
        config, tensors = safefolder.load(folder, part="prior", **hub)
        kind = _concrete_class(cls, config["class"], folder)
        fields = {name: config[name] for name in config if name not in ("class", "format", "trained_on")}
        model = safefolder.build(lambda: kind._from_config_fields(fields), kind.__name__, tensors, folder)
        try:
            model.check_loaded()
            model.trained_on = TrainedOn.from_plain(config.get("trained_on"))
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        return model

    def _check_num(self, num: int) -> int:
        """How many grids to draw."""
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
        check_range(found, self.num_classes, "labels")
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


def _concrete_class(cls: type[AnyModel], name: object, folder: str | Path) -> type[AnyModel]:
    family, classes = [cls], []
    while family:
        kind = family.pop()
        family.extend(kind.__subclasses__())
        if not inspect.isabstract(kind) and kind not in classes:  # there may be two ways to it
            classes.append(kind)
    for kind in classes:
        if kind.__name__ == name:
            return kind
    expected = " or ".join(sorted(kind.__name__ for kind in classes))
    raise ValueError(f"{folder}: got a saved {name}, expected {expected}")
