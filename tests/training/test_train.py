"""train.py: what a run holds, that it repeats itself, and that nothing is lost when it is cut off."""

import csv
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from run_files import gaussian, weights
from tensorboardX.proto import event_pb2

from priors import Prior
from vqvae import VQVAE, load_images
from vqvae.training.options import PRESETS, load_run, parse

ROOT = Path(__file__).parents[2]
SECONDS = 300


def start(*args: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.005)


def finish(process: subprocess.Popen) -> str:
    """Wait for a run to end well; what it wrote to stderr."""
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors
    return errors


def rows(folder: Path) -> list[list[str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.reader(file))


def test_a_run_holds_what_the_readme_says(run, options, tmp_path, capsys):
    run(*options)
    folder = tmp_path / "run"
    table = capsys.readouterr().out
    for line in (
        "uniform prior",
        "unigram prior",
        "ngram prior",
        "transformer prior",
        "distortion",
        "negative ELBO",
        "usage",
        "PSNR",
    ):
        assert line in table
    result = json.loads((folder / "elbo.json").read_text())
    assert set(result) >= {
        *("images", "dims", "rate", "distortion", "entropy", "negative_elbo", "bits_per_dim"),
        *("usage", "perplexity", "psnr", "seconds", "seed"),
    }
    assert result["dims"] == 64
    assert list(result["rate"]) == ["uniform", "unigram", "ngram", "transformer"]
    assert result["negative_elbo"] == pytest.approx(result["rate"]["transformer"] + result["distortion"])
    assert result["bits_per_dim"] == pytest.approx(result["negative_elbo"] / 64 / 0.6931471805599453)
    assert result["seconds"] > 0
    for picture in ("reconstructions.png", "samples.png", "usage.png"):
        with Image.open(folder / picture) as opened:
            opened.verify()
    (events,) = (folder / "tensorboard" / "codebook").glob("events*")
    written = [row for row in rows(folder)[1:] if row[0] == "codebook"]
    assert [(str(step), tag) for step, tag, _ in read_events(events)] == [(r[1], f"{r[2]}/{r[3]}") for r in written]
    assert [value for *_, value in read_events(events)] == pytest.approx([float(row[4]) for row in written], rel=1e-5)
    model, prior = VQVAE.from_pretrained(folder / "codebook"), Prior.from_pretrained(folder / "prior")
    assert prior.grid == model.grid
    assert prior.num_classes == 2
    figures = {(stage, split, name) for stage, _, split, name, _ in rows(folder)[1:]}
    assert {("codebook", "test", "usage"), ("codebook", "train", "commitment"), ("prior", "test", "rate")} <= figures


def read_events(path):
    """Step, tag and value of each figure of a TensorBoard file: records of a length, a checksum, data, a checksum."""
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack_from("<Q", data)
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        data = data[12 + length + 4 :]
    return found


def test_the_same_seed_gives_the_same_weights(run, options, tmp_path):
    run(*options, "--stage", "codebook")
    run(*options, "--stage", "codebook", "--run", str(tmp_path / "again"))
    run(*options, "--stage", "codebook", "--run", str(tmp_path / "other"), "--seed", "1")
    assert weights(tmp_path / "run") == weights(tmp_path / "again")
    assert weights(tmp_path / "run") != weights(tmp_path / "other")
    # Nothing of a run goes on after it: a thread would meet the next full disk, and say so where nobody reads.
    assert not [thread for thread in threading.enumerate() if "EventLogger" in type(thread).__name__]


@pytest.mark.parametrize("extra", [(), ("--codebook-fit.ema", "0.9", "--quantizer", "VectorQuantizer")])
def test_resume_after_stops_is_an_uninterrupted_run(run, options, tmp_path, monkeypatch, extra):
    """Stopped by a signal after steps 3 and 5 of the codebook and 2 of the prior."""
    from vqvae.training.records import Stop

    quantizer = ["--model.quantizer.num-codes", "8", "--model.quantizer.dim", "4"]
    run(*options, *extra, *quantizer)
    whole = tmp_path / "whole"
    (tmp_path / "run").rename(whole)
    asked = {"codebook": [2, 4], "prior": [1]}

    def requested(self, fabric, step):
        stage = "prior" if (tmp_path / "run" / "codebook").exists() else "codebook"
        if step in asked[stage]:
            asked[stage].remove(step)
            return signal.SIGTERM
        return 0

    monkeypatch.setattr(Stop, "requested", requested)
    for attempt in range(3):
        with pytest.raises(SystemExit) as stopped:
            run(*options, *extra, *quantizer, *(["--resume"] if attempt else []))
        assert stopped.value.code == 128 + signal.SIGTERM
    run("--resume", "--run", str(tmp_path / "run"))
    assert weights(tmp_path / "run") == weights(whole)
    timeless = [[row for row in rows(folder) if row[3] != "seconds"] for folder in (tmp_path / "run", whole)]
    steps = [[(row[0], row[1], row[2], row[3]) for row in each] for each in timeless]
    assert len(set(steps[0])) == len(steps[0]), "a step is there twice"
    assert set(steps[1]) <= set(steps[0])


@pytest.mark.slow
def test_resume_after_kill_9_is_an_uninterrupted_run(options, tmp_path):
    whole = tmp_path / "whole"
    finish(start(*options, "--run", str(whole)))
    for marker in ("state/codebook.ckpt", "codebook", "state/prior.ckpt"):
        process = start(*options, *(["--resume"] if marker != "state/codebook.ckpt" else []))
        wait_for(tmp_path / "run" / marker, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(start("--resume", "--run", str(tmp_path / "run")))
    assert weights(tmp_path / "run") == weights(whole)
    results = [json.loads((folder / "elbo.json").read_text()) for folder in (tmp_path / "run", whole)]
    for result in results:
        result.pop("seconds")
    assert results[0] == results[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_exit_cleanly(options, tmp_path, number):
    steps = ["--codebook-fit.num-steps", "100000", "--codebook-fit.save-every", "2"]
    process = start(*options, *steps)
    wait_for(tmp_path / "run" / "state" / "codebook.ckpt", process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + number
    assert f"go on with `python train.py --resume --run {tmp_path / 'run'}`" in errors
    assert "Traceback" not in errors
    saved = torch.load(tmp_path / "run" / "state" / "codebook.ckpt", weights_only=True)
    assert f"saved at step {saved['step']};" in errors


@pytest.mark.slow
def test_a_sigterm_to_all_its_processes_saves_too(options, tmp_path):
    """As `timeout` and batch systems send it: workers that decode leave the answer to the main process."""
    args = [*options, "--data.num-workers", "2", "--codebook-fit.num-steps", "100000", "--codebook-fit.save-every", "2"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *args], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(tmp_path / "run" / "state" / "codebook.ckpt", process)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "saved at step" in errors


SIZES = ("--model.quantizer.num-codes", "8", "--model.quantizer.dim", "4")


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra",
    [
        (),
        ("--model.beta", "1"),
        ("--model.beta", "1", "--schedule", "alternating", "--quantizer", "GumbelQuantizer", *SIZES),
        "gaussian",
    ],
    ids=["codes", "prior in the loop", "prior in the loop, alternating", "gaussian"],
)
def test_two_processes_agree_and_end(options, tmp_path, extra):
    """Two gloo processes share the batches; the run ends with the same files."""
    args = gaussian(options) if extra == "gaussian" else [*options, *extra]
    finish(start(*args, "--devices", "2", "--strategy", "ddp", "--accelerator", "cpu"))
    assert json.loads((tmp_path / "run" / "elbo.json").read_text())["images"] > 0


def test_nan_stops_with_the_step_and_what_to_do(run, options, fails, tmp_path):
    line = fails(*options, "--codebook-fit.learning-rate", "1e30", "--codebook-fit.save-every", "1")
    assert "codebook stopped at step 1" in line
    assert "last good checkpoint" in line
    assert "--codebook-fit.learning-rate" in line
    saved = torch.load(tmp_path / "run" / "state" / "codebook.ckpt", weights_only=True)
    assert f"of step {saved['step']}" in line
    assert all(torch.isfinite(value).all() for value in saved["module"].values())


def test_a_run_is_never_written_over(run, options, fails):
    run(*options, "--stage", "codebook")
    assert "already holds a codebook; add --resume" in fails(*options)


def test_stages_one_by_one(run, options, tmp_path, fails):
    run(*options, "--stage", "codebook")
    before = weights(tmp_path / "run")
    # The later stages know the run's options by themselves.
    run("--run", str(tmp_path / "run"), "--stage", "prior")
    run("--run", str(tmp_path / "run"), "--stage", "evaluate")
    assert weights(tmp_path / "run")["codebook"] == before["codebook"]
    assert (tmp_path / "run" / "elbo.json").exists()


@pytest.mark.parametrize("split", ["train", "test"])
def test_broken_images_are_named_and_counted(run, options, photos, tmp_path, capsys, split):
    spoiled = tmp_path / "spoiled"
    shutil.copytree(photos, spoiled)
    images = load_images(spoiled, split, size=8, channels=1)
    name = images.key(0)
    (spoiled / name).write_bytes((spoiled / name).read_bytes()[:60])
    run(*options, "--data.source", str(spoiled))
    out, errors = capsys.readouterr()
    assert f"skipped {name}: " in errors
    assert errors.count("skipped") == 1
    assert "(1 so far)" in errors
    if split == "test":
        assert "1 that could not be read left out" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--preset", "mnist"), "unknown preset 'mnist', expected one of fashion-mini, "),
        (("--quantizer", "Magic"), "unknown quantizer 'Magic'"),
        (("--preset", "folder", "--data.source", "/nowhere"), "/nowhere"),
        (("--data.source", "nothing-known"), "nothing-known"),
        (("--model.image-size", "30"), "multiple of downsampling"),
        (("--accelerator", "abacus"), "Fabric refuses"),
        (("--precision", "7-true"), "Fabric refuses"),
        (("--resume",), "holds no run to go on with"),
        (("--stage", "evaluate"), "holds no run to go on with"),
    ],
)
def test_mistakes_are_one_line(fails, tmp_path, args, message):
    assert message in fails(*args, "--run", str(tmp_path / "run"))
    assert not (tmp_path / "run" / "codebook").exists()


def test_an_empty_folder_is_one_line(fails, tmp_path):
    (tmp_path / "empty").mkdir()
    line = fails("--preset", "folder", "--data.source", str(tmp_path / "empty"), "--run", str(tmp_path / "run"))
    assert "empty" in line


def test_a_corrupt_checkpoint_is_one_line(run, options, fails, tmp_path):
    run(*options, "--stage", "codebook")
    path = tmp_path / "run" / "state" / "codebook.ckpt"
    for content in (b"", path.read_bytes()[:500], b"no checkpoint"):
        path.write_bytes(content)
        assert "codebook.ckpt is corrupt" in fails("--resume", "--run", str(tmp_path / "run"))


def test_a_prior_that_does_not_fit_is_one_line(run, options, fails, tmp_path):
    run(*options)
    from priors import UniformPrior

    UniformPrior(num_codes=9, grid=(2, 2)).save_pretrained(tmp_path / "run" / "prior")
    line = fails("--stage", "evaluate", "--run", str(tmp_path / "run"))
    assert "num_codes=9" in line
    assert "num_codes=8" in line


def test_a_full_disk_keeps_the_last_checkpoint(run, options, fails, tmp_path, monkeypatch):
    run(*options, "--stage", "codebook", "--codebook-fit.num-steps", "2")
    before = (tmp_path / "run" / "state" / "codebook.ckpt").read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    line = fails("--resume", "--run", str(tmp_path / "run"), "--codebook-fit.num-steps", "6")
    assert "no space is left on the disk" in line
    assert (tmp_path / "run" / "state" / "codebook.ckpt").read_bytes() == before


def test_options_survive_the_run_folder(run, options, tmp_path):
    run(*options, "--stage", "codebook", "--codebook-fit.num-steps", "1", "--seed", "5")
    known = load_run(tmp_path / "run")
    assert known.seed == 5
    assert known.codebook_fit.num_steps == 1
    again = parse(["--resume", "--run", str(tmp_path / "run"), "--codebook-fit.num-steps", "4"])
    assert again.codebook_fit.num_steps == 4
    assert again.model == known.model
    assert again.data == known.data


def test_every_preset_parses_and_can_change_kinds():
    for preset in PRESETS:
        assert parse(["--preset", preset]).preset == preset
    run = parse(["--quantizer", "VectorQuantizer", "--model.quantizer.codebook-weight", "2", "--likelihood", "Normal"])
    assert run.model.quantizer.codebook_weight == 2
    assert run.model.likelihood.owner.__name__ == "Normal"
