"""The likelihood's own parameters, fitted to a decoder that was trained for the eye."""

import json
import math

import pytest
import torch
from run_files import gaussian, stopped, weights, without

from vqvae import VQVAE, Autoencoder, GaussianVAE, load_images
from vqvae.fingerprint import of_tokenizer
from vqvae.likelihoods import Categorical, LocalContext, LogisticMixture, Normal
from vqvae.quantizers import FSQ
from vqvae.training import refit
from vqvae.training.refit import with_fitted_likelihood

NORMAL = ["--likelihood", "Normal", "--looks.l1", "1"]
SAYS = "likelihood: fitted to the finished decoder on"


@pytest.fixture
def looking(options):
    """The small run with a `Normal`, for the eye too."""
    return [*without("--model.likelihood.", options), *NORMAL]


@pytest.fixture(scope="module")
def images():
    return load_images("fashion-mini", "train", size=8)[:96], load_images("fashion-mini", "train", size=8)


def model_with(likelihood, **options):
    torch.manual_seed(0)
    options = {"image_size": 8, "width": 8, "num_blocks": 1, "quantizer": FSQ.Config(levels=(3, 3)), **options}
    return VQVAE(**options, likelihood=likelihood).eval()


def fitted(model, images, **options):
    return with_fitted_likelihood(model, images, seed=1, skip=lambda skipped: None, **options)


def distortion(model, images):
    with torch.no_grad():
        return model(images).distortion.sum().item()


@pytest.mark.parametrize("start", [0.05, 3.0, 25.5, 128.0])
def test_a_scale_becomes_the_most_likely_wherever_it_starts(images, start):
    _, train = images
    model = model_with(Normal.Config())
    with torch.no_grad():
        model.likelihood.log_scale.fill_(math.log(start))
    found = fitted(model, train)
    sample = torch.cat([levels for levels, _ in refit._features(model, train, 1, lambda skipped: None)])
    assert len(sample) == found.likelihood_fit.images
    costs = []
    trial = model_with(Normal.Config())
    trial.load_state_dict(model.state_dict())
    for log_scale in torch.linspace(math.log(0.1), math.log(128), 400):
        trial.likelihood.log_scale.data.fill_(log_scale)
        costs.append(distortion(trial, sample))
    bits = 1 / (math.log(2) * model.num_dims * len(sample))
    assert found.likelihood_fit.after == pytest.approx(distortion(found, sample) * bits, rel=1e-6)
    assert found.likelihood_fit.before == pytest.approx(distortion(model, sample) * bits, rel=1e-6)
    assert found.likelihood_fit.after <= min(costs) * bits + 1e-5
    assert found.likelihood_fit.after == pytest.approx(min(costs) * bits, abs=1e-3)


@pytest.mark.parametrize("kind", ["normal", "context", "gaussian"])
def test_all_else_stays_to_the_bit_and_twice_is_the_same(images, kind, monkeypatch):
    some, train = images
    monkeypatch.setattr(refit, "NUM_IMAGES", 64)
    likelihood = Normal.Config() if kind == "normal" else LocalContext.Config(width=8, num_blocks=1, num_components=2)
    if kind == "gaussian":
        torch.manual_seed(0)
        model = GaussianVAE(image_size=8, width=8, num_blocks=1, dim=2, likelihood=Normal.Config()).eval()
    else:
        model = model_with(likelihood)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    found, again = fitted(model, train), fitted(model, train)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.fingerprint() == again.fingerprint() != model.fingerprint()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, before[name]) or name.startswith("likelihood."), name
    assert of_tokenizer(found) == of_tokenizer(model) or kind == "gaussian"
    latents = model.encode(some.images)
    assert torch.equal(found.encode(some.images), latents)
    assert torch.equal(found.decode(latents), model.decode(latents))
    assert found.likelihood_fit.images == 64
    assert found.likelihood_fit.after < found.likelihood_fit.before
    assert {each.requires_grad for each in found.parameters()} == {True}


@pytest.mark.parametrize("likelihood", [Categorical.Config(), LogisticMixture.Config(), Normal.Config(scale=9.0)])
def test_a_likelihood_without_parameters_is_left_and_nothing_is_claimed(images, likelihood):
    model = model_with(likelihood)
    assert fitted(model, images[1]) is model
    assert model.likelihood_fit is None


def test_what_costs_more_is_not_taken(images, monkeypatch):
    class Worse(torch.optim.SGD):
        def step(self, closure):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.fill_(0.0)

    monkeypatch.setattr(torch.optim, "LBFGS", lambda parameters, **options: Worse(parameters))
    model = model_with(Normal.Config())
    found = fitted(model, images[1])
    assert torch.equal(found.likelihood.log_scale, model.likelihood.log_scale)
    assert found.likelihood_fit.after == found.likelihood_fit.before


def faked_rounds(monkeypatch, *values):
    """Rounds of the optimiser that end at these values of every parameter, one after the other."""
    left = list(values)

    class Faked(torch.optim.SGD):
        def step(self, closure):
            value = left.pop(0)
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.fill_(value)

    monkeypatch.setattr(torch.optim, "LBFGS", lambda parameters, **options: Faked(parameters))


