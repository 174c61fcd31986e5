"""Finite scalar quantisation: each channel squashed into a box and rounded to a few levels; no codebook.

Mentzer et al. 2023, "Finite Scalar Quantization: VQ-VAE Made Simple". For L levels of a channel,

    h = (L − 1)(1 + ε)/2     o = ½ for even L, else 0     f(z) = tanh(z + atanh(o/h)) · h − o
    z_q = round(f(z)) / ⌊L/2⌋, in [−1, 1]                  gradient: straight through the rounding

A code is the number whose digits are the channels' levels, the first channel's digit being the lowest. Levels that the
paper recommends: [8, 6, 5] for 2^8 codes, [8, 5, 5, 5] for 2^10, [7, 5, 5, 5, 5] for 2^12, [8, 8, 8, 6, 5] for 2^14 and
[8, 8, 8, 5, 5, 5] for 2^16.

No codebook moves to where features are, so usage grows only as fast as the encoder learns to fill the box: of 2^14
codes on colour images of 32x32, trainings of 2,000, 4,000 and 12,000 steps of 32 images use 85, 91 and 94 %, while
distortion still falls (width 32, one seed; that of 4,000 is in benchmarks/README.md). With an encoder whose features
start white in the box it was 76 % after 2,000.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vqvae.quantizers.estimators import straight_through
from vqvae.quantizers.positionwise import Assignment, PositionwiseQuantizer

# ε: a tanh never reaches 1, so the box is a little larger than its outermost levels.
MARGIN = 1e-3


class FSQ(PositionwiseQuantizer):
    """Finite scalar quantisation.

        q = FSQ(levels=(8, 5, 5, 5))(z_e)      # z_e: "b *grid 4"; 1,000 codes

    Args:
        levels: of each channel, at least 2; their number is `dim`, their product `num_codes`.
    """

    remedy = "use fewer levels, or look at the scale of the features, which should reach beyond ±1"
    estimator = staticmethod(straight_through)

    def __init__(self, *, levels: Sequence[int] = (8, 5, 5, 5)):
        if not levels or min(levels) < 2 or math.prod(levels) >= 2**63:
            raise ValueError(f"expected at least 2 levels a channel and fewer than 2^63 codes, got {levels}")
        super().__init__(num_codes=math.prod(levels), dim=len(levels))
        self.levels = levels
        bases = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("sizes", torch.tensor(levels), persistent=False)
        self.register_buffer("bases", torch.tensor(bases), persistent=False)

    def project(self, z_e: Tensor) -> Tensor:
        sizes = self.sizes.to(z_e.dtype)
        half = (sizes - 1) * (1 + MARGIN) / 2
        offset = (1 - sizes % 2) / 2
        return (torch.tanh(z_e + torch.atanh(offset / half)) * half - offset) / (self.sizes // 2)

    def residual_scale(self) -> Tensor:
        # What rounding leaves of a channel is one level wide: the next step lays all of its levels into that.
        return 1 / (self.sizes - 1).to(torch.float32)

    def assign(self, vectors: Tensor, valid: Tensor | None) -> Assignment:
        digits = (vectors.detach() * (self.sizes // 2)).round().to(torch.int64) + self.sizes // 2
        codes = (digits.clamp_min(0).minimum(self.sizes - 1) * self.bases).sum(-1)
        return Assignment(self.vectors_of(codes), codes, {})

    def vectors_of(self, codes: Tensor) -> Tensor:
        digits = codes[..., None] // self.bases % self.sizes
        return (digits - self.sizes // 2).to(self.dtype) / (self.sizes // 2)

    def extra_repr(self) -> str:
        return f"levels={self.levels}, num_codes={self.num_codes}"
