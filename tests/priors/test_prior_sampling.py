"""Filters, choosers and the draw, against definitions written out in plain Python."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from prior_worlds import seeded
from torch import Tensor

from priors import Sampling
from priors.sampling import (
    _draw,
    apply_temperature,
    guidance_ramp,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    known_chooser,
    random_chooser,
)

SIZES = [1, 2, 17, 512, 1000]
LAST = 1 - 2**-53  # the largest number that a generator gives


def random_logits(seed: int = 0) -> Tensor:
    return torch.randn(5, 8, generator=seeded(seed)).double()


def kept(logits: Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


@pytest.mark.parametrize("k", [1, 3, 20])
def test_top_k_keeps_the_k_likeliest(k: int) -> None:
    logits = random_logits()
    filtered = keep_top_k(logits, k)
    for row, got in zip(logits.tolist(), kept(filtered), strict=True):
        assert got == sorted(sorted(range(8), key=lambda i: (-row[i], i))[:k])
    assert torch.equal(filtered[filtered.isfinite()], logits[filtered.isfinite()])


def test_ties_go_to_the_lowest_index() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    before = logits.clone()
    assert kept(keep_top_k(logits, 3)) == [[0, 1, 3], [0, 1, 2]]
    assert kept(keep_top_k(logits, 1)) == [[1], [0]]
    assert kept(keep_top_p(logits, 0.5)) == [[1, 3], [0, 1, 2]]
    assert torch.equal(logits, before)
    # Of fewer possible codes those are kept, and a whole mass is all of it.
    assert kept(keep_top_k(torch.tensor([[0.0, -math.inf, -math.inf]]), 2)) == [[0]]
    assert kept(keep_top_p(torch.tensor([[0.0, -60.0]]), 1.0)) == [[0, 1]]


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


@pytest.mark.parametrize("mass", [1e-9, 5e-324])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_p_of_next_to_nothing_keeps_the_likeliest(mass: float, dtype: torch.dtype) -> None:
    """Also where the mass is 0 in the type of the logits."""
    logits = random_logits(1).to(dtype)
    assert kept(keep_top_p(logits, mass)) == [[code] for code in logits.argmax(-1).tolist()]
    assert torch.equal(random_chooser(Sampling(top_p=mass))(logits), logits.argmax(-1))


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


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_temperatures_near_zero_are_greedy_and_finite(temperature: float, dtype: torch.dtype) -> None:
    logits = random_logits(3).to(dtype)
    got = apply_temperature(logits, temperature).softmax(-1)
    expected = torch.nn.functional.one_hot(logits.argmax(-1), 8).to(dtype)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}, {"temperature": 0.0}])
def test_log_probs_that_are_not_finite_draw_nothing(options: dict) -> None:
    for bad in (math.nan, math.inf):
        logits = random_logits(1)
        logits[3, 2] = bad
        with pytest.raises(ValueError, match="not finite: see whether the prior's training"):
            random_chooser(Sampling(**options))(logits.log_softmax(-1))


def test_draws_follow_the_filtered_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5]).log_softmax(-1)
    chooser = random_chooser(Sampling(temperature=1.5, top_k=4, top_p=0.8), generator=seeded(0))
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


# ---- the draw


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_codes", [*SIZES, 65, 16384])
def test_draws_invert_the_cumulative_distribution(num_codes: int, dtype: torch.dtype) -> None:
    generator = seeded(num_codes)
    rows = 200
    probs = (3 * torch.randn(rows, num_codes, generator=generator).to(dtype)).softmax(1)
    uniform = torch.rand(rows, 1, generator=generator, dtype=torch.float64)
    cdf = probs.double().cumsum(1)
    target = uniform * cdf[:, -1:]
    expected = (cdf <= target).sum(1)
    got = _draw(probs, uniform)
    slack = 1e-6 if dtype == torch.float32 else 1e-13
    near = (cdf - target).abs().min(1).values < slack
    assert near.sum() < rows / 4
    assert torch.equal(got[~near], expected[~near])
    # Near a border it is the code on either side.
    below, above = ((cdf <= target + shift).sum(1) for shift in (-slack, slack))
    assert ((got >= below) & (got <= above)).all()
    # Rows do not know of each other.
    alone = torch.cat([_draw(probs[i : i + 1], uniform[i : i + 1]) for i in range(0, rows, 10)])
    assert torch.equal(alone, got[::10])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_codes", SIZES)
def test_no_code_of_probability_zero_at_the_ends(num_codes: int, dtype: torch.dtype) -> None:
    generator = seeded(num_codes)
    logits = 3 * torch.randn(300, num_codes, generator=generator).to(dtype)
    logits[torch.rand(300, num_codes, generator=generator) < 0.5] = -math.inf
    logits[torch.arange(300), torch.randint(num_codes, (300,), generator=generator)] = 0.0
    possible = logits.isfinite()
    probabilities = logits.softmax(1)
    for uniform in (0.0, 2**-53, 1e-300, LAST):
        drawn = _draw(probabilities, torch.full((300, 1), uniform, dtype=torch.float64))
        assert possible.gather(1, drawn[:, None]).all()
        assert uniform > 0 or torch.equal(drawn, possible.int().argmax(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_code_of_probability_zero_at_the_borders_of_blocks(dtype: torch.dtype) -> None:
    """Where sums are rounded the block that a number falls into may seem to begin above or end below it."""
    generator, num_codes, rows = seeded(0), 1024, 64
    edges = torch.arange(0, num_codes, 32)
    for _ in range(4):
        probs = torch.rand(rows, num_codes, generator=generator, dtype=dtype)
        for positions in (edges, edges + 1, edges - 1, edges - 2):
            probs[:, positions % num_codes] = 0
        probs /= probs.sum(1, keepdim=True)
        for width in (32, 64):
            ends = probs.view(rows, -1, width).sum(-1).double().cumsum(1)
            borders = ends[:, :-1] / ends[:, -1:]
            for sign in (-1.0, 0.0, 1.0):
                for uniform in torch.nextafter(borders, borders + sign).clamp(0, LAST).T:
                    drawn = _draw(probs, uniform[:, None])
                    assert (probs.gather(1, drawn[:, None]) > 0).all()


def test_seeds_are_streams_of_their_rows() -> None:
    log_probs = torch.randn(3, 50, generator=seeded(0)).log_softmax(1)
    together = random_chooser(seeds=[4, 9, 4])
    alone = random_chooser(seeds=[9])
    for _ in range(5):
        assert torch.equal(together(log_probs)[1:2], alone(log_probs[1:2]))
    with pytest.raises(ValueError, match="got 1 seeds for a walk of 3 grids"):
        alone(log_probs)


@pytest.mark.parametrize("share", [1e-300, 0.01, 0.3, 0.9, 1.0])
def test_min_p_keeps_codes_near_the_likeliest(share: float) -> None:
    logits = 2 * torch.randn(6, 40, generator=seeded(0)).double()
    kept = keep_min_p(logits, share)
    for row, got, values in zip(logits.softmax(-1).tolist(), kept.isfinite().tolist(), kept, strict=True):
        assert got == [p >= share * max(row) * (1 - 1e-12) for p in row]
        assert max(row) in [p for p, is_kept in zip(row, got, strict=True) if is_kept]
        assert set(values[values.isfinite()].tolist()) <= set(logits.flatten().tolist())


def test_min_p_of_ties_of_nothing_and_of_impossible_codes() -> None:
    logits = torch.tensor([[1.0, 1.0, 0.0, -math.inf]])
    assert keep_min_p(logits, 1.0).isfinite().tolist() == [[True, True, False, False]]
    assert keep_min_p(logits, 0.0) is logits
    assert keep_min_p(logits, 1e-9).isfinite().tolist() == [[True, True, True, False]]
    # Shifting all logits changes nothing, as they need not be normalised.
    assert torch.equal(keep_min_p(logits + 7, 0.5).isfinite(), keep_min_p(logits, 0.5).isfinite())


def test_min_p_comes_after_the_temperature() -> None:
    log_probs = torch.tensor([[0.5, 0.3, 0.2]]).log().expand(2000, -1)
    for temperature, expected in ((1.0, {0, 1}), (0.5, {0}), (2.0, {0, 1, 2})):
        chooser = random_chooser(Sampling(temperature=temperature, min_p=0.55), generator=seeded())
        assert set(chooser(log_probs).tolist()) == expected


def test_a_guidance_ramp_rises_from_1_to_its_strength() -> None:
    assert guidance_ramp(5.0, 5) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert guidance_ramp(3.0, 3, power=2.0) == [1.0, 1.5, 3.0]
    assert guidance_ramp(3.0, 4, power=0.0) == [3.0] * 4
    assert guidance_ramp(1.0, 3, power=0.7) == [1.0] * 3
    assert guidance_ramp(0.0, 3) == [1.0, 0.5, 0.0]
    assert guidance_ramp(4.0, 1) == [1.0]
    assert guidance_ramp(4.0, 0) == []
    for power in (-0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"power={power}, expected a number >= 0"):
            guidance_ramp(2.0, 4, power=power)
