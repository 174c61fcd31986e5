"""Walks of a LlamaPrior, whose queries and keys are not normalised, in every arithmetic; and that it learns."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from test_engine import steps
from test_llama import CLASSES, GRID, NUM_CODES, POSITIONS, prior_of, some_codes
from torch import Tensor

from priors import LlamaPrior, Prior, Sampling
from priors.compiled_step import step_to_compile
from priors.kv_cache import CachedTrunk, cache_bytes
from priors.precision import Arithmetic
from priors.sampling import known_chooser
from priors.trunk import gated_width
from priors.walks import taken


@pytest.mark.parametrize("compiled", [False, True])
def test_greedy_walks_are_those_of_exact_arithmetic(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = prior_of(width=32)
    monkeypatch.setattr("priors.kv_cache.Compiled", lambda: step_to_compile)
    labels = torch.arange(12) % CLASSES
    prefix = some_codes(12).flatten(1)[:, :3]
    expected = copy.deepcopy(prior).double().sample(12, labels, Sampling(temperature=0.0), prefix=prefix)
    greedy = Sampling(temperature=0.0, precision="float32", compiled=compiled)
    assert torch.equal(prior.sample(12, labels, greedy, prefix=prefix), expected)


@pytest.mark.parametrize(
    ("arithmetic", "most", "most_kl"),
    [
        (Arithmetic(torch.float32), 2e-5, 1e-7),
        (Arithmetic(torch.bfloat16), 0.25, 3e-4),
        (Arithmetic(torch.bfloat16, int8=True), 0.35, 1e-3),
    ],
    ids=["float32", "bfloat16", "int8"],
)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("large", [False, True])
def test_conditionals_of_walks_are_the_exact_ones_but_for_rounding(
    arithmetic: Arithmetic, most: float, most_kl: float, compiled: bool, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every position, of known codes: the largest difference, and the mean KL from the exact one, in nats."""
    monkeypatch.setattr("priors.kv_cache.Compiled", lambda: step_to_compile)
    if large:
        monkeypatch.setattr("priors.kv_cache._LARGE", 1)
    prior, codes = prior_of(width=32), some_codes(16)
    exact = copy.deepcopy(prior).double().log_conditionals(codes).flatten(1, -2).detach()
    _, labels, _, route = prior._asked(16, None, Sampling(), None, None, None)
    arithmetic = dataclasses.replace(arithmetic, compiled=compiled)
    chooser, seen = known_chooser(codes), []

    def watched(log_probs: Tensor) -> Tensor:
        seen.append(log_probs.double())
        return chooser(log_probs)

    prior._walk(watched, labels, None, taken(route, torch.arange(16)), arithmetic, None)
    walked = torch.stack(seen, 1)
    assert exact.std() > 0.5
    assert (walked - exact).abs().max() < most
    assert (exact.exp() * (exact - walked)).sum(-1).mean() < most_kl


@pytest.mark.parametrize("sizes", [(1,) * POSITIONS, (POSITIONS,), (3, 1, 1, 5, 1, 1)])
@pytest.mark.parametrize("static", [False, True])
def test_steps_are_the_trunk_at_once(static: bool, sizes: tuple[int, ...]) -> None:
    prior = prior_of(num_heads=3, mlp_width=40).double()
    x = torch.randn(4, POSITIONS, 24, generator=torch.Generator().manual_seed(0)).double()
    rotary = prior.trunk.rotary(x)
    cached = CachedTrunk(prior.trunk.trunk, 4, POSITIONS, Arithmetic(torch.float64, compiled=static))
    cached.one = step_to_compile if static else None
    expected = prior.trunk(x[:, 0], x[:, 1:]).detach()
    torch.testing.assert_close(steps(cached, x, rotary, sizes), expected, atol=1e-11, rtol=0)
    # Normalised queries and keys would give others.
    cached.normalised = True
    cached.reset()
    assert (steps(cached, x, rotary, sizes) - expected).abs().max() > 0.1


def test_wide_branches_count_in_the_bytes_of_a_walk() -> None:
    plain, wide = prior_of(), prior_of(mlp_width=200)
    arithmetic = Arithmetic(torch.float32)
    extra = cache_bytes(wide.trunk.trunk, POSITIONS, arithmetic, 2) - cache_bytes(
        plain.trunk.trunk, POSITIONS, arithmetic, 2
    )
    assert extra == 4 * 2 * 3 * (200 - gated_width(24))
    assert wide.walk_bytes(arithmetic, 2) == cache_bytes(wide.trunk.trunk, POSITIONS, arithmetic, 2)


@pytest.mark.slow
@pytest.mark.usefixtures("untyped")
def test_compiled_walks_are_eager_ones() -> None:
    prior = prior_of()
    eager, compiled = (
        prior.sample(
            8, sampling=Sampling(compiled=compiled, precision="float32"), generator=torch.Generator().manual_seed(0)
        )
        for compiled in (False, True)
    )
    assert (eager == compiled).float().mean() > 0.95


def test_it_learns_what_one_position_says_of_the_next() -> None:
    torch.manual_seed(0)
    prior = LlamaPrior(num_codes=5, grid=(6,), width=32, depth=2, num_heads=2)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=3e-3)
    for _ in range(150):
        first = torch.randint(5, (64, 1))
        loss = -prior((first + torch.arange(6)) % 5).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(weight.grad is not None and weight.grad.any() for weight in prior.parameters())
    assert abs(loss.item() - torch.tensor(5.0).log().item()) < 0.2


def test_relaxed_conditionals_at_corners_are_conditionals() -> None:
    prior, codes = prior_of(), some_codes()
    relaxed = prior.relaxed_log_conditionals(torch.nn.functional.one_hot(codes, NUM_CODES).float())
    torch.testing.assert_close(relaxed, prior.log_conditionals(codes), atol=1e-5, rtol=0)


def test_a_position_sees_only_what_is_before_it() -> None:
    prior, codes = prior_of(), some_codes(1)
    conditionals = prior.log_conditionals(codes).flatten(1, 2)
    for position in range(POSITIONS):
        other = codes.flatten(1).clone()
        other[:, position] = (other[:, position] + 1) % NUM_CODES
        changed = prior.log_conditionals(other.view(1, *GRID)).flatten(1, 2)
        assert torch.equal(changed[:, : position + 1], conditionals[:, : position + 1])
        assert (
            position == POSITIONS - 1
            or (changed[:, position + 1 :] - conditionals[:, position + 1 :]).abs().min(-1)[0].max() > 1e-4
        )


def test_it_is_loaded_by_what_was_saved(tmp_path: Path) -> None:
    prior = prior_of(mlp_width=40, dropout=0.1)
    prior.save_pretrained(tmp_path / "prior")
    again = Prior.from_pretrained(tmp_path / "prior")
    assert isinstance(again, LlamaPrior)
    assert again.config == prior.config
