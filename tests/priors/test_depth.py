"""The prior of two transformers against its equations in NumPy, and what only it does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prior_worlds import make_depth, some_labels
from torch import Tensor
from torch.nn import functional as F
from trunk_reference import log_softmax, reference_trunk

from priors import DepthTransformerPrior, Prior, Sampling
from priors.kv_cache import CachedTrunk
from priors.precision import Arithmetic
from priors.sampling import known_chooser
from priors.walks import WalkStart

SHAPES = [((2, 3, 3), None), ((2, 3, 2), 2), ((3, 2), None), ((2, 2, 1), 2), ((1, 4), None), ((2, 1, 2, 2), None)]


def reference_conditionals(prior: DepthTransformerPrior, codes: list[int], label: int | None) -> np.ndarray:
    """ln P(. | before) at each code of one grid, "n k"."""
    weights = {name: t.detach().numpy() for name, t in prior.state_dict().items()}
    *grid, d = prior.grid
    split = [codes[begin : begin + d] for begin in range(0, len(codes), d)]
    embedded = [[weights[f"code.{j}.weight"][code] for j, code in enumerate(position)] for position in split]
    label = len(weights["start.embedding.weight"]) - 1 if label is None else label
    tokens = [weights["start.embedding.weight"][label], *(np.sum(vectors, 0) for vectors in embedded[:-1])]

    def features(name: str, tokens: list[np.ndarray], sizes: tuple[int, ...]) -> list[np.ndarray]:
        positions = list(np.ndindex(*sizes))
        held = [tuple(-1 for _ in sizes), *positions[:-1]]
        x = [token + weights[f"{name}.target"][i] for i, token in enumerate(tokens)]
        seen = [list(range(i + 1)) for i in range(len(x))]
        return reference_trunk(weights, f"{name}.trunk", x, positions, held, sizes, prior.config.num_heads, seen)

    conditionals = []
    for position, vectors in zip(features("trunk", tokens, tuple(grid)), embedded, strict=True):
        for j, feature in enumerate(features("code_trunk", [position, *np.cumsum(vectors, 0)[:-1]], (d,))):
            conditionals.append(log_softmax(weights[f"logits.{j}.weight"] @ feature))
    return np.array(conditionals)


@pytest.mark.parametrize(("grid", "num_classes"), SHAPES)
def test_conditionals_and_log_prob_are_the_reference_in_numpy(grid: tuple[int, ...], num_classes: int | None) -> None:
    prior = make_depth(num_codes=5, grid=grid, num_classes=num_classes, depth=1).double()
    torch.manual_seed(1)
    codes = torch.randint(5, (2, *grid))
    for label in [None] if num_classes is None else [None, num_classes - 1]:
        labels = None if label is None else torch.full((2,), label)
        conditionals, log_probs = prior.log_conditionals(codes, labels).flatten(1, -2), prior.log_prob(codes, labels)
        for row, (conditional, log_prob) in enumerate(zip(conditionals.tolist(), log_probs.tolist(), strict=True)):
            flat = codes[row].flatten().tolist()
            expected = reference_conditionals(prior, flat, label)
            assert np.abs(np.array(conditional) - expected).max() < 1e-10
            assert abs(log_prob - expected[np.arange(len(flat)), flat].sum()) < 1e-10


def test_a_conditional_depends_on_exactly_the_codes_before_it() -> None:
    prior = make_depth(num_codes=5, grid=(2, 2, 3))
    torch.manual_seed(0)
    weights = torch.randn(2, 12, 5).softmax(-1).requires_grad_()
    conditionals = prior._relaxed_log_conditionals(weights, None)
    codes = torch.randint(5, (4, 12))
    base = prior._log_conditionals(codes, None)
    for position in range(12):
        reach = (
            torch.autograd.grad(conditionals[:, position].square().sum(), weights, retain_graph=True)[0]
            .abs()
            .sum((0, 2))
        )
        assert (reach > 0).tolist() == [before < position for before in range(12)]
        other = codes.clone()
        other[:, position] = (codes[:, position] + 1) % 5
        changed = (prior._log_conditionals(other, None) != base).any(-1).all(0).tolist()
        assert changed == [after > position for after in range(12)]


@pytest.mark.parametrize("num_classes", [None, 2])
def test_a_walk_after_any_prefix_takes_a_large_step_a_position(
    num_classes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    prior = make_depth(num_codes=4, grid=(2, 2, 3), num_classes=num_classes).double()
    torch.manual_seed(0)
    codes, labels = torch.randint(4, (3, 12)), prior._check_labels(some_labels(prior, 3), 3)
    expected = prior._log_conditionals(codes, labels).detach()
    inputs: dict[CachedTrunk, list[int]] = {}
    original = CachedTrunk.__call__

    def counted(self: CachedTrunk, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        inputs.setdefault(self, []).append(x.shape[1])
        return original(self, x, *arguments, **options)

    monkeypatch.setattr(CachedTrunk, "__call__", counted)
    for prefix in range(12):
        inputs.clear()
        with torch.no_grad():
            step = prior._start_walk(WalkStart(3, labels, Arithmetic(prior.dtype)))
            conditionals = [step(codes[:, :prefix]), *(step(codes[:, i : i + 1]) for i in range(prefix, 11))]
        torch.testing.assert_close(torch.cat(conditionals, 1), expected[:, prefix:], atol=1e-11, rtol=0)
        large, small = inputs.values()
        whole, part = divmod(prefix, 3)
        assert large == [whole + 1] + [1] * (3 - whole)
        assert small == [part + 1] + [1] * (11 - prefix)


def test_guidance_and_known_codes_in_the_middle_of_a_position() -> None:
    prior = make_depth(num_codes=4, grid=(2, 1, 3), num_classes=2).double()
    torch.manual_seed(0)
    codes, labels = torch.randint(4, (3, 2, 1, 3)), torch.tensor([0, 1, 1])
    given, free = prior.log_conditionals(codes, labels), prior.log_conditionals(codes)
    mixed = (free + 2.5 * (given - free)).log_softmax(-1).flatten(1, -2)
    for prefix in (0, 1, 4):
        chooser = known_chooser(codes.flatten(1)[:, prefix:])
        prior.walk(3, chooser, labels, guidance=2.5, prefix=codes.flatten(1)[:, :prefix])
        expected = mixed.gather(-1, codes.flatten(1)[..., None])[:, prefix:, 0].sum(1)
        torch.testing.assert_close(chooser.log_prob, expected, atol=1e-11, rtol=0)
    # Grids whose known parts end at different codes.
    mask = torch.arange(6) >= torch.tensor([[1], [2], [5]])
    drawn = prior.sample(3, labels, given=codes, mask=mask.view(3, 2, 1, 3))
    assert torch.equal(drawn.flatten(1)[~mask], codes.flatten(1)[~mask])


def test_relaxed_gradients_are_those_of_finite_differences() -> None:
    prior = make_depth(num_codes=3, grid=(2, 2), width=8, depth=1, code_depth=1, num_heads=1).double()
    weights = torch.randn(2, 2, 2, 3, generator=torch.Generator().manual_seed(0)).double().softmax(-1)
    assert torch.autograd.gradcheck(prior.relaxed_log_conditionals, (weights.requires_grad_(),))


def test_every_weight_gets_a_gradient_with_and_without_checkpointing() -> None:
    codes = torch.arange(48).reshape(4, 2, 2, 3) % 4
    gradients = []
    for checkpointing in (False, True):
        prior = make_depth(num_codes=4, grid=(2, 2, 3), num_classes=2, checkpointing=checkpointing, label_dropout=0.0)
        (-prior.train()(codes, torch.tensor([0, 1, 0, 1])).mean()).backward()
        gradients.append(dict(prior.named_parameters()))
    for name, weight in gradients[0].items():
        assert weight.grad is not None, name
        assert weight.grad.abs().sum() > 0, name
        torch.testing.assert_close(weight.grad, gradients[1][name].grad)


def test_code_noise_is_for_training_only() -> None:
    prior = make_depth(num_codes=4, grid=(2, 2, 2), code_noise=0.5)
    codes = torch.zeros(3, 2, 2, 2, dtype=torch.int64)
    assert torch.equal(prior(codes), make_depth(num_codes=4, grid=(2, 2, 2))(codes))
    torch.manual_seed(0)
    prior.train()
    assert not torch.equal(prior(codes), prior(codes))


def test_saved_and_loaded_in_full(tmp_path: Path) -> None:
    prior = make_depth(num_codes=4, grid=(2, 2, 3), num_classes=2, code_depth=1)
    prior.save_pretrained(tmp_path / "prior")
    again = Prior.from_pretrained(tmp_path / "prior")
    assert isinstance(again, DepthTransformerPrior)
    assert again.config == prior.config
    codes = torch.randint(4, (3, 2, 2, 3))
    assert torch.equal(again.log_prob(codes), prior.log_prob(codes))


def test_walk_bytes_are_those_of_its_caches() -> None:
    prior = make_depth(num_codes=4, grid=(3, 2, 4), depth=3, code_depth=1)
    # Keys and values, of 3 layers at 6 positions and of 1 layer at 4 codes.
    caches = 2 * (3 * 6 + 1 * 4) * 24 * 4
    # Of each input what a step needs beside them, as much as 16 vectors and the scores of two heads.
    of_a_position, of_a_code = (16 * 24 + 2 * 6) * 4, (16 * 24 + 2 * 4) * 4
    assert prior.walk_bytes(Arithmetic(torch.float32)) == caches + of_a_position + of_a_code
    assert prior.walk_bytes(Arithmetic(torch.float32), 5) == caches + 5 * of_a_position + of_a_code


def test_it_learns_how_codes_hang_together_in_a_position_and_between_positions() -> None:
    """The second code is the first plus one; the first code is the second of the position before."""
    torch.manual_seed(0)
    config = DepthTransformerPrior.Config(num_codes=4, grid=(4, 2), width=32, depth=1, code_depth=1, num_heads=2)
    prior = config.build()
    optimiser = torch.optim.AdamW(prior.parameters(), lr=3e-3)
    first = torch.arange(64) % 4
    codes = torch.stack([(first[:, None] + torch.arange(4)) % 4, (first[:, None] + torch.arange(4) + 1) % 4], -1)
    for _ in range(150):
        optimiser.zero_grad()
        (-prior(codes).mean()).backward()
        optimiser.step()
    prior.eval()
    conditionals = prior.log_conditionals(codes[:4]).gather(-1, codes[:4, ..., None])[..., 0].flatten(1)
    assert (conditionals[:, 0] - F.log_softmax(torch.zeros(4), 0)).abs().max() < 0.1
    assert conditionals[:, 1:].min() > -0.1
    drawn = prior.sample(8, sampling=Sampling(temperature=0.0), prefix=codes[:8].flatten(1)[:, :1])
    assert torch.equal(drawn, codes[:8])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (4,)}, r"grid=\(4,\), expected two axes or more, the last of them the codes of a position"),
        ({"grid": ()}, r"grid=\(\)"),
        ({"grid": (2, 2, 0)}, "grid size=0"),
        ({"code_depth": 0}, "code_depth=0"),
        ({"depth": 0}, "depth=0"),
        ({"width": 30, "num_heads": 4}, "width=30 with num_heads=4, expected a multiple of 8"),
        ({"width": 8, "num_heads": 4}, "heads of 2 channels for a grid of 2 axes"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"label_dropout": 1.0}, "label_dropout=1.0"),
        ({"code_noise": -0.5}, "code_noise=-0.5"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_bad_configs(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DepthTransformerPrior.Config(**{"num_codes": 4, "grid": (2, 2, 3), **options})