@pytest.mark.parametrize("then", [math.nan, 1.0, 3.0])
def test_the_best_round_is_taken_whatever_follows_it(images, monkeypatch, then):
    model = model_with(Normal.Config())
    with torch.no_grad():
        model.likelihood.log_scale.fill_(-2.0)
    faked_rounds(monkeypatch, 4.1, then)
    found = fitted(model, images[1])
    assert found.likelihood.log_scale.item() == pytest.approx(4.1)
    assert found.likelihood_fit.after < found.likelihood_fit.before


def test_a_scale_stays_within_its_bounds(images):
    model = model_with(Normal.Config())
    with torch.no_grad():  # so far off that the widest scale is the best
        next(reversed(list(model.decoder.parameters()))).fill_(40.0)
    found = fitted(model, images[1])
    assert found.likelihood.log_scale.item() <= math.log(128) + 1e-6
    assert found.likelihood_fit.after < found.likelihood_fit.before


def test_nothing_is_claimed_of_what_is_not_finite(images, tmp_path):
    model = model_with(Normal.Config())
    with torch.no_grad():
        model.likelihood.log_scale.fill_(math.nan)
    found = fitted(model, images[1])
    assert found.likelihood_fit is None
    found.save_pretrained(tmp_path / "model")
    assert "likelihood_fit" not in json.loads((tmp_path / "model" / "config.json").read_text())


def test_other_weights_have_no_note(images, tmp_path):
    found = fitted(model_with(Normal.Config()), images[1])
    for part in (found.decoder, found.likelihood):
        weight = next(part.parameters())
        before = weight.detach().clone()
        with torch.no_grad():
            weight.add_(1)
        assert found.likelihood_fit is None
        found.save_pretrained(tmp_path / "changed")
        assert "likelihood_fit" not in json.loads((tmp_path / "changed" / "config.json").read_text())
        with torch.no_grad():
            weight.copy_(before)
        assert found.likelihood_fit is not None
    next(found.encoder.parameters()).data.add_(1)  # which has no part in it
    assert found.likelihood_fit is not None


def test_memory_is_bounded(images, monkeypatch):
    monkeypatch.setattr(refit, "MOST_BYTES", 20_000)  # an image of 8x8 and its features have 320 bytes
    assert fitted(model_with(Normal.Config()), images[1]).likelihood_fit.images == 64


def test_the_note_is_saved_and_only_what_is_one_is_read(images, tmp_path):
    found = fitted(model_with(Normal.Config()), images[1])
    found.save_pretrained(tmp_path / "model")
    read = Autoencoder.from_pretrained(tmp_path / "model")
    assert read.likelihood_fit == found.likelihood_fit
    assert read.config == found.config
    path = tmp_path / "model" / "config.json"
    plain = json.loads(path.read_text())
    good = plain["likelihood_fit"]
    for wrong in (3, [], {}, {**good, "more": 1}, {**good, "images": 0}, {**good, "after": "x"}, {**good, "of": "g"}):
        path.write_text(json.dumps({**plain, "likelihood_fit": wrong}))
        with pytest.raises(ValueError, match="got likelihood_fit"):
            Autoencoder.from_pretrained(tmp_path / "model")


def test_a_run_says_so_and_its_codebook_stays_however_it_is_gone_on_with(run, looking, tmp_path, capsys, monkeypatch):
    run(*looking)
    folder = tmp_path / "run"
    said = capsys.readouterr()
    (line,) = [line for line in said.err.splitlines() if line.startswith("likelihood: ")]
    assert line.startswith(SAYS)
    assert line in said.out  # the table
    model = VQVAE.from_pretrained(folder)
    fit = model.likelihood_fit
    held = torch.load(folder / "state" / "codebook.ckpt", weights_only=True)["module"]
    assert fit.after < fit.before
    assert not torch.equal(held["model.likelihood.log_scale"], model.likelihood.log_scale)

    def noted(path):
        return json.loads(path.read_text())["likelihood_fit"]

    expected = {"images": fit.images, "before": fit.before, "after": fit.after}
    assert noted(folder / "elbo.json") == expected
    before = weights(folder)
    for words in (["--resume"], ["--stage", "evaluate"], ["--stage", "codebook", "--resume"]):
        (folder / "elbo.json").unlink(missing_ok=True)
        run(*words, "--run", folder)
        assert weights(folder) == before
        said = capsys.readouterr()
        assert SAYS not in said.err
        if "codebook" not in words:
            assert noted(folder / "elbo.json") == expected
            assert line in said.out
    run("evaluate", folder, "--output", tmp_path / "figures.json")
    assert noted(tmp_path / "figures.json") == expected
    assert line in capsys.readouterr().out
    # Where the codebook is lost, what a checkpoint gives is the same.
    (folder / "codebook" / "model.safetensors").rename(tmp_path / "kept")
    (folder / "codebook" / "config.json").unlink()
    (folder / "codebook").rmdir()
    run("--resume", "--stage", "codebook", "--run", folder)
    assert (folder / "codebook" / "model.safetensors").read_bytes() == (tmp_path / "kept").read_bytes()
    # Stopped and resumed.
    stopped(run, monkeypatch, tmp_path / "cut", [*looking, "--run", str(tmp_path / "cut")], codebook=(3,))
    run("--resume", "--run", tmp_path / "cut")
    assert weights(tmp_path / "cut") == before


