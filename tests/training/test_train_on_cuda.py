"""A run on a GPU, in every way to train that is another there; what it leaves is read on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_files import stopped, weights, without

from priors import TransformerPrior
from vqvae import VQVAE

PROJECT = Path(__file__).parents[2]
GPU = ["--accelerator", "cuda", "--devices", "1"]
WAYS = {
    "float32": [],
    "bfloat16": ["--precision", "bf16-mixed"],
    "average": ["--codebook-fit.ema", "0.9", "--prior-fit.ema", "0.9"],
    "accumulated": ["--codebook-fit.accumulate", "2", "--prior-fit.accumulate", "2"],
    "ddp": ["--strategy", "ddp"],  # over NCCL, though with one process
    "compiled": ["--compile"],
}


def train(*words: object) -> None:
    command = [sys.executable, "train.py", *map(str, words)]
    done = subprocess.run(
        command,
        cwd=PROJECT,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.cuda
@pytest.mark.parametrize("way", WAYS)
def test_a_run_on_a_gpu_is_read_on_the_cpu(way: str, options: list[str], tmp_path: Path) -> None:
    given = without("--precision", options[:-2]) if way == "bfloat16" else options[:-2]
    words = [*given, *GPU, *WAYS[way]]
    train(*words, "--run", tmp_path / "run")
    model = VQVAE.from_pretrained(tmp_path / "run")
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    codes = model.encode(images)
    assert codes.device.type == "cpu"
    assert torch.isfinite(TransformerPrior.from_pretrained(tmp_path / "run").log_prob(codes)).all()
    assert 0 < json.loads((tmp_path / "run" / "elbo.json").read_text())["bits_per_dim"] < 20


@pytest.mark.cuda
def test_a_run_on_a_gpu_goes_on_to_the_bit(run, options: list[str], tmp_path: Path, monkeypatch) -> None:
    run(*options[:-2], *GPU, "--run", tmp_path / "whole")
    parts = [*options[:-2], *GPU, "--run", str(tmp_path / "parts")]
    stopped(run, monkeypatch, tmp_path / "parts", parts, codebook=[3], prior=[2])
    run("--resume", "--run", tmp_path / "parts")
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")


@pytest.mark.cuda
def test_muon_and_a_draft(options: list[str], tmp_path: Path) -> None:
    train(*options[:-2], *GPU, "--prior-fit.muon", 0.05, "--draft", "yes", "--run", tmp_path / "run")
    assert (tmp_path / "run" / "draft" / "model.safetensors").exists()


@pytest.mark.cuda
def test_a_prior_whose_weights_are_shared_out(options: list[str], tmp_path: Path) -> None:
    train(*options[:-2], *GPU, "--run", tmp_path / "run")
    fsdp = ["--stage", "prior", "--tokenizer", tmp_path / "run", "--strategy", "fsdp"]
    train(*options[:-2], *GPU, *fsdp, "--run", tmp_path / "shared")
    assert (tmp_path / "shared" / "prior" / "model.safetensors").exists()
