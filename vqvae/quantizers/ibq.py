"""Index backpropagation: straight-through on the choice among all codes, so that every code has a gradient.

Shi et al. 2024, "Scalable Image Tokenization with Index Backpropagation Quantization". With p = softmax(C z) and 1_k
the one-hot vector of its largest entry,

    z_q = (1_k + p − sg p) C        value: the chosen code;  gradient: to p, and by it to z and to all of C
    terms      mse(z_q, z)  +  mse(sg e_k, z)  +  commitment_weight · mse(e_k, sg z)
               +  entropy_weight · (E_z[H(p_τ)] + [ln K − H(E_z[p_τ])]),     p_τ = softmax(C z / τ)

The weight of 0.25 is on the codebook's term, as the authors have it. The last bracket is their −H(E p) shifted to be
zero at its best. Similarity is the inner product. Softmaxes over all codes are held chunk by chunk
(`vqvae.quantizers.soft`). Over several processes E is over each one's own batch.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqvae.quantizers.nearest_search import nearest
from vqvae.quantizers.positionwise import Assignment, PositionwiseQuantizer, counted, masked_mean, none_is_zero
from vqvae.quantizers.soft import entropy_of, in_chunks

TEMPERATURE = 0.01


class IBQ(PositionwiseQuantizer):
    """Index backpropagation quantisation.

    Args:
        commitment_weight: of `mse(e_k, sg z)`; 0.25 in the paper.
        entropy_weight: of both entropy terms; 0.05 in the paper.
    """

    remedy = "raise entropy_weight"

    def __init__(
        self, *, num_codes: int = 512, dim: int = 64, commitment_weight: float = 0.25, entropy_weight: float = 0.05
    ):
        super().__init__(num_codes=num_codes, dim=dim)
        self.commitment_weight = commitment_weight
        self.entropy_weight = entropy_weight
        self.codebook = nn.Parameter(torch.randn(num_codes, dim) * dim**-0.5)

    @property
    def table(self) -> Tensor:
        return self.codebook.to(self.dtype)

    def assign(self, vectors: Tensor, valid: Tensor | None) -> Assignment:
        table = self.table
        codes = nearest(vectors, table, table.new_zeros(self.num_codes))
        weights = counted(vectors, valid)
        parts = in_chunks(_soft, (vectors, weights), (table,), self.num_codes)
        soft = torch.cat([part[0] for part in parts])
        entropies = torch.cat([part[1] for part in parts])
        average = torch.stack([part[2] for part in parts]).sum(0) / weights.sum().clamp_min(1)
        hard = table[codes]
        chosen = hard + (soft - soft.detach())
        deficit = none_is_zero(math.log(self.num_codes) - entropy_of(average), vectors, valid)
        terms = {
            "alignment": masked_mean((chosen - vectors).square(), valid),
            "commitment": masked_mean((hard.detach() - vectors).square(), valid),
            "codebook": self.commitment_weight * masked_mean((hard - vectors.detach()).square(), valid),
            "per_sample_entropy": self.entropy_weight * masked_mean(entropies, valid),
            "codebook_entropy_deficit": self.entropy_weight * deficit,
        }
        return Assignment(chosen, codes, terms)

    def vectors_of(self, codes: Tensor) -> Tensor:
        return self.table[codes]


def _soft(vectors: Tensor, weights: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For a chunk: p C with C held constant, the entropies of p_τ, and the weighted sum of p_τ over vectors."""
    logits = vectors @ table.T
    sharp = F.softmax(logits / TEMPERATURE, dim=-1)
    return F.softmax(logits, dim=-1) @ table.detach(), entropy_of(sharp), weights @ sharp
