"""Pixels that look at pixels before them: what the contract of likelihoods does not say."""

import pytest
import torch
from likelihood_worlds import local_context, some_features, some_images

from vqvae import VQVAE, GaussianVAE
from vqvae.likelihoods import LocalContext, LogisticMixture


@pytest.fixture(params=[1, 3])
def likelihood(request):
    return local_context(num_channels=request.param, num_components=2, zero_component=True).double()


def test_it_starts_as_the_mixture_of_its_features():
    likelihood = LocalContext(num_channels=3, num_components=2)
    images, features = some_images(likelihood, size=9), some_features(likelihood, size=9, dtype=torch.float32)
    assert torch.equal(likelihood.log_prob(images, features), likelihood.mixture.log_prob(images, features))


def test_a_pixel_has_a_say_in_later_wavefronts_alone(likelihood):
    """And in all that are near: of the same row to the right, and of the next row up to one to the left."""
    features, size = some_features(likelihood, batch=1, size=12), 12
    images = some_images(likelihood, batch=1, size=size)
    before = likelihood.symbol_parameters(images, features)
    for row, column in ((0, 0), (3, 5), (6, 11), (11, 0), (11, 11)):
        changed = images.clone()
        changed[0, 0, row, column] ^= 255
        after = likelihood.symbol_parameters(changed, features)
        differs = (after - before).nan_to_num().abs().sum((0, 1, 4)) > 1e-12
        # The other channels of the pixel itself come after its first one.
        differs[row, column] = False
        rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
        later = columns + 2 * rows > column + 2 * row
        assert not differs[~later].any()
        near = later & (rows - row <= 1) & ((columns - column).abs() <= 3) & (rows >= row)
        assert differs[near].all()


def test_far_fewer_steps_than_pixels():
    likelihood = LocalContext(num_channels=1, width=4, num_blocks=1)
    assert len(likelihood.order(28, 28)) == 28 + 2 * 27
    assert len(likelihood.order(1, 1)) == 1


@pytest.mark.parametrize("shape", [(5, 1), (1, 5), (1, 1), (2, 7)])
def test_images_of_any_shape_are_walked(likelihood, shape):
    images = some_images(likelihood, batch=2, size=7)[..., : shape[0], : shape[1]]
    features = some_features(likelihood, batch=2, size=7)[..., : shape[0], : shape[1]]
    expected, steps = likelihood.symbol_parameters(images, features).flatten(1, 3), iter(likelihood.order(*shape))

    def choose(symbols):
        step = next(steps)
        torch.testing.assert_close(symbols.parameters, expected[:, step].flatten(0, 1), atol=1e-11, rtol=1e-11)
        return images.flatten(1)[:, step].flatten().long()

    assert torch.equal(likelihood.visit(features, choose), images)


def test_the_mean_is_that_of_the_features_alone(likelihood):
    features = some_features(likelihood)
    assert torch.equal(likelihood.mean(features), likelihood.mixture.mean(features))


def test_the_features_alone_are_trained_too(likelihood):
    images, features = some_images(likelihood), some_features(likelihood)
    [(name, term)] = likelihood.auxiliary(images, features).items()
    alone = -likelihood.mixture.log_prob(images, features)
    assert name == "features"
    torch.testing.assert_close(term, 0.1 * alone.mean() / images[0].numel())
    without = LocalContext(num_channels=1, width=4, features_weight=0.0)
    assert without.auxiliary(images[:, :1], some_features(without)) == {}


@pytest.mark.parametrize(("kind", "own"), [(VQVAE.Config, "commitment"), (GaussianVAE.Config, "kl")])
def test_a_model_takes_the_term_into_its_objective(kind, own):
    config = LocalContext.Config(num_components=2, width=4, num_blocks=1)
    model = kind(image_size=8, width=8, num_blocks=1, likelihood=config).build()
    images = torch.randint(0, 256, (2, 1, 8, 8)).to(torch.uint8)
    out = model(images)
    assert set(out.auxiliary) == {own, "features"}
    (out.distortion.mean() + sum(out.auxiliary.values())).backward()
    assert all(parameter.grad is not None for parameter in model.likelihood.parameters())
    plain = kind(image_size=8, width=8, num_blocks=1, likelihood=LogisticMixture.Config()).build()
    assert set(plain(images).auxiliary) == {own}
