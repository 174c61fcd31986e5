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
from run_files import SMALL, gaussian, weights
from safetensors.torch import load_file, save_file

from priors import (
    AnyOrderPrior,
    MixtureTransformerPrior,
    NGramPrior,
    PixelCNNPrior,
    Prior,
    TransformerPrior,
    UnigramPrior,
    trunk,
)
from priors.grid import GridModel
from vqvae import VQVAE, GaussianVAE
from vqvae.quantizers import EMAVectorQuantizer, MultiScaleQuantizer, ResidualQuantizer, VectorQuantizer
from vqvae.training import latents, program
from vqvae.training.options import load_run, parse
from vqvae.training.prior_kinds import PRIOR_KINDS, make_prior, name_of
from vqvae.training.records import Stop

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
            small = [*SMALL, "--data.source", str(photos), "--run", str(kept[kind]), "--stage", "codebook"]
            if kind == "gaussian":
                small = gaussian(small)
            else:
                pairs = zip(small[::2], small[1::2], strict=True)
                small = [word for pair in pairs if not pair[0].startswith("--model.quantizer.") for word in pair]
            program.train(parse([*small, *QUANTIZERS[kind].split()]))
        shutil.copytree(kept[kind], folder)
        return folder

    return copy


def cut_off(run, monkeypatch: pytest.MonkeyPatch, folder: Path, *args: str) -> None:
    """The prior of a run, stopped after its steps 1 and 3, each time resumed by the same words."""
    asked = [0, 2]

    def requested(self, fabric, step):
        return signal.SIGTERM if step in asked and not asked.remove(step) else 0

    with monkeypatch.context() as patch:
        patch.setattr(Stop, "requested", requested)
        for resume in ((), ("--resume",)):
            with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
                run("--run", str(folder), "--stage", "prior", *args, *resume)
        run("--run", str(folder), "--stage", "prior", "--resume")
    assert not asked


@pytest.mark.parametrize("kind", some(KINDS))
def test_each_kind_trains_resumes_to_the_bit_and_is_evaluated(run, codebooks, tmp_path, monkeypatch, kind):
    quantizer, name = KINDS[kind]
    args = ["--prior-kind", kind, "--prior.code-noise", "0.1"]
    args += ["--prior.width", "16", "--prior.depth", "2"] if kind == "PixelCNN" else ["--prior.checkpointing"]
    whole, cut = (codebooks(quantizer, tmp_path / each) for each in ("whole", "cut"))
    run("--run", str(whole), "--stage", "prior", *args)
    cut_off(run, monkeypatch, cut, *args)
    assert weights(cut) == weights(whole)
    known = load_run(cut)
    assert (known.prior_kind, known.prior.owner) == (kind, PRIOR_KINDS[kind])
    assert known.prior.code_noise == 0.1

    prior = Prior.from_pretrained(cut / "prior")
    assert type(prior).__name__ == f"{kind}Prior"
    assert name_of(prior) == name
    assert prior.config.code_noise == 0.1
    assert prior.num_classes == 2
    run("--run", str(cut), "--stage", "evaluate")
    result = json.loads((cut / "elbo.json").read_text())
    assert list(result["rate"]) == ["uniform", "unigram", "ngram", name]
    assert result["negative_elbo"] == pytest.approx(result["rate"][name] + result["distortion"] - result["entropy"])
    by_command(cut, result)


def by_command(folder: Path, result: dict) -> None:
    """`vqvae evaluate` states the same rates by the same names."""
    from vqvae.cli.measuring import evaluate

    evaluate(str(folder), output=folder / "again.json")
    again = json.loads((folder / "again.json").read_text())
    assert list(again["rate"]) == list(result["rate"])
    assert again["rate"] == pytest.approx(result["rate"])
    evaluate(str(folder), prior=str(folder / "unigram"), output=folder / "again.json")
    again = json.loads((folder / "again.json").read_text())
    assert list(again["rate"])[-1] == "unigram", "the prior that is named is that of the bound"


def test_the_baselines_count_the_training_codes(run, codebooks, tmp_path):
    folder = codebooks("one", tmp_path / "run")
    run("--run", str(folder), "--stage", "prior", "--prior-fit.num-steps", "1")
    codes = load_file(folder / "state" / "codes-train.safetensors")["values"]
    assert codes.shape == (54, 2, 2)
    unigram, ngram = (Prior.from_pretrained(folder / name) for name in ("unigram", "ngram"))
    for found, kind in ((unigram, UnigramPrior), (ngram, NGramPrior)):
        expected = kind(num_codes=8, grid=(2, 2)).fit(codes.long())
        torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)


# --- saved codes, and live ones ---------------------------------------------------------------------------------------


