"""A prior in the loop: choices, posteriors, gradients and bounds that are written out on enumerable worlds."""

import copy
import dataclasses
import math

import pytest
import torch
from loop_worlds import (
    BETAS,
    GRID,
    GRIDS,
    NUM_CODES,
    POSITIONS,
    distances_in_nats,
    every_draw,
    forcing,
    make_costs,
    make_loop,
    make_prior,
    written_out,
)
from quantizer_worlds import features, generator, trained
from torch import Tensor
from torch.nn import functional as F

from priors import Prior, Sampling, UniformPrior
from vqvae import VQVAE
from vqvae.bound import elbo, sampled_elbo
from vqvae.data import Batch
from vqvae.evaluation import evaluate
from vqvae.likelihoods import Categorical
from vqvae.quantizers import FSQ, EMAVectorQuantizer, SoftEMVectorQuantizer, codebook
from vqvae.quantizers.prior_in_loop import gumbel_noise, jacobi, posterior_at, step_by_step


@pytest.fixture(scope="module")
def prior() -> Prior:
    return make_prior()


# --- codes and draws of the walk --------------------------------------------------------------------------------------


def greedy(prior: Prior, cost: Tensor, beta: float) -> list[int]:
    """The walk's codes of one image, written out."""
    before: list[int] = []
    for position in range(POSITIONS):
        known = torch.tensor([*before, *[0] * (POSITIONS - position)]).reshape(1, *GRID)
        rates = -prior.log_conditionals(known).reshape(POSITIONS, NUM_CODES)[position]
        here = [cost.reshape(POSITIONS, NUM_CODES)[position, k] + beta * rates[k] for k in range(NUM_CODES)]
        before.append(min(range(NUM_CODES), key=lambda k: here[k].item()))
    return before


@pytest.mark.parametrize("beta", BETAS)
def test_each_code_costs_least_given_those_before(prior, beta):
    costs = make_costs(40)
    chosen = step_by_step(costs, make_loop(prior, 40, beta))
    assert chosen.codes.flatten(1).tolist() == [greedy(prior, cost, beta) for cost in costs]
    assert not torch.equal(chosen.codes, costs.argmin(-1)), "the prior had no say"
    torch.testing.assert_close(chosen.rate, -prior.log_prob(chosen.codes).detach())
    assert (chosen.entropy == 0).all()
    assert (chosen.log_posterior == 0).all()


@pytest.mark.parametrize("beta", BETAS)
def test_the_posterior_is_the_one_written_out(prior, beta):
    for cost in make_costs(3):
        chosen = every_draw(prior, cost, beta)
        expected = written_out(prior, cost[None], beta)[0]
        torch.testing.assert_close(chosen.log_posterior, expected, rtol=0, atol=1e-12)
        assert chosen.log_posterior.exp().sum().item() == pytest.approx(1, abs=1e-12)
        torch.testing.assert_close(chosen.rate, -prior.log_prob(GRIDS).detach(), rtol=0, atol=1e-12)
        entropy = torch.special.entr(expected.exp()).sum()
        torch.testing.assert_close((expected.exp() * chosen.entropy).sum(), entropy, rtol=0, atol=1e-12)


def test_draws_follow_the_posterior(prior):
    num, cost = 20_000, make_costs(1)
    costs = cost.expand(num, *cost.shape[1:])
    chosen = step_by_step(costs, make_loop(prior, num), gumbel_noise(costs, generator(0)))
    probs = written_out(prior, cost, 1.0)[0].exp()
    index = (chosen.codes.flatten(1) * torch.tensor([27, 9, 3, 1])).sum(1)
    counts = torch.bincount(index, minlength=81)
    # Grids that are expected under five times count as one.
    cells = torch.where(num * probs < 5, 81, torch.arange(81))
    expected, counted = (torch.zeros(82).double().index_add(0, cells, each.double()) for each in (num * probs, counts))
    (used,) = expected.nonzero(as_tuple=True)
    chi_square = ((counted - expected).square()[used] / expected[used]).sum()
    freedom = len(used) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)
    torch.testing.assert_close(chosen.log_posterior, probs.log()[index])
    error = chosen.entropy.std() / num**0.5
    assert error > 0, "the entropy at a position depends on the codes before"
    assert (chosen.entropy.mean() - torch.special.entr(probs).sum()).abs() <= 4 * error


