"""train.py: what a run holds, that it repeats itself, and that nothing is lost when it is cut off."""

import csv
import json
import math
import os
import shutil
import signal
import struct
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from run_files import finish, gaussian, start, stopped, wait_for, weights, without
from tensorboardX.proto import event_pb2

from priors import Prior, UniformPrior
from vqvae import VQVAE, load_images
from vqvae.training.options import load_run
from vqvae.training.parsing import parse

SIZES = ["--model.quantizer.num-codes", "8", "--model.quantizer.dim", "4"]


def rows(folder: Path) -> list[list[str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.reader(file))


def test_a_run_holds_what_the_readme_says(run, options, fails, tmp_path, capsys):
    run(*options)
    folder = tmp_path / "run"
    table = capsys.readouterr().out
    for name in ("uniform", "unigram", "ngram", "transformer"):
        assert f"{name} prior" in table
    for line in ("distortion", "negative ELBO", "usage", "PSNR"):
        assert line in table
    result = json.loads((folder / "elbo.json").read_text())
    assert result.keys() >= {"images", "entropy", "usage", "perplexity", "psnr", "seed"}
    assert result["dims"] == 64
    assert list(result["rate"]) == ["uniform", "unigram", "ngram", "transformer"]
    assert result["negative_elbo"] == pytest.approx(result["rate"]["transformer"] + result["distortion"])
    assert result["bits_per_dim"] == pytest.approx(result["negative_elbo"] / 64 / math.log(2))
    assert result["seconds"] > 0
    for picture in ("reconstructions.png", "samples.png", "usage.png"):
        with Image.open(folder / picture) as opened:
            opened.verify()
    (events,) = (folder / "tensorboard" / "codebook").glob("events*")
    written = [row for row in rows(folder)[1:] if row[0] == "codebook"]
    assert [(str(step), tag) for step, tag, _ in read_events(events)] == [(r[1], f"{r[2]}/{r[3]}") for r in written]
    assert [value for *_, value in read_events(events)] == pytest.approx([float(row[4]) for row in written], rel=1e-5)
    model, prior = VQVAE.from_pretrained(folder / "codebook"), Prior.from_pretrained(folder / "prior")
    assert (prior.grid, prior.num_classes) == (model.grid, 2)
    figures = {(stage, split, name) for stage, _, split, name, _ in rows(folder)[1:]}
    assert {("codebook", "test", "usage"), ("codebook", "train", "commitment"), ("prior", "test", "rate")} <= figures
    assert "already holds a codebook; add --resume" in fails(*options)
    # What does not fit is found out, too.
    UniformPrior(num_codes=9, grid=(2, 2)).save_pretrained(folder / "prior")
    assert "num_codes=9" in fails("--stage", "evaluate", "--run", folder)


def read_events(path):
    """Step, tag and value of each figure of a TensorBoard file: records of a length, a checksum, data, a checksum."""
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack_from("<Q", data)
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        found += [
            (event.step, value.tag, value.simple_value)
            for value in event.summary.value
            if value.HasField("simple_value")
        ]
        data = data[12 + length + 4 :]
    return found


def test_the_same_seed_gives_the_same_weights(run, options, tmp_path):
    for name, seed in (("run", "0"), ("again", "0"), ("other", "1")):
        run(*options, "--stage", "codebook", "--run", tmp_path / name, "--seed", seed)
    assert weights(tmp_path / "run") == weights(tmp_path / "again")
    assert weights(tmp_path / "run") != weights(tmp_path / "other")
    # Nothing of a run goes on after it: a thread would meet the next full disk, and say so where nobody reads.
    assert not [thread for thread in threading.enumerate() if "EventLogger" in type(thread).__name__]


@pytest.mark.parametrize("extra", [[], ["--codebook-fit.ema", "0.9", "--quantizer", "VectorQuantizer"]])
def test_resume_after_stops_is_an_uninterrupted_run(run, options, tmp_path, monkeypatch, extra):
    args = [*without("--model.quantizer.", options), *extra, *SIZES]
    run(*args)
    whole, cut = tmp_path / "whole", tmp_path / "run"
    cut.rename(whole)
    stopped(run, monkeypatch, cut, args, codebook=(3, 5), prior=(2,))
    run("--resume", "--run", cut)
    assert weights(cut) == weights(whole)
    found, expected = ([row[:4] for row in rows(folder) if row[3] != "seconds"] for folder in (cut, whole))
    assert len({tuple(row) for row in found}) == len(found), "a step is there twice"
    assert all(row in found for row in expected)


@pytest.mark.slow
def test_resume_after_kill_9_is_an_uninterrupted_run(options, tmp_path):
    whole = tmp_path / "whole"
    finish(start(*options, "--run", whole))
    for marker in ("state/codebook.ckpt", "state/prior.ckpt"):
        process = start(*options, *(["--resume"] if marker != "state/codebook.ckpt" else []))
        wait_for(tmp_path / "run" / marker, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(start("--resume", "--run", tmp_path / "run"))
    assert weights(tmp_path / "run") == weights(whole)
    results = [json.loads((folder / "elbo.json").read_text()) for folder in (tmp_path / "run", whole)]
    for result in results:
        result.pop("seconds")
    assert results[0] == results[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_exit_cleanly(options, tmp_path, number):
    """SIGTERM comes to all processes, as `timeout` and batch systems send it: workers leave the answer to the first."""
    to_all = number == signal.SIGTERM
    steps = ["--codebook-fit.num-steps", "100000", "--codebook-fit.save-every", "2"]
    process = start(*options, *steps, *(["--data.num-workers", "2"] if to_all else []), start_new_session=True)
    wait_for(tmp_path / "run" / "state" / "codebook.ckpt", process)
    (os.killpg if to_all else os.kill)(process.pid, number)
    errors = finish(process, 128 + number)
    assert f"go on with `python train.py --resume --run {tmp_path / 'run'}`" in errors
    assert "Traceback" not in errors
    saved = torch.load(tmp_path / "run" / "state" / "codebook.ckpt", weights_only=True)
    assert f"saved at step {saved['step']};" in errors


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["alternating", "gaussian"])
def test_two_processes_agree_and_end(options, tmp_path, kind):
    """Two gloo processes share the batches; the run ends with the same files."""
    loop = ["--model.beta", "1", "--schedule", "alternating", "--quantizer", "GumbelQuantizer", *SIZES]
    args = gaussian(options) if kind == "gaussian" else [*options, *loop]
    finish(start(*args, "--devices", "2", "--strategy", "ddp", "--accelerator", "cpu"))
    assert json.loads((tmp_path / "run" / "elbo.json").read_text())["images"] > 0


def test_nan_stops_with_the_step_and_what_to_do(fails, options, tmp_path):
    line = fails(*options, "--codebook-fit.learning-rate", "1e30", "--codebook-fit.save-every", "1")
    saved = torch.load(tmp_path / "run" / "state" / "codebook.ckpt", weights_only=True)
    for said in ("codebook stopped at step 1", f"checkpoint is {tmp_path}", "--codebook-fit.learning-rate"):
        assert said in line
    assert f"of step {saved['step']}" in line
    assert all(torch.isfinite(value).all() for value in saved["module"].values())


@pytest.mark.parametrize("split", ["train", "test"])
def test_broken_images_are_named_and_counted(run, options, photos, tmp_path, capsys, split):
    spoiled = tmp_path / "spoiled"
    shutil.copytree(photos, spoiled)
    name = load_images(spoiled, split, size=8, channels=1).key(0)
    (spoiled / name).write_bytes((spoiled / name).read_bytes()[:60])
    run(*options, "--data.source", spoiled)
    out, errors = capsys.readouterr()
    assert f"skipped {name}: " in errors
    assert errors.count("skipped") == 1
    assert "(1 so far)" in errors
    assert ("1 that could not be read left out" in out) == (split == "test")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--preset", "mnist"), ("unknown preset 'mnist', expected one of fashion-mini, ",)),
        (("--preset", "folder"), ("--data.source",)),
        (("--preset", "folder", "--data.source", "/nowhere"), ("/nowhere",)),
        (("--preset", "folder", "--data.source", "empty"), ("empty",)),
        (("--preset",), ("--preset",)),
        (("--quantizer", "Magic"), ("unknown quantizer 'Magic'",)),
        (("--data.source", "nothing-known"), ("nothing-known",)),
        (("--model.image-size", "30"), ("multiple of downsampling",)),
        (("--model.width", "1000000000"), ("--model", "1000000000")),
        (("--model.quantizer.num-codes", "1000000000000"), ("--model.quantizer", "GB")),
        (("--prior.widht", "17"), ("--prior.widht", "perhaps you meant --prior.width")),
        (("--accelerator", "abacus"), ("Fabric refuses",)),
        (("--accelerator", "cuda"), ("CUDA", "['cpu']")),
        (("--devices", "100000", "--accelerator", "cpu"), ("--devices", "at most")),
        (("--precision", "7-true"), ("Fabric refuses",)),
        (("--resume",), ("holds no run to go on with",)),
        (("--stage", "evaluate"), ("holds no run to go on with",)),
        (("--stage", "everything"), ("--stage", "codebook")),
    ],
)
def test_mistakes_are_one_line(fails, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    line = fails(*args, "--run", tmp_path / "run")
    for word in words:
        assert word in line
    assert not (tmp_path / "run").exists()


def test_a_full_disk_keeps_the_last_checkpoint_and_a_corrupt_one_is_one_line(
    run, options, fails, tmp_path, monkeypatch
):
    run(*options, "--stage", "codebook", "--codebook-fit.num-steps", "2")
    path = tmp_path / "run" / "state" / "codebook.ckpt"
    before = path.read_bytes()
    resume = ["--resume", "--run", tmp_path / "run", "--codebook-fit.num-steps", "6"]

    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "no space is left on the disk" in fails(*resume)
    assert path.read_bytes() == before
    for content in (b"", before[:500], b"no checkpoint"):
        path.write_bytes(content)
        assert "codebook.ckpt is corrupt" in fails(*resume)


def test_options_survive_the_run_folder(run, options, tmp_path):
    """The later stages know the run's options by themselves, and leave its codebook."""
    folder = tmp_path / "run"
    run(*options, "--stage", "codebook", "--codebook-fit.num-steps", "1", "--seed", "5")
    known, before = load_run(folder), weights(folder)
    assert (known.seed, known.codebook_fit.num_steps) == (5, 1)
    again = parse(["--resume", "--run", str(folder), "--codebook-fit.num-steps", "4"])
    assert again.codebook_fit.num_steps == 4
    assert (again.model, again.data) == (known.model, known.data)
    for stage in ("prior", "evaluate"):
        run("--run", folder, "--stage", stage)
    assert weights(folder)["codebook"] == before["codebook"]
    assert (folder / "elbo.json").exists()
