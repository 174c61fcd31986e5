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
from run_files import SMALL, stopped, weights, without

from priors import Prior
from vqvae import VQGAN, VQVAE, load_images
from vqvae.quantizers import GumbelQuantizer, VectorQuantizer
from vqvae.tokens import CodeDataset, Tokenizing, tokenize
from vqvae.training import program
from vqvae.training.parsing import parse

PROJECT = Path(__file__).parents[2]
# The small run's options of the prior and of how both models are fitted; its model's own come with a tokenizer.
FIT = without("--model", SMALL)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}


@pytest.fixture(scope="module")
def kept(photos, tmp_path_factory) -> Path:
    """The codebook of a small run."""
    folder = tmp_path_factory.mktemp("kept")
    program.train(parse([*SMALL, "--data.source", str(photos), "--run", str(folder / "run"), "--stage", "codebook"]))
    return folder / "run" / "codebook"


@pytest.fixture
def made(kept, tmp_path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(kept, tmp_path / "made"))


@pytest.fixture
def reuse(made, photos, tmp_path) -> list:
    """The words of a run, `tmp_path/reused`, that begins with that codebook."""
    return [*FIT, "--data.source", photos, "--run", tmp_path / "reused", "--tokenizer", made]


def test_a_prior_for_a_saved_tokenizer(run, reuse, made, photos, fails, tmp_path, monkeypatch):
    """Of its own folder, or of a run. Ctrl-C in the prior, and then --resume, leave the tokenizer as it is."""
    folder = tmp_path / "reused"
    stopped(run, monkeypatch, folder, [*reuse, "--stage", "prior"], prior=(3,))
    run("--resume", "--run", folder)
    assert (folder / "codebook" / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()
    assert json.loads((folder / "elbo.json").read_text())["bits_per_dim"] > 0
    before = weights(folder)
    run(*reuse, "--stage", "prior", "--resume")  # the same again is nothing more to do
    assert weights(folder) == before
    assert "train it on in another folder" in fails("--resume", "--stage", "codebook", "--run", folder)
    run(*FIT, "--data.source", photos, "--stage", "prior", "--tokenizer", folder, "--run", tmp_path / "of-run")
    assert weights(tmp_path / "of-run") == before


def test_a_saved_tokenizer_trains_on(run, reuse, made, fails, tmp_path, monkeypatch):
    """And resumes where what it began with is gone."""
    folder = tmp_path / "reused"
    still = ["--codebook-fit.learning-rate", "0", "--codebook-fit.weight-decay", "0", "--stage", "codebook"]
    stopped(run, monkeypatch, folder, [*reuse, *still], codebook=(3,))
    # Half trained, it is not what a prior is for, and neither is what it began with.
    assert "is not finished: go on with `vqvae train --resume" in fails("--stage", "prior", "--run", folder)
    gone = made.rename(tmp_path / "gone")
    run("--resume", "--stage", "codebook", "--run", folder)
    places = (gone, folder / "codebook")
    old, new = (safetensors.torch.load_file(place / "model.safetensors") for place in places)
    learned = {name for name, _ in VQVAE.from_pretrained(gone).named_parameters()}
    assert all(torch.equal(old[name], new[name]) for name in learned)
    # Its moving averages went on: from where they were, not from a start.
    assert new["quantizer.num_updates"] == old["quantizer.num_updates"] + 8


def test_a_tokenizer_and_other_weights_are_one_line(run, reuse, fails, tmp_path):
    line = fails(*reuse, "--stage", "prior", "--model.width", "16")
    assert "--model options" in line
    assert "expected (32,)" in line
    assert not (tmp_path / "reused" / "state" / "run.json").exists()
    assert "no model folder" in fails(*reuse, "--tokenizer", tmp_path / "nothing", "--stage", "prior")
    run(*reuse, "--stage", "prior", "--prior-fit.num-steps", "1")
    assert "has a codebook of its own" in fails(*reuse, "--tokenizer", tmp_path / "other", "--stage", "prior")


@pytest.mark.slow
@pytest.mark.parametrize("extra", [(), ("--strategy", "fsdp", "--stage", "prior")], ids=["ddp", "fsdp"])
def test_torchrun_is_as_good_as_our_own_launch(options, run, tmp_path, extra):
    """Two gloo processes that torchrun starts end with the weights of two that Fabric starts."""
    own, other = tmp_path / "run", tmp_path / "launched"
    if extra:
        run(*options, "--stage", "codebook")
        shutil.copytree(own, other)
    two = ["--accelerator", "cpu", "--devices", "2", "--strategy", "ddp"]
    elsewhere = [*options[:-1], str(other)]
    # Without "--" torchrun takes our --run for the beginning of an option of its own.
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    for launcher, arguments in (([], options), (torchrun, elsewhere)):
        command = [sys.executable, *launcher, str(PROJECT / "train.py"), *arguments, *two, *extra]
        ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, cwd=tmp_path)
        assert ended.returncode == 0, ended.stderr[-2000:]
    assert weights(own) == weights(other)


