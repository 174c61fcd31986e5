"""Seconds from a command to what somebody new wants to see: a sampled picture, the page of `vqvae demo`, a report.

    python -m benchmarks first_minutes [--run RUN] [--rounds 3]

Each is a fresh process that knows nothing from before, in an empty folder; medians over rounds, each of all in turn.
The page is there when its address answers. The report is that of --run.
"""

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from benchmarks import harness

QUICK = "--rounds 1"


def main(rounds: int = 3, run: Path | None = None) -> None:
    """Measure, and print a table."""
    jobs: dict[str, Callable[[], float]] = {
        "vqvae sample fashion-28 --label 7 --num 8": lambda: command(
            "sample", "fashion-28", "--label", "7", "--num", "8"
        ),
        "vqvae reconstruct fashion-28 --num 16": lambda: command("reconstruct", "fashion-28", "--num", "16"),
        "vqvae demo: the page": page,
    }
    if run is not None:
        jobs["vqvae report RUN"] = lambda: command("report", str(run.resolve()), "-o", "report.html")
    found = harness.interleaved(jobs, rounds)
    table = harness.Table("", "seconds", "least", "most")
    for name, taken in found.items():
        table.row(name, f"{statistics.median(taken):.1f}", f"{min(taken):.1f}", f"{max(taken):.1f}")


def environment(folder: str) -> dict[str, str]:
    """Of a process that finds this checkout, and nothing that an earlier one kept."""
    return {**os.environ, "PYTHONPATH": str(harness.ROOT), "XDG_CACHE_HOME": f"{folder}/cache"}


def command(*words: str) -> float:
    """Wall seconds of a `vqvae` command."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "vqvae", *words],
            cwd=folder,
            env=environment(folder),
            check=True,
            capture_output=True,
        )
        return time.perf_counter() - began


def page() -> float:
    """Wall seconds until the page answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        words = [sys.executable, "-m", "vqvae", "demo", "--port", port]
        with subprocess.Popen(words, cwd=folder, env=environment(folder), stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            if "shows" not in process.stdout.readline():
                raise harness.ProcessError("vqvae demo ended before its page was there")
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as answer:
                answer.read()
            taken = time.perf_counter() - began
            process.terminate()
        return taken