@pytest.mark.parametrize("with_noise", [False, True])
@pytest.mark.parametrize("beta", BETAS)
def test_iterations_become_the_walk_position_by_position(prior, beta, with_noise):
    costs = make_costs(40)
    noise = gumbel_noise(costs, generator(1)) if with_noise else None
    loop = make_loop(prior, 40, beta)
    walked = step_by_step(costs, loop, noise).codes.flatten(1)
    start = costs.argmin(-1)
    early = 0
    for num_iterations in range(POSITIONS + 2):
        iterated = jacobi(start, costs, loop, noise, num_iterations).flatten(1)
        assert torch.equal(iterated[:, :num_iterations], walked[:, :num_iterations])
        early += num_iterations < POSITIONS and not torch.equal(iterated, walked)
    assert torch.equal(iterated, walked)
    assert early > 0, "one iteration was enough, which shows nothing"


def test_limits(prior):
    costs = make_costs(40)
    nearest = costs.argmin(-1)
    for noise in (None, gumbel_noise(costs, generator(2))):
        assert torch.equal(step_by_step(costs, make_loop(prior, 40, 1e-9), noise).codes, nearest)
    uniform = UniformPrior(num_codes=NUM_CODES, grid=GRID)
    assert torch.equal(step_by_step(costs, make_loop(uniform, 40, 100.0)).codes, nearest)
    likeliest = prior.sample(40, sampling=Sampling(temperature=0.0))
    assert torch.equal(step_by_step(costs, make_loop(prior, 40, 1e9)).codes, likeliest)


@pytest.mark.parametrize("beta", [0.0, math.nan, math.inf])
def test_options_out_of_range_are_refused(prior, beta):
    with pytest.raises(ValueError, match="expected a finite beta above zero"):
        make_loop(prior, 1, beta)
    with pytest.raises(ValueError, match=r"expected a finite (beta above zero|number, or None)"):
        VQVAE.Config(beta=beta).build()
    with pytest.raises(ValueError, match="at least one iteration, or None for the walk, got 0"):
        make_loop(prior, 1, num_iterations=0)


# --- rate, entropy and gradients in training --------------------------------------------------------------------------


def some_codes(num: int) -> Tensor:
    return GRIDS[torch.randint(len(GRIDS), (num,), generator=generator(5))]


def posteriors(conditionals: Tensor, costs: Tensor, beta: float) -> Tensor:
    """P_enc(k | y, codes before) ∝ P_pri(k | codes before) · exp(−c_k / β), "b *grid k"."""
    weights = conditionals.exp() * (-costs / beta).exp()
    return weights / weights.sum(-1, keepdim=True)


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


# --- bounds -----------------------------------------------------------------------------------------------------------

IMAGES = torch.randint(0, 256, (4, 1, 4, 4), generator=generator(3)).to(torch.uint8)
POPULATION = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)


class World:
    """A real model of 2x2 positions with a prior in its loop: all its 81 grids of codes are listed for each image."""

    def __init__(self, beta: float, labelled: bool) -> None:
        torch.manual_seed(0)
        parts = {"quantizer": EMAVectorQuantizer.Config(num_codes=NUM_CODES, dim=2), "likelihood": Categorical.Config()}
        self.model = VQVAE(image_size=4, width=8, num_blocks=1, downsampling=2, **parts, beta=beta).double().eval()
        self.prior = make_prior(num_classes=2 if labelled else None)
        self.labels = torch.arange(4) % 2 if labelled else None
        quantizer = self.model.quantizer
        with torch.no_grad():
            for parameter in self.model.decoder.parameters():
                parameter.mul_(3)
            z_e = self.model.encoder(IMAGES)
            # Codes among the vectors, neither far nor on top of each other.
            codes = z_e.reshape(-1, 2)[[0, 5, 10]] + 0.3 * torch.randn(3, 2).double() * z_e.std()
            quantizer.reset_codes(torch.ones(3).double(), codes, torch.ones(()).double())
            quantizer.error.fill_(z_e.var().item() / 8)
            costs = distances_in_nats(quantizer, z_e)
            self.log_posterior = written_out(self.prior, costs, beta, self.labels)
            features = self.model.decoder(quantizer.decode(GRIDS))
            self.log_decoder = torch.stack(
                [self.model.likelihood.log_prob(y.expand(81, 1, 4, 4), features) for y in IMAGES]
            )
            if labelled:  # a label costs ln 2 and is one of the latents
                log_probs = [self.prior.log_prob(GRIDS, y.expand(81)) - math.log(2) for y in self.labels]
                self.log_prior = torch.stack(log_probs)
            else:
                self.log_prior = self.prior.log_prob(GRIDS).expand(4, 81)

    def repeated(self, times: int) -> tuple[Tensor, Tensor | None]:
        """Images and labels, each image `times` in a row."""
        labels = None if self.labels is None else self.labels.repeat_interleave(times)
        return IMAGES.repeat_interleave(times, 0), labels


