"""Vector quantisation with a codebook of moving averages.

van den Oord et al. 2017, "Neural Discrete Representation Learning" (appendix A.1); Razavi et al. 2019, "Generating
Diverse High-Fidelity Images with VQ-VAE-2". Hard EM: a vector counts towards its nearest code k. With n the counts and
Σz the sums of the vectors that each code got in a step of the optimiser:

    N ← γN + (1−γ)n      m ← γm + (1−γ)Σz      e = m / N̂      N̂_k = (N_k + ε) / (ΣN + Kε) · ΣN
    terms      commitment_weight · mse(z_e, sg e_k)

Departures: those of `vqvae.quantizers.vector`. `vqvae.quantizers.soft_em` gives vectors to codes in parts.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vqvae.quantizers.codebook import CodebookQuantizer


class EMAVectorQuantizer(CodebookQuantizer):
    """Vector quantisation whose codes are moving averages of the vectors that chose them.

        q = EMAVectorQuantizer(num_codes=1024, dim=64)(z_e)     # z_e: "b *grid 64"

    Beside these its options are those of `CodebookQuantizer`.

    Args:
        decay: γ; 0.99 in the paper. Applied once per call of `update`.
    """

    EPSILON = 1e-5

    def __init__(self, *, decay: float = 0.99, **codebook: Any):
        super().__init__(**codebook)
        if not 0 <= decay < 1:
            raise ValueError(f"expected a decay in [0, 1), got {decay}")
        self.decay = decay
        bound = 1 / self.num_codes
        self.register_buffer("codebook", torch.empty(self.num_codes, self.dim).uniform_(-bound, bound))
        self.register_buffer("counts", torch.ones(self.num_codes))
        self.register_buffer("sums", self.codebook.clone())

    def learn(self, counts: Tensor, sums: Tensor) -> None:
        self.counts.lerp_(counts.to(self.counts), 1 - self.decay)
        self.sums.lerp_(sums.to(self.sums), 1 - self.decay)
        total = self.counts.sum()
        smoothed = (self.counts + self.EPSILON) / (total + self.num_codes * self.EPSILON) * total
        self.codebook.copy_(self.sums / smoothed[:, None])

    def reset_codes(
        self, weights: Float[Tensor, " k"], vectors: Float[Tensor, "k d"], share: Float[Tensor, ""]
    ) -> None:
        weights = weights.to(self.codebook)
        self.codebook.lerp_(vectors.to(self.codebook), weights[:, None])
        self.counts.lerp_(share.to(self.counts).expand_as(self.counts), weights)
        moved = weights > 0  # a code that stays keeps its sums to the bit
        self.sums.copy_(torch.where(moved[:, None], self.codebook * self.counts[:, None], self.sums))
