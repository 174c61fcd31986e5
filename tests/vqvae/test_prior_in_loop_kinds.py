"""Every kind of quantizer with a prior in its loop: those that weigh it, and those that refuse."""

import copy

import pytest
import torch
from loop_worlds import GRID, NUM_CODES, POSITIONS, distances_in_nats, make_loop, make_prior
from quantizer_worlds import MEMBERS, PARAMS, features, generator, objective, trained
from torch import Tensor
from torch.nn import functional as F

from priors import Prior
from vqvae.quantizers import (
    EMAVectorQuantizer,
    GumbelQuantizer,
    Quantizer,
    StochasticVectorQuantizer,
    VectorQuantizer,
    categorical,
)
from vqvae.quantizers.prior_in_loop import Chosen, PriorInTheLoop, gumbel_noise, jacobi, posterior_at, step_by_step


@pytest.fixture(scope="module")
def prior() -> Prior:
    return make_prior()


# --- every kind of quantizer ------------------------------------------------------------------------------------------

KINDS = VectorQuantizer.Config | EMAVectorQuantizer.Config | GumbelQuantizer.Config | StochasticVectorQuantizer.Config
TAKES = [param for param in PARAMS if isinstance(MEMBERS[param.values[0]].config, KINDS)]
TAKES_NOT = [param for param in PARAMS if param not in TAKES and param.values[0] != "soft em, one sample"]
CODEBOOKS = [param for param in TAKES if not MEMBERS[param.values[0]].random]
POSTERIORS = [param for param in TAKES if MEMBERS[param.values[0]].random]
SHAPE = (2, 3)


def loop_for(quantizer: Quantizer, num: int, num_iterations: int | None = None) -> tuple[PriorInTheLoop, Prior]:
    prior = make_prior(quantizer.num_codes, SHAPE).float()
    return make_loop(prior, num, num_iterations=num_iterations), prior


@pytest.mark.parametrize("name", TAKES)
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("mode", ["training", "evaluation", "draws"])
def test_shapes_types_and_codes_that_decode(name, mode, bf16):
    training = mode == "training"
    quantizer = trained(name).train(training)
    loop, prior = loop_for(quantizer, 5, 1 if training else None)
    z_e = features(quantizer.dim, 5, *SHAPE).requires_grad_()
    drawing = generator(3) if mode == "draws" else None
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        q, rate = quantizer.through_prior(z_e.bfloat16() if bf16 else z_e, loop, drawing)
    assert q.z_q.shape == z_e.shape
    assert q.codes.shape == (5, *SHAPE)
    assert q.codes.dtype == torch.int64
    assert rate.shape == q.entropy.shape == q.log_posterior.shape == (5,)
    for tensor in (q.z_q, rate, q.entropy, q.log_posterior, *q.auxiliary.values()):
        assert tensor.dtype == torch.float32
        assert torch.isfinite(tensor).all()
    if not (training and MEMBERS[name].soft):
        assert torch.equal(quantizer.decode(q.codes), q.z_q)
    drawn = mode != "evaluation" and quantizer.num_codes > 1
    assert (q.entropy > 0).all() == (q.log_posterior < 0).all() == drawn
    if mode == "evaluation" and not bf16:
        torch.testing.assert_close(rate, -prior.log_prob(q.codes))
    terms = {"task": objective(q), "rate": rate.sum(), "entropy": q.entropy.sum()} if training else {}
    for term, value in terms.items():
        gradient = torch.autograd.grad(value, z_e, retain_graph=True)[0]
        assert torch.isfinite(gradient).all()
        assert gradient.any() == (term == "task" or quantizer.num_codes > 1), term
    if training and quantizer.num_codes > 1:
        assert all(part.any() for part in torch.autograd.grad(rate.sum(), list(prior.parameters())))


