"""The kinds of prior that train.py trains, from saved codes or live, on one device or shared out over two."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lanes import some
from lightning_fabric import Fabric
from run_files import SMALL, gaussian, stopped, weights, without
from safetensors.torch import load_file, save_file

import priors
from priors import Prior, trunk
from vqvae import Autoencoder, GaussianVAE, load_images
from vqvae.cli.measuring import evaluate
from vqvae.training import latents, program
from vqvae.training.options import load_run
from vqvae.training.parsing import parse
from vqvae.training.presets import PRESETS
from vqvae.training.prior_kinds import PRIOR_KINDS, name_of
from vqvae.training.records import Metrics

ROOT = Path(__file__).parents[2]
QUANTIZERS = {
    "one": "--model.quantizer.num-codes 8 --model.quantizer.dim 4",
    "residual": "--quantizer ResidualQuantizer/VectorQuantizer --model.quantizer.quantizer.num-codes 8 "
    "--model.quantizer.quantizer.dim 4 --model.quantizer.depth 2",
    "scales": "--quantizer MultiScaleQuantizer/VectorQuantizer --model.quantizer.quantizer.num-codes 8 "
    "--model.quantizer.quantizer.dim 4 --model.quantizer.scales 1 2",
    "stochastic": "--quantizer StochasticVectorQuantizer --model.quantizer.num-codes 8 --model.quantizer.dim 4",
    "loop": "--model.beta 1 --model.quantizer.num-codes 8 --model.quantizer.dim 4",
    "gaussian": "",
}
KINDS = {
    "Transformer": ("residual", "transformer"),
    "AnyOrder": ("one", "any_order"),
    "DepthTransformer": ("residual", "depth_transformer"),
    "NextScale": ("scales", "next_scale"),
    "PixelCNN": ("one", "pixelcnn"),
    "Llama": ("one", "llama"),
}


@pytest.fixture(scope="session")
def codebooks(photos, tmp_path_factory):
    """Runs with a codebook alone, by its kind; each is trained when it is first asked for, and copied."""
    kept: dict[str, Path] = {}

    def copy(kind: str, folder: Path) -> Path:
        if kind not in kept:
            kept[kind] = tmp_path_factory.mktemp(kind) / "run"
            small = gaussian(SMALL) if kind == "gaussian" else without("--model.quantizer.", SMALL)
            small += ["--data.source", str(photos), "--run", str(kept[kind]), "--stage", "codebook"]
            program.train(parse([*small, *QUANTIZERS[kind].split()]))
        shutil.copytree(kept[kind], folder)
        return folder

    return copy


def cut_off(run, monkeypatch: pytest.MonkeyPatch, folder: Path, *args: str) -> None:
    """The prior of a run, stopped after its steps 1 and 3, each time resumed by the same words."""
    words = ["--run", folder, "--stage", "prior"]
    stopped(run, monkeypatch, folder, [*words, *args], prior=(1, 3))
    run(*words, "--resume")


@pytest.mark.parametrize("kind", some(KINDS))
def test_each_kind_trains_resumes_to_the_bit_and_is_evaluated(run, codebooks, tmp_path, monkeypatch, kind):
    quantizer, name = KINDS[kind]
    args = ["--prior-kind", kind, "--prior.code-noise", "0.1"]
    args += ["--prior.width", "16", "--prior.depth", "2"] if kind == "PixelCNN" else ["--prior.checkpointing"]
    whole, cut = (codebooks(quantizer, tmp_path / each) for each in ("whole", "cut"))
    run("--run", whole, "--stage", "prior", *args)
    cut_off(run, monkeypatch, cut, *args)
    assert weights(cut) == weights(whole)
    known, prior = load_run(cut), Prior.from_pretrained(cut / "prior")
    assert (known.prior_kind, known.prior.owner) == (kind, PRIOR_KINDS[kind])
    assert (type(prior).__name__, name_of(prior), prior.num_classes) == (f"{kind}Prior", name, 2)
    assert known.prior.code_noise == prior.config.code_noise == 0.1
    run("--run", cut, "--stage", "evaluate")
    result = json.loads((cut / "elbo.json").read_text())
    assert list(result["rate"]) == ["uniform", "unigram", "ngram", name]
    assert result["negative_elbo"] == pytest.approx(result["rate"][name] + result["distortion"] - result["entropy"])
    by_command(cut, result)


def by_command(folder: Path, result: dict) -> None:
    """`vqvae evaluate` states the same rates by the same names."""
    evaluate(str(folder), output=folder / "again.json")
    again = json.loads((folder / "again.json").read_text())
    assert list(again["rate"]) == list(result["rate"])
    assert again["rate"] == pytest.approx(result["rate"])
    evaluate(str(folder), prior=str(folder / "unigram"), output=folder / "again.json")
    again = json.loads((folder / "again.json").read_text())
    assert list(again["rate"])[-1] == "unigram", "the prior that is named is that of the bound"


# --- saved codes, and live ones ---------------------------------------------------------------------------------------


def test_codes_are_encoded_once_and_anew_where_they_would_be_others(run, codebooks, tmp_path, monkeypatch):
    folder, calls = codebooks("one", tmp_path / "run"), []
    encode = latents.encode
    monkeypatch.setattr(latents, "encode", lambda *args: calls.append(args) or encode(*args))

    def prior(*args: str) -> bool:
        """Whether a prior's training encoded; what it was trained on is always the same."""
        calls.clear()
        (folder / "state" / "prior.ckpt").unlink(missing_ok=True)
        run("--run", folder, "--stage", "prior", "--prior-fit.num-steps", "8", *args)
        return bool(calls)

    assert prior()
    path = folder / "state" / "codes-train.safetensors"
    kept, codes = path.read_bytes(), load_file(path)["values"]
    assert codes.shape == (54, 2, 2)
    baselines = {"unigram": priors.UnigramPrior, "ngram": priors.NGramPrior}  # which count the training codes
    for name, kind in baselines.items():
        found, expected = Prior.from_pretrained(folder / name), kind(num_codes=8, grid=(2, 2)).fit(codes.long())
        torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert not prior("--prior-kind", "AnyOrder", "--prior-fit.batch-size", "4")
    for broken in (b"", kept[:-40], b"no codes", None):
        path.unlink()
        if broken is not None:
            path.write_bytes(broken)
        assert prior()
        assert path.read_bytes() == kept
    others = tmp_path / "others"
    shutil.copytree(parse(["--resume", "--run", str(folder)]).data.source, others)
    assert not prior("--data.source", str(others)), "the same images, elsewhere"
    os.utime(next(others.rglob("*.png")))
    assert prior(), "images that were written again"
    assert prior("--seed", "1"), "other draws, where there are draws"
    weight = folder / "codebook" / "model.safetensors"
    tensors = load_file(weight)
    name = next(name for name in tensors if name.startswith("encoder") and tensors[name].is_floating_point())
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, weight)
    assert prior(), "another codebook"


