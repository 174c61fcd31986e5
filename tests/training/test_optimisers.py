"""Muon for the matrices of a transformer beside AdamW, as one optimiser; fused steps; and what checkpoints hold."""

import copy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_files import ROOT, weights, without
from torch import Tensor

from priors import PixelCNNPrior, TransformerPrior
from vqvae.training.optimisers import MuonAndAdamW, can_fuse, make_optimiser, matrices_of

RATES = {"learning_rate": 2e-3, "weight_decay": 0.01, "fused": False}
MUON = ("--prior-fit.muon", "0.05")


def make_prior() -> TransformerPrior:
    torch.manual_seed(0)
    return TransformerPrior(num_codes=5, grid=(2, 3), width=16, depth=2, num_heads=2, num_classes=3)


def learn(prior: TransformerPrior, optimiser: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        codes = torch.randint(5, (4, 2, 3), generator=torch.Generator().manual_seed(step))
        optimiser.zero_grad()
        (-prior(codes).mean()).backward()
        optimiser.step()


def values(prior: TransformerPrior) -> list[Tensor]:
    return [weight.detach().clone() for weight in prior.parameters()]


def test_matrices_are_those_between_hidden_vectors() -> None:
    prior = make_prior()
    found = {id(weight) for weight in matrices_of(prior)}
    names = {name for name, weight in prior.named_parameters() if id(weight) in found}
    assert names == {name for name, _ in prior.named_parameters() if ".blocks." in name}
    assert len(names) == 8
    assert not matrices_of(PixelCNNPrior(num_codes=3, grid=(2, 2), width=8, depth=1))


def test_the_two_are_what_they_are_apart() -> None:
    one, other = make_prior(), make_prior()
    together, rates = make_optimiser(one, muon=0.05, **RATES)
    assert rates == [0.05, 2e-3]
    chosen = {id(weight) for weight in matrices_of(other)}
    rest = [weight for weight in other.parameters() if id(weight) not in chosen]
    apart = [
        torch.optim.Muon(matrices_of(other), lr=0.05, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01),
    ]
    learn(one, together, 3)
    for step in range(3):
        codes = torch.randint(5, (4, 2, 3), generator=torch.Generator().manual_seed(step))
        (-other(codes).mean()).backward()
        for optimiser in apart:
            optimiser.step()
            optimiser.zero_grad()
    assert all(map(torch.equal, values(one), values(other)))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("muon", [None, 0.05])
def test_a_state_that_was_saved_goes_on(tmp_path: Path, muon: float | None, fused: bool) -> None:
    options = {**RATES, "muon": muon, "fused": fused}
    whole = make_prior()
    learn(whole, make_optimiser(whole, **options)[0], 5)
    first = make_prior()
    optimiser, _ = make_optimiser(first, **options)
    learn(first, optimiser, 2)
    torch.save(optimiser.state_dict(), tmp_path / "state")
    second = copy.deepcopy(first)
    again, _ = make_optimiser(second, **options)
    again.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert isinstance(again, MuonAndAdamW) == (muon is not None)
    learn(second, again, 3, start=2)
    assert all(map(torch.equal, values(whole), values(second)))


def test_a_state_of_before_stays_what_it_was() -> None:
    """One that was not fused goes on so, and so gives the same weights as before."""
    prior, other = make_prior(), make_prior()
    plain, fused = (
        make_optimiser(prior, muon=None, **RATES)[0],
        make_optimiser(other, muon=None, **{**RATES, "fused": True})[0],
    )
    learn(prior, plain, 2)
    other.load_state_dict(prior.state_dict())
    fused.load_state_dict(copy.deepcopy(plain.state_dict()))
    learn(prior, plain, 2, start=2)
    learn(other, fused, 2, start=2)
    assert all(map(torch.equal, values(prior), values(other)))


def test_what_is_fused() -> None:
    assert can_fuse(torch.device("cpu"), "bf16-mixed")
    assert can_fuse(torch.device("cuda"), "32-true")
    assert not can_fuse(torch.device("cuda"), "16-mixed")
    assert not can_fuse(torch.device("mps"), "32-true")


@pytest.mark.slow
def test_a_run_by_muon_that_was_killed_goes_on(options: list[str], tmp_path: Path) -> None:
    killed = [sys.executable, Path(__file__).with_name("killed_at_step.py"), "12", *options, *MUON]
    process = subprocess.run(killed, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == -signal.SIGKILL, process.stderr
    program = [sys.executable, ROOT / "train.py"]
    subprocess.run([*program, "--resume", "--run", tmp_path / "run"], cwd=ROOT, check=True, timeout=300)
    subprocess.run([*program, *options, *MUON, "--run", tmp_path / "whole"], cwd=ROOT, check=True, timeout=300)
    subprocess.run([*program, *options, "--run", tmp_path / "adamw"], cwd=ROOT, check=True, timeout=300)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert weights(tmp_path / "run")["prior"] != weights(tmp_path / "adamw")["prior"]


def test_what_muon_is_not_for(fails, options: list[str], tmp_path: Path) -> None:
    assert "convolutions have none" in fails(*options, "--codebook-fit.muon", "0.05")
    assert "--prior-kind PixelCNN" in fails(*without("--prior.", options), *MUON, "--prior-kind", "PixelCNN")
    assert "--prior-fit.muon -1" in fails(*options, "--prior-fit.muon", "-1")
    assert not (tmp_path / "run").exists()
