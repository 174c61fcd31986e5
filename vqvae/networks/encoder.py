"""Images to features: a convolutional residual network (van den Oord et al. 2017, section 4.1).

    uint8 image  ->  2y/255 - 1  ->  patches of 2x2  ->  [residual blocks, halve]*  ->  attention?  ->  z_e

Departures from the paper are those of `vqvae.networks.blocks`.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from vqvae.networks.blocks import Downsample, ResidualBlock, SpatialAttention, level_widths


class Encoder(nn.Module):
    """`images: uint8 "b c h w"` to `z_e: float "b h/s w/s d"`, channels last, for downsampling s.

    Attributes:
        reach: how many pixels around those of a position it looks at; None for all of the image.
    """

    def __init__(
        self,
        *,
        num_channels: int,
        dim: int,
        width: int = 64,
        downsampling: int = 4,
        num_blocks: int = 2,
        attention: bool = False,
    ):
        super().__init__()
        widths = level_widths(width, downsampling)
        layers: list[nn.Module] = []
        channels, reach = num_channels, 0
        for level, level_width in enumerate(widths):
            if level == 0 and downsampling == 1:
                layers.append(nn.Conv2d(channels, level_width, 3, padding=1))
                reach += 1
            else:
                layers.append(Downsample(channels, level_width))
            reach += num_blocks * min(2 ** (level + 1), downsampling)
            layers += [ResidualBlock(level_width) for _ in range(num_blocks)]
            channels = level_width
        if attention:
            layers.append(SpatialAttention(channels))
        self.reach = None if attention else reach
        layers += [nn.SiLU(), nn.Conv2d(channels, dim, 1)]
        self.layers = nn.Sequential(*layers).to(memory_format=torch.channels_last)

    def forward(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b h2 w2 d"]:
        dtype = next(self.parameters()).dtype
        x = (images.to(dtype) * (2 / 255) - 1).contiguous(memory_format=torch.channels_last)
        return self.layers(x).permute(0, 2, 3, 1)
