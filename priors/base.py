"""The interface of a prior over grids of discrete codes.

A prior is a distribution P(z) over grids z of `math.prod(grid)` places with one of K codes each, factorised in an order
of its places, raster order (row-major over `grid`, the last axis fastest) unless a model says otherwise:

    ln P(z | label) = sum_i ln P(z_i | z_1 .. z_{i-1}, label)

It offers the two ways through that sum. `log_prob` scores known grids at once, and `tables` gives each
ln P(z_i = . | before) that it is read from. `walk` steps from place to place, shows a chooser that table and goes on
with the chooser's answer; sampling, scoring and coding are the same walk with different choosers. A model whose codes
are independent given those before may offer several places in a step.

An encoder that is trained through the prior needs a rate for codes that are not yet chosen: a weight w_ik for code k at
place i, relaxed from one-hot (Jang, Gu & Poole 2017, "Categorical reparameterization with Gumbel-softmax"; Maddison,
Mnih & Teh 2017, "The concrete distribution"). `relaxed_tables` are

    ln P(z_i = . | w_1 .. w_{i-1}, label)

where a model that embeds codes reads the mixture sum_k w_ik embedding_k. For one-hot weights they are `tables`; between
them they are one smooth way from corner to corner, and score no grid of codes.

Classifier-free guidance (Ho & Salimans 2022) replaces the table by the normalised

    ln P(. | no label) + guidance * (ln P(. | label) - ln P(. | no label))

so guidance 1 is the plain conditional; theirs is 1 + w. It may differ from place to place.

A prior knows nothing of images. Its outputs are at least float32; `prior.double()` gives float64.
"""

import numbers
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor
from tqdm import tqdm

from priors.grid import GridModel, check_size
from priors.numerics import Numerics, Precision, choose
from priors.sampling import Chooser, Seeds, check_range, check_seeds, random_chooser
from priors.walks import Route, Start, Step, filled, taken
from safefolder import ConfiguredOptions, Given, arrays
from safefolder.arrays import Codes, Labels, Mask

Prefix = Integer[Tensor, "b n"] | Integer[np.ndarray, "b n"] | Sequence[Any]

# Bytes that caches and tables of one block of grids may take, and the most grids in it: more make nothing faster.
CACHE_BYTES = 2**30
MOST_GRIDS = 256
# Grids with seeds of their own are always computed by so many, filled up if need be: matrix products of another shape
# are rounded otherwise, and a grid must not depend on how many others were asked for.
SEEDED_GRIDS = 16
# More would be lost in the rounding of a table.
_MOST_GUIDANCE = 1e6


