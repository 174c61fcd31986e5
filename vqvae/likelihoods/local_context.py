"""Pixels given the code and the pixels nearby that come before: a decoder with a small causal network.

    P(y | features) = prod_pixels P(y_p | features at p + correction(pixels before p nearby, features there))

The decoder's features are the parameters of a `LogisticMixture`, as they are for a factorised likelihood. A causal
convolutional network (van den Oord et al. 2016, "Conditional image generation with PixelCNN decoders") adds to them
what the pixels above and to the left say. Channels of a pixel are coupled in their order by the mixture.

    x_0 = masked convolution of the pixels + W features      sees the four rows above, five columns to either side, and
                                                             the five pixels to the left, not the pixel itself
    x <- x + conv1x1(silu(masked conv(silu(x))))             `num_blocks` times: left, the three above, and itself
    correction = conv1x1(silu(x))                            zero at the start

What comes before is not the raster order but `t = column + 2 row`: a pixel may look at those of a smaller t, which are
all to its left and all above it up to 2k - 1 columns to the right, k rows up. All pixels of one t, a wavefront, are
independent given those before, so an image of height H and width W is sampled and coded in W + 2 (H - 1) steps and not
in H W, each of them on a wavefront alone: what the layers found for pixels before is kept. For training all pixels are
scored at once.

A strong context leaves codes little to say. So that they keep the structure of the image, the features alone are
trained as a likelihood too: `auxiliary` is their distortion without the network, and `mean`, from which images are
reconstructed, is that of the features alone.
"""

import math
from collections import deque
from collections.abc import Iterator
from typing import cast

import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from safefolder.options import Given
from vqvae.likelihoods.base import Likelihood
from vqvae.likelihoods.chunks import computing_dtype
from vqvae.likelihoods.logistic_mixture import LogisticMixture

# Rows above and columns to either side that the first layer sees.
_ROWS, _COLUMNS = 4, 5


class MaskedConv(nn.Conv2d):
    """A convolution that sees pixels of an earlier wavefront alone, and with `own` the pixel itself.

    Its window is `rows` rows up and `columns` columns to either side.
    """

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, *, rows: int, columns: int, own: bool):
        super().__init__(inputs, outputs, (rows + 1, 2 * columns + 1))
        self.rows, self.columns = rows, columns
        window = [(up, right) for up in range(rows, -1, -1) for right in range(-columns, columns + 1)]
        seen = [right < 2 * up or (own and up == right == 0) for up, right in window]
        mask = torch.tensor(seen, dtype=torch.float32).reshape(rows + 1, 2 * columns + 1)
        self.register_buffer("mask", mask, persistent=False)
        nn.init.normal_(self.weight, std=1 / math.sqrt(inputs * sum(seen)))
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(self, input: Float[Tensor, "b f h w"]) -> Float[Tensor, "b g h w"]:
        padded = F.pad(input, (self.columns, self.columns, self.rows, 0))
        weight = self.weight * self.mask.to(self.weight.dtype)
        return _convolve(padded, weight, self.bias)

    def taps(self) -> list[tuple[int, int]]:
        """The positions that it sees, as rows and columns from the pixel itself."""
        positions = self.mask.nonzero().tolist()
        return [(row - self.rows, column - self.columns) for row, column in positions]

    def matrix(self) -> Float[Tensor, "g taps_f"]:
        """Its weights on those positions."""
        seen = self.mask.bool()
        return self.weight[:, :, seen].transpose(1, 2).flatten(1)


