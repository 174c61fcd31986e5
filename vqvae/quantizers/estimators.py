"""Estimators: how gradients pass a step that has none.

Each is a function of the encoder's vectors `z_e` and their code vectors `z_q`. Its value is `z_q` to the bit (written
as `z_e + sg(z_q - z_e)` it would be rounded); its gradient to `z_e` is what tells them apart, and `z_q` gets none.

- `straight_through`: the gradient as it is (van den Oord et al. 2017, equation 3).
- `rotation_trick`: the gradient rotated and scaled by the map that carries `z_e` onto `z_q` (Fifty et al. 2024,
  "Restructuring Vector Quantization with the Rotation Trick").
- `gumbel_softmax`: a sample of a categorical as a function of its logits and of noise that has no parameters, so that
  the chain rule applies (Jang et al. 2016; Maddison et al. 2016).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Estimator = Callable[[Tensor, Tensor], Tensor]


def straight_through(z_e: Float[Tensor, "*b d"], z_q: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """The value of `z_q`, the gradient of `z_e`."""
    return _StraightThrough.apply(z_e, z_q)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_e: Tensor, z_q: Tensor) -> Tensor:
        return z_q.clone()

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def rotation_trick(z_e: Float[Tensor, "*b d"], z_q: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """The value of `z_q`; the gradient of `s R z_e` with R and s held constant.

    With `u = z_e / ‖z_e‖`, `v = z_q / ‖z_q‖`, `w = (u + v) / ‖u + v‖` and `s = ‖z_q‖ / ‖z_e‖`,

        R = I - 2 w wᵀ + 2 v uᵀ          R u = v

    Opposite vectors have no w; theirs is the reflection `I - 2 u uᵀ`, which also carries u onto v. A zero vector has no
    direction: its gradient passes straight through.
    """
    return _Rotation.apply(z_e, z_q)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_e: Tensor, z_q: Tensor) -> Tensor:
        ctx.save_for_backward(z_e, z_q)
        return z_q.clone()

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0]
        z_e, z_q = ctx.saved_tensors
        tiny = torch.finfo(z_e.dtype).tiny
        norm_e, norm_q = z_e.norm(dim=-1, keepdim=True), z_q.norm(dim=-1, keepdim=True)
        u, v = z_e / norm_e.clamp_min(tiny), z_q / norm_q.clamp_min(tiny)
        w = u + v
        # Of exactly opposite vectors rounding alone would be left, scaled up: below it counts as none.
        length = w.norm(dim=-1, keepdim=True)
        w = torch.where(length > 16 * torch.finfo(z_e.dtype).eps, w / length.clamp_min(tiny), 0.0)
        rotated = grad - 2 * w * (w * grad).sum(-1, keepdim=True) + 2 * u * (v * grad).sum(-1, keepdim=True)
        rotated = rotated * (norm_q / norm_e.clamp_min(tiny))
        return torch.where((norm_e > tiny) & (norm_q > tiny) & torch.isfinite(rotated), rotated, grad), None


def gumbel_softmax(logits: Float[Tensor, "*b k"], temperature: float | Tensor) -> Float[Tensor, "*b k"]:
    """A relaxed draw from the categorical of `logits`: `softmax((logits + Gumbel noise) / temperature)`.

    The index of its largest entry is a draw from the categorical itself, whatever the temperature. Noise comes from
    torch's global generator.
    """
    noise = -torch.empty_like(logits).exponential_().log()
    return F.softmax((logits + noise) / temperature, dim=-1)
