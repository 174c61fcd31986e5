"""Stochastic vector quantisation: the posterior of a code falls with its distance, by a spread that is learned.

Takida et al. 2022, "SQ-VAE: Variational Bayes on Discrete Representation with Self-annealed Stochastic Quantization"
(Gaussian SQ-VAE with one variance for all). With σ² learned,

    P_enc(k|y) = softmax_k(−‖z − e_k‖²/2σ²)           sampled as `vqvae.quantizers.categorical` says
    terms      weight · ( [ln K − H(P_enc)]  +  ‖z − z_q‖²/2σ² ),     nats a position
                  + entropy_weight · (ln K − H(E_z[P_enc]))

In the paper σ² falls by itself as the codes fit the features, and stochastic quantisation turns into deterministic
quantisation; no straight-through gradient, commitment or moving average is needed. The first two terms are those of its
bound under an even prior.

Departures. `weight` = positions / dimensions (1/16 for a code per 4x4 grey pixels) would make the objective that bound
in nats per dimension. But an even prior asks ln K for each code, which is about what a good code saves, and leaves most
codes unused: hence a smaller weight, the last term, which LFQ and IBQ have too, and a wide first σ². At the first
`update` the codes are the k-means centres of that step's features, and σ² is a quarter of their variance per dimension.
τ follows the half cosine of `CategoricalQuantizer` from ½, where the paper has exp(−10⁻⁵ t).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from vqvae.quantizers.categorical import CategoricalQuantizer
from vqvae.quantizers.centres import kmeans
from vqvae.quantizers.nearest_search import nearest
from vqvae.quantizers.positionwise import masked_mean, none_is_zero
from vqvae.quantizers.soft import entropy_of
from vqvae.quantizers.step_statistics import Pool, pool_size


class StochasticVectorQuantizer(CategoricalQuantizer):
    """The quantizer of SQ-VAE.

    Beside these its options are those of `CategoricalQuantizer`.

    Args:
        weight: of the paper's two terms, in nats a position.
        entropy_weight: of what the entropy of all positions' codes lacks; 0 is the paper.
    """

    remedy = "raise entropy_weight"

    def __init__(self, *, weight: float = 1 / 256, entropy_weight: float = 0.05, **posterior: Any):
        super().__init__(**posterior)
        self.weight = weight
        self.entropy_weight = entropy_weight
        self.codebook = nn.Parameter(torch.randn(self.num_codes, self.dim) * self.dim**-0.5)
        self.log_variance = nn.Parameter(torch.zeros(()))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self.pool = Pool(pool_size(self.num_codes), self.dim)
        self.gathered = (self.pool,)

    @property
    def variance(self) -> Tensor:
        """σ², scalar."""
        return self.log_variance.to(self.dtype).exp()

    def logits(self) -> tuple[Tensor, Tensor]:
        # Of −‖z − e‖²/2σ² the part −‖z‖²/2σ² is the same for all codes.
        table = self.table
        return table / self.variance, -table.square().sum(1) / (2 * self.variance)

    def most_probable(self, vectors: Tensor) -> Tensor:
        return nearest(vectors, self.table)

    def observe(self, vectors: Tensor, valid: Tensor | None) -> None:
        if not self.has_started:
            self.pool.add(vectors.detach(), valid, self.num_updates)

    def terms(
        self, vectors: Tensor, chosen: Tensor, entropies: Tensor, average: Tensor, valid: Tensor | None
    ) -> dict[str, Tensor]:
        distances = (vectors - chosen).square().sum(-1) / (2 * self.variance)
        return {
            "kl": self.weight * masked_mean(math.log(self.num_codes) - entropies, valid),
            "distance": self.weight * masked_mean(distances, valid),
            "codebook_entropy_deficit": self.entropy_weight
            * none_is_zero(math.log(self.num_codes) - entropy_of(average), vectors, valid),
        }

    @torch.no_grad()
    def update(self) -> None:
        if not self.has_started and not self.started:
            vectors = self.pool.joint()
            if not len(vectors):  # nothing was quantised in training mode yet, by any process
                return
            centres = kmeans(vectors, self.pool.draw(self.num_codes))
            # A posterior that takes in codes around: each has a gradient until σ² has found its size.
            variance = vectors.var(0, unbiased=False).mean() / 4
            self.codebook.copy_(centres)
            self.log_variance.copy_(variance.clamp_min(1e-12).log())
            self.started.fill_(True)
        self.has_started = True
        super().update()
