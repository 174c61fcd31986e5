"""Exact EM on worlds small enough to enumerate, against closed forms and plain loops."""

import math

import pytest
import torch
from em_worlds import (
    FOUR,
    every_family,
    every_image,
    num_levels,
    plain_joint,
    random_mixture,
    seeded,
    some_images,
    state,
)
from torch import Tensor

from vqvae import load_images
from vqvae.em import BernoulliPixels, CategoricalPixels, GaussianPixels, Mixture
from vqvae.likelihoods import Normal


@every_family
def test_log_prob_and_posterior_are_those_of_plain_loops(family):
    model, images = random_mixture(family), some_images(family, 20)
    if not isinstance(family, GaussianPixels):  # of which these are densities
        images = every_image(num_levels(family), 3)
        assert model.log_prob(images).exp().sum().item() == pytest.approx(1, abs=1e-10)
    joint = plain_joint(model, images)
    torch.testing.assert_close(model.log_prob(images), joint.logsumexp(1), atol=1e-10, rtol=0)
    torch.testing.assert_close(model.posterior(images), joint.softmax(1), atol=1e-10, rtol=0)


@pytest.mark.parametrize("variance", ["pixel", 30.0])
def test_discretised_gaussians_are_distributions_over_levels(variance):
    model = Mixture(num_components=3, shape=(1, 1, 2), pixels=GaussianPixels(variance=variance)).double()
    model.pixels.mean.copy_(torch.tensor([[-40.0, 3.0], [90.3, 255.0], [127.5, 400.0]]))
    if variance == "pixel":
        model.pixels.variance.copy_(torch.tensor([[1.0, 100.0], [0.04, 2000.0], [16000.0, 9.0]]))
    model.log_weights.copy_(torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log())
    discrete = model.discretised()
    world = every_image(256, 2)
    log_probs = discrete.log_prob(world)
    assert log_probs.exp().sum().item() == pytest.approx(1, abs=1e-10)
    # An independent implementation: the library's likelihood for decoders, one component and pixel at a time.
    expected = []
    for k in range(3):
        total = torch.zeros(len(world), dtype=torch.float64)
        for d in range(2):
            scale = model.pixels.variance.expand_as(model.pixels.mean)[k, d].sqrt().item()
            features = (model.pixels.mean[k, d] / 127.5 - 1).expand(len(world), 1, 1, 1)
            total += Normal(num_channels=1, scale=scale).log_prob(world[..., d : d + 1], features)
        expected.append(model.log_weights[k] + total)
    torch.testing.assert_close(log_probs, torch.stack(expected).logsumexp(0), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("family", [FOUR, BernoulliPixels()], ids=["categorical", "Bernoulli"])
def test_mean_negative_elbo_is_entropy_plus_divergence(family, seed):
    model = random_mixture(family, seed=seed)
    world = every_image(num_levels(family), 3)
    generator = seeded(seed)
    population = torch.randn(len(world), generator=generator, dtype=torch.float64).softmax(0)
    encoder = torch.randn(len(world), 3, generator=generator, dtype=torch.float64).mul(2).softmax(1)
    joint = plain_joint(model, world)
    here = population[:, None] * encoder
    optimum = torch.special.entr(population).sum() + (here * (here.log() - joint)).sum()
    bound = model.elbo(world, encoder)
    assert (population * bound.negative).sum().item() == pytest.approx(optimum.item(), abs=1e-10)
    assert (bound.negative > -model.log_prob(world)).all()
    torch.testing.assert_close(bound.rate, -(encoder @ model.log_weights), atol=1e-12, rtol=0)
    torch.testing.assert_close(bound.entropy, -(encoder * encoder.log()).sum(1), atol=1e-12, rtol=0)


@every_family
def test_bound_is_closed_after_each_e_step_and_the_objective_falls(family):
    model, images = random_mixture(family, seed=3), some_images(family, 40)
    objectives = []
    for _ in range(6):
        fit = model.fit(images, num_steps=1, resume=True, tolerance=0.0)
        bound, log_prob = model.elbo(images), model.log_prob(images)
        torch.testing.assert_close(bound.negative, -log_prob, atol=1e-10, rtol=0)
        torch.testing.assert_close(log_prob, plain_joint(model, images).logsumexp(1), atol=1e-10, rtol=0)
        assert fit.negative_elbo[-1].item() == pytest.approx(-log_prob.mean().item(), abs=1e-10)
        alpha = getattr(family, "alpha", 0.0)
        prior = alpha * model.pixels.log_probs.sum().item() / len(images) if alpha else 0.0
        assert fit.objective[-1].item() == pytest.approx(-log_prob.mean().item() - prior, abs=1e-10)
        if objectives:
            assert fit.objective[0].item() == pytest.approx(objectives[-1], abs=1e-10)
        objectives.append(fit.objective[-1].item())
    falls = torch.tensor(objectives).double().diff()
    assert (falls < 1e-12).all()
    assert falls[0] < -1e-4
    assert model.elbo(images).entropy.max() > 1e-3  # soft


@every_family
def test_hard_em_falls_too_and_its_bound_is_that_of_the_argmax(family):
    model, images = random_mixture(family, seed=3), some_images(family, 40)
    fit = model.fit(images, num_steps=30, resume=True, hard=True, tolerance=0.0)
    assert fit.converged
    assert (fit.objective.diff() < 1e-12).all()
    assert fit.objective[1] < fit.objective[0]
    chosen = torch.nn.functional.one_hot(plain_joint(model, images).argmax(1), 3).double()
    bound = model.elbo(images, chosen)
    assert not bound.entropy.any()
    assert fit.negative_elbo[-1].item() == pytest.approx(bound.negative.mean().item(), abs=1e-10)
    assert (bound.negative >= -model.log_prob(images)).all()


def test_float32_falls_and_says_so_on_real_images():
    images = load_images("fashion-mini", "test").images[:100]
    model = Mixture(num_components=10)
    fit = model.fit(images, num_steps=5, tolerance=0.0, generator=seeded(0))
    assert (fit.objective.diff() < 1e-7 * fit.objective[:-1]).all()
    log_prob = model.log_prob(images)
    assert log_prob.dtype == torch.float64
    assert fit.negative_elbo[-1].item() == pytest.approx(-log_prob.mean().item(), abs=1e-6)
    torch.testing.assert_close(model.elbo(images).negative, -log_prob, atol=1e-9, rtol=0)
    exact = model.config.build().double()
    exact_fit = exact.fit(images, num_steps=5, tolerance=0.0, generator=seeded(0))
    # With 2 million probabilities for 100 images their prior outweighs the images, so the tolerance is relative.
    torch.testing.assert_close(fit.objective, exact_fit.objective, atol=0, rtol=1e-6)
    # Distributions again, to the rounding of float32.
    totals = model.pixels.log_probs.view(784, 256, 10).double().exp().sum(1)
    torch.testing.assert_close(totals, torch.ones_like(totals), atol=3e-6, rtol=0)


@every_family
@pytest.mark.parametrize("hard", [False, True])
def test_a_step_is_that_of_plain_loops(family, hard):
    model, images = random_mixture(family, seed=1), some_images(family, 30, seed=1)
    joint = plain_joint(model, images)
    encoder = torch.nn.functional.one_hot(joint.argmax(1), 3).double() if hard else joint.softmax(1)
    old = state(model)
    model.fit(images, num_steps=1, resume=True, hard=hard)
    shares, levels = encoder.sum(0), images.flatten(1).double()
    assert (shares > 0).all()
    torch.testing.assert_close(model.log_weights, (shares / 30).log(), atol=1e-10, rtol=0)
    if isinstance(family, GaussianPixels):
        mean = encoder.T @ levels / shares[:, None]
        torch.testing.assert_close(model.pixels.mean, mean, atol=1e-10, rtol=0)
        squares = (levels[:, None] - mean) ** 2 * encoder[:, :, None]
        expected = {
            "pixel": (squares.sum(0) / shares[:, None]).clamp(min=family.min_variance),
            "shared": squares.sum() / 90,
        }.get(family.variance, old["pixels.variance"])
        torch.testing.assert_close(model.pixels.variance, expected, atol=1e-10, rtol=0)
        return
    for d in range(3):
        for level in range(num_levels(family)):
            count = encoder[levels[:, d] == level].sum(0)
            expected = (count + family.alpha) / (shares + num_levels(family) * family.alpha)
            row = model.pixels.log_probs[d * num_levels(family) + level]
            torch.testing.assert_close(row.exp(), expected, atol=1e-10, rtol=0)


def test_alpha_is_what_keeps_the_unseen_possible():
    seen, unseen = torch.zeros(2, 1, 1, 1, dtype=torch.uint8), torch.full((1, 1, 1, 1), 3, dtype=torch.uint8)
    for alpha in (0.0, 1e-30, 0.5):
        model = Mixture(num_components=1, shape=(1, 1, 1), pixels=CategoricalPixels(num_levels=4, alpha=alpha))
        assert torch.isfinite(model.fit(seen).objective).all()
        expected = math.log(alpha / (2 + 4 * alpha)) if alpha else -math.inf
        assert model.log_prob(unseen).item() == pytest.approx(expected, rel=1e-6)


def test_a_constant_pixel_is_held_by_the_floor():
    model = Mixture(num_components=2, shape=(1, 1, 2), pixels=GaussianPixels(min_variance=0.25))
    fit = model.fit(torch.full((5, 1, 1, 2), 7, dtype=torch.uint8))
    assert (model.pixels.variance == 0.25).all()
    assert fit.negative_elbo[-1].item() == pytest.approx(math.log(2 * math.pi * 0.25), abs=1e-6)


def lloyd(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """k-means in plain loops; an empty cluster keeps its centre."""
    centres = centres.clone()
    while True:
        chosen = (points[:, None] - centres).square().sum(2).argmin(1)
        new = torch.stack(
            [points[chosen == k].mean(0) if (chosen == k).any() else centres[k] for k in range(len(centres))]
        )
        if torch.equal(new, centres):
            return centres, chosen
        centres = new


@pytest.mark.parametrize("variance", [1.0, 1e5])
def test_hard_em_with_even_spheres_is_k_means(variance):
    images = load_images("fashion-mini", "test").images[:200, :, ::3, ::3].contiguous()
    points = images.flatten(1).double()
    centres = torch.cat([points[:6] + 0.5, points[:1] + 1e4])  # the last attracts nothing
    pixels = GaussianPixels(variance=variance)
    model = Mixture(num_components=7, shape=(1, 10, 10), pixels=pixels, even_weights=True).double()
    model.pixels.mean.copy_(centres)
    fit = model.fit(images, num_steps=100, hard=True, resume=True, tolerance=0.0)
    assert fit.converged
    assert len(fit.objective) > 4
    expected, chosen = lloyd(points, centres)
    torch.testing.assert_close(model.pixels.mean, expected, atol=1e-8, rtol=0)
    assert torch.equal(model.posterior(images).argmax(1), chosen)
    torch.testing.assert_close(model.log_weights.exp(), torch.ones(7).double() / 7)
    inertia = (points - expected[chosen]).square().sum(1).mean().item()
    constant = 50 * math.log(2 * math.pi * variance) + math.log(7)
    assert fit.objective[-1].item() == pytest.approx(inertia / variance / 2 + constant, rel=1e-10)
