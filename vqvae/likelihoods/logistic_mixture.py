"""Discretised logistic mixture (PixelCNN++, Salimans et al. 2017), for one or three channels.

With x = 2 y / 255 - 1 in [-1, 1] for a level y, a component's channel is a logistic variable of
mean mu and scale s, put into the 256 bins of width 2/255 around the levels; the first and the last
bin reach to infinity:

    P(y) = sigma((x + 1/255 - mu) / s) - sigma((x - 1/255 - mu) / s)

One mixture index serves all channels of a pixel, and within a component green depends on red, and
blue on both, through their means:

    P(r, g, b) = sum_k pi_k P_k(r) P_k(g | r) P_k(b | r, g)
    mu_G = m_G + tanh(alpha) r        mu_B = m_B + tanh(beta) r + tanh(gamma) g

Departures from the paper:

- No fallback to the density where the difference of sigmoids is small: it would not sum to one.
  The difference has a closed form, with c = (x - mu) / s and h = 1 / (255 s),

      P = sinh h / (cosh h + cosh c)        (an end: sigma(h + c) at y = 0, sigma(h - c) at 255)

  which neither cancels nor overflows as, with v = sigma(-|c|) and S = sinh(h / 2),

      P = exp(-|c|) 4 S sqrt(1 + S^2) (1 - v)^2 / (1 + 4 S^2 v (1 - v)).

- Log-scales stay in [-7, 7]; the paper has the lower bound alone.
- With `zero_component`, one more component is a point mass at level 0 of all channels. Pictures on
  an empty ground (half of the pixels of Fashion-MNIST) need it.

Feature layout, k components and c channels, in this order: mixture logits "k" (with the zero
component: "k + 1", the point's last), means "(c k)", log-scales "(c k)", and for three channels the
coefficients alpha, beta, gamma "(3 k)". At features of 0 the components stand in the middles of k
equal parts of the range, with s = 1 / (2 k): means and log-scales count from there.

A symbol's parameters are those of the mixture that it has given the channels before it: log-weights
"k" ("k + 1": the point's last, -inf where an earlier channel is not 0), means "k" with their offset
and coupling, and log-scales "k" with their offset and bounds.
"""

import math
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from safefolder.options import Given
from vqvae.likelihoods.base import NUM_LEVELS, Likelihood
from vqvae.likelihoods.chunks import images_per_group, score_in_chunks

_MIN_LOG_SCALE = -7.0
_MAX_LOG_SCALE = 7.0
_HALF_BIN = 1 / 255
_LOG2_E = 1 / math.log(2)


class _Parameters(NamedTuple):
    """Views of the features: n images, p pixels, k components, c channels."""

    logits: Tensor  # "n k p", or "n k+1 p" with the zero component
    means: Tensor  # "n c k p", without their offsets
    log_scales: Tensor  # "n c k p", without their offset and not clamped
    coefficients: Tensor | None  # "n 3 k p", before tanh


class _Bins(NamedTuple):
    """Which bin of the line each level has, of one shape, in floating point."""

    centre: Tensor  # the bin's middle on the scale of x; for an end bin its only edge
    side: Tensor  # +1 in the first bin, -1 in the last, 0 within
    within: Tensor  # 1 within, 0 in the first and the last bin
    x: Tensor  # the level on the scale of x


class _Component(NamedTuple):
    """P = ratio * exp(-decay) of components' bins, and what it was made from."""

    ratio: Tensor
    decay: Tensor
    c: Tensor
    v: Tensor
    bell: Tensor  # v (1 - v)
    squared: Tensor  # S^2
    two_sinh: Tensor  # 2 sinh h
    denominator: Tensor


