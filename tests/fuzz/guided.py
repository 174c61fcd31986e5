"""Coverage-guided fuzzing with atheris (libFuzzer): a bound on memory, and figures of what was reached."""

import atexit
import sys
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import atheris

TELL_EVERY = 5000
# What of the library is reached, by name; a check counts.
seen: Counter[str] = Counter()


def tell() -> None:
    print(*(f"{name}: {number:,}" for name, number in sorted(seen.items())), sep="\n", flush=True)


def fuzz(
    check: Callable[[bytes], None],
    mutate: Callable[[bytes, int, int], bytes],
    seeds: Callable[[Path], None],
    *options: str,
    memory: int,
) -> None:
    """Check what libFuzzer makes of the files that `seeds` writes, in so much memory beyond an input's size.

    Arguments of the command line are libFuzzer's; folders among them are corpora beside the seeds.
    """

    def test_one_input(data: bytes) -> None:
        # Started once: starting and stopping for each input leaks, and each start takes longer than the one before.
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        seen["inputs"] += 1
        check(data)
        beyond = tracemalloc.get_traced_memory()[1] - before - len(data)
        seen["largest memory beyond the input"] = max(seen["largest memory beyond the input"], beyond)
        if seen["inputs"] % TELL_EVERY == 0:
            tell()
        assert beyond <= memory, f"{beyond} bytes of memory beyond an input of {len(data)}"

    with tempfile.TemporaryDirectory() as folder:
        seeds(Path(folder))
        # At its end libFuzzer leaves at once, and runs no more of Python: this is for an error.
        atexit.register(tell)
        atheris.Setup([sys.argv[0], *options, *sys.argv[1:], folder], test_one_input, custom_mutator=mutate)
        tracemalloc.start()
        atheris.Fuzz()