@pytest.mark.parametrize("extra", [["--codebook-fit.ema", "0.9"], ["--precision", "bf16-true"]])
def test_it_is_fitted_to_the_weights_that_are_kept(run, looking, tmp_path, extra):
    looking = without("--precision", looking) if "--precision" in extra else looking
    run(*looking, "--stage", "codebook", *extra)
    found = VQVAE.from_pretrained(tmp_path / "run")
    held = torch.load(tmp_path / "run" / "state" / "codebook.ckpt", weights_only=True)
    kept, start = (held["average"], "module.model.") if "ema" in extra[0] else (held["module"], "model.")
    for name, tensor in found.state_dict().items():
        same = torch.equal(tensor, kept[start + name].to(tensor.dtype))
        assert same != name.startswith("likelihood."), name
    assert found.likelihood_fit.after < found.likelihood_fit.before


def test_a_run_without_terms_for_the_eye_is_what_it_was(run, looking, tmp_path, capsys):
    run(*looking[:-2], "--stage", "codebook")
    found = VQVAE.from_pretrained(tmp_path / "run")
    held = torch.load(tmp_path / "run" / "state" / "codebook.ckpt", weights_only=True)["module"]
    assert all(torch.equal(tensor, held[f"model.{name}"]) for name, tensor in found.state_dict().items())
    assert found.likelihood_fit is None
    assert "likelihood" not in capsys.readouterr().err
    run("--resume", "--run", tmp_path / "run")
    assert "likelihood_fit" not in json.loads((tmp_path / "run" / "elbo.json").read_text())


def test_a_finished_codebook_stays_whatever_is_asked_for(run, looking, fails, tmp_path, capsys):
    """One of before there was a fit, too; and terms that would train nothing are refused."""
    folder = tmp_path / "run"
    run(*looking, "--stage", "codebook")
    model = VQVAE.from_pretrained(folder)
    held = torch.load(folder / "state" / "codebook.ckpt", weights_only=True)["module"]
    model.load_state_dict({name.removeprefix("model."): each for name, each in held.items() if "model." in name})
    model.save_pretrained(folder / "codebook")
    before = {path: path.read_bytes() for path in sorted((folder / "codebook").iterdir())}
    capsys.readouterr()
    run("--resume", "--stage", "codebook", "--run", folder)
    assert SAYS not in capsys.readouterr().err
    for words in (["--looks.l1", "5"], ["--looks.l1", "0"]):
        assert "is finished" in fails("--resume", "--stage", "codebook", "--run", folder, *words)
    assert {path: path.read_bytes() for path in sorted((folder / "codebook").iterdir())} == before


def test_a_codebook_that_is_taken_as_it_is_has_its_note(run, looking, tmp_path):
    run(*looking, "--stage", "codebook", "--run", tmp_path / "taken")
    run(*looking[:-2], "--stage", "prior", "--tokenizer", tmp_path / "taken")
    fits = [VQVAE.from_pretrained(tmp_path / name).likelihood_fit for name in ("taken", "run")]
    assert fits[0] == fits[1] is not None


def test_a_codebook_with_other_codes_has_no_note_of_the_one_whose_weights_it_has(run, looking, tmp_path):
    """The levels of FSQ have no weights: those of the decoder are the same, and what it decodes is not."""
    common = ["--quantizer", "FSQ", *without("--model.quantizer.", looking)]
    levels = "--model.quantizer.levels"
    run(*common, levels, "3", "3", "--stage", "codebook", "--run", tmp_path / "taken")
    run(*common[:-2], levels, "5", "5", "--stage", "prior", "--tokenizer", tmp_path / "taken")
    taken, found = (VQVAE.from_pretrained(tmp_path / name) for name in ("taken", "run"))
    assert taken.decoding_digest() == found.decoding_digest()
    assert taken.likelihood_fit is not None
    assert found.likelihood_fit is None


def test_the_prior_of_a_gaussian_run_is_not_called_stale(run, looking, tmp_path, capsys):
    """Whose fingerprint covers the likelihood."""
    run(*gaussian(looking))
    capsys.readouterr()
    run("--resume", "--stage", "codebook", "--run", tmp_path / "run")
    assert "another tokenizer" not in capsys.readouterr().err


def test_a_decoder_alone_keeps_codes_and_fingerprint(run, looking, tmp_path):
    run(*looking[:-2], "--stage", "codebook", "--run", tmp_path / "truth")
    run(*looking, "--stage", "codebook", "--tokenizer", tmp_path / "truth", "--train", "decoder")
    truth, looks = (VQVAE.from_pretrained(tmp_path / name) for name in ("truth", "run"))
    assert looks.likelihood_fit is not None
    assert of_tokenizer(truth) == of_tokenizer(looks)
    levels = torch.randint(256, (20, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(truth.encode(levels), looks.encode(levels))
