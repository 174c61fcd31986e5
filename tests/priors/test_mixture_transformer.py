"""What only the transformer with mixtures does: its density by another library, its walk, its standardising."""

import math

import pytest
import torch
from prior_worlds import make_mixture, rebuilt, seeded
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from priors import MixtureTransformerPrior, NormalPrior, Sampling


def some_latents(prior: MixtureTransformerPrior, num: int = 6) -> Tensor:
    torch.manual_seed(5)
    return torch.randn(num, *prior.grid, prior.dim, dtype=prior.dtype)


def head_and_inputs(prior: MixtureTransformerPrior) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    prior.mixture.register_forward_hook(lambda _, __, out: seen.update(out=out))
    prior.vector.register_forward_hook(lambda _, __, out: seen.update(vector=out))
    return seen


@pytest.mark.parametrize("num_classes", [None, 2])
def test_log_prob_is_the_mixture_of_torch_distributions(num_classes: int | None) -> None:
    prior = make_mixture(dim=3, grid=(2, 2), num_classes=num_classes, shift=0.3, scale=0.6).double()
    seen, latents = head_and_inputs(prior), some_latents(prior)
    labels = None if num_classes is None else torch.arange(6) % 2
    got = prior.log_prob(latents, labels)
    logits = seen["out"][..., :3]
    means = seen["out"][..., 3:12].reshape(6, 4, 3, 3)
    stds = math.exp(-7) * (1 + math.exp(7) * seen["out"][..., 12:].exp()).reshape(6, 4, 3, 3)
    mixture = MixtureSameFamily(Categorical(logits=logits), Independent(Normal(means, stds), 1))
    shift = torch.tensor([0.3, 0.6, 0.9]).double()
    scale = torch.tensor([0.6, 0.36, 0.216]).double()
    units = ((latents - shift) / scale).flatten(1, 2)
    expected = mixture.log_prob(units).sum(1) - 4 * scale.log().sum()
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)  # shift and scale were set in float32
    if labels is not None:
        assert not torch.allclose(got, prior.log_prob(latents))


@pytest.mark.parametrize(("grid", "num_classes"), [((2, 3), 2), ((5,), None), ((2, 2, 2), None), ((1, 1), 2)])
def test_step_by_step_scores_like_all_at_once(grid: tuple, num_classes: int | None) -> None:
    prior = make_mixture(dim=2, grid=grid, num_classes=num_classes, depth=2, width=24, shift=0.7, scale=1.6).double()
    latents = some_latents(prior)
    labels = None if num_classes is None else torch.arange(6) % 2
    units = ((latents - prior.shift) / prior.scale).flatten(1, -2)
    step = prior._start_walk(6, labels)
    total = -prior.num_positions * prior.scale.log().sum()
    for position in range(prior.num_positions):
        total = total + step(units[:, max(position - 1, 0) : position]).log_prob(units[:, position])
    torch.testing.assert_close(prior.log_prob(latents, labels), total, atol=1e-10, rtol=0)


def test_both_ends_are_in_float32_under_autocast() -> None:
    prior = make_mixture(dim=2, grid=(2, 3))
    seen, latents = head_and_inputs(prior), some_latents(prior)
    prior(latents)
    vector = seen["vector"]
    with torch.autocast("cpu", torch.bfloat16):
        prior(latents)
        assert seen["out"].dtype == torch.float32
        assert torch.equal(seen["vector"], vector)
        prior.sample(1)
        assert seen["out"].dtype == seen["vector"].dtype == torch.float32


def test_greedy_latents_are_the_heaviest_means_after_those_drawn() -> None:
    prior = make_mixture(dim=2, grid=(2, 3), num_classes=2, shift=0.7, scale=1.6).double()
    seen, labels = head_and_inputs(prior), torch.tensor([0, 1, 1])
    drawn = prior.sample(3, labels, Sampling(temperature=0.0))
    prior(drawn, labels)
    heaviest = seen["out"][..., :3].argmax(-1)
    means = seen["out"][..., 3:9].reshape(3, 6, 3, 2)
    units = means.gather(2, heaviest[..., None, None].expand(-1, -1, 1, 2)).reshape(3, 2, 3, 2)
    torch.testing.assert_close(drawn, prior.shift + prior.scale * units, atol=1e-10, rtol=0)
    assert not torch.allclose(drawn[0], drawn[1])


