"""Batches of one step, one after the other or on several processes, are one batch of all their images."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from run_files import stopped, weights, without
from safetensors.torch import load_file

from vqvae import VQVAE
from vqvae.training import loop, objectives
from vqvae.training.learner import Learner
from vqvae.training.looks_objective import LooksTerms
from vqvae.training.objectives import CodebookObjective
from vqvae.training.options import FitConfig, LooksConfig, load_run

PROJECT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
FSQ = ["--quantizer", "FSQ", "--model.quantizer.levels", "8", "8"]
LOOKS = ["--looks.l1", "0.5", "--looks.perceptual", "1", "--looks.adversarial", "0.5", "--looks.start", "1"]
LOOKS += ["--looks.ramp", "1", "--looks.width", "8", "--looks.num-halvings", "1", "--looks.lecam", "0.1"]
# How far apart rounding takes weights that steps of 2e-3 moved.
CLOSE = 1e-5


def batches(size: int, accumulate: int = 1) -> list[str]:
    """Of 54 training images, three steps of 16 are an epoch, whatever they are made of."""
    words = []
    for stage in ("codebook", "prior"):
        words += [f"--{stage}-fit.batch-size", str(size), f"--{stage}-fit.accumulate", str(accumulate)]
    return words


@pytest.fixture
def small(options: list[str]) -> list[str]:
    """The small run without its quantizer and its sizes of batches; nothing is drawn."""
    for each in ("--codebook-fit.batch-size", "--prior-fit.batch-size", "--prior.dropout", "--model.quantizer."):
        options = without(each, options)
    return [*options, "--prior.dropout", "0", "--prior.label-dropout", "0"]


@pytest.fixture
def looking(small: list[str]) -> list[str]:
    """The codebook alone, at 16x16, for the eye too."""
    sizes = [*without("--model.image-size", small), "--model.image-size", "16", *FSQ, "--stage", "codebook"]
    return [*sizes, *LOOKS, "--looks.no-augment"]


def apart(one: Path, other: Path) -> float:
    """How far the weights of two files are apart at most."""
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    return max((first[name].double() - second[name].double()).abs().max().item() for name in first)


def figures(folder: Path) -> dict[tuple[str, ...], float]:
    with (folder / "metrics.csv").open(newline="") as file:
        return {tuple(row[:4]): float(row[4]) for row in list(csv.reader(file))[1:] if row[3] != "seconds"}


def test_two_batches_of_a_step_are_one_of_twice_the_size(run, small, tmp_path):
    for name, each in {"whole": batches(16), "halves": batches(8, 2), "half": batches(8)}.items():
        run(*small, *FSQ, *each, "--run", tmp_path / name)
    for part in ("codebook", "prior"):
        whole, halves, half = (tmp_path / name / part / "model.safetensors" for name in ("whole", "halves", "half"))
        assert apart(whole, halves) < CLOSE < 100 * CLOSE < apart(whole, half)
    first, second = (figures(tmp_path / name) for name in ("whole", "halves"))
    # How many codes a batch uses is another figure of a smaller batch.
    same = [key for key in first if key[3] in ("objective", "distortion", "rate", "psnr")]
    assert len(same) > 10
    assert [second[key] for key in same] == pytest.approx([first[key] for key in same], rel=1e-4)


def test_statistics_of_a_step_are_of_all_its_batches(run, small, tmp_path):
    """A codebook of moving averages, which is at work already: what the k-means start draws hangs on rounding."""
    ema = [*small, "--stage", "codebook", "--model.quantizer.num-codes", "8", "--model.quantizer.dim", "4"]
    ema += ["--model.quantizer.revival", "off"]
    run(*ema, "--run", tmp_path / "begun")
    for name, each in {"whole": batches(16), "halves": batches(8, 2)}.items():
        run(*ema, *each, "--tokenizer", tmp_path / "begun", "--run", tmp_path / name)
    whole, halves, begun = (tmp_path / name / "codebook" / "model.safetensors" for name in ("whole", "halves", "begun"))
    assert apart(whole, halves) < CLOSE < 100 * CLOSE < apart(whole, begun)
    counts = [load_file(path)["quantizer.num_updates"].item() for path in (begun, whole, halves)]
    assert counts == [8, 16, 16]


@pytest.mark.parametrize("kind", ["looks", "live", "loop"])
def test_a_run_that_stops_in_the_middle_resumes_to_the_bit(run, small, looking, tmp_path, monkeypatch, kind):
    """With all draws: of dropout, of the discriminator's augmentation, of codes; and the bar counts images."""
    monkeypatch.setattr(objectives, "TURN", 2)
    gumbel = ["--quantizer", "GumbelQuantizer", "--model.quantizer.num-codes", "8", "--model.quantizer.dim", "4"]
    args = {
        "looks": [*looking, "--looks.augment", "--looks.r1", "0.1", "--codebook-fit.ema", "0.9"],
        "live": [*small, *gumbel, "--live", "--prior.dropout", "0.1"],
        "loop": [*small, *gumbel, "--model.beta", "1", "--schedule", "alternating"],
    }[kind]
    args += batches(8, 2)
    run(*args)
    whole, cut = tmp_path / "whole", tmp_path / "run"
    cut.rename(whole)
    bars = []
    progress = loop.Progress

    def noted(name, total, unit, **words):
        bars.append((words["start"], total))
        return progress(name, total, unit, **words)

    monkeypatch.setattr(loop, "Progress", noted)
    stages = {"codebook": (3, 4)} if kind == "looks" else {"codebook": (3,), "prior": (2,)}
    stopped(run, monkeypatch, cut, args, **stages)
    run("--resume", *(["--stage", "codebook"] if kind == "looks" else []), "--run", cut)
    assert weights(cut) == weights(whole)
    found = figures(cut)  # with those of steps after which it stopped
    assert all(found[key] == value for key, value in figures(whole).items())
    states = [torch.load(folder / "state" / "codebook.ckpt", weights_only=True) for folder in (cut, whole)]
    for name in states[0].keys() - {"seconds"}:
        assert json.dumps(states[0][name], default=plain) == json.dumps(states[1][name], default=plain), name
    assert bars[:2] == [(0, 8 * 16), (3 * 16, 8 * 16)]


