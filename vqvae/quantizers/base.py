"""What every quantizer is: features in, codes and their vectors out, and the state of the codebook with each result.

A quantizer works on channels-last features `"b *grid d"` of any rank and needs no model around it:

    quantizer = VectorQuantizer(num_codes=1024, dim=64)
    q = quantizer(z_e)                        # Quantized
    task_loss(q.z_q) + sum(q.auxiliary.values())
    optimizer.step(); quantizer.update()      # statistics and revival, once per optimiser step

The forward pass reads the codebook and never changes it: the codebook that quantised a batch is the one in its loss.
All change of state that is not a gradient happens in `update`.
"""

import abc
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """The result of a quantizer.

    Attributes:
        z_q: code vectors, with the estimator's gradient to the encoder; `"b *grid d"`.
        codes: int64 `"b *grid"`; masked places hold `MASKED`.
        auxiliary: named terms to add to the training objective, each a scalar, already weighted.
        entropy: posterior entropy H(z|y) in nats per image, `"b"`; zero for a deterministic quantizer.
        usage: fraction of the codebook that this batch used, scalar in [0, 1].
        perplexity: exp of the entropy of this batch's code histogram, scalar in [1, num_codes].
    """

    z_q: Float[Tensor, "b *grid d"]
    codes: Int[Tensor, "b *grid"]
    auxiliary: Mapping[str, Float[Tensor, ""]]
    entropy: Float[Tensor, " b"]
    usage: Float[Tensor, ""]
    perplexity: Float[Tensor, ""]


MASKED = -1


class Quantizer(nn.Module, abc.ABC):
    """Abstract: `num_codes` codes of width `dim`."""

    num_codes: int
    dim: int

    @abc.abstractmethod
    def forward(self, z_e: Float[Tensor, "b *grid d"], mask: Bool[Tensor, "b *grid"] | None = None) -> Quantized:
        """Quantise features. `mask` is True at the places that count; the others get the code `MASKED` and zeros.

        Raises:
            ValueError: the width is not `dim`, or a feature is NaN or infinite.
        """

    @abc.abstractmethod
    def decode(self, codes: Int[Tensor, "b *grid"]) -> Float[Tensor, "b *grid d"]:
        """The vectors of codes, bit-equal to the `z_q` that came with them (masked places: zeros)."""

    @abc.abstractmethod
    def update(self) -> None:
        """Apply what the forwards in training mode since the last call have gathered; after the optimiser's step."""

    def check_features(self, z_e: Tensor, mask: Tensor | None) -> None:
        if z_e.ndim < 2 or z_e.shape[-1] != self.dim:
            raise ValueError(
                f"expected features 'b *grid d' with d = {self.dim} last, got shape {tuple(z_e.shape)}; "
                "channels-first features need x.movedim(1, -1)"
            )
        if not z_e.is_floating_point():
            raise ValueError(f"expected floating-point features, got {z_e.dtype}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != z_e.shape[:-1]):
            raise ValueError(
                f"expected a boolean mask of shape {tuple(z_e.shape[:-1])}, got {mask.dtype} {tuple(mask.shape)}"
            )

    def check_codes(self, codes: Tensor) -> None:
        if codes.is_floating_point() or codes.dtype == torch.bool:
            raise ValueError(f"codes must be integers, got {codes.dtype}")
        if codes.numel():
            low, high = codes.aminmax()
            if low < MASKED or high >= self.num_codes:
                raise ValueError(f"codes must lie in [0, {self.num_codes}), got {int(low)} to {int(high)}")


def straight_through(z_e: Float[Tensor, "*b d"], z_q: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """The value of `z_q` to the bit, the gradient of `z_e` (van den Oord et al. 2017, equation 3).

    The usual `z_e + sg(z_q - z_e)` rounds; here the two values that rounding could leave are replaced by `z_q` itself.
    """
    return _StraightThrough.apply(z_e, z_q)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_e: Tensor, z_q: Tensor) -> Tensor:
        return z_q.clone()

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def code_counts(codes: Int[Tensor, " n"], num_codes: int) -> Float[Tensor, " k"]:
    """How often each code occurs, in float32 (exact below 2^24); masked places are not counted."""
    kept = codes >= 0
    counts = torch.zeros(num_codes, dtype=torch.float32, device=codes.device)
    return counts.scatter_add_(0, codes.clamp_min(0), kept.float())


def usage_and_perplexity(
    counts: Float[Tensor, " k"],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Fraction of codes with a count, and exp of the histogram's entropy (1 where nothing was counted)."""
    probs = counts / counts.sum().clamp_min(1)
    entropy = -torch.special.xlogy(probs, probs).sum()
    return (counts > 0).float().mean(), entropy.exp()