def test_codes_are_encoded_once_and_anew_where_they_would_be_others(run, codebooks, tmp_path, monkeypatch):
    folder, calls = codebooks("one", tmp_path / "run"), []
    encode = latents.encode
    monkeypatch.setattr(latents, "encode", lambda *args: calls.append(args) or encode(*args))

    def prior(*args: str) -> bool:
        """Whether a prior's training encoded; what it was trained on is always the same."""
        calls.clear()
        (folder / "state" / "prior.ckpt").unlink(missing_ok=True)
        run("--run", str(folder), "--stage", "prior", "--prior-fit.num-steps", "1", *args)
        return bool(calls)

    assert prior()
    trained = weights(folder)["prior"]
    path = folder / "state" / "codes-train.safetensors"
    kept = path.read_bytes()
    assert not prior()
    assert not prior("--prior-kind", "AnyOrder", "--prior-fit.batch-size", "4")
    assert not prior("--prior-kind", "Transformer", "--prior-fit.batch-size", "8")
    assert weights(folder)["prior"] == trained
    for broken in (b"", kept[:-40], b"no codes"):
        path.write_bytes(broken)
        assert prior()
        assert path.read_bytes() == kept
    path.unlink()
    assert prior()
    shutil.copytree(parse(["--resume", "--run", str(folder)]).data.source, tmp_path / "others")
    assert not prior("--data.source", str(tmp_path / "others")), "the same images, elsewhere"
    os.utime(next((tmp_path / "others").rglob("*.png")))
    assert prior(), "images that were written again"
    assert not prior()
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
    run("--run", str(whole), "--stage", "prior", "--live")
    cut_off(run, monkeypatch, cut, "--live")
    assert weights(cut) == weights(whole)
    assert load_run(cut).live
    assert not (cut / "state" / "codes-train.safetensors").exists()
    run("--run", str(saved), "--stage", "prior")
    if kind == "one":
        assert weights(saved) == weights(whole), "the same codes in the same order"
    else:
        assert weights(saved)["prior"] != weights(whole)["prior"], "draws of its own"
    run("--run", str(cut), "--stage", "evaluate")
    assert json.loads((cut / "elbo.json").read_text())["images"] == 6


def test_live_draws_never_repeat_and_depend_on_the_step_alone(codebooks, photos, tmp_path):
    from vqvae import Autoencoder, load_images

    model = Autoencoder.from_pretrained(codebooks("stochastic", tmp_path / "run") / "codebook")
    images = load_images(str(photos), "train", size=8, channels=1)
    fabric = Fabric(accelerator="cpu", devices=1)

    def stream(start: int, rank: int = 0):
        order = {"batch_size": 54 // (rank + 1), "seed": 3, "start": start, "rank": rank, "world_size": rank + 1}
        return latents.live_batches(fabric, model, model, images, **order)

    first = [batch for batch, _ in zip(stream(0), range(4), strict=False)]
    assert first[0].inputs.dtype == torch.int64
    assert all(batch.inputs.shape == (54, 2, 2) for batch in first)
    for batch, again in zip(stream(2), first[2:], strict=False):
        assert torch.equal(batch.inputs, again.inputs)
        assert torch.equal(batch.labels, again.labels)
    found = model.draw(images[0][0][None].expand(54, -1, -1, -1)).latents
    assert len(found.unique(dim=0)) > 1, "there is something to draw"
    torch.manual_seed(0)
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
        (("--prior.code-noise", "1"), "got code_noise=1.0, expected a number in [0, 1)"),
        (("--prior-kind", "AnyOrder", "--prior.raster-share", "2"), "raster_share"),
        (("--prior.num-heads", "5"), "num_heads=5"),
        (("--strategy", "fsdp"), "--strategy fsdp shares out the weights of a prior, and is for --stage prior alone"),
        (("--strategy", "fsdp_cpu_offload", "--stage", "codebook"), "got --strategy fsdp_cpu_offload"),
    ],
)
def test_mistakes_are_one_line_before_any_training(fails, photos, tmp_path, args, message):
    small = ["--preset", "folder", "--data.source", str(photos), "--model.image-size", "8", "--model.num-channels", "1"]
    assert message in fails(*small, *args, "--codebook-fit.num-steps", "2", "--run", str(tmp_path / "run"))
    assert not list((tmp_path / "run").glob("**/*.ckpt"))


def test_a_kind_for_other_codes_is_one_line_at_a_later_stage(fails, codebooks, tmp_path):
    folder = codebooks("loop", tmp_path / "run")
    args = ("--run", str(folder), "--stage", "prior", "--prior-kind", "AnyOrder")
    assert "a prior in the loop (--model.beta) is a transformer" in fails(*args)
    folder = codebooks("one", tmp_path / "other")
    args = ("--run", str(folder), "--stage", "prior", "--prior-kind", "NextScale")
    assert "is for codes of several scales" in fails(*args)
    assert not (folder / "state" / "prior.ckpt").exists()


def test_a_checkpoint_of_another_kind_is_one_line(run, fails, codebooks, tmp_path):
    folder = codebooks("one", tmp_path / "run")
    run("--run", str(folder), "--stage", "prior", "--prior-fit.num-steps", "1")
    args = ("--run", str(folder), "--stage", "prior", "--prior-kind", "AnyOrder")
    assert "already holds a prior; add --resume" in fails(*args)
    assert "leave out the options that the run was not begun with" in fails(*args, "--resume")


