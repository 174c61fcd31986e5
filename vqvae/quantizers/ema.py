"""Vector quantisation with a codebook of moving averages.

van den Oord et al. 2017, "Neural Discrete Representation Learning" (appendix A.1); Razavi et al. 2019, "Generating
Diverse High-Fidelity Images with VQ-VAE-2". With n the counts and Σz the sums of the vectors that chose each code in a
step of the optimiser:

    N ← γN + (1−γ)n      m ← γm + (1−γ)Σz      e = m / N̂      N̂_k = (N_k + ε) / (ΣN + Kε) · ΣN
    terms      commitment_weight · mse(z_e, sg e_k)

Departures: those of `vqvae.quantizers.vector`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from vqvae.quantizers.base import QuantizerConfig
from vqvae.quantizers.codebook import CodebookQuantizer, Revival


@dataclass(frozen=True, kw_only=True)
class EMAVectorQuantizerConfig(QuantizerConfig):
    """Options of `EMAVectorQuantizer`."""

    num_codes: int = 512
    dim: int = 64
    decay: float = 0.99
    commitment_weight: float = 0.25
    normalize: bool = False
    rotation: bool = False
    revival: Revival = "dead"

    def build(self) -> "EMAVectorQuantizer":
        return EMAVectorQuantizer(**vars(self))


class EMAVectorQuantizer(CodebookQuantizer):
    """Vector quantisation whose codes are moving averages of the vectors that chose them.

    Args:
        decay: γ; 0.99 in the paper. Applied once per call of `update`.
        commitment_weight: of `mse(z_e, sg e)`; 0.25 in the paper.
        normalize: compare and return unit vectors.
        rotation: the rotation trick's gradient to the encoder.
        revival: how codes without traffic get a new place: "dead", "clustered" (CVQ) or "off".
    """

    EPSILON = 1e-5

    def __init__(
        self,
        *,
        num_codes: int = 512,
        dim: int = 64,
        decay: float = 0.99,
        commitment_weight: float = 0.25,
        normalize: bool = False,
        rotation: bool = False,
        revival: Revival = "dead",
    ):
        super().__init__(
            num_codes=num_codes,
            dim=dim,
            commitment_weight=commitment_weight,
            normalize=normalize,
            rotation=rotation,
            revival=revival,
        )
        if not 0 <= decay < 1:
            raise ValueError(f"expected a decay in [0, 1), got {decay}")
        self.decay = decay
        self.register_buffer("codebook", torch.empty(num_codes, dim).uniform_(-1 / num_codes, 1 / num_codes))
        self.register_buffer("counts", torch.ones(num_codes))
        self.register_buffer("sums", self.codebook.clone())

    @property
    def table(self) -> Float[Tensor, "k d"]:
        codebook = self.codebook.to(self.dtype)
        return F.normalize(codebook, dim=-1) if self.normalize else codebook

    def learn(self, counts: Tensor, sums: Tensor) -> None:
        self.counts.lerp_(counts.to(self.counts), 1 - self.decay)
        self.sums.lerp_(sums.to(self.sums), 1 - self.decay)
        total = self.counts.sum()
        smoothed = (self.counts + self.EPSILON) / (total + self.num_codes * self.EPSILON) * total
        self.codebook.copy_(self.sums / smoothed[:, None])

    def overwrite(self, weights: Float[Tensor, " k"], vectors: Float[Tensor, "k d"], share: Float[Tensor, ""]) -> None:
        weights = weights.to(self.codebook)
        self.codebook.lerp_(vectors.to(self.codebook), weights[:, None])
        self.counts.lerp_(share.to(self.counts).expand_as(self.counts), weights)
        moved = weights > 0  # a code that stays keeps its sums to the bit
        self.sums.copy_(torch.where(moved[:, None], self.codebook * self.counts[:, None], self.sums))
