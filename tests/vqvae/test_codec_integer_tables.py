"""Integer tables: that they are tables, what they cost, and that errors below the guard change none of them."""

import math
import random
from decimal import ROUND_HALF_UP, Decimal, localcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from likelihood_worlds import MEMBERS, generator, some_features, some_images
from torch import Tensor

from vqvae.codec import integer_tables
from vqvae.codec.integer_tables import (
    CDF_GUARD,
    GUARD,
    LEAST_LOG_PROB,
    LOG_PROB_STEP,
    NUM_OFFSETS,
    PARAMETER_STEP,
    TOTAL,
    CodeTables,
    LevelTables,
    OnGrid,
    even_widths,
    level_intervals,
)

OFFSETS = torch.arange(NUM_OFFSETS)
seeds = st.integers(0, 2**32)


@pytest.fixture(params=MEMBERS)
def likelihood(request):
    return MEMBERS[request.param]()


def random_rows(num: int, num_codes: int, spread: float, seed: int) -> Tensor:
    logits = torch.randn(num, num_codes, generator=generator(seed), dtype=torch.float64) * spread
    return logits.log_softmax(-1)


def uniform(shape, low: float, high: float, seed: int) -> Tensor:
    return torch.rand(shape, generator=generator(seed), dtype=torch.float64) * (high - low) + low


def near_borders(values: Tensor, step: float, offsets: Tensor, seed: int, share: float) -> Tensor:
    """Some of the values moved to within three guards of the border between two grid points."""
    shift = offsets[:, None] / NUM_OFFSETS
    borders = ((values / step - shift).floor() + 0.5 + shift + uniform(values.shape, -3, 3, seed) * GUARD) * step
    return torch.where(uniform(values.shape, 0, 1, seed + 1) < share, borders, values)


def assert_tables(widths: Tensor) -> None:
    assert widths.dtype == torch.int64
    assert widths.min() >= 1
    assert (widths.sum(-1) == TOTAL).all()


# Codes


def test_weights_are_exact():
    weights = integer_tables._weights()
    num = 22 * 1024 * 16 + 1
    assert len(weights) == num
    chance = random.Random(0)
    with localcontext() as context:
        context.prec = 40
        for i in [*range(100), *range(num - 100, num), *(chance.randrange(num) for _ in range(4000))]:
            exact = (Decimal(-i) / 2**14).exp() * 2**30
            assert int(exact.to_integral_value(ROUND_HALF_UP)) == weights[i]


