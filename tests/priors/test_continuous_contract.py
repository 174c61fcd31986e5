"""What every prior over vectors must do, whatever its kind."""

import copy
import math
from pathlib import Path

import pytest
import torch
from prior_worlds import CONTINUOUS, make_mixture, seeded, some_labels
from torch import Tensor

import safefolder
from priors import ContinuousPrior, MixtureTransformerPrior, NormalPrior, Prior, Sampling, UniformPrior
from priors.grid import GridModel


@torch.no_grad()
def density_on_grid(prior: ContinuousPrior, label: int | None = None) -> tuple[Tensor, Tensor]:
    """Points "s^2 2" on a square lattice far into the tails, and the mass of their cells.

    For smooth functions that die out at its border the plain sum is exact but for e^{-c/h}.
    """
    assert prior.num_positions * prior.dim == 2
    centre, unit = (prior.shift.item(), prior.scale.item()) if hasattr(prior, "shift") else (0.0, 1.0)
    points = torch.linspace(-14, 14, 221, dtype=torch.float64) * unit + centre
    latents = torch.cartesian_prod(points, points)
    masses = prior.log_prob(latents[..., None], label).exp() * (points[1] - points[0]) ** 2
    return latents, masses


def some_latents(prior: ContinuousPrior, num: int = 12) -> Tensor:
    torch.manual_seed(3)
    return 2 * torch.randn(num, *prior.grid, prior.dim, dtype=prior.dtype) - 0.5


def test_the_density_integrates_to_one(density: ContinuousPrior) -> None:
    prior = density.double()
    for label in [None] if prior.num_classes is None else [None, 0, 1]:
        _, masses = density_on_grid(prior, label)
        assert masses.dtype == torch.float64
        assert abs(masses.sum().item() - 1) < 1e-9


def test_samples_have_the_moments_of_the_density(density: ContinuousPrior) -> None:
    num = 20_000
    label = None if density.num_classes is None else 1
    samples = density.sample(num, label, generator=seeded(3)).double()[..., 0]
    points, masses = density_on_grid(copy.deepcopy(density).double(), label)
    mean = masses @ points

    def moments(values: Tensor) -> Tensor:
        a, b = (values - mean).unbind(-1)
        return torch.stack((a, b, a * a, b * b, a * b, a**3, b**3, a * a * b, a * b * b), -1)

    expected = masses @ moments(points)
    variance = masses @ moments(points).square() - expected.square()
    errors = (moments(samples).mean(0) - expected) / (variance / num).sqrt()
    assert errors.abs().max() < 4
    if not isinstance(density, NormalPrior):
        # The test can fail: positions are dependent and skewed, which N(mean, diag) draws would not show.
        independent = samples[:, 0], samples[torch.randperm(num), 1]
        wrong = (moments(torch.stack(independent, -1)).mean(0) - expected) / (variance / num).sqrt()
        assert wrong.abs().max() > 4


def test_the_same_seed_gives_the_same_latents(grid_density: ContinuousPrior) -> None:
    prior, twin = grid_density, copy.deepcopy(grid_density)
    labels = some_labels(prior, 8)
    first = prior.sample(8, labels, generator=seeded(5))
    torch.manual_seed(99)  # a generator of its own leaves the global one out of it
    assert torch.equal(first, twin.sample(8, labels, generator=seeded(5)))
    assert not torch.equal(first, prior.sample(8, labels, generator=seeded(6)))
    torch.manual_seed(99)
    assert torch.equal(prior.sample(8, labels), twin.sample(8, labels, generator=seeded(99)))


def test_samples_have_the_grid_and_the_type(grid_density: ContinuousPrior) -> None:
    for prior in (grid_density.train(), copy.deepcopy(grid_density).double()):
        for num in (0, 1, 5):
            latents = prior.sample(num, some_labels(prior, num))
            assert latents.shape == (num, *prior.grid, prior.dim)
            assert latents.dtype == prior.dtype
            assert not latents.requires_grad
            assert prior.training
            assert prior.log_prob(latents).shape == (num,)
            # Latents of another type are read in the prior's.
            halves = latents.bfloat16()
            assert torch.equal(prior.log_prob(halves), prior.log_prob(halves.to(prior.dtype)))


