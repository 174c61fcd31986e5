"""GaussianVAE: gradients against differences, closed forms against draws, files, refusals, collapse."""

import dataclasses
import json
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from priors import NormalPrior, UniformPrior
from vqvae import VQVAE, Autoencoder, GaussianVAE
from vqvae.elbo import sampled_elbo
from vqvae.gaussian import CHECK_EVERY
from vqvae.quantizers import VectorQuantizer

SMALL = GaussianVAE.Config(image_size=8, width=8, num_blocks=1, downsampling=4, dim=3)


def small(*, spread: float = 0.0, **changes) -> GaussianVAE:
    """A model with fresh weights, or with noise on all of them, so that every term depends on every weight."""
    torch.manual_seed(0)
    model = dataclasses.replace(SMALL, **changes).build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return model


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def normal(model: GaussianVAE) -> NormalPrior:
    return NormalPrior(dim=model.dim, grid=model.grid).to(next(model.parameters()).dtype)


def objective(model: GaussianVAE, y: Tensor) -> Tensor:
    out = model(y)
    return out.distortion.mean() / model.num_dims + sum(out.auxiliary.values())


def zero_posterior(model: GaussianVAE, channels: slice) -> None:
    """Let some channels' posterior be N(0, 1)."""
    last = model.encoder.layers[-1]
    with torch.no_grad():
        for parameter in (last.weight, last.bias):
            parameter.unflatten(0, (2, model.dim))[:, channels] = 0


# --- shapes, files, refusals ------------------------------------------------------------------------------------------


def test_shapes_and_both_ways():
    model = small(spread=0.1, num_channels=3).eval()
    y = images(2, 3, 8, 8)
    assert (model.grid, model.dim, model.num_dims, model.stochastic) == ((2, 2), 3, 192, True)
    out = model(y)
    assert out.latents.shape == (2, 2, 2, 3)
    assert torch.equal(out.latents, out.mean)
    assert (out.entropy == 0).all()
    assert (out.log_posterior == 0).all()
    means = model.encode(y)
    assert torch.equal(means, out.mean)
    assert torch.equal(model.decode(means), model.reconstruct(out))
    draws = [model.decode(means, sample=True, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_a_fresh_posterior_is_near_the_prior():
    torch.manual_seed(0)
    out = GaussianVAE()(images(4, 1, 28, 28))
    assert 0.3 < out.log_std.exp().mean() < 1.5
    assert out.mean.abs().max() < 3


def test_saved_models_are_the_same(tmp_path):
    model = small(spread=0.1, free_bits=0.25, beta=0.5).eval()
    model.save_pretrained(tmp_path / "model")
    y = images(2, 1, 8, 8)
    want = model.draw(y, torch.Generator().manual_seed(3))
    for kind in (Autoencoder, GaussianVAE):
        twin = kind.from_pretrained(tmp_path / "model")
        assert type(twin) is GaussianVAE
        assert twin.config == model.config
        assert not twin.training
        got = twin.draw(y, torch.Generator().manual_seed(3))
        assert torch.equal(got.latents, want.latents)
        assert torch.equal(got.distortion, want.distortion)


@pytest.mark.usefixtures("untyped")
def test_each_kind_loads_its_own(tmp_path):
    small().save_pretrained(tmp_path / "gaussian")
    config = VQVAE.Config(image_size=8, width=8, num_blocks=1, quantizer=VectorQuantizer.Config(num_codes=8, dim=4))
    config.build().save_pretrained(tmp_path / "codes")
    assert type(Autoencoder.from_pretrained(tmp_path / "codes")) is VQVAE
    with pytest.raises(ValueError, match="holds a GaussianVAE, expected a VQVAE"):
        VQVAE.from_pretrained(tmp_path / "gaussian")
    with pytest.raises(ValueError, match="holds a VQVAE, expected a GaussianVAE"):
        GaussianVAE.from_pretrained(tmp_path / "codes")
    path = tmp_path / "gaussian" / "config.json"
    good = json.loads(path.read_text())
    for change, message in (
        ({"class": "UniformPrior"}, "holds a UniformPrior, expected a GaussianVAE or .*VQVAE"),
        ({"quantizer": {"class": "FSQ"}}, "GaussianVAE has no quantizer"),
        ({"likelihood": {"class": "FSQ"}}, "unknown likelihood 'FSQ', expected one of .*LogisticMixture"),
        ({"likelihood": 3}, "expected the options of a likelihood"),
        ({"free_bits": -1.0}, "free_bits and beta of at least zero"),
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(ValueError, match=message):
            Autoencoder.from_pretrained(tmp_path / "gaussian")


@pytest.mark.parametrize("options", [{"dim": 0}, {"free_bits": -0.1}, {"beta": -1.0}, {"beta": math.nan}])
def test_bad_options_are_a_sentence(options):
    with pytest.raises(ValueError, match="expected"):
        small(**options)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.zeros(1, 2, 2, 4), r"latents of shape \(b, 2, 2, 3\), got torch.float32 \(1, 2, 2, 4\)"),
        (torch.zeros(1, 2, 2, 3, dtype=torch.int64), r"got torch.int64"),
        (torch.full((1, 2, 2, 3), torch.nan), "NaN or infinity"),
    ],
)
def test_bad_latents_are_a_sentence(latents, message):
    with pytest.raises(ValueError, match=message):
        small().decode(latents)


