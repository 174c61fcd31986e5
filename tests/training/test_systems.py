"""Real latents, and a prior in the loop: runs of each, from train.py."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from PIL import Image
from run_files import gaussian, stopped, weights, without

import safefolder
from priors import ContinuousPrior, TransformerPrior
from vqvae import ELBO, VQVAE, GaussianVAE
from vqvae.data import batches, load_images
from vqvae.model import PriorGuidedEncoder
from vqvae.quantizers import EMAVectorQuantizer, GumbelQuantizer, Quantizer, VectorQuantizer
from vqvae.training import latents, objectives
from vqvae.training.latents import encode_all, step_seed
from vqvae.training.objectives import CodebookObjective, RateAwareObjective
from vqvae.training.options import load_run
from vqvae.training.records import Metrics


def resumed(run, monkeypatch: pytest.MonkeyPatch, folder: Path, args: list[str]) -> Path:
    """Do a run again that is stopped and resumed; where the whole one is now, which has the same weights and figures.

    A signal stops it after steps 3 and 5 of the codebook and 2 of the prior.
    """
    whole = folder.rename(folder.with_name("whole"))
    stopped(run, monkeypatch, folder, args, codebook=(3, 5), prior=(2,))
    run("--resume", "--run", folder)
    assert weights(folder) == weights(whole)
    assert figures(folder) == figures(whole)
    return whole


def figures(folder: Path) -> dict:
    result = json.loads((folder / "elbo.json").read_text())
    result.pop("seconds")
    return result


def test_a_gaussian_run_holds_its_bound_and_repeats_itself_when_resumed(run, options, tmp_path, capsys, monkeypatch):
    args = gaussian(options)
    run(*args)
    folder = tmp_path / "run"
    table = capsys.readouterr().out
    for line in ("normal prior", "transformer prior", "posterior entropy", "draws together", "active channels"):
        assert line in table
    for line in ("most probable", "perplexity"):
        assert line not in table
    result = figures(folder)
    rate, entropy = result["rate"], result["entropy"]
    assert list(rate) == ["normal", "transformer"]
    assert result["perplexity"] is None
    assert "deterministic" not in result
    assert result["draws"] > 1
    assert result["rate_error"] > 0
    assert math.isfinite(result["importance_weighted"])
    assert result["negative_elbo"] == pytest.approx(rate["transformer"] + result["distortion"] - entropy)
    assert result["bits_per_dim"] == pytest.approx(result["negative_elbo"] / 64 / math.log(2))
    assert len(result["kl_by_channel"]) == 3
    # On draws, cross entropy under N(0, I) less entropy is the KL up to the draws' error.
    assert rate["normal"] - entropy == pytest.approx(result["kl"], abs=1.0)
    for name in ("unigram", "state/loop"):
        assert not (folder / name).exists()
    for picture in ("reconstructions.png", "samples.png", "usage.png"):
        with Image.open(folder / picture) as opened:
            opened.verify()
    model, prior = GaussianVAE.from_pretrained(folder / "codebook"), ContinuousPrior.from_pretrained(folder / "prior")
    assert (prior.dim, prior.grid, prior.num_classes) == (model.dim, model.grid, 2)
    assert prior.scale.std() > 0, "standardised to the latents"
    assert load_run(folder).latents == "gaussian"
    resumed(run, monkeypatch, folder, args)


@pytest.mark.parametrize(
    ("kind", "schedule"),
    [
        ("GumbelQuantizer", "alternating"),
        pytest.param("EMAVectorQuantizer", "joint", marks=pytest.mark.slow),
        pytest.param("StochasticVectorQuantizer", "alternating", marks=pytest.mark.slow),
    ],
)
def test_a_run_with_a_prior_in_the_loop(run, options, tmp_path, monkeypatch, kind, schedule):
    monkeypatch.setattr(objectives, "TURN", 2)
    args = [*without("--model.quantizer.", options), "--quantizer", kind, "--model.beta", "1", "--schedule", schedule]
    args += ["--model.quantizer.num-codes", "8", "--model.quantizer.dim", "4"]
    run(*args)
    folder = tmp_path / "run"
    result = figures(folder)
    assert list(result["rate"]) == ["uniform", "unigram", "ngram", "transformer"]
    assert result["draws"] > 1
    assert result["entropy"] > 0
    rate = result["rate"]["transformer"]
    assert result["negative_elbo"] == pytest.approx(rate + result["distortion"] - result["entropy"])
    assert result["deterministic"]["entropy"] == 0
    model = VQVAE.from_pretrained(folder / "codebook")
    assert model.config.beta == 1
    in_loop, prior = (TransformerPrior.from_pretrained(folder / name) for name in ("state/loop", "prior"))
    assert in_loop.config == prior.config
    assert any(not torch.equal(a, b) for a, b in zip(in_loop.parameters(), prior.parameters(), strict=True))
    known = load_run(folder)
    assert (known.schedule, known.model) == (schedule, model.config)

    whole = resumed(run, monkeypatch, folder, args)
    assert weights(folder / "state") == weights(whole / "state")


def test_later_stages_go_on_with_the_prior_in_the_loop(run, options, photos, tmp_path, monkeypatch):
    run(*options, "--model.beta", "0.5", "--stage", "codebook")
    folder = tmp_path / "run"
    before = safefolder.load(folder / "state" / "loop")[1]
    run("--run", str(folder), "--stage", "prior", "--prior-fit.num-steps", "1", "--prior-fit.learning-rate", "1e-9")
    after = safefolder.load(folder / "prior")[1]
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)
    loud = TransformerPrior.from_pretrained(folder / "prior")
    with torch.no_grad():
        for weight in loud.parameters():
            weight.mul_(60)  # so far from uniform that codes change
    loud.save_pretrained(folder / "prior")
    shown, decode = [], VQVAE.decode
    monkeypatch.setattr(VQVAE, "decode", lambda model, codes: shown.append(codes) or decode(model, codes))
    run("--run", str(folder), "--stage", "evaluate")
    assert (folder / "elbo.json").exists()
    model, prior = VQVAE.from_pretrained(folder / "codebook"), TransformerPrior.from_pretrained(folder / "prior")
    first = next(batches(load_images(str(photos), "test", size=8, channels=1), 32))
    codes = model.through(prior, first.labels).encode(first.images)
    assert not torch.equal(codes, model.encode(first.images))
    assert any(torch.equal(each, codes) for each in shown), "the picture shows what the prior has a say in"


# --- the objective with a prior in the loop ---------------------------------------------------------------------------


def make_objective(schedule, quantizer: Quantizer.Config | None = None, beta=2.0, num_steps=20) -> RateAwareObjective:
    torch.manual_seed(0)
    quantizer = quantizer or EMAVectorQuantizer.Config(num_codes=8, dim=4)
    model = VQVAE(image_size=8, width=8, num_blocks=0, quantizer=quantizer, beta=beta)
    sizes = {"width": 16, "depth": 1, "num_heads": 2, "num_classes": 2}
    prior = TransformerPrior(num_codes=model.num_codes, grid=model.grid, **sizes)
    return RateAwareObjective(model, prior, schedule, num_steps)


IMAGES = torch.randint(0, 256, (6, 1, 8, 8), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
LABELS = torch.arange(6) % 2
GUMBEL = GumbelQuantizer.Config(num_codes=8, dim=4)


def moved(module: torch.nn.Module, before: torch.nn.Module) -> list[bool]:
    return [not torch.equal(a, b) for a, b in zip(module.parameters(), before.parameters(), strict=True)]


@pytest.fixture
def shares(monkeypatch) -> None:
    """Of 20 steps the prior joins in after 5, and its weight is whole 4 steps later; turns are of two steps."""
    monkeypatch.setattr(objectives, "START", 0.25)
    monkeypatch.setattr(objectives, "RAMP", 0.2)
    monkeypatch.setattr(objectives, "TURN", 2)


@pytest.mark.usefixtures("shares")
@pytest.mark.parametrize("quantizer", [None, GUMBEL], ids=["ema", "gumbel"])
@pytest.mark.parametrize("schedule", ["joint", "alternating"])
def test_whose_turn_it_is_not_stays_to_the_bit(schedule, quantizer):
    """And every weight has a gradient at every step, as DistributedDataParallel wants it, until `rest` takes it."""
    objective = make_objective(schedule, quantizer)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(13):
        before = copy.deepcopy(objective)
        objective(IMAGES, LABELS)["objective"].backward()
        assert all(parameter.grad is not None for parameter in objective.parameters())
        objective.rest()
        optimizer.step()
        optimizer.zero_grad()
        turns = {"model": moved(objective.model, before.model), "prior": moved(objective.prior, before.prior)}
        objective.update()
        if step < 5:
            acting = ["model"]
        elif schedule == "joint":
            acting = ["model", "prior"]
        else:  # a prior that knows nothing yet goes first
            acting = ["prior"] if (step - 5) % 4 < 2 else ["model"]
        for name, changes in turns.items():
            assert all(changes) if name in acting else not any(changes), (step, name)


@pytest.mark.usefixtures("shares")
def test_the_prior_joins_in_and_its_weight_grows(monkeypatch):
    objective, plain = make_objective("joint", beta=2.0), CodebookObjective(make_objective("joint").model)
    betas, loop = [], objective.model.loop
    monkeypatch.setattr(objective.model, "loop", lambda *args: betas.append(args[3]) or loop(*args))
    for step in range(11):
        assert isinstance(objective.encoder(LABELS), PriorGuidedEncoder) == (step >= 5)
        terms = objective(IMAGES, LABELS)
        if step < 5:
            torch.testing.assert_close(terms, plain(IMAGES, LABELS), rtol=0, atol=0)
            plain.update()
        objective.update()
        assert len(betas) == max(0, step - 4)
    assert betas == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    again = make_objective("joint", beta=2.0)
    again.load_state_dict(objective.state_dict())
    assert int(again.num_updates) == 11, "a resumed run goes on where it was"
    assert objective.encoder(LABELS).beta == 2


@pytest.mark.parametrize(
    "quantizer", [None, VectorQuantizer.Config(num_codes=8, dim=4), GUMBEL], ids=["ema", "vq", "gumbel"]
)
def test_the_objective_is_the_bound_in_nats_per_dimension(monkeypatch, quantizer):
    """With a beta of 1, and the quantizer's own terms aside; what beta weighs teaches encoder and prior."""
    monkeypatch.setattr(objectives, "START", 0.0)
    for beta in (1.0, 3.0):
        objective = make_objective("joint", quantizer, beta=beta, num_steps=1)
        torch.manual_seed(4)
        terms = objective(IMAGES, LABELS)
        torch.manual_seed(4)
        out = objective.model(IMAGES, objective.model.loop(objective.prior, LABELS, 6, beta, objectives.NUM_ITERATIONS))
        assert (out.entropy > 0).all()
        expected = {"distortion": out.distortion.mean() / 64, "rate": beta * out.rate.mean() / 64, **out.auxiliary}
        expected["posterior_entropy"] = -beta * out.entropy.mean() / 64
        for name, value in expected.items():
            torch.testing.assert_close(terms[name], value)
        torch.testing.assert_close(terms["objective"], sum(expected.values()))
        if beta == 1:
            bound = ELBO(rate=out.rate, distortion=out.distortion, entropy=out.entropy).negative.mean() / 64
            torch.testing.assert_close(terms["objective"] - sum(out.auxiliary.values()), bound)
        encoder, prior = list(objective.model.encoder.parameters()), list(objective.prior.parameters())
        for name in ("rate", "posterior_entropy"):
            gradients = torch.autograd.grad(terms[name], encoder, retain_graph=True)
            assert all(gradient.any() for gradient in gradients), name
        assert all(gradient.any() for gradient in torch.autograd.grad(terms["rate"], prior))


