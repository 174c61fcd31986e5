"""Multi-scale residual quantisation: what is left is quantised at coarser grids first, each as a picture of its own.

Tian et al. 2024, "Visual Autoregressive Modeling" (VAR, algorithms 1 and 2). For scales s of 1 x 1 up to the features'
grid:

    q_s = Q(area_s(z − f_{s−1}))         f_s = f_{s−1} + φ_s(bicubic(q_s))         z_q = f_S
    terms      mean over scales of   mse(f_s, sg z)  +  commitment_weight · mse(sg f_s, z)

One codebook serves all scales. φ = ½ conv 3x3 + ½ identity undoes the blur of enlarging; four of them are shared by
neighbouring scales. Codes are one row of Σ s² a picture, coarsest scale first. The inner quantizer's own codebook and
commitment terms are replaced by the two above, which train φ too; other terms of its own (entropies) are averaged over
scales. At a coarse scale a position counts if any of the positions under it does.

Enlarging, φ and averaging run in float64 and are rounded once: convolutions of another batch size are rounded
otherwise, and the codes of a picture must not depend on its batch.
"""

import itertools
from collections.abc import Sequence
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from vqvae.quantizers.base import MASKED, Quantized, Quantizer, check_leaves_remainder, combined
from vqvae.quantizers.ema import EMAVectorQuantizer
from vqvae.quantizers.positionwise import masked_mean

VAR_SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
NUM_REFINERS = 4


