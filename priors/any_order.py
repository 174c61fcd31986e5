"""A transformer over code grids in any order of their positions: it is told which position comes next.

For an order s_1 .. s_N of the positions

    x_1 = start(label) + target(s_1)
    x_i = code(z_{s_{i-1}}) + origin(s_{i-1}) + target(s_i)   ->  `priors.trunk`  ->  features_i
    ln P_s(z | label) = sum_i ln P(z_{s_i} | z_{s_1} .. z_{s_{i-1}}, label),   each log-softmax(Linear(features_i))

- Training draws an order for each grid: Pannatier et al. 2024, "sigma-GPTs: a new approach to autoregressive models",
  and Pang et al. 2024, "RandAR". `target` (in the trunk) is what RandAR gives in a token of its own before each code;
  added, it doubles no lengths. A key is rotated by the position that its code came from and a query by the position
  that it predicts (`priors.trunk`), and `origin` is a learned vector of the former.
- A share `raster_share` of the grids is trained in raster order. Yu et al. 2024, "Randomized autoregressive visual
  generation" (RAR), mix the two so, but move from random to raster orders; here the share is constant.
- Every P_s is a distribution that sums to 1. Nothing makes those of different orders equal; training makes them alike.

Known codes, wherever they stand, come first in the order; the samples after them are exact from P_s(sampled | known).

Several codes a step (`num_steps`): the positions of a step are sampled from their exact conditionals given the codes of
the steps before, independently of each other: dependence within a step is lost. After step s of S a share
1 - cos(pi s / 2S) of the positions is fixed (Chang et al. 2022, "MaskGIT"): few at first, when codes tell most about
others. Positions sampled together stand far from each other: in all steps they are taken by the size of

    frac(sum_j coordinate_j phi^-j),   phi^(axes + 1) = phi + 1

(Roberts 2018, "The unreasonable effectiveness of quasirandom sequences"): phi^-j are hard to approach by fractions, so
that two positions whose values differ little are many positions apart.

The limit `num_steps=1` samples every position from its conditional given what is known alone. MaskGIT's decoding, which
samples all positions at each step and keeps those that it is surest of, is not this: the order is settled before the
first draw.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from priors.code_embedding import CodeEmbedding, code_nats
from priors.kv_cache import CachedTrunk, cache_bytes, raster_walk
from priors.packed_linear import prepare
from priors.precision import Arithmetic
from priors.trunk import GridTrunk, check_share, initialise, widen
from priors.trunk_model import TrunkPrior
from priors.walks import Step, WalkOrder, WalkStart
from safefolder import arrays
from safefolder.arrays import Codes, Labels
from safefolder.configured import ConfiguredOptions

Order = Integer[Tensor, "*some_b n"] | Integer[np.ndarray, "*some_b n"] | Sequence[int]


class AnyOrderPrior(TrunkPrior):
    """An autoregressive transformer over a code grid, in any order of its positions.

    In training `log_prob` draws an order for each grid from torch's global generator; in evaluation it is raster order.
    An order that is given counts in both. `sample` goes with any mask, and with `Sampling(num_steps=...)` several
    codes a step.

    Beside these its options are those of `TrunkPrior` and `TrunkModel`.

    Args:
        raster_share: share of the grids that training takes in raster order; the others have an order drawn evenly.

    >>> prior = AnyOrderPrior(num_codes=512, grid=(7, 7)).eval()
    >>> codes = torch.zeros(3, 7, 7, dtype=torch.int64)
    >>> prior.log_prob(codes, order=torch.arange(48, -1, -1)).shape
    torch.Size([3])
    >>> mask = torch.zeros(7, 7, dtype=torch.bool)
    >>> mask[2:5, 2:5] = True  # sample these nine positions, and keep the others
    >>> prior.sample(3, given=codes, mask=mask).shape
    torch.Size([3, 7, 7])
    """

    def __init__(self, *, raster_share: float = 0.25, **options: Any):
        super().__init__(**options)
        width = self.config.width
        self.code = CodeEmbedding(self.num_codes, width, self.config.code_noise)
        self.origin = nn.Parameter(torch.empty(self.num_positions, width))
        self.trunk = GridTrunk(self.config, self.grid)
        self.logits = nn.Linear(width, self.num_codes, bias=False)
        initialise(self)

    @classmethod
    def check_options(cls, options: ConfiguredOptions) -> None:
        super().check_options(options)
        check_share(options.raster_share, "raster_share")

    def log_prob(
        self,
        codes: Codes,
        labels: Labels | None = None,
        order: Order | None = None,
    ) -> Float[Tensor, " b"]:
        """Log-probability of whole grids, in nats, as `Prior.log_prob`.

        `order` holds the positions, counted in raster order, as they are taken: "n" for all grids or "b n". Without it
        the order is raster order in evaluation, and drawn in training.
        Raises ValueError also for an order of another type or shape, or that is no permutation.
        """
        if order is None:
            return super().log_prob(codes, labels)
        flat = self._check_codes(codes, "codes", self.grid).flatten(1)
        return self._score(flat, self._check_labels(labels, len(flat)), self._check_order(order, len(flat)))

    def forward(
        self,
        codes: Codes,
        labels: Labels | None = None,
        order: Order | None = None,
    ) -> Float[Tensor, " b"]:
        """`log_prob`, so that wrappers of modules (Fabric, DDP, compile) see it."""
        return self.log_prob(codes, labels, order)

    def log_conditionals(
        self,
        codes: Codes,
        labels: Labels | None = None,
        order: Order | None = None,
    ) -> Float[Tensor, "b *grid k"]:
        """ln P(z_i = . | codes before i in the order) at every position i, nats, as `Prior.log_conditionals`.

        Without an order this is raster order, in training too. Raises ValueError as `log_prob` does.
        """
        if order is None:
            return super().log_conditionals(codes, labels)
        flat = self._check_codes(codes, "codes", self.grid).flatten(1)
        order = self._check_order(order, len(flat))
        conditionals = self._all_logits(flat, self._check_labels(labels, len(flat)), order).log_softmax(-1)
        return conditionals.take_along_dim(order.argsort(1)[..., None], 1).reshape(
            len(flat), *self.grid, self.num_codes
        )

    def _log_prob(self, codes: Tensor, labels: Tensor | None) -> Tensor:
        return self._score(codes, labels, self._draw_orders(codes) if self.training else None)

    def _log_conditionals(self, codes: Tensor, labels: Tensor | None) -> Tensor:
        return self._all_logits(codes, labels, None).log_softmax(-1)

    def _relaxed_log_conditionals(self, weights: Tensor, labels: Tensor | None) -> Tensor:
        vectors = self.code.mixed(weights[:, :-1]) + self.origin[:-1]
        features = self.trunk(self.start(len(weights), labels), vectors)
        return widen(self.logits(features)).log_softmax(-1)

    def _score(self, codes: Tensor, labels: Tensor | None, order: Tensor | None) -> Tensor:
        """Nats "b" of codes "b n" in an order "b n"; None is raster order."""
        targets = codes if order is None else codes.gather(1, order)
        return -code_nats(self._all_logits(codes, labels, order), targets).sum(1)

    def _all_logits(self, codes: Tensor, labels: Tensor | None, order: Tensor | None) -> Tensor:
        """Logits "b n k" of all positions, in their order."""
        ordered, origin = (codes, self.origin) if order is None else (codes.gather(1, order), self.origin[order])
        vectors = self.code(ordered[:, :-1]) + origin[..., :-1, :]
        return widen(self.logits(self.trunk(self.start(len(codes), labels), vectors, order)))

    def _draw_orders(self, codes: Tensor) -> Tensor:
        """Orders "b n" of training."""
        orders = torch.rand(codes.shape, dtype=torch.float32, device=codes.device).argsort(1)
        raster = torch.rand(len(codes), 1, dtype=torch.float32, device=codes.device) < self.config.raster_share
        return torch.where(raster, torch.arange(codes.shape[1], device=codes.device), orders)

    def _check_order(self, order: Order, num: int) -> Tensor:
        """The order as int64 "b n"."""
        expected = f"integers of shape ({self.num_positions},) or ({num}, {self.num_positions})"
        order = arrays.integers(order, "an order", self.device, expected)
        if tuple(order.shape) not in ((self.num_positions,), (num, self.num_positions)):
            raise ValueError(f"got an order of {order.dtype} {tuple(order.shape)}, expected {expected}")
        order = order.to(self.device).expand(num, -1)
        positions = torch.arange(self.num_positions, device=self.device)
        if not torch.compiler.is_compiling() and bool((order.sort(1).values != positions).any()):
            raise ValueError(
                f"got an order that is no permutation, expected each of 0 to {self.num_positions - 1} once"
            )
        return order

    def _walk_order(self, known: Tensor, kept: Tensor, num_steps: int | None) -> WalkOrder:
        """Known positions first, then the others: in raster order one by one, or spread out in `num_steps` steps."""
        if num_steps is None and not bool((kept[:, 1:] & ~kept[:, :-1]).any()):
            return super()._walk_order(known, kept, None)
        num_before = int(kept.sum(1).min()) if len(kept) else 0
        num_drawn = self.num_positions - num_before
        positions = torch.arange(self.num_positions, device=kept.device)
        if num_steps is None:
            sizes, ranks = (1,) * num_drawn, positions
        else:
            sizes, ranks = cosine_sizes(num_drawn, num_steps), spread_ranks(self.grid).to(kept.device)
            if max(sizes, default=1) > 1 and len(kept.sum(1).unique()) > 1:
                raise ValueError(
                    f"got num_steps={num_steps} and masks of different sizes, expected one size: what one grid keeps "
                    "would be fixed in the same step as what another samples; call once for each size"
                )
        order = torch.where(kept, positions, self.num_positions + ranks).argsort(1)
        return WalkOrder(known, kept, num_before, order, sizes)

    def _start_walk(self, start: WalkStart) -> Step:
        token = self.start(start.num, start.labels)
        to_logits = prepare(self.logits.weight, start.arithmetic, start.num)
        if start.order is not None:
            advance = self._walk_in_order(token, start)
            return lambda fixed: widen(to_logits(advance(fixed))).log_softmax(-1)
        next_features, position = raster_walk(self.trunk, token, start.arithmetic), 0

        def step(fixed: Tensor) -> Tensor:
            nonlocal position
            begin, position = position, position + fixed.shape[1]
            features = next_features(self.code(fixed) + self.origin[begin:position])
            return widen(to_logits(features)).log_softmax(-1)[:, None]

        return step

    def _walk_in_order(self, token: Tensor, start: WalkStart) -> Step:
        """As a `Step`, but features "b m w" in place of log-probabilities.

        A step reads the codes fixed last: each but the last of them leads to the position after it, which is known by
        now (the chain), and the last leads to every position of the step (the probes). A probe sees the chain and
        itself. The first is the chain's next link and stays in the cache; others are overwritten: it holds
        `num_positions` at most.
        """
        order, sizes = start.order, start.sizes
        assert order is not None
        assert sizes is not None
        cached = CachedTrunk(self.trunk.trunk, start.num, self.num_positions, start.arithmetic)
        rotary, remaining, kept, done = self.trunk.rotary(token, order), iter(sizes), 0, 0  # inputs kept, codes fixed

        def advance(fixed: Tensor) -> Tensor:
            nonlocal kept, done
            begin, done, num_probes = done, done + fixed.shape[1], next(remaining)
            vectors = self.code(fixed) + self.origin[order[:, begin:done]]
            if kept == 0:
                vectors = torch.cat((token[:, None], vectors), 1)
            chain, here, kept = done - kept, slice(kept, done + num_probes), done + 1
            probes = vectors[:, -1:].expand(-1, num_probes, -1)
            x = torch.cat((vectors[:, :-1], probes), 1) + self.trunk.target[order[:, here]]
            if num_probes == 1:
                return cached(x, rotary[:, here])[:, chain:]
            rotated = rotary[:, here].clone()
            rotated[:, chain:, 1] = rotary[:, done : done + 1, 1]  # every probe holds the same code
            visible = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
            visible[chain:, chain:] = torch.eye(num_probes, dtype=torch.bool, device=x.device)
            return cached(x, rotated, visible, chain + 1)[:, chain:]

        return advance

    def walk_bytes(self, arithmetic: Arithmetic, num_inputs: int = 1) -> int:
        return cache_bytes(self.trunk.trunk, self.num_positions, arithmetic, num_inputs)


def cosine_sizes(num_positions: int, num_steps: int) -> tuple[int, ...]:
    """How many of the positions each step fixes, at least one: 1 - cos(pi s / 2S) of them after step s of S, rounded.

    Raises ValueError unless there is a position for each step.
    """
    most = max(num_positions, 1)  # one step of nothing is no mistake, where everything is known
    if not isinstance(num_steps, numbers.Integral) or isinstance(num_steps, bool) or not 1 <= num_steps <= most:
        raise ValueError(
            f"got num_steps={num_steps!r}, expected an integer from 1 to {most}, "
            f"with {num_positions} positions to sample"
        )
    if num_positions == 0:
        return ()
    sizes: list[int] = []
    for step in range(1, num_steps + 1):
        wanted = round(num_positions * (1 - math.cos(math.pi / 2 * step / num_steps))) - sum(sizes)
        # At least one for this step, and one left for each that is to come.
        sizes.append(min(max(wanted, 1), num_positions - sum(sizes) - (num_steps - step)))
    return tuple(sorted(sizes))  # rounding may have put a 3 before a 2


def spread_ranks(grid: Sequence[int]) -> Tensor:
    """When each position "n" of a grid is taken, if those taken in a row are to stand far from each other."""
    phi = 2.0
    for _ in range(64):
        phi = (1 + phi) ** (1 / (len(grid) + 1))
    values = torch.zeros(tuple(grid), dtype=torch.float64, device="cpu")
    for j, size in enumerate(grid):
        along = torch.arange(size, dtype=torch.float32, device="cpu") * phi ** -(j + 1)
        values += along.reshape(-1, *[1] * (len(grid) - 1 - j))
    return values.frac().flatten().argsort().argsort()
