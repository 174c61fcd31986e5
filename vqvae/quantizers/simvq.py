"""SimVQ: a frozen codebook seen through one learned linear map.

Zhu et al. 2024, "Addressing Representation Collapse in Vector Quantized Models with One Linear Layer". With C drawn
once from a Gaussian and never trained, and a learned map W, b of width d, the codes are e_k = W c_k + b. The gradient
of one chosen code moves the map, and with it every code, so none is left behind:

    code       k = argmin_k ‖z_e − e_k‖²
    terms      codebook_weight · mse(sg z_e, e_k)  +  commitment_weight · mse(z_e, sg e_k)

Departures: at the first `update` the map is set so that the codes have the mean and the covariance of that step's
features, as k-means places a codebook that is not frozen; the gradient to the encoder is the rotation trick's unless
told otherwise; and features go to the codes (weight 1) rather than codes to the features (0.25), since frozen codes
cannot part to follow them; the paper's start and weights leave codes unused.
"""

import torch
from torch import Tensor, nn

from vqvae.quantizers.estimators import rotation_trick, straight_through
from vqvae.quantizers.nearest_search import nearest
from vqvae.quantizers.positionwise import Assignment, PositionwiseQuantizer, masked_mean
from vqvae.quantizers.step_statistics import Sums


class SimVQ(PositionwiseQuantizer):
    """Vector quantisation with the codes `W c_k + b`, c_k frozen.

    Args:
        codebook_weight: of `mse(sg z_e, e)`.
        commitment_weight: of `mse(z_e, sg e)`.
        rotation: the rotation trick's gradient to the encoder, instead of straight through.
    """

    remedy = "lower the learning rate, or quantise in fewer dimensions (ProjectedQuantizer with a width of 8)"

    def __init__(
        self,
        *,
        num_codes: int = 512,
        dim: int = 64,
        codebook_weight: float = 0.25,
        commitment_weight: float = 1.0,
        rotation: bool = True,
    ):
        super().__init__(num_codes=num_codes, dim=dim)
        self.codebook_weight = codebook_weight
        self.commitment_weight = commitment_weight
        self.estimator = rotation_trick if rotation else straight_through
        self.register_buffer("frozen", torch.randn(num_codes, dim) * dim**-0.5)
        self.map = nn.Parameter(torch.eye(dim))
        self.offset = nn.Parameter(torch.zeros(dim))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        # In float64: a covariance is a difference of large sums.
        self.sums_of_step = Sums(torch.float64, count=(1,), vectors=(dim,), products=(dim, dim))
        self.gathered = (self.sums_of_step,)

    @property
    def table(self) -> Tensor:
        # Always the whole product: the rows of a smaller one could be rounded otherwise.
        return self.frozen.to(self.dtype) @ self.map.to(self.dtype).T + self.offset.to(self.dtype)

    def assign(self, vectors: Tensor, valid: Tensor | None) -> Assignment:
        table = self.table
        codes = nearest(vectors, table)
        chosen = table[codes]
        if self.training and not self.has_started:
            self._gather(vectors.detach(), valid)
        terms = {
            "codebook": self.codebook_weight * masked_mean((vectors.detach() - chosen).square(), valid),
            "commitment": self.commitment_weight * masked_mean((vectors - chosen.detach()).square(), valid),
        }
        return Assignment(chosen, codes, terms)

    def vectors_of(self, codes: Tensor) -> Tensor:
        return self.table[codes]

    @torch.no_grad()
    def _gather(self, vectors: Tensor, valid: Tensor | None) -> None:
        sums = self.sums_of_step
        sums["count"].add_(len(vectors) if valid is None else valid.sum())
        vectors = vectors.double()
        sums["vectors"].add_(vectors.sum(0))  # masked vectors are zeros
        sums["products"].add_(vectors.T @ vectors)

    @torch.no_grad()
    def update(self) -> None:
        if not self.has_started and not self.started:
            self.sums_of_step.reduce()
            count = self.sums_of_step["count"]
            if count == 0:  # nothing was quantised in training mode yet, by any process
                return
            mean = self.sums_of_step["vectors"] / count
            covariance = self.sums_of_step["products"] / count - torch.outer(mean, mean)
            variances, axes = torch.linalg.eigh(covariance)
            self.map.copy_(axes * (self.dim * variances.clamp_min(0)).sqrt() @ axes.T)
            self.offset.copy_(mean)
            self.started.fill_(True)
        self.has_started = True
        super().update()
