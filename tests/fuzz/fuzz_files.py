"""Damaged files of every kind that is read: each is read, or refused by a ValueError; outcomes are counted.

    python tests/fuzz/fuzz_files.py                          # 2,000 inputs of each kind
    python tests/fuzz/fuzz_files.py --num 20000 --seed 7 png tar
    python tests/fuzz/fuzz_files.py --show 812 png           # input 812 of that seed alone, with its traceback

Kinds are in modules `kinds_*.py` beside this one, each with a dict `KINDS`. Inputs depend on kind, seed and their
number alone. A fault is any other exception, over `SECONDS` of time, or over `MEMORY` bytes of address space.
"""

import argparse
import collections
import importlib
import json
import random
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SECONDS = 20
MEMORY = 3 << 30
_NUMBERS = (0, 1, 7, 127, 128, 255, 256, 32767, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**64)
# What a field of JSON or yaml may hold that nobody who wrote the reader had in mind.
NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**18, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", "28", "../x", "/etc/hostname", "\0", "é" * 50),
    *([], [1], [[]], {}, {"class": []}, ["x", None], [10**9] * 3),
)


class Kind(NamedTuple):
    """A kind of file.

    good: makes whole files in a folder that is empty: their bytes.
    read: reads the file at a path, which has `name`; what comes back is held against nothing.
    name: of the file, or its path within the folder that `read` gets.
    is_json: mutate values too, not only bytes.
    """

    good: Callable[[Path], Sequence[bytes]]
    read: Callable[[Path], object]
    name: str
    is_json: bool = False


def mutated(kind: Kind, good: Sequence[bytes], rng: random.Random) -> bytes:
    data = rng.choice(good)
    if kind.is_json and rng.random() < 0.7:
        value = json.loads(data)
        for _ in range(rng.randint(1, 3)):
            value = _changed(value, rng)
        return json.dumps(value).encode()
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        data = _damaged(data, good, rng)
    return data


def _changed(value: Any, rng: random.Random) -> Any:
    """A JSON value of which a part is replaced, dropped, renamed or repeated."""
    if isinstance(value, dict) and value and rng.random() < 0.95:
        key = rng.choice(list(value))
        choice = rng.random()
        if choice < 0.08:
            return {name: each for name, each in value.items() if name != key}
        if choice < 0.14:
            return {**value, rng.choice(("x", "", key + "s", "class")): rng.choice(NASTY)}
        return {**value, key: _changed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        if rng.random() < 0.2:
            return rng.choice((value[:at], value + value, value * 1000))
        return [*value[:at], _changed(value[at], rng), *value[at + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.4:
        return rng.choice((value + 1, value - 1, -value, value * 1024, float(value), str(value), [value]))
    return rng.choice(NASTY)


def _damaged(data: bytes, good: Sequence[bytes], rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    choice = rng.randrange(9)
    if choice == 0:
        return data[:at]
    if choice == 1 and data:
        at = min(at, len(data) - 1)
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if choice == 2:
        length = rng.randint(1, 16)
        return data[:at] + rng.randbytes(length) + data[at + length :]
    if choice == 3:
        return data[:at] + rng.randbytes(rng.randint(1, 16)) + data[at:]
    if choice == 4:
        return data[:at] + data[at + rng.randint(1, 64) :]
    if choice == 5:
        end = min(len(data), at + rng.randint(1, 256))
        return data[:end] + data[at:end] * rng.choice((1, 2, 50)) + data[end:]
    if choice == 6:
        size = rng.choice((1, 2, 4, 8))
        number = (rng.choice(_NUMBERS) & (1 << 8 * size) - 1).to_bytes(size, rng.choice(("little", "big")))
        return data[:at] + number + data[at + size :]
    if choice == 7:
        other = rng.choice(good)
        start = rng.randrange(len(other) + 1)
        return data[:at] + other[start:]
    return data[:at] + str(rng.choice(_NUMBERS)).encode() + data[at + rng.randint(0, 8) :]


class _TimeOut(BaseException):
    """Nothing that is read catches it."""


def _alarm(*_: Any) -> None:
    raise _TimeOut


def run(name: str, kind: Kind, *, num: int, seed: int, show: int | None = None) -> collections.Counter[str]:
    """Outcomes by name: "read", "refused", or the fault. The first fault of each type is printed."""
    outcomes: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "good").mkdir()
        good = list(kind.good(Path(place) / "good"))
        path = Path(place) / "damaged" / kind.name
        path.parent.mkdir(parents=True)
        for number in range(num) if show is None else (show,):
            path.write_bytes(mutated(kind, good, random.Random(f"{name} {seed} {number}")))
            signal.alarm(SECONDS)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    kind.read(path)
                outcome = "read"
            except (Exception, _TimeOut) as error:
                outcome = "refused" if isinstance(error, ValueError) else type(error).__name__
                if outcome != "refused" and outcome not in outcomes:
                    print(f"{name}, seed {seed}, input {number}: {outcome}: {str(error)[:300]}", file=sys.stderr)
                if show is not None:
                    traceback.print_exc()
            finally:
                signal.alarm(0)
            outcomes[outcome] += 1
    return outcomes


def kinds() -> dict[str, Kind]:
    """Every kind that a module beside this one has."""
    here = Path(__file__).parent
    sys.path.insert(0, str(here))
    # As the modules beside this one know it, so that there is one class `Kind`.
    sys.modules.setdefault("fuzz_files", sys.modules[__name__])
    found: dict[str, Kind] = {}
    for path in sorted(here.glob("kinds_*.py")):
        found |= importlib.import_module(path.stem).KINDS
    return found


def main() -> None:
    known = kinds()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(known)}; all unless given")
    parser.add_argument("--num", type=int, default=2000, help="inputs of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--show", type=int, help="this input alone, with its traceback")
    args = parser.parse_args()
    signal.signal(signal.SIGALRM, _alarm)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    faults = 0
    for name in args.kinds or known:
        outcomes = run(name, known[name], num=args.num, seed=args.seed, show=args.show)
        print(f"{name:16} " + ", ".join(f"{count:,} {what}" for what, count in sorted(outcomes.items())), flush=True)
        faults += sum(count for what, count in outcomes.items() if what not in ("read", "refused"))
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
