"""From real numbers that two machines compute slightly differently to integers on which they agree.

An arithmetic coder works only if encoder and decoder have the same table for every symbol, to the last unit. Networks
do not give that: the same layer sums in another order with another batch, another number of threads or another
library, and its results differ in their last bits. Two steps make the tables agree all the same.

1. What the networks give (log-probabilities of codes; the parameters of each pixel's distribution) is computed in
   float64 and rounded to a grid that is far coarser than its rounding errors, 1e-13 or so.
2. What is rounded are numbers that lie away from the border between two grid points. The encoder sees how far each one
   lies from it. Where one of an image's many thousand numbers lies within `GUARD` grid steps, the image is coded on
   another grid, shifted by a sixteenth of a step (`offset` 1, 2, .. 15), and the file says so. So an error below
   GUARD * step, thirty times what was ever seen, cannot change any table, whoever decodes.

Integers follow, of a total of 2^24. A symbol's interval is [left, left + width), 0 <= left, 1 <= width:

    codes    w_k = 2^30 exp(grid point of ln P(k)) by a table of integers,  left_k = C_k (2^24 - K) // C_K + k
             with C_k = w_0 + .. + w_{k-1}: nothing but integers after the grid point
    pixels   c(v) = floor(P(level <= v) (2^24 - 256) + 1/2) + v + 1;  c(-1) = 0, c(255) = 2^24

The CDF of a pixel is computed in float64 from parameters on the grid, alike to 1e-15 everywhere; the same guard,
`CDF_GUARD`, holds it off the borders between integers. A level is coded in two steps of 16, first its sixteen, then its
place there, since a decoder that looks for it then needs c(v) at 31 levels and not at 255:

    level = 16 high + low;   high: [c(16 high - 1), c(16 high + 15));
    low: ((c(16 high - 1 + j) - c(16 high - 1)) (2^24 - 16)) // (c(16 high + 15) - c(16 high - 1)) + j for j = low

The bits that are reported are 24 - log2(width), of these integers. What rounding and the least width of 1 cost is held
by tests/vqvae/test_codec_integer_tables.py: below 1e-6 bit a code for 1,024 codes of ordinary odds.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

PRECISION = 24
TOTAL = 1 << PRECISION
NUM_OFFSETS = 16
NUM_LEVELS = 256
STEP = 16

LOG_PROB_STEP = 2.0**-10
PARAMETER_STEP = 2.0**-14
# In grid steps: 9e-13 of a parameter and 1.5e-11 of a log-probability, where 3e-14 is the most that was seen between a
# walk and all positions at once. A wider guard would find no grid on which millions of numbers are clear.
GUARD = 2.0**-26
# In units of 2^-24 of a probability: 1.4e-14, ten times what float64 leaves open in a CDF.
CDF_GUARD = 2.0**-22
# A log-weight of -1024 is a weight of 0, and a mean of 1024 lies outside, be it counted in levels or on [-1, 1].
_FARTHEST = 1024.0
# exp(-22) of a total of 2^24 is less than the width of 1 that every symbol has anyway.
LEAST_LOG_PROB = -22.0
_MOST = 2.0**50

_WEIGHT_BITS = 30
# The most codes: a sixteenth of the total would be spent on widths of 1.
MAX_CODES = 1 << 20


class Intervals(NamedTuple):
    """Where symbols lie in [0, 2^24), int64 tensors of one shape."""

    left: Tensor
    width: Tensor

    def bits(self) -> Float[Tensor, " *n"]:
        """24 - log2(width) each, float64."""
        return PRECISION - self.width.double().log2()

    def position_by_position(self) -> "Intervals":
        """Of "t n", first those of all t at the first position: "n t" in a row."""
        return Intervals(self.left.T.flatten(), self.width.T.flatten())


class OnGrid:
    """Numbers on a grid that is shifted by `offsets` sixteenths of a step.

    A decoder does not ask which are clear, and that is never computed for it.

    Attributes:
        sixteenths: the nearest grid points, as multiples of a sixteenth of a step; of NaN, the first one.
    """

    def __init__(self, values: Float[Tensor, "*n p"], step: float, offsets: Int[Tensor, " *n"]):
        # Beyond 2^50 a float64 has no room for the guard.
        self._scaled = (values.double() * (1 / step) + (0.5 - offsets[..., None] / NUM_OFFSETS)).clamp_(-_MOST, _MOST)
        self._points = self._scaled.floor()
        self.sixteenths = self._points.nan_to_num().long().mul_(NUM_OFFSETS).add_(offsets[..., None])

    @property
    def clear(self) -> Bool[Tensor, "*n p"]:
        """Whether each lies clear of a border between grid points. What is not finite does not."""
        part = self._scaled - self._points
        return (part >= GUARD) & (part <= 1 - GUARD) & (self._scaled.abs() < _MOST)


@functools.cache
def _weights_on(device: torch.device) -> Int[Tensor, " n"]:
    return _weights().to(device)


@functools.lru_cache(maxsize=1)
def _weights() -> Int[Tensor, " n"]:
    """round(2^30 exp(-i / 2^14)) for all multiples i of a sixteenth of a step down to `LEAST_LOG_PROB`.

    By integers alone, since the library function differs between machines in its last bit.
    """
    guard_bits = 96
    one = 1 << guard_bits
    # exp(-2^-14) by its series, to more than the bits that are kept.
    term = ratio = one
    for n in range(1, 12):
        term = -(term >> 14) // n
        ratio += term
    value, weights = one, []
    half = 1 << (guard_bits - _WEIGHT_BITS - 1)
    for _ in range(int(-LEAST_LOG_PROB / LOG_PROB_STEP * NUM_OFFSETS) + 1):
        weights.append((value + half) >> (guard_bits - _WEIGHT_BITS))
        value = (value * ratio) >> guard_bits
    return torch.tensor(weights)


class CodeTables:
    """Integer tables over K codes, of normalised log-probabilities.

    Fewer than three codes get padding that never occurs: a symbol must leave room on either side (`vqvae.codec.coder`).

    Attributes:
        ends: 0, and the right ends of all intervals, `"*n k+1"` int64.
    """

    def __init__(self, log_probs: Float[Tensor, "*n k"], offsets: Int[Tensor, " *n"]):
        log_probs = F.pad(log_probs, (0, max(0, 3 - log_probs.shape[-1])), value=-torch.inf)
        num_codes = log_probs.shape[-1]
        self._log_probs = log_probs.double()
        self._grid = OnGrid(self._log_probs.clamp_min(LEAST_LOG_PROB), LOG_PROB_STEP, offsets)
        table = _weights_on(log_probs.device)
        # The weights of a distribution add up to little more than 2^30; whatever is none must not overflow below.
        sums = table[self._grid.sixteenths.neg().clamp_(0, len(table) - 1)].cumsum(-1).clamp_max_(1 << 38)
        total = sums[..., -1:].clamp_min(1)
        self.ends = F.pad(sums.mul_(TOTAL - num_codes).div_(total, rounding_mode="floor"), (1, 0))
        self.ends += torch.arange(num_codes + 1, device=sums.device)
        # A row that is not a distribution has no clear entry; its table only has to be one.
        self.ends[..., -1] = TOTAL

    @property
    def clear(self) -> Bool[Tensor, " *n"]:
        """Which tables are sure to be the same everywhere."""
        # What lies below the least is cut off to one and the same value on every machine.
        clear = self._grid.clear | (self._log_probs <= LEAST_LOG_PROB)
        return clear.all(-1) & torch.isfinite(self._log_probs).any(-1)

    def intervals(self, codes: Int[Tensor, " *n"]) -> Intervals:
        """Where codes lie."""
        left = self.ends.gather(-1, codes[..., None])[..., 0]
        return Intervals(left, self.ends.gather(-1, codes[..., None] + 1)[..., 0] - left)

    def widths(self) -> Int[Tensor, "*n k"]:
        """The widths of all codes, at least 1 each; they add up to 2^24."""
        return self.ends.diff(dim=-1)


def even_widths(num_symbols: int) -> Int[Tensor, " k"]:
    """The widths of symbols at even odds; fewer than three get padding of width 1."""
    padding = max(0, 3 - num_symbols)
    ends = torch.arange(num_symbols + 1) * (TOTAL - padding) // num_symbols
    return torch.cat((ends.diff(), torch.ones(padding, dtype=torch.int64)))


Cdf = Callable[[Tensor, Tensor], Tensor]
"""`cdf(parameters "n p", levels "n e") -> float64 "n e"`, P(level <= v)."""


def rounded(parameters: Float[Tensor, "*n p"], offsets: Int[Tensor, " *n"]) -> tuple[Tensor, OnGrid]:
    """Parameters on their grid, float64."""
    grid = OnGrid(parameters.double().clamp(-_FARTHEST, _FARTHEST), PARAMETER_STEP, offsets)
    return grid.sixteenths * (PARAMETER_STEP / NUM_OFFSETS), grid


def level_ends(cdf: Cdf, parameters: Float[Tensor, "n p"], levels: Int[Tensor, "n e"]) -> tuple[Tensor, Tensor]:
    """c(v) at these levels, int64, and what it was rounded from: c(v) - v - 1/2."""
    scaled = cdf(parameters, levels).mul_(TOTAL - NUM_LEVELS).add_(0.5)
    return scaled.floor().long().add_(levels).add_(1), scaled


class LevelIntervals(NamedTuple):
    """A level's two steps, and whether they are sure to be the same everywhere."""

    high: Intervals
    low: Intervals
    clear: Bool[Tensor, " n"]


