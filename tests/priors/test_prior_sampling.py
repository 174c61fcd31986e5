"""Filters and choosers, against definitions written out in plain Python."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from priors import Sampling
from priors.sampling import (
    apply_temperature,
    keep_top_k,
    keep_top_p,
    known_chooser,
    random_chooser,
)


def random_logits(seed: int = 0) -> Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(seed)).double()


def kept(logits: Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


@pytest.mark.parametrize("k", [1, 3, 8, 20])
def test_top_k_keeps_the_k_likeliest(k: int) -> None:
    logits = random_logits()
    filtered = keep_top_k(logits, k)
    for row, got in zip(logits.tolist(), kept(filtered), strict=True):
        assert got == sorted(sorted(range(8), key=lambda i: (-row[i], i))[:k])
    assert torch.equal(filtered[filtered.isfinite()], logits[filtered.isfinite()])


def test_top_k_ties_go_to_the_lowest_index() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert kept(keep_top_k(logits, 3)) == [[0, 1, 3], [0, 1, 2]]
    assert kept(keep_top_k(logits, 1)) == [[1], [0]]


def test_top_k_of_fewer_possible_codes_keeps_those() -> None:
    logits = torch.tensor([[0.0, -math.inf, -math.inf]])
    assert kept(keep_top_k(logits, 2)) == [[0]]


@pytest.mark.parametrize("mass", [1e-9, 0.3, 0.7, 0.95, 1.0])
def test_top_p_keeps_the_fewest_that_reach_the_mass(mass: float) -> None:
    logits = random_logits(1)
    for row, got in zip(logits.softmax(-1).tolist(), kept(keep_top_p(logits, mass)), strict=True):
        expected, total = [], 0.0
        for i in sorted(range(8), key=lambda i: (-row[i], i)):
            if expected and total >= mass:
                break
            expected.append(i)
            total += row[i]
        assert got == sorted(expected)


def test_top_p_ties_and_the_whole_mass() -> None:
    assert kept(keep_top_p(torch.zeros(1, 4), 0.5)) == [[0, 1]]
    assert kept(keep_top_p(torch.tensor([[0.0, -60.0]]), 1.0)) == [[0, 1]]


@pytest.mark.parametrize("mass", [1e-9, 1e-46, 1e-300, 5e-324])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_p_of_next_to_nothing_keeps_the_likeliest(mass: float, dtype: torch.dtype) -> None:
    """Also where the mass is 0 in the type of the logits."""
    logits = random_logits(1).to(dtype)
    assert kept(keep_top_p(logits, mass)) == [[code] for code in logits.argmax(-1).tolist()]
    assert torch.equal(random_chooser(Sampling(top_p=mass))(logits), logits.argmax(-1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_log_probs_that_are_not_finite_draw_nothing(bad: float) -> None:
    logits = random_logits(1)
    logits[3, 2] = bad
    log_probs = logits.log_softmax(-1)
    for options in ({}, {"seeds": range(5)}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}, {"temperature": 0.0}):
        sampling, seeds = Sampling(**{name: options[name] for name in options if name != "seeds"}), options.get("seeds")
        with pytest.raises(ValueError, match="probabilities that are not finite: see whether the prior's training"):
            random_chooser(sampling, seeds=seeds)(log_probs)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("temperature", (-0.1, math.nan, math.inf, "1"), r"expected a number >= 0 \(0 is greedy\)"),
        ("temperature", (None, True), "for Sampling, expected a finite number"),
        ("top_k", (0, -3, 1.5, True, "2"), "expected an integer >= 1, or None to keep all codes"),
        ("top_p", (0.0, 1.1, math.nan, "all"), "expected 0 < top_p <= 1, or None to keep all codes"),
        ("min_p", (-0.1, 1.1, math.nan, "all"), "expected 0 <= min_p <= 1, or None to keep all codes"),
        ("guidance", (-1.0, 1e39, math.nan, math.inf), r"expected numbers from 0 to 1e\+06 \(1 is none\)"),
        ("num_steps", (0, -1, 1.5, True), "expected an integer >= 1"),
        ("precision", (None, torch.bfloat16), "expected one of 'auto', 'float32', 'bfloat16', 'int8'"),
        ("compiled", (None, "yes", 1), "expected True or False"),
        ("batch_size", (0, -1, 2.0, True), "expected an integer >= 1"),
    ],
)
def test_sampling_refuses_what_is_out_of_range(name: str, values: tuple, message: str) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"got {name}=.*{message}"):
            Sampling(**{name: value})


def test_sampling_refuses_other_names_and_kinds() -> None:
    for options, message in (
        ({"topk": 3}, "Sampling has no topk; did you mean top_k?"),
        ({"seed": 1}, "Sampling has no seed"),
        ({"precision": "float16"}, "unknown precision 'float16', expected one of auto, float32, bfloat16, int8"),
        ({"guidance": "2"}, "got guidance of str, expected a number, or one for each position"),
        ({"guidance": torch.full((4,), 2.0)}, "got guidance of Tensor"),
        *[
            ({"guidance": [2.0, bad]}, r"one of them in guidance, expected numbers from 0 to 1e\+06")
            for bad in (-1.0, 1e6 + 1, 1e39, math.nan, math.inf, "2")
        ],
    ):
        with pytest.raises(ValueError, match=message):
            Sampling(**options)


@pytest.mark.usefixtures("untyped")
def test_sampling_knows_what_was_changed_and_is_frozen() -> None:
    sampling = Sampling(top_k=np.int32(3), temperature=1, guidance=[1, np.float32(2.5)], batch_size=None)
    assert sampling == Sampling(top_k=3, guidance=(1.0, 2.5))
    assert sampling.changed() == ["top_k", "guidance"]
    assert Sampling().changed() == []
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampling.top_k = 4
    with pytest.raises(ValueError, match="top_k=0"):
        dataclasses.replace(sampling, top_k=0)


def test_temperature_is_a_power_of_the_probabilities() -> None:
    logits = random_logits(2)
    for temperature in (0.5, 1.0, 3.0):
        power = logits.softmax(-1) ** (1 / temperature)
        got = apply_temperature(logits, temperature).softmax(-1)
        torch.testing.assert_close(got, power / power.sum(-1, keepdim=True))


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-45, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_temperatures_near_zero_are_greedy_and_finite(temperature: float, dtype: torch.dtype) -> None:
    logits = random_logits(3).to(dtype)
    got = apply_temperature(logits, temperature).softmax(-1)
    expected = torch.nn.functional.one_hot(logits.argmax(-1), 8).to(dtype)
    assert torch.equal(got, expected)


def test_draws_follow_the_filtered_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5]).log_softmax(-1)
    chooser = random_chooser(Sampling(temperature=1.5, top_k=4, top_p=0.8), generator=torch.Generator().manual_seed(0))
    draws = chooser(logits.expand(40_000, -1))
    # By hand: temper, keep codes 0, 4, 1, 2, then of those the first whose mass reaches 0.8.
    tempered = [math.exp(x / 1.5) for x in logits.tolist()]
    four = sum(tempered[i] for i in (0, 4, 1, 2))
    masses = [tempered[i] / four for i in (0, 4, 1)]
    assert masses[0] + masses[1] < 0.8 < sum(masses)
    counts = torch.bincount(draws, minlength=5)
    assert counts[2] == counts[3] == 0
    for code, mass in zip((0, 4, 1), masses, strict=True):
        share = mass / sum(masses)
        slack = 4 * math.sqrt(share * (1 - share) / 40_000)
        assert abs(counts[code].item() / 40_000 - share) < slack


def test_codes_of_probability_zero_are_never_drawn() -> None:
    log_probs = torch.tensor([-math.inf, 0.0, -math.inf]).expand(10_000, -1)
    assert (random_chooser(generator=torch.Generator().manual_seed(0))(log_probs) == 1).all()


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_draws_at_the_ends_of_the_uniform_are_possible_codes(uniform: float, monkeypatch: pytest.MonkeyPatch) -> None:
    log_probs = 3 * random_logits(7).repeat(200, 4)
    log_probs += 0.1 * torch.randn(log_probs.shape, generator=torch.Generator().manual_seed(8))
    log_probs[:, [0, 5, -1]] = -math.inf
    cdf_ends = log_probs.softmax(-1).cumsum(-1)[:, -1]
    assert (cdf_ends < 1).any()  # rounding leaves sums below and above one
    assert (cdf_ends > 1).any()
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype, **_: torch.full(shape, uniform, dtype=dtype))
    draws = random_chooser()(log_probs.log_softmax(-1))
    assert log_probs.gather(1, draws[:, None]).isfinite().all()
    if uniform == 0:
        assert (draws == 1).all()


def test_the_filters_leave_their_input_alone() -> None:
    logits = random_logits(4)
    before = logits.clone()
    apply_temperature(logits, 0.5), keep_top_k(logits, 2), keep_top_p(logits, 0.5)
    assert torch.equal(logits, before)


def test_known_codes_are_answered_and_scored() -> None:
    log_probs = [random_logits(seed)[:2].log_softmax(-1) for seed in (5, 6)]
    codes = torch.tensor([[3, 0], [7, 2]], dtype=torch.int32)
    chooser = known_chooser(codes)
    assert chooser.log_prob is None
    assert [chooser(each).tolist() for each in log_probs] == [[3, 7], [0, 2]]
    expected = [log_probs[0][0, 3] + log_probs[1][0, 0], log_probs[0][1, 7] + log_probs[1][1, 2]]
    assert chooser.log_prob.tolist() == pytest.approx([e.item() for e in expected])


@pytest.mark.usefixtures("untyped")
def test_known_codes_that_do_not_fit_the_walk() -> None:
    log_probs = random_logits()[:2]
    with pytest.raises(ValueError, match="float32"):
        known_chooser(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="walk of 2 grids, expected 3"):
        known_chooser(torch.zeros(3, 1, dtype=torch.int64))(log_probs)
    with pytest.raises(ValueError, match="codes from 8 to 8, expected 0 to 7"):
        known_chooser(torch.full((2, 1), 8))(log_probs)
    chooser = known_chooser(torch.zeros(2, 1, dtype=torch.int64))
    chooser(log_probs)
    with pytest.raises(ValueError, match="more than 1 steps"):
        chooser(log_probs)
