"""What training with a prior in the loop minimises: rate and entropy of the posterior, and their gradients."""

import copy

import pytest
import torch
from loop_worlds import (
    BETAS,
    GRIDS,
    distances_in_nats,
    every_draw,
    make_costs,
    make_loop,
    make_prior,
    written_out,
)
from quantizer_worlds import features, generator, trained
from torch import Tensor
from torch.nn import functional as F

from priors import Prior
from vqvae.quantizers.prior_in_loop import posterior_at


@pytest.fixture(scope="module")
def prior() -> Prior:
    return make_prior()


def some_codes(num: int) -> Tensor:
    return GRIDS[torch.randint(len(GRIDS), (num,), generator=generator(5))]


def posteriors(conditionals: Tensor, costs: Tensor, beta: float) -> Tensor:
    """P_enc(k | y, codes before) ∝ P_pri(k | codes before) · exp(−c_k / β), "b *grid k"."""
    weights = conditionals.exp() * (-costs / beta).exp()
    return weights / weights.sum(-1, keepdim=True)


# --- rate and entropy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
def test_rate_and_entropy_are_those_of_the_posterior_at_each_position(prior, beta):
    codes, costs = some_codes(20), make_costs(20)
    chosen = posterior_at(codes, costs, make_loop(prior, 20, beta))
    conditionals = prior.log_conditionals(codes).detach()
    probs = posteriors(conditionals, costs, beta)
    assert torch.equal(chosen.codes, codes)
    expected = {
        "rate": -(probs * conditionals).sum((1, 2, 3)),
        "entropy": -(probs * probs.log()).sum((1, 2, 3)),
        "log_posterior": probs.log().gather(-1, codes[..., None]).sum((1, 2, 3)),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(chosen, name).detach(), value, rtol=0, atol=1e-12)
    # Of all distributions it has the least cost and divergence.
    least = (probs * costs).sum((1, 2, 3)) + beta * (chosen.rate - chosen.entropy).detach()
    for seed, size in enumerate((0.01, 0.3, 3.0) * 10):
        noise = torch.randn(probs.shape, generator=generator(seed), dtype=torch.float64)
        q = (probs.log() + size * noise).softmax(-1)
        assert ((q * (costs + beta * (q.log() - conditionals))).sum((1, 2, 3)) > least).all()


@pytest.mark.parametrize("beta", BETAS)
def test_over_draws_they_are_rate_and_entropy_of_the_whole_posterior(prior, beta):
    """The mean over all grids, each with its own probability under the posterior."""
    cost = make_costs(1)[0]
    chosen = posterior_at(GRIDS, cost.expand(len(GRIDS), *cost.shape), make_loop(prior, len(GRIDS), beta))
    log_probs = written_out(prior, cost[None], beta)[0]
    torch.testing.assert_close(chosen.log_posterior, log_probs, rtol=0, atol=1e-12)
    torch.testing.assert_close(chosen.entropy.detach(), every_draw(prior, cost, beta).entropy, rtol=0, atol=1e-12)
    probs, rates = log_probs.exp(), -prior.log_prob(GRIDS)
    torch.testing.assert_close(probs @ chosen.rate, probs @ rates, rtol=0, atol=1e-12)
    torch.testing.assert_close(probs @ chosen.entropy, torch.special.entr(probs).sum(), rtol=0, atol=1e-12)
    # Summed over each position's posterior, the rate spreads less than that of the drawn codes alone.
    assert probs @ (chosen.rate - probs @ rates).square() < probs @ (rates - probs @ rates).square()


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
def test_gradients_to_the_costs_are_differences(prior, beta):
    codes, costs = some_codes(2), make_costs(2).requires_grad_()
    loop = make_loop(prior, 2, beta)
    assert torch.autograd.gradcheck(lambda c: posterior_at(codes, c, loop).rate, costs)
    assert torch.autograd.gradcheck(lambda c: posterior_at(codes, c, loop).entropy, costs)


def test_gradients_stay_finite_where_the_posterior_is_certain(prior):
    """As at the start of its ramp, where β is next to nothing."""
    codes, costs = some_codes(5), make_costs(5).float().requires_grad_()
    chosen = posterior_at(codes, costs, make_loop(copy.deepcopy(prior).float(), 5, 1e-4))
    assert (chosen.entropy == 0).all()
    (gradient,) = torch.autograd.grad((chosen.rate - chosen.entropy).sum(), costs)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("beta", BETAS)
def test_the_prior_learns_by_cross_entropy_to_the_posterior_as_it_is(prior, beta):
    codes, costs = some_codes(20), make_costs(20)
    probs = posteriors(prior.log_conditionals(codes).detach(), costs, beta)
    parameters = list(prior.parameters())
    chosen = posterior_at(codes, costs, make_loop(prior, 20, beta))
    assert not chosen.log_posterior.requires_grad
    assert not chosen.entropy.requires_grad, "the posterior is no way to the prior"
    gradients = torch.autograd.grad(chosen.rate.sum(), parameters)
    expected = torch.autograd.grad(-(probs * prior.log_conditionals(codes)).sum(), parameters)
    for got, known in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, known)


# One of each way in which a gradient gets from a code's vector to the features.
WAYS = ["learned", "ema", "ema, rotation", "learned, normalised", "ema, normalised, rotation"]


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(("beta", "num_iterations"), [(0.7, 1), (2.0, None)])
def test_the_features_get_estimator_commitment_and_divergence(name, beta, num_iterations):
    """Of a step of training: the task's gradient by the estimator, 2w (z − e)/n, and −Cov_q(c, e)/(βσ²)."""
    quantizer = trained(name).double()
    shape = (2, 3)
    prior = make_prior(quantizer.num_codes, shape)
    z_e = features(quantizer.dim, 4, *shape).double().requires_grad_()
    slopes = features(quantizer.dim, 4, *shape, seed=6).double()
    torch.manual_seed(2)
    q, rate = quantizer.through_prior(z_e, make_loop(prior, 4, beta, num_iterations))
    task = (q.z_q * slopes).sum() + sum(q.auxiliary.values())
    (gradient,) = torch.autograd.grad(task + beta * (rate - q.entropy).sum(), z_e, retain_graph=True)

    table, variance = quantizer.table.detach(), 4 * quantizer.error
    projected = F.normalize(z_e, dim=-1) if quantizer.normalize else z_e
    found = projected.detach().requires_grad_()
    (expected,) = torch.autograd.grad(quantizer.estimator(found, table[q.codes]), found, slopes)
    expected = expected + 2 * quantizer.commitment_weight * (found.detach() - table[q.codes]) / z_e.numel()
    costs = distances_in_nats(quantizer, z_e).detach()
    probs = posteriors(prior.log_conditionals(q.codes).detach(), costs, beta)
    centred = probs * (costs - (probs * costs).sum(-1, keepdim=True))
    covariance = centred @ table
    assert (covariance.norm(dim=-1) > 0).all()
    expected = expected - covariance / (beta * variance)
    if quantizer.normalize:
        (expected,) = torch.autograd.grad(projected, z_e, expected)
    torch.testing.assert_close(gradient, expected)
    if name.startswith("learned"):  # the divergence moves the codebook too
        (gradient,) = torch.autograd.grad((rate - q.entropy).sum(), quantizer.codebook)
        conditionals = prior.log_conditionals(q.codes).detach()
        probs = posteriors(conditionals, distances_in_nats(quantizer, z_e.detach()), beta)
        (expected,) = torch.autograd.grad((probs * (probs.log() - conditionals)).sum(), quantizer.codebook)
        assert expected.any()
        torch.testing.assert_close(gradient, expected)