def level_intervals(
    cdf: Cdf, parameters: Float[Tensor, "n p"], levels: Int[Tensor, " n"], offsets: Int[Tensor, " n"]
) -> LevelIntervals:
    """Where known levels lie."""
    points, grid = rounded(parameters, offsets)
    first = levels // STEP * STEP
    wanted = torch.stack((first - 1, first + STEP - 1, levels - 1, levels), -1)
    ends, scaled = level_ends(cdf, points, wanted)
    part = scaled - scaled.floor()
    sure = (part >= CDF_GUARD) & (part <= 1 - CDF_GUARD)
    start, stop, before, after = ends.unbind(-1)
    span, low = (stop - start).clamp_min(STEP), levels - first
    left = _within(before - start, span) + low
    right = _within(after - start, span) + low + 1
    return LevelIntervals(
        high=Intervals(start, stop - start),
        low=Intervals(left, right - left),
        clear=grid.clear.all(-1) & sure.all(-1),
    )


class LevelTables:
    """What a decoder needs to find levels: the widths of the sixteens, then those within the sixteen that was found."""

    def __init__(self, cdf: Cdf, parameters: Float[Tensor, "n p"], offsets: Int[Tensor, " n"]):
        self._cdf = cdf
        self._points, _ = rounded(parameters, offsets)
        uppers = torch.arange(STEP - 1, NUM_LEVELS, STEP, device=parameters.device).expand(len(parameters), -1)
        ends, _ = level_ends(cdf, self._points, uppers)
        self._ends = torch.cat((torch.zeros_like(ends[:, :1]), ends), -1)

    def high(self) -> Int[Tensor, "n 16"]:
        return _widths(self._ends, TOTAL)

    def low(self, high: Int[Tensor, " n"]) -> Int[Tensor, "n 16"]:
        start, stop = (self._ends.gather(-1, high[:, None] + i) for i in (0, 1))
        inner = high[:, None] * STEP + torch.arange(STEP - 1, device=high.device)
        ends, _ = level_ends(self._cdf, self._points, inner)
        ends = torch.cat((torch.zeros_like(start), ends - start, stop - start), -1)
        span = (stop - start).clamp_min(STEP)
        return _widths(_within(ends, span) + torch.arange(STEP + 1, device=high.device), TOTAL)

    def intervals(self, levels: Int[Tensor, " n"]) -> tuple[Intervals, Intervals]:
        """Where levels lie in these tables, in both steps."""
        high = levels // STEP
        return _at(self.high(), high), _at(self.low(high), levels % STEP)


def _at(widths: Tensor, symbols: Tensor) -> Intervals:
    width = widths.gather(-1, symbols[:, None])[:, 0]
    return Intervals(widths.cumsum(-1).gather(-1, symbols[:, None])[:, 0] - width, width)


def _within(ends: Tensor, span: Tensor) -> Tensor:
    return ends * (TOTAL - STEP) // span


def _widths(ends: Tensor, total: int) -> Tensor:
    """Widths of at least 1 that add up to the total, whatever a chance of one in billions did to the ends."""
    n = ends.shape[-1] - 1
    # What the ends have beyond a width of 1 for each symbol.
    beyond = (ends - torch.arange(n + 1, device=ends.device)).clamp_(0, total - n).cummax(-1).values
    beyond[..., -1] = total - n
    return beyond.diff(dim=-1) + 1
