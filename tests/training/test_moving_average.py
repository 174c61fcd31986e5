"""The moving average of weights: an average of what was learned, also where there were few steps."""

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from vqvae import VQVAE
from vqvae.training.learner import Average, Learner
from vqvae.training.objectives import CodebookObjective
from vqvae.training.options import FitConfig
from vqvae.training.sharding import ShardedAverage, decay_at

VALUES = [float(number) for number in range(1, 40)]


def expected(decay: float) -> float:
    """By the recurrence alone; the first value is taken whole."""
    average = VALUES[0]
    for number, value in enumerate(VALUES[1:], 1):
        share = min(decay, (1 + number) / (10 + number))
        average = share * average + (1 - share) * value
    return average


def test_it_forgets_where_it_began():
    assert decay_at(1, 0.999) == pytest.approx(2 / 11)
    assert decay_at(10**6, 0.999) == 0.999
    assert decay_at(1, 0.1) == 0.1
    # Of values that rise by one a step the average is near to the last, not to the first.
    assert VALUES[-1] - expected(0.999) < 8


@pytest.mark.parametrize("decay", [0.999, 0.5])
def test_both_kinds_are_the_recurrence(decay):
    options = FitConfig(num_steps=1, ema=decay)
    objective = CodebookObjective(VQVAE(image_size=8, width=8, num_blocks=0))
    learner = Learner(Fabric(accelerator="cpu", devices=1), objective, options)
    weight = next(objective.parameters())
    plain = nn.Linear(2, 2)
    sharded = ShardedAverage(plain, decay)
    for value in VALUES:
        with torch.no_grad():
            weight.fill_(value)
            plain.weight.fill_(value)
        learner.average.update_parameters(objective)
        sharded.update_parameters(plain)
    for found in (next(learner.average.module.parameters()), sharded.parts["weight"]):
        torch.testing.assert_close(found, torch.full_like(found, expected(decay)), rtol=1e-5, atol=0)


def test_the_first_update_is_a_copy_and_buffers_are_the_last():
    module = nn.BatchNorm1d(2)
    average = Average(module, 0.9)
    with torch.no_grad():
        module.weight.fill_(3)
    average.update_parameters(module)
    assert torch.equal(average.module.weight, module.weight)
    with torch.no_grad():
        module.weight.fill_(5)
        module.running_mean.fill_(7)
    average.update_parameters(module)
    torch.testing.assert_close(average.module.weight, torch.full((2,), 3 + 2 * 9 / 11))  # (1 + 1) / (10 + 1) of decay
    assert torch.equal(average.module.running_mean, module.running_mean)


def test_weights_of_half_precision_are_averaged_in_float32():
    """In bfloat16, with a decay of 0.999, an average would not move at all."""
    module = nn.Linear(1, 1)
    average = Average(module, 0.999)
    average.warms_up = False
    module.bfloat16()
    with torch.no_grad():
        module.weight.fill_(1)
        average.update_parameters(module)
        module.weight.fill_(2)
    for _ in range(100):
        average.update_parameters(module)
    found = average.module.weight
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(2 - 0.999**100, rel=1e-5)
