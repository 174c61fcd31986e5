"""A prior in the loop, against choices, posteriors and bounds that are written out on enumerable worlds."""

import copy
import itertools
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
from quantizer_worlds import generator
from torch import Tensor

from priors import Prior, Sampling, UniformPrior
from vqvae import VQVAE
from vqvae.data import Batch
from vqvae.elbo import elbo, sampled_elbo
from vqvae.evaluation import evaluate
from vqvae.likelihoods import Categorical
from vqvae.quantizers import FSQ, EMAVectorQuantizer, SoftEMVectorQuantizer, codebook
from vqvae.quantizers.prior_in_loop import gumbel_noise, jacobi, rate_of, step_by_step


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
    # The Lagrangian of every other code at one position, with the codes before it as they are.
    lagrangian = costs - beta * prior.log_conditionals(chosen.codes)
    best = lagrangian.gather(-1, chosen.codes[..., None])
    assert (best <= lagrangian + 1e-12).all()


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
    counts = torch.bincount(index, minlength=81).double()
    # Grids that are expected under five times count as one.
    rare = num * probs < 5
    expected = torch.cat([num * probs[~rare], num * probs[rare].sum()[None]])
    counted = torch.cat([counts[~rare], counts[rare].sum()[None]])
    freedom = len(expected) - 1
    chi_square = ((counted - expected).square() / expected).sum()
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)
    torch.testing.assert_close(chosen.log_posterior, probs.log()[index])
    error = chosen.entropy.std() / num**0.5
    assert error > 0, "the entropy at a position depends on the codes before"
    assert (chosen.entropy.mean() - torch.special.entr(probs).sum()).abs() <= 4 * error


@pytest.mark.parametrize("beta", BETAS)
def test_the_posterior_minimises_cost_and_divergence_at_each_position(prior, beta):
    """E[c] + beta KL(P_enc || P_pri) at a position, given the codes before it, against other distributions there."""
    cost = make_costs(1)[0]
    joint = every_draw(prior, cost, beta).log_posterior.exp().reshape([NUM_CODES] * POSITIONS)
    conditionals = prior.log_conditionals(GRIDS).detach().reshape(*[NUM_CODES] * POSITIONS, POSITIONS, NUM_CODES)
    for position in range(POSITIONS):
        upto = joint.sum(tuple(range(position + 1, POSITIONS))) if position < POSITIONS - 1 else joint
        conditional = upto / upto.sum(-1, keepdim=True)
        first = (slice(None),) * position + (0,) * (POSITIONS - position) + (position,)
        log_prior = conditionals[first]  # "... k": of the codes before, whatever comes after

        def free_energy(q: Tensor, log_prior: Tensor = log_prior, position: int = position) -> Tensor:
            divergence = (torch.xlogy(q, q) - q * log_prior).sum(-1)
            return (q * cost.reshape(POSITIONS, NUM_CODES)[position]).sum(-1) + beta * divergence

        least = free_energy(conditional)
        for seed in range(50):
            noise = torch.randn(conditional.shape, generator=generator(seed), dtype=torch.float64)
            for size in (0.01, 0.3, 3.0):
                assert (free_energy((conditional.log() + size * noise).softmax(-1)) > least).all()


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
    assert torch.equal(step_by_step(costs, make_loop(prior, 40, 1e-9)).codes, nearest)
    noise = gumbel_noise(costs, generator(2))
    assert torch.equal(step_by_step(costs, make_loop(prior, 40, 1e-9), noise).codes, nearest)
    uniform = UniformPrior(num_codes=NUM_CODES, grid=GRID)
    for beta in (0.1, 1.0, 100.0):
        assert torch.equal(step_by_step(costs, make_loop(uniform, 40, beta)).codes, nearest)
    assert torch.equal(
        step_by_step(costs, make_loop(prior, 40, 1e9)).codes, prior.sample(40, sampling=Sampling(temperature=0.0))
    )