@pytest.mark.slow
def test_processes_together_encode_what_one_does(photos, tmp_path):
    """To the bit, in order and each all of it, also where an image or a whole batch cannot be read."""
    source = tmp_path / "photos"
    shutil.copytree(photos, source)
    for path in sorted(source.glob("left/*.png"))[3:13]:
        path.write_bytes(b"broken")
    torch.manual_seed(0)
    quantizer = GumbelQuantizer.Config(num_codes=8, dim=4)
    VQVAE(image_size=8, width=8, num_blocks=0, quantizer=quantizer).save_pretrained(tmp_path / "model")
    script = Path(__file__).with_name("encoding_together.py")
    said = []
    for devices in ("1", "2"):
        command = [sys.executable, script, tmp_path / "model", source, tmp_path, devices]
        ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stderr[-2000:]
        said.append(set(re.findall(r"skipped (\S+):", ended.stderr)))
    one, *others = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("1-0", "2-0", "2-1"))
    assert others == [one, one]
    assert said[0] == said[1]
    assert said[0]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads have no names here")
def test_nothing_of_several_processes_is_left_when_python_ends(options, tmp_path):
    """A thread of gloo's that outlives them may abort a process whose work is done, exit status 134."""
    command = [sys.executable, str(Path(threads_left.__file__)), *options, "--stage", "codebook"]
    command += ["--accelerator", "cpu", "--devices", "2", "--strategy", "ddp"]
    command += ["--codebook-fit.num-steps", "100000", "--codebook-fit.validate-every", "100000"]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as running:
        metrics = tmp_path / "run" / "metrics.csv"
        while running.poll() is None and not metrics.exists():
            time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        printed, _ = running.communicate(timeout=300)
    assert running.returncode == 128 + signal.SIGINT
    assert printed.splitlines() == ["gloo threads left: 0"] * 2


def make_codes(model, photos, folder, splits=("train", "test"), **options) -> Path:
    """The small run's images as codes."""
    for split in splits:
        images = load_images(photos, split, size=8, channels=1)
        tokenize(model, images, folder / split, Tokenizing(split=split, shard_size=64, **options))
    return folder


@pytest.fixture
def tokenized(made, photos, tmp_path) -> Path:
    return make_codes(VQVAE.from_pretrained(made), photos, tmp_path / "codes", tokenizer_source=str(made))


@pytest.fixture
def coded(tokenized, tmp_path) -> list:
    """The words of a run, `tmp_path/new`, of a prior for those codes."""
    return [*FIT, "--stage", "prior", "--codes", tokenized, "--run", tmp_path / "new"]


def test_a_prior_from_a_tokenized_set(run, reuse, coded, photos, tmp_path, monkeypatch):
    """The same prior as from the images themselves, also resumed; it is evaluated on them."""
    run(*reuse, "--stage", "prior")
    stopped(run, monkeypatch, tmp_path / "new", coded, prior=(3,))
    run("--resume", "--run", tmp_path / "new")
    assert weights(tmp_path / "new") == weights(tmp_path / "reused")
    figures = json.loads((tmp_path / "new" / "elbo.json").read_text())
    assert figures["images"] == len(load_images(photos, "test", size=8, channels=1))
    assert figures["data"] == photos.name