@pytest.mark.parametrize("name", TAKES)
def test_draws_repeat_with_the_generator_and_training_with_the_seed(name):
    quantizer = trained(name)
    z_e = features(quantizer.dim, 5, *SHAPE)
    loop, _ = loop_for(quantizer, 5)

    def train(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return quantizer.train().through_prior(z_e, loop)[0].codes

    def draw(seed: int) -> Tensor:
        return quantizer.eval().through_prior(z_e, loop, generator(seed))[0].codes

    for codes in (train, draw):
        first = codes(5)
        assert torch.equal(codes(5), first)
        assert quantizer.num_codes == 1 or not torch.equal(codes(6), first)


@pytest.mark.parametrize("name", TAKES)
@pytest.mark.parametrize("num_iterations", [None, 1])
@pytest.mark.parametrize("bf16", [False, True])
def test_codes_alone_are_those_of_the_whole(name, num_iterations, bf16):
    quantizer = trained(name).eval()
    z_e = features(quantizer.dim, 5, *SHAPE)
    loop, _ = loop_for(quantizer, 5, num_iterations)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for make in (lambda: None, lambda: generator(3)):
            whole, _ = quantizer.through_prior(z_e, loop, make())
            assert torch.equal(quantizer.codes_through_prior(z_e, loop, make()), whole.codes)


@pytest.mark.parametrize("name", TAKES_NOT)
def test_other_kinds_refuse(name):
    quantizer = trained(name)
    loop, _ = loop_for(quantizer, 5) if quantizer.num_codes < 100 else (make_loop(make_prior(), 5), None)
    for give in (quantizer.through_prior, quantizer.codes_through_prior):
        with pytest.raises(ValueError, match=r"prior.*take "):
            give(features(quantizer.dim, 5, *MEMBERS[name].grid), loop)


# --- codebooks that are listed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize(("beta", "num_iterations"), [(0.5, None), (1.0, 2), (2.0, 1)])
@pytest.mark.parametrize("mode", ["training", "evaluation", "draws"])
def test_codes_weigh_distance_in_units_of_four_mean_errors(name, beta, num_iterations, mode):
    """By the walk, or by iterations from the nearest codes on."""
    quantizer = trained(name).double().train(mode == "training")
    prior = make_prior(quantizer.num_codes, SHAPE)
    z_e = features(quantizer.dim, 7, *SHAPE).double()
    loop = make_loop(prior, 7, beta, num_iterations)
    costs = distances_in_nats(quantizer, z_e).detach()
    torch.manual_seed(4)
    q, rate = quantizer.through_prior(z_e, loop, generator(4) if mode == "draws" else None)
    torch.manual_seed(4)
    noise = None if mode == "evaluation" else gumbel_noise(costs, generator(4) if mode == "draws" else None)
    if num_iterations is None:
        expected = step_by_step(costs, loop, noise)
    else:
        codes = jacobi(costs.argmin(-1), costs, loop, noise, num_iterations)
        # Without the walk an evaluation has codes and their rate alone.
        zeros = torch.zeros(7, dtype=torch.float64)
        expected = Chosen(codes, -prior.log_prob(codes), zeros, zeros)
    if mode == "training":
        expected = posterior_at(expected.codes, costs, loop)
    assert torch.equal(q.codes, expected.codes)
    for got, known in zip((rate, q.entropy, q.log_posterior), expected[1:], strict=True):
        torch.testing.assert_close(got, known, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_iterations", [1, None])
def test_moving_averages_are_of_the_chosen_codes(num_iterations):
    """N ← γN + (1−γ)n, m ← γm + (1−γ)Σz, with n and Σz of the codes that the prior had a say in."""
    torch.manual_seed(0)
    quantizer = EMAVectorQuantizer.Config(num_codes=8, dim=3, decay=0.9, revival="off").build().double()
    quantizer(features(3, 6, *SHAPE).double())
    quantizer.update()
    counts, sums = quantizer.counts.clone(), quantizer.sums.clone()
    z_e = features(3, 6, *SHAPE, seed=9).double()
    q, _ = quantizer.through_prior(z_e, make_loop(make_prior(8, SHAPE), 6, 5.0, num_iterations))
    assert not torch.equal(q.codes, copy.deepcopy(quantizer).eval()(z_e).codes), "the prior had no say"
    chosen = F.one_hot(q.codes.flatten(), 8).double()
    quantizer.update()
    torch.testing.assert_close(quantizer.counts, 0.9 * counts + 0.1 * chosen.sum(0))
    torch.testing.assert_close(quantizer.sums, 0.9 * sums + 0.1 * chosen.T @ z_e.reshape(-1, 3))


@pytest.mark.parametrize("name", ["ema", "learned", "ema, normalised"])
@pytest.mark.parametrize("in_loop", [False, True])
def test_error_is_the_moving_mean_distance_to_the_nearest_codes(name, in_loop):
    torch.manual_seed(0)
    quantizer = MEMBERS[name].config.build()
    loop, _ = loop_for(quantizer, 4)
    expected = torch.ones(())
    for step in range(5):
        for part in features(quantizer.dim, 8, *SHAPE, seed=step).split(4):
            if in_loop:
                quantizer.through_prior(part, loop)
            else:
                quantizer(part)
        projected = quantizer.project(features(quantizer.dim, 8, *SHAPE, seed=step)).reshape(-1, quantizer.dim)
        nearest = torch.cdist(projected, quantizer.table.detach()).amin(1).square().mean() / quantizer.dim
        if step:  # the first step's codes are those before the start
            expected = nearest if step == 1 else 0.95 * expected + 0.05 * nearest
        quantizer.update()
        torch.testing.assert_close(quantizer.error, expected, rtol=1e-4, atol=1e-6)
    assert quantizer.error < 1


def test_vectors_that_are_codes_are_theirs():
    """Where no vector is off its code, σ² is next to nothing and distance is all."""
    quantizer = EMAVectorQuantizer.Config(num_codes=3, dim=3, revival="off").build()
    z_e = 100 * torch.eye(3)[torch.arange(12) % 3].reshape(2, *SHAPE, 3)
    for _ in range(3):
        quantizer(z_e)
        quantizer.update()
    assert quantizer.error < 1e-30
    prior = make_prior(3, SHAPE).float()
    q, rate = quantizer.eval().through_prior(z_e, make_loop(prior, 2))
    torch.testing.assert_close(q.z_q, z_e)
    drawn, _ = quantizer.through_prior(z_e, make_loop(prior, 2), generator(0))
    torch.testing.assert_close(drawn.z_q, z_e)
    for tensor in (rate, drawn.entropy, drawn.log_posterior):
        assert torch.isfinite(tensor).all()


# --- posteriors of a quantizer's own ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [GumbelQuantizer.Config, StochasticVectorQuantizer.Config])
@pytest.mark.parametrize("hard", [False, True])
def test_the_rates_gradient_goes_through_the_relaxed_sample(prior, monkeypatch, kind, hard):
    torch.manual_seed(0)
    quantizer = kind(num_codes=NUM_CODES, dim=2, hard=hard, temperature=0.75).build().double()
    noise = gumbel_noise(torch.empty(2 * POSITIONS, NUM_CODES).double(), generator(8))
    monkeypatch.setattr(categorical, "gumbel_softmax", lambda logits, tau: ((logits + noise) / tau).softmax(-1))
    z_e = features(2, 2, *GRID).double().requires_grad_()
    loop = make_loop(prior, 2)
    q, rate = quantizer.through_prior(z_e, loop)
    weight, bias = quantizer.logits()
    log_probs = (z_e @ weight.T + bias).log_softmax(-1)
    relaxed = ((log_probs + noise.reshape(2, *GRID, NUM_CODES)) / quantizer.current_temperature).softmax(-1)
    codes = relaxed.argmax(-1)
    weights = F.one_hot(codes, NUM_CODES).double() + relaxed - relaxed.detach() if hard else relaxed
    conditionals = prior.relaxed_log_conditionals(weights)
    expected = -(log_probs.exp() * conditionals).sum((1, 2, 3))
    torch.testing.assert_close(rate, expected, rtol=1e-12, atol=0)
    assert torch.equal(q.codes, codes)
    torch.testing.assert_close(q.z_q, weights @ quantizer.table)
    inputs = [z_e, *quantizer.parameters(), *prior.parameters()]
    for got, known in zip(
        torch.autograd.grad(rate.sum(), inputs, allow_unused=True, retain_graph=True),
        torch.autograd.grad(expected.sum(), inputs, allow_unused=True, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(got, known)
    # Each position's own posterior is exact, given the weights before; the context's part is there too.
    alone = torch.autograd.grad(-(log_probs.exp() * conditionals.detach()).sum(), z_e, retain_graph=True)[0]
    whole = torch.autograd.grad(rate.sum(), z_e, retain_graph=True)[0]
    torch.testing.assert_close(whole[:, -1, -1], alone[:, -1, -1])
    assert not torch.allclose(whole[:, 0, 0], alone[:, 0, 0])
    if not hard:
        assert torch.autograd.gradcheck(lambda z: quantizer.through_prior(z, loop)[1], z_e)
    assert torch.autograd.gradcheck(lambda z: quantizer.through_prior(z, loop)[0].entropy, z_e)


@pytest.mark.parametrize("name", POSTERIORS)
def test_the_rate_takes_the_place_of_even_odds(name):
    """In training; in evaluation all is as of the quantizer alone."""
    quantizer = trained(name)
    loop, _ = loop_for(quantizer, 5)
    z_e = features(quantizer.dim, 5, *SHAPE).requires_grad_()
    torch.manual_seed(3)
    plain = quantizer(z_e)
    torch.manual_seed(3)
    q, _ = quantizer.through_prior(z_e, loop)
    assert plain.auxiliary.keys() - q.auxiliary.keys() == {"kl"}
    for key, value in q.auxiliary.items():
        torch.testing.assert_close(value, plain.auxiliary[key])
    torch.testing.assert_close(q.z_q, plain.z_q)
    torch.testing.assert_close(q.entropy, plain.entropy)
    assert torch.autograd.grad(q.entropy.sum(), z_e)[0].any()
    quantizer.eval()
    for got, known in (
        (quantizer.through_prior(z_e, loop)[0], quantizer(z_e)),
        (quantizer.through_prior(z_e, loop, generator(2))[0], quantizer.draw(z_e, generator=generator(2))),
    ):
        assert torch.equal(got.codes, known.codes)
        torch.testing.assert_close(got.entropy, known.entropy)
        torch.testing.assert_close(got.log_posterior, known.log_posterior)
