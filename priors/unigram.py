"""The unigram prior: positions are independent and share one histogram of codes.

    ln P(z) = sum_i ln theta_{z_i},   theta_k = (n_k + 1/2) / (n + K/2)

with n_k the count of code k among the n codes seen. The half is the estimator of Krichevsky &
Trofimov 1981, "The performance of universal encoding", extended to K symbols: the mean of theta
under a Dirichlet(1/2, .., 1/2) prior. No code gets probability 0, and before any fit it is the
uniform prior.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from priors.base import Prior
from priors.walks import Step, WalkStart
from safefolder.arrays import Codes
from safefolder.options import Given


class UnigramPrior(Prior):
    """The code histogram. `UnigramPrior(num_codes=512, grid=(7, 7))`, then `fit(codes)`.

    Attributes: `counts` int64 "k", how often each code was seen.
    """

    counts: Tensor

    def __init__(self, *, num_codes: Given[int] = 512, grid: Given[Sequence[int]] = (7, 7)):
        super().__init__(num_codes=num_codes, grid=grid)
        self.register_buffer("counts", torch.zeros(num_codes, dtype=torch.int64))

    def fit(self, codes: Codes) -> "UnigramPrior":
        """Add the codes to the counts; call it once a batch. Returns the prior itself."""
        codes = self._check_codes(codes, "codes", self.grid)
        self.counts += torch.bincount(codes.flatten(), minlength=self.num_codes)
        return self

    def _code_log_probs(self) -> Tensor:
        counts = self.counts.to(self.dtype) + 0.5
        return counts.log() - counts.sum().log()

    def _log_prob(self, codes: Tensor, labels: Tensor | None) -> Tensor:
        return self._code_log_probs()[codes].sum(1)

    def _log_conditionals(self, codes: Tensor, labels: Tensor | None) -> Tensor:
        return self._code_log_probs().expand(*codes.shape, -1)

    def _relaxed_log_conditionals(self, weights: Tensor, labels: Tensor | None) -> Tensor:
        return self._code_log_probs().expand_as(weights)

    def _start_walk(self, start: WalkStart) -> Step:
        log_probs = self._code_log_probs().expand(start.num, 1, -1)
        return lambda fixed: log_probs
