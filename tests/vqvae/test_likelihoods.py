"""The contract of every likelihood."""

import math

import numpy as np
import pytest
import torch
from likelihood_worlds import (
    MEMBERS,
    cdf_table,
    generator,
    pmf_at,
    pmf_table,
    some_features,
    some_images,
)
from scipy.stats import chi2

from vqvae.likelihoods import Categorical, LocalContext, LogisticMixture, Normal
from vqvae.likelihoods.base import _inverse_transform

FAMILIES = ("categorical, 1 channel", "mixture, 3 channels, zero", "normal, 1 channel")


@pytest.fixture(params=MEMBERS)
def likelihood(request):
    return MEMBERS[request.param]()


def test_shapes_and_types(likelihood):
    images = some_images(likelihood, batch=2)
    levels = torch.zeros(*images.shape, 7, dtype=torch.int64)
    for dtype in (torch.float32, torch.float64):
        features = some_features(likelihood, batch=2, dtype=dtype)
        log_prob, mean = likelihood.log_prob(images, features), likelihood.mean(features)
        assert (log_prob.shape, log_prob.dtype) == ((2,), dtype)
        assert (mean.shape, mean.dtype) == (images.shape, dtype)
        sample = likelihood.sample(features, generator())
        assert (sample.shape, sample.dtype) == (images.shape, torch.uint8)
        parameters = likelihood.symbol_parameters(images, features)
        assert (parameters.shape, parameters.dtype) == ((*images.shape, likelihood.num_parameters), dtype)
        cdf = likelihood.cdf(parameters, levels)
        assert (cdf.shape, cdf.dtype) == (levels.shape, torch.float64)
        assert torch.equal(cdf, likelihood.cdf(parameters.double(), levels.int()))
        assert torch.equal(cdf[0, 0, 0, 0], likelihood.cdf(parameters[0, 0, 0, 0], levels[0, 0, 0, 0]))
        assert likelihood.cdf(parameters, levels[..., :0]).shape == (*images.shape, 0)


def test_empty_batch(likelihood):
    features = some_features(likelihood, batch=0).requires_grad_()
    images = some_images(likelihood, batch=1)[:0]
    likelihood.log_prob(images, features).sum().backward()
    assert features.grad.shape == features.shape
    assert likelihood.mean(features.detach()).shape == images.shape
    assert likelihood.sample(features.detach()).shape == images.shape
    assert cdf_table(likelihood, features.detach(), images).shape == (*images.shape, 256)


def test_sums_to_one(likelihood):
    """Over the last channel's levels, given the others; coupled: over green and blue, given red."""
    features = some_features(likelihood, batch=1, size=1)
    image = likelihood.sample(features, generator())
    levels = torch.arange(256, dtype=torch.uint8)
    if likelihood.coupled:
        images = torch.cartesian_prod(image[0, 0, 0], levels, levels)
        given = [0]
    else:
        images = image.flatten(1).repeat(256, 1)
        images[:, -1] = levels
        given = list(range(likelihood.num_channels - 1))
    images = images.reshape(-1, likelihood.num_channels, 1, 1)
    expected = pmf_at(likelihood, features, image)[0, given].prod()
    repeated = features.expand(len(images), -1, 1, 1)
    total = likelihood.log_prob(images, repeated).exp().sum()
    torch.testing.assert_close(total, expected, atol=0, rtol=1e-11)
    total = likelihood.log_prob(images, repeated.float()).double().exp().sum()
    torch.testing.assert_close(total, expected, atol=0, rtol=1e-4)


def test_samples_follow_the_table(likelihood):
    """Counts of each level against the sum of the pixels' conditional probabilities of it."""
    torch.manual_seed(0)
    features = some_features(likelihood, batch=1, size=1).expand(1, -1, 64, 64)
    images = likelihood.sample(features, generator())
    masses = pmf_table(likelihood, features, images)
    for channel in range(likelihood.num_channels):
        expected = masses[0, channel].sum((0, 1)).numpy()
        counts = np.bincount(images[0, channel].flatten().numpy(), minlength=256)
        assert counts[expected == 0].sum() == 0
        # Levels in groups of at least 20 expected ones.
        groups = np.floor(np.cumsum(expected) / 20).astype(int)
        num_groups = groups.max() + 1
        expected = np.bincount(groups, expected, num_groups)
        counts = np.bincount(groups, counts, num_groups)
        kept = expected > 5
        statistic = (((counts - expected) ** 2)[kept] / expected[kept]).sum()
        assert statistic < chi2.isf(1e-4, max(1, kept.sum() - 1))