def test_a_prior_without_labels_of_images_that_have_them(run, codebooks, tmp_path):
    folder = codebooks("one", tmp_path / "run")
    run("--run", str(folder), "--stage", "prior", "--no-labels", "--prior-fit.num-steps", "1")
    assert Prior.from_pretrained(folder / "prior").num_classes is None
    run("--run", str(folder), "--stage", "evaluate")
    assert not load_run(folder).labels


def test_kinds_keep_what_they_share():
    run = parse(["--prior-kind", "AnyOrder", "--prior.raster-share", "0.5", "--prior.dropout", "0.2"])
    assert run.prior == AnyOrderPrior.Config(width=128, depth=3, num_heads=4, raster_share=0.5, dropout=0.2)
    assert (run.prior_kind, run.live) == ("AnyOrder", False)
    assert parse(["--prior_kind", "PixelCNN"]).prior == PixelCNNPrior.Config()
    assert parse([]).prior == TransformerPrior.Config(width=128, depth=3, num_heads=4)
    assert parse([]).prior_kind == "Transformer"


def test_a_damaged_run_is_refused_in_one_line(codebooks, tmp_path):
    folder = codebooks("one", tmp_path / "run")
    path = folder / "state" / "run.json"
    plain = json.loads(path.read_text())
    for name in ("prior_kind", "model", "prior"):
        path.write_text(json.dumps({key: value for key, value in plain.items() if key != name}))
        with pytest.raises(ValueError, match=f"is not a run of this version: '{name}'"):
            load_run(folder)


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


def small_model(kind: str) -> VQVAE | GaussianVAE:
    sizes = {"image_size": 16, "width": 8, "num_blocks": 0, "downsampling": 4}
    inner = VectorQuantizer.Config(num_codes=8, dim=4)
    if kind == "gaussian":
        return GaussianVAE(dim=3, **sizes)
    quantizer = {
        "one": EMAVectorQuantizer.Config(num_codes=8, dim=4),
        "residual": ResidualQuantizer.Config(quantizer=inner, depth=2),
        "scales": MultiScaleQuantizer.Config(quantizer=inner, scales=(1, 2, 4)),
    }[kind]
    return VQVAE(quantizer=quantizer, **sizes)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "latent"),
    [
        ("Transformer", "one"),
        ("Transformer", "gaussian"),
        ("AnyOrder", "one"),
        ("DepthTransformer", "residual"),
        ("NextScale", "scales"),
        ("Llama", "one"),
    ],
)
def test_checkpointing_changes_no_gradient(monkeypatch, kind, latent, precision):
    model, calls = small_model(latent), []
    made = MixtureTransformerPrior if latent == "gaussian" else PRIOR_KINDS[kind]
    noise = {} if latent == "gaussian" else {"code_noise": 0.2}
    config = made.Config(width=32, depth=3, num_heads=2, dropout=0.2, label_dropout=0.3, **noise)
    forward = trunk.Block.forward
    monkeypatch.setattr(trunk.Block, "forward", lambda *args: calls.append(args) or forward(*args))
    found = {}
    for checkpointing in (False, True):
        torch.manual_seed(0)
        prior = make_prior(dataclasses.replace(config, checkpointing=checkpointing), model, 3).train()
        assert isinstance(prior, GridModel)
        shape = (5, *prior.grid)
        values = torch.randn(*shape, 3) if latent == "gaussian" else torch.randint(0, 8, shape)
        calls.clear()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            rate = -prior(values, torch.arange(5) % 3).mean()
        rate.backward()
        gradients = {name: weight.grad for name, weight in prior.named_parameters()}
        found[checkpointing] = (rate.detach(), gradients, len(calls), torch.rand(3))
    plain, checkpointed = found[False], found[True]
    assert all(gradient is not None and gradient.any() for gradient in plain[1].values())
    torch.testing.assert_close(checkpointed[:2], plain[:2], rtol=0, atol=0)
    assert checkpointed[2] == 2 * plain[2], "each block was computed again"
    assert torch.equal(checkpointed[3], plain[3]), "the random numbers after it are the same"


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
    common += ["--prior.label-dropout", "0", "--prior-fit.ema", "0.5", "--prior.depth", "2"]
    alone, shared, cut = (codebooks("one", tmp_path / name) for name in ("alone", "shared", "cut"))
    run("--run", str(alone), *common, "--prior-fit.batch-size", "8")

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
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    # A checkpoint holds whole tensors.
    state = torch.load(shared / "state" / "prior.ckpt", weights_only=True)
    assert state["module"]["prior.logits.weight"].shape == found["logits.weight"].shape
    together(shared, "--stage", "evaluate", "--devices", "1")
    assert "transformer" in json.loads((shared / "elbo.json").read_text())["rate"]
