"""What priors that take a grid in raster order, one code a step, through one causal trunk have in common.

    x_1 = start(label),  x_i = code(z_{i-1})  ->  trunk  ->  features_i
    ln P(z_i | before, label) = log-softmax(Linear(features_i))

The trunk is what tells them apart. For relaxed codes (`relaxed_log_conditionals`) the input is the mixture
sum_k w_{i-1,k} code(k). Log-softmax is in float32 or better under any autocast.
"""

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from priors.code_embedding import CodeEmbedding, code_nats
from priors.kv_cache import cache_bytes, raster_walk
from priors.packed_linear import prepare
from priors.precision import Arithmetic
from priors.trunk import GridTrunk, SequenceTrunk, initialise, widen
from priors.trunk_model import TrunkPrior
from priors.walks import Step, WalkStart


class RasterPrior(TrunkPrior):
    """Abstract: start token, code embedding, a trunk, and logits."""

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

    def _relaxed_log_conditionals(self, weights: Tensor, labels: Tensor | None) -> Tensor:
        return self._all_logits(self.code.mixed(weights[:, :-1]), labels).log_softmax(-1)

    def _all_logits(self, embedded: Tensor, labels: Tensor | None) -> Tensor:
        """Logits "b n k" of every position, from the embedded codes "b n-1 w" of all but the last."""
        return widen(self.logits(self.trunk(self.start(len(embedded), labels), embedded)))

    def _start_walk(self, start: WalkStart) -> Step:
        advance = raster_walk(self.trunk, self.start(start.num, start.labels), start.arithmetic)
        to_logits = prepare(self.logits.weight, start.arithmetic, start.num)
        return lambda fixed: widen(to_logits(advance(self.code(fixed)))).log_softmax(-1)[:, None]

    def walk_bytes(self, arithmetic: Arithmetic, num_inputs: int = 1) -> int:
        return cache_bytes(self.trunk.trunk, self.num_positions, arithmetic, num_inputs)