def test_a_prior_is_trained_on_draws_by_two_iterations(photos, tmp_path, monkeypatch):
    objective = make_objective("joint")
    model, prior = objective.model.eval(), objective.prior.eval()
    with torch.no_grad():
        for weight in prior.parameters():
            weight.mul_(5)  # far from uniform
    images = load_images(str(photos), "train", size=8, channels=1)
    fabric = Fabric(accelerator="cpu", devices=1)
    monkeypatch.setattr(latents, "images_at_once", lambda height, width: 4)
    parts = {"metrics": Metrics(tmp_path, fabric), "model": model, "guiding_prior": prior}
    encoding = latents.Encoding(fabric=fabric, seed=3, **parts)
    found = encode_all(encoding, images, "encode")
    generator = torch.Generator().manual_seed(step_seed(3, "encode", 0, 0) % 2**63)
    drawn, plain = [], []
    for batch in batches(images, 4):
        drawn.append(model.through(prior, batch.labels, 2).encode(batch.images, generator))
        plain.append(model.encode(batch.images))
    assert torch.equal(found.values, torch.cat(drawn).int())
    assert not torch.equal(found.values, torch.cat(plain).int())
    few = encode_all(encoding, images, "encode", limit=6)
    assert len(few.values) == 8, "the limit, up to a whole batch"
    assert torch.equal(few.values, found.values[:8])
    assert torch.equal(few.labels, found.labels[:8])