@pytest.mark.parametrize("kind", some(["one", "loop", "gaussian", "stochastic"], every=4))
def test_a_live_run_resumes_to_the_bit(run, codebooks, tmp_path, monkeypatch, kind):
    whole, cut, saved = (codebooks(kind, tmp_path / each) for each in ("whole", "cut", "saved"))
    run("--run", whole, "--stage", "prior", "--live")
    cut_off(run, monkeypatch, cut, "--live")
    assert weights(cut) == weights(whole)
    assert load_run(cut).live
    assert not (cut / "state" / "codes-train.safetensors").exists()
    run("--run", saved, "--stage", "prior")
    # The same codes in the same order, or draws of its own.
    assert (weights(saved)["prior"] == weights(whole)["prior"]) == (kind == "one")
    run("--run", cut, "--stage", "evaluate")
    assert json.loads((cut / "elbo.json").read_text())["images"] == 6


def test_live_draws_never_repeat_and_depend_on_the_step_alone(codebooks, photos, tmp_path):
    model = Autoencoder.from_pretrained(codebooks("stochastic", tmp_path / "run") / "codebook")
    images = load_images(str(photos), "train", size=8, channels=1)
    fabric = Fabric(accelerator="cpu", devices=1)
    parts = {"metrics": Metrics(tmp_path, fabric), "model": model, "guiding_prior": model}
    encoding = latents.Encoding(fabric=fabric, seed=3, **parts)

    def stream(start: int, rank: int = 0):
        order = {"batch_size": 54 // (rank + 1), "seed": 3, "start": start, "rank": rank, "world_size": rank + 1}
        return latents.live_batches(encoding, images, **order)

    first = [batch for batch, _ in zip(stream(0), range(4), strict=False)]
    assert first[0].inputs.dtype == torch.int64
    assert all(batch.inputs.shape == (54, 2, 2) for batch in first)
    for batch, again in zip(stream(2), first[2:], strict=False):
        assert torch.equal(batch.inputs, again.inputs)
        assert torch.equal(batch.labels, again.labels)
    found = model.draw(images[0][0][None].expand(54, -1, -1, -1)).latents
    assert len(found.unique(dim=0)) > 1, "there is something to draw"
    counts = [batch.inputs.flatten().bincount(minlength=8) for batch in first]
    assert any(not torch.equal(counts[0], each) for each in counts[1:]), "an epoch is drawn anew"


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--prior-kind", "Diffusion"), "unknown prior kind 'Diffusion', expected one of Transformer, AnyOrder"),
        (("--prior-kind", "DepthTransformer"), "is for several codes a position, got a grid of (2, 2) by EMAVector"),
        (("--prior-kind", "NextScale"), "is for codes of several scales, got EMAVectorQuantizer"),
        (("--prior-kind", "PixelCNN", "--quantizer", "ResidualQuantizer"), "expected two axes, rows and columns"),
        (("--prior-kind", "AnyOrder", "--model.beta", "1"), "a prior in the loop (--model.beta) is a transformer"),
        (("--prior-kind", "AnyOrder", "--latents", "gaussian"), "take --prior-kind Transformer only, got AnyOrder"),
        (("--prior.code-noise", "0.1", "--latents", "gaussian"), "code-noise"),
        (("--prior.code-noise", "1"), "code_noise=1.0"),
        (("--strategy", "fsdp"), "--strategy fsdp shares out the weights of a prior, and is for --stage prior alone"),
        (("--strategy", "fsdp_cpu_offload", "--stage", "codebook"), "got --strategy fsdp_cpu_offload"),
        (("--latents", "gaussian", "--quantizer", "FSQ"), "Gaussian latents have no quantizer, got --quantizer FSQ"),
        (("--latents", "spoken"), "unknown latents 'spoken', expected one of codes, gaussian"),
        (("--quantizer", "FSQ", "--model.beta", "1"), "FSQ cannot weigh a prior's rate: take EMAVectorQuantizer"),
        (("--quantizer", "SoftEMVectorQuantizer", "--model.beta", "1"), "a prior has no say: take EMAVectorQuantizer"),
        (("--quantizer", "BSQ", "--model.quantizer.num-bits", "30", "--model.beta", "1"), "cannot list"),
        (("--schedule", "alternating"), "add --model.beta"),
        (("--model.beta", "0"), "expected a finite beta above zero"),
        (("--model.beta", "nan"), "got beta=nan for VQVAE, expected a finite number, or None"),
        (("--latents", "gaussian", "--model.beta", "-1"), "beta of at least zero"),
        (("--latents", "gaussian", "--model.dim", "0"), "at least one latent channel"),
    ],
)
def test_mistakes_are_one_line_before_any_training(fails, photos, tmp_path, args, message):
    small = ["--preset", "folder", "--data.source", str(photos), "--model.image-size", "8", "--model.num-channels", "1"]
    assert message in fails(*small, *args, "--codebook-fit.num-steps", "2", "--run", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_is_one_line_at_a_later_stage(run, fails, codebooks, tmp_path):
    folder = codebooks("loop", tmp_path / "loop")
    assert "is a transformer" in fails("--run", folder, "--stage", "prior", "--prior-kind", "AnyOrder")
    folder = codebooks("one", tmp_path / "run")
    words = ("--run", folder, "--stage", "prior", "--prior-kind")
    assert "is for codes of several scales" in fails(*words, "NextScale")
    assert not (folder / "state" / "prior.ckpt").exists()
    # A prior without labels of images that have them.
    run(*words, "Transformer", "--prior-fit.num-steps", "1", "--no-labels")
    assert Prior.from_pretrained(folder / "prior").num_classes is None
    run("--run", folder, "--stage", "evaluate")
    assert not load_run(folder).labels
    # A checkpoint of another kind.
    assert "already holds a prior; add --resume" in fails(*words, "AnyOrder")
    assert "leave out the options that the run was not begun with" in fails(*words, "AnyOrder", "--resume")


def test_presets_and_kinds_parse_and_keep_what_they_share():
    for preset in PRESETS:
        assert parse(["--preset", preset]).preset == preset
    assert parse([]).prior == priors.TransformerPrior.Config(width=128, depth=3, num_heads=4)
    run = parse(["--prior-kind", "AnyOrder", "--prior.raster-share", "0.5", "--prior.dropout", "0.2"])
    assert run.prior == priors.AnyOrderPrior.Config(width=128, depth=3, num_heads=4, raster_share=0.5, dropout=0.2)
    assert (run.prior_kind, run.live) == ("AnyOrder", False)
    assert parse(["--prior_kind", "PixelCNN"]).prior == priors.PixelCNNPrior.Config()
    run = parse(["--quantizer", "VectorQuantizer", "--model.quantizer.codebook-weight", "2", "--likelihood", "Normal"])
    assert (run.model.quantizer.codebook_weight, run.model.likelihood.owner.__name__) == (2, "Normal")
    run = parse(["--latents", "gaussian", "--model.dim", "6", "--model.free-bits", "0.1", "--preset", "cifar10"])
    sizes = {"image_size": 32, "num_channels": 3, "downsampling": 2, "dim": 6, "free_bits": 0.1}
    assert run.model == GaussianVAE.Config(**sizes, likelihood=run.model.likelihood)
    assert (run.latents, run.quantizer) == ("gaussian", "none")
    run = parse(["--model.beta", "2", "--schedule", "alternating"])
    assert (run.model.beta, run.schedule) == (2, "alternating")


def test_a_run_of_before_options_came_from_classes_is_read(codebooks, tmp_path):
    """As its run.json was until then: kinds beside the options, labels inside them, the class of a config."""
    folder = codebooks("one", tmp_path / "run")
    path = folder / "state" / "run.json"
    known, plain = load_run(folder), json.loads(path.read_text())
    old = {key: value for key, value in plain.items() if key != "labels"}
    sizes = {key: value for key, value in plain["prior"].items() if key != "class"}
    model = {**plain["model"], "class": "VQVAEConfig"}
    parts = {
        name: {k: v for k, v in plain[name].items() if k != "class"} for name in ("data", "prior_fit", "codebook_fit")
    }
    path.write_text(json.dumps({**old, **parts, "model": model, "prior": {**sizes, "labels": False}}))
    assert load_run(folder) == dataclasses.replace(known, labels=False)


# --- activation checkpointing -----------------------------------------------------------------------------------------


GRID = {"num_codes": 8, "grid": (4, 4), "code_noise": 0.2}


@pytest.mark.parametrize(
    ("kind", "sizes", "precision"),
    [
        (priors.MixtureTransformerPrior, {"dim": 3, "grid": (4, 4)}, torch.float32),
        (priors.AnyOrderPrior, GRID, torch.bfloat16),
        (priors.DepthTransformerPrior, {**GRID, "grid": (4, 4, 2)}, torch.float32),
        (priors.NextScalePrior, {**GRID, "grid": (21,), "scales": (1, 2, 4)}, torch.bfloat16),
        (priors.LlamaPrior, GRID, torch.float32),
    ],
)
def test_checkpointing_changes_no_gradient(monkeypatch, kind, sizes, precision):
    calls, found, forward = [], [], trunk.Block.forward
    monkeypatch.setattr(trunk.Block, "forward", lambda *args: calls.append(args) or forward(*args))
    options = {"num_classes": 3, "width": 32, "depth": 3, "num_heads": 2, "dropout": 0.2, "label_dropout": 0.3}
    for checkpointing in (False, True):
        calls.clear()
        torch.manual_seed(0)
        prior = kind(**sizes, **options, checkpointing=checkpointing).train()
        shape = (5, *prior.grid)
        values = torch.randn(*shape, 3) if "dim" in sizes else torch.randint(0, 8, shape)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            rate = -prior(values, torch.arange(5) % 3).mean()
        rate.backward()
        gradients = {name: weight.grad for name, weight in prior.named_parameters()}
        assert all(gradient is not None and gradient.any() for gradient in gradients.values())
        found.append((len(calls), rate.detach(), gradients, torch.rand(3)))
    (num_plain, *plain), (num_again, *again) = found
    assert num_again == 2 * num_plain, "each block was computed again"
    # Also the random numbers after it are the same.
    torch.testing.assert_close(again, plain, rtol=0, atol=0)


# --- weights shared out over processes --------------------------------------------------------------------------------

# train.py, stopped by a signal after the prior's step STOP.
DRIVER = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train
from vqvae.training.records import Stop
if "STOP" in os.environ:
    Stop.requested = lambda self, fabric, step: signal.SIGTERM if step + 1 == int(os.environ["STOP"]) else 0
train.main()
"""


@pytest.mark.slow
def test_a_prior_shared_out_over_two_processes_learns_what_a_whole_one_does(run, codebooks, tmp_path):
    """And resumes to the bit, moving average and all."""
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER.format(root=str(ROOT)))
    common = ["--stage", "prior", "--prior.checkpointing", "--prior.dropout", "0"]
    common += ["--prior.label-dropout", "0", "--prior-fit.ema", "0.5"]
    alone, shared, cut = (codebooks("one", tmp_path / name) for name in ("alone", "shared", "cut"))
    run("--run", alone, *common, "--prior-fit.batch-size", "8")

    def together(folder: Path, *args: str, code: int = 0, **environment: str) -> None:
        words = [sys.executable, str(driver), "--run", str(folder), *args]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300, env={**os.environ, **environment})
        assert done.returncode == code, done.stderr

    fsdp = ["--strategy", "fsdp", "--devices", "2", "--accelerator", "cpu", "--prior-fit.batch-size", "4"]
    together(shared, *common, *fsdp)
    together(cut, *common, *fsdp, code=128 + signal.SIGTERM, STOP="3")
    together(cut, "--stage", "prior", "--resume")
    assert weights(cut) == weights(shared)
    found, expected = (Prior.from_pretrained(folder / "prior").state_dict() for folder in (shared, alone))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    # A checkpoint holds whole tensors.
    state = torch.load(shared / "state" / "prior.ckpt", weights_only=True)
    assert state["module"]["prior.logits.weight"].shape == found["logits.weight"].shape
    together(shared, "--stage", "evaluate", "--devices", "1")
    assert "transformer" in json.loads((shared / "elbo.json").read_text())["rate"]