def test_a_lower_temperature_draws_closer(grid_density: ContinuousPrior) -> None:
    def draw(temperature: float) -> Tensor:
        return grid_density.sample(256, None, Sampling(temperature=temperature), seeded(1))

    still = draw(0.0)
    assert torch.equal(still, still[:1].expand_as(still))
    torch.testing.assert_close(draw(1e-6), still, atol=1e-4, rtol=0)
    spreads = [draw(temperature).std(0).mean().item() for temperature in (0.3, 1.0, 1.5)]
    assert spreads == sorted(spreads)


def test_one_grid_scores_as_it_does_among_many(grid_density: ContinuousPrior) -> None:
    prior = grid_density.double()
    latents = some_latents(prior)
    labels = some_labels(prior, len(latents))
    rows = [slice(i, i + 1) for i in range(len(latents))]
    alone = [prior.log_prob(latents[row], None if labels is None else labels[row]) for row in rows]
    torch.testing.assert_close(prior.log_prob(latents, labels), torch.cat(alone), atol=1e-11, rtol=0)
    assert torch.equal(prior(latents, labels), prior.log_prob(latents, labels))


def test_gradients_are_those_of_finite_differences(grid_density: ContinuousPrior) -> None:
    prior = grid_density.double()
    latents = some_latents(prior, 3).requires_grad_()
    labels = some_labels(prior, 3)
    named = {name: weight.detach().clone().requires_grad_() for name, weight in prior.named_parameters()}

    def of(latents: Tensor, *tensors: Tensor) -> Tensor:
        return torch.func.functional_call(prior, dict(zip(named, tensors, strict=True)), (latents, labels))

    # Fast mode compares along random directions, of the latents and of every parameter.
    assert torch.autograd.gradcheck(of, (latents, *named.values()), fast_mode=True)
    assert torch.autograd.gradcheck(lambda latents: of(latents, *named.values()), (latents,))
    for gradient in torch.autograd.grad(of(latents, *named.values()).sum(), [latents, *named.values()]):
        assert gradient.abs().sum() > 0
    far = of(100 * latents, *named.values())
    assert far.isfinite().all()
    for gradient in torch.autograd.grad(far.sum(), [latents, *named.values()]):
        assert gradient.isfinite().all()


def test_autocast_keeps_log_probs_in_float32(grid_density: ContinuousPrior) -> None:
    latents = some_latents(grid_density)
    expected = grid_density.log_prob(latents)
    with torch.autocast("cpu", torch.bfloat16):
        got = grid_density.log_prob(latents)
        samples = grid_density.sample(4)
    assert got.dtype == samples.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=0.2, rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_and_loaded_are_bit_equal(grid_density: ContinuousPrior, dtype: torch.dtype, tmp_path: Path) -> None:
    prior = grid_density.to(dtype)
    latents = some_latents(prior)
    prior.save_pretrained(tmp_path / "prior")
    torch.manual_seed(4)
    expected_noise = torch.rand(3)
    torch.manual_seed(4)
    for loader in (type(prior), ContinuousPrior, GridModel):
        again = loader.from_pretrained(tmp_path / "prior")
        assert type(again) is type(prior)
        assert not again.training
        assert (again.dim, again.grid, again.num_classes) == (prior.dim, prior.grid, prior.num_classes)
        assert list(again.state_dict()) == list(prior.state_dict())
        for name, tensor in prior.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor)
        if isinstance(prior, MixtureTransformerPrior) or dtype == torch.float32:
            assert torch.equal(again.log_prob(latents), prior.log_prob(latents))
    assert torch.equal(torch.rand(3), expected_noise)


