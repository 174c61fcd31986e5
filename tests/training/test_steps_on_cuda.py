"""Steps of every objective on a GPU, pretended or there: what they compute is what they do on the CPU."""

import copy
import shlex

import pytest
import torch
from device_worlds import DEVICES, check_same_there
from run_files import SMALL, without
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from vqvae.data import ImageTensors
from vqvae.training import devices
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
