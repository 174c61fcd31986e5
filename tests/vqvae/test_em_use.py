"""Mixtures in use: chunks, seeds, samples, saving, and what they refuse."""

import json
import math
import re

import pytest
import torch
from em_worlds import (
    FOUR,
    assert_same,
    every_family,
    every_image,
    num_levels,
    random_mixture,
    seeded,
    some_images,
    state,
)

from vqvae.em import BernoulliPixels, CategoricalPixels, GaussianPixels, Mixture, mixture, pixels, seeds


@every_family
def test_chunks_change_nothing(family, monkeypatch):
    images = some_images(family, 33)
    whole = random_mixture(family, seed=2)
    before = (whole.log_prob(images), whole.posterior(images), whole.elbo(images).distortion)
    whole_fit = whole.fit(images, num_steps=4, tolerance=0.0, generator=seeded(5))
    monkeypatch.setattr(mixture, "CHUNK_ELEMENTS", 15)  # 5 images
    monkeypatch.setattr(pixels, "MAX_PIXELS", 2)
    parts = random_mixture(family, seed=2)
    after = (parts.log_prob(images), parts.posterior(images), parts.elbo(images).distortion)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
    encoder = parts.posterior(images)
    torch.testing.assert_close(parts.elbo(images, encoder).negative, -before[0], atol=1e-10, rtol=0)
    parts_fit = parts.fit(images, num_steps=4, tolerance=0.0, generator=seeded(5))
    torch.testing.assert_close(whole_fit.objective, parts_fit.objective, atol=1e-10, rtol=0)
    assert_same(state(whole), state(parts), atol=1e-10, rtol=0)