class CausalBlock(nn.Module):
    """`x + conv1x1(silu(masked conv(silu(x))))`; starts as the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.spatial = MaskedConv(width, width, rows=1, columns=1, own=True)
        self.pointwise = nn.Conv2d(width, width, 1)
        for parameter in self.pointwise.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Float[Tensor, "b f h w"]) -> Float[Tensor, "b f h w"]:
        return x + _convolve(F.silu(self.spatial(F.silu(x))), self.pointwise.weight, self.pointwise.bias)


class LocalContext(Likelihood):
    """A logistic mixture whose parameters also depend on the pixels before.

    Args:
        num_channels: 1 or 3.
        num_components, zero_component: of the mixture.
        width: channels of the network.
        num_blocks: its residual blocks; each sees one row and one column further.
        features_weight: weight of the distortion of the features alone in training, 0 or more.

    Raises:
        ValueError: as `LogisticMixture`, or a size or weight out of range.
    """

    def __init__(
        self,
        *,
        num_channels: Given[int] = 1,
        num_components: int = 5,
        zero_component: bool = False,
        width: int = 64,
        num_blocks: int = 4,
        features_weight: float = 0.1,
    ) -> None:
        if width < 1 or num_blocks < 0 or not 0 <= features_weight < math.inf:
            raise ValueError(
                f"got width={width}, num_blocks={num_blocks}, features_weight={features_weight}; "
                "expected width >= 1, num_blocks >= 0 and a weight >= 0"
            )
        mixture = LogisticMixture(
            num_channels=num_channels, num_components=num_components, zero_component=zero_component
        )
        super().__init__(
            num_channels=num_channels,
            num_features=mixture.num_features,
            num_parameters=mixture.num_parameters,
            coupled=mixture.coupled,
        )
        self.mixture = mixture
        self.features_weight = features_weight
        num_inputs = num_channels + 1 + int(zero_component)
        self.first = MaskedConv(num_inputs, width, rows=_ROWS, columns=_COLUMNS, own=False)
        self.features = nn.Conv2d(mixture.num_features, width, 1, bias=False)
        self.blocks = nn.ModuleList(CausalBlock(width) for _ in range(num_blocks))
        self.head = nn.Conv2d(width, mixture.num_features, 1)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)
        self.to(memory_format=torch.channels_last)

    def log_prob(self, images: UInt8[Tensor, "b c h w"], features: Float[Tensor, "b f h w"]) -> Float[Tensor, " b"]:
        self._check(images, features)
        return self.mixture.log_prob(images, self._corrected(images, features))

    def auxiliary(
        self, images: UInt8[Tensor, "b c h w"], features: Float[Tensor, "b f h w"]
    ) -> dict[str, Float[Tensor, ""]]:
        if not self.features_weight:
            return {}
        alone = -self.features_log_prob(images, features).mean() / images[0].numel()
        return {"features": self.features_weight * alone}

    def features_log_prob(
        self, images: UInt8[Tensor, "b c h w"], features: Float[Tensor, "b f h w"]
    ) -> Float[Tensor, " b"]:
        """ln of the images' probability under the features alone, without a look at other pixels; nats."""
        return self.mixture.log_prob(images, features)

    def mean(self, features: Float[Tensor, "b f h w"]) -> Float[Tensor, "b c h w"]:
        """The expected level of the mixture that the features alone are, 0..255."""
        return self.mixture.mean(features)

    def _corrected(self, images: Tensor, features: Tensor) -> Float[Tensor, "b f h w"]:
        """The parameters of every pixel's mixture, given the pixels before it."""
        features = features.to(computing_dtype(features))
        x = self.first(self._inputs(images, features.dtype)) + _convolve(features, self.features.weight, None)
        for block in self._causal_blocks():
            x = block(x)
        return features + _convolve(F.silu(x), self.head.weight, self.head.bias)

    def _inputs(self, levels: Tensor, dtype: torch.dtype) -> Float[Tensor, "b i h w"]:
        """Levels on [-1, 1]; whether all are 0, where that is special; ones, which tell the image from around it."""
        channels = [levels.to(dtype) * (2 / 255) - 1]
        if self.mixture.zero_component:
            channels.append((levels == 0).all(1, keepdim=True))
        channels.append(torch.ones_like(levels[:, :1]))
        inputs = torch.cat([channel.to(dtype) for channel in channels], 1)
        return inputs.contiguous(memory_format=torch.channels_last)

    def _causal_blocks(self) -> list[CausalBlock]:
        return [cast(CausalBlock, block) for block in self.blocks]

    @torch.no_grad()
    def symbol_parameters(
        self, images: UInt8[Tensor, "b c h w"], features: Float[Tensor, "b f h w"]
    ) -> Float[Tensor, "b c h w p"]:
        """As the base says, for all pixels at once instead of a wavefront after the other."""
        self._check(images, features)
        return self.mixture.symbol_parameters(images, self._corrected(images, self._checked_features(features)))

    def _pixel_groups(self, height: int, width: int) -> list[Int[Tensor, " m"]]:
        """The wavefronts that have pixels: in an image of a single column every other one has none."""
        return [pixels for pixels in _wavefronts(height, width) if len(pixels)]

    def _pixel_steps(
        self, features: Float[Tensor, "b f h w"], images: UInt8[Tensor, "b c h w"]
    ) -> Iterator[tuple[Int[Tensor, " m"], Float[Tensor, "b m f"]]]:
        blocks = self._causal_blocks()
        inputs = _Fronts(self.first, features)
        layers = [_Fronts(block.spatial, features) for block in blocks]
        pointwise = [_Pointwise(block.pointwise, features) for block in blocks]
        condition, head = _Pointwise(self.features, features), _Pointwise(self.head, features)
        by_pixel = rearrange(features, "b f h w -> (h w) b f").contiguous()
        width = images.shape[3]
        for pixels in _wavefronts(*images.shape[2:]):
            if not len(pixels):
                for fronts in (inputs, *layers):
                    fronts.skip()
                continue
            rows = slice(int(pixels[0]) // width, int(pixels[-1]) // width + 1)
            pixels = pixels.to(features.device)
            here = by_pixel[pixels]
            x = inputs.look(rows) + condition(here)
            for layer, mixed in zip(layers, pointwise, strict=True):
                layer.put(rows, F.silu(x))
                x = x + mixed(F.silu(layer.look(rows)))
            yield pixels, rearrange(here + head(F.silu(x)), "m b f -> b m f")
            chosen = images.flatten(2)[:, :, pixels, None]
            inputs.put(rows, rearrange(self._inputs(chosen, features.dtype), "b i m 1 -> m b i"))

    def _pixel_parameters(self, features: Tensor, earlier: Tensor, channels: slice) -> Tensor:
        return self.mixture._pixel_parameters(features, earlier, channels)

    def _log_pmf(self, parameters: Tensor) -> Tensor:
        return self.mixture._log_pmf(parameters)

    def _cdf(self, parameters: Tensor, levels: Tensor) -> Tensor:
        return self.mixture._cdf(parameters, levels)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution as precise as what it is given."""
    return F.conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _wavefronts(height: int, width: int) -> list[Int[Tensor, " m"]]:
    """The pixels of each t, as flat indices into "(h w)"."""
    columns, rows = (torch.arange(size, device="cpu") for size in (width, height))
    time = (columns + 2 * rows[:, None]).flatten()
    return [(time == t).nonzero()[:, 0] for t in range(width + 2 * (height - 1))]


class _Pointwise:
    """A convolution of 1x1 as a linear map of pixels "m b f"."""

    def __init__(self, conv: nn.Conv2d, like: Tensor):
        self._weight = conv.weight[:, :, 0, 0].to(like.dtype)
        self._bias = None if conv.bias is None else conv.bias.to(like.dtype)

    def __call__(self, x: Float[Tensor, "m b f"]) -> Float[Tensor, "m b g"]:
        return F.linear(x, self._weight, self._bias)


class _Fronts:
    """A masked convolution on the last wavefronts, as many as it looks back at.

    A wavefront has at most one pixel of each row of the image. So what lies `up` rows above and `right` columns to the
    right of a wavefront's pixels is a run of rows of the wavefront `2 up - right` steps before, and no pixel has to be
    looked up. Where there is no pixel there are zeros, which is what a convolution is padded with.
    """

    def __init__(self, conv: MaskedConv, like: Float[Tensor, "b f h w"]):
        batch, _, height, _ = like.shape
        assert conv.bias is not None
        self._matrix, self._bias = conv.matrix().to(like.dtype), conv.bias.to(like.dtype)
        # One that does not see the pixel itself is asked before its wavefront is put.
        latest = min(-2 * row - column for row, column in conv.taps())
        self._taps = [(-2 * row - column - latest, row + conv.rows) for row, column in conv.taps()]
        num = 1 + max(back for back, _ in self._taps)
        empty = like.new_zeros(height + conv.rows, batch, conv.in_channels)
        self._above = conv.rows
        self._empty, self._fronts = empty, deque([empty] * num, maxlen=num)

    def put(self, rows: slice, values: Float[Tensor, "m b f"]) -> None:
        """The next wavefront, with pixels in these rows."""
        front = torch.zeros_like(self._empty)
        front[rows.start + self._above : rows.stop + self._above] = values
        self._fronts.appendleft(front)

    def skip(self) -> None:
        """The next wavefront, without pixels."""
        self._fronts.appendleft(self._empty)

    def look(self, rows: slice) -> Float[Tensor, "m b g"]:
        """What the convolution gives at the pixels of the wavefront in these rows."""
        seen = [self._fronts[back][rows.start + down : rows.stop + down] for back, down in self._taps]
        return F.linear(torch.cat(seen, -1), self._matrix, self._bias)
