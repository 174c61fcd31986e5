"""A quantizer in fewer (or more) dimensions than its features: a linear map in, any quantizer, a linear map out.

Yu et al. 2021, "Vector-quantized Image Modeling with Improved VQGAN" (factorised codes: a code width of 8 or 32 is used
almost wholly where one of 256 collapses), and the way to put FSQ, LFQ and BSQ, whose widths are their channels, behind
features of another width.

    z_e  ──W_in──>  "b *grid inner"  ──any quantizer──>  ──W_out──>  z_q

Both maps run in float64 and are rounded once to the working precision: float32 products are rounded in an order that
depends on the batch's size, and the code of a vector must not.
"""

import torch
from torch import Tensor, nn

from vqvae.quantizers.base import Quantized, Quantizer
from vqvae.quantizers.vector import VectorQuantizer


class ProjectedQuantizer(Quantizer):
    """Any quantizer between two linear maps.

        ProjectedQuantizer(dim=64, quantizer=FSQ.Config(levels=(8, 5, 5, 5)))(z_e)     # z_e: "b *grid 64"

    Args:
        dim: width of the features.
        quantizer: what runs in between; its `dim` is the inner width.
    """

    def __init__(self, *, dim: int = 64, quantizer: Quantizer.Config = VectorQuantizer.Config(dim=8, normalize=True)):
        inner = quantizer.build()
        super().__init__(num_codes=inner.num_codes, dim=dim)
        self.quantizer = inner
        self.code_axes = inner.code_axes
        self.positionwise = inner.positionwise
        self.stochastic = inner.stochastic
        # Without biases: what is masked is zero on both sides.
        self.to_inner = nn.Linear(dim, inner.dim, bias=False)
        self.to_outer = nn.Linear(inner.dim, dim, bias=False)

    def quantize(self, z_e: Tensor, mask: Tensor | None, generator: torch.Generator | None) -> Quantized:
        q = self.quantizer.run(_exact_linear(z_e, self.to_inner.weight), mask, generator)
        return q.with_vectors(_exact_linear(q.z_q, self.to_outer.weight))

    def look_up(self, codes: Tensor) -> Tensor:
        return _exact_linear(self.quantizer.look_up(codes), self.to_outer.weight)

    def check_codes(self, codes: Tensor) -> None:
        self.quantizer.check_codes(codes)

    def code_grid(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        return self.quantizer.code_grid(grid)

    def update(self) -> None:
        self.quantizer.update()


def _exact_linear(x: Tensor, weight: Tensor) -> Tensor:
    return (x.double() @ weight.double().T).to(x.dtype)
