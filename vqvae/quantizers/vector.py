"""Vector quantisation with a codebook that gradients learn.

van den Oord et al. 2017, "Neural Discrete Representation Learning" (equations 1-3). With sg for stop-gradient and e_k
the codes:

    code       k = argmin_k ‖z_e − e_k‖²                        output  z_q = z_e + sg(e_k − z_e)
    terms      codebook_weight · mse(sg z_e, e_k)  +  commitment_weight · mse(z_e, sg e_k)

Departures: the k-means start and the revival of `vqvae.quantizers.codebook`. With `normalize`, features and codes are
unit vectors in search, terms and output (Yu et al. 2021, "ViT-VQGAN"). With `rotation`, the gradient to the encoder is
the rotation trick's instead of straight through (Fifty et al. 2024).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vqvae.quantizers.base import QuantizerConfig
from vqvae.quantizers.codebook import CodebookQuantizer, Revival
from vqvae.quantizers.placewise import masked_mean


@dataclass(frozen=True, kw_only=True)
class VectorQuantizerConfig(QuantizerConfig):
    """Options of `VectorQuantizer`."""

    num_codes: int = 512
    dim: int = 64
    codebook_weight: float = 1.0
    commitment_weight: float = 0.25
    normalize: bool = False
    rotation: bool = False
    revival: Revival = "dead"

    def build(self) -> "VectorQuantizer":
        return VectorQuantizer(**vars(self))


class VectorQuantizer(CodebookQuantizer):
    """Vector quantisation whose codebook is a parameter, learned by the codebook term's gradient.

        q = VectorQuantizer(num_codes=1024, dim=64)(z_e)     # z_e: "b *grid 64"
        q.auxiliary["codebook"], q.auxiliary["commitment"]   # means over elements, weighted

    Args:
        codebook_weight: of `mse(sg z_e, e)`; 1 in the paper.
        commitment_weight: of `mse(z_e, sg e)`; 0.25 in the paper.
        normalize: compare and return unit vectors.
        rotation: the rotation trick's gradient to the encoder.
        revival: how codes without traffic get a new place: "dead", "clustered" (CVQ) or "off".
    """

    def __init__(
        self,
        *,
        num_codes: int = 512,
        dim: int = 64,
        codebook_weight: float = 1.0,
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
        self.codebook_weight = codebook_weight
        self.codebook = nn.Parameter(torch.empty(num_codes, dim).uniform_(-1 / num_codes, 1 / num_codes))

    @property
    def table(self) -> Float[Tensor, "k d"]:
        codebook = self.codebook.to(self.dtype)
        return F.normalize(codebook, dim=-1) if self.normalize else codebook

    def terms(self, vectors: Tensor, chosen: Tensor, kept: Tensor | None) -> dict[str, Tensor]:
        error = masked_mean((vectors.detach() - chosen).square(), kept)
        return {"codebook": self.codebook_weight * error, **super().terms(vectors, chosen, kept)}

    def overwrite(self, weights: Float[Tensor, " k"], vectors: Float[Tensor, "k d"], share: Float[Tensor, ""]) -> None:
        moved = torch.lerp(self.codebook, vectors.to(self.codebook), weights[:, None].to(self.codebook))
        self.codebook.copy_(moved)
