"""The draft of a prior: fitted after it, in a folder of its own, and used by `vqvae sample`."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_files import ROOT, weights

from priors import DraftHead, Prior
from vqvae.training.draft import draft_options
from vqvae.training.options import FitConfig

STEPS = ("--codebook-fit.num-steps", "4", "--prior-fit.num-steps", "40")


def test_a_run_with_a_draft(run, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(*options, *STEPS, "--draft", "yes")
    assert "draft: 10 steps done" in capsys.readouterr().err
    folder = tmp_path / "run"
    head, prior = DraftHead.from_pretrained(folder), Prior.from_pretrained(folder)
    head.check_fits(prior)
    assert (head.accepted > 0).tolist() == [True, True, True, False]  # after the first of four codes
    held = torch.load(folder / "state" / "draft.ckpt", weights_only=True)["module"]
    assert not any(name.startswith("prior") for name in held)
    # Sampled by it, and without; by any prior of the codes, and with what was measured.
    run("sample", folder, "--num", "4", "--num-proposals", "2", "--output", tmp_path / "a.png")
    run("sample", folder, "--num", "4", "--num-proposals", "2", "--output", tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    run("sample", folder, "--num", "4", "--draft", "none", "--output", tmp_path / "c.png")
    run("sample", folder, "--num", "4", "--draft", folder / "ngram", "--output", tmp_path / "d.png")
    run("sample", folder, "--num", "4", "--draft", folder / "draft", "--verbose", "--output", tmp_path / "e.png")
    run("sample", folder, "--seeds", "1", "2", "--output", tmp_path / "f.png")
    run("sample", folder, "--num", "4", "--guidance", "2", "--num-proposals", "1", "--output", tmp_path / "g.png")


def test_a_small_prior_gets_none_unless_asked(run, options: list[str], tmp_path: Path) -> None:
    run(*options, *STEPS)
    assert not (tmp_path / "run" / "draft").exists()
    # A finished run gets one later, and nothing else of it changes.
    before = {path: path.read_bytes() for path in (tmp_path / "run" / "prior").iterdir()}
    run("--resume", "--run", tmp_path / "run", "--draft", "yes")
    assert (tmp_path / "run" / "draft").exists()
    assert before == {path: path.read_bytes() for path in (tmp_path / "run" / "prior").iterdir()}


def test_what_a_draft_is_not_for(run, fails, options: list[str], tmp_path: Path) -> None:
    said = fails(*options, *STEPS, "--draft", "yes", "--prior-kind", "AnyOrder")
    assert "--draft yes is for a transformer over codes" in said
    assert not (tmp_path / "run").exists()
    run(*options, *STEPS)
    folder = tmp_path / "run"
    shared_out = ("--stage", "prior", "--strategy", "fsdp", "--run", folder, "--resume", "--draft", "yes")
    assert "--draft yes is for a prior on one device" in fails(*shared_out)
    assert "draft" in fails("sample", folder, "--draft", tmp_path / "missing")
    assert "without a draft" in fails("sample", folder, "--num-proposals", "2", "--draft", "none")
    assert "expected one of the two" in fails("sample", folder, "--draft", folder / "ngram", "--seeds", "1")


def test_options_of_the_fit() -> None:
    found = draft_options(FitConfig(num_steps=1500, batch_size=64, learning_rate=2e-3, num_warmup=100, ema=0.99))
    assert (found.num_steps, found.batch_size, found.num_warmup) == (375, 16, 25)
    assert found.learning_rate == 1e-2
    assert found.ema is None
    least = draft_options(FitConfig(num_steps=1, batch_size=1, validate_every=1, save_every=1))
    assert (least.num_steps, least.batch_size, least.validate_every, least.save_every) == (1, 1, 1, 1)


@pytest.mark.slow
def test_a_draft_that_was_killed_goes_on(options: list[str], tmp_path: Path) -> None:
    killed = [sys.executable, Path(__file__).with_name("killed_at_step.py"), "50", *options, *STEPS, "--draft", "yes"]
    killed += ["--prior-fit.save-every", "8"]
    process = subprocess.run(killed, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert (tmp_path / "run" / "state" / "draft.ckpt").exists()
    assert not (tmp_path / "run" / "draft").exists()
    program = [sys.executable, ROOT / "train.py"]
    subprocess.run([*program, "--resume", "--run", tmp_path / "run"], cwd=ROOT, check=True, timeout=300)
    whole = [*program, *options, *STEPS, "--draft", "yes", "--prior-fit.save-every", "8", "--run", tmp_path / "whole"]
    subprocess.run(whole, cwd=ROOT, check=True, timeout=300)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
