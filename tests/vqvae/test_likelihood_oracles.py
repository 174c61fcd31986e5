"""The families' formulas, from the modules' documentation, against plain loops in float64."""

import itertools
import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
import torch
from likelihood_worlds import cdf_table, generator, pixels, some_features, some_images

from vqvae.likelihoods import Categorical, LogisticMixture, Normal


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def logistic_mass(level: int, mean: float, scale: float) -> float:
    x = 2 * level / 255 - 1
    upper = 1.0 if level == 255 else sigmoid((x + 1 / 255 - mean) / scale)
    lower = 0.0 if level == 0 else sigmoid((x - 1 / 255 - mean) / scale)
    return upper - lower


def mixture_oracle(features: np.ndarray, pixel: list[int], k: int, zero: bool) -> float:
    """ln P of one pixel; its features in the documented order."""
    c = len(pixel)
    logits, rest = features[: k + zero], features[k + zero :]
    means, log_scales, coefficients = rest[: c * k], rest[c * k : 2 * c * k], rest[2 * c * k :]
    weights = np.exp(logits) / np.exp(logits).sum()
    x = [2 * level / 255 - 1 for level in pixel]
    total = 0.0
    for i in range(k):
        mass = weights[i]
        for j in range(c):
            mean = (2 * i + 1) / k - 1 + means[j * k + i]
            if j == 1:
                mean += math.tanh(coefficients[i]) * x[0]
            if j == 2:
                mean += math.tanh(coefficients[k + i]) * x[0]
                mean += math.tanh(coefficients[2 * k + i]) * x[1]
            scale = math.exp(min(7.0, max(-7.0, log_scales[j * k + i] - math.log(2 * k))))
            mass *= logistic_mass(pixel[j], mean, scale)
        total += mass
    if zero and not any(pixel):
        total += weights[k]
    return math.log(total) if total else -math.inf


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_mixture_against_loops(num_channels, zero, spread):
    likelihood = LogisticMixture(num_channels=num_channels, num_components=4, zero_component=zero)
    features = some_features(likelihood, batch=8, size=4, spread=spread)
    images = likelihood.sample(features, generator())
    images[:2] = some_images(likelihood, batch=2, size=4)
    images, features = pixels(images), pixels(features)
    expected = torch.tensor(
        [
            mixture_oracle(f.flatten().numpy(), y.flatten().tolist(), 4, zero)
            for f, y in zip(features, images, strict=True)
        ],
        dtype=torch.float64,
    )
    exact = expected > -16  # below, the loops' differences of sigmoids are not
    assert exact.float().mean() > 0.6
    actual = likelihood.log_prob(images, features)
    torch.testing.assert_close(actual[exact], expected[exact], atol=1e-8, rtol=0)
    narrow = likelihood.log_prob(images, features.float()).double()
    torch.testing.assert_close(narrow[exact], expected[exact], atol=1e-4, rtol=0)


def exact_mixture_cdf(log_weights: list[float], means: list[float], log_scales: list[float], level: int) -> Decimal:
    """To 40 digits; a further weight is the point's."""
    with localcontext() as context:
        context.prec = 40
        weights = [Decimal(each).exp() for each in log_weights]
        edge = Decimal(2 * level - 254) / 255
        masses = [
            weight / (1 + (-(edge - Decimal(mean)) / Decimal(scale).exp()).exp())
            for weight, mean, scale in zip(weights, means, log_scales, strict=False)
        ]
        return (sum(masses) + sum(weights[len(means) :])) / sum(weights)


@pytest.mark.parametrize("zero", [False, True])
def test_mixture_cdf_to_the_last_digits(zero):
    """The narrowest components, at whose means the distribution rises by a fourth of it in a fraction of a level."""
    likelihood = LogisticMixture(num_channels=1, num_components=5, zero_component=zero)
    parameters = torch.randn(150, 15 + zero, generator=generator(), dtype=torch.float64)
    parameters[:, -5:] = parameters[:, -5:] - 6
    parameters[:50, -5:] = -7
    near = (parameters[:, -10:-5] * 127.5 + 127.5).round().long().clamp(0, 254)
    parameters[:100, -10:-5] = ((2 * near - 254) / 255 + parameters[:, :5] * 1e-3)[:100]
    actual = likelihood.cdf(parameters, near)
    for row, levels, values in zip(parameters.tolist(), near.tolist(), actual.tolist(), strict=True):
        for level, value in zip(levels, values, strict=True):
            expected = exact_mixture_cdf(row[:-10], row[-10:-5], row[-5:], level)
            assert abs(Decimal(value) - expected) < Decimal("1e-15")


def test_mixture_scale_bounds():
    """Log-scales beyond their bounds count as the bounds, and get no gradient."""
    likelihood = LogisticMixture(num_channels=1, num_components=1)
    images = torch.full((4, 1, 1, 1), 9, dtype=torch.uint8)
    features = torch.zeros(4, 3, 1, 1)
    features[:, 1] = 2 * 9 / 255 - 1
    features[:, 2, 0, 0] = torch.tensor([-100.0, -7.0, 7.0, 100.0])
    features[1:3, 2] += math.log(2)
    features.requires_grad_()
    log_prob = likelihood.log_prob(images, features)
    torch.testing.assert_close(log_prob[0], log_prob[1])
    torch.testing.assert_close(log_prob[2], log_prob[3])
    log_prob.sum().backward()
    assert features.grad[0, 2] == 0
    assert features.grad[3, 2] == 0