def hostile_rows(num_codes: int) -> dict[str, Tensor]:
    even = torch.full((num_codes,), -math.log(num_codes), dtype=torch.float64)
    certain = torch.full((num_codes,), -torch.inf, dtype=torch.float64)
    certain[num_codes // 2] = 0.0
    nearly = torch.full((num_codes,), -40.0, dtype=torch.float64)
    nearly[-1] = math.log1p(-num_codes * math.exp(-40))
    half = random_rows(1, num_codes, 2.0, 1)[0]
    if num_codes > 1:
        half[::2] = -torch.inf
        half = half.log_softmax(-1)
    first = certain.roll(num_codes - num_codes // 2)
    sharp = random_rows(1, num_codes, 20.0, 2)[0]
    return {"even": even, "certain": certain, "first": first, "nearly": nearly, "half": half, "sharp": sharp}


@pytest.mark.parametrize("num_codes", [1, 2, 3, 10, 1024, 16384])
def test_codes_have_tables(num_codes):
    for name, row in hostile_rows(num_codes).items():
        found = CodeTables(row.expand(NUM_OFFSETS, -1), OFFSETS)
        assert_tables(found.widths())
        assert found.clear.float().mean() > 0.6, name
        probs = with_padding(row).exp()
        # A grid step of 2^-10, shared by all, and the least width of 1.
        off = (found.widths() / TOTAL - probs).abs()
        assert (off <= probs * 2**-9 + (1 + num_codes * probs) * 2.0**-23).all(), name
        codes = torch.arange(num_codes)
        for i in range(0, num_codes, max(1, num_codes // 20)):
            left, width = found.intervals(codes[i].expand(NUM_OFFSETS))
            assert torch.equal(left, found.widths()[:, :i].sum(-1))
            assert torch.equal(width, found.widths()[:, i])


def with_padding(row: Tensor) -> Tensor:
    return torch.cat((row, row.new_full((max(0, 3 - len(row)),), -torch.inf)))


def cost(log_probs: Tensor, offset: int) -> Tensor:
    """Bits a symbol beyond the entropy, "n"."""
    widths = CodeTables(log_probs, torch.full((len(log_probs),), offset)).widths()
    bits = integer_tables.PRECISION - widths.double().log2() + log_probs / math.log(2)
    return (log_probs.exp() * bits).sum(-1)


@pytest.mark.parametrize("num_codes", [3, 10, 64, 512, 1024])
@pytest.mark.parametrize(("spread", "most"), [(0.0, 1e-12), (1.0, 3e-7), (2.0, 1e-6), (4.0, 6e-5)])
def test_rounding_costs_little(num_codes, spread, most):
    """Logits of a normal distribution. With a spread of 4 what it costs is the least width of 1."""
    for offset in (0, 7, 15):
        found = cost(random_rows(100, num_codes, spread, num_codes), offset)
        assert found.min() > -1e-12
        assert found.max() < most


def test_nothing_is_dearer_than_24_bits():
    row = hostile_rows(1024)["certain"].expand(1024, -1)
    bits = CodeTables(row, torch.zeros(1024, dtype=torch.int64)).intervals(torch.arange(1024)).bits()
    assert bits.max() == 24
    assert bits.min() < 1e-3


def test_borders_are_not_clear():
    """Within the guard of a border nothing is clear, beyond it everything is."""
    distances = torch.tensor([-5.0, -1.01, -0.99, -0.5, 0.0, 0.5, 0.99, 1.01, 5.0], dtype=torch.float64)
    expected = distances.abs() > 1
    for step in (LOG_PROB_STEP, PARAMETER_STEP):
        for point in (-1000, -1, 0, 7, 1000):
            values = (point + 0.5 + OFFSETS[:, None] / NUM_OFFSETS + distances * GUARD) * step
            found = OnGrid(values[..., None], step, OFFSETS[:, None].expand(-1, len(distances)))
            assert torch.equal(found.clear[..., 0], expected.expand(NUM_OFFSETS, -1))
            nearest = (point + (distances >= 0)) * NUM_OFFSETS + OFFSETS[:, None]
            assert torch.equal(found.sixteenths[..., 0], nearest)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from([1, 2, 3, 10, 100]), st.sampled_from([0.1, 1.0, 5.0, 20.0]), seeds)
def test_errors_below_the_guard_change_no_clear_table(num_codes, spread, seed):
    offsets = OFFSETS.repeat(8)
    rows = near_borders(
        random_rows(len(offsets), num_codes, spread, seed), LOG_PROB_STEP, offsets, seed, 0.3 / num_codes
    )
    rows[:8, 0] = LEAST_LOG_PROB + uniform(8, -3, 3, seed) * GUARD * LOG_PROB_STEP
    found = CodeTables(rows, offsets)
    assert_tables(found.widths())
    for error in (0.9, -0.9, uniform(rows.shape, -0.9, 0.9, seed + 2), uniform(rows.shape, -1, 1, seed).sign() * 0.9):
        again = CodeTables(rows + error * GUARD * LOG_PROB_STEP, offsets)
        same = (found.ends == again.ends).all(-1)
        assert same[found.clear].all()


def test_the_guard_is_needed():
    """The worlds of the test above do hold rows whose tables change; all of them are reported."""
    rows = near_borders(random_rows(512, 10, 1.0, 0), LOG_PROB_STEP, OFFSETS.repeat(32), 5, 0.1)
    found = CodeTables(rows, OFFSETS.repeat(32))
    changed = (found.ends != CodeTables(rows + 2 * GUARD * LOG_PROB_STEP, OFFSETS.repeat(32)).ends).any(-1)
    assert 50 < changed.sum() < 450
    assert 50 < found.clear.sum() < 450
    assert not (changed & (CodeTables(rows + GUARD * LOG_PROB_STEP, OFFSETS.repeat(32)).clear)).all()


@pytest.mark.parametrize("num_codes", [1, 3, 10, 1024, 16384])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_is_never_clear(num_codes, bad):
    for row in ([bad] * num_codes, [bad] + [-3.0] * (num_codes - 1), [-math.inf] * (num_codes - 1) + [bad]):
        found = CodeTables(torch.tensor(row, dtype=torch.float64).expand(NUM_OFFSETS, -1), OFFSETS)
        assert not found.clear.any()
        assert_tables(found.widths())


@pytest.mark.parametrize("num_codes", [1, 10, 16384])
def test_rows_that_are_no_distribution_have_tables(num_codes):
    for value in (-math.inf, -1e300, -5.0, 0.0, 1e9, 1e300):
        found = CodeTables(torch.full((NUM_OFFSETS, num_codes), value, dtype=torch.float64), OFFSETS)
        assert_tables(found.widths())
        assert value != -math.inf or not found.clear.any()


@pytest.mark.parametrize("num", [1, 2, 3, 10, 1000])
def test_even_widths(num):
    widths = even_widths(num)
    assert len(widths) == max(3, num)
    assert widths.min() >= 1
    assert widths.sum() == TOTAL
    assert widths[:num].max() - widths[:num].min() <= 1
    assert (widths[num:] == 1).all()


# Pixels


def bits_of(found: integer_tables.LevelIntervals) -> Tensor:
    """Of both steps."""
    return found.high.bits() + found.low.bits()


def random_points(intervals: integer_tables.Intervals, seed: int) -> Tensor:
    """Both ends of each interval and two points within, "4 n"."""
    left, width = intervals
    inside = (uniform((2, len(left)), 0, 1, seed) * width).long().clamp_max(width - 1)
    return torch.cat((left[None], (left + width - 1)[None], left + inside))


def symbols_at(widths: Tensor, points: Tensor) -> Tensor:
    """Which symbol's interval each point lies in."""
    return (points[..., None] >= widths.cumsum(-1)).sum(-1)


def assert_decodes(cdf, encoder: Tensor, decoder: Tensor, levels: Tensor, offsets: Tensor, seed: int = 0) -> Tensor:
    """What the encoder finds clear, the decoder decodes from its own parameters; returns what is clear."""
    found = level_intervals(cdf, encoder, levels, offsets)
    clear = found.clear
    theirs = LevelTables(cdf, decoder, offsets)
    high, low = theirs.high(), theirs.low(levels // 16)
    for widths in (high, low):
        assert_tables(widths)
    for mine, again in zip((found.high, found.low), theirs.intervals(levels), strict=True):
        assert torch.equal(mine.left[clear], again.left[clear])
        assert torch.equal(mine.width[clear], again.width[clear])
        assert (mine.width[clear] >= 1).all()
    for mine, widths, expected in ((found.high, high, levels // 16), (found.low, low, levels % 16)):
        decoded = symbols_at(widths, random_points(mine, seed))
        assert (decoded == expected)[:, clear].all()
    return clear


def some_parameters(likelihood, spread: float = 1.0) -> Tensor:
    images, features = some_images(likelihood), some_features(likelihood, spread=spread)
    return likelihood.symbol_parameters(images, features).flatten(0, 3)


def some_levels(num: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (num,), generator=generator(seed))


@pytest.mark.parametrize("spread", [0.3, 1.0, 30.0, 1e4])
def test_levels_decode(likelihood, spread):
    parameters = some_parameters(likelihood, spread)
    parameters = parameters[torch.arange(160) % len(parameters)]
    # Bounds of parameters are multiples of a step, which are borders of the grid of offset 8.
    offsets = torch.where(OFFSETS == 8, 0, OFFSETS).repeat(10)
    exact = parameters.clamp(-1e9, 1e9)
    rounded = near_borders(exact, PARAMETER_STEP, offsets, 7, 0.3 / exact.shape[1])
    rounded = torch.where(parameters.isfinite(), rounded, parameters)
    for seed in range(3):
        levels = some_levels(160, seed)
        errors = uniform(parameters.shape, -1, 1, seed).sign() * 0.9 * GUARD * PARAMETER_STEP
        clear = assert_decodes(likelihood.cdf, rounded, rounded + errors, levels, offsets, seed)
        assert 0.5 < clear.float().mean() < 1 or spread > 10
        assert assert_decodes(likelihood.cdf, parameters, parameters, levels, offsets, seed).float().mean() > 0.97


def test_all_levels_decode(likelihood):
    levels = torch.arange(256)
    for row in (0, 1, -1):
        for spread in (1.0, 50.0):
            parameters = some_parameters(likelihood, spread)[row].expand(256, -1)
            for offset in (0, 5):
                offsets = torch.full((256,), offset)
                clear = assert_decodes(likelihood.cdf, parameters, parameters, levels, offsets)
                assert clear.float().mean() > 0.9
                found = level_intervals(likelihood.cdf, parameters, levels, offsets)
                assert (bits_of(found).neg().exp2().sum() - 1).abs() < 1e-4


def test_levels_cost_what_they_should(likelihood):
    """The bits of all levels, weighted, against the entropy of the distribution."""
    levels = torch.arange(256)
    for row in range(0, 50, 7):
        parameters = some_parameters(likelihood)[row]
        pmf = likelihood.cdf(parameters, levels).diff(prepend=torch.zeros(1, dtype=torch.float64)).clamp_min(0)
        expanded = parameters.expand(256, -1)
        bits = bits_of(level_intervals(likelihood.cdf, expanded, levels, torch.full((256,), row % 16)))
        entropy = -torch.special.xlogy(pmf, pmf).sum() / math.log(2)
        assert -1e-9 < (pmf * bits).sum() - entropy < 5e-4


def extremes(likelihood) -> Tensor:
    """Parameters at and beyond all bounds, every one with every other."""
    p = likelihood.num_parameters
    values = torch.tensor([-1e4, -64.0, -7.0, -2.3, 0.0, 4.85, 7.0, 64.0, 255.0, 1e4], dtype=torch.float64)
    chosen = values[torch.randint(len(values), (320, p), generator=generator(9))]
    chosen[::3, 0] = -math.inf
    return chosen


def test_extreme_parameters(likelihood):
    parameters = extremes(likelihood)
    levels = some_levels(len(parameters), 4)
    levels[:100] = torch.tensor([0, 255]).repeat(50)
    offsets = OFFSETS.repeat(20)
    errors = uniform(parameters.shape, -0.9, 0.9, 1) * GUARD * PARAMETER_STEP
    # A round number of 64 or so steps is on the border of one grid, that of offset 8.
    clear = assert_decodes(likelihood.cdf, parameters, parameters + errors, levels, offsets)
    assert clear[offsets != 8].float().mean() > 0.9


def test_means_beyond_the_middle_keep_their_place():
    """A normal's parameters are in levels: 64 is a mean like any other."""
    likelihood = MEMBERS["normal, 1 channel"]()
    means = torch.tensor([0.0, 63.0, 65.0, 128.0, 200.0, 255.0], dtype=torch.float64)
    parameters = torch.stack((means, torch.zeros(6, dtype=torch.float64)), -1)
    bits = bits_of(level_intervals(likelihood.cdf, parameters, means.long(), torch.ones(6, dtype=torch.int64)))
    assert bits.max() < 1.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_parameters_that_are_no_numbers(likelihood, bad):
    """NaN is never clear; whatever comes, there is a table of it."""
    parameters = some_parameters(likelihood)[:32].clone()
    parameters[torch.arange(32), torch.arange(32) % likelihood.num_parameters] = bad
    levels = some_levels(32, 0)
    clear = assert_decodes(likelihood.cdf, parameters, parameters, levels, OFFSETS.repeat(2))
    assert not (math.isnan(bad) and clear.any())
    everything = torch.full_like(parameters, bad)
    clear = assert_decodes(likelihood.cdf, everything, everything, levels, OFFSETS.repeat(2))
    assert not (math.isnan(bad) and clear.any())


# Cumulative probabilities that two machines compute differently


def given_cdf(table: Tensor):
    """A CDF that looks nothing up but this table "n 255"."""

    def cdf(parameters: Tensor, levels: Tensor) -> Tensor:
        found = table.gather(-1, levels.clamp(0, 254))
        return found.masked_fill(levels < 0, 0).masked_fill(levels > 254, 1)

    return cdf


def border_table(num: int, seed: int, share: float) -> Tensor:
    """CDFs of which some values lie within three guards of the border between two integers."""
    weights = uniform((num, 256), 0, 1, seed).pow(20)
    table = (weights.cumsum(-1) / weights.sum(-1, keepdim=True))[:, :255]
    scale = TOTAL - 256
    borders = ((table * scale).floor() + 0.5 + uniform(table.shape, -3, 3, seed + 1) * CDF_GUARD) / scale
    table = torch.where(uniform(table.shape, 0, 1, seed + 2) < share, borders, table)
    return table.cummax(-1).values


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seeds)
def test_errors_of_the_cdf_change_no_clear_interval(seed):
    table = border_table(128, seed, 0.3)
    errors = uniform(table.shape, -1, 1, seed + 3).sign() * 0.9 * CDF_GUARD / 2**24
    parameters, offsets = torch.zeros(128, 1), torch.ones(128, dtype=torch.int64)
    levels = some_levels(128, seed)
    mine = level_intervals(given_cdf(table), parameters, levels, offsets)
    cdf = given_cdf(table + errors)
    theirs = level_intervals(cdf, parameters, levels, offsets)
    decoder = LevelTables(cdf, parameters, offsets)
    assert 30 < mine.clear.sum() < 128
    for one, *others in zip((mine.high, mine.low), (theirs.high, theirs.low), decoder.intervals(levels), strict=True):
        for other in others:
            assert torch.equal(one.left[mine.clear], other.left[mine.clear])
            assert torch.equal(one.width[mine.clear], other.width[mine.clear])
    assert_tables(decoder.high())
    assert_tables(decoder.low(levels // 16))


def test_borders_of_the_cdf_are_not_clear():
    distances = torch.tensor([-5.0, -1.05, -0.95, 0.0, 0.95, 1.05, 5.0], dtype=torch.float64)
    for m in (3, 1000, 2**20, 2**23):
        table = ((m + 0.5 + distances * CDF_GUARD) / (TOTAL - 256))[:, None].expand(-1, 255)
        for level in (0, 100, 255):
            found = level_intervals(given_cdf(table), torch.zeros(7, 1), torch.full((7,), level), torch.ones(7).long())
            assert torch.equal(found.clear, distances.abs() > 1)


def test_a_cdf_that_falls_has_tables():
    """By as much as rounding may make it fall, at the border between two integers."""
    table = torch.full((2, 255), (5000.5 + 1e-9) / (TOTAL - 256), dtype=torch.float64)
    table[0, 100:] -= 1e-15
    decoder = LevelTables(given_cdf(table), torch.zeros(2, 1), torch.ones(2, dtype=torch.int64))
    assert_tables(decoder.high())
    for high in range(16):
        assert_tables(decoder.low(torch.full((2,), high)))
    raw, _ = integer_tables.level_ends(given_cdf(table), torch.zeros(2, 1), torch.tensor([[99, 100]] * 2))
    assert raw.diff()[:, 0].tolist() == [0, 1]


def test_any_cdf_has_tables():
    for value in (math.nan, math.inf, -math.inf, -1e30, 1e30, 2.0, -1.0):
        table = torch.full((2, 255), 0.5, dtype=torch.float64)
        table[0] = value
        table[1, 77] = table[1, 79] = value
        decoder = LevelTables(given_cdf(table), torch.zeros(2, 1), torch.ones(2, dtype=torch.int64))
        assert_tables(decoder.high())
        for high in range(16):
            assert_tables(decoder.low(torch.full((2,), high)))