class Prior(GridModel):
    """A distribution over code grids. Models fill in the methods marked abstract, and may replace `_relaxed_tables`,
    `_route`, `walk_bytes` and `num_at_once`.

    Args:
        num_codes: codes K at each position.

    Attributes: `num_codes` K; `grid`, e.g. (7, 7); `num_classes`, None for an unconditional prior;
    `has_numerics`, whether the arithmetic of its walks can be chosen.
    """

    has_numerics: ClassVar[bool] = False

    @classmethod
    def check_options(cls, options: ConfiguredOptions) -> None:
        check_size(options.num_codes, "num_codes")
        super().check_options(options)

    def __init__(self, *, num_codes: Given[int] = 512, **grid: Any):
        super().__init__(**grid)
        self.num_codes = num_codes

    @abstractmethod
    def _log_prob(self, codes: Tensor, labels: Tensor | None) -> Tensor:
        """Nats "b" of checked int64 codes "b n" (flattened) and labels "b"."""

    @abstractmethod
    def _start_walk(self, start: Start) -> Step:
        """The step function of one walk."""

    @abstractmethod
    def _tables(self, codes: Tensor, labels: Tensor | None) -> Tensor:
        """ln P(z_i = . | codes before i) "b n k" of checked int64 codes "b n" and labels "b"."""

    def _relaxed_tables(self, weights: Tensor, labels: Tensor | None) -> Tensor:
        """`_tables` after mixtures of codes: of weights "b n k", in this prior's `dtype`."""
        raise ValueError(f"{type(self).__name__} has no tables after mixtures of codes; take a TransformerPrior")

    def walk_bytes(self, numerics: Numerics, num_inputs: int = 1) -> int:
        """Bytes that a walk needs for each of its rows if a step reads so many codes, beside the tables of the step."""
        return 0

    @property
    def num_at_once(self) -> int:
        """How many places the largest step fixes, where nothing else is asked for."""
        return 1

    def log_prob(self, codes: Codes, labels: Labels | None = None) -> Float[Tensor, " b"]:
        """Log-probability of whole grids, in nats.

        Without labels a class-conditional prior gives the probability under "no label".
        Raises ValueError for codes or labels of a wrong type, shape or range.
        """
        codes = self._check_codes(codes, "codes", self.grid)
        found = self._check_labels(labels, len(codes))
        return self._log_prob(codes.reshape(len(codes), self.num_places), found)

    def forward(self, codes: Codes, labels: Labels | None = None) -> Float[Tensor, " b"]:
        """`log_prob`, so that wrappers of modules (Fabric, DDP, compile) see it."""
        return self.log_prob(codes, labels)

    def tables(self, codes: Codes, labels: Labels | None = None) -> Float[Tensor, "b *grid k"]:
        """ln P(z_i = . | codes before i) at every place i, nats; what stands at i or later has no say in it.

        Its entries at `codes` add up to `log_prob`. Raises ValueError as `log_prob` does.
        """
        codes = self._check_codes(codes, "codes", self.grid)
        found = self._check_labels(labels, len(codes))
        tables = self._tables(codes.reshape(len(codes), self.num_places), found)
        return tables.reshape(*codes.shape, self.num_codes)

    def relaxed_tables(
        self, weights: Float[Tensor, "b *grid k"], labels: Labels | None = None
    ) -> Float[Tensor, "b *grid k"]:
        """`tables` after mixtures of codes, as the module says, nats; with gradients to the weights of places before.

        Weights at a place should be >= 0 and sum to 1, which is not checked.
        Raises ValueError for weights of a wrong type or shape, for labels as `log_prob` does, and for a prior that
        embeds no codes.
        """
        weights = arrays.vectors(weights, "weights")
        if weights.ndim < 1 or tuple(weights.shape[1:]) != (*self.grid, self.num_codes):
            expected = ", ".join(map(str, ("b", *self.grid, self.num_codes)))
            raise ValueError(f"got weights of shape {tuple(weights.shape)}, expected ({expected})")
        found = self._check_labels(labels, len(weights))
        flat = weights.to(device=self.device, dtype=self.dtype).reshape(len(weights), self.num_places, self.num_codes)
        return self._relaxed_tables(flat, found).reshape(weights.shape)

    def walk(
        self,
        num: int,
        chooser: Chooser,
        labels: Labels | None = None,
        guidance: float | Sequence[float] | None = None,
        prefix: Prefix | None = None,
        known: Codes | None = None,
        mask: Mask | None = None,
        num_steps: int | None = None,
    ) -> Int[Tensor, "b *grid"]:
        """Step through `num` grids and let `chooser` fix each place, in the arithmetic of the prior's own weights.

        At each place the chooser gets normalised log-probabilities "b k" and returns codes "b". No autocast reaches the
        tables, dropout is off, and no gradients are kept. The other arguments are those of `sample`; no table is
        offered for places that are known in every grid before the first that is not.

        Raises ValueError for a bad count, labels, guidance, prefix, known codes or mask, and for a chooser's answer of
        the wrong type or shape.
        """
        num = self._check_num(num)
        classes = self._check_labels(labels, num)
        strengths = self._check_guidance(guidance, classes)
        route = self._route(*self._check_known(num, prefix, known, mask), num_steps)
        rows = torch.arange(num, device=self.device)
        return self._walk(chooser, classes, strengths, taken(route, rows), Numerics(self.dtype), None)

    def sample(
        self,
        num: int,
        labels: Labels | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float | Sequence[float] | None = None,
        generator: torch.Generator | None = None,
        prefix: Prefix | None = None,
        *,
        min_p: float | None = None,
        seeds: Seeds | None = None,
        known: Codes | None = None,
        mask: Mask | None = None,
        num_steps: int | None = None,
        precision: Precision = "auto",
        compiled: bool = False,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Int[Tensor, "b *grid"]:
        """Draw `num` grids. The same seed of `generator` gives the same codes on the same machine.

        Args:
            labels: class of each grid "b", or one class for all of them; None draws under "no label".
            temperature: 1 is the model itself, 0 takes the likeliest code at each place.
            top_k, top_p, min_p: keep the likeliest codes only; see `priors.sampling`.
            guidance: classifier-free guidance, 1 or None for none, or one number for each place in the order of the
                walk (`priors.sampling.guidance_ramp`); needs labels.
            prefix: known codes of the first n places in raster order, "b n".
            seeds: in place of a generator, a seed for each grid: the grid then is the same whatever others are drawn
                with it.
            known, mask: known grids and, as booleans of the shape of a grid or of all grids, where to draw; the rest is
                kept. A prior in raster order draws after what is known; `AnyOrderPrior` draws anywhere.
            num_steps: draw several codes at once, in so many steps, by a prior that can.
            precision: of the arithmetic; "auto" takes what is fastest for the device and the number of grids.
            compiled: use `torch.compile`, which takes a while the first time.
            batch_size: grids that are drawn at once; by default as many as 1 GiB holds, at most 256, or sixteen with
                seeds. Other sizes give other, equally good draws.
            progress: show a progress bar, at a terminal.
        Raises ValueError for a value outside its range.
        """
        drawn = self.samples(
            num, labels, temperature, top_k, top_p, guidance, generator, prefix, min_p=min_p, seeds=seeds, known=known,
            mask=mask, num_steps=num_steps, precision=precision, compiled=compiled, batch_size=batch_size,
            progress=progress,
        )  # fmt: skip
        empty = torch.zeros(0, *self.grid, dtype=torch.int64, device=self.device)
        return torch.cat([empty, *drawn])

    def samples(
        self,
        num: int,
        labels: Labels | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float | Sequence[float] | None = None,
        generator: torch.Generator | None = None,
        prefix: Prefix | None = None,
        *,
        min_p: float | None = None,
        seeds: Seeds | None = None,
        known: Codes | None = None,
        mask: Mask | None = None,
        num_steps: int | None = None,
        precision: Precision = "auto",
        compiled: bool = False,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Iterator[Int[Tensor, "b *grid"]]:
        """The grids of `sample` block by block, each as soon as it is finished; memory is that of one block."""
        num = self._check_num(num)
        classes = self._check_labels(labels, num)
        strengths = self._check_guidance(guidance, classes)
        route = self._route(*self._check_known(num, prefix, known, mask), num_steps)
        seeds = None if seeds is None else check_seeds(seeds)
        if seeds is not None and len(seeds) != num:
            raise ValueError(f"got {len(seeds)} seeds for {num} grids, expected one each")
        if batch_size is not None:
            batch_size = check_size(batch_size, "batch_size")
        if (precision != "auto" or compiled) and not self.has_numerics:
            raise ValueError(
                f"got precision={precision!r} and compiled={compiled}, expected 'auto' and False: "
                f"{type(self).__name__} draws with its weights as they are"
            )
        num_at_once = max(route.sizes or (self.num_at_once,))
        if compiled and num_at_once > 1:
            raise ValueError(f"got compiled=True for steps of up to {num_at_once} codes, expected False, or one a step")
        if seeds is not None:
            if batch_size is not None:
                raise ValueError(f"got batch_size={batch_size} beside seeds, which are drawn {SEEDED_GRIDS} at a time")
            # Known places one by one, as drawn ones: how many come at once must not depend on the other grids.
            sizes = None if route.sizes is None else (1,) * route.num_before + route.sizes
            route = replace(route, num_before=0, sizes=sizes)

        def chooser(part: slice) -> Chooser:
            filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
            own = None if seeds is None else [seeds[i] for i in filled(part, num, SEEDED_GRIDS)]
            return random_chooser(**filters, generator=generator, seeds=own)

        chooser(slice(0, 0))  # what is wrong is said now, not at the first grid
        widest = 1 if strengths is None else 2
        if seeds is not None:
            size = SEEDED_GRIDS
        elif batch_size is not None:
            size = batch_size
        else:
            numerics = choose(precision, num * widest, self, compiled)
            # A step reads what the last fixed, the first all that is known; tables stand there as logits, too.
            inputs = max(1 + route.num_before, 2 * num_at_once)
            each = self.walk_bytes(numerics, inputs) + 16 * self.num_codes * num_at_once
            size = max(1, min(MOST_GRIDS, CACHE_BYTES // (widest * each)))
        rows = size if seeds is not None else min(num, size)
        numerics = choose(precision, rows * widest, self, compiled)

        def blocks() -> Iterator[Tensor]:
            total, off = num * self.num_places, None if progress else True
            with tqdm(total=total, desc="codes", unit="code", unit_scale=True, disable=off) as bar:
                for begin in range(0, num, size):
                    part = slice(begin, min(num, begin + size))
                    wanted = filled(part, num, SEEDED_GRIDS) if seeds is not None else range(part.start, part.stop)
                    rows = torch.tensor(wanted, dtype=torch.int64, device=self.device)
                    chosen = None if classes is None else classes[rows]
                    length = part.stop - part.start

                    def tick(places: int, length: int = length) -> None:
                        bar.update(places * length)

                    with torch.inference_mode():
                        drawn = self._walk(chooser(part), chosen, strengths, taken(route, rows), numerics, tick)
                    # A copy, as a tensor of inference mode cannot be trained on.
                    yield drawn[:length].clone()

        return blocks()

    @torch.no_grad()
    def _walk(
        self,
        chooser: Chooser,
        labels: Tensor | None,
        strengths: Tensor | None,
        route: Route,
        numerics: Numerics,
        tick: Callable[[int], object] | None,
    ) -> Tensor:
        num, num_places = route.known.shape
        order = route.order
        known = route.known if order is None else route.known.gather(1, order)
        kept = route.kept if order is None else route.kept.gather(1, order)
        expected = f"integers of shape ({num},)"
        some_kept = kept[:, route.num_before :].any(0).tolist()
        codes = known.clone()
        start = Start(num, labels, numerics, order, route.sizes, route.num_before)
        with self.evaluating(), torch.autocast(self.device.type, enabled=False):
            step = self._start_walk(start) if strengths is None else self._guided(start, strengths)
            place, fixed = route.num_before, codes[:, : route.num_before]
            if tick is not None:
                tick(place)
            while place < num_places:
                begin = place
                for table in step(fixed).unbind(1):
                    chosen = arrays.integers(chooser(table), "codes from the chooser", self.device, expected)
                    if tuple(chosen.shape) != (num,):
                        raise ValueError(f"got shape {tuple(chosen.shape)} from the chooser, expected {expected}")
                    if some_kept[place - route.num_before]:
                        chosen = torch.where(kept[:, place], known[:, place], chosen)
                    codes[:, place] = chosen
                    place += 1
                fixed = codes[:, begin:place]
                if tick is not None:
                    tick(place - begin)
        if order is not None:
            codes = torch.empty_like(codes).scatter_(1, order, codes)
        return codes.reshape(num, *self.grid)

    def _guided(self, start: Start, strengths: Tensor) -> Step:
        """A walk of two rows for each grid, the second without its label, whose tables become one."""
        assert start.labels is not None
        assert self.num_classes is not None
        free_labels = torch.full_like(start.labels, self.num_classes)
        order = None if start.order is None else start.order.repeat(2, 1)
        labels = torch.cat((start.labels, free_labels))
        both = Start(2 * start.num, labels, start.numerics, order, start.sizes, start.num_before)
        step, place = self._start_walk(both), 0

        def guided(fixed: Tensor) -> Tensor:
            nonlocal place
            place += fixed.shape[1]
            given, free = step(fixed.repeat(2, 1)).chunk(2)
            strength = strengths[place : place + given.shape[1], None]
            return (free + strength * (given - free)).log_softmax(-1)

        return guided

    def _route(self, known: Tensor, kept: Tensor, num_steps: int | None) -> Route:
        """The order in which to draw what is not kept. In raster order nothing may be known after what is drawn."""
        if num_steps is not None:
            raise ValueError(
                f"got num_steps={num_steps}, expected None: {type(self).__name__} has steps of its own; "
                "take an AnyOrderPrior"
            )
        if bool((kept[:, 1:] & ~kept[:, :-1]).any()):
            raise ValueError(
                f"got a mask with known codes after unknown ones, but {type(self).__name__} looks only at codes before "
                "in raster order; take an AnyOrderPrior"
            )
        lengths = kept.sum(1)
        return Route(known, kept, int(lengths.min()) if len(lengths) else 0)

    def _check_codes(self, codes: Codes, name: str, shape: tuple[int, ...]) -> Tensor:
        """Codes of any integer type as int64, on this prior's device."""
        codes = arrays.integers(codes, name, self.device)
        if tuple(codes.shape[1:]) != shape or codes.ndim < 1:
            expected = ", ".join(map(str, ("b", *shape)))
            raise ValueError(f"got {name} of shape {tuple(codes.shape)}, expected ({expected})")
        codes = codes.to(self.device)
        check_range(codes, self.num_codes, name)
        return codes

    def _check_known(
        self, num: int, prefix: Prefix | None, known: Codes | None, mask: Mask | None
    ) -> tuple[Tensor, Tensor]:
        """Known codes "b n" (zero where unknown), and where they are kept; one row for all if nothing is known."""
        rows = 1 if prefix is None and known is None else num
        codes = torch.zeros(rows, self.num_places, dtype=torch.int64, device=self.device)
        kept = torch.zeros_like(codes, dtype=torch.bool)
        if (known is None) != (mask is None) or (known is not None and prefix is not None):
            raise ValueError("expected known codes and a mask together, or a prefix, or neither")
        if prefix is not None:
            prefix = arrays.integers(prefix, "prefix", self.device)
            if prefix.ndim != 2 or prefix.shape[0] != num or prefix.shape[1] > self.num_places:
                raise ValueError(
                    f"got prefix of shape {tuple(prefix.shape)}, expected ({num}, n) with n from 0 to "
                    f"{self.num_places}, the first places in raster order"
                )
            codes[:, : prefix.shape[1]] = self._check_codes(prefix, "prefix", (prefix.shape[1],))
            kept[:, : prefix.shape[1]] = True
        if known is not None and mask is not None:
            known, mask = arrays.integers(known, "known", self.device), arrays.mask_of(mask, "a mask", self.device)
            if mask.dtype != torch.bool or tuple(mask.shape) not in (self.grid, (num, *self.grid)):
                expected = ", ".join(map(str, self.grid))
                raise ValueError(
                    f"got a mask of {mask.dtype} {tuple(mask.shape)}, expected booleans of shape ({expected}) or "
                    f"({num}, {expected}), True where to draw"
                )
            if tuple(known.shape) != (num, *self.grid):
                expected = ", ".join(map(str, (num, *self.grid)))
                raise ValueError(f"got known codes of shape {tuple(known.shape)}, expected ({expected})")
            kept = ~mask.to(self.device).expand(num, *self.grid).reshape(num, self.num_places)
            # What stands where codes are to be drawn is nobody's business, such as a -1 for "unknown".
            flat = self._check_codes(known.to(self.device).where(kept.reshape(known.shape), 0), "known", self.grid)
            codes = flat.reshape(num, self.num_places)
        return codes, kept

    def _check_guidance(self, guidance: float | Sequence[float] | None, labels: Tensor | None) -> Tensor | None:
        """Strength at each place of the walk; None where it is 1 everywhere."""
        if guidance is None or (isinstance(guidance, numbers.Real) and guidance == 1):
            return None
        if self.num_classes is None:
            raise ValueError(f"got guidance={guidance}, expected None: this prior was made without num_classes")
        if labels is None or bool((labels == self.num_classes).any()):
            raise ValueError(f"got guidance={guidance} without labels, expected labels to guide to")
        if not isinstance(guidance, numbers.Real | Sequence) or isinstance(guidance, str):
            raise ValueError(f"got guidance of {type(guidance).__name__}, expected a number, or one for each place")
        several = isinstance(guidance, Sequence)
        strengths = list(guidance) if isinstance(guidance, Sequence) else [guidance] * self.num_places
        if len(strengths) != self.num_places:
            raise ValueError(
                f"got guidance of {len(strengths)} numbers, expected one for each of {self.num_places} places"
            )
        if not all(0 <= strength <= _MOST_GUIDANCE for strength in strengths):
            shown = "one of them in guidance" if several else f"guidance={guidance}"
            raise ValueError(f"got {shown}, expected numbers from 0 to {_MOST_GUIDANCE:g} (1 is none)")
        if all(strength == 1 for strength in strengths):
            return None
        return torch.tensor(strengths, dtype=self.dtype, device=self.device)
