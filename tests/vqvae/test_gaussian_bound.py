"""The bound of a GaussianVAE against quadrature: images of one pixel, all of them, and one latent number."""

import json
import math

import pytest
import torch
from torch import Tensor

from priors import NormalPrior
from vqvae import GaussianVAE
from vqvae.bound import elbo, sampled_elbo
from vqvae.data import Batch
from vqvae.evaluation import evaluate
from vqvae.likelihoods import Categorical
from vqvae.pictures import save_usage


def standard() -> NormalPrior:
    return NormalPrior(dim=1, grid=(1, 1)).double()


class World:
    """A model in float64, for which every integral over z is a sum over a fine grid.

    The integrands are smooth and vanish at both ends, where the trapezoidal rule converges faster than any power.
    """

    def __init__(self) -> None:
        torch.manual_seed(0)
        sizes = {"image_size": 1, "downsampling": 1, "width": 8, "num_blocks": 1, "dim": 1}
        self.model = GaussianVAE(**sizes, likelihood=Categorical.Config())
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
            # Posteriors that differ between images, and are narrower than the prior.
            self.model.encoder.layers[-1].weight.mul_(3)
            self.model.encoder.layers[-1].bias[1] = -0.5
        self.model.double().eval()
        self.images = torch.arange(256).to(torch.uint8).reshape(256, 1, 1, 1)
        self.z, self.step = torch.linspace(-16, 16, 3201, dtype=torch.float64), 0.01
        self.log_prior = -0.5 * (self.z.square() + math.log(2 * math.pi))
        with torch.no_grad():
            self.out = self.model(self.images)
            features = self.model.decoder(self.z.reshape(-1, 1, 1, 1))
            mean, log_std = self.out.mean.reshape(-1, 1), self.out.log_std.reshape(-1, 1)
        # One row an image, one column a value of z.
        self.log_decoder = features[:, :, 0, 0].log_softmax(1).T
        noise = (self.z - mean) / log_std.exp()
        self.log_posterior = -0.5 * (noise.square() + math.log(2 * math.pi)) - log_std
        self.log_weights = self.log_decoder + self.log_prior - self.log_posterior
        self.evidence = (self.log_decoder + self.log_prior).logsumexp(1) + math.log(self.step)

    def under_posterior(self, values: Tensor) -> Tensor:
        return (self.log_posterior.exp() * values).sum(1) * self.step

    def negative(self) -> Tensor:
        """Rate, distortion and entropy of each image."""
        rate, distortion = self.under_posterior(-self.log_prior), self.under_posterior(-self.log_decoder)
        return rate + distortion - self.under_posterior(-self.log_posterior)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def test_the_quadrature_is_exact(world):
    ones = torch.ones(256, dtype=torch.float64)
    torch.testing.assert_close(world.under_posterior(torch.ones(())), ones, rtol=0, atol=1e-12)
    assert world.evidence.exp().sum().item() == pytest.approx(1, abs=1e-12)  # over all images
    kl = world.under_posterior(world.log_posterior - world.log_prior)
    torch.testing.assert_close(world.out.kl, kl, rtol=0, atol=1e-11)
    assert (world.log_decoder.std(1) > 0.1).any()  # the latent says something


def test_the_mean_bound_is_entropy_plus_divergence(world):
    """H(Pop) + KL(Pop(y) q(z|y) ‖ p(z) P_dec(y|z)) over all images and the whole line."""
    assert (world.negative() >= -world.evidence).all()
    population = (2 * torch.randn(256, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).softmax(0)
    log_joint = population.log()[:, None] + world.log_posterior
    divergence = (log_joint.exp() * (log_joint - world.log_prior - world.log_decoder)).sum() * world.step
    entropy = torch.special.entr(population).sum()
    mean = (population * world.negative()).sum()
    torch.testing.assert_close(mean, entropy + divergence, rtol=0, atol=1e-10)


def test_draws_estimate_the_bound_within_their_error(world):
    y = world.images[::32]
    generator = torch.Generator().manual_seed(0)
    bound = sampled_elbo(world.model, standard(), y, num_samples=300, generator=generator)
    negatives = -bound.log_weights
    error = negatives.std(0) / 300**0.5
    assert ((negatives.mean(0) - world.negative()[::32]).abs() <= 4 * error).all()
    # Draws average to distortion plus KL, the objective of training.
    objective = bound.distortion + world.out.kl[::32]
    assert ((bound.negative - objective).abs() <= 4 * bound.rate_error).all()
    torch.testing.assert_close(bound.entropy, world.under_posterior(-world.log_posterior)[::32])


def test_the_mean_has_no_bound(world):
    with pytest.raises(ValueError, match="use sampled_elbo"):
        elbo(world.model, standard(), world.images[:2])


def test_evaluate_on_draws(world, tmp_path):
    result = evaluate(world.model, {"normal": standard()}, [Batch(world.images, None)], num_draws=50)
    assert result.deterministic is None
    assert result.bound.negative_elbo == pytest.approx(world.negative().mean().item(), abs=0.05)
    kl = world.out.kl.mean().item()
    assert abs(result.bound.rate["normal"] - result.bound.entropy - kl) < 5 * result.rate_error
    assert -world.evidence.mean().item() - 0.05 < result.importance_weighted < result.bound.negative_elbo - 0.1
    result.save(tmp_path / "elbo.json", seed=1)
    figures = json.loads((tmp_path / "elbo.json").read_text())
    assert (figures["perplexity"], figures["usage"], figures["draws"]) == (None, 1, 50)
    assert figures["kl"] == pytest.approx(kl)
    assert figures["kl_by_channel"] == [pytest.approx(kl)]
    assert "deterministic" not in figures
    text = result.table()
    assert all(words in text for words in ("on 50 draws together", "KL to N(0, I)"))
    assert not any(words in text for words in ("most probable", "perplexity"))
    save_usage(tmp_path / "usage.png", result.code_usage)
    assert (tmp_path / "usage.png").stat().st_size > 1000
