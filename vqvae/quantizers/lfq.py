"""Lookup-free quantisation: a code is the signs of the features.

Yu et al. 2023, "Language Model Beats Diffusion - Tokenizer is Key to Visual Generation" (MAGVIT-v2). With
p(c | z) ∝ exp(−‖z − c‖²/τ) over the 2^d corners c of the cube,

    z_q = sign(z) in {−1, 1}^d (a zero counts as −1)
    terms      commitment_weight · mse(z, sg z_q)  +  entropy_weight · (E_z[H(p(·|z))] + [d ln 2 − H(E_z[p(·|z)])])

so vectors are pushed towards a corner each, and all corners are used evenly. The second bracket is the paper's −H(E p)
shifted to be zero at its best. Both entropies are exact: given z the bits are independent, so the first is a sum over
bits, and the mean distribution is a product of two halves (`vqvae.quantizers.binary`). Bits are numbered from the first
channel (lowest) on; some libraries number them from the last. Over several processes E is over each one's own batch.
"""

import math

from torch import Tensor

from vqvae.quantizers.binary import average_codes, check_bits, pack_bits, per_sample_entropy, unpack_signs
from vqvae.quantizers.estimators import straight_through
from vqvae.quantizers.positionwise import Assignment, PositionwiseQuantizer, masked_mean, none_is_zero
from vqvae.quantizers.soft import entropy_of

TEMPERATURE = 0.01


class LFQ(PositionwiseQuantizer):
    """Lookup-free quantisation.

        q = LFQ(num_bits=10)(z_e)      # z_e: "b *grid 10"; 1,024 codes

    Args:
        num_bits: channels; 2^num_bits codes. At most 20, since the mean distribution over codes is listed.
        commitment_weight: of `mse(z_e, sg z_q)`; 0.25 in the paper.
        entropy_weight: of both entropy terms; 0.1 in the paper.
    """

    remedy = "raise entropy_weight, or use fewer bits"
    estimator = staticmethod(straight_through)

    def __init__(self, *, num_bits: int = 10, commitment_weight: float = 0.25, entropy_weight: float = 0.1):
        check_bits(num_bits, 20, "the entropy term lists every code; BSQ does without such a list")
        super().__init__(num_codes=2**num_bits, dim=num_bits)
        self.commitment_weight = commitment_weight
        self.entropy_weight = entropy_weight

    def residual_scale(self) -> float:
        return 0.5

    def assign(self, vectors: Tensor, valid: Tensor | None) -> Assignment:
        codes = pack_bits(vectors.detach() > 0)
        chosen = self.vectors_of(codes)
        logits = 4 * vectors / TEMPERATURE  # the squared distances to a bit's two values differ by 4z
        deficit = none_is_zero(self.dim * math.log(2) - entropy_of(average_codes(logits, valid)), vectors, valid)
        terms = {
            "commitment": self.commitment_weight * masked_mean((vectors - chosen).square(), valid),
            "per_sample_entropy": self.entropy_weight * per_sample_entropy(logits, valid),
            "codebook_entropy_deficit": self.entropy_weight * deficit,
        }
        return Assignment(chosen, codes, terms)

    def vectors_of(self, codes: Tensor) -> Tensor:
        return unpack_signs(codes, self.dim, self.dtype)
