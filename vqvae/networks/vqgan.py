"""Encoder and decoder of VQGAN (Esser et al. 2021, "Taming Transformers"), which most public tokenizers are made of.

    images, 2y/255 − 1 -> conv_in -> [residual blocks, attention?, halve]* -> mid -> norm, SiLU, conv_out -> quant_conv
    z_q, post_quant_conv -> conv_in -> mid -> [residual blocks, attention?, double]* -> norm, SiLU, conv_out -> features

with  mid = residual block, attention?, residual block. A residual block is x + conv(silu(norm(conv(silu(norm(x)))))),
its convolutions 3×3, its shortcut a 1×1 convolution where the width changes. Attention has one head over all positions,
as wide as the features. Halving pads right and below by one and strides by two; doubling repeats each position. A level
has one more residual block in the decoder than in the encoder. Norms are GroupNorm with eps 1e-6.

With spatial norms the decoder is that of MoVQ (Zheng et al. 2022): each of its norms has no scale and shift for all
positions, but linear maps of z_q at each position,  GroupNorm(x) · (W_y z_q + b_y) + (W_b z_q + b_b).

Weights have the names of diffusers' `VQModel`, so that its files load as they are; only `quant_conv` and
`post_quant_conv`, which lie beside its encoder and decoder, lie within them here. One departure: a spatial norm maps
z_q before it repeats it to the size of x, not after, which is the same for fewer products.
"""

from collections.abc import Collection, Sequence

from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from vqvae.networks.blocks import Recomputing

EPS = 1e-6
# The groups of the norms within spatial norms; no config of a released model says otherwise.
SPATIAL_GROUPS = 32


class SpatialNorm(nn.Module):
    """GroupNorm, then a scale and a shift that are linear in the codes' vectors at each position."""

    def __init__(self, channels: int, guide: int):
        super().__init__()
        self.norm_layer = nn.GroupNorm(SPATIAL_GROUPS, channels, eps=EPS)
        self.conv_y = nn.Conv2d(guide, channels, 1)
        self.conv_b = nn.Conv2d(guide, channels, 1)

    def forward(self, x: Float[Tensor, "b f h w"], z_q: Float[Tensor, "b d h2 w2"]) -> Float[Tensor, "b f h w"]:
        scale, shift = (F.interpolate(conv(z_q), size=x.shape[-2:]) for conv in (self.conv_y, self.conv_b))
        return self.norm_layer(x) * scale + shift


def _norm(channels: int, num_groups: int, guide: int | None) -> nn.Module:
    return nn.GroupNorm(num_groups, channels, eps=EPS) if guide is None else SpatialNorm(channels, guide)


def _normed(norm: nn.Module, x: Tensor, z_q: Tensor | None) -> Tensor:
    return norm(x) if isinstance(norm, nn.GroupNorm) else norm(x, z_q)


class ResnetBlock(Recomputing):
    """`x + conv(silu(norm(conv(silu(norm(x))))))`."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int, guide: int | None = None):
        super().__init__()
        self.norm1 = _norm(in_channels, num_groups, guide)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, num_groups, guide)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(
        self, x: Float[Tensor, "b f h w"], z_q: Float[Tensor, "b d h2 w2"] | None = None
    ) -> Float[Tensor, "b f2 h w"]:
        inner = self.conv1(F.silu(_normed(self.norm1, x, z_q)))
        inner = self.conv2(F.silu(_normed(self.norm2, inner, z_q)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + inner


class SingleHeadAttention(Recomputing):
    """Self-attention over all positions with one head, added to its input."""

    def __init__(self, channels: int, num_groups: int, guide: int | None = None):
        super().__init__()
        # The two kinds of norm have different names in files.
        if guide is None:
            self.group_norm = nn.GroupNorm(num_groups, channels, eps=EPS)
        else:
            self.spatial_norm = SpatialNorm(channels, guide)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        self.guided = guide is not None

    def forward(
        self, x: Float[Tensor, "b f h w"], z_q: Float[Tensor, "b d h2 w2"] | None = None
    ) -> Float[Tensor, "b f h w"]:
        normed = _normed(self.spatial_norm if self.guided else self.group_norm, x, z_q)
        positions = rearrange(normed, "b f h w -> b 1 (h w) f")
        mixed = F.scaled_dot_product_attention(self.to_q(positions), self.to_k(positions), self.to_v(positions))
        return x + rearrange(self.to_out[0](mixed), "b 1 (h w) f -> b f h w", h=x.shape[2])


class Downsample(nn.Module):
    """Half as many rows and columns."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Float[Tensor, "b f h w"]) -> Float[Tensor, "b f h2 w2"]:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice as many rows and columns."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b f h w"]) -> Float[Tensor, "b f h2 w2"]:
        return self.conv(F.interpolate(x, scale_factor=2.0))


