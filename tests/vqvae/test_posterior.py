"""Posteriors over codes: draws against enumeration, SQ-VAE's equations, and bounds that are estimated on draws."""

import itertools
import math

import pytest
import torch
from quantizer_worlds import features, generator
from torch.nn import functional as F

from priors import UnigramPrior
from vqvae import VQVAE
from vqvae.bound import elbo, sampled_elbo
from vqvae.data import Batch
from vqvae.evaluation import evaluate
from vqvae.likelihoods import Categorical
from vqvae.quantizers import GumbelQuantizer, StochasticVectorQuantizer

DIM, NUM_CODES = 3, 5
KINDS = pytest.mark.parametrize("kind", [StochasticVectorQuantizer, GumbelQuantizer])


def make(kind, **options):
    torch.manual_seed(0)
    return kind(**{"num_codes": NUM_CODES, "dim": DIM, **options})


def posterior(quantizer, z_e: torch.Tensor) -> torch.Tensor:
    """P_enc(k|y) of each vector, written out, in float64."""
    if isinstance(quantizer, StochasticVectorQuantizer):
        distances = torch.cdist(z_e.double(), quantizer.codebook.detach().double()).square()
        return F.softmax(-distances / (2 * quantizer.variance.detach().double()), dim=-1)
    return F.softmax(F.linear(z_e.double(), *(p.detach().double() for p in quantizer.logits())), dim=-1)


@KINDS
def test_draws_follow_the_posterior(kind):
    quantizer = make(kind).eval()
    z_e = features(DIM, 1).expand(40_000, DIM)
    q = quantizer.draw(z_e, generator=generator())
    expected = 40_000 * posterior(quantizer, z_e[:1])[0]
    chi_square = ((torch.bincount(q.codes, minlength=NUM_CODES) - expected).square() / expected).sum()
    assert chi_square < 18.5  # 99.9 % of draws with four degrees of freedom


@KINDS
@pytest.mark.parametrize("training", [True, False])
def test_entropy_and_log_posterior_are_those_of_the_table(kind, training):
    quantizer = make(kind, hard=True).train(training)
    z_e = features(DIM, 4, 6)
    q = quantizer(z_e) if training else quantizer.draw(z_e)
    probs = posterior(quantizer, z_e.reshape(-1, DIM)).reshape(4, 6, NUM_CODES)
    torch.testing.assert_close(q.entropy.double(), torch.special.entr(probs).sum((1, 2)), rtol=1e-5, atol=1e-6)
    chosen = probs.gather(-1, q.codes[..., None])[..., 0]
    torch.testing.assert_close(q.log_posterior.double(), chosen.log().sum(1), rtol=1e-5, atol=1e-5)


def test_sqvae_terms_are_the_papers():
    quantizer = make(StochasticVectorQuantizer, weight=0.3, temperature=0.7).double()
    z_e = features(DIM, 4, 6).double()
    torch.manual_seed(1)
    q = quantizer(z_e)
    probs = posterior(quantizer, z_e.reshape(-1, DIM))
    kl = math.log(NUM_CODES) - torch.special.entr(probs).sum(-1).mean()
    distance = (z_e - q.z_q).square().sum(-1).mean() / (2 * quantizer.variance)
    torch.testing.assert_close(q.auxiliary["kl"], 0.3 * kl)
    torch.testing.assert_close(q.auxiliary["distance"], 0.3 * distance)

    def kl_of(z_e, codebook, log_variance):
        parameters = {"codebook": codebook, "log_variance": log_variance}
        return torch.func.functional_call(quantizer, parameters, (z_e,)).auxiliary["kl"]

    inputs = (z_e[0], quantizer.codebook.detach().clone(), quantizer.log_variance.detach().clone())
    assert torch.autograd.gradcheck(kl_of, [x.requires_grad_() for x in inputs])


def test_sqvae_starts_at_clusters_with_their_spread():
    torch.manual_seed(0)
    centres = 20 * torch.randn(4, DIM)
    z_e = centres[torch.arange(400) % 4] + 0.1 * torch.randn(400, DIM)
    quantizer = make(StochasticVectorQuantizer, num_codes=32)
    quantizer(z_e)
    quantizer.update()
    assert torch.cdist(centres, quantizer.codebook).amin(1).max() < 0.2
    torch.testing.assert_close(quantizer.variance.detach(), z_e.var(0, unbiased=False).mean() / 4)


@KINDS
def test_relaxed_gradients_near_the_enumerated_one_as_the_temperature_falls(kind):
    """d/dz E_{k ~ P_enc}[f(e_k)]: the relaxation is biased at τ = 2, and next to exact at τ = 0.1."""
    z = features(DIM, 1).double()
    bias = []
    for tau in (2.0, 0.1):
        quantizer = make(kind, hard=False, temperature=tau, final_temperature=tau).double()

        def task(z_q):
            return z_q.square().sum(-1) + z_q[..., 0].sin()

        exact_at = z.clone().requires_grad_()
        weight, bias_of = quantizer.logits()
        probs = F.softmax(exact_at @ weight.T + bias_of, dim=-1)
        exact = torch.autograd.grad((probs * task(quantizer.table.detach())).sum(), exact_at)[0]
        many = z.expand(100_000, DIM).clone().requires_grad_()
        torch.manual_seed(0)
        estimates = torch.autograd.grad(task(quantizer(many).z_q).sum(), many)[0]
        bias.append((estimates.mean(0) - exact[0]).norm() / exact.norm())
    assert bias[0] > 2 * bias[1]
    assert bias[1] < 0.15


