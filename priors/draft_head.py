"""A small head on a transformer prior that guesses the codes to come: the draft of speculative sampling.

The features from which a prior tells code i know all codes before it. From them and code i itself the head guesses code
i + 1; from its own state then code i + 2, and so on:

    s_i = features_i
    h_j = W [s_{j-1}, e(z_{j-1}), e(z_a), e(z_b), ..] + target_j       z_a, z_b, ..: codes back along the other axes
    s_j = RMSNorm(s_{j-1} + V silu(h_j)),      ln Q(z_j = .) = log-softmax(U s_j)        j = i + 1, i + 2, ...

with the prior's own embedding e, scaled to unit variance, and its own U. A draft that reads the prior's features is
from Li et al. 2024, "EAGLE: Speculative sampling requires rethinking feature uncertainty"; the neighbours are ours, as
in a grid the codes above say as much as the one before, and the features need not hold them.

A guess is accepted with the mass that both distributions share, so the head is fitted to the prior's conditionals and
not to the codes alone (a cross entropy over all codes), unrolled over `NUM_GUESSES` guesses in a row.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from priors.grid import check_grid, check_size
from priors.packed_linear import prepare
from priors.precision import Arithmetic
from priors.raster import RasterPrior, RasterScorer
from priors.trunk import rms_norm, widen
from priors.walks import WalkStart
from safefolder import SavedModel
from safefolder.configured import ConfiguredOptions
from safefolder.options import Given

# Guesses in a row that the head is fitted for, and that are measured.
NUM_GUESSES = 4
# On a CPU products of so few rows with so few weights are fastest in float32 in torch's own layout: the calls of others
# take longer than the arithmetic (benchmarks/README.md).
_FEW_ROWS, _FEW_WEIGHTS = 4, 2**21


class DraftHead(SavedModel):
    """Guesses the codes after those that a prior knows. `DraftHead.of(prior)` has the sizes of a prior.

    Args:
        num_codes, grid, width: those of the prior.

    Attributes:
        accepted: float32 "NUM_GUESSES", the probability with which the prior accepts each of so many guesses in a row,
            if it accepts those before; as measured after the fit, 0 before.
    """

    run_part = "draft"
    card_name = "draft of a prior"
    summary = "A head that guesses the next codes of a prior, which then samples the same distribution in fewer passes."
    accepted: Tensor
    before: Tensor

    def __init__(self, *, num_codes: Given[int] = 512, grid: Given[Sequence[int]] = (7, 7), width: Given[int] = 192):
        super().__init__()
        self.num_codes, self.grid = num_codes, tuple(grid)
        self.register_buffer("accepted", torch.zeros(NUM_GUESSES))
        self.register_buffer("before", neighbours(self.grid), persistent=False)
        self.hidden = nn.Linear((1 + self.before.shape[1]) * width, 2 * width, bias=False)
        self.out = nn.Linear(2 * width, width, bias=False)
        self.target = nn.Parameter(torch.zeros(math.prod(self.grid), 2 * width))
        nn.init.normal_(self.hidden.weight, std=width**-0.5)
        nn.init.normal_(self.out.weight, std=0.02)

    @classmethod
    def of(cls, prior: RasterPrior) -> "DraftHead":
        """A head for a prior, not fitted yet."""
        return cls(num_codes=prior.num_codes, grid=prior.grid, width=prior.config.width)

    @classmethod
    def check_options(cls, options: ConfiguredOptions) -> None:
        options.put(grid=check_grid(options.grid))
        check_size(options.num_codes, "num_codes")
        check_size(options.width, "width")

    def check_loaded(self) -> None:
        if not bool(((self.accepted >= 0) & (self.accepted <= 1)).all()):
            raise ValueError(f"got accepted={self.accepted.tolist()}, expected probabilities")

    def usage_lines(self) -> list[str]:
        return ["codes = prior.sample(4, sampling=Sampling(draft=draft))  # of the prior that it was fitted to"]

    def check_fits(self, prior: object) -> None:
        """ValueError unless it is a head for such a prior."""
        sizes = (self.num_codes, self.grid, self.out.out_features)
        if not isinstance(prior, RasterPrior) or (prior.num_codes, prior.grid, prior.config.width) != sizes:
            raise ValueError(
                f"got a draft for a transformer of {self.num_codes} codes on a grid of {self.grid} with width "
                f"{sizes[2]}, expected one that `DraftHead.of` made for this {type(prior).__name__}"
            )

    def start_draft(self, prior: Any, scorer: Any, start: WalkStart) -> "HeadDraft":
        """The head at work beside a prior's scorer."""
        return HeadDraft(self, prior, scorer, start.arithmetic)

    def neighbouring(self, prior: RasterPrior, codes: Tensor, positions: Tensor) -> Tensor:
        """Vectors "b m a w" of the codes "b n" that stand before `positions` "b m" along the axes; 0 for none."""
        before = self.before[positions]
        found = scaled(prior.code.weight)[codes.gather(1, before.clamp(max=codes.shape[1] - 1).flatten(1))].unflatten(
            1, before.shape[1:]
        )
        return found.masked_fill((before == len(self.target))[..., None], 0)

    def forward(self, state: Tensor, neighbouring: Tensor, positions: Tensor) -> Tensor:
        """States "b m w" of `positions` "b m", from those of the position before each, "b m w"."""
        h = self.hidden(torch.cat((state, neighbouring.flatten(2)), -1)) + self.target[positions]
        return rms_norm(state + self.out(F.silu(h)))

    def guesses(self, prior: RasterPrior, features: Tensor, codes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """For each guess in a row its log-probabilities "b m k" and positions "b m", after every position of grids.

        Args:
            features: "b n w", from the prior's trunk.
            codes: int64 "b n".
        """
        positions = torch.arange(1, codes.shape[1], device=codes.device).expand(len(codes), -1)
        state, near = features[:, :-1], self.neighbouring(prior, codes, positions)
        for _ in range(min(NUM_GUESSES, codes.shape[1] - 1)):
            state = self(state, near, positions)
            yield widen(F.linear(state, prior.logits.weight.detach())).log_softmax(-1), positions
            state, near, positions = state[:, :-1], near[:, 1:], positions[:, 1:]


class HeadDraft:
    """A head that proposes codes, from the features that its prior's scorer found last: a `Draft`."""

    def __init__(self, head: DraftHead, prior: RasterPrior, scorer: RasterScorer, arithmetic: Arithmetic):
        maps = (head.hidden.weight, head.out.weight, prior.logits.weight)
        few = scorer.rows <= _FEW_ROWS and sum(weight.numel() for weight in maps) < _FEW_WEIGHTS
        if few and arithmetic.dtype == torch.bfloat16 and head.before.device.type == "cpu":
            arithmetic = Arithmetic(torch.float32, packed=False)
        self.head, self.scorer, self.dtype = head, scorer, arithmetic.dtype
        self.hidden, self.out, self.logits = (prepare(weight, arithmetic, scorer.rows) for weight in maps)
        table = scaled(prior.code.weight).to(self.dtype)
        self.table = torch.cat((table, torch.zeros_like(table[:1])))
        self.target = head.target.to(self.dtype)
        # Codes with one of no code behind them, for the neighbours that there are not.
        self.padded = torch.full((scorer.rows, len(head.target) + 1), head.num_codes, device=table.device)

    def __call__(self, codes: Tensor, begins: Sequence[int], at: Tensor, number: int) -> Tensor:
        if number == 0:
            self.state = self.scorer.features_before(begins).to(self.dtype)
        self.padded[:, :-1] = codes[:, : self.padded.shape[1] - 1]
        near = F.embedding(self.padded.gather(1, self.head.before[at]), self.table)
        h = self.hidden(torch.cat((self.state, near.flatten(1)), 1)).add_(self.target[at])
        self.state = rms_norm(self.state + self.out(F.silu(h, inplace=True)))
        return widen(self.logits(self.state))


def scaled(table: Tensor) -> Tensor:
    """Embeddings of unit variance."""
    table = table.detach()
    return table / table.std()


def neighbours(grid: Sequence[int]) -> Tensor:
    """For each position the ones read for it, "n a", n for none: that before it, and along each axis but the last the
    one a step back and the one after that."""
    num = math.prod(grid)
    here, stride = torch.arange(num), num
    columns = [here - 1]
    for size in grid[:-1]:
        stride //= size
        columns += [here - stride, torch.where(here >= stride, here - stride + 1, -1)]
    found = torch.stack(columns, 1)
    return torch.where((found >= 0) & (found < here[:, None]), found, num)