def test_rate_of_codes_is_their_cost_and_teaches_the_prior(prior):
    mine = copy.deepcopy(prior)
    rate = rate_of(GRIDS, make_loop(mine, len(GRIDS)))
    torch.testing.assert_close(rate, -prior.log_prob(GRIDS), rtol=0, atol=1e-12)
    rate.mean().backward()
    mean = -prior.log_prob(GRIDS).mean()
    for got, expected in zip(mine.parameters(), torch.autograd.grad(mean, list(prior.parameters())), strict=True):
        torch.testing.assert_close(got.grad, expected)


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
def test_a_beta_that_is_no_positive_number_is_refused(prior, beta):
    with pytest.raises(ValueError, match="expected a finite beta above zero"):
        make_loop(prior, 1, beta)
    with pytest.raises(ValueError, match=r"expected a finite (beta above zero|number, or None)"):
        VQVAE.Config(beta=beta).build()


def test_no_iterations_are_refused(prior):
    with pytest.raises(ValueError, match="at least one iteration, or None for the walk, got 0"):
        make_loop(prior, 1, num_iterations=0)


# --- bounds -----------------------------------------------------------------------------------------------------------

IMAGES = torch.randint(0, 256, (4, 1, 4, 4), generator=generator(3)).to(torch.uint8)
POPULATION = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)


class World:
    """A real model of 2x2 positions with a prior in its loop: all its 81 grids of codes are listed for each image."""

    def __init__(self, beta: float, labelled: bool) -> None:
        torch.manual_seed(0)
        config = VQVAE.Config(
            image_size=4,
            width=8,
            num_blocks=1,
            downsampling=2,
            quantizer=EMAVectorQuantizer.Config(num_codes=NUM_CODES, dim=2),
            likelihood=Categorical.Config(),
            beta=beta,
        )
        self.model = config.build().double().eval()
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
                self.log_prior = torch.stack(
                    [self.prior.log_prob(GRIDS, y.expand(81)) - math.log(2) for y in self.labels]
                )
            else:
                self.log_prior = self.prior.log_prob(GRIDS).expand(4, 81)

    @property
    def log_weights(self) -> Tensor:
        return self.log_prior + self.log_decoder - self.log_posterior

    def negative(self) -> Tensor:
        """The exact negative ELBO of each image."""
        return -(self.log_posterior.exp() * self.log_weights).sum(1)

    def repeated(self, times: int) -> tuple[Tensor, Tensor | None]:
        """Images and labels, each image `times` in a row."""
        labels = None if self.labels is None else self.labels.repeat_interleave(times)
        return IMAGES.repeat_interleave(times, 0), labels


@pytest.fixture(scope="module", params=[(1.0, False), (0.4, False), (2.0, True)], ids=["beta 1", "beta 0.4", "labels"])
def world(request) -> World:
    return World(*request.param)


def test_the_worlds_posterior_is_broad(world):
    probs = world.log_posterior.exp()
    torch.testing.assert_close(probs.sum(1), torch.ones(4, dtype=torch.float64))
    assert (torch.special.entr(probs).sum(1) > 0.5).all()


def test_the_mean_bound_is_entropy_plus_divergence(world, monkeypatch):
    """mean negative = H(Pop) + KL(Pop · P_enc ‖ P_pri · P_dec) to 1e-10, of the model's own terms for every grid."""
    images, labels = world.repeated(81)
    grids = GRIDS.repeat(4, 1, 1)
    monkeypatch.setattr(codebook, "gumbel_noise", lambda like, generator=None: forcing(grids))
    encoder = world.model.through(world.prior, labels)
    bound = sampled_elbo(encoder, world.prior, images, labels, generator=generator())
    assert torch.equal(encoder.draw(images, generator()).latents, grids)
    negative = (world.log_posterior.exp() * bound.negative.reshape(4, 81)).sum(1)
    mean = (POPULATION * negative).sum()
    joint = POPULATION[:, None] * world.log_posterior.exp()
    divergence = (joint * (joint.log() - world.log_prior - world.log_decoder)).sum()
    torch.testing.assert_close(mean, torch.special.entr(POPULATION).sum() + divergence, rtol=0, atol=1e-10)
    torch.testing.assert_close(bound.log_weights.reshape(4, 81), world.log_weights, rtol=0, atol=1e-9)
    evidence = -(world.log_prior + world.log_decoder).logsumexp(1)
    assert (negative >= evidence).all()


