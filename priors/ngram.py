"""The n-gram prior: counts of codes after their neighbours, and no learning beyond them. What a transformer must beat.

The neighbours of a position are the codes one step back along each axis of the grid: left and above in two dimensions.
One that lies outside the grid is a code of its own, "none". Tables of counts n(c, k), of code k after context c, are
kept for three kinds of context: the position itself, each neighbour alone, and all neighbours together. They are
smoothed from the broadest to the narrowest:

    P(k)        = (n_k + 1/2) / (n + K/2)                                             as in `priors.unigram`
    P(k | c)    = [max(n(c, k) - D, 0) + (D T(c) + 20) Q(k)] / (n(c) + 20)            one table over a broader Q
    ln Q_1(k)   = ln P(k) + m^(-0.4) sum_j (ln P(k | c_j) - ln P(k)) - ln Z           the m narrow contexts c_j
    P(k | before) = P(k | all neighbours) over Q = Q_1, where each P(k | c_j) is over Q = P(k)

- n(c) codes stood in the context, T(c) of them different. A context never seen gives Q itself.
- D discounts each count by a number that is read from the table, the share n_1 / (n_1 + 2 n_2) of counts that are 1
  or 2. It is the leave-one-out estimate of absolute discounting: Ney, Essen & Kneser 1994, "On structuring
  probabilistic dependences in stochastic language modelling".
- The 20 codes sampled from Q are the concentration of a hierarchical Pitman-Yor process, with one table for each kind
  of code (Teh 2006, "A hierarchical Bayesian language model based on Pitman-Yor processes"; MacKay & Peto 1995, "A
  hierarchical Dirichlet language model", is D = 0). On 7 x 7 grids of 1024 codes any number from
  20 to 100 gives the same bits to 0.02.
- Q_1 is a product of experts, a logarithmic opinion pool (Genest & Zidek 1986), normalised by summing over all K codes.
  Were the contexts independent given the code, the exponent would be 1; they are not, and count the same evidence
  again. m^(-0.4) is within about 0.02 bits of the best exponent for 2, 3 and 4 contexts of those grids.
- With one axis the neighbour is the full context, and Q_1 holds the position alone.

So no code has probability 0, and before any fit all codes have 1/K. The tables are sparse, sorted keys c K + k beside
their counts, and take 16 bytes for each different pair that was seen, whatever K is.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from priors.base import Prior
from priors.grid import check_size
from priors.scorers import Scorer
from priors.walks import Step, WalkStart
from safefolder.arrays import Codes
from safefolder.configured import ConfiguredOptions
from safefolder.options import Given

# Codes sampled from the broader distribution, beside those that a context has seen.
_CONCENTRATION = 20.0
# The m contexts of the product weigh m^-0.4 each.
_REDUNDANCY = -0.4
# Entries of a table that `log_prob` holds at once.
_ENTRIES = 2**24


class NGramPrior(Prior):
    """Counts of codes after their neighbours. `NGramPrior(num_codes=512, grid=(7, 7))`, then `fit(codes)`.

    Args:
        num_stored: entries that each of its tables has room for, to be loaded; `fit` makes room by itself.

    Attributes:
        counts: int64 "k", how often each code was seen.
        counted: the tables of counts: of the position, of each neighbour if there are several, and of all neighbours.
    """

    counts: Tensor
    neighbours: Tensor

    def __init__(
        self,
        *,
        num_codes: Given[int] = 512,
        grid: Given[Sequence[int]] = (7, 7),
        num_stored: Given[Sequence[int]] = (),
    ):
        super().__init__(num_codes=num_codes, grid=grid)
        self.register_buffer("counts", torch.zeros(num_codes, dtype=torch.int64))
        self.register_buffer("neighbours", _neighbours(self.grid), persistent=False)
        tables = (CountTable(num_codes, size) for size in self.config.num_stored)
        self.counted = cast(Sequence[CountTable], nn.ModuleList(tables))

    @classmethod
    def check_options(cls, options: ConfiguredOptions) -> None:
        super().check_options(options)
        num_codes, axes = options.num_codes, len(options.grid)
        if (num_codes + 1) ** axes * num_codes >= 2**63:
            raise ValueError(
                f"got {num_codes} codes on a grid of {axes} axes, expected contexts that fit into 63 bits: "
                f"(num_codes + 1)^{axes} * num_codes < 2^63"
            )
        num_tables = 2 if axes == 1 else axes + 2
        if options.num_stored == ():
            options.put(num_stored=(0,) * num_tables)
        if len(options.num_stored) != num_tables:
            raise ValueError(
                f"got num_stored={options.num_stored!r}, expected a number for each of {num_tables} tables"
            )
        for size in options.num_stored:
            check_size(size + 1, "num_stored + 1")

    def fit(self, codes: Codes) -> "NGramPrior":
        """Add the codes to the counts; call it once a batch. Returns the prior itself."""
        codes = self._check_codes(codes, "codes", self.grid).flatten(1)
        self.counts += torch.bincount(codes.flatten(), minlength=self.num_codes)
        positions = torch.arange(self.num_positions, device=self.device).expand_as(codes)
        for table, contexts in zip(self.counted, self._contexts(codes, positions), strict=True):
            table.add(contexts.flatten(), codes.flatten())
        stored = tuple(table.keys.numel() for table in self.counted)
        self.config = dataclasses.replace(self.config, num_stored=stored)
        return self

    def _contexts(self, codes: Tensor, positions: Tensor) -> list[Tensor]:
        """The contexts "b m" for each table, at positions "b m", from codes "b n"."""
        at = self.neighbours[positions]
        padded = F.pad(codes, (0, 1), value=self.num_codes)
        around = padded.gather(1, at.flatten(1)).unflatten(1, at.shape[1:]).unbind(-1)
        together = torch.zeros_like(positions)
        for code in around:
            together = together * (self.num_codes + 1) + code
        return [positions, together] if len(around) == 1 else [positions, *around, together]

    def _log_probs_at(self, readers: list["CountReader"], codes: Tensor, positions: Tensor) -> Tensor:
        """ln P(z_i = . | before i) "b m k" at positions "b m" from codes "b n", of which those before each are read."""
        *narrow, together = [context.flatten() for context in self._contexts(codes, positions)]
        unigram = (self.counts.to(readers[0].counts.dtype) + 0.5).log()
        unigram = unigram - unigram.logsumexp(0)
        weight = len(narrow) ** _REDUNDANCY
        pool = unigram.mul(1 - weight * len(narrow)).repeat(positions.numel(), 1)
        for reader, context in zip(readers, narrow, strict=False):
            # Many rows share a context; each is worked out once.
            kinds, which = context.unique(return_inverse=True)
            pool += reader.smooth(kinds, unigram.expand(len(kinds), -1)).mul_(weight).index_select(0, which)
        return readers[-1].smooth(together, pool.log_softmax(-1)).to(self.dtype).unflatten(0, positions.shape)

    def _readers(self) -> list["CountReader"]:
        # In float64, in which a table does not show how many others were made with it.
        exact = self.dtype if self.device.type == "mps" else torch.float64
        return [CountReader(table, self.num_codes, exact) for table in self.counted]

    def _log_prob(self, codes: Tensor, labels: Tensor | None) -> Tensor:
        readers = self._readers()
        total = torch.zeros(len(codes), dtype=self.dtype, device=self.device)
        rows = max(1, _ENTRIES // self.num_codes)
        for begin in range(0, len(codes), rows):
            part = codes[begin : begin + rows]
            for position in range(self.num_positions):
                log_probs = self._log_probs_at(readers, part, self._all_at(position, part))[:, 0]
                total[begin : begin + rows] += log_probs.gather(1, part[:, position, None])[:, 0]
        return total

    def _log_conditionals(self, codes: Tensor, labels: Tensor | None) -> Tensor:
        readers = self._readers()
        steps = (self._all_at(position, codes) for position in range(self.num_positions))
        return torch.cat([self._log_probs_at(readers, codes, step) for step in steps], 1)

    def _start_walk(self, start: WalkStart) -> Step:
        readers = self._readers()
        codes = torch.zeros(start.num, self.num_positions, dtype=torch.int64, device=self.device)
        position = 0

        def step(fixed: Tensor) -> Tensor:
            nonlocal position
            codes[:, position : position + fixed.shape[1]] = fixed
            position += fixed.shape[1]
            return self._log_probs_at(readers, codes, self._all_at(position, codes))

        return step

    def _start_scorer(self, start: WalkStart, most: int) -> Scorer:
        readers = self._readers()
        return lambda codes, begins, at: self._log_probs_at(readers, codes[:, : self.num_positions], at)

    @staticmethod
    def _all_at(position: int, codes: Tensor) -> Tensor:
        """One position for all grids, "b 1"."""
        return codes.new_full((len(codes), 1), position)

    def check_loaded(self) -> None:
        wide = self.num_codes + 1
        limits = [self.num_positions, *[wide] * (len(self.counted) - 2), wide ** len(self.grid)]
        for table, num_contexts in zip(self.counted, limits, strict=True):
            table.check(num_contexts)
        if bool((self.counts < 0).any()):
            raise ValueError("got negative counts of codes, expected how often each was seen")


class CountTable(nn.Module):
    """How often each code was seen in each context: pairs that were never seen take no room.

    Attributes:
        keys: int64, context * num_codes + code of each pair seen, rising.
        counts: int64, how often.
    """

    keys: Tensor
    counts: Tensor

    def __init__(self, num_codes: int, size: int = 0):
        super().__init__()
        self.num_codes = num_codes
        self.register_buffer("keys", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("counts", torch.zeros(size, dtype=torch.int64))

    def check(self, num_contexts: int) -> None:
        """ValueError unless the keys rise, are pairs of so many contexts with codes, and were seen at least once."""
        keys = self.keys
        outside = len(keys) > 0 and (int(keys[0]) < 0 or int(keys[-1]) >= num_contexts * self.num_codes)
        if outside or bool((keys[1:] <= keys[:-1]).any()) or bool((self.counts < 1).any()):
            raise ValueError("got a table of counts that nobody counted, expected rising keys, each seen at least once")

    def add(self, contexts: Tensor, codes: Tensor) -> None:
        """Count pairs of contexts "n" and codes "n"."""
        new, num = (contexts * self.num_codes + codes).unique(return_counts=True)
        at = torch.searchsorted(self.keys, new)
        # A last key that nothing equals, so that what belongs behind all keys finds one.
        known = F.pad(self.keys, (0, 1), value=-1)[at] == new
        fresh = ~known
        self.counts[at[known]] += num[known]
        # Two sorted lists become one: each new key stands behind the old ones below it and the new ones before.
        positions = at[fresh] + torch.arange(int(fresh.sum()), device=at.device)
        old = torch.ones(len(self.keys) + len(positions), dtype=torch.bool, device=at.device)
        old[positions] = False
        self.keys = torch.empty_like(old, dtype=torch.int64).masked_scatter_(old, self.keys)
        self.keys[positions] = new[fresh]
        self.counts = torch.empty_like(self.keys).masked_scatter_(old, self.counts)
        self.counts[positions] = num[fresh]


class CountReader:
    """Smoothed log-probabilities from a table of counts as it is now."""

    def __init__(self, table: CountTable, num_codes: int, dtype: torch.dtype):
        self.num_codes, self.keys, self.counts = num_codes, table.keys, table.counts.to(dtype)
        self.before = F.pad(table.counts.cumsum(0), (1, 0))
        once, twice = ((table.counts == number).sum().item() for number in (1, 2))
        self.discount = once / (once + 2 * twice) if once else 0.0

    def smooth(self, contexts: Tensor, broader: Tensor) -> Tensor:
        """ln P(. | context) "b k" of contexts "b", over the broader distributions ln Q "b k"."""
        first = torch.searchsorted(self.keys, contexts * self.num_codes)
        last = torch.searchsorted(self.keys, (contexts + 1) * self.num_codes)
        kinds = last - first
        total = (self.before[last] - self.before[first]).to(broader.dtype) + _CONCENTRATION
        log_probs = broader + ((self.discount * kinds + _CONCENTRATION) / total).log()[:, None]
        # The entries of all rows in one list; each row's begin where those of the rows before it end.
        rows = torch.arange(len(contexts), device=contexts.device).repeat_interleave(kinds)
        entries = (first - kinds.cumsum(0) + kinds).index_select(0, rows)
        entries += torch.arange(len(rows), device=rows.device)
        seen = (self.counts.index_select(0, entries) - self.discount).log() - total.log().index_select(0, rows)
        # Key c K + code of row i stands at i K + code of the result.
        offset = (torch.arange(len(contexts), device=rows.device) - contexts) * self.num_codes
        cells = self.keys.index_select(0, entries) + offset.index_select(0, rows)
        flat = log_probs.view(-1)
        flat.index_copy_(0, cells, torch.logaddexp(flat.index_select(0, cells), seen))
        return log_probs


def _neighbours(grid: Sequence[int]) -> Tensor:
    """The position one step back from each position along each axis, "n axes"; n where there is none."""
    num = math.prod(grid)
    positions = torch.arange(num).reshape(*grid)
    return torch.stack(
        [
            torch.cat((torch.full_like(positions.narrow(axis, 0, 1), num), positions.narrow(axis, 0, size - 1)), axis)
            for axis, size in enumerate(grid)
        ],
        -1,
    ).reshape(num, len(grid))
