"""The draw from log-probabilities, min-p and the guidance ramp, against definitions written out."""

import math

import pytest
import torch
from torch import Tensor

from priors import Sampling
from priors.sampling import _draw, guidance_ramp, keep_min_p, random_chooser

SIZES = [1, 2, 3, 17, 512, 1000]
LAST = 1 - 2**-53  # the largest number that a generator gives


def make_log_probs(num_codes: int, kind: str) -> Tensor:
    """Log-probabilities "k"."""
    generator = torch.Generator().manual_seed(num_codes)
    logits = torch.randn(num_codes, generator=generator)
    if kind == "skewed":
        logits = 4 * logits
    if kind == "holes":
        logits[torch.rand(num_codes, generator=generator) < 0.6] = -math.inf
        logits[num_codes // 2] = 0.0
    if kind == "one":
        logits = torch.full((num_codes,), -math.inf)
        logits[num_codes // 3] = 0.0
    return logits.log_softmax(0)


@pytest.mark.parametrize("kind", ["even", "skewed", "holes", "one"])
@pytest.mark.parametrize("num_codes", SIZES)
def test_draws_are_as_frequent_as_they_are_probable(num_codes: int, kind: str) -> None:
    log_probs, num = make_log_probs(num_codes, kind), 40_000
    chooser = random_chooser(generator=torch.Generator().manual_seed(5))
    draws = torch.cat([chooser(log_probs.expand(num // 4, -1)) for _ in range(4)])
    counts = torch.bincount(draws, minlength=num_codes).double()
    assert len(counts) == num_codes
    expected = num * log_probs.double().softmax(0)
    assert counts[expected == 0].sum() == 0
    rare = expected < 5
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    used = expected > 1e-9
    freedom = max(int(used.sum()) - 1, 1)
    statistic = ((counts - expected).square() / expected)[used].sum().item()
    # Wilson & Hilferty 1931: exceeded with a probability below 1e-4.
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 4 * math.sqrt(2 / (9 * freedom))) ** 3 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_codes", [*SIZES, 64, 65, 16384])
def test_draws_invert_the_cumulative_distribution(num_codes: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_codes)
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
    generator = torch.Generator().manual_seed(num_codes)
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
    generator, num_codes, rows = torch.Generator().manual_seed(0), 1024, 64
    edges = torch.arange(0, num_codes, 32)
    for _ in range(10):
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


@pytest.mark.parametrize("num_codes", SIZES)
def test_no_rows(num_codes: int) -> None:
    drawn = random_chooser()(torch.zeros(0, num_codes))
    assert drawn.shape == (0,)
    assert drawn.dtype == torch.int64
    assert random_chooser(seeds=[])(torch.zeros(0, num_codes)).shape == (0,)


def test_seeds_are_streams_of_their_rows() -> None:
    log_probs = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    together = random_chooser(seeds=[4, 9, 4])
    alone = random_chooser(seeds=[9])
    for _ in range(5):
        assert torch.equal(together(log_probs)[1:2], alone(log_probs[1:2]))
    same = random_chooser(seeds=[4, 4])
    for _ in range(5):
        assert len(set(same(log_probs[:1].expand(2, -1)).tolist())) == 1
    with pytest.raises(ValueError, match="got 2 seeds for a walk of 3 grids"):
        same(log_probs)


@pytest.mark.parametrize("share", [1e-300, 0.01, 0.3, 0.9, 1.0])
def test_min_p_keeps_codes_near_the_likeliest(share: float) -> None:
    logits = 2 * torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).double()
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
        chooser = random_chooser(
            Sampling(temperature=temperature, min_p=0.55), generator=torch.Generator().manual_seed(0)
        )
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
