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


@pytest.fixture(params=[name for name in MEMBERS if "3 channels" in name or "1 comp" in name or "narrow" in name])
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


def test_weights_are_exact():
    weights = integer_tables._weights()
    num = 22 * 1024 * 16 + 1
    assert len(weights) == num
    chance = random.Random(0)
    with localcontext() as context:
        context.prec = 40
        for i in [*range(9), *range(num - 9, num), *(chance.randrange(num) for _ in range(1000))]:
            exact = (Decimal(-i) / 2**14).exp() * 2**30
            assert int(exact.to_integral_value(ROUND_HALF_UP)) == weights[i]


def hostile_rows(num_codes: int) -> dict[str, Tensor]:
    certain = torch.full((num_codes,), -torch.inf, dtype=torch.float64)
    certain[num_codes // 2] = 0.0
    nearly = torch.full((num_codes,), -40.0, dtype=torch.float64)
    nearly[-1] = math.log1p(-num_codes * math.exp(-40))
    half = random_rows(1, num_codes, 2.0, 1)[0]
    half[1::2] = -torch.inf
    return {
        "even": torch.full((num_codes,), -math.log(num_codes), dtype=torch.float64),
        "certain": certain,
        "first": certain.roll(num_codes - num_codes // 2),
        "nearly": nearly,
        "half": half.log_softmax(-1),
        "sharp": random_rows(1, num_codes, 20.0, 2)[0],
    }


@pytest.mark.parametrize("num_codes", [1, 2, 3, 1024])
def test_codes_have_tables(num_codes):
    for name, row in hostile_rows(num_codes).items():
        found = CodeTables(row.expand(NUM_OFFSETS, -1), OFFSETS)
        assert_tables(found.widths())
        assert found.clear.float().mean() > 0.6, name
        probs = torch.cat((row, row.new_full((max(0, 3 - num_codes),), -torch.inf))).exp()
        # A grid step of 2^-10, shared by all, and the least width of 1.
        off = (found.widths() / TOTAL - probs).abs()
        assert (off <= probs * 2**-9 + (1 + num_codes * probs) * 2.0**-23).all(), name
        codes = torch.arange(num_codes)
        for i in range(0, num_codes, max(1, num_codes // 20)):
            left, width = found.intervals(codes[i].expand(NUM_OFFSETS))
            assert torch.equal(left, found.widths()[:, :i].sum(-1))
            assert torch.equal(width, found.widths()[:, i])


@pytest.mark.parametrize("num_codes", [3, 64, 1024])
@pytest.mark.parametrize(("spread", "most"), [(0.0, 1e-12), (2.0, 1e-6), (4.0, 6e-5)])
def test_rounding_costs_little(num_codes, spread, most):
    """Bits a symbol beyond the entropy. With a spread of 4 what it costs is the least width of 1."""
    log_probs = random_rows(100, num_codes, spread, num_codes)
    for offset in (0, 7, 15):
        widths = CodeTables(log_probs, torch.full((100,), offset)).widths()
        bits = integer_tables.PRECISION - widths.double().log2() + log_probs / math.log(2)
        found = (log_probs.exp() * bits).sum(-1)
        assert found.min() > -1e-12
        assert found.max() < most


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


@pytest.mark.parametrize("num_codes", [1, 3, 1024])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e300, -5.0, 0.0, 1e300])
def test_rows_that_are_no_distribution_have_tables(num_codes, value):
    """Where they hold what is no number, they are never clear."""
    row = torch.full((num_codes,), value, dtype=torch.float64)
    for each in (row, torch.cat((row[:1], torch.full_like(row[1:], -3.0)))):
        found = CodeTables(each.expand(NUM_OFFSETS, -1), OFFSETS)
        assert_tables(found.widths())
        assert each.max().isfinite() or not found.clear.any()


@pytest.mark.parametrize("num", [1, 2, 3, 10, 1000])
def test_even_widths(num):
    widths = even_widths(num)
    assert len(widths) == max(3, num)
    assert widths.min() >= 1
    assert widths.sum() == TOTAL
    assert widths[:num].max() - widths[:num].min() <= 1
    assert (widths[num:] == 1).all()


def assert_decodes(cdf, encoder: Tensor, decoder: Tensor, levels: Tensor, offsets: Tensor, seed: int = 0) -> Tensor:
    """What the encoder finds clear, the decoder decodes from its own parameters; returns what is clear."""
    found = level_intervals(cdf, encoder, levels, offsets)
    theirs, clear = LevelTables(cdf, decoder, offsets), found.clear
    tables, symbols = (theirs.high(), theirs.low(levels // 16)), (levels // 16, levels % 16)
    steps = zip((found.high, found.low), theirs.intervals(levels), tables, symbols, strict=True)
    for mine, again, widths, expected in steps:
        assert_tables(widths)
        assert torch.equal(mine.left[clear], again.left[clear])
        assert torch.equal(mine.width[clear], again.width[clear])
        # At both ends of each interval, and at two points within.
        inside = (uniform((2, len(levels)), 0, 1, seed) * mine.width).long().clamp_max(mine.width - 1)
        points = mine.left + torch.cat((torch.zeros_like(inside[:1]), mine.width[None] - 1, inside))
        decoded = (points[..., None] >= widths.cumsum(-1)).sum(-1)
        assert (decoded == expected)[:, clear].all()
    return clear


def some_parameters(likelihood, spread: float = 1.0) -> Tensor:
    images, features = some_images(likelihood), some_features(likelihood, spread=spread)
    return likelihood.symbol_parameters(images, features).flatten(0, 3)


def some_levels(num: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (num,), generator=generator(seed))


def test_levels_decode(likelihood):
    # Bounds of parameters are multiples of a step, which are borders of the grid of offset 8.
    offsets = torch.where(OFFSETS == 8, 0, OFFSETS).repeat(10)
    for seed, spread in enumerate((0.3, 1.0, 30.0, 1e4)):
        parameters = some_parameters(likelihood, spread)
        parameters = parameters[torch.arange(160) % len(parameters)]
        rounded = near_borders(parameters.clamp(-1e9, 1e9), PARAMETER_STEP, offsets, 7, 0.3 / parameters.shape[1])
        rounded = torch.where(parameters.isfinite(), rounded, parameters)
        levels = some_levels(160, seed)
        errors = uniform(parameters.shape, -1, 1, seed).sign() * 0.9 * GUARD * PARAMETER_STEP
        clear = assert_decodes(likelihood.cdf, rounded, rounded + errors, levels, offsets, seed)
        assert 0.5 < clear.float().mean() < 1 or spread > 10
        assert assert_decodes(likelihood.cdf, parameters, parameters, levels, offsets, seed).float().mean() > 0.97


def test_all_levels_decode_and_cost_what_they_should(likelihood):
    """The bits of all levels, weighted, against the entropy of the distribution."""
    levels = torch.arange(256)
    for row, spread, offset in ((0, 1.0, 0), (7, 1.0, 7), (21, 1.0, 5), (1, 50.0, 5), (-1, 50.0, 0)):
        parameters = some_parameters(likelihood, spread)[row]
        expanded, offsets = parameters.expand(256, -1), torch.full((256,), offset)
        clear = assert_decodes(likelihood.cdf, expanded, expanded, levels, offsets)
        assert clear.float().mean() > 0.9
        found = level_intervals(likelihood.cdf, expanded, levels, offsets)
        bits = found.high.bits() + found.low.bits()
        assert (bits.neg().exp2().sum() - 1).abs() < 1e-4
        pmf = likelihood.cdf(parameters, levels).diff(prepend=torch.zeros(1, dtype=torch.float64)).clamp_min(0)
        entropy = -torch.special.xlogy(pmf, pmf).sum() / math.log(2)
        assert -1e-9 < (pmf * bits).sum() - entropy < 5e-4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_parameters_that_are_no_numbers(likelihood, bad):
    """NaN is never clear; whatever comes, there is a table of it."""
    some = some_parameters(likelihood)[:32].clone()
    some[torch.arange(32), torch.arange(32) % likelihood.num_parameters] = bad
    for parameters in (some, torch.full_like(some, bad)):
        clear = assert_decodes(likelihood.cdf, parameters, parameters, some_levels(32, 0), OFFSETS.repeat(2))
        assert not (math.isnan(bad) and clear.any())


def given_cdf(table: Tensor):
    """A CDF that looks nothing up but this table "n 255"."""

    def cdf(parameters: Tensor, levels: Tensor) -> Tensor:
        found = table.gather(-1, levels.clamp(0, 254))
        return found.masked_fill(levels < 0, 0).masked_fill(levels > 254, 1)

    return cdf


def test_borders_of_the_cdf_are_not_clear():
    distances = torch.tensor([-5.0, -1.05, -0.95, 0.0, 0.95, 1.05, 5.0], dtype=torch.float64)
    for m in (3, 1000, 2**20, 2**23):
        table = ((m + 0.5 + distances * CDF_GUARD) / (TOTAL - 256))[:, None].expand(-1, 255)
        for level in (0, 100, 255):
            found = level_intervals(given_cdf(table), torch.zeros(7, 1), torch.full((7,), level), torch.ones(7).long())
            assert torch.equal(found.clear, distances.abs() > 1)


def assert_all_tables(table: Tensor) -> None:
    decoder = LevelTables(given_cdf(table), torch.zeros(2, 1), torch.ones(2, dtype=torch.int64))
    assert_tables(decoder.high())
    for high in range(16):
        assert_tables(decoder.low(torch.full((2,), high)))


def test_a_cdf_that_falls_has_tables():
    """By as much as rounding may make it fall, at the border between two integers."""
    table = torch.full((2, 255), (5000.5 + 1e-9) / (TOTAL - 256), dtype=torch.float64)
    table[0, 100:] -= 1e-15
    assert_all_tables(table)
    raw, _ = integer_tables.level_ends(given_cdf(table), torch.zeros(2, 1), torch.tensor([[99, 100]] * 2))
    assert raw.diff()[:, 0].tolist() == [0, 1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e30, 1e30, 2.0, -1.0])
def test_any_cdf_has_tables(value):
    table = torch.full((2, 255), 0.5, dtype=torch.float64)
    table[0] = value
    table[1, 77] = table[1, 79] = value
    assert_all_tables(table)