def test_broken_weights_are_a_sentence():
    model = small()
    with torch.no_grad():
        model.encoder.layers[-1].bias[0] = torch.nan
    for call in (model, model.draw, model.encode):
        with pytest.raises(ValueError, match="encoder gave NaN or infinity"):
            call(images(2, 1, 8, 8))


def test_priors_of_other_latents_are_refused():
    model, y = small(), images(1, 1, 8, 8)
    for prior, got in (
        (NormalPrior(dim=4, grid=(2, 2)), r"dim=4, grid=\(2, 2\)"),
        (NormalPrior(dim=3, grid=(2, 3)), r"dim=3, grid=\(2, 3\)"),
        (UniformPrior(num_codes=3, grid=(2, 2)), r"num_codes=3, grid=\(2, 2\)"),
    ):
        with pytest.raises(ValueError, match=rf"got a prior of {got} for a model of dim=3, grid=\(2, 2\).*latents"):
            sampled_elbo(model, prior, y)


# --- the objective ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("free_bits", "beta"), [(0.0, 1.0), (0.03, 0.7)])
def test_gradients_are_differences(free_bits, beta):
    """Of every weight of encoder and decoder, in a random direction, with the noise held fixed."""
    model = small(spread=0.1, free_bits=free_bits, beta=beta).double()
    y = images(3, 1, 8, 8)

    def value() -> Tensor:
        torch.manual_seed(1)
        return objective(model, y)

    value().backward()
    generator = torch.Generator().manual_seed(2)
    step = 1e-5
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            parameter.add_(step * direction)
            above = value().item()
            parameter.sub_(2 * step * direction)
            below = value().item()
            parameter.add_(step * direction)
        slope = (parameter.grad * direction).sum().item()
        assert slope != 0, name
        assert (above - below) / (2 * step) == pytest.approx(slope, rel=1e-5, abs=1e-8), name


def test_the_objective_is_the_negative_elbo():
    model = small(spread=0.1)
    y = images(3, 1, 8, 8)
    torch.manual_seed(1)
    out = model(y)
    torch.manual_seed(1)
    torch.testing.assert_close(objective(model, y), (out.distortion + out.kl).mean() / model.num_dims)


def test_free_bits_are_the_closed_form():
    model = small(spread=0.1, free_bits=0.03, beta=0.7)
    zero_posterior(model, slice(1, 2))
    out = model(images(4, 1, 8, 8))
    channels = out.channel_kl.double().sum((1, 2)).mean(0)
    floor = 0.03 * math.log(2) * 4
    assert (channels > floor).tolist() == [True, False, True]
    want = 0.7 * (channels[0] + floor + channels[2]) / 64
    torch.testing.assert_close(out.auxiliary["kl"].double(), want, rtol=1e-5, atol=0)
    out.auxiliary["kl"].backward()
    gradient = model.encoder.layers[-1].bias.grad.reshape(2, 3)
    assert (gradient[:, 1] == 0).all()
    assert (gradient[:, [0, 2]] != 0).all()


