"""The parts that the encoder and the decoder are made of.

Residual blocks without normalisation layers: `x + conv1x1(silu(conv3x3(silu(x))))` with the last convolution at zero,
so that every block starts as the identity. This is the residual block of the VQ-VAE paper (van den Oord et al. 2017,
section 4.1) with SiLU for ReLU. Doing without GroupNorm keeps tensors in `channels_last` memory, in which
convolutions are fastest, from the pixels to the codes and back.

Changes of resolution are space-to-depth: a strided convolution whose kernel is its stride reads each 2x2 patch once,
and its transpose is a 1x1 convolution followed by `pixel_shuffle`. Nothing costly ever runs at full resolution.

What shuffling alone makes is even within each 2x2 and jumps between them: a lattice that one sees in smooth parts of
photographs. `SmoothUpsample` interpolates, and shuffles beside that only what goes beyond it.
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

HEAD_WIDTH = 32


class Recomputing(nn.Module):
    """Abstract: a part that can do without keeping what its backward pass needs (Chen et al. 2016).

    Attributes:
        recomputes: whether training computes it again in the backward pass: a third more time, less memory.
    """

    recomputes = False

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        if self.recomputes and self.training and torch.is_grad_enabled():
            # No part of the networks draws random numbers, so there is no state of them to restore.
            return checkpoint(super().__call__, *inputs, use_reentrant=False, preserve_rng_state=False)
        return super().__call__(*inputs)


class ResidualBlock(Recomputing):
    """`x + conv1x1(silu(conv3x3(silu(x))))`; starts as the identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.spatial = nn.Conv2d(channels, channels, 3, padding=1)
        self.pointwise = nn.Conv2d(channels, channels, 1)
        for parameter in self.pointwise.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Float[Tensor, "b f h w"]) -> Float[Tensor, "b f h w"]:
        return x + self.pointwise(F.silu(self.spatial(F.silu(x))))


class SpatialAttention(Recomputing):
    """Self-attention over all positions of a feature map, added to it; starts as the identity."""

    def __init__(self, channels: int):
        super().__init__()
        if channels % HEAD_WIDTH:
            raise ValueError(f"attention needs channels divisible by {HEAD_WIDTH}, got {channels}")
        self.num_heads = channels // HEAD_WIDTH
        self.norm = nn.RMSNorm(channels)
        self.to_qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.to_out = nn.Linear(channels, channels, bias=False)
        nn.init.zeros_(self.to_out.weight)

    def forward(self, x: Float[Tensor, "b f h w"]) -> Float[Tensor, "b f h w"]:
        height = x.shape[2]
        positions = rearrange(x, "b f h w -> b (h w) f")
        # Under autocast as precise as its weights: torch has no norm of mixed types that is not slow, and warns of it.
        normed = self.norm(positions.to(self.norm.weight.dtype))
        query, key, value = rearrange(
            self.to_qkv(normed),
            "b n (three heads f) -> three b heads n f",
            three=3,
            heads=self.num_heads,
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        added = self.to_out(rearrange(mixed, "b heads n f -> b n (heads f)"))
        return x + rearrange(added, "b (h w) f -> b f h w", h=height)


class Downsample(nn.Module):
    """Space-to-depth by 2, then a linear map of each patch: one strided convolution."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.patch = nn.Conv2d(in_channels, out_channels, 2, stride=2)

    def forward(self, x: Float[Tensor, "b f h w"]) -> Float[Tensor, "b f2 h2 w2"]:
        return self.patch(x)


class Upsample(Recomputing):
    """A linear map of each position, then depth-to-space by 2: the transpose of `Downsample`."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.expand = nn.Conv2d(in_channels, out_channels * 4, 1)

    def forward(self, x: Float[Tensor, "b f h w"]) -> Float[Tensor, "b f2 h2 w2"]:
        # channels_last in, channels_last out: reshaping the channel axis of the permuted view moves memory only once.
        return depth_to_space(self.expand(x), 2)


class SmoothUpsample(Recomputing):
    """A convolution interpolated to twice the resolution; beside it depth-to-space of another, which starts at zero."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1):
        super().__init__()
        self.between = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
        self.detail = nn.Conv2d(in_channels, out_channels * 4, kernel, padding=kernel // 2)
        for parameter in self.detail.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Float[Tensor, "b f h w"]) -> Float[Tensor, "b f2 h2 w2"]:
        return interpolated(self.between(x)) + depth_to_space(self.detail(x), 2)


def interpolated(x: Float[Tensor, "b f h w"]) -> Float[Tensor, "b f h2 w2"]:
    """Twice the height and width, bilinear, as `F.interpolate` has it; gradients are summed in one order anywhere."""
    x = x.permute(0, 2, 3, 1)
    for axis in (1, 2):
        size = x.shape[axis]
        before = torch.cat([x.narrow(axis, 0, 1), x.narrow(axis, 0, size - 1)], axis)
        after = torch.cat([x.narrow(axis, 1, size - 1), x.narrow(axis, size - 1, 1)], axis)
        x = torch.stack([x.lerp(before, 0.25), x.lerp(after, 0.25)], axis + 1).flatten(axis, axis + 1)
    return x.permute(0, 3, 1, 2)


def depth_to_space(x: Float[Tensor, "b f h w"], factor: int) -> Float[Tensor, "b f2 h2 w2"]:
    """`pixel_shuffle` with the patch axes outermost in the channels, which keeps `channels_last` rows contiguous."""
    if factor == 1:
        return x
    return rearrange(x.permute(0, 2, 3, 1), "b h w (p q f) -> b (h p) (w q) f", p=factor, q=factor).permute(0, 3, 1, 2)


def num_levels(downsampling: int) -> int:
    """log2 of a downsampling factor.

    Raises:
        ValueError: it is no power of two.
    """
    if downsampling < 1 or downsampling & (downsampling - 1):
        raise ValueError(f"downsampling must be a power of two (1, 2, 4, ...), got {downsampling}")
    return downsampling.bit_length() - 1


def level_widths(width: int, downsampling: int) -> list[int]:
    """Channels at each resolution, from the finest that residual blocks run at to that of the codes.

    The first level is half the image's resolution (full resolution only when nothing is downsampled). Each further
    level doubles its channels, up to four times `width`: it has a quarter of the positions, so its cost stays bounded.
    """
    return [width * min(4, 2**level) for level in range(max(1, num_levels(downsampling)))]