def test_draws_estimate_the_bound_within_their_error(world):
    times = 600
    images, labels = world.repeated(times)
    encoder = world.model.through(world.prior, labels)
    bound = sampled_elbo(encoder, world.prior, images, labels, num_samples=1, generator=generator(0))
    probs = world.log_posterior.exp()
    exact = {
        "rate": -(probs * world.log_prior).sum(1),
        "distortion": -(probs * world.log_decoder).sum(1),
        "entropy": torch.special.entr(probs).sum(1),
        "negative": world.negative(),
    }
    for name, expected in exact.items():
        draws = getattr(bound, name).reshape(4, times)
        error = draws.std(1) / times**0.5
        assert ((draws.mean(1) - expected).abs() <= 4 * error + 1e-9).all(), name


def test_the_importance_weighted_bound_tightens(world):
    weights, probs = world.log_weights, world.log_posterior.exp()
    bounds = [world.negative()]
    for k in (2, 3):
        total = torch.zeros(4, dtype=torch.float64)
        for index in range(4):
            picks = torch.cartesian_prod(*[torch.arange(81)] * k)
            several = weights[index][picks].logsumexp(1) - math.log(k)
            total[index] = -(probs[index][picks].prod(1) * several).sum()
        bounds.append(total)
    evidence = -(world.log_prior + world.log_decoder).logsumexp(1)
    for looser, tighter in itertools.pairwise([*bounds, evidence]):
        assert (tighter <= looser + 1e-12).all()
    times = 300
    images, labels = world.repeated(times)
    encoder = world.model.through(world.prior, labels)
    found = sampled_elbo(encoder, world.prior, images, labels, num_samples=3, generator=generator(1))
    estimates = found.importance_weighted.reshape(4, times)
    error = estimates.std(1) / times**0.5
    assert ((estimates.mean(1) - bounds[2]).abs() <= 4 * error + 1e-9).all()


def test_evaluation_tells_draws_from_the_most_probable_codes(world):
    result = evaluate(world.model, {"transformer": world.prior}, [Batch(IMAGES, world.labels)], num_draws=30)
    exact_rate = -(world.log_posterior.exp() * world.log_prior).sum(1).mean().item()
    assert result.bound.rate["transformer"] == pytest.approx(exact_rate, abs=4 * result.rate_error)
    assert result.bound.entropy > 0.5
    plain = elbo(world.model.through(world.prior, world.labels), world.prior, IMAGES, world.labels)
    assert result.deterministic is not None
    assert result.deterministic.entropy == 0
    assert result.deterministic.negative_elbo == pytest.approx(plain.negative.mean().item())
    assert result.importance_weighted is not None
    assert result.importance_weighted < result.bound.negative_elbo


# --- the model --------------------------------------------------------------------------------------------------------


def test_a_model_without_beta_goes_through_no_prior(prior):
    model = VQVAE.Config(image_size=8, width=8, num_blocks=0).build()
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
    world = World(1.0, False)
    for other in (UniformPrior(num_codes=NUM_CODES + 1, grid=GRID), UniformPrior(num_codes=NUM_CODES, grid=(4,))):
        with pytest.raises(ValueError, match="expected both equal"):
            world.model.through(other)


@pytest.mark.parametrize("quantizer", [FSQ.Config(), SoftEMVectorQuantizer.Config()])
def test_a_model_whose_quantizer_takes_no_prior_is_not_built(quantizer):
    with pytest.raises(ValueError, match=r"prior.*take .*EMAVectorQuantizer"):
        VQVAE.Config(quantizer=quantizer, beta=1.0).build()


def test_beta_is_kept_with_the_model(tmp_path):
    model = VQVAE.Config(image_size=8, width=8, num_blocks=0, beta=0.7).build()
    model.save_pretrained(tmp_path / "model")
    assert VQVAE.from_pretrained(tmp_path / "model").config == model.config
