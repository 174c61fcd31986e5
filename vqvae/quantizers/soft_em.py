"""Soft EM: a codebook of moving averages whose vectors are shared among codes that are sampled.

Roy, Vaswani, Neelakantan & Parmar 2018, "Theory and Experiments on Vector Quantized Autoencoders". In training each
vector samples m codes k_1 … k_m, a Monte-Carlo E-step, and counts 1/m towards each of them:

    draws       P(k|z) = softmax_k(−‖z − e_k‖²/2σ²),   with replacement        output   z_q = 1/m Σ_i e_{k_i}
    statistics  n_k += #{i: k_i = k}/m,   Σz_k += z · #{i: k_i = k}/m          for `vqvae.quantizers.ema`
    terms       commitment_weight · mse(z_e, sg z_q)

In evaluation the code is the nearest one, which is what a prior is trained on. The quantizer is thus deterministic: its
entropy is zero and its bound an exact code length. In training z_q is no code's vector, and `codes` are the nearest
ones, as for a relaxed sample. Its gradient goes straight through to z_e. As σ² → 0 this is `EMAVectorQuantizer`, hard
EM.

The paper writes −‖z − e_k‖² without a spread, so σ² = ½, whatever the scale of the features. Draws depend on that
scale: over distances far below σ² they are even and pull all codes to one mean, over distances far above it they are
the nearest codes. Draws come from torch's global generator; no N x K matrix is held (`vqvae.quantizers.soft`).

Departures: those of `vqvae.quantizers.vector`, and the argument σ².
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from vqvae.quantizers.codebook import Revival
from vqvae.quantizers.ema import EMAVectorQuantizer
from vqvae.quantizers.soft import CHUNK_ELEMENTS


class SoftEMVectorQuantizer(EMAVectorQuantizer):
    """Vector quantisation whose codes are moving averages of the vectors that sampled them.

    Args:
        num_samples: m, codes sampled for each vector in training.
        variance: σ² of the draws, in the square of the features' unit; ½ is the paper.
        num_codes, dim, decay, commitment_weight, revival: as in `EMAVectorQuantizer`.
    """

    def __init__(
        self,
        *,
        num_codes: int = 512,
        dim: int = 64,
        num_samples: int = 10,
        variance: float = 0.5,
        decay: float = 0.99,
        commitment_weight: float = 0.25,
        revival: Revival = "dead",
    ):
        super().__init__(
            num_codes=num_codes,
            dim=dim,
            decay=decay,
            commitment_weight=commitment_weight,
            normalize=False,
            rotation=False,
            revival=revival,
        )
        if num_samples < 1 or not 0 < variance < float("inf"):
            raise ValueError(
                f"expected at least one sample and a finite variance above zero, got num_samples={num_samples}, "
                f"variance={variance}; a variance near zero is the EMAVectorQuantizer"
            )
        self.num_samples = num_samples
        self.variance = variance

    @torch.no_grad()
    def e_step(self, vectors: Tensor, table: Tensor) -> Tensor:
        # Distances to the codes' mean are as good, and lose less to rounding.
        centre = table.mean(0)
        table = table - centre
        bias = table.square().sum(1) / 2
        # Written in place: draws kept one by one between the chunks' matrices would leave the heap full of holes.
        found = torch.empty(len(vectors), self.num_samples, dtype=torch.int64, device=vectors.device)
        size = max(1, CHUNK_ELEMENTS // self.num_codes)
        for chunk, sampled in zip(vectors.split(size), found.split(size), strict=True):
            # Of −‖z − e‖²/2 the part −‖z‖²/2 is the same for all codes; the largest first, so that none overflows.
            scores = (chunk - centre) @ table.T - bias
            logits = (scores - scores.amax(-1, keepdim=True)) / self.variance
            sampled.copy_(torch.multinomial(F.softmax(logits, dim=-1), self.num_samples, replacement=True))
        return found