def test_samples_are_the_generators(likelihood):
    features = some_features(likelihood, batch=8)
    first = likelihood.sample(features, generator(5))
    assert torch.equal(first, likelihood.sample(features, generator(5)))
    if getattr(likelihood, "scale", None) != 0.1:  # which has one level for each mean
        assert not torch.equal(first, likelihood.sample(features, generator(6)))


def test_symbols_without_mass_are_never_drawn():
    masses = torch.zeros(2, 256)
    masses[0, [3, 200]] = 0.5
    masses[1, 255] = 1
    for uniform, expected in ((0.0, [3, 255]), (0.5, [200, 255]), (1 - 2**-53, [200, 255])):
        numbers = torch.full((2, 1), uniform, dtype=torch.float64)
        assert _inverse_transform(masses.log(), numbers).tolist() == expected


def test_mean_is_the_tables(likelihood):
    features = some_features(likelihood)
    # Where pixels look at others the mean is that of the features alone.
    alone = likelihood.mixture if isinstance(likelihood, LocalContext) else likelihood
    table = cdf_table(alone, features, some_images(likelihood))
    expected = (1 - table).sum(-1)
    mean = likelihood.mean(features)
    channels = slice(0, 1) if likelihood.coupled else slice(None)
    torch.testing.assert_close(mean[:, channels], expected[:, channels], atol=1e-8, rtol=0)
    narrow = likelihood.mean(features.float()).double()
    torch.testing.assert_close(narrow, mean, atol=1e-2, rtol=0)


def test_the_point_is_an_image(likelihood):
    features = 3 * some_features(likelihood, batch=3)
    point = likelihood.point_estimate(features)
    assert point.shape == some_images(likelihood, batch=3).shape
    assert point.min() >= 0
    assert point.max() <= 255 + 1e-6


def test_the_point_of_a_normal_is_its_median():
    likelihood = Normal(num_channels=1, scale=20.0)
    means = torch.linspace(-40, 300, 500, dtype=torch.float64)
    features = (means / 127.5 - 1).reshape(1, 1, 20, 25)
    parameters = likelihood.symbol_parameters(torch.zeros(1, 1, 20, 25, dtype=torch.uint8), features)
    median = (likelihood.cdf(parameters, torch.arange(255).expand(1, 1, 20, 25, 255)) < 0.5).sum(-1)
    point = likelihood.point_estimate(features)
    torch.testing.assert_close(point.round(), median.double(), atol=0, rtol=0)
    torch.testing.assert_close(point.flatten(), means.clamp(0, 255), atol=1e-9, rtol=0)


def test_extreme_features(likelihood):
    images = some_images(likelihood)
    for spread in (1e4, 100.0, -100.0, -1e4):
        features = some_features(likelihood, dtype=torch.float32).sign() * spread
        features.requires_grad_()
        log_prob = likelihood.log_prob(images, features)
        assert log_prob.isfinite().all()
        assert (log_prob <= 1e-4).all()
        likelihood.zero_grad()
        log_prob.sum().backward()
        for each in (features, *likelihood.parameters()):
            assert each.grad.isfinite().all()
        mean = likelihood.mean(features.detach())
        assert mean.min() >= 0
        assert mean.max() <= 255.001


@pytest.mark.parametrize("member", [*FAMILIES, "mixture, 1 component", "local context, 1 channel, zero"])
def test_gradients(member):
    likelihood = MEMBERS[member]().double()
    size = 1 if isinstance(likelihood, Categorical) else 2
    images, features = some_images(likelihood, 3, size), some_features(likelihood, 3, size)
    # A network's thousand weights are autograd's own affair.
    weights = () if isinstance(likelihood, LocalContext) else likelihood.parameters()
    assert torch.autograd.gradcheck(lambda f, *_: likelihood.log_prob(images, f), (features.requires_grad_(), *weights))


def test_gradients_in_float32_and_channels_last(likelihood):
    images = some_images(likelihood)
    wide = some_features(likelihood).requires_grad_()
    likelihood.log_prob(images, wide).sum().backward()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        narrow = wide.detach().float().to(memory_format=memory_format).requires_grad_()
        likelihood.log_prob(images, narrow).sum().backward()
        torch.testing.assert_close(narrow.grad.double(), wide.grad, atol=1e-4, rtol=1e-3)
        assert narrow.grad.is_contiguous(memory_format=memory_format)


