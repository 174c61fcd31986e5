"""GaussianVAE: gradients against differences, closed forms against draws, files, refusals, collapse."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from priors import NormalPrior, UniformPrior
from vqvae import VQVAE, Autoencoder, GaussianVAE
from vqvae.bound import sampled_elbo
from vqvae.gaussian import CHECK_EVERY

SMALL = GaussianVAE.Config(image_size=8, width=8, num_blocks=1, downsampling=4, dim=3)


def small(*, spread: float = 0.0, **changes) -> GaussianVAE:
    """A model with fresh weights, or with noise on all of them, so that every term depends on every weight."""
    torch.manual_seed(0)
    model = dataclasses.replace(SMALL, **changes).build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return model


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded(seed))


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


def test_both_ways_and_what_the_seed_decides():
    model = small(spread=0.1, num_channels=3)
    y = images(2, 3, 8, 8)
    assert (model.grid, model.dim, model.num_dims, model.stochastic) == ((2, 2), 3, 192, True)

    def train(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(y).latents

    out = copy.deepcopy(model).eval()(y)
    assert torch.equal(out.latents, out.mean)
    assert (out.entropy == 0).all()
    assert (out.log_posterior == 0).all()
    means = model.encode(y)
    assert torch.equal(means, out.mean)
    assert torch.equal(model.decode(means), model.reconstruct(out))
    for sample in (
        train,
        lambda seed: model.draw(y, seeded(seed)).latents,
        lambda seed: model.decode(means, sample=True, generator=seeded(seed)),
    ):
        assert torch.equal(sample(0), sample(0))
        assert not torch.equal(sample(0), sample(1))
    assert model.training


def test_saved_models_are_the_same(tmp_path):
    model = small(spread=0.1, free_bits=0.25, beta=0.5).eval()
    model.save_pretrained(tmp_path / "model")
    y = images(2, 1, 8, 8)
    want = model.draw(y, seeded(3))
    for kind in (Autoencoder, GaussianVAE):
        twin = kind.from_pretrained(tmp_path / "model")
        assert type(twin) is GaussianVAE
        assert twin.config == model.config
        assert not twin.training
        got = twin.draw(y, seeded(3))
        assert torch.equal(got.latents, want.latents)
        assert torch.equal(got.distortion, want.distortion)


def test_each_kind_loads_its_own(tmp_path):
    small().save_pretrained(tmp_path / "gaussian")
    with pytest.raises(ValueError, match="holds a GaussianVAE, expected a VQVAE"):
        VQVAE.from_pretrained(tmp_path / "gaussian")
    path = tmp_path / "gaussian" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantizer": {"class": "FSQ"}}))
    with pytest.raises(ValueError, match="GaussianVAE has no quantizer"):
        Autoencoder.from_pretrained(tmp_path / "gaussian")


@pytest.mark.parametrize("options", [{"dim": 0}, {"free_bits": -0.1}, {"beta": math.nan}])
def test_bad_options_are_a_sentence(options):
    with pytest.raises(ValueError, match="expected"):
        small(**options)


@pytest.mark.usefixtures("untyped")
def test_bad_latents_and_broken_weights_are_a_sentence():
    model = small()
    for latents, message in (
        (
            torch.zeros(1, 2, 2, 4),
            r"\(b, h, w, 3\), such as \(b, 2, 2, 3\), got torch.float32 \(1, 2, 2, 4\)",
        ),
        (torch.zeros(1, 2, 2, 3, dtype=torch.int64), r"got torch.int64"),
        (torch.full((1, 2, 2, 3), torch.nan), "NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=message):
            model.decode(latents)
    with torch.no_grad():
        model.encoder.layers[-1].bias[0] = torch.nan
    for call in (model, model.draw, model.encode):
        with pytest.raises(ValueError, match="encoder gave NaN or infinity"):
            call(images(2, 1, 8, 8))


def test_priors_of_other_latents_are_refused():
    for prior, got in (
        (NormalPrior(dim=3, grid=(2, 3)), r"dim=3, grid=\(2, 3\)"),
        (UniformPrior(num_codes=3, grid=(2, 2)), r"num_codes=3, grid=\(2, 2\)"),
    ):
        with pytest.raises(ValueError, match=rf"got a prior of {got} for a model of dim=3, grid=\(2, 2\).*latents"):
            sampled_elbo(small(), prior, images(1, 1, 8, 8))


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
    step = 1e-5
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=seeded(2), dtype=torch.float64)
        start = parameter.detach().clone()
        ends = []
        for sign in (1, -1):
            parameter.data = start + sign * step * direction
            ends.append(value().item())
        parameter.data = start
        slope = (parameter.grad * direction).sum().item()
        assert slope != 0, name
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=1e-5, abs=1e-8), name


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
    y = images(2, 1, 8, 8)

    def train(channels: slice) -> None:
        """With the posterior of these channels as the prior."""
        model = small(spread=0.1)
        zero_posterior(model, channels)
        for _ in range(6 * CHECK_EVERY):
            model(y)
            model.update()

    train(slice(1, None))
    with pytest.warns(UserWarning, match=r"0 of 3 latent channels.*free_bits.*beta") as caught:
        train(slice(None))
    assert len(caught) == 1


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
    out = model.draw(images(1, 1, 8, 8).expand(5000, 1, 8, 8), seeded(0))
    estimates = out.log_posterior - NormalPrior(dim=model.dim, grid=model.grid).double().log_prob(out.latents)
    error = estimates.std() / 5000**0.5
    assert abs(estimates.mean() - out.kl[0]) <= 4 * error
    assert error < 0.05 * out.kl[0]
