"""How a block is sampled: by trial, once for a machine."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from prior_worlds import make_transformer, seeded

from priors import DraftHead, Sampling, TransformerPrior, numerics, trials
from priors.numerics import Numerics, fastest, passes
from priors.precision import Arithmetic

FLOAT, HALF = Numerics(Arithmetic(torch.float32)), Numerics(Arithmetic(torch.bfloat16), 2)
LOOSE = Numerics(Arithmetic(torch.float32, packed=False))


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing known, and a place of its own for what is measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(numerics, "_known", {})
    return tmp_path / "vqvae" / "numerics.json"


def test_the_fastest_is_taken_and_kept(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fastest("a", {FLOAT: lambda: 2.0, HALF: lambda: 1.0, LOOSE: lambda: 3.0}) == HALF
    # The same process, and another one, do not measure again, whatever it would say now.
    other = {FLOAT: lambda: 1.0, HALF: lambda: 2.0}
    assert fastest("a", other) == HALF
    monkeypatch.setattr(numerics, "_known", {})
    assert fastest("a", other) == HALF
    assert fastest("b", other) == FLOAT
    monkeypatch.setattr(numerics, "_known", {})
    assert [fastest(name, {FLOAT: lambda: 1.0, HALF: lambda: 1.5}) for name in "ab"] == [HALF, FLOAT]
    # One that is no candidate any more is no answer.
    assert fastest("a", {FLOAT: lambda: 1.0}) == HALF
    monkeypatch.setattr(numerics, "_known", {})
    assert fastest("a", {FLOAT: lambda: 1.0}) == FLOAT


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"x": 3}', "\x00", '{"a": {"dtype": []}}', "[" * 100_000])
def test_a_file_that_says_nothing_is_no_error(fresh: Path, content: str) -> None:
    fresh.parent.mkdir(parents=True)
    fresh.write_text(content)
    assert fastest("a", {FLOAT: lambda: 2.0, HALF: lambda: 1.0}) == HALF
    key = next(key for key in json.loads(fresh.read_text()) if key.endswith("| a"))
    assert json.loads(fresh.read_text())[key] == HALF.to_plain()


def test_without_a_place_to_keep_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert fastest("a", {FLOAT: lambda: 2.0, HALF: lambda: 1.0}) == HALF
    assert fastest("a", {FLOAT: lambda: 1.0, HALF: lambda: 2.0}) == HALF


def test_passes_of_proposals_that_are_always_or_never_taken() -> None:
    assert passes(49, 1, (0.0, 0.0)) == 49
    assert passes(49, 16, (1.0, 1.0, 1.0)) == 1 + 48 / 4
    assert passes(50, 16, (1.0, 1.0, 1.0)) == 1 + 13
    # Of one grid n codes take n / (1 + a) passes, and more grids wait for the last of them.
    one = passes(2001, 1, (0.5,))
    assert abs(one - 1 - 2000 / 1.5) < 10
    assert passes(2001, 16, (0.5,)) > one + 20


def large(**options: Any) -> TransformerPrior:
    """Large enough for a trial."""
    return make_transformer(num_codes=16, grid=(4, 5), width=96, num_heads=2, **options)


def test_auto_is_measured_once_and_repeats(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = large()
    seen: list[str] = []
    monkeypatch.setattr(trials, "fastest", lambda name, found: (seen.append(name), fastest(name, found))[1])
    torch.manual_seed(1)
    first = prior.sample(4, generator=seeded())
    assert torch.equal(torch.get_rng_state(), torch.manual_seed(1).get_state())
    assert torch.equal(first, prior.sample(4, generator=seeded()))
    assert len(json.loads(fresh.read_text())) == 1
    prior.sample(8)
    assert len(set(seen)) == 2  # rows
    assert len(json.loads(fresh.read_text())) == 2
    before = len(seen)
    prior.sample(4, sampling=Sampling(precision="float32"))
    prior.double().sample(4)
    assert len(seen) == before


def test_what_was_found_is_what_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    prior, used = large(), []
    start = TransformerPrior._start_walk
    monkeypatch.setattr(trials, "fastest", lambda name, found: LOOSE)
    monkeypatch.setattr(
        TransformerPrior, "_start_walk", lambda self, begun: (used.append(begun.arithmetic), start(self, begun))[1]
    )
    prior.sample(4)
    assert used == [LOOSE.arithmetic]


def test_a_head_is_used_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = large()
    head = DraftHead.of(prior)
    found: dict[str, Any] = {}
    monkeypatch.setattr(trials, "fastest", lambda name, candidates: (found.update(candidates), FLOAT)[1])
    prior.sample(4, sampling=Sampling(draft=head))
    assert {each.num_proposals for each in found} == {0, 1, 2, 3, 4}
    arithmetics = {each.arithmetic for each in found}
    assert len(found) == 5 * len(arithmetics)
    # A head that was never fitted says that nothing is taken, and so is worth nothing.
    with torch.inference_mode():
        seconds = {each: trial() for each, trial in found.items() if each.arithmetic == FLOAT.arithmetic}
    assert all(seconds[FLOAT] < value for each, value in seconds.items() if each != FLOAT)
    found.clear()
    prior.sample(4, sampling=Sampling(draft=head, num_proposals=3, precision="float32"))
    assert not found