class MultiScaleQuantizer(Quantizer):
    """A residual quantizer whose steps are pictures of growing size.

        MultiScaleQuantizer(scales=(1, 2, 4, 8))(z_e)     # z_e: "b 8 8 32", codes "b 85"

    Args:
        scales: sides of the square grids, growing; the last is that of the features.
        quantizer: of all scales, with one code a position.
        commitment_weight: of mse(sg f, z); 0.25 in the paper.
    """

    positionwise = False

    def __init__(
        self,
        *,
        scales: Sequence[int] = VAR_SCALES,
        quantizer: Quantizer.Config = EMAVectorQuantizer.Config(num_codes=4096, dim=32),
        commitment_weight: float = 0.25,
    ):
        if not scales or scales[0] < 1 or any(a >= b for a, b in itertools.pairwise(scales)):
            raise ValueError(f"expected growing scales of at least 1, got {scales}")
        inner = quantizer.build()
        if not inner.positionwise or inner.code_axes:
            raise ValueError(
                f"{type(inner).__name__} cannot stand inside a MultiScaleQuantizer, which needs one code a position; "
                "take a single codebook, FSQ, LFQ, BSQ or a projection of one"
            )
        check_leaves_remainder(inner)
        super().__init__(num_codes=inner.num_codes, dim=inner.dim)
        self.scales = scales
        self.commitment_weight = commitment_weight
        self.quantizer = inner
        self.estimator = inner.estimator
        self.stochastic = inner.stochastic
        convolutions = (nn.Conv2d(inner.dim, inner.dim, 3, padding=1) for _ in range(NUM_REFINERS))
        self.refiners = cast(Sequence[nn.Conv2d], nn.ModuleList(convolutions))

    def code_grid(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        side = self.scales[-1]
        if tuple(grid) != (side, side):
            raise ValueError(
                f"the last of the scales {self.scales} is {side}, so features must be {side}x{side}, got {grid}"
            )
        return (sum(scale**2 for scale in self.scales),)

    def check_features(self, z_e: Tensor, mask: Tensor | None) -> None:
        super().check_features(z_e, mask)
        self.code_grid(tuple(z_e.shape[1:-1]))

    def check_codes(self, codes: Tensor) -> None:
        positions = sum(scale**2 for scale in self.scales)
        if codes.ndim != 2 or codes.shape[1] != positions:
            raise ValueError(
                f"expected codes of shape (b, {positions}) for scales {self.scales}, got {tuple(codes.shape)}"
            )
        super().check_codes(codes)

    def project(self, z_e: Tensor) -> Tensor:
        return self.quantizer.project(z_e)

    def quantize(self, z_e: Tensor, mask: Tensor | None, generator: torch.Generator | None) -> Quantized:
        rest, total = z_e, torch.zeros_like(z_e)
        valid = None if mask is None else mask.reshape(-1)
        results, refinements, commitments = [], [], []
        for index, scale in enumerate(self.scales):
            coarse, coarse_mask = _shrunk(rest, mask, scale)
            q = self.quantizer.quantize(coarse, coarse_mask, generator)
            found = self._enlarged(q.z_q, index, mask)
            total = total + found
            rest = rest - (found if self.estimator is None else found.detach())
            results.append(q)
            refinements.append(masked_mean((total - z_e.detach()).square().flatten(0, 2), valid))
            commitments.append(masked_mean((total.detach() - z_e).square().flatten(0, 2), valid))
        own = {name for name in results[0].auxiliary if name not in ("codebook", "commitment")}
        codes = torch.cat([q.codes.flatten(1) for q in results], dim=1)
        auxiliary = {
            "refinement": torch.stack(refinements).mean(),
            "commitment": self.commitment_weight * torch.stack(commitments).mean(),
            **{name: torch.stack([q.auxiliary[name] for q in results]).mean() for name in sorted(own)},
        }
        return combined(results, total, codes, auxiliary)

    def look_up(self, codes: Tensor) -> Tensor:
        parts = codes.split([scale**2 for scale in self.scales], dim=1)
        mask = rearrange(parts[-1] != MASKED, "b (h w) -> b h w", h=self.scales[-1])
        total: Tensor | None = None
        for index, (scale, part) in enumerate(zip(self.scales, parts, strict=True)):
            vectors = self.quantizer.look_up(rearrange(part, "b (h w) -> b h w", h=scale))
            found = self._enlarged(vectors, index, mask)
            total = torch.zeros_like(found) + found if total is None else total + found
        assert total is not None
        return total

    def update(self) -> None:
        self.quantizer.update()

    def _enlarged(self, vectors: Tensor, index: int, mask: Tensor | None) -> Tensor:
        """φ of a scale's vectors at the features' grid, zero where masked."""
        x = rearrange(vectors.double(), "b h w d -> b d h w")
        side = self.scales[-1]
        if x.shape[-1] != side:
            x = F.interpolate(x, size=(side, side), mode="bicubic")
        refiner = self.refiners[self._refiner(index)]
        assert refiner.bias is not None
        x = (F.conv2d(x, refiner.weight.double(), refiner.bias.double(), padding=1) + x) / 2
        enlarged = rearrange(x, "b d h w -> b h w d").to(vectors.dtype)
        return enlarged if mask is None else torch.where(mask[..., None], enlarged, 0.0)

    def _refiner(self, index: int) -> int:
        """Which φ a scale shares: evenly, in the order of the scales."""
        return index * NUM_REFINERS // len(self.scales)

    def extra_repr(self) -> str:
        return f"scales={self.scales}"


def _shrunk(x: Tensor, mask: Tensor | None, side: int) -> tuple[Tensor, Tensor | None]:
    """The mean of the positions that count under each position of a coarser grid, and whether there are any."""
    if x.shape[1] == side:
        return (x, None) if mask is None else (torch.where(mask[..., None], x, 0.0), mask)
    channels_first = rearrange(x.double(), "b h w d -> b d h w")
    if mask is None:
        coarse = F.interpolate(channels_first, size=(side, side), mode="area")
        return rearrange(coarse, "b d h w -> b h w d").to(x.dtype), None
    share = F.interpolate(mask[:, None].double(), size=(side, side), mode="area")
    coarse = F.interpolate(channels_first * mask[:, None], size=(side, side), mode="area")
    coarse = torch.where(share > 0, coarse / share.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    return rearrange(coarse, "b d h w -> b h w d").to(x.dtype), share[:, 0] > 0
