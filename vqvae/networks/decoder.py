"""Quantised features to the parameters of a likelihood for each pixel: the encoder mirrored.

    z_q  ->  residual blocks, attention?  ->  [double, residual blocks]*  ->  features of each pixel

The last doubling gives the likelihood's features directly, so no convolution runs at full resolution. A smooth decoder
interpolates at each doubling, so that neighbours start even.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vqvae.networks.blocks import (
    ResidualBlock,
    SmoothUpsample,
    SpatialAttention,
    Upsample,
    depth_to_space,
    level_widths,
)


class Decoder(nn.Module):
    """`z_q: float "b h/s w/s d"` to `features: float "b f h w"` for `num_features` f a pixel.

    Attributes:
        reach: how many pixels around those of a position change with it; None for all of the image.
    """

    def __init__(
        self,
        *,
        num_features: int,
        dim: int,
        width: int = 64,
        downsampling: int = 4,
        num_blocks: int = 2,
        attention: bool = False,
        smooth: bool = False,
    ):
        super().__init__()
        widths = level_widths(width, downsampling)[::-1]
        channels, stride = widths[0], downsampling
        reach = stride
        layers: list[nn.Module] = [nn.Conv2d(dim, channels, 3, padding=1)]
        if attention:
            layers.append(SpatialAttention(channels))
        for level, level_width in enumerate(widths):
            if level:
                layers.append((SmoothUpsample if smooth else Upsample)(channels, level_width))
                reach, stride = reach + smooth * stride, stride // 2
            reach += num_blocks * stride
            layers += [ResidualBlock(level_width) for _ in range(num_blocks)]
            channels = level_width
        self.factor = 2 if downsampling > 1 and not smooth else 1
        if downsampling > 1 and smooth:
            last = SmoothUpsample(channels, num_features, 3)
            head = last.between
        else:
            last = head = nn.Conv2d(channels, num_features * self.factor**2, 3, padding=1)
        # A convolution, and what interpolates between its pixels.
        reach += stride * (2 if self.factor == 1 < downsampling else 1)
        self.reach = None if attention else reach
        # Features near zero: the likelihood starts at the parameters it was designed to start from.
        nn.init.normal_(head.weight, std=1e-3)
        assert head.bias is not None
        nn.init.zeros_(head.bias)
        layers += [nn.SiLU(), last]
        self.layers = nn.Sequential(*layers).to(memory_format=torch.channels_last)

    def forward(self, z_q: Float[Tensor, "b h2 w2 d"]) -> Float[Tensor, "b f h w"]:
        x = z_q.to(next(self.parameters()).dtype).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        return depth_to_space(self.layers(x), self.factor)