@pytest.fixture(scope="module", params=[(1.0, False), (0.4, False), (2.0, True)], ids=["beta 1", "beta 0.4", "labels"])
def world(request) -> World:
    return World(*request.param)


def test_the_mean_bound_is_entropy_plus_divergence(world, monkeypatch):
    """mean negative = H(Pop) + KL(Pop · P_enc ‖ P_pri · P_dec) to 1e-10, of the model's own terms for every grid."""
    probs = world.log_posterior.exp()
    torch.testing.assert_close(probs.sum(1), torch.ones(4, dtype=torch.float64))
    assert (torch.special.entr(probs).sum(1) > 0.5).all()
    images, labels = world.repeated(81)
    grids = GRIDS.repeat(4, 1, 1)
    monkeypatch.setattr(codebook, "gumbel_noise", lambda like, generator=None: forcing(grids))
    encoder = world.model.through(world.prior, labels)
    bound = sampled_elbo(encoder, world.prior, images, labels, generator=generator())
    assert torch.equal(encoder.draw(images, generator()).latents, grids)
    log_weights = world.log_prior + world.log_decoder - world.log_posterior
    torch.testing.assert_close(bound.log_weights.reshape(4, 81), log_weights, rtol=0, atol=1e-9)
    negative = (probs * bound.negative.reshape(4, 81)).sum(1)
    joint = POPULATION[:, None] * probs
    divergence = (joint * (joint.log() - world.log_prior - world.log_decoder)).sum()
    mean = torch.special.entr(POPULATION).sum() + divergence
    torch.testing.assert_close((POPULATION * negative).sum(), mean, rtol=0, atol=1e-10)
    assert (negative >= -(world.log_prior + world.log_decoder).logsumexp(1)).all()


def test_evaluation_tells_draws_from_the_most_probable_codes(world):
    result = evaluate(world.model, {"transformer": world.prior}, [Batch(IMAGES, world.labels)], num_draws=30)
    exact_rate = -(world.log_posterior.exp() * world.log_prior).sum(1).mean().item()
    assert result.bound.rate["transformer"] == pytest.approx(exact_rate, abs=4 * result.rate_error)
    assert result.bound.entropy > 0.5
    plain = elbo(world.model.through(world.prior, world.labels), world.prior, IMAGES, world.labels)
    assert result.deterministic.entropy == 0
    assert result.deterministic.negative_elbo == pytest.approx(plain.negative.mean().item())
    assert result.importance_weighted < result.bound.negative_elbo


# --- the model --------------------------------------------------------------------------------------------------------


def test_beta_is_kept_with_the_model_and_without_it_no_prior_is_gone_through(prior, tmp_path):
    config = VQVAE.Config(image_size=8, width=8, num_blocks=0, beta=0.7)
    config.build().save_pretrained(tmp_path / "model")
    assert VQVAE.from_pretrained(tmp_path / "model").config == config
    model = dataclasses.replace(config, beta=None).build()
    assert model.through(prior) is model


def test_codes_of_a_model_through_its_prior(prior):
    world = World(1.0, False)
    through = world.model.train().through(prior)
    out, codes = through.draw(IMAGES, generator(4)), through.encode(IMAGES, generator(4))
    assert torch.equal(out.latents, codes)
    assert world.model.training
    world.model.eval()
    assert torch.equal(through(IMAGES).latents, through.encode(IMAGES))
    assert torch.equal(world.model.decode(codes), world.model.reconstruct(out))
    iterated = world.model.through(prior, num_iterations=POSITIONS)
    assert torch.equal(iterated.encode(IMAGES, generator(4)), codes)
    assert torch.equal(iterated(IMAGES).latents, through(IMAGES).latents)
    assert (through.grid, through.num_codes) == (GRID, NUM_CODES)
    torch.manual_seed(1)
    first = through.draw(IMAGES).latents
    torch.manual_seed(1)
    assert torch.equal(through.draw(IMAGES).latents, first)


def test_a_prior_of_other_codes_is_refused():
    with pytest.raises(ValueError, match="expected both equal"):
        World(1.0, False).model.through(UniformPrior(num_codes=NUM_CODES, grid=(4,)))


@pytest.mark.parametrize("quantizer", [FSQ.Config(), SoftEMVectorQuantizer.Config()])
def test_a_model_whose_quantizer_takes_no_prior_is_not_built(quantizer):
    with pytest.raises(ValueError, match=r"prior.*take .*EMAVectorQuantizer"):
        VQVAE.Config(quantizer=quantizer, beta=1.0).build()