class LogisticMixture(Likelihood):
    """Mixture of discretised logistics, channels coupled as in PixelCNN++.

    Args:
        num_channels: 1 or 3.
        num_components: components k, the zero component aside.
        zero_component: add a component that is a point mass at level 0 of all channels.

    Raises:
        ValueError: another number of channels, or no component.
    """

    def __init__(self, *, num_channels: Given[int] = 1, num_components: int = 5, zero_component: bool = False) -> None:
        if num_channels not in (1, 3):
            raise ValueError(
                f"got num_channels={num_channels}, expected 1 or 3 for LogisticMixture; "
                "use Categorical or Normal for other images"
            )
        if num_components < 1:
            raise ValueError(f"got num_components={num_components}, expected at least 1")
        per_component = 1 + 2 * num_channels + (3 if num_channels == 3 else 0)
        super().__init__(
            num_channels=num_channels,
            num_features=num_components * per_component + int(zero_component),
            num_parameters=num_components * 3 + int(zero_component),
            coupled=num_channels > 1,
        )
        self.num_components = num_components
        self.zero_component = zero_component
        # Means in the middles of k equal parts of [-1, 1] (see `_means`), scales of a quarter of a
        # part: at features of 0 every level is within reach of some component.
        self.log_scale_offset = -math.log(2 * num_components)

    def log_prob(self, images: UInt8[Tensor, "b c h w"], features: Float[Tensor, "b f h w"]) -> Float[Tensor, " b"]:
        self._check(images, features)
        elements = images.shape[1:].numel() * self.num_components
        return score_in_chunks(self._score, images, features, elements)

    def _score(self, images: Tensor, features: Tensor, gradient: Tensor | None) -> Tensor:
        """Log-probabilities "n", and their gradient where asked: the hot path.

        Operations are in place and chosen by their time on a CPU, where an expm1, a comparison or a
        `where` costs many products: hence masks as factors of 0 and 1, and everything about a
        component's shape from one exp2 and one sigmoid.
        """
        k = self.num_components
        parameters = self._split(features)
        bins = _bins(rearrange(images, "n c h w -> n c 1 (h w)"), features.dtype)
        x, side, within = bins.x, bins.side, bins.within
        means, tanhs = self._means(parameters, x)
        bits = parameters.log_scales.mul(-_LOG2_E).sub_(self.log_scale_offset * _LOG2_E)
        clamped_bits = bits.clamp(-_MAX_LOG_SCALE * _LOG2_E, -_MIN_LOG_SCALE * _LOG2_E)
        inverse = clamped_bits.exp2()
        ratio, decay, c, v, bell, squared, two_sinh, denominator = _component(bins, means, inverse)
        joint_ratio, joint_decay = ratio[:, 0], decay[:, 0]
        for channel in range(1, self.num_channels):
            joint_ratio = joint_ratio * ratio[:, channel]
            joint_decay = joint_decay + decay[:, channel]

        # ln sum_k exp(logit_k - decay_k) ratio_k without a logarithm for each component: ratios
        # are within 1e-18..1e6, so it is enough that the softmax shifts by the largest exponent.
        exponents = parameters.logits.clone()
        exponents[:, :k] -= joint_decay
        if self.zero_component:
            black = (images == 0).all(1, keepdim=True).flatten(2)
            exponents[:, k:].masked_fill_(~black, -torch.inf)
        posterior = exponents.softmax(1)
        top = posterior.amax(1, keepdim=True)
        posterior[:, :k] *= joint_ratio
        total = posterior.sum(1, keepdim=True)
        mixture = parameters.logits.softmax(1)
        # The largest probability of a softmax is exp(largest logit) / sum of exp(logits).
        shift = exponents.amax(1, keepdim=True).sub_(parameters.logits.amax(1, keepdim=True))
        odds = mixture.amax(1, keepdim=True).mul_(total).div_(top)
        values = odds.log_().add_(shift).sum((1, 2))
        if gradient is None:
            return values

        grads = self._split(gradient)
        posterior.div_(total)
        grads.logits.copy_(posterior).sub_(mixture)
        responsibility = posterior[:, None, :k]
        # slope = d ln P_k / dc: within -sinh c / (cosh h + cosh c), at the ends a sigmoid.
        slope = (1 - 2 * v).div_(denominator).copysign_(c).mul_(-0.5 - 0.5 * within)
        slope.add_(side, alpha=0.5)
        # width = d ln P_k / dh: within coth h - sinh h / (cosh h + cosh c), at the ends 0.
        width = (2 + 4 * squared).div_(two_sinh).sub_(bell.mul_(two_sinh).div_(denominator))
        width.mul_(inverse).mul_(-_HALF_BIN * within).addcmul_(c, slope, value=-1)
        grads.log_scales.copy_(width.mul_(responsibility).mul_(bits == clamped_bits))
        grads.means.copy_(slope.mul_(inverse.neg_()).mul_(responsibility))
        if grads.coefficients is not None:
            assert tanhs is not None
            red, green = x[:, 0], x[:, 1]
            grads.coefficients[:, 0] = grads.means[:, 1] * red
            grads.coefficients[:, 1] = grads.means[:, 2] * red
            grads.coefficients[:, 2] = grads.means[:, 2] * green
            grads.coefficients.mul_(tanhs.square_().neg_().add_(1))
        return values

    def mean(self, features: Float[Tensor, "b f h w"]) -> Float[Tensor, "b c h w"]:
        """The expected level, 0..255: exact for one channel and for the first of three.

        For later channels each component's mean takes the component's own expected earlier
        channels instead of averaging over them, and the components are then averaged. That is exact
        where the logistic is not cut off at 0 or 255, and in any case within the range.
        """
        features = self._checked_features(features)
        _, _, height, width = features.shape
        group = images_per_group(features, self.num_components * height * width)
        means = torch.cat([self._mean_of_group(part) for part in features.split(group)])
        return means.unflatten(2, (height, width))

    def _mean_of_group(self, features: Tensor) -> Float[Tensor, "n c p"]:
        parameters = self._split(features)
        mixture = parameters.logits.softmax(1)[:, : self.num_components]
        inverse = self._log_scales(parameters).neg_().exp_()
        x = torch.zeros_like(parameters.means)
        levels = []
        for channel in range(self.num_channels):
            means, _ = self._means(parameters, x)
            level = _ExpectedLevel.apply(means[:, channel], inverse[:, channel])
            x = torch.cat([x[:, :channel], (level * (2 * _HALF_BIN) - 1)[:, None], x[:, channel + 1 :]], dim=1)
            levels.append((mixture * level).sum(1))
        return torch.stack(levels, dim=1)

    def _pixel_parameters(self, features: Tensor, earlier: Tensor, channels: slice) -> Tensor:
        # As one image of n pixels, so that long rows are what the operations run along.
        parts = self._split(rearrange(features, "n f -> 1 f n").contiguous())
        bins = _bins(rearrange(earlier, "n c -> 1 c 1 n"), features.dtype)
        log_scales, means = self._log_scales(parts), self._means(parts, bins.x)[0]
        log_weights = [parts.logits.log_softmax(1)]
        log_probs = torch.zeros_like(parts.logits)
        for channel in range(channels.stop - 1):
            one = slice(channel, channel + 1)
            own = _Bins(*(each[:, one] for each in bins))
            term = _component(own, means[:, one], log_scales[:, one].neg().exp_())
            log_probs[:, : self.num_components] += term.ratio.log_().sub_(term.decay)[:, 0]
            if self.zero_component:
                log_probs[:, -1].masked_fill_(earlier[:, channel] != 0, -torch.inf)
            log_weights.append(log_weights[0].add(log_probs).log_softmax(1))
        weights = torch.stack(log_weights[channels], dim=1)
        parameters = torch.cat([weights, means[:, channels], log_scales[:, channels]], dim=2)
        return rearrange(parameters, "1 d p n -> n d p")

    def _log_pmf(self, parameters: Tensor) -> Tensor:
        log_weights, means, log_scales = self._split_parameters(parameters)
        inverse = log_scales.neg().exp_()
        bins = _bins(torch.arange(NUM_LEVELS, device=parameters.device), parameters.dtype)
        top = parameters.new_full((len(parameters), NUM_LEVELS), -torch.inf)
        if self.zero_component:
            top[:, 0] = log_weights[:, -1]
        total = top.isfinite().to(top.dtype)
        for k in range(self.num_components):
            term = _component(bins, means[:, k, None], inverse[:, k, None])
            exponent = log_weights[:, k, None] - term.decay
            shift = torch.maximum(top, exponent)
            total.mul_(top.sub_(shift).exp_())
            total.addcmul_(exponent.sub_(shift).exp_(), term.ratio)
            top = shift
        return total.log_().add_(top)

    def _cdf(self, parameters: Tensor, levels: Tensor) -> Tensor:
        log_weights, means, log_scales = self._split_parameters(parameters)
        weights, inverse = log_weights.softmax(-1), log_scales.neg().exp_()
        # Upper edges in two parts, as one float's rounding, 1e-16, grows a thousandfold in the narrowest component.
        parts = levels.mul(2).sub_(NUM_LEVELS - 2).to(parameters.dtype)
        edges = parts / (NUM_LEVELS - 1)
        rests = parts.sub_(edges, alpha=NUM_LEVELS).add_(edges).div_(NUM_LEVELS - 1)  # both sums are exact
        cdf = torch.zeros_like(edges)
        if self.zero_component:
            cdf += weights[:, -1:]
        for k in range(self.num_components):
            z = (edges - means[:, k, None]).add_(rests).mul_(inverse[:, k, None])
            cdf.addcmul_(z.sigmoid_(), weights[:, k, None])
        return cdf

    def _split_parameters(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-weights, means, log-scales "n k" ("n k+1" log-weights with the zero component)."""
        k = self.num_components
        log_weights, means, log_scales = parameters.split([k + int(self.zero_component), k, k], dim=-1)
        return log_weights, means, log_scales

    def _split(self, features: Tensor) -> _Parameters:
        k, c = self.num_components, self.num_channels
        flat = features.flatten(2)
        sizes = [k + int(self.zero_component), c * k, c * k]
        sizes.append(self.num_features - sum(sizes))
        logits, means, log_scales, coefficients = flat.split(sizes, dim=1)
        return _Parameters(
            logits=logits,
            means=means.unflatten(1, (c, k)),
            log_scales=log_scales.unflatten(1, (c, k)),
            coefficients=coefficients.unflatten(1, (3, k)) if c == 3 else None,
        )

    def _log_scales(self, parameters: _Parameters) -> Float[Tensor, "n c k p"]:
        return (parameters.log_scales + self.log_scale_offset).clamp_(_MIN_LOG_SCALE, _MAX_LOG_SCALE)

    def _means(self, parameters: _Parameters, x: Tensor) -> tuple[Float[Tensor, "n c k p"], Tensor | None]:
        """Means given the channels x ("n c 1 p" or "n c k p"), and the coefficients' tanh."""
        means = parameters.means + self._offsets(parameters.means)
        if parameters.coefficients is None:
            return means, None
        if parameters.coefficients.requires_grad and torch.is_grad_enabled():
            tanhs = parameters.coefficients.tanh()
        else:  # tanh(x) = 2 sigma(2x) - 1, at a fraction of the time
            tanhs = parameters.coefficients.mul(2).sigmoid_().mul_(2).sub_(1)
        means[:, 1].addcmul_(tanhs[:, 0], x[:, 0])
        means[:, 2].addcmul_(tanhs[:, 1], x[:, 0]).addcmul_(tanhs[:, 2], x[:, 1])
        return means, tanhs

    def _offsets(self, like: Tensor) -> Float[Tensor, "k 1"]:
        """Where the components' means are at features of 0: the middles of k equal parts."""
        k = self.num_components
        parts = torch.arange(k, dtype=like.dtype, device=like.device)[:, None]
        return (2 * parts + 1) / k - 1


def _bins(levels: Tensor, dtype: torch.dtype) -> _Bins:
    side = (levels == 0).to(dtype).sub_((levels == NUM_LEVELS - 1).to(dtype))
    x = levels.to(dtype).mul_(2 * _HALF_BIN).sub_(1)
    return _Bins(x.add(side, alpha=_HALF_BIN), side, 1 - side.abs(), x)


def _component(bins: _Bins, means: Tensor, inverse: Tensor) -> _Component:
    """Components of these means and inverse scales in these bins; all broadcast."""
    c = (bins.centre - means).mul_(inverse)
    distance = c.abs()
    v = distance.neg().sigmoid_()
    one_minus_v = 1 - v
    bell = v * one_minus_v
    half_sinh = _sinh(inverse * (0.5 * _HALF_BIN))
    squared = half_sinh.square()
    two_sinh = (1 + squared).sqrt_().mul_(half_sinh).mul_(4)
    denominator = (bell * squared).mul_(4 * bins.within).add_(1)
    ratio = (two_sinh * one_minus_v).mul_(bins.within).add_(1 - bins.within)
    ratio.mul_(one_minus_v).div_(denominator)
    # Within, the decay is |c|; at an end it is max(0, -c) or max(0, c).
    decay = distance.mul_(0.5 + 0.5 * bins.within).addcmul_(c, bins.side, value=-0.5)
    return _Component(ratio, decay, c, v, bell, squared, two_sinh, denominator)


def _sinh(x: Tensor) -> Tensor:
    """sinh of 0 < x < 2.2, to float32's precision relative to its value, however small.

    A series on the CPU, where torch.sinh is slow.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return x.sinh()
    squared = x * x
    one = torch.ones((), dtype=x.dtype, device=x.device)
    series = squared.div(12 * 13).add_(1)
    for order in (11, 9, 7, 5, 3):
        torch.addcmul(one, series, squared, value=1 / (order * (order - 1)), out=series)
    return series.mul_(x)


class _ExpectedLevel(torch.autograd.Function):
    """E[y] = Σ_{v < 255} P(y > v) of logistics cut off at 0 and 255, whose slopes are added up along with it."""

    @staticmethod
    def forward(ctx: Any, means: Tensor, inverse: Tensor) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        scaled, level = means * inverse, torch.zeros_like(means)
        slope, moment = torch.zeros_like(means), torch.zeros_like(means)
        for odd in range(1, 2 * NUM_LEVELS - 1, 2):
            edge = odd / 255 - 1
            above = torch.sub(scaled, inverse, alpha=edge).sigmoid_()
            level += above
            if wanted:
                density = torch.addcmul(above, above, above, value=-1)
                slope += density
                moment.add_(density, alpha=edge)
        ctx.save_for_backward(means, inverse, slope, moment)
        return level

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyrefly: ignore[bad-override]
        means, inverse, slope, moment = ctx.saved_tensors
        return grad * slope * inverse, grad * (means * slope - moment)
