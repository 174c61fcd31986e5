"""The standard normal prior of the variational autoencoder (Kingma & Welling 2014, "Auto-encoding variational Bayes").

    ln p(z) = -|z|^2 / 2 - (N d / 2) ln 2 pi,    N positions of d channels

It has no weights: the encoder is what moves. The bar under every other continuous prior.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from priors.continuous import ContinuousPrior, draw_noise
from safefolder.options import Given


class NormalPrior(ContinuousPrior):
    """N(0, I) over every channel of every position. `NormalPrior(dim=4, grid=(7, 7))`."""

    def __init__(self, *, dim: Given[int] = 8, grid: Given[Sequence[int]] = (7, 7)):
        super().__init__(dim=dim, grid=grid)

    def _log_prob(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        num_dims = self.num_positions * self.dim
        return -latents.square().sum((1, 2)) / 2 - num_dims / 2 * math.log(2 * math.pi)

    def _sample(self, num: int, labels: Tensor | None, temperature: float, generator: torch.Generator | None) -> Tensor:
        noise = draw_noise((num, self.num_positions, self.dim), self.dtype, self.device, generator)
        return temperature * noise