IMAGES = torch.randint(0, 256, (4, 1, 4, 4), generator=generator(3)).to(torch.uint8)


class World:
    """One position a picture: all codes of a real model can be listed, with their probabilities."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        config = StochasticVectorQuantizer.Config(num_codes=NUM_CODES, dim=DIM)
        self.model = VQVAE(
            image_size=4, width=8, num_blocks=1, downsampling=4, quantizer=config, likelihood=Categorical.Config()
        )
        with torch.no_grad():
            self.model.quantizer.log_variance.fill_(-1.0)
            for parameter in self.model.decoder.parameters():
                parameter.mul_(3)
        self.model.double().eval()
        self.prior = UnigramPrior(num_codes=NUM_CODES, grid=(1, 1)).double()
        self.prior.fit(torch.tensor([0, 0, 0, 1, 1, 2, 3, 4]).reshape(8, 1, 1))
        codes = torch.arange(NUM_CODES)
        with torch.no_grad():
            z_e = self.model.encoder(IMAGES).reshape(-1, DIM)
            self.posterior = posterior(self.model.quantizer, z_e)
            features = self.model.decoder(self.model.quantizer.decode(codes.reshape(-1, 1, 1)))
            self.log_decoder = torch.stack(
                [self.model.likelihood.log_prob(y.expand(NUM_CODES, 1, 4, 4), features).double() for y in IMAGES]
            )
            self.log_prior = self.prior.log_prob(codes.reshape(-1, 1, 1)).double()

    def negative(self) -> torch.Tensor:
        """The exact negative ELBO of each image."""
        return -(self.posterior * (self.log_prior + self.log_decoder - self.posterior.log())).sum(1)

    def importance_weighted(self, k: int) -> torch.Tensor:
        """The exact importance-weighted bound of k draws: the mean over all K^k of them."""
        total = torch.zeros(len(IMAGES), dtype=torch.float64)
        log_weights = self.log_prior + self.log_decoder - self.posterior.log()
        for draws in itertools.product(range(NUM_CODES), repeat=k):
            chosen = list(draws)
            probability = self.posterior[:, chosen].prod(1)
            total -= probability * (log_weights[:, chosen].logsumexp(1) - math.log(k))
        return total


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def test_the_mean_bound_is_entropy_plus_divergence(world):
    """mean negative = H(Pop) + KL(Pop · P_enc ‖ P_pri · P_dec), for a real model, to 1e-10."""
    population = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    joint = population[:, None] * world.posterior
    log_model = world.log_prior + world.log_decoder
    entropy = torch.special.entr(population).sum()
    divergence = (joint * (joint.log() - log_model)).sum()
    mean = (population * world.negative()).sum()
    torch.testing.assert_close(mean, entropy + divergence, rtol=0, atol=1e-10)
    evidence = -log_model.logsumexp(1)
    assert (world.negative() >= evidence).all()
    with pytest.raises(ValueError, match="at least one draw"):
        sampled_elbo(world.model, world.prior, IMAGES, num_samples=0)


@pytest.mark.slow
def test_draws_estimate_the_bound_within_their_error(world):
    bound = sampled_elbo(world.model, world.prior, IMAGES, num_samples=1000, generator=generator())
    exact_rate = -(world.posterior * world.log_prior).sum(1)
    assert ((bound.rate - exact_rate).abs() <= 4 * bound.rate_error + 1e-9).all()
    negatives = -bound.log_weights
    error = negatives.std(0) / len(negatives) ** 0.5
    assert ((negatives.mean(0) - world.negative()).abs() <= 4 * error + 1e-4).all()
    torch.testing.assert_close(bound.entropy, torch.special.entr(world.posterior).sum(1), rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_the_importance_weighted_bound_tightens(world):
    bounds = [world.importance_weighted(k) for k in (1, 2, 3, 5)]
    torch.testing.assert_close(bounds[0], world.negative(), rtol=0, atol=1e-10)
    evidence = -(world.log_prior + world.log_decoder).logsumexp(1)
    for looser, tighter in itertools.pairwise([*bounds, evidence]):
        assert (tighter <= looser + 1e-12).all()
    drawing = generator()
    estimates = torch.stack(
        [
            sampled_elbo(world.model, world.prior, IMAGES, num_samples=3, generator=drawing).importance_weighted
            for _ in range(300)
        ]
    )
    error = estimates.std(0) / 300**0.5
    assert ((estimates.mean(0) - bounds[2]).abs() <= 4 * error + 1e-4).all()


@pytest.mark.slow
def test_likeliest_codes_are_another_figure(world):
    result = evaluate(world.model, {"unigram": world.prior}, [Batch(IMAGES, None)], num_draws=1000)
    assert result.deterministic is not None
    plain = elbo(world.model, world.prior, IMAGES)
    assert result.deterministic.entropy == 0
    assert result.deterministic.negative_elbo == pytest.approx(plain.negative.mean().item())
    assert result.bound.entropy == pytest.approx(torch.special.entr(world.posterior).sum(1).mean().item())
    assert result.bound.negative_elbo == pytest.approx(world.negative().mean().item(), rel=2e-3)
    assert result.importance_weighted is not None
    assert result.importance_weighted <= result.bound.negative_elbo
    assert "on 1000 draws together" in result.table()
