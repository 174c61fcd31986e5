"""Binary spherical quantisation: a code is the signs of a unit vector; up to 2^62 codes, none of them listed.

Zhao et al. 2024, "Image and Video Tokenization with Binary Spherical Quantization". With u = z/‖z‖ and d bits,

    z_q = sign(u)/√d (a zero counts as −1), again a unit vector
    terms      entropy_weight · (E_z[H(p(·|u))] + Σ_g [d_g ln 2 − H(E_z[p(bits of g|u)])]),   p(bit i|u) = σ(4 u_i/(√d
    τ))

Given u the bits are independent, so the first entropy is a sum over bits. That of the mean distribution is taken over
groups g of at most 12 neighbouring bits (the authors' code has 9), each exactly; the sum over groups is an upper bound
of the whole's, in which groups may still depend on each other. The length of z is bounded by the sphere, so no
commitment is needed. The shift by ln 2 a bit makes the term zero at its best. Over several processes E is over each
one's own batch.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vqvae.quantizers.binary import average_codes, check_bits, pack_bits, per_sample_entropy, unpack_signs
from vqvae.quantizers.estimators import straight_through
from vqvae.quantizers.positionwise import Assignment, PositionwiseQuantizer, none_is_zero
from vqvae.quantizers.soft import entropy_of

GROUP = 12


class BSQ(PositionwiseQuantizer):
    """Binary spherical quantisation.

        q = BSQ(num_bits=36)(z_e)      # z_e: "b *grid 36"; 2^36 codes

    Args:
        num_bits: channels; 2^num_bits codes. At most 62, so that a code is an int64.
        entropy_weight: of both entropy terms; 0.1 in the paper.
        temperature: τ of the soft assignment in the entropy terms; at 1 (as in the paper) it is too soft to spread few
            bits in short training.
    """

    remedy = "raise entropy_weight, or use fewer bits"
    estimator = staticmethod(straight_through)

    def __init__(self, *, num_bits: int = 18, entropy_weight: float = 0.1, temperature: float = 0.1):
        check_bits(num_bits, 62, "a code is an int64; GroupedQuantizer gives a position several codes")
        if temperature <= 0:
            raise ValueError(f"expected a temperature above 0, got {temperature}")
        super().__init__(num_codes=2**num_bits, dim=num_bits)
        self.entropy_weight = entropy_weight
        self.temperature = temperature

    def project(self, z_e: Tensor) -> Tensor:
        return F.normalize(z_e, dim=-1)

    def residual_scale(self) -> float:
        return 0.5

    def assign(self, vectors: Tensor, valid: Tensor | None) -> Assignment:
        codes = pack_bits(vectors.detach() > 0)
        logits = 4 * vectors / (self.dim**0.5 * self.temperature)
        groups = [entropy_of(average_codes(group, valid)) for group in logits.chunk(-(-self.dim // GROUP), dim=-1)]
        deficit = none_is_zero(self.dim * math.log(2) - torch.stack(groups).sum(), vectors, valid)
        terms = {
            "per_sample_entropy": self.entropy_weight * per_sample_entropy(logits, valid),
            "codebook_entropy_deficit": self.entropy_weight * deficit,
        }
        return Assignment(self.vectors_of(codes), codes, terms)

    def vectors_of(self, codes: Tensor) -> Tensor:
        return unpack_signs(codes, self.dim, self.dtype) / self.dim**0.5