def test_learning_lowers_the_objective():
    model = small(width=16)
    y = images(2, 1, 8, 8).repeat(4, 1, 1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    values = []
    for _ in range(80):
        value = objective(model, y)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update()
        values.append(value.item())
    assert values[-1] < 0.6 * values[0]


def test_the_seed_decides():
    model = small(spread=0.1)
    y = images(2, 1, 8, 8)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(y).latents

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    draws = [model.draw(y, torch.Generator().manual_seed(seed)).latents for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert model.training


def test_autocast_leaves_the_terms_precise():
    model = small(spread=0.1)
    y = images(2, 1, 8, 8)
    torch.manual_seed(0)
    want = model(y)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(y)
    for name in ("distortion", "latents", "entropy", "log_posterior", "mean", "log_std", "kl"):
        value = getattr(out, name)
        assert value.dtype == torch.float32, name
        torch.testing.assert_close(value, getattr(want, name), rtol=0.05, atol=0.1)
    assert out.auxiliary["kl"].dtype == torch.float32
    mean, log_std = out.mean.double(), out.log_std.double()
    kl = 0.5 * (mean**2 + torch.exp(2 * log_std) - 1 - 2 * log_std)
    torch.testing.assert_close(out.channel_kl.double(), kl, rtol=1e-5, atol=1e-6)


def test_sigma_stays_in_its_bounds():
    model = small()
    with torch.no_grad():
        model.encoder.layers[-1].bias[3:] = torch.tensor([1e30, -1e30, 0.0])
    out = model(images(2, 1, 8, 8))
    assert out.log_std.abs().max() <= 8
    assert torch.isfinite(out.channel_kl).all()
    assert torch.isfinite(out.log_posterior).all()


# --- collapse ---------------------------------------------------------------------------------------------------------


def test_collapse_warns_once():
    model = small()
    zero_posterior(model, slice(None))
    y = images(2, 1, 8, 8)

    def steps(num: int) -> None:
        for _ in range(num):
            model(y)
            model.update()

    steps(4 * CHECK_EVERY)
    with pytest.warns(UserWarning, match=r"0 of 3 latent channels.*free_bits.*beta"):
        steps(CHECK_EVERY)
    steps(CHECK_EVERY)


def test_no_collapse_no_warning():
    model = small(spread=0.1)
    zero_posterior(model, slice(1, None))
    for _ in range(6 * CHECK_EVERY):
        model(images(2, 1, 8, 8))
        model.update()
    assert (model.recent_kl > 0.01).tolist() == [True, False, False]
    assert "recent_kl" not in model.state_dict()


# --- closed forms -----------------------------------------------------------------------------------------------------


def test_entropy_and_log_posterior_are_those_of_torch():
    model = small(spread=0.1).double()
    y = images(3, 1, 8, 8)
    for out in (model(y), model.draw(y)):
        q = Independent(Normal(out.mean, out.log_std.exp()), 3)
        torch.testing.assert_close(out.entropy, q.entropy())
        torch.testing.assert_close(out.log_posterior, q.log_prob(out.latents))
        kl = torch.distributions.kl_divergence(q.base_dist, Normal(0.0, 1.0))
        torch.testing.assert_close(out.channel_kl, kl)


def test_kl_is_the_mean_over_draws():
    model = small(spread=0.1).double()
    out = model.draw(images(1, 1, 8, 8).expand(5000, 1, 8, 8), torch.Generator().manual_seed(0))
    estimates = out.log_posterior - normal(model).log_prob(out.latents)
    error = estimates.std() / 5000**0.5
    assert abs(estimates.mean() - out.kl[0]) <= 4 * error
    assert error < 0.05 * out.kl[0]
