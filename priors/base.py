"""The interface of a prior over grids of discrete codes.

A prior is a distribution P(z) over grids z of `math.prod(grid)` places with one of K codes each,
factorised in raster order (row-major over `grid`, the last axis fastest):

    ln P(z | label) = sum_i ln P(z_i | z_1 .. z_{i-1}, label)

It offers the two ways through that sum. `log_prob` scores known grids at once. `walk` steps from
place to place, shows a chooser the table ln P(z_i = . | before) and goes on with the chooser's
answer; sampling, scoring and coding are the same walk with different choosers.

Classifier-free guidance (Ho & Salimans 2022) replaces the table by the normalised

    ln P(. | no label) + guidance * (ln P(. | label) - ln P(. | no label))

so guidance 1 is the plain conditional; theirs is 1 + w.

A prior knows nothing of images. Its outputs are at least float32; `prior.double()` gives float64.
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

import safefolder
from priors.sampling import Chooser, check_range, random_chooser

AnyPrior = TypeVar("AnyPrior", bound="Prior")

# Takes the codes fixed since the last call, "b n" (at the first call the prefix, perhaps n = 0),
# and gives the log-probabilities of the next place, "b k".
Step = Callable[[Int[Tensor, "b n"]], Float[Tensor, "b k"]]


class Prior(nn.Module, ABC):
    """A distribution over code grids. Models fill in the methods marked abstract, and only those.

    Attributes: `num_codes` K; `grid`, e.g. (7, 7); `num_classes`, None for an unconditional prior.
    """

    def __init__(self, *, num_codes: int, grid: Sequence[int], num_classes: int | None = None):
        super().__init__()
        check_size(num_codes, "num_codes")
        if num_classes is not None:
            check_size(num_classes, "num_classes")
        self.num_codes = num_codes
        self.grid = check_grid(grid)
        self.num_classes = num_classes
        # Says where the prior lives and how precise it is, also for one that has no weights.
        self.register_buffer("_anchor", torch.zeros(1), persistent=False)

    @abstractmethod
    def _log_prob(self, codes: Tensor, labels: Tensor | None) -> Tensor:
        """Nats "b" of checked int64 codes "b n" (flattened) and labels "b"."""

    @abstractmethod
    def _start_walk(self, num: int, labels: Tensor | None, guidance: float | None) -> Step:
        """The step function of one walk over `num` grids; guidance is None where it is 1."""

    @abstractmethod
    def _config_fields(self) -> dict[str, Any]:
        """What config.json needs, as JSON values, to build this prior anew."""

    @classmethod
    @abstractmethod
    def _from_config_fields(cls: type[AnyPrior], fields: dict[str, Any]) -> AnyPrior:
        """The prior that `_config_fields` describes, with fresh weights."""

    @property
    def num_places(self) -> int:
        """Places of the grid, i.e. codes an image."""
        return math.prod(self.grid)

    @property
    def device(self) -> torch.device:
        """The device that the prior lives on."""
        return self._anchor.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of its log-probabilities: float32, or float64 after `.double()`."""
        return torch.promote_types(self._anchor.dtype, torch.float32)

    def log_prob(self, codes: Int[Tensor, "b *grid"], labels: Int[Tensor, " b"] | None = None) -> Float[Tensor, " b"]:
        """Log-probability of whole grids, in nats.

        Without labels a class-conditional prior gives the probability under "no label".
        Raises ValueError for codes or labels of a wrong type, shape or range.
        """
        codes = self._check_codes(codes, "codes", self.grid)
        labels = self._check_labels(labels, len(codes))
        return self._log_prob(codes.reshape(len(codes), self.num_places), labels)

    def forward(self, codes: Int[Tensor, "b *grid"], labels: Int[Tensor, " b"] | None = None) -> Float[Tensor, " b"]:
        """`log_prob`, so that wrappers of modules (Fabric, DDP, compile) see it."""
        return self.log_prob(codes, labels)

    @torch.no_grad()
    def walk(
        self,
        num: int,
        chooser: Chooser,
        labels: Int[Tensor, " b"] | None = None,
        guidance: float | None = None,
        prefix: Int[Tensor, "b n"] | None = None,
    ) -> Int[Tensor, "b *grid"]:
        """Step through `num` grids in raster order and let `chooser` fix each place.

        At each place the chooser gets normalised log-probabilities "b k" and returns codes "b".
        `prefix` holds the known codes of the first n places; they are kept, and no table of theirs
        is offered. Dropout is off for the walk, and no gradients are kept.

        Raises ValueError for a bad count, labels, guidance or prefix, and for a chooser's answer of
        the wrong type or shape.
        """
        if not isinstance(num, int) or num < 0:
            raise ValueError(f"got num={num}, expected an integer >= 0")
        labels = self._check_labels(labels, num)
        guidance = self._check_guidance(guidance, labels)
        codes = torch.zeros(num, self.num_places, dtype=torch.int64, device=self.device)
        num_known = 0
        if prefix is not None:
            prefix = self._check_prefix(prefix, num)
            num_known = prefix.shape[1]
            codes[:, :num_known] = prefix
        with _evaluating(self):
            step = self._start_walk(num, labels, guidance)
            fixed = codes[:, :num_known]
            for place in range(num_known, self.num_places):
                chosen = chooser(step(fixed))
                if tuple(chosen.shape) != (num,) or not _is_integer(chosen):
                    raise ValueError(
                        f"got {chosen.dtype} {tuple(chosen.shape)} from the chooser, "
                        f"expected integers of shape ({num},)"
                    )
                codes[:, place] = chosen
                fixed = codes[:, place : place + 1]
        return codes.reshape(num, *self.grid)

    def sample(
        self,
        num: int,
        labels: Int[Tensor, " b"] | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float | None = None,
        generator: torch.Generator | None = None,
        prefix: Int[Tensor, "b n"] | None = None,
    ) -> Int[Tensor, "b *grid"]:
        """Draw `num` grids. The same seed of `generator` gives the same codes.

        Args:
            labels: class of each grid "b"; None draws under "no label".
            temperature: 1 is the model itself, 0 takes the likeliest code at each place.
            top_k, top_p: keep the likeliest codes only; see `priors.sampling`.
            guidance: classifier-free guidance, 1 or None for none; needs labels.
            prefix: known codes of the first n places in raster order, "b n".
        Raises ValueError for a value outside its range.
        """
        chooser = random_chooser(temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        return self.walk(num, chooser, labels=labels, guidance=guidance, prefix=prefix)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors; a folder already there is replaced whole."""
        config = {"class": type(self).__name__, "format": 1, **self._config_fields()}
        safefolder.save(Path(folder), config, dict(self.state_dict()))

    @classmethod
    def from_pretrained(cls: type[AnyPrior], folder: str | Path) -> AnyPrior:
        """Load a prior from a folder or a hub id: `cls` or a subclass, whichever was saved.

        It comes in evaluation mode, on the CPU, with the type of weights that was saved.
        Raises ValueError where there is no such prior, or its weights do not fit its config.
        """
        config, tensors = safefolder.load(folder)
        kind = _concrete_class(cls, config.get("class"), folder)
        fields = {name: config[name] for name in config if name not in ("class", "format")}
        try:
            # A fresh start is drawn and thrown away: the caller's random numbers stay as they were.
            with torch.random.fork_rng(devices=[]):
                prior = kind._from_config_fields(fields)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder}: config.json does not fit {kind.__name__}: {error}") from error
        # Weights keep the type that they were saved in, and what is not saved follows them.
        if floating := [t.dtype for t in tensors.values() if t.dtype.is_floating_point]:
            prior.to(floating[0])
        safefolder.load_weights(prior, tensors, folder)
        return prior.eval()

    def _check_codes(self, codes: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
        if not _is_integer(codes):
            raise ValueError(f"got {name} of {codes.dtype}, expected integers")
        if tuple(codes.shape[1:]) != shape or codes.ndim < 1:
            expected = ", ".join(map(str, ("b", *shape)))
            raise ValueError(f"got {name} of shape {tuple(codes.shape)}, expected ({expected})")
        codes = codes.to(device=self.device, dtype=torch.int64)
        check_range(codes, self.num_codes, name)
        return codes

    def _check_prefix(self, prefix: Tensor, num: int) -> Tensor:
        if prefix.ndim != 2 or prefix.shape[0] != num or prefix.shape[1] > self.num_places:
            raise ValueError(
                f"got prefix of shape {tuple(prefix.shape)}, expected ({num}, n) with n from 0 to "
                f"{self.num_places}, the first places in raster order"
            )
        return self._check_codes(prefix, "prefix", (prefix.shape[1],))

    def _check_labels(self, labels: Tensor | None, num: int) -> Tensor | None:
        if labels is None:
            return None
        if self.num_classes is None:
            raise ValueError("got labels, expected none: this prior was made without num_classes")
        if not _is_integer(labels) or tuple(labels.shape) != (num,):
            raise ValueError(f"got labels of {labels.dtype} {tuple(labels.shape)}, expected integers of shape ({num},)")
        labels = labels.to(device=self.device, dtype=torch.int64)
        check_range(labels, self.num_classes, "labels")
        return labels

    def _check_guidance(self, guidance: float | None, labels: Tensor | None) -> float | None:
        if guidance is None:
            return None
        if self.num_classes is None:
            raise ValueError(f"got guidance={guidance}, expected None: this prior was made without num_classes")
        if labels is None:
            raise ValueError(f"got guidance={guidance} without labels, expected labels to guide to")
        if not (guidance >= 0 and math.isfinite(guidance)):
            raise ValueError(f"got guidance={guidance}, expected a number >= 0 (1 is none)")
        return None if guidance == 1 else float(guidance)


def check_size(size: int, name: str) -> None:
    """ValueError unless `size` is an integer >= 1."""
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"got {name}={size!r}, expected an integer >= 1")


def check_grid(grid: Sequence[int]) -> tuple[int, ...]:
    """The grid as a tuple; ValueError unless it has one axis or more, each >= 1."""
    if isinstance(grid, str) or not isinstance(grid, Sequence) or len(grid) == 0:
        raise ValueError(f"got grid={grid!r}, expected its sizes, e.g. (7, 7)")
    for size in grid:
        check_size(size, "a grid size")
    return tuple(grid)


def _is_integer(tensor: Tensor) -> bool:
    dtype = tensor.dtype
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; after it every submodule is in the mode that it was in."""
    training = [part for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True


def _concrete_class(cls: type[AnyPrior], name: object, folder: str | Path) -> type[AnyPrior]:
    family, classes = [cls], []
    while family:
        kind = family.pop()
        family.extend(kind.__subclasses__())
        if not inspect.isabstract(kind):
            classes.append(kind)
    for kind in classes:
        if kind.__name__ == name:
            return kind
    expected = " or ".join(sorted(kind.__name__ for kind in classes))
    raise ValueError(f"{folder}: got a saved {name}, expected {expected}")
