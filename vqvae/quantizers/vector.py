"""Vector quantisation with a codebook that gradients learn.

van den Oord et al. 2017, "Neural Discrete Representation Learning" (equations 1-3). With sg for stop-gradient and e_k
the codes:

    code       k = argmin_k ‖z_e − e_k‖²                        output  z_q = z_e + sg(e_k − z_e)
    terms      codebook_weight · mse(sg z_e, e_k)  +  commitment_weight · mse(z_e, sg e_k)

Departures: the k-means start and the revival of `vqvae.quantizers.codebook`. With `normalize`, features and codes are
unit vectors in search, terms and output (Yu et al. 2021, "ViT-VQGAN"). With `rotation`, the gradient to the encoder is
the rotation trick's instead of straight through (Fifty et al. 2024).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vqvae.quantizers.codebook import CodebookQuantizer
from vqvae.quantizers.positionwise import masked_mean


class VectorQuantizer(CodebookQuantizer):
    """Vector quantisation whose codebook is a parameter, learned by the codebook term's gradient.

        q = VectorQuantizer(num_codes=1024, dim=64)(z_e)     # z_e: "b *grid 64"
        q.auxiliary["codebook"], q.auxiliary["commitment"]   # means over elements, weighted

    Beside these its options are those of `CodebookQuantizer`.

    Args:
        codebook_weight: of `mse(sg z_e, e)`; 1 in the paper.
    """

    def __init__(self, *, codebook_weight: float = 1.0, **codebook: Any):
        super().__init__(**codebook)
        self.codebook_weight = codebook_weight
        bound = 1 / self.num_codes
        self.codebook = nn.Parameter(torch.empty(self.num_codes, self.dim).uniform_(-bound, bound))

    def terms(self, vectors: Tensor, chosen: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        error = masked_mean((vectors.detach() - chosen).square(), valid)
        return {"codebook": self.codebook_weight * error, **super().terms(vectors, chosen, valid)}

    def reset_codes(
        self, weights: Float[Tensor, " k"], vectors: Float[Tensor, "k d"], share: Float[Tensor, ""]
    ) -> None:
        moved = torch.lerp(self.codebook, vectors.to(self.codebook), weights[:, None].to(self.codebook))
        self.codebook.copy_(moved)