def test_codes_that_do_not_fit_are_one_line(run, made, tokenized, coded, photos, fails, tmp_path):
    """And leave no run: the corrected command then works in the same folder."""
    model = VQVAE.from_pretrained(made)
    with torch.no_grad():
        model.quantizer.codebook.add_(1)
    model.save_pretrained(tmp_path / "moved")
    assert "is for a prior" in fails(*coded, "--stage", "all")
    assert "--live" in fails(*coded, "--live")
    assert "nowhere" in fails(*coded, "--codes", "nowhere")
    assert "another tokenizer" in fails(*coded, "--tokenizer", tmp_path / "moved")
    shutil.copytree(tokenized, tmp_path / "kept" / "8x8")
    shutil.copytree(tokenized, tmp_path / "kept" / "8x16")
    line = fails(*coded, "--codes", tmp_path / "kept")
    assert "holds codes of 2 sizes, and a prior is for one" in line
    assert str(tmp_path / "kept" / "8x16") in line
    made.rename(tmp_path / "gone")
    assert "name it with --tokenizer" in fails(*coded)
    shutil.rmtree(tokenized / "test")
    assert "has no test" in fails(*coded, "--tokenizer", tmp_path / "gone")
    others = shutil.copytree(photos, tmp_path / "others")
    make_codes(VQVAE.from_pretrained(tmp_path / "gone"), others, tokenized, ["test"])
    line = fails(*coded, "--tokenizer", tmp_path / "gone")
    assert f"are of different sources ({photos} and {others})" in line
    assert not (tmp_path / "new").exists()


def test_case_31_a_prior_does_not_go_on_with_other_codes(run, made, tokenized, coded, photos, fails, tmp_path):
    run(*coded)
    assert Prior.from_pretrained(tmp_path / "new").trained_on.images == CodeDataset(tokenized / "train").digest()
    fewer = Path(shutil.copytree(photos, tmp_path / "fewer"))
    next(fewer.rglob("*.png")).unlink()
    others = make_codes(VQVAE.from_pretrained(made), fewer, tmp_path / "others", tokenizer_source=str(made))
    more = ["--resume", "--run", tmp_path / "new", "--stage", "prior", "--prior-fit.num-steps", "9"]
    assert "was begun with other codes" in fails(*more, "--codes", others)
    run(*more, "--codes", tokenized)


def test_case_17_codes_that_do_not_say_where_their_sources_lie(
    run, made, tokenized, coded, photos, fails, tmp_path, monkeypatch
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
    assert "does not say where its tokenizer lies: name it with --tokenizer" in fails(*coded)
    run(*coded, "--tokenizer", made)
    line = fails("--run", tmp_path / "new", "--stage", "evaluate")
    assert f"the images of {tokenized} cannot be read, name them with --data.source: " in line
    run("--run", tmp_path / "new", "--stage", "evaluate", "--data.source", photos)
    assert (tmp_path / "new" / "elbo.json").exists()


def test_codes_of_a_posterior_are_not_what_its_prior_is_for(photos, fails, tmp_path):
    quantizer = GumbelQuantizer.Config(num_codes=8, dim=4)
    model = VQVAE(image_size=8, width=8, num_blocks=0, quantizer=quantizer)
    model.save_pretrained(tmp_path / "drawn")
    codes = make_codes(model, photos, tmp_path / "codes")
    words = [*FIT, "--stage", "prior", "--codes", codes, "--tokenizer", tmp_path / "drawn", "--run", tmp_path / "new"]
    assert "a posterior that codes are sampled from" in fails(*words)


def test_an_imported_tokenizer_trains_on_and_takes_a_prior(run, photos, tmp_path):
    quantizer = VectorQuantizer.Config(num_codes=8, dim=4, revival="off")
    sizes = {"image_size": 8, "num_channels": 1, "channels": (32, 32), "num_blocks": 1, "latent_channels": 4}
    torch.manual_seed(0)
    model = VQGAN(**sizes, quantizer=quantizer)
    model.save_pretrained(tmp_path / "imported")
    folder = tmp_path / "reused"
    run(*FIT, "--data.source", photos, "--run", folder, "--tokenizer", tmp_path / "imported", "--latents", "codes")
    assert VQVAE.from_pretrained(folder / "codebook").config == model.config
    assert json.loads((folder / "elbo.json").read_text())["bits_per_dim"] > 0
