"""The interface of a prior over grids of discrete codes.

A prior is a distribution P(z) over grids z of `math.prod(grid)` positions with one of K codes each, factorised in an
order of its positions, raster order (row-major over `grid`, the last axis fastest) unless a model says otherwise:

    ln P(z | label) = sum_i ln P(z_i | z_1 .. z_{i-1}, label)

It offers the two ways through that sum. `log_prob` scores known grids at once, and `log_conditionals` gives each
ln P(z_i = . | before) that it is read from. `walk` steps from position to position, shows a chooser its conditional and
goes on with the chooser's answer; sampling, scoring and coding are the same walk with different choosers. A model whose
codes are independent given those before may offer several positions in a step.

An encoder that is trained through the prior needs a rate for codes that are not yet chosen: a weight w_ik for code k at
position i, relaxed from one-hot (Jang, Gu & Poole 2017, "Categorical reparameterization with Gumbel-softmax"; Maddison,
Mnih & Teh 2017, "The concrete distribution"). `relaxed_log_conditionals` are

    ln P(z_i = . | w_1 .. w_{i-1}, label)

where a model that embeds codes reads the mixture sum_k w_ik embedding_k. For one-hot weights they are
`log_conditionals`; between them they are one smooth way from corner to corner, and score no grid of codes.

Classifier-free guidance (Ho & Salimans 2022) replaces the conditionals by the normalised

    ln P(. | no label) + guidance * (ln P(. | label) - ln P(. | no label))

so guidance 1 is the plain conditional; theirs is 1 + w. It may differ from position to position.

A prior knows nothing of images. Its outputs are at least float32; `prior.double()` gives float64.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from priors.drafts import check_draft, speculated
from priors.draws import (
    CACHE_BYTES,
    MOST_GRIDS,
    SEEDED_GRIDS,
    Prefix,
    block_grids,
    check_codes,
    check_given,
    check_room,
    seeds_for,
    strengths_of,
)
from priors.grid import GridModel, check_size
from priors.precision import Arithmetic, choose
from priors.sampling import Chooser, Sampling, Seeds, check_sampling, random_chooser
from priors.scorers import Scorer
from priors.speculation import Draft, PriorDraft
from priors.trials import numerics_for
from priors.walks import Step, WalkOrder, WalkStart, taken
from safefolder import arrays
from safefolder.arrays import Codes, Labels, Mask
from safefolder.configured import ConfiguredOptions
from safefolder.options import Given


class Prior(GridModel):
    """A distribution over code grids. Models fill in the methods marked abstract, and may replace
    `_relaxed_log_conditionals`, `_walk_order`, `walk_bytes` and `num_at_once`.

    Args:
        num_codes: codes K at each position.

    Attributes: `num_codes` K; `grid`, e.g. (7, 7); `num_classes`, None for an unconditional prior;
    `has_arithmetic`, whether the arithmetic of its walks can be chosen; `can_skip`, whether they heed
    `WalkStart.skipped`.
    """

    has_arithmetic: ClassVar[bool] = False
    can_skip: ClassVar[bool] = False

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
    def _start_walk(self, start: WalkStart) -> Step:
        """The step function of one walk."""

    @abstractmethod
    def _log_conditionals(self, codes: Tensor, labels: Tensor | None) -> Tensor:
        """ln P(z_i = . | codes before i) "b n k" of checked int64 codes "b n" and labels "b"."""

    def _relaxed_log_conditionals(self, weights: Tensor, labels: Tensor | None) -> Tensor:
        """`_log_conditionals` after mixtures of codes: of weights "b n k", in this prior's `dtype`."""
        raise ValueError(f"{type(self).__name__} has no conditionals after mixtures of codes; take a TransformerPrior")

    def _start_scorer(self, start: WalkStart, most: int) -> Scorer:
        """What scores stretches of up to `most` positions of grids in raster order: here the whole grids each time."""

        def score(codes: Tensor, begins: Sequence[int], at: Tensor) -> Tensor:
            found = self._log_conditionals(codes[:, : self.num_positions], start.labels)
            return found.gather(1, at[..., None].expand(-1, -1, self.num_codes))

        return score

    def check_fits(self, prior: "Prior") -> None:
        """ValueError unless it can propose codes to another prior: of as many codes on the same grid, with its classes
        or none, and on its device."""
        mine = (self.num_codes, self.grid, self.num_classes or prior.num_classes, self.device)
        if mine != (prior.num_codes, prior.grid, prior.num_classes, prior.device):
            raise ValueError(
                f"got a draft of {self.num_codes} codes on a grid of {self.grid} with {self.num_classes} classes on "
                f"{self.device}, expected {prior.num_codes} on {prior.grid} with {prior.num_classes} or none, "
                f"on {prior.device}"
            )

    def start_draft(self, prior: "Prior", scorer: Scorer, start: WalkStart) -> Draft:
        """The proposals of this prior to another one, in blocks of rows as its scorer's (`Sampling.draft`)."""
        arithmetic = start.arithmetic if self.has_arithmetic else Arithmetic(self.dtype)
        labels = None if self.num_classes is None else start.labels
        return PriorDraft(self._start_scorer(replace(start, labels=labels, arithmetic=arithmetic), 2))

    def walk_bytes(self, arithmetic: Arithmetic, num_inputs: int = 1) -> int:
        """Bytes that a walk needs for each row if a step reads so many codes, beside the conditionals of the step."""
        return 0

    @property
    def num_at_once(self) -> int:
        """How many positions the largest step fixes, where nothing else is asked for."""
        return 1

    def log_prob(self, codes: Codes, labels: Labels | None = None) -> Float[Tensor, " b"]:
        """Log-probability of whole grids, in nats.

        Without labels a class-conditional prior gives the probability under "no label".
        Raises ValueError for codes or labels of a wrong type, shape or range.
        """
        codes = self._check_codes(codes, "codes", self.grid)
        found = self._check_labels(labels, len(codes))
        return self._log_prob(codes.reshape(len(codes), self.num_positions), found)

    def forward(self, codes: Codes, labels: Labels | None = None) -> Float[Tensor, " b"]:
        """`log_prob`, so that wrappers of modules (Fabric, DDP, compile) see it."""
        return self.log_prob(codes, labels)

    def log_conditionals(self, codes: Codes, labels: Labels | None = None) -> Float[Tensor, "b *grid k"]:
        """ln P(z_i = . | codes before i) at every position i, nats; what stands at i or later has no say in it.

        Its entries at `codes` add up to `log_prob`. Raises ValueError as `log_prob` does.
        """
        codes = self._check_codes(codes, "codes", self.grid)
        found = self._check_labels(labels, len(codes))
        conditionals = self._log_conditionals(codes.reshape(len(codes), self.num_positions), found)
        return conditionals.reshape(*codes.shape, self.num_codes)

    def relaxed_log_conditionals(
        self, weights: Float[Tensor, "b *grid k"], labels: Labels | None = None
    ) -> Float[Tensor, "b *grid k"]:
        """`log_conditionals` after mixtures of codes, as the module says, nats; with gradients to the weights before.

        Weights at a position should be >= 0 and sum to 1, which is not checked.
        Raises ValueError for weights of a wrong type or shape, for labels as `log_prob` does, and for a prior that
        embeds no codes.
        """
        weights = arrays.vectors(weights, "weights")
        if weights.ndim < 1 or tuple(weights.shape[1:]) != (*self.grid, self.num_codes):
            expected = ", ".join(map(str, ("b", *self.grid, self.num_codes)))
            raise ValueError(f"got weights of shape {tuple(weights.shape)}, expected ({expected})")
        found = self._check_labels(labels, len(weights))
        flat = weights.to(device=self.device, dtype=self.dtype).reshape(
            len(weights), self.num_positions, self.num_codes
        )
        return self._relaxed_log_conditionals(flat, found).reshape(weights.shape)

    def walk(
        self,
        num: int,
        chooser: Chooser,
        labels: Labels | None = None,
        guidance: float | Sequence[float] | None = None,
        num_steps: int | None = None,
        *,
        given: Codes | None = None,
        mask: Mask | None = None,
        prefix: Prefix | None = None,
    ) -> Int[Tensor, "b *grid"]:
        """Step through `num` grids and let `chooser` fix each position, in the arithmetic of the prior's own weights.

        At each position the chooser gets normalised log-probabilities "b k" and returns codes "b". No autocast reaches
        the conditionals, dropout is off, and no gradients are kept. The other arguments are those of `sample` and
        `Sampling`; no conditional is offered for positions that are given in every grid before the first that is not.

        Raises ValueError as `sample`, and for a chooser's answer of the wrong type or shape.
        """
        options = Sampling(guidance=guidance, num_steps=num_steps)
        num, classes, strengths, walk_order = self._asked(num, labels, options, prefix, given, mask)
        rows = torch.arange(num, device=self.device)
        return self._walk(chooser, classes, strengths, taken(walk_order, rows), Arithmetic(self.dtype), None)

    def sample(
        self,
        num: int,
        labels: Labels | None = None,
        sampling: Sampling = Sampling(),
        generator: torch.Generator | None = None,
        *,
        given: Codes | None = None,
        mask: Mask | None = None,
        prefix: Prefix | None = None,
        seeds: Seeds | None = None,
        progress: bool = False,
    ) -> Int[Tensor, "b *grid"]:
        """Draw `num` grids. The same seed of `generator` gives the same codes on the same machine.

        Args:
            labels: class of each grid "b", or one class for all of them; None samples under "no label".
            sampling: how they are sampled.
            generator: of the draws; torch's global one unless given.
            given, mask: codes "b *grid" and, as booleans of the shape of a grid or of all grids, where to sample; the
                rest is kept. A prior in raster order samples after what is given; `AnyOrderPrior` samples anywhere.
            prefix: in their place, codes of the first n positions in raster order, "b n".
            seeds: in place of a generator, a seed for each grid: the grid then is the same whatever others are sampled
                with it. They are sampled sixteen at a time.
            progress: show a progress bar, at a terminal.

        Raises ValueError for what does not fit the prior, or each other, and for more grids than memory holds.
        """
        num = self._check_num(num)
        check_room(num, 8 * self.num_positions, self.device, "take them block by block from `samples`")
        blocks = self.samples(
            num, labels, sampling, generator, given=given, mask=mask, prefix=prefix, seeds=seeds, progress=progress
        )
        return torch.cat([torch.zeros(0, *self.grid, dtype=torch.int64, device=self.device), *blocks])

    def samples(
        self,
        num: int,
        labels: Labels | None = None,
        sampling: Sampling = Sampling(),
        generator: torch.Generator | None = None,
        *,
        given: Codes | None = None,
        mask: Mask | None = None,
        prefix: Prefix | None = None,
        seeds: Seeds | None = None,
        progress: bool = False,
    ) -> Iterator[Int[Tensor, "b *grid"]]:
        """The grids of `sample` block by block, each as soon as it is finished; memory is that of one block."""
        num, classes, strengths, walk_order = self._asked(num, labels, sampling, prefix, given, mask)
        num_at_once = self._check_arithmetic(sampling, walk_order)
        listed = seeds_for(num, seeds, sampling)
        wide = 1 if strengths is None else 2
        if listed is None:
            size = sampling.batch_size
            if size is None:
                arithmetic = choose(sampling.precision, num * wide, self, sampling.compiled)
                # A step reads what the last fixed, the first all that is known; conditionals are there as logits, too.
                inputs = max(1 + walk_order.num_before, 2 * num_at_once)
                row_bytes = self.walk_bytes(arithmetic, inputs) + 16 * self.num_codes * num_at_once
                size = max(1, min(MOST_GRIDS, CACHE_BYTES // (wide * row_bytes)))
            rows = min(num, size)
        else:
            size = rows = SEEDED_GRIDS
            # Given positions one by one, as sampled ones: how many come at once must not depend on the other grids.
            sizes = None if walk_order.sizes is None else (1,) * walk_order.num_before + walk_order.sizes
            walk_order = replace(walk_order, num_before=0, sizes=sizes)
        # What is wrong is said now, not at the first grid.
        random_chooser(sampling, generator=generator, seeds=None if listed is None else [])
        check_draft(self, sampling, walk_order, listed)

        def start_of(arithmetic: Arithmetic) -> WalkStart:
            nothing = torch.zeros(rows * wide, dtype=torch.int64, device=self.device)
            first = taken(walk_order, nothing)
            labels = None if self.num_classes is None else nothing + self.num_classes
            return WalkStart(rows * wide, labels, arithmetic, first.order, first.sizes)

        numerics = numerics_for(self, sampling, start_of)

        def sampled_blocks() -> Iterator[Tensor]:
            total, off = num * self.num_positions, None if progress else True
            with tqdm(total=total, desc="codes", unit="code", unit_scale=True, disable=off) as bar:
                for grids, length in block_grids(num, size, full=listed is not None):
                    own = None if listed is None else [listed[i] for i in grids]
                    chooser = random_chooser(sampling, generator=generator, seeds=own)
                    rows = torch.tensor(grids, dtype=torch.int64, device=self.device)
                    chosen = None if classes is None else classes[rows]

                    def tick(positions: int, length: int = length) -> None:
                        bar.update(positions * length)

                    with torch.inference_mode():
                        block = (chosen, strengths, taken(walk_order, rows), numerics.arithmetic)
                        if numerics.num_proposals:
                            number = numerics.num_proposals
                            codes = speculated(self, sampling, number, generator, *block, bar.update)
                        else:
                            codes = self._walk(chooser, *block, tick)
                    # A copy, as a tensor of inference mode cannot be trained on.
                    yield codes[:length].clone()

        return sampled_blocks()

    def _asked(
        self,
        num: int,
        labels: Labels | None,
        sampling: Sampling,
        prefix: Prefix | None,
        given: Codes | None,
        mask: Mask | None,
    ) -> tuple[int, Tensor | None, Tensor | None, WalkOrder]:
        """What is asked of a walk, checked: how many grids, their labels, guidance at each position, and its order."""
        check_sampling(sampling)
        num = self._check_num(num)
        classes = self._check_labels(labels, num)
        strengths = strengths_of(self, sampling.guidance, classes)
        codes, kept = check_given(self, self.num_codes, num, prefix, given, mask)
        return num, classes, strengths, self._walk_order(codes, kept, sampling.num_steps)

    def _check_arithmetic(self, sampling: Sampling, walk_order: WalkOrder) -> int:
        """How many codes the largest step fixes. ValueError for arithmetic that the prior, or such steps, cannot do."""
        if (sampling.precision != "auto" or sampling.compiled) and not self.has_arithmetic:
            raise ValueError(
                f"got precision={sampling.precision!r} and compiled={sampling.compiled}, expected 'auto' and False: "
                f"{type(self).__name__} samples with its weights as they are"
            )
        num = max(walk_order.sizes or (self.num_at_once,))
        if sampling.compiled and num > 1:
            raise ValueError(f"got compiled=True for steps of up to {num} codes, expected False, or one a step")
        return num

    @torch.no_grad()
    def _walk(
        self,
        chooser: Chooser,
        labels: Tensor | None,
        strengths: Tensor | None,
        walk_order: WalkOrder,
        arithmetic: Arithmetic,
        tick: Callable[[int], object] | None,
    ) -> Tensor:
        num, num_positions = walk_order.known.shape
        order = walk_order.order
        known = walk_order.known if order is None else walk_order.known.gather(1, order)
        kept = walk_order.kept if order is None else walk_order.kept.gather(1, order)
        expected = f"integers of shape ({num},)"
        some_kept = kept[:, walk_order.num_before :].any(0).tolist()
        codes = known.clone()
        start = WalkStart(num, labels, arithmetic, order, walk_order.sizes)
        with self.evaluating(), torch.autocast(self.device.type, enabled=False):
            step = self._start_walk(start) if strengths is None else self._guided(start, strengths)
            position, fixed = walk_order.num_before, codes[:, : walk_order.num_before]
            if tick is not None:
                tick(position)
            while position < num_positions:
                begin = position
                for log_probs in step(fixed).unbind(1):
                    chosen = arrays.integers(chooser(log_probs), "codes from the chooser", self.device, expected)
                    if tuple(chosen.shape) != (num,):
                        raise ValueError(f"got shape {tuple(chosen.shape)} from the chooser, expected {expected}")
                    if some_kept[position - walk_order.num_before]:
                        chosen = torch.where(kept[:, position], known[:, position], chosen)
                    codes[:, position] = chosen
                    position += 1
                fixed = codes[:, begin:position]
                if tick is not None:
                    tick(position - begin)
        if order is not None:
            codes = torch.empty_like(codes).scatter_(1, order, codes)
        return codes.reshape(num, *self.grid)

    def _guided(self, start: WalkStart, strengths: Tensor) -> Step:
        """A walk of two rows for each grid, the second without its label, whose conditionals become one."""
        step, position = self._start_walk(self.doubled(start)), 0

        def guided(fixed: Tensor) -> Tensor:
            nonlocal position
            position += fixed.shape[1]
            given, free = step(fixed.repeat(2, 1)).chunk(2)
            strength = strengths[position : position + given.shape[1], None]
            return (free + strength * (given - free)).log_softmax(-1)

        return guided

    def doubled(self, start: WalkStart) -> WalkStart:
        """Two rows for each grid, the second without its label."""
        assert start.labels is not None
        assert self.num_classes is not None
        order = None if start.order is None else start.order.repeat(2, 1)
        labels = torch.cat((start.labels, torch.full_like(start.labels, self.num_classes)))
        return replace(start, num=2 * start.num, labels=labels, order=order)

    def _walk_order(self, known: Tensor, kept: Tensor, num_steps: int | None) -> WalkOrder:
        """The order in which to sample what is not kept. In raster order nothing may be known after what is sampled."""
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
        return WalkOrder(known, kept, int(lengths.min()) if len(lengths) else 0)

    def _check_codes(self, codes: Codes, name: str, shape: tuple[int, ...]) -> Tensor:
        """Codes of any integer type as int64, on this prior's device."""
        return check_codes(self, self.num_codes, codes, name, shape)