def test_standardise_is_a_change_of_variables() -> None:
    torch.manual_seed(0)
    units = torch.randn(50, 2, 2, 3).double()
    units = (units - units.mean((0, 1, 2))) / units.std((0, 1, 2), correction=0)
    plain = make_mixture(dim=3, grid=(2, 2)).double()
    prior = make_mixture(dim=3, grid=(2, 2)).double()
    scale, shift = torch.tensor([1e-3, 1.0, 500.0]).double(), torch.tensor([-0.2, 4.0, 0.0]).double()
    latents = shift + scale * units
    assert prior.standardise(latents) is prior
    torch.testing.assert_close(prior.shift, shift, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(prior.scale, scale)
    expected = plain.log_prob(units) - 4 * scale.log().sum()
    torch.testing.assert_close(prior.log_prob(latents), expected, atol=1e-9, rtol=0)
    drawn, again = (each.sample(7, generator=seeded()) for each in (prior, plain))
    torch.testing.assert_close(drawn, shift + scale * again)


@pytest.mark.parametrize("still", [0.0, 1e4])
def test_a_channel_that_does_not_vary_is_refused(still: float) -> None:
    prior = make_mixture(dim=3, grid=(2, 2))
    latents = some_latents(prior, 1000)
    latents[..., 1] = still
    with pytest.raises(ValueError, match=r"same everywhere in channels \[1\]"):
        prior.standardise(latents)
    with pytest.raises(ValueError, match="got no latents"):
        prior.standardise(latents[:0])
    assert (prior.shift.tolist(), prior.scale.tolist()) == ([0.0] * 3, [1.0] * 3)


def test_a_fresh_prior_is_nearly_standard_normal() -> None:
    torch.manual_seed(0)
    prior = MixtureTransformerPrior(dim=4, grid=(4, 4))
    latents = torch.randn(64, 4, 4, 4)
    difference = (prior(latents) - NormalPrior(dim=4, grid=(4, 4))(latents)) / 64
    assert difference.abs().max() < 0.03
    means = prior.mixture.bias[8:40].view(8, 4)
    assert torch.pdist(means).min() > 0.01


def test_repeated_latents_have_a_bounded_density() -> None:
    """Only the floor stops it: with every deviation 0 and the narrowest Gaussians."""
    prior = make_mixture(dim=2, grid=(2, 2))
    with torch.no_grad():
        prior.mixture.weight.zero_()
        prior.mixture.bias.zero_()
        prior.mixture.bias[-6:] = -1e4
    latents = torch.zeros(1, 2, 2, 2, requires_grad=True)
    log_prob = prior(latents)
    assert log_prob.item() == pytest.approx(8 * (7 - math.log(2 * math.pi) / 2), rel=1e-6)
    assert prior(latents + 1).isfinite()
    (-log_prob.sum()).backward()
    assert latents.grad.isfinite().all()


def test_temperature_is_what_it_says() -> None:
    """One position, where the mixture can be had: w^(1/T), and T times each standard deviation."""
    prior = make_mixture(dim=2, grid=(1,)).double()
    mixture, temperature = prior._start_walk(1, None)(torch.zeros(1, 0, 2).double()), 0.6
    weights = (mixture.log_weights[0] / temperature).softmax(0).detach()
    means, variances = mixture.means[0].detach(), (2 * mixture.log_stds[0]).exp().detach() * temperature**2
    num = 40_000
    drawn = prior.sample(num, sampling=Sampling(temperature=temperature), generator=seeded())[:, 0]
    mean = weights @ means
    variance = weights @ (variances + means.square()) - mean.square()
    assert ((drawn.mean(0) - mean) / (variance / num).sqrt()).abs().max() < 4
    squares = (drawn - mean).square()
    assert ((squares.mean(0) - variance) / (squares.var(0) / num).sqrt()).abs().max() < 4
    heaviest = means[mixture.log_weights[0].argmax()]
    torch.testing.assert_close(prior.sample(1, sampling=Sampling(temperature=0.0))[0, 0], heaviest)


@pytest.mark.parametrize("option", ["dropout", "label_dropout"])
def test_dropout_is_for_training_alone(option: str) -> None:
    prior = make_mixture(dim=2, grid=(2, 2), num_classes=2, label_dropout=0.0)
    noisy, latents, labels = rebuilt(prior, **{option: 0.5}), some_latents(prior), torch.arange(6) % 2
    assert torch.equal(noisy(latents, labels), prior(latents, labels))
    assert not torch.allclose(noisy.train()(latents, labels), prior(latents, labels))


def ar1_field(num: int, size: int, dim: int, correlation: float) -> tuple[Tensor, float]:
    """Gaussian fields with correlation^(rows + columns apart), each channel alike, and their entropy in nats."""
    lags = torch.arange(size).double()
    line = correlation ** (lags[:, None] - lags).abs()
    covariance = torch.kron(line, line)
    torch.manual_seed(0)
    fields = torch.linalg.cholesky(covariance) @ torch.randn(num, size**2, dim).double()
    entropy = dim * torch.distributions.MultivariateNormal(torch.zeros(size**2).double(), covariance).entropy()
    return fields.float().reshape(num, size, size, dim), entropy.item()


def test_it_learns_a_correlated_field() -> None:
    """Fields of unit variance, at 4 channels: N(0, I) pays the entropy of independent positions."""
    fields, entropy = ar1_field(4096 + 512, 3, 4, 0.9)
    train, held_out = (5 + 3 * fields).split((4096, 512))
    entropy += 36 * math.log(3)
    torch.manual_seed(0)
    sizes = {"width": 48, "depth": 1, "num_heads": 2, "num_components": 2}
    prior = MixtureTransformerPrior(dim=4, grid=(3, 3), **sizes).standardise(train)
    units = (held_out - prior.shift) / prior.scale
    normal = (36 * math.log(3) - NormalPrior(dim=4, grid=(3, 3))(units).mean()).item()
    optimiser = torch.optim.Adam(prior.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.05, total_iters=200)
    for i in range(200):
        optimiser.zero_grad()
        (-prior(train[torch.arange(i * 64, i * 64 + 64) % 4096]).mean()).backward()
        torch.nn.utils.clip_grad_norm_(prior.parameters(), 10.0)
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        rate = -prior.eval()(held_out).mean().item()
    assert rate > entropy - 1.5  # the held-out fields' own mean is within 4 standard errors of it
    assert rate - entropy < 0.33 * (normal - entropy)
