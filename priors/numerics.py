"""How a block of grids is sampled on this machine: candidates are timed at their real sizes, and the fastest is taken.

What pays depends on processor, library, sizes and number of grids, and no rule knew all machines
(benchmarks/README.md): float32 or bfloat16, weights in oneDNN's layout or torch's own, and how many codes a draft
proposes in a pass. 8-bit weights are no candidate, since they change what is sampled, and torch.compile is none, since
it takes a while first: both can be asked for.

What was found is part of what a seed promises. It is kept for the machine, in `vqvae/numerics.json` under
XDG_CACHE_HOME or ~/.cache, by processor, threads, version of torch, sizes and number of rows; without that file each
process measures anew. `Sampling(precision=..., num_proposals=...)` fixes it. The logger `priors` says at level INFO
what was taken.
"""

import contextlib
import functools
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from priors.precision import Arithmetic
from safefolder.files import write_text
from safefolder.locks import one_writer

_log = logging.getLogger("priors")
_TIMED = 4
# Walks that are simulated to tell how many passes a block takes.
_SIMULATED = 64
# Multiplications of a step below which its arithmetic makes no difference worth a trial.
_SMALL = 2**19
# What a guess at speculation has to save at least: passes are fewer only on average.
_MARGIN = 0.95


@dataclass(frozen=True)
class Numerics:
    """Arithmetic of a walk, and how many codes a draft proposes in each pass; 0 is a walk code by code."""

    arithmetic: Arithmetic
    num_proposals: int = 0

    def __str__(self) -> str:
        arithmetic = self.arithmetic
        words = ["int8" if arithmetic.int8 else str(arithmetic.dtype).removeprefix("torch.")]
        words += ["compiled"] if arithmetic.compiled else [] if arithmetic.packed else ["not packed"]
        return ", ".join([*words, *([f"{self.num_proposals} proposals"] if self.num_proposals else [])])

    def to_plain(self) -> dict[str, object]:
        """As data for JSON, of one that was measured."""
        dtype = str(self.arithmetic.dtype).removeprefix("torch.")
        return {"dtype": dtype, "packed": self.arithmetic.packed, "num_proposals": self.num_proposals}

    @classmethod
    def from_plain(cls, plain: object, among: Sequence["Numerics"]) -> "Numerics | None":
        """The candidate that `to_plain` gave, or None."""
        return next((each for each in among if each.to_plain() == plain), None)


_known: dict[str, Numerics] = {}


def is_small(num_weights: int, rows: int) -> bool:
    """Whether no trial pays for steps of so many rows through so many weights."""
    return num_weights * rows < _SMALL


def fastest(name: str, candidates: Mapping[Numerics, Callable[[], float]]) -> Numerics:
    """The candidate whose trial takes the fewest seconds, or what was found so before.

    Args:
        name: of what is sampled: model, sizes, rows.
        candidates: each with a trial, which returns seconds for a position of all grids.
    """
    key = f"{_machine()}, {torch.get_num_threads()} threads | {name}"
    if key not in _known:
        kept = Numerics.from_plain(_read().get(key), list(candidates))
        _known[key] = kept or _measured(key, candidates)
        _log.info("samples in %s%s", _known[key], ", as measured before" if kept else "")
    return _known[key]


def timed(step: Callable[[], object], times: int = _TIMED) -> float:
    """Seconds of a step: the least of some, as what else runs only adds to it. The first is not counted."""
    found = []
    for _ in range(times + 1):
        start = time.perf_counter()
        step()
        found.append(time.perf_counter() - start)
    return min(found[1:])


@functools.cache
def passes(num_positions: int, rows: int, accepted: tuple[float, ...]) -> float:
    """How many passes a block of `rows` grids takes until the last is whole, on average, if the proposals of a pass are
    accepted with these probabilities, each if the one before was. By simulation, the same each time."""
    generator = np.random.default_rng(0)
    left = np.full((_SIMULATED, rows), num_positions - 1)  # the first pass proposes nothing
    count = np.ones(_SIMULATED)
    while (left > 0).any():
        count += (left > 0).any(1)
        is_taken = generator.random((_SIMULATED, rows, len(accepted))) < np.array(accepted)
        left -= 1 + is_taken.cumprod(-1).sum(-1)
    return float(count.mean())


def worth(seconds_a_pass: float, num_positions: int, rows: int, accepted: tuple[float, ...]) -> float:
    """Seconds for a position of a block that is sampled by such passes, with the margin that they have to have."""
    return seconds_a_pass * passes(num_positions, rows, accepted) / num_positions / _MARGIN


def _measured(key: str, candidates: Mapping[Numerics, Callable[[], float]]) -> Numerics:
    seconds = dict.fromkeys(candidates, math.inf)
    # There and back again, as what else the machine does comes and goes.
    for numerics in [*candidates, *reversed(list(candidates))]:
        seconds[numerics] = min(seconds[numerics], candidates[numerics]())
    best = min(seconds, key=lambda numerics: seconds[numerics])
    for numerics, each in seconds.items():
        _log.info("%s: %.3g ms a position", numerics, 1e3 * each)
    _write(key, best)
    return best


@functools.cache
def _machine() -> str:
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
        names = (line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
        processor = next(names, processor)
    return f"{processor}, torch {torch.__version__}"


def _path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vqvae" / "numerics.json"


def _read() -> dict[str, object]:
    with contextlib.suppress(OSError, ValueError, RuntimeError, RecursionError):
        found = json.loads(_path().read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _write(key: str, numerics: Numerics) -> None:
    """Keep what was found, where that can be: nothing depends on it but the next process's choice."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        with one_writer(path, wait=1.0):
            write_text(path, json.dumps({**_read(), key: numerics.to_plain()}, indent=1) + "\n")
