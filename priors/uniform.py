"""The uniform prior: every grid is as likely as any other.

    ln P(z) = -N ln K,   N positions, K codes

The rate of a code stream that is stored without any model, and the bar under every other prior.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from priors.base import Prior
from priors.walks import Step, WalkStart
from safefolder.options import Given


class UniformPrior(Prior):
    """-N ln K nats for every grid. `UniformPrior(num_codes=512, grid=(7, 7))`."""

    def __init__(self, *, num_codes: Given[int] = 512, grid: Given[Sequence[int]] = (7, 7)):
        super().__init__(num_codes=num_codes, grid=grid)

    def _log_prob(self, codes: Tensor, labels: Tensor | None) -> Tensor:
        nats = -self.num_positions * math.log(self.num_codes)
        return torch.full((len(codes),), nats, dtype=self.dtype, device=codes.device)

    def _log_conditionals(self, codes: Tensor, labels: Tensor | None) -> Tensor:
        nats = codes.new_tensor(-math.log(self.num_codes), dtype=self.dtype)
        return nats.expand(*codes.shape, self.num_codes)

    def _relaxed_log_conditionals(self, weights: Tensor, labels: Tensor | None) -> Tensor:
        return weights.new_tensor(-math.log(self.num_codes)).expand_as(weights)

    def _start_walk(self, start: WalkStart) -> Step:
        nats = -math.log(self.num_codes)
        log_probs = torch.full((start.num, 1, self.num_codes), nats, dtype=self.dtype, device=self.device)
        return lambda fixed: log_probs