class Level(nn.Module):
    """Residual blocks at one resolution, each with attention after it or none, then a change of resolution or none."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        num_blocks: int,
        attention: bool,
        num_groups: int,
        guide: int | None = None,
        downsample: bool = False,
        upsample: bool = False,
    ):
        super().__init__()
        widths = [in_channels, *[channels] * num_blocks]
        self.resnets = nn.ModuleList(
            [ResnetBlock(before, channels, num_groups, guide) for before in widths[:num_blocks]]
        )
        self.attentions = nn.ModuleList(
            [SingleHeadAttention(channels, num_groups, guide) for _ in range(num_blocks if attention else 0)]
        )
        self.downsamplers = nn.ModuleList([Downsample(channels)] if downsample else [])
        self.upsamplers = nn.ModuleList([Upsample(channels)] if upsample else [])

    def forward(
        self, x: Float[Tensor, "b f h w"], z_q: Float[Tensor, "b d h2 w2"] | None = None
    ) -> Float[Tensor, "b f2 h3 w3"]:
        for number, resnet in enumerate(self.resnets):
            x = resnet(x, z_q)
            if len(self.attentions):
                x = self.attentions[number](x, z_q)
        for resample in (*self.downsamplers, *self.upsamplers):
            x = resample(x)
        return x


class Middle(nn.Module):
    """Two residual blocks at the resolution of the codes, with attention between them or none."""

    def __init__(self, channels: int, *, attention: bool, num_groups: int, guide: int | None = None):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, num_groups, guide) for _ in range(2)])
        self.attentions = nn.ModuleList([SingleHeadAttention(channels, num_groups, guide)] if attention else [])

    def forward(
        self, x: Float[Tensor, "b f h w"], z_q: Float[Tensor, "b d h2 w2"] | None = None
    ) -> Float[Tensor, "b f h w"]:
        x = self.resnets[0](x, z_q)
        for attention in self.attentions:
            x = attention(x, z_q)
        return self.resnets[1](x, z_q)


class VQGANEncoder(nn.Module):
    """`images: uint8 "b c h w"` to `z_e: float "b h/s w/s d"`, channels last, for s = 2^(levels − 1).

    Its norms look at all of the image, whatever the reach of its convolutions.

    Args:
        dim: d, the width of `z_e`.
        channels: of each level, from the finest on.
        num_blocks: residual blocks at each level.
        attention: the levels whose residual blocks have attention after them; 0 is the finest.
        mid_attention: attention between the last two residual blocks.
        latent_channels: width between `conv_out` and `quant_conv`.
        num_groups: of the norms.
    """

    reach = None

    def __init__(
        self,
        *,
        num_channels: int,
        dim: int,
        channels: Sequence[int],
        num_blocks: int,
        attention: Collection[int],
        mid_attention: bool,
        latent_channels: int,
        num_groups: int,
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(num_channels, channels[0], 3, padding=1)
        levels = [
            Level(
                before,
                width,
                num_blocks=num_blocks,
                attention=level in attention,
                num_groups=num_groups,
                downsample=level < len(channels) - 1,
            )
            for level, (before, width) in enumerate(zip([channels[0], *channels], channels, strict=False))
        ]
        self.down_blocks = nn.ModuleList(levels)
        self.mid_block = Middle(channels[-1], attention=mid_attention, num_groups=num_groups)
        self.conv_norm_out = nn.GroupNorm(num_groups, channels[-1], eps=EPS)
        self.conv_out = nn.Conv2d(channels[-1], latent_channels, 3, padding=1)
        self.quant_conv = nn.Conv2d(latent_channels, dim, 1)

    def forward(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b h2 w2 d"]:
        x = self.conv_in(images.to(self.conv_in.weight.dtype) * (2 / 255) - 1)
        for level in self.down_blocks:
            x = level(x)
        x = self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))
        return self.quant_conv(x).permute(0, 2, 3, 1)


class VQGANDecoder(nn.Module):
    """`z_q: float "b h/s w/s d"` to `features: float "b f h w"` for `num_features` f a pixel.

    Args:
        num_blocks: of the encoder; here each level has one more.
        spatial_norm: norms are MoVQ's; `num_groups` is of those that are not.
        latent_channels: width between `post_quant_conv` and `conv_in`.
        dim, channels, attention, mid_attention: as in `VQGANEncoder`.
    """

    reach = None

    def __init__(
        self,
        *,
        num_features: int,
        dim: int,
        channels: Sequence[int],
        num_blocks: int,
        attention: Collection[int],
        mid_attention: bool,
        latent_channels: int,
        spatial_norm: bool,
        num_groups: int,
    ):
        super().__init__()
        guide = dim if spatial_norm else None
        self.post_quant_conv = nn.Conv2d(dim, latent_channels, 1)
        self.conv_in = nn.Conv2d(latent_channels, channels[-1], 3, padding=1)
        self.mid_block = Middle(channels[-1], attention=mid_attention, num_groups=num_groups, guide=guide)
        levels = []
        before = channels[-1]
        for level in reversed(range(len(channels))):
            levels.append(
                Level(
                    before,
                    channels[level],
                    num_blocks=num_blocks + 1,
                    attention=level in attention,
                    num_groups=num_groups,
                    guide=guide,
                    upsample=level > 0,
                )
            )
            before = channels[level]
        self.up_blocks = nn.ModuleList(levels)
        self.conv_norm_out = _norm(channels[0], num_groups, guide)
        self.conv_out = nn.Conv2d(channels[0], num_features, 3, padding=1)
        # Features near zero: the likelihood starts at the parameters it was designed to start from.
        nn.init.normal_(self.conv_out.weight, std=1e-3)
        assert self.conv_out.bias is not None
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, z_q: Float[Tensor, "b h2 w2 d"]) -> Float[Tensor, "b f h w"]:
        vectors = z_q.to(self.conv_in.weight.dtype).permute(0, 3, 1, 2)
        x = self.mid_block(self.conv_in(self.post_quant_conv(vectors)), vectors)
        for level in self.up_blocks:
            x = level(x, vectors)
        return self.conv_out(F.silu(_normed(self.conv_norm_out, x, vectors)))
