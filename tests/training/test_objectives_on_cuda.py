"""Steps of training on a GPU are those of the CPU; runs there beside runs here, and resumed."""

import copy
import json
import shlex
from pathlib import Path

import pytest
import torch
from device_worlds import DEVICES, check_same_there
from run_files import SMALL, stopped, without
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from vqvae.data import Batch, ImageTensors
from vqvae.data.batching import batches
from vqvae.training import devices
from vqvae.training.latents import Inputs
from vqvae.training.objectives import PriorObjective, codebook_objective
from vqvae.training.parsing import parse
from vqvae.training.prior_kinds import make_prior
from vqvae.training.sharding import decay_at

SIZES = [*SMALL, "--data.source", "."]
EYE = shlex.split("""
--model.image-size 16 --looks.l1 1 --looks.adversarial 0.1 --looks.start 0 --looks.width 8 --looks.num-halvings 1
""")
WAYS = {"codes": [], "for the eye": EYE, "a prior in the loop": ["--model.beta", "1"]}


def with_words(options: list[str], words: list[str]) -> list[str]:
    """Options, and others that take the place of some."""
    for name in words[::2]:
        options = without(name, options)
    return [*options, *words]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", WAYS)
def test_steps_of_a_codebook_are_those_of_the_cpu(way, device):
    """Forward, backward, the optimiser, statistics, the discriminator, and a moving average of the weights."""
    run = parse(with_words(SIZES, WAYS[way]))
    torch.manual_seed(0)
    model = run.model.build()
    data = {"train": ImageTensors(torch.randint(256, (8, 1, *model.size), dtype=torch.uint8))}
    fresh = codebook_objective(run, model, data).train()
    images = data["train"].images

    def go(place: torch.device) -> list[Tensor]:
        objective = copy.deepcopy(fresh).double().to(place)
        if objective.rival is not None:  # which is no part of the module, and has an optimiser of its own
            objective.rival.double().to(place)
        optimizer = torch.optim.SGD([each for each in objective.parameters() if each.requires_grad], lr=1e-3)
        average = AveragedModel(objective, multi_avg_fn=_average)
        torch.manual_seed(1)
        found = []
        for _ in range(3):
            terms = objective(images.to(place), None)
            terms["objective"].backward()
            objective.rest()
            optimizer.step()
            optimizer.zero_grad()
            objective.update()
            average.update_parameters(objective)
            found += [each.detach() for each in terms.values()]
            if objective.rival is not None:
                (seen,) = objective.rival.seen
                objective.rival.seen.clear()
                out = objective.rival(*seen)
                objective.rival.update(torch.stack([out["real"], out["fake"]]))
                found += [each.detach() for each in out.values()]
        return [*found, *average.module.state_dict().values()]

    check_same_there(go, device)


@torch.no_grad()
def _average(averages: list[Tensor], values: list[Tensor], num_averaged: Tensor | int) -> None:
    for average, value in zip(averages, values, strict=True):
        average.lerp_(value, 1 - decay_at(int(num_averaged), 0.9))


@pytest.mark.parametrize("device", DEVICES)
def test_steps_of_a_prior_are_those_of_the_cpu(device):
    run = parse(SIZES)
    torch.manual_seed(0)
    model = run.model.build()
    fresh = PriorObjective(make_prior(run.prior, model, None)).train()
    codes = torch.randint(model.num_codes, (8, *model.grid), dtype=torch.int32)  # as latents are held

    def go(place: torch.device) -> list[Tensor]:
        objective = copy.deepcopy(fresh).to(place)
        torch.manual_seed(1)
        terms = objective(codes.to(place), None)
        terms["objective"].backward()
        return [terms["rate"].detach(), *(each.grad for each in objective.parameters())]

    # Dropout is drawn by torch's own kernel, on a GPU by another.
    fresh.prior.trunk.trunk.dropout = 0.0
    for block in fresh.prior.trunk.trunk.blocks:
        block.dropout = 0.0
    check_same_there(go, device)


@pytest.mark.parametrize(
    ("accelerator", "with_emulation", "expected"),
    [("cuda", False, "32-true"), ("gpu", False, "32-true"), ("gpu", True, "bf16-mixed"), ("auto", True, "bf16-mixed")],
)
def test_precision_goes_by_the_gpu_that_is_asked_for(monkeypatch, accelerator, with_emulation, expected):
    """Not by the processor beside it, nor by what a GPU without such instructions can emulate, more slowly."""

    def supported(including_emulation: bool = True) -> bool:
        return with_emulation or including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: not with_emulation, raising=False)
    asked = {}
    monkeypatch.setattr(devices.Fabric, "__init__", lambda self, **options: asked.update(options))
    run = parse([*without("--precision", SIZES), "--accelerator", accelerator])
    devices.make_fabric(run)
    assert asked["precision"] == expected


@pytest.mark.cuda
def test_batches_are_pinned():
    """As a loader with `pin_memory` does it, images and labels."""
    batch = Batch(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)).pin_memory()
    assert batch.images.is_pinned()
    assert batch.labels.is_pinned()
    assert batch.images.to("cuda", non_blocking=True).is_cuda
    (read,) = batches(ImageTensors(torch.zeros(3, 1, 4, 4, dtype=torch.uint8)), 3)
    assert Inputs(read.images.cuda(), None).inputs.is_cuda


ON_GPU = ["--accelerator", "cuda"]
RUNS = {**WAYS, "workers": ["--data.num-workers", "2"]}


@pytest.mark.cuda
@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_a_gpu_says_what_one_on_the_cpu_says(run, options, tmp_path: Path, name):
    """The same figures to a few percent: a step is not the same to the bit. Its folder is read without a GPU."""
    words = with_words(options, RUNS[name])
    run(*words, *ON_GPU)
    on_gpu = json.loads((tmp_path / "run" / "elbo.json").read_text())
    (tmp_path / "run").rename(tmp_path / "gpu")
    run(*words, "--accelerator", "cpu")
    on_cpu = json.loads((tmp_path / "run" / "elbo.json").read_text())
    assert on_gpu["bits_per_dim"] == pytest.approx(on_cpu["bits_per_dim"], rel=0.05)
    run("evaluate", tmp_path / "gpu")  # which has no GPU


@pytest.mark.cuda
def test_a_run_on_a_gpu_is_resumed(run, options, tmp_path: Path, monkeypatch):
    run(*options, *ON_GPU)
    whole = (tmp_path / "run").rename(tmp_path / "whole")
    stopped(run, monkeypatch, tmp_path / "run", [*options, *ON_GPU], codebook=(3,), prior=(2,))
    run("--resume", "--run", tmp_path / "run")
    found, want = (json.loads((folder / "elbo.json").read_text()) for folder in (tmp_path / "run", whole))
    assert found["bits_per_dim"] == pytest.approx(want["bits_per_dim"], rel=1e-3)