def plain(tensor: torch.Tensor) -> str:
    return tensor.numpy().tobytes().hex()


def test_the_discriminator_learns_of_all_batches_of_a_step():
    """By one step, for a gradient and averages of all that it was shown, whatever parts that came in."""
    torch.manual_seed(0)
    seen = [torch.rand(8, 1, 16, 16) * 2 - 1 for _ in range(2)]
    found = []
    for parts in (1, 2):
        torch.manual_seed(1)
        model = VQVAE(image_size=16, width=8, num_blocks=0)
        options = LooksConfig(adversarial=0.1, start=0, width=8, num_halvings=1, augment=False, lecam=0.1, r1=0.1)
        objective = CodebookObjective(model, LooksTerms(options, model, 9))
        learner = Learner(Fabric(accelerator="cpu", devices=1), objective, FitConfig(num_steps=9))
        for step in range(3):
            objective.rival.seen += zip(*(each.chunk(parts) for each in seen), strict=True)
            terms = learner.step_rival()
            assert not objective.rival.seen
            assert objective.rival.num_updates == step + 1
        assert learner.step_rival() == {}
        found.append((terms, objective.rival.state_dict()))
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=CLOSE)


def test_a_number_that_makes_no_step_is_told_and_old_runs_are_read(run, options, fails, tmp_path):
    for stage in ("codebook", "prior"):
        assert f"got --{stage}-fit.accumulate 0, " in fails(*options, f"--{stage}-fit.accumulate", "0")
    assert not (tmp_path / "run").exists()
    run(*options, "--stage", "codebook", "--codebook-fit.num-steps", "1", "--codebook-fit.accumulate", "3")
    assert load_run(tmp_path / "run").codebook_fit.accumulate == 3
    path = tmp_path / "run" / "state" / "run.json"
    known = json.loads(path.read_text())
    del known["codebook_fit"]["accumulate"]
    path.write_text(json.dumps(known))
    assert load_run(tmp_path / "run").codebook_fit.accumulate == 1


# --- several processes ------------------------------------------------------------------------------------------------


def together(*words: object) -> None:
    ended = subprocess.run(
        [sys.executable, *map(str, words)], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr[-2000:]


@pytest.mark.slow
def test_two_processes_train_for_the_eye_as_one(looking, tmp_path):
    """They end with the weights of one process that has all images, and both with one discriminator, to the bit."""
    script = Path(__file__).with_name("discriminators_together.py")
    for devices, size in (("1", 16), ("2", 8)):
        (tmp_path / devices).mkdir()
        words = [*batches(size), "--accelerator", "cpu", "--devices", devices, "--run", tmp_path / f"of {devices}"]
        together(script, tmp_path / devices, *looking, *words)
    one, two = (tmp_path / f"of {devices}" / "codebook" / "model.safetensors" for devices in "12")
    assert apart(one, two) < CLOSE
    names = ("1/rival-0.safetensors", "2/rival-0.safetensors", "2/rival-1.safetensors")
    one, first, second = (tmp_path / name for name in names)
    assert apart(one, first) < CLOSE
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
def test_two_batches_on_two_processes_are_one(small, tmp_path):
    """Four quarters of a batch of 16; weights that are shared out, of a prior, wait for the last batch too."""
    train, one, two, sharded = PROJECT / "train.py", tmp_path / "one", tmp_path / "two", tmp_path / "sharded"
    quarters = ["--accelerator", "cpu", "--devices", "2", *batches(4, 2)]
    together(train, *small, *FSQ, *batches(16), "--run", one)
    together(train, *small, *FSQ, *quarters, "--run", two)
    prior = ["--stage", "prior", "--tokenizer", one, "--run", sharded, "--strategy", "fsdp"]
    together(train, *small, *quarters, *prior)
    for part, folder in (("codebook", two), ("prior", two), ("prior", sharded)):
        assert apart(one / part / "model.safetensors", folder / part / "model.safetensors") < CLOSE, (part, folder)