def test_mixture_mean_of_later_channels():
    """Against the enumerated mean over red, for components away from the ends."""
    likelihood = LogisticMixture(num_channels=3, num_components=2)
    features = some_features(likelihood, batch=1, size=1)
    features[:, 2:8] *= 0.2  # means
    features[:, 8:14] = -2.5  # log-scales: about 5 levels
    features[:, 14:] *= 0.3
    images = torch.zeros(256, 3, 1, 1, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(256)
    table = cdf_table(likelihood, features.expand(256, -1, 1, 1), images)[..., 0, 0, :]
    red = table[0, 0].diff(prepend=torch.zeros(1, dtype=torch.float64))
    green = (red * (1 - table[:, 1]).sum(-1)).sum()
    mean = likelihood.mean(features)[0, :, 0, 0]
    torch.testing.assert_close(mean[1], green, atol=1e-2, rtol=0)
    assert 20 < mean[1] < 235  # away from the ends, as claimed


def normal_mass(level: int, mean: float, scale: float) -> float:
    # From the side where the cumulative probability is small.
    sign = 1 if level < mean else -1
    lower = -math.inf if level == 0 else level - 0.5
    upper = math.inf if level == 255 else level + 0.5
    edges = sorted((sign * (lower - mean) / scale, sign * (upper - mean) / scale))
    low, high = (0.5 * math.erfc(-edge * math.sqrt(0.5)) for edge in edges)
    return high - low


@pytest.mark.parametrize("scale", [0.1, 1.0, 25.5, 128.0])
@pytest.mark.parametrize("mean", [-3.0, 0.2, 200.3, 300.0])
def test_normal_against_loops(scale, mean):
    likelihood = Normal(num_channels=1, scale=scale)
    images = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1)
    features = torch.full((256, 1, 1, 1), mean / 127.5 - 1)
    mean = (features[0].double().item() + 1) * 127.5  # what float32 holds
    masses = torch.tensor([normal_mass(level, mean, scale) for level in range(256)], dtype=torch.float64)
    exact = masses > 1e-280
    expected = masses[exact].log()
    actual = likelihood.log_prob(images, features.double())[exact]
    torch.testing.assert_close(actual, expected, atol=1e-8, rtol=1e-9)
    narrow = likelihood.log_prob(images, features)[exact]
    # Relatively less exact at 0.1, where float32 resolves the mean to 1e-4 of the scale.
    torch.testing.assert_close(narrow.double(), expected, atol=1e-4, rtol=1e-4)


def test_normal_cdf_to_the_last_digits():
    likelihood = Normal(num_channels=1)
    numbers = torch.randn(2000, 2, generator=generator(), dtype=torch.float64)
    parameters = numbers * torch.tensor([100, 1.5]) + torch.tensor([128, 1])
    levels = (parameters[:, :1] + torch.randn(2000, 3, generator=generator(1))).round().long().clamp(0, 254)
    actual = likelihood.cdf(parameters, levels)
    for (mean, log_scale), row, values in zip(parameters.tolist(), levels.tolist(), actual.tolist(), strict=True):
        expected = [0.5 * math.erfc(-(level + 0.5 - mean) / math.exp(log_scale) * math.sqrt(0.5)) for level in row]
        assert values == pytest.approx(expected, abs=1e-15, rel=0)


def test_normal_is_a_squared_error():
    """Away from the ends: (y - mu)^2 / 2 s^2 + ln s + ln(2 pi) / 2, and its gradient."""
    likelihood = Normal(num_channels=1, scale=10.0)
    images = torch.arange(100, 160, dtype=torch.uint8).view(-1, 1, 1, 1)
    features = torch.zeros(60, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    error = images.flatten().double() - 127.5
    expected = -(error**2) / 200 - math.log(10) - 0.5 * math.log(2 * math.pi)
    log_prob = likelihood.log_prob(images, features)
    torch.testing.assert_close(log_prob, expected, atol=5e-3, rtol=0)
    log_prob.sum().backward()
    torch.testing.assert_close(features.grad.flatten(), error * 127.5 / 100, atol=1e-1, rtol=1e-3)


def test_categorical_against_loops():
    likelihood = Categorical(num_channels=2)
    images = torch.tensor([[[[3]], [[255]]]], dtype=torch.uint8)
    features = some_features(likelihood, batch=1, size=1)
    logits = features.flatten().numpy()
    expected = 0.0
    for channel, level in enumerate((3, 255)):
        own = logits[256 * channel : 256 * (channel + 1)]
        expected += own[level] - math.log(sum(math.exp(logit) for logit in own))
    assert likelihood.log_prob(images, features).item() == pytest.approx(expected, abs=1e-12)


def test_categorical_cdf_to_the_last_digits():
    likelihood = Categorical(num_channels=1)
    for spread in (0.3, 3.0):
        logits = torch.randn(40, 256, generator=generator(), dtype=torch.float64) * spread
        actual = likelihood.cdf(logits, torch.arange(256).expand(40, 256))
        for row, values in zip(logits.tolist(), actual.tolist(), strict=True):
            # Each exponential to half a unit of its last digit, and nothing else rounded.
            masses = [Fraction(math.exp(logit)) for logit in row]
            total = sum(masses)
            sums = list(itertools.accumulate(masses))
            assert max(abs(Fraction(value) - each / total) for value, each in zip(values, sums, strict=True)) < 1e-15
