"""What priors that take a grid in raster order, one code a step, through one causal trunk have in common.

    x_1 = start(label),  x_i = code(z_{i-1})  ->  trunk  ->  features_i
    ln P(z_i | before, label) = log-softmax(Linear(features_i))

The trunk is what tells them apart. For relaxed codes (`relaxed_log_conditionals`) the input is the mixture
sum_k w_{i-1,k} code(k). Log-softmax is in float32 or better under any autocast.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from priors.code_embedding import CodeEmbedding, code_nats
from priors.kv_cache import CachedTrunk, cache_bytes, raster_walk
from priors.packed_linear import prepare
from priors.precision import Arithmetic
from priors.trunk import GridTrunk, SequenceTrunk, initialise, widen
from priors.trunk_model import TrunkPrior
from priors.walks import Step, WalkStart
from safefolder.arrays import Codes, Labels


class RasterPrior(TrunkPrior):
    """Abstract: start token, code embedding, a trunk, and logits."""

    can_skip = True

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.code = CodeEmbedding(self.num_codes, self.config.width, self.config.code_noise)
        self.trunk = self.make_trunk()
        self.logits = nn.Linear(self.config.width, self.num_codes, bias=False)
        initialise(self)

    @abstractmethod
    def make_trunk(self) -> GridTrunk | SequenceTrunk:
        """The trunk, with fresh weights."""

    def _log_prob(self, codes: Tensor, labels: Tensor | None) -> Tensor:
        return -code_nats(self._all_logits(self.code(codes[:, :-1]), labels), codes).sum(1)

    def _log_conditionals(self, codes: Tensor, labels: Tensor | None) -> Tensor:
        return self._all_logits(self.code(codes[:, :-1]), labels).log_softmax(-1)

    def features_and_conditionals(self, codes: Codes, labels: Labels | None = None) -> tuple[Tensor, Tensor]:
        """Of all positions of grids, "b *grid", the trunk's features "b n w", and `log_conditionals`, "b n k"."""
        codes = self._check_codes(codes, "codes", self.grid).flatten(1)
        start = self.start(len(codes), self._check_labels(labels, len(codes)))
        features = self.trunk(start, self.code(codes[:, :-1]))
        return features, widen(self.logits(features)).log_softmax(-1)

    def _relaxed_log_conditionals(self, weights: Tensor, labels: Tensor | None) -> Tensor:
        return self._all_logits(self.code.mixed(weights[:, :-1]), labels).log_softmax(-1)

    def _all_logits(self, embedded: Tensor, labels: Tensor | None) -> Tensor:
        """Logits "b n k" of every position, from the embedded codes "b n-1 w" of all but the last."""
        return widen(self.logits(self.trunk(self.start(len(embedded), labels), embedded)))

    def _start_walk(self, start: WalkStart) -> Step:
        advance = raster_walk(self.trunk, self.start(start.num, start.labels), start.arithmetic, start.skipped)
        to_logits = prepare(self.logits.weight, start.arithmetic, start.num)
        return lambda fixed: widen(to_logits(advance(self.code(fixed)))).log_softmax(-1)[:, None]

    def _start_scorer(self, start: WalkStart, most: int) -> "RasterScorer":
        return RasterScorer(self, start, most)

    def walk_bytes(self, arithmetic: Arithmetic, num_inputs: int = 1) -> int:
        return cache_bytes(self.trunk.trunk, self.num_positions, arithmetic, num_inputs)


class RasterScorer:
    """A `Scorer` that keeps keys and values, also of proposals until others stand in their place.

    Attributes: `rows`, of its cache.
    """

    def __init__(self, prior: RasterPrior, start: WalkStart, most: int):
        """`most`: positions asked for at once, at most."""
        self.prior, self.rows, self.skipped = prior, start.num, start.skipped
        self.tokens = prior.start(start.num, start.labels)
        self.rotary = prior.trunk.rotary(self.tokens)
        # As many behind the grid's end as a stretch may stick out.
        self.cached = CachedTrunk(prior.trunk.trunk, start.num, prior.num_positions + most, start.arithmetic)
        self.to_logits = prepare(prior.logits.weight, start.arithmetic, start.num)
        self.features: Tensor | None = None
        self.begins: list[int] = []

    def __call__(self, codes: Tensor, begins: Sequence[int], at: Tensor) -> Tensor:
        if self.features is None and (known := max(begins)) > self.skipped:
            # All that is known before; of rows that begin earlier what is not is written over later.
            self._featured(codes, [0] * self.rows, torch.arange(known, device=at.device).expand(self.rows, -1))
        self.features, self.begins = self._featured(codes, begins, at), list(begins)
        return widen(self.to_logits(self.features.flatten(0, 1))).unflatten(0, at.shape)

    def features_before(self, begins: Sequence[int]) -> Tensor:
        """The features "b w" of the position before each of `begins`, which the last call was about."""
        assert self.features is not None
        at = [begin - 1 - first for begin, first in zip(begins, self.begins, strict=True)]
        return torch.stack([features[i] for features, i in zip(self.features, at, strict=True)])

    def _featured(self, codes: Tensor, begins: Sequence[int], at: Tensor) -> Tensor:
        trunk, first, num = self.prior.trunk, begins[0], at.shape[1]
        alike = first + num <= trunk.num_positions and all(begin == first for begin in begins)
        # Parts of one piece, where it is one, take fewer and cheaper calls.
        here = slice(first, first + num) if alike else at
        if not alike or first == 0:
            vectors = self.prior.code(codes.gather(1, (at - 1).clamp(min=0)))
            vectors = torch.where((at == 0)[..., None], self.tokens[:, None], vectors)
        else:
            vectors = self.prior.code(codes[:, first - 1 : first + num - 1])
        return self.cached.from_positions(trunk.inputs(vectors, here), self.rotary[here], begins)
