"""Runs that begin with what another run, or another library, has made; and runs that another program launches."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import threads_left
import torch
from run_files import SMALL, weights

from priors import Prior
from vqvae import VQGAN, VQVAE, load_images
from vqvae.quantizers import GumbelQuantizer, VectorQuantizer
from vqvae.tokens import CodeDataset, Tokenizing, tokenize
from vqvae.training.records import Stop

PROJECT = Path(__file__).parents[2]
# The small run's options of the prior and of how both models are fitted; its model's own come with a tokenizer.
FIT = [
    text
    for name, value in zip(SMALL[::2], SMALL[1::2], strict=True)
    if not name.startswith("--model")
    for text in (name, value)
]


@pytest.fixture
def made(run, options, tmp_path) -> Path:
    """The codebook of a small run, somewhere else."""
    run(*options, "--stage", "codebook")
    return (tmp_path / "run" / "codebook").rename(tmp_path / "made")


def test_a_tokenizer_may_be_a_run(run, made, photos, tmp_path):
    shutil.copytree(made, tmp_path / "whole" / "codebook")
    common = [*FIT, "--data.source", str(photos), "--stage", "prior"]
    for name in ("made", "whole"):
        run(*common, "--tokenizer", str(tmp_path / name), "--run", str(tmp_path / f"of-{name}"))
    assert weights(tmp_path / "of-made") == weights(tmp_path / "of-whole")


def test_a_prior_for_a_saved_tokenizer(run, made, photos, tmp_path):
    folder = tmp_path / "reused"
    options = [*FIT, "--data.source", str(photos), "--run", str(folder), "--tokenizer", str(made)]
    run(*options, "--stage", "prior")
    assert (folder / "codebook" / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()
    before = weights(folder)
    run("--run", str(folder), "--stage", "evaluate")
    assert json.loads((folder / "elbo.json").read_text())["bits_per_dim"] > 0
    run(*options, "--stage", "prior", "--resume")  # the same again is nothing more to do
    assert weights(folder) == before


def test_a_saved_tokenizer_trains_on(run, made, photos, tmp_path):
    folder = tmp_path / "reused"
    still = ["--codebook-fit.learning-rate", "0", "--codebook-fit.weight-decay", "0"]
    options = [*FIT, "--data.source", str(photos), "--run", str(folder), "--tokenizer", str(made)]
    run(*options, *still, "--stage", "codebook")
    old, new = (safetensors.torch.load_file(place / "model.safetensors") for place in (made, folder / "codebook"))
    learned = {name for name, _ in VQVAE.from_pretrained(made).named_parameters()}
    assert all(torch.equal(old[name], new[name]) for name in learned)
    # Its moving averages went on: from where they were, not from a start.
    assert new["quantizer.num_updates"] == old["quantizer.num_updates"] + 8


def test_a_tokenizer_and_other_weights_are_one_line(run, made, photos, fails, tmp_path):
    options = [*FIT, "--data.source", str(photos), "--run", str(tmp_path / "reused")]
    line = fails(*options, "--tokenizer", str(made), "--stage", "prior", "--model.width", "16")
    assert "--model options" in line
    assert "expected (32,)" in line
    assert not (tmp_path / "reused" / "state" / "run.json").exists()
    line = fails(*options, "--tokenizer", str(tmp_path / "nothing"), "--stage", "prior")
    assert "no model folder" in line
    run(*options, "--tokenizer", str(made), "--stage", "prior")
    line = fails(*options, "--tokenizer", str(tmp_path / "run"), "--stage", "prior")
    assert "has a codebook of its own" in line


@pytest.mark.slow
@pytest.mark.parametrize("extra", [(), ("--strategy", "fsdp", "--stage", "prior")], ids=["ddp", "fsdp"])
def test_torchrun_is_as_good_as_our_own_launch(options, run, tmp_path, extra):
    """Two gloo processes that torchrun starts end with the weights of two that Fabric starts."""
    if extra:
        run(*options, "--stage", "codebook")
    own, other = tmp_path / "run", tmp_path / "launched"
    # Without "--" torchrun takes our --run for the beginning of an option of its own.
    if extra:
        subprocess.run(["cp", "-r", str(own), str(other)], check=True)
    two = ["--accelerator", "cpu", "--devices", "2", "--strategy", "ddp"]
    elsewhere = [*options[:-1], str(other)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    for launcher, arguments in (
        ([sys.executable], options),
        ([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"], elsewhere),
    ):
        command = [*launcher, str(PROJECT / "train.py"), *arguments, *two, *extra]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
        assert ended.returncode == 0, ended.stderr[-2000:]
    assert weights(own) == weights(other)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [VectorQuantizer.Config, GumbelQuantizer.Config])
def test_processes_together_encode_what_one_does(photos, tmp_path, kind):
    """To the bit, in order and each all of it, also where an image or a whole batch cannot be read."""
    source = tmp_path / "photos"
    shutil.copytree(photos, source)
    for path in sorted(source.glob("left/*.png"))[3:13]:
        path.write_bytes(b"broken")
    torch.manual_seed(0)
    config = VQVAE.Config(image_size=8, width=8, num_blocks=0, quantizer=kind(num_codes=8, dim=4))
    config.build().save_pretrained(tmp_path / "model")
    script = Path(__file__).with_name("encoding_together.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    said = []
    for devices in ("1", "2"):
        command = [sys.executable, script, tmp_path / "model", source, tmp_path, devices]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stderr[-2000:]
        said.append(set(re.findall(r"skipped (\S+):", ended.stderr)))
    one, *others = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("1-0", "2-0", "2-1"))
    assert others == [one, one]
    assert said[0] == said[1]
    assert said[0]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads have no names here")
@pytest.mark.parametrize("stopped", [False, True], ids=["to the end", "stopped"])
def test_nothing_of_several_processes_is_left_when_python_ends(options, tmp_path, stopped):
    """A thread of gloo's that outlives them may abort a process whose work is done, exit status 134."""
    command = [sys.executable, str(Path(threads_left.__file__)), *options, "--stage", "codebook"]
    command += ["--accelerator", "cpu", "--devices", "2", "--strategy", "ddp"]
    if stopped:
        command += ["--codebook-fit.num-steps", "100000", "--codebook-fit.validate-every", "100000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as running:
        if stopped:
            metrics = tmp_path / "run" / "metrics.csv"
            while running.poll() is None and not metrics.exists():
                time.sleep(0.1)
            running.send_signal(signal.SIGINT)
        printed, _ = running.communicate(timeout=300)
    assert running.returncode == (128 + signal.SIGINT if stopped else 0)
    assert printed.splitlines() == ["gloo threads left: 0"] * 2


@pytest.fixture
def tokenized(made, photos, tmp_path) -> Path:
    """The small run's images as codes."""
    model = VQVAE.from_pretrained(made)
    for split in ("train", "test"):
        images = load_images(photos, split, size=8, channels=1)
        tokenize(
            model,
            images,
            tmp_path / "codes" / split,
            Tokenizing(split=split, tokenizer_source=str(made), shard_size=64),
        )
    return tmp_path / "codes"


def test_a_prior_from_a_tokenized_set(run, made, tokenized, photos, tmp_path):
    """The same prior as from the images themselves, with none of them at hand."""
    common = [*FIT, "--stage", "prior"]
    run(*common, "--data.source", str(photos), "--tokenizer", str(made), "--run", str(tmp_path / "images"))
    run(*common, "--data.source", "nowhere", "--codes", str(tokenized), "--run", str(tmp_path / "codes-run"))
    assert weights(tmp_path / "codes-run") == weights(tmp_path / "images")
    # The run knows its images again where they are needed.
    run("--run", str(tmp_path / "codes-run"), "--stage", "evaluate", "--data.source", str(photos))
    assert (tmp_path / "codes-run" / "elbo.json").exists()


def test_codes_that_do_not_fit_are_one_line(made, tokenized, fails, tmp_path):
    common = [*FIT, "--codes", str(tokenized), "--run", str(tmp_path / "other")]
    assert "is for a prior" in fails(*common)
    assert "--live" in fails(*common, "--stage", "prior", "--live")
    assert "nowhere" in fails(*common[:-4], "--codes", "nowhere", "--run", str(tmp_path / "other"), "--stage", "prior")
    model = VQVAE.from_pretrained(made)
    with torch.no_grad():
        model.quantizer.codebook.add_(1)
    model.save_pretrained(tmp_path / "moved")
    made.rename(tmp_path / "gone")
    assert "name it with --tokenizer" in fails(*common, "--stage", "prior")
    assert "another tokenizer" in fails(*common, "--stage", "prior", "--tokenizer", str(tmp_path / "moved"))


def test_case_31_a_prior_does_not_go_on_with_other_codes(run, made, tokenized, photos, fails, tmp_path):
    place = ["--run", str(tmp_path / "new"), "--stage", "prior"]
    run(*FIT, *place, "--codes", str(tokenized))
    assert Prior.from_pretrained(tmp_path / "new").trained_on.images == CodeDataset(tokenized / "train").digest()
    shutil.copytree(photos, tmp_path / "fewer")
    next((tmp_path / "fewer").rglob("*.png")).unlink()
    others = tmp_path / "others"
    for split in ("train", "test"):
        images = load_images(tmp_path / "fewer", split, size=8, channels=1)
        tokenize(
            VQVAE.from_pretrained(made), images, others / split, Tokenizing(split=split, tokenizer_source=str(made))
        )
    more = ["--resume", *place, "--prior-fit.num-steps", "9"]
    assert "was begun with other codes" in fails(*more, "--codes", str(others))
    run(*more, "--codes", str(tokenized))


def test_case_31_codes_of_two_sources_are_refused(made, tokenized, photos, fails, tmp_path):
    shutil.copytree(photos, tmp_path / "others")
    shutil.rmtree(tokenized / "test")
    images = load_images(tmp_path / "others", "test", size=8, channels=1)
    tokenize(VQVAE.from_pretrained(made), images, tokenized / "test", Tokenizing(split="test", shard_size=64))
    line = fails(*FIT, "--stage", "prior", "--codes", str(tokenized), "--run", str(tmp_path / "new"))
    assert f"are of different sources ({photos} and {tmp_path / 'others'})" in line
    assert not (tmp_path / "new").exists()


def test_case_17_codes_that_do_not_say_where_their_sources_lie(
    run, made, tokenized, photos, fails, tmp_path, monkeypatch
):
    """Nothing of that name in the current folder stands in for them."""
    for split in ("train", "test"):
        path = tokenized / split / "index.json"
        index = json.loads(path.read_text())
        index["source"] = {"name": "photos", "path": None}
        index["tokenizer"]["source"] = {"name": "made", "path": None}
        path.write_text(json.dumps(index))
    shutil.copytree(photos, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    options = [*FIT, "--stage", "prior", "--codes", str(tokenized), "--run", str(tmp_path / "new")]
    assert "does not say where its tokenizer lies: name it with --tokenizer" in fails(*options)
    run(*options, "--tokenizer", str(made))
    line = fails("--run", str(tmp_path / "new"), "--stage", "evaluate")
    assert f"the images of {tokenized} cannot be read, name them with --data.source: " in line
    run("--run", str(tmp_path / "new"), "--stage", "evaluate", "--data.source", str(photos))
    assert (tmp_path / "new" / "elbo.json").exists()


def test_a_codebook_that_was_taken_stays_when_its_prior_is_resumed(run, made, photos, fails, tmp_path, monkeypatch):
    """Ctrl-C in the prior, then what it says: --resume."""
    folder = tmp_path / "reused"
    options = [*FIT, "--data.source", str(photos), "--run", str(folder), "--tokenizer", str(made), "--stage", "prior"]
    monkeypatch.setattr(Stop, "requested", lambda self, fabric, step: signal.SIGINT if step == 2 else 0)
    with pytest.raises(SystemExit):
        run(*options)
    monkeypatch.undo()
    run("--resume", "--run", str(folder))
    assert (folder / "codebook" / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()
    assert (folder / "elbo.json").exists()
    line = fails("--resume", "--stage", "codebook", "--run", str(folder))
    assert "train it on in another folder" in line


def test_a_codebook_run_resumes_where_its_tokenizer_is_gone(run, made, photos, fails, tmp_path, monkeypatch):
    folder = tmp_path / "reused"
    options = [
        *FIT,
        "--data.source",
        str(photos),
        "--run",
        str(folder),
        "--tokenizer",
        str(made),
        "--stage",
        "codebook",
    ]
    monkeypatch.setattr(Stop, "requested", lambda self, fabric, step: signal.SIGINT if step == 2 else 0)
    with pytest.raises(SystemExit):
        run(*options)
    monkeypatch.undo()
    # Half trained, it is not what a prior is for, and neither is what it began with.
    assert "is not finished: go on with `vqvae train --resume" in fails("--stage", "prior", "--run", str(folder))
    made.rename(tmp_path / "gone")
    run("--resume", "--stage", "codebook", "--run", str(folder))
    assert (folder / "codebook").exists()


def test_a_run_on_codes_is_resumed_and_evaluated_on_their_images(run, made, tokenized, photos, tmp_path, monkeypatch):
    folder = tmp_path / "coded"
    monkeypatch.setattr(Stop, "requested", lambda self, fabric, step: signal.SIGINT if step == 2 else 0)
    with pytest.raises(SystemExit):
        run(*FIT, "--stage", "prior", "--codes", str(tokenized), "--run", str(folder))
    monkeypatch.undo()
    run("--resume", "--run", str(folder))
    figures = json.loads((folder / "elbo.json").read_text())
    assert figures["images"] == len(load_images(photos, "test", size=8, channels=1))
    assert figures["data"] == photos.name


def test_what_is_refused_leaves_no_run(made, tokenized, fails, tmp_path):
    """The corrected command then works in the same folder."""
    model = VQVAE.from_pretrained(made)
    with torch.no_grad():
        model.quantizer.codebook.add_(1)
    model.save_pretrained(tmp_path / "moved")
    common = [*FIT, "--stage", "prior", "--codes", str(tokenized), "--run", str(tmp_path / "new")]
    assert "another tokenizer" in fails(*common, "--tokenizer", str(tmp_path / "moved"))
    assert not (tmp_path / "new").exists()
    shutil.rmtree(tokenized / "test")
    assert "has no test" in fails(*common, "--tokenizer", str(made))
    assert not (tmp_path / "new").exists()


def test_codes_of_a_posterior_are_not_what_its_prior_is_for(run, photos, fails, tmp_path):
    options = [*SMALL, "--quantizer", "GumbelQuantizer", "--data.source", str(photos)]
    run(*options, "--stage", "codebook", "--run", str(tmp_path / "drawn"))
    model = VQVAE.from_pretrained(tmp_path / "drawn" / "codebook")
    for split in ("train", "test"):
        images = load_images(photos, split, size=8, channels=1)
        tokenize(model, images, tmp_path / "codes" / split, Tokenizing(split=split))
    line = fails(
        *FIT, "--stage", "prior", "--codes", str(tmp_path / "codes"), "--tokenizer", str(tmp_path / "drawn"),
        "--run", str(tmp_path / "new"),
    )  # fmt: skip
    assert "a posterior that codes are sampled from" in line


def test_an_imported_tokenizer_trains_on_and_takes_a_prior(run, photos, tmp_path):
    quantizer = VectorQuantizer.Config(num_codes=8, dim=4, revival="off")
    config = VQGAN.Config(
        image_size=8, num_channels=1, channels=(32, 32), num_blocks=1, latent_channels=4, quantizer=quantizer
    )
    torch.manual_seed(0)
    config.build().save_pretrained(tmp_path / "imported")
    folder = tmp_path / "reused"
    options = [*FIT, "--data.source", str(photos), "--run", str(folder), "--tokenizer", str(tmp_path / "imported")]
    run(*options, "--latents", "codes")
    assert VQVAE.from_pretrained(folder / "codebook").config == config
    assert json.loads((folder / "elbo.json").read_text())["bits_per_dim"] > 0
