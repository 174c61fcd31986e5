"""Residual quantisation: quantise, subtract, and quantise what is left, again and again.

Zeghidour et al. 2021, "SoundStream"; Lee et al. 2022, "Autoregressive Image Generation using Residual Quantization"
(RQ-VAE). With r_0 = z:

    q_i = Q_i(r_{i−1})          r_i = r_{i−1} − q_i          z_q = Σ q_i          terms summed over depths

- Codes have a last axis of `depth`. The first n of them alone give a coarser vector: put `MASKED` for the rest.
- The estimator is applied to the sum, once; the remainders that terms see are r_i = z − sg(q_1 + … + q_i), whose
  gradient to z is one at every depth. Kinds whose vectors have a gradient of their own (IBQ, Gumbel softmax,
  projections) are subtracted with it, so that the sum's gradient is the chain rule's.
- Kinds of a fixed scale get finer with depth: what FSQ leaves is divided by 1/(L − 1), what signs leave by ½, a depth
  (Yang et al. 2023, "HiFi-Codec" and others do so for FSQ; it is what makes the second step worth having).
- `dropout` is the share of training images that keep only a uniformly drawn number of depths (SoundStream's quantizer
  dropout); the rest of their codes are `MASKED` and cost nothing.
- With `shared`, all depths read one codebook, which is updated once, after the step.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from vqvae.quantizers.base import Quantized, Quantizer, check_leaves_remainder, check_positionwise, stacked
from vqvae.quantizers.ema import EMAVectorQuantizer


class ResidualQuantizer(Quantizer):
    """A sum of code vectors, each quantising what those before it left.

        ResidualQuantizer(depth=4, quantizer=VectorQuantizer.Config(dim=64))     # z_e: "b *grid 64", codes "b *grid 4"

    Args:
        depth: how many steps.
        quantizer: of each step.
        shared: one codebook for all depths, instead of one each.
        dropout: share of training images with a random, smaller depth.
    """

    def __init__(
        self,
        *,
        depth: int = 4,
        quantizer: Quantizer.Config = EMAVectorQuantizer.Config(),
        shared: bool = False,
        dropout: float = 0.0,
    ):
        if depth < 1:
            raise ValueError(f"expected a depth of at least 1, got {depth}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"expected a dropout in [0, 1], got {dropout}")
        steps = [quantizer.build() for _ in range(1 if shared else depth)]
        first = steps[0]
        check_positionwise(first, "ResidualQuantizer")
        check_leaves_remainder(first)
        super().__init__(num_codes=first.num_codes, dim=first.dim)
        self.depth = depth
        self.shared = shared
        self.dropout = dropout
        self.steps = cast(Sequence[Quantizer], nn.ModuleList(steps))
        self.code_axes = (depth, *first.code_axes)
        self.estimator = first.estimator
        self.stochastic = first.stochastic

    def project(self, z_e: Tensor) -> Tensor:
        return self.steps[0].project(z_e)

    def residual_scale(self) -> Tensor | float:
        return self.steps[0].residual_scale() ** self.depth

    def quantize(self, z_e: Tensor, mask: Tensor | None, generator: torch.Generator | None) -> Quantized:
        depths = self._depths(z_e) if self.training and self.dropout else None
        rest, total = z_e, torch.zeros_like(z_e)
        results = []
        for index in range(self.depth):
            if depths is not None:
                alive = (depths > index).reshape(-1, *[1] * (z_e.ndim - 2)).expand(z_e.shape[:-1])
                mask = alive if mask is None else mask & alive
                rest = torch.where(mask[..., None], rest, 0.0)
            scale = self._scale(index)
            q = self.steps[0 if self.shared else index].quantize(rest / scale, mask, generator)
            found = q.z_q * scale
            total = total + found
            rest = rest - (found if self.estimator is None else found.detach())
            results.append(q)
        return stacked(results, total, z_e.ndim - 1)

    def look_up(self, codes: Tensor) -> Tensor:
        columns = codes.unbind(codes.ndim - len(self.code_axes))
        found = [
            self.steps[0 if self.shared else index].look_up(x) * self._scale(index) for index, x in enumerate(columns)
        ]
        total = torch.zeros_like(found[0])
        for vectors in found:
            total = total + vectors
        return total

    def update(self) -> None:
        for step in self.steps:
            step.update()

    def _scale(self, index: int) -> Tensor | float:
        return self.steps[0].residual_scale() ** index

    def _depths(self, z_e: Tensor) -> Tensor:
        """How many steps each image keeps."""
        depths = torch.randint(1, self.depth + 1, (len(z_e),), device=z_e.device)
        dropped = torch.rand(len(z_e), dtype=torch.float32, device=z_e.device) < self.dropout
        return torch.where(dropped, depths, self.depth)

    def extra_repr(self) -> str:
        return f"depth={self.depth}, shared={self.shared}, dropout={self.dropout}"