def test_each_family_loads_its_own(tmp_path: Path) -> None:
    NormalPrior(dim=2, grid=(2, 2)).save_pretrained(tmp_path / "normal")
    UniformPrior(num_codes=3, grid=(2, 2)).save_pretrained(tmp_path / "uniform")
    with pytest.raises(ValueError, match=r"holds a NormalPrior, expected .*TransformerPrior or UniformPrior"):
        Prior.from_pretrained(tmp_path / "normal")
    with pytest.raises(ValueError, match=r"holds a UniformPrior, expected .*Mixture.* or NormalPrior"):
        ContinuousPrior.from_pretrained(tmp_path / "uniform")
    assert isinstance(GridModel.from_pretrained(tmp_path / "normal"), NormalPrior)
    assert isinstance(GridModel.from_pretrained(tmp_path / "uniform"), UniformPrior)
    safefolder.save(tmp_path / "other", {"class": "VQVAE", "format": 1}, {})
    with pytest.raises(ValueError, match="holds a VQVAE") as error:
        GridModel.from_pretrained(tmp_path / "other")
    assert str(error.value).count(" TransformerPrior") == 1


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.zeros(2, 2, 3, 3, dtype=torch.int64), "latents of torch.int64, expected floating point"),
        (torch.zeros(2, 2, 3), r"shape \(2, 2, 3\), expected \(b, 2, 3, 3\)"),
        (torch.zeros(2, 2, 3, 4), r"shape \(2, 2, 3, 4\), expected \(b, 2, 3, 3\)"),
        (torch.tensor(0.0), r"shape \(\), expected \(b, 2, 3, 3\)"),
        (torch.zeros(2, 2, 3, 3).index_fill(3, torch.tensor([1]), math.nan), "12 of 36 values NaN or infinite"),
        (torch.full((1, 2, 3, 3), -math.inf), "18 of 18 values NaN or infinite"),
        (torch.full((1, 2, 3, 3), 1e300, dtype=torch.float64), "NaN or infinite as torch.float32"),
    ],
)
@pytest.mark.parametrize("kind", ["normal", "mixture"])
def test_bad_latents(kind: str, latents: Tensor, message: str) -> None:
    prior = CONTINUOUS[kind](dim=3, grid=(2, 3))
    with pytest.raises(ValueError, match=message):
        prior.log_prob(latents)
    if isinstance(prior, MixtureTransformerPrior):
        with pytest.raises(ValueError, match=message):
            prior.standardise(latents)
        assert (prior.shift.tolist(), prior.scale.tolist()) == ([0.0] * 3, [1.0] * 3)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": -1}, "num=-1"),
        ({"num": 10**12}, "num=1,000,000,000,000, but all grids in one tensor take"),
        ({"num": 2.0}, r"num=2\.0"),
        ({"sampling": Sampling(top_k=3)}, "got top_k=3, expected only a temperature"),
        (
            {"sampling": Sampling(temperature=0.5, min_p=0.1, compiled=True)},
            "got min_p=0.1 and compiled=True, expected",
        ),
        ({"sampling": 0.5}, r"got sampling=0\.5, expected Sampling\("),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, "got labels, expected none"),
    ],
)
def test_bad_sampling_options(options: dict, message: str) -> None:
    for kind in ("normal", "mixture"):
        with pytest.raises(ValueError, match=message):
            CONTINUOUS[kind](dim=3, grid=(2, 3)).sample(**{"num": 2, **options})


@pytest.mark.usefixtures("untyped")
def test_bad_labels_and_sizes() -> None:
    prior = make_mixture(dim=3, grid=(2, 3), num_classes=2)
    for take, what in ((prior.log_prob, torch.zeros(2, 2, 3, 3)), (prior.sample, 2)):
        with pytest.raises(ValueError, match="labels from 0 to 2, expected 0 to 1"):
            take(what, [0, 2])
    for options, message in (({"dim": 0}, "dim=0"), ({"dim": 2.5}, r"dim=2\.5"), ({"grid": ()}, r"grid=\(\)")):
        for kind in (NormalPrior, make_mixture):
            with pytest.raises(ValueError, match=message):
                kind(**{"dim": 3, "grid": (2, 2), **options})
    for options, message in (({"num_components": 0}, "num_components=0"), ({"num_heads": 5}, "with num_heads=5")):
        with pytest.raises(ValueError, match=message):
            make_mixture(dim=3, grid=(2, 2), **options)