def test_a_generator_settles_the_fit():
    images = some_images(FOUR, 50)
    fits = [random_mixture(FOUR, seed=seed) for seed in (0, 1, 2)]
    for model, seed in zip(fits, (7, 7, 8), strict=True):
        model.fit(images, num_steps=3, generator=seeded(seed))
    assert_same(state(fits[0]), state(fits[1]), atol=0, rtol=0)  # whatever the parameters were
    assert not torch.equal(fits[0].log_weights, fits[2].log_weights)
    draws = [fits[0].sample(300, seeded(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_seeds_are_distinct_and_far_apart():
    points = torch.tensor([[0, 0], [0, 1], [200, 200], [0, 0], [200, 201], [90, 0]], dtype=torch.uint8)
    found = seeds.choose_seeds(points.repeat(20, 1), 3, seeded(0))
    assert sorted((found / 50).round().tolist()) == [[0, 0], [2, 0], [4, 4]]
    assert len(seeds.choose_seeds(points, 9, seeded(0))) == 5  # one is there twice


@every_family
@pytest.mark.parametrize("hard", [False, True])
def test_fewer_images_than_components(family, hard):
    model = Mixture(num_components=8, shape=(1, 1, 3), pixels=family)
    images = some_images(family, 3)
    fit = model.fit(images, num_steps=20, hard=hard, generator=seeded(0))
    assert torch.isfinite(fit.objective).all()
    assert (fit.objective.diff() < 1e-5).all()
    assert torch.isfinite(model.log_prob(images)).all()
    assert not any(value.isnan().any() for value in model.state_dict().values())
    assert not model.sample(20, seeded(0)).float().isnan().any()


@every_family
def test_a_component_without_images_is_left_in_peace(family):
    images = some_images(family, 20)
    model = random_mixture(family)
    model.log_weights[1] = -math.inf
    old = state(model)
    fit = model.fit(images, num_steps=5, resume=True, tolerance=0.0)
    assert (fit.objective.diff() < 1e-12).all()
    assert model.log_weights[1] == -math.inf
    torch.testing.assert_close(model.log_weights.exp().sum().item(), 1.0, atol=1e-12, rtol=0)
    assert not model.posterior(images)[:, 1].any()
    torch.testing.assert_close(model.elbo(images).negative, -model.log_prob(images), atol=1e-10, rtol=0)
    if isinstance(family, GaussianPixels):
        assert torch.equal(model.pixels.mean[1], old["pixels.mean"][1])
        if family.variance == "pixel":
            assert torch.equal(model.pixels.variance[1], old["pixels.variance"][1])
    else:
        even = torch.full_like(model.pixels.log_probs[:, 1], -math.log(num_levels(family)))
        expected = even if family.alpha else old["pixels.log_probs"][:, 1]
        torch.testing.assert_close(model.pixels.log_probs[:, 1], expected, atol=1e-12, rtol=0)


def test_an_impossible_image_has_no_probability_and_tells_nothing():
    model = Mixture(num_components=2, shape=(1, 1, 1), pixels=CategoricalPixels(num_levels=3, alpha=0.0)).double()
    model.log_weights.copy_(torch.tensor([0.25, 0.75]).log())
    model.pixels.log_probs.copy_(torch.tensor([[1.0, 0.5], [0.0, 0.5], [0.0, 0.0]]).log())
    images = every_image(3, 1)
    torch.testing.assert_close(model.log_prob(images).exp(), torch.tensor([0.625, 0.375, 0]).double())
    expected = torch.tensor([[0.4, 0.6], [0, 1], [0.25, 0.75]]).double()
    torch.testing.assert_close(model.posterior(images), expected, atol=1e-7, rtol=0)
    bound = model.elbo(images)
    torch.testing.assert_close(bound.negative, -model.log_prob(images), atol=1e-10, rtol=0)
    assert not bound.rate.isnan().any()
    before = state(model)
    with pytest.raises(ValueError, match="1 images are impossible to every component"):
        model.fit(images, resume=True)
    assert_same(before, state(model), atol=0, rtol=0)
    assert torch.isfinite(model.fit(images, generator=seeded(0)).objective).all()


@pytest.mark.parametrize("discretised", [False, True])
def test_sampled_frequencies_are_the_probabilities(discretised):
    if discretised:
        source = Mixture(num_components=2, shape=(1, 1, 1), pixels=GaussianPixels(variance=2.0)).double()
        source.pixels.mean.copy_(torch.tensor([[0.0], [4.0]]))
        source.log_weights.copy_(torch.tensor([0.3, 0.7]).log())
        model, world = source.discretised(), every_image(256, 1)
    else:
        source = model = random_mixture(FOUR, num_dims=2)
        world = every_image(4, 2)
    expected = model.log_prob(world).exp()
    num = 20_000
    for sampler in {source, model}:
        images = sampler.sample(num, seeded(0))
        assert images.dtype == torch.uint8
        assert images.shape == (num, *model.config.shape)
        counts = (images.flatten(1)[:, None] == world.flatten(1)).all(2).sum(0)
        # Four standard deviations of each, and some for those that are rare.
        assert ((counts - num * expected).abs() <= 4 * (num * expected).sqrt() + 4).all()
        assert counts[expected < 1e-9].sum() == 0


@every_family
def test_a_saved_mixture_comes_back(family, tmp_path):
    model, images = random_mixture(family), some_images(family, 10)
    if family is FOUR:
        model = model.float()
    model.fit(images, num_steps=2, generator=seeded(0))
    model.save_pretrained(tmp_path / "mixture")
    back = Mixture.from_pretrained(tmp_path / "mixture")
    assert back.config == model.config
    assert not back.training
    assert_same(state(back), state(model), atol=0, rtol=0)
    assert torch.equal(back.log_prob(images), model.log_prob(images))
    assert torch.equal(back.sample(9, seeded(0)), model.sample(9, seeded(0)))


@pytest.mark.usefixtures("untyped")
def test_a_foreign_folder_is_one_sentence(tmp_path):
    random_mixture(FOUR).save_pretrained(tmp_path / "mixture")
    path = tmp_path / "mixture" / "config.json"
    config = json.loads(path.read_text())
    for change, message in (
        ({"class": "VQVAE"}, "holds a VQVAE, expected a Mixture"),
        ({"pixels": {"class": "Poisson"}}, "unknown pixels 'Poisson', expected one of CategoricalPixels"),
        ({"shape": [1, 1]}, r"shape=\[1, 1\] for Mixture, expected a tuple of 3"),
        ({"num_components": 4}, "do not fit its config"),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            Mixture.from_pretrained(tmp_path / "mixture")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_components": 0}, "num_components=0, expected at least 1"),
        ({"shape": (1, 0, 3)}, "shape=(1, 0, 3), expected (channels, height, width)"),
        ({"pixels": CategoricalPixels(num_levels=1)}, "num_levels=1, expected 2 to 256"),
        ({"pixels": CategoricalPixels(num_levels=257)}, "num_levels=257, expected 2 to 256"),
        ({"pixels": CategoricalPixels(alpha=-1.0)}, "alpha=-1.0, expected 0 or a pseudo-count"),
        ({"pixels": BernoulliPixels(alpha=1e-40)}, "alpha=1e-40, expected 0 or a pseudo-count"),
        ({"pixels": GaussianPixels(variance=0.0)}, "variance=0.0, expected 'pixel', 'shared' or"),
        ({"pixels": GaussianPixels(min_variance=0.0)}, "min_variance=0.0, expected a positive number"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_bad_options_are_sentences(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Mixture(**options)


GOOD = torch.zeros(2, 1, 1, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("family", "images", "message"),
    [
        (FOUR, GOOD[..., :2], "got images of shape (2, 1, 1, 2), expected (n, 1, 1, 3)"),
        (FOUR, GOOD.float(), "got images of dtype torch.float32, expected torch.uint8"),
        (FOUR, GOOD + 4, "got a level of 4, expected 0..3 for CategoricalPixels; raise num_levels"),
        (BernoulliPixels(), GOOD + 200, "got a level of 200, expected 0..1 for BernoulliPixels; threshold the images"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_bad_images_are_sentences(family, images, message):
    model = random_mixture(family)
    before = state(model)
    for method in (model.fit, model.log_prob, model.posterior, model.elbo):
        with pytest.raises(ValueError, match=re.escape(message)):
            method(images)
    assert_same(before, state(model), atol=0, rtol=0)


def test_other_mistakes_are_sentences():
    model = random_mixture(FOUR)
    with pytest.raises(ValueError, match=r"shape \(2, 2\), expected \(b, k\) = \(2, 3\)"):
        model.elbo(GOOD, torch.ones(2, 2) / 2)
    for rows in (torch.ones(2, 3), torch.tensor([[1.5, -0.5, 0.0]] * 2), torch.full((2, 3), math.nan)):
        with pytest.raises(ValueError, match="no distributions"):
            model.elbo(GOOD, rows)
    with pytest.raises(ValueError, match="got no images"):
        model.fit(GOOD[:0])
    with pytest.raises(ValueError, match="num_steps=-1"):
        model.fit(GOOD, -1)
    with pytest.raises(ValueError, match="tolerance=nan"):
        model.fit(GOOD, tolerance=math.nan)
    with pytest.raises(ValueError, match="num=-1"):
        model.sample(-1)
    with pytest.raises(ValueError, match="levels already"):
        model.discretised()


@every_family
def test_no_images_have_no_probabilities(family):
    model = random_mixture(family)
    assert model.log_prob(GOOD[:0]).shape == (0,)
    assert model.posterior(GOOD[:0]).shape == (0, 3)
    assert model.elbo(GOOD[:0]).negative.shape == (0,)
    assert model.sample(0).shape == (0, 1, 1, 3)


def test_a_fit_of_no_steps_only_chooses_the_start():
    model, images = random_mixture(FOUR), some_images(FOUR, 9)
    fit = model.fit(images, num_steps=0, generator=seeded(0))
    assert len(fit.objective) == 1
    assert not fit.converged
    assert fit.negative_elbo.item() == pytest.approx(-model.log_prob(images).mean().item(), abs=1e-10)
