"""The prior of growing pictures against its equations in NumPy, and what only it does."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from prior_worlds import every_grid, make_next_scale, some_labels
from torch import Tensor
from trunk_reference import log_softmax, reference_trunk

from priors import NextScalePrior, Prior
from priors.kv_cache import CachedTrunk
from priors.precision import Arithmetic
from priors.sampling import known_chooser
from priors.walks import WalkStart

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
    torch.manual_seed(1)
    codes = torch.randint(5, (2, *prior.grid))
    for label in [None] if num_classes is None else [None, num_classes - 1]:
        labels = None if label is None else torch.full((2,), label)
        conditionals, log_probs = prior.log_conditionals(codes, labels).tolist(), prior.log_prob(codes, labels).tolist()
        for row, (conditional, log_prob) in enumerate(zip(conditionals, log_probs, strict=True)):
            expected = reference_conditionals(prior, codes[row].tolist(), label)
            assert np.abs(np.array(conditional) - expected).max() < 1e-10
            assert abs(log_prob - expected[np.arange(len(expected)), codes[row]].sum()) < 1e-10


@pytest.mark.parametrize("scales", [(1, 2, 3), (2, 3)])
def test_a_conditional_depends_on_all_coarser_scales_and_nothing_else(scales: tuple[int, ...]) -> None:
    prior = make_next_scale(num_codes=5, scales=scales)
    num, level = prior.num_positions, [i for i, scale in enumerate(scales) for _ in range(scale**2)]
    torch.manual_seed(0)
    weights = torch.randn(2, num, 5).softmax(-1).requires_grad_()
    conditionals = prior._relaxed_log_conditionals(weights, None)
    codes = torch.randint(5, (4, num))
    base = prior._log_conditionals(codes, None)
    for position in range(num):
        target = conditionals[:, position].square().sum()
        reach = torch.autograd.grad(target, weights, retain_graph=True)[0].abs().sum((0, 2))
        assert (reach > 0).tolist() == [level[before] < level[position] for before in range(num)]
        other = codes.clone()
        other[:, position] = (codes[:, position] + 1) % 5
        changed = (prior._log_conditionals(other, None) != base).any(-1).all(0).tolist()
        assert changed == [level[after] > level[position] for after in range(num)]


@pytest.mark.parametrize("num_classes", [None, 2])
def test_a_walk_after_any_prefix_takes_a_step_a_scale(num_classes: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = make_next_scale(num_codes=4, scales=(1, 2, 3), num_classes=num_classes).double()
    torch.manual_seed(0)
    codes, labels = torch.randint(4, (3, 14)), prior._check_labels(some_labels(prior, 3), 3)
    expected = prior._log_conditionals(codes, labels).detach()
    inputs, ends = [], [1, 5, 14]
    original = CachedTrunk.__call__

    def counted(self: CachedTrunk, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        inputs.append(x.shape[1])
        return original(self, x, *arguments, **options)

    monkeypatch.setattr(CachedTrunk, "__call__", counted)
    for prefix in range(14):
        inputs.clear()
        left = [end for end in ends if end > prefix]
        bounds = [0, prefix, *left]
        with torch.no_grad():
            step = prior._start_walk(WalkStart(3, labels, Arithmetic(prior.dtype)))
            conditionals = [step(codes[:, begin:end]) for begin, end in itertools.pairwise(bounds[:-1])]
        sizes = [end - begin for begin, end in itertools.pairwise(bounds[1:])]
        assert [conditional.shape[1] for conditional in conditionals] == sizes
        torch.testing.assert_close(torch.cat(conditionals, 1), expected[:, prefix:], atol=1e-11, rtol=0)
        assert inputs == [left[0], *(end - begin for begin, end in itertools.pairwise(left))]


def test_codes_of_a_scale_are_independent_given_the_coarser() -> None:
    prior = make_next_scale(num_codes=2, scales=(1, 2)).double()
    world = every_grid(prior)
    joint = prior.log_prob(world).detach().exp().view(2, 2, 2, 2, 2)
    for first in range(2):
        given = joint[first] / joint[first].sum()
        marginals = [given.sum([axis for axis in range(4) if axis != kept]) for kept in range(4)]
        torch.testing.assert_close(given, torch.einsum("a,b,c,d->abcd", *marginals), atol=1e-12, rtol=0)


def test_guidance_and_known_codes_in_the_middle_of_a_scale() -> None:
    prior = make_next_scale(num_codes=4, scales=(1, 2, 3), num_classes=2).double()
    torch.manual_seed(0)
    codes, labels = torch.randint(4, (3, 14)), torch.tensor([0, 1, 1])
    strengths = [1 + 0.2 * position for position in range(14)]
    given, free = prior.log_conditionals(codes, labels), prior.log_conditionals(codes)
    mixed = (free + torch.tensor(strengths, dtype=torch.float64)[:, None] * (given - free)).log_softmax(-1)
    for prefix in (0, 1, 3, 5, 9):
        chooser = known_chooser(codes[:, prefix:])
        prior.walk(3, chooser, labels, guidance=strengths, prefix=codes[:, :prefix])
        expected = mixed.gather(-1, codes[..., None])[:, prefix:, 0].sum(1)
        torch.testing.assert_close(chooser.log_prob, expected, atol=1e-11, rtol=0)
    # Rows whose known parts end at different positions.
    mask = torch.arange(14) >= torch.tensor([[1], [3], [8]])
    drawn = prior.sample(3, labels, given=codes, mask=mask)
    assert torch.equal(drawn[~mask], codes[~mask])


def test_relaxed_gradients_are_those_of_finite_differences() -> None:
    prior = make_next_scale(num_codes=3, scales=(1, 2), width=8, depth=1, num_heads=1).double()
    weights = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).double().softmax(-1)
    assert torch.autograd.gradcheck(prior.relaxed_log_conditionals, (weights.requires_grad_(),))


def test_every_weight_gets_a_gradient_with_and_without_checkpointing() -> None:
    codes = torch.arange(56).reshape(4, 14) % 4
    gradients = []
    for checkpointing in (False, True):
        sizes = {"num_classes": 2, "checkpointing": checkpointing, "label_dropout": 0.0}
        prior = make_next_scale(num_codes=4, scales=(1, 2, 3), **sizes)
        (-prior.train()(codes, torch.tensor([0, 1, 0, 1])).mean()).backward()
        gradients.append(dict(prior.named_parameters()))
    for name, weight in gradients[0].items():
        assert weight.grad is not None, name
        assert weight.grad.abs().sum() > 0, name
        torch.testing.assert_close(weight.grad, gradients[1][name].grad)


def test_code_noise_is_for_training_only() -> None:
    prior = make_next_scale(num_codes=4, scales=(1, 2, 3), code_noise=0.5)
    codes = torch.zeros(3, 14, dtype=torch.int64)
    assert torch.equal(prior(codes), make_next_scale(num_codes=4, scales=(1, 2, 3))(codes))
    torch.manual_seed(0)
    prior.train()
    assert not torch.equal(prior(codes), prior(codes))


def test_saved_and_loaded_in_full(tmp_path: Path) -> None:
    prior = make_next_scale(num_codes=4, scales=(1, 2, 3), num_classes=2)
    codes = torch.randint(4, (3, 14))
    assert not {"gathering", "scale_of"} & set(prior.state_dict())
    for saved in (prior, prior.double()):
        saved.save_pretrained(tmp_path / "prior")
        again = Prior.from_pretrained(tmp_path / "prior")
        assert isinstance(again, NextScalePrior)
        assert again.config == prior.config
        assert torch.equal(again.log_prob(codes), saved.log_prob(codes))


def test_a_prior_in_bfloat16_gathers_in_float32() -> None:
    prior = make_next_scale(num_codes=4, scales=(1, 2, 3))
    exact = prior.gathering.clone()
    low = prior.bfloat16()
    assert low.gathering.dtype == torch.float32
    assert torch.equal(low.gathering, exact)
    assert low.log_conditionals(torch.randint(4, (2, 14))).dtype == torch.float32
    assert low.sample(2).shape == (2, 14)


def test_it_learns_how_a_fine_scale_follows_from_a_coarse_one() -> None:
    """Four random quadrants; the finer picture repeats them, each position as its quadrant."""
    torch.manual_seed(0)
    config = NextScalePrior.Config(num_codes=3, scales=(2, 4), width=32, depth=1, num_heads=2)
    prior = config.build()
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": ()}, r"scales=\(\), expected the sides"),
        ({"scales": 4}, "scales=4 for NextScalePrior, expected a tuple of integers"),
        ({"scales": (0, 2)}, "a scale=0"),
        ({"scales": (1, 2.0)}, r"scales=\(1, 2.0\) for NextScalePrior, expected a tuple of integers"),
        ({"scales": (1, 3, 3)}, r"scales=\(1, 3, 3\), expected each larger than the one before"),
        ({"grid": (6,)}, r"grid=\(6,\) with scales=\(1, 2\), expected \(5,\)"),
        ({"grid": (1, 5)}, r"grid=\(1, 5\) with scales=\(1, 2\), expected \(5,\)"),
        ({"grid": 5}, "grid=5"),
        ({"width": 8, "num_heads": 4}, "heads of 2 channels for a grid of 2 axes"),
        ({"num_codes": 0}, "num_codes=0"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"label_dropout": 1.0}, "label_dropout=1.0"),
        ({"code_noise": -0.5}, "code_noise=-0.5"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_bad_configs(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NextScalePrior.Config(**{"num_codes": 4, "scales": (1, 2), **options})