def test_weighted_and_repeated_backward(likelihood):
    """The gradient is each image's own, and a graph that is kept gives it again."""
    images, features = some_images(likelihood), some_features(likelihood).requires_grad_()
    weights = torch.arange(6, dtype=torch.float64) - 2
    log_prob = likelihood.log_prob(images, features)
    first = torch.autograd.grad(log_prob, features, weights, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(log_prob, features, weights)[0], first)
    for i in (0, 5):
        one = likelihood.log_prob(images[i : i + 1], features[i : i + 1]).sum()
        expected = torch.autograd.grad(one, features)[0][i] * weights[i]
        torch.testing.assert_close(first[i], expected, atol=1e-12, rtol=1e-9)


def test_batches_larger_than_a_group(likelihood):
    size = 4 if isinstance(likelihood, Categorical) else 28
    images = some_images(likelihood, batch=70, size=size)
    features = some_features(likelihood, batch=70, size=size)
    together = likelihood.log_prob(images, features)
    for i in (0, 33, 69):
        alone = likelihood.log_prob(images[i : i + 1], features[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone)


def test_half_precision(likelihood):
    """Features may be of half precision; nothing after them is, under autocast neither, a network's layers aside."""
    dtype = torch.bfloat16
    images, features = some_images(likelihood), some_features(likelihood, dtype=dtype)
    expected = likelihood.log_prob(images, features.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_prob = likelihood.log_prob(images, features.requires_grad_())
        assert likelihood.mean(features.detach()).dtype == torch.float32
    assert log_prob.dtype == torch.float32
    torch.testing.assert_close(log_prob, expected, rtol=1e-2 if isinstance(likelihood, LocalContext) else 0, atol=0)
    log_prob.sum().backward()
    assert features.grad.dtype == dtype


@pytest.mark.parametrize("member", FAMILIES)
def test_compiles_to_one_graph(member, untyped):
    likelihood = MEMBERS[member]()
    images = some_images(likelihood)
    features = some_features(likelihood).requires_grad_()
    expected = likelihood.log_prob(images, features)
    gradient = torch.autograd.grad(expected.sum(), features)[0]
    torch.compiler.reset()
    compiled = torch.compile(likelihood.log_prob, backend="aot_eager", fullgraph=True)
    log_prob = compiled(images, features)
    torch.testing.assert_close(log_prob, expected)
    torch.testing.assert_close(torch.autograd.grad(log_prob.sum(), features)[0], gradient)


@pytest.mark.parametrize("member", [name for name in MEMBERS if not name.startswith(("normal", "local"))])
def test_start_is_sensible(member):
    """Features of 0 give every level a fair chance: no more than 11 bits, on average 8.8."""
    likelihood = MEMBERS[member]()
    images = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1)
    images = images.expand(-1, likelihood.num_channels, 1, 1)
    features = torch.zeros(256, likelihood.num_features, 1, 1)
    bits = -likelihood.log_prob(images, features) / math.log(2) / likelihood.num_channels
    assert bits.max() < 11
    assert bits.mean() < 8.8


@pytest.mark.usefixtures("untyped")
def test_bad_images_and_features(likelihood):
    images = some_images(likelihood)
    features = some_features(likelihood, dtype=torch.float32)
    c, f = likelihood.num_channels, likelihood.num_features
    for act in (likelihood.log_prob, likelihood.symbol_parameters):
        for bad, message in (
            (images.float(), "dtype torch.float32, expected .*uint8"),
            (torch.cat([images, images[:, :1]], dim=1), rf"shape \(6, {c + 1}, 3, 3\), expected"),
            (images[:5], r"shape \(5, "),
            (images[..., :2], r"shape .* 2\), expected"),
        ):
            with pytest.raises(ValueError, match=f"got images of {message}"):
                act(bad, features)
    for call in (lambda bad: likelihood.log_prob(images, bad), likelihood.mean, likelihood.sample):
        with pytest.raises(ValueError, match=rf"\(6, {f + 1}, 3, 3\), expected \(b, {f}, h, w\)"):
            call(torch.cat([features, features[:, :1]], dim=1))
        with pytest.raises(ValueError, match=r"features of dtype torch.int64"):
            call(features.long())


@pytest.mark.parametrize(
    ("family", "options"),
    [
        (LogisticMixture, {"num_channels": 2}),
        (LogisticMixture, {"num_components": 0}),
        (Normal, {"scale": 0.0}),
        (Normal, {"scale": 1e3}),
        (Normal, {"scale": math.nan}),
        (Categorical, {"num_channels": 0}),
        (LocalContext, {"num_channels": 2}),
        (LocalContext, {"width": 0}),
        (LocalContext, {"num_blocks": -1}),
        (LocalContext, {"features_weight": -0.1}),
        (LocalContext, {"features_weight": math.nan}),
    ],
)
def test_bad_options(family, options):
    [(name, value)] = options.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        family(**options)
