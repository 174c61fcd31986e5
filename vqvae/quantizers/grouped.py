"""Grouped (product) quantisation: channels are split into groups, each with a quantizer of its own.

Jégou et al. 2011, "Product Quantization for Nearest Neighbor Search". G groups of K codes each make K^G vectors from
G·K rows. Codes have a last axis of G; terms are summed over groups.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from vqvae.quantizers.base import Quantized, Quantizer, check_positionwise, stacked
from vqvae.quantizers.ema import EMAVectorQuantizer


class GroupedQuantizer(Quantizer):
    """One quantizer for each group of channels.

        GroupedQuantizer(num_groups=4, quantizer=FSQ.Config(levels=(8, 6, 5)))   # z_e: "b *grid 12", codes "b *grid 4"

    Args:
        num_groups: how many; the features' width is so many times the quantizer's.
        quantizer: of each group, each with codes of its own.
    """

    def __init__(self, *, num_groups: int = 2, quantizer: Quantizer.Config = EMAVectorQuantizer.Config(dim=32)):
        if num_groups < 1:
            raise ValueError(f"expected at least one group, got {num_groups}")
        parts = [quantizer.build() for _ in range(num_groups)]
        first = parts[0]
        check_positionwise(first, "GroupedQuantizer")
        super().__init__(num_codes=first.num_codes, dim=num_groups * first.dim)
        self.parts = cast(Sequence[Quantizer], nn.ModuleList(parts))
        self.code_axes = (num_groups, *first.code_axes)
        self.estimator = None if first.estimator is None else self._estimate
        self.on_sphere = first.on_sphere
        self.stochastic = first.stochastic

    def project(self, z_e: Tensor) -> Tensor:
        return torch.cat([part.project(x) for part, x in zip(self.parts, self._split(z_e), strict=True)], dim=-1)

    def residual_scale(self) -> Tensor | float:
        anchor = self._anchor.to(self.dtype)
        # Each group's own: one number for all of its channels, or one for each.
        return torch.cat([anchor.new_ones(part.dim) * part.residual_scale() for part in self.parts])

    def quantize(self, z_e: Tensor, mask: Tensor | None, generator: torch.Generator | None) -> Quantized:
        results = [part.quantize(x, mask, generator) for part, x in zip(self.parts, self._split(z_e), strict=True)]
        return stacked(results, torch.cat([q.z_q for q in results], dim=-1), z_e.ndim - 1)

    def look_up(self, codes: Tensor) -> Tensor:
        columns = codes.unbind(codes.ndim - len(self.code_axes))
        return torch.cat([part.look_up(x) for part, x in zip(self.parts, columns, strict=True)], dim=-1)

    def update(self) -> None:
        for part in self.parts:
            part.update()

    def _split(self, z_e: Tensor) -> tuple[Tensor, ...]:
        return z_e.split(self.dim // len(self.parts), dim=-1)

    def _estimate(self, z_e: Tensor, z_q: Tensor) -> Tensor:
        estimator = self.parts[0].estimator
        assert estimator is not None
        pairs = zip(self._split(z_e), self._split(z_q), strict=True)
        return torch.cat([estimator(*pair) for pair in pairs], dim=-1)
