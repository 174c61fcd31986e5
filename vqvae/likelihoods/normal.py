"""Discretised normal: what a squared error is as a likelihood over 256 levels.

A normal variable of mean mu and standard deviation s, both in levels, is put into the bins of width
1 around the levels; the first and the last bin reach to infinity:

    P(y) = Phi((y + 1/2 - mu) / s) - Phi((y - 1/2 - mu) / s)

For s of a few levels and more, -ln P(y) = (y - mu)^2 / 2 s^2 + ln s + ln(2 pi) / 2 nearly: a
squared error together with the variance term that makes it bits. s is one number for each channel:
learned, or fixed.

With c = |y - mu| / s, h = 1 / 2s and the Mills ratio M(t) = (1 - Phi(t)) / phi(t), which is
sqrt(pi / 2) erfcx(t / sqrt 2), a bin within the range has, without overflow at any distance,

    ln P = -t^2 / 2 - ln(2 pi) / 2 + ln(M(t) - exp(-2 c h) M(c + h)),      t = c - h.

Feature layout: means "c", with mu = 127.5 (1 + feature). Features of 0 give mid-grey. A symbol's
parameters are its mu and ln s, both in levels.
"""

import math

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from safefolder.options import Given
from vqvae.likelihoods.base import NUM_LEVELS, Likelihood

# Within these bounds float32 keeps ln P to 1e-4: below, M(-h) would overflow before long; above,
# the difference of two Mills ratios cancels.
_MIN_SCALE = 0.1
_MAX_SCALE = 128.0
_INITIAL_SCALE = 25.5
_MIDDLE = (NUM_LEVELS - 1) / 2


class Normal(Likelihood):
    """Independent discretised normals with a mean for each pixel and a scale for each channel.

    Args:
        num_channels: image channels, at least 1.
        scale: the standard deviation in levels, from 0.1 to 128, for all channels; None learns one
            for each channel, within the same bounds, from 25.5 on.

    Raises:
        ValueError: no channel, or a scale outside its bounds.
    """

    def __init__(self, *, num_channels: Given[int] = 1, scale: float | None = None) -> None:
        super().__init__(num_channels=num_channels, num_features=num_channels, num_parameters=2, coupled=False)
        if scale is not None and not _MIN_SCALE <= scale <= _MAX_SCALE:
            raise ValueError(
                f"got scale={scale}, expected a standard deviation in levels from {_MIN_SCALE} to "
                f"{_MAX_SCALE}, or None to learn it"
            )
        self.scale = scale
        if scale is None:
            initial = torch.full((num_channels,), math.log(_INITIAL_SCALE))
            self.log_scale = nn.Parameter(initial)

    def log_prob(self, images: UInt8[Tensor, "b c h w"], features: Float[Tensor, "b f h w"]) -> Float[Tensor, " b"]:
        self._check(images, features)
        features = self._checked_features(features)
        means = (features + 1) * _MIDDLE
        log_probs = _log_prob(images, means, self._scale(features)[:, None, None])
        return log_probs.sum((1, 2, 3))

    @torch.no_grad()
    def mean(self, features: Float[Tensor, "b f h w"]) -> Float[Tensor, "b c h w"]:
        """The expected level, 0..255, exactly: the cut-off at 0 and 255 included."""
        features = self._checked_features(features)
        inverse = 1 / self._scale(features)[:, None, None]
        means = torch.zeros_like(features)
        for image, scaled in zip(means, (features + 1) * _MIDDLE * inverse, strict=True):
            # E[y] = sum_{v < 255} P(y > v)
            for level in range(NUM_LEVELS - 1):
                image += torch.special.ndtr(scaled - (level + 0.5) * inverse)
        return means

    def point_estimate(self, features: Float[Tensor, "b f h w"]) -> Float[Tensor, "b c h w"]:
        """mu within 0..255, which rounded is the median.

        Not the mean: where mu is white that lies below white, by 0.4 s, as no level lies above. A decoder that was
        trained with a squared error means mu itself.
        """
        return ((self._checked_features(features) + 1) * _MIDDLE).clamp(0, NUM_LEVELS - 1)

    def _pixel_parameters(self, features: Tensor, earlier: Tensor, channels: slice) -> Tensor:
        means = (features[:, channels] + 1) * _MIDDLE
        log_scales = self._scale(features).log()[channels].expand_as(means)
        return torch.stack([means, log_scales], dim=-1)

    def _log_pmf(self, parameters: Tensor) -> Tensor:
        means, log_scales = parameters.split(1, dim=-1)
        return _log_prob(torch.arange(NUM_LEVELS, device=parameters.device), means, log_scales.exp())

    def _cdf(self, parameters: Tensor, levels: Tensor) -> Tensor:
        means, log_scales = parameters.split(1, dim=-1)
        return torch.special.ndtr((levels.to(means.dtype) + 0.5 - means) / log_scales.exp())

    def _scale(self, features: Tensor) -> Float[Tensor, " c"]:
        if self.scale is not None:
            return features.new_full((self.num_channels,), self.scale)
        log_scale = self.log_scale.to(features.dtype)
        return log_scale.clamp(math.log(_MIN_SCALE), math.log(_MAX_SCALE)).exp()


def _log_prob(levels: Tensor, means: Tensor, scale: Tensor) -> Tensor:
    """ln P of integer levels under means and scales in levels; the three broadcast."""
    low, high = levels == 0, levels == NUM_LEVELS - 1
    within = ~(low | high)
    centre = levels.to(means.dtype) - means
    c, h = centre.abs() / scale, 0.5 / scale
    # At an end P = Phi(reach), reach being the distance of the mean on the inner side of the edge.
    reach = torch.where(low, centre + 0.5, 0.5 - centre) / scale
    t = torch.where(within, c - h, reach.neg().clamp(min=0))
    mills = _mills(t) - within * torch.exp(-2 * c * h) * _mills(c + h)
    log_probs = mills.log() - 0.5 * t.square() - 0.5 * math.log(2 * math.pi)
    # With the mean inside, where Phi is near 1 and the Mills ratio would overflow.
    inner = torch.log1p(-0.5 * torch.erfc(reach.clamp(min=0) * math.sqrt(0.5)))
    return torch.where(within | (reach < 0), log_probs, inner)


def _mills(t: Tensor) -> Tensor:
    """(1 - Phi(t)) / phi(t), the Mills ratio of a standard normal."""
    return torch.special.erfcx(t * math.sqrt(0.5)) * math.sqrt(math.pi / 2)
