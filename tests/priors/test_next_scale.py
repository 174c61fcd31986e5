"""The prior of growing pictures against its equations in NumPy, and what only it does."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from prior_worlds import every_grid, make_next_scale, some_codes
from torch import Tensor
from trunk_reference import log_softmax, reference_trunk

from priors import NextScalePrior

SHAPES = [((1, 2, 3), None), ((1, 2), 2), ((2, 5), None), ((3,), 2), ((1, 2, 4), 3)]


def bicubic(picture: np.ndarray, size: int) -> np.ndarray:
    """A picture "s s w" at size x size: Keys' kernel with a = -0.75 along each axis, borders repeated."""

    def kernel(x: float) -> float:
        x, a = abs(x), -0.75
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    side, out = len(picture), np.zeros((size, size, picture.shape[2]))
    for i, j in np.ndindex(size, size):
        y, x = ((at + 0.5) * side / size - 0.5 for at in (i, j))
        for k, m in itertools.product(range(-1, 3), repeat=2):
            row, column = math.floor(y) + k, math.floor(x) + m
            clamped = picture[min(max(row, 0), side - 1), min(max(column, 0), side - 1)]
            out[i, j] += kernel(y - row) * kernel(x - column) * clamped
    return out


def averaged(picture: np.ndarray, size: int) -> np.ndarray:
    """A picture "s s w" at size x size: the mean of the positions that each touches."""
    side, out = len(picture), np.zeros((size, size, picture.shape[2]))
    for i, j in np.ndindex(size, size):
        rows, columns = (slice(at * side // size, -(-(at + 1) * side // size)) for at in (i, j))
        out[i, j] = picture[rows, columns].mean((0, 1))
    return out


def reference_conditionals(prior: NextScalePrior, codes: list[int], label: int | None) -> np.ndarray:
    """ln P(. | coarser scales) at each position of one row of codes, "n k"."""
    weights = {name: t.detach().numpy() for name, t in prior.state_dict().items()}
    finest = prior.scales[-1]
    label = len(weights["start.embedding.weight"]) - 1 if label is None else label
    total = np.zeros((finest, finest, prior.config.width))
    x, positions, seen, begin = [], [], [], 0
    for level, scale in enumerate(prior.scales):
        end = begin + scale**2
        start = weights["start.embedding.weight"][label]
        inputs = averaged(total, scale).reshape(scale**2, -1) if level else [start] * scale**2
        for i, (row, column) in enumerate(np.ndindex(scale, scale)):
            x.append(inputs[i] + weights["target"][begin + i] + weights["scale"][level])
            positions.append(tuple((at + 0.5) * finest / scale - 0.5 for at in (row, column)))
            seen.append(list(range(end)))
        total += bicubic(weights["code.weight"][codes[begin:end]].reshape(scale, scale, -1), finest)
        begin = end
    heads = prior.config.num_heads
    features = reference_trunk(weights, "trunk", x, positions, positions, (finest, finest), heads, seen)
    return np.array([log_softmax(weights["logits.weight"] @ feature) for feature in features])


@pytest.mark.parametrize(("scales", "num_classes"), SHAPES)
def test_conditionals_and_log_prob_are_the_reference_in_numpy(scales: tuple[int, ...], num_classes: int | None) -> None:
    prior = make_next_scale(num_codes=5, scales=scales, num_classes=num_classes, depth=1).double()
    codes = some_codes(prior, 2)
    for label in [None] if num_classes is None else [None, num_classes - 1]:
        labels = None if label is None else torch.full((2,), label)
        conditionals, log_probs = prior.log_conditionals(codes, labels).tolist(), prior.log_prob(codes, labels).tolist()
        for row, (conditional, log_prob) in enumerate(zip(conditionals, log_probs, strict=True)):
            expected = reference_conditionals(prior, codes[row].tolist(), label)
            assert np.abs(np.array(conditional) - expected).max() < 1e-10
            assert abs(log_prob - expected[np.arange(len(expected)), codes[row]].sum()) < 1e-10


def test_codes_of_a_scale_are_independent_given_the_coarser() -> None:
    prior = make_next_scale(num_codes=2, scales=(1, 2)).double()
    world = every_grid(prior)
    joint = prior.log_prob(world).detach().exp().view(2, 2, 2, 2, 2)
    for first in range(2):
        given = joint[first] / joint[first].sum()
        marginals = [given.sum([axis for axis in range(4) if axis != kept]) for kept in range(4)]
        torch.testing.assert_close(given, torch.einsum("a,b,c,d->abcd", *marginals), atol=1e-12, rtol=0)


def test_a_prior_in_bfloat16_gathers_in_float32() -> None:
    prior = make_next_scale(num_codes=4, scales=(1, 2, 3))
    assert not {"gathering", "scale_of"} & set(prior.state_dict())
    exact = prior.gathering.clone()
    low = prior.bfloat16()
    assert low.gathering.dtype == torch.float32
    assert torch.equal(low.gathering, exact)
    assert low.log_conditionals(torch.randint(4, (2, 14))).dtype == torch.float32
    assert low.sample(2).shape == (2, 14)


def test_it_learns_how_a_fine_scale_follows_from_a_coarse_one() -> None:
    """Four random quadrants; the finer picture repeats them, each position as its quadrant."""
    torch.manual_seed(0)
    prior = NextScalePrior(num_codes=3, scales=(2, 4), width=32, depth=1, num_heads=2)
    optimiser = torch.optim.AdamW(prior.parameters(), lr=3e-3)

    def draw(num: int) -> Tensor:
        coarse = torch.randint(3, (num, 2, 2))
        fine = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)
        return torch.cat((coarse.flatten(1), fine.flatten(1)), 1)

    for _ in range(250):
        optimiser.zero_grad()
        (-prior(draw(64)).mean()).backward()
        optimiser.step()
    prior.eval()
    codes = draw(64)
    nats = -F.nll_loss(prior.log_conditionals(codes).flatten(0, 1), codes.flatten(), reduction="none").view(64, 20)
    assert (nats[:, :4].mean() + math.log(3)).abs() < 0.1
    assert nats[:, 4:].mean() > -0.05
    drawn = prior.sample(64, generator=torch.Generator().manual_seed(0)).long()
    again = drawn[:, :4].view(64, 2, 2).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
    assert (drawn[:, 4:] == again).float().mean() > 0.95


def test_the_grid_follows_from_the_scales() -> None:
    assert NextScalePrior.Config(num_codes=4).grid == (79,)
    assert NextScalePrior.Config(num_codes=4, scales=[1, 2], grid=[5]) == NextScalePrior.Config(
        num_codes=4, scales=(1, 2)
    )
