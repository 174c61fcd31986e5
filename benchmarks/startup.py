"""CPU time, user and system, until a command or an import has answered: medians over rounds, each of all in turn.

    python -m benchmarks startup [--rounds 5] [--beside OTHER_CHECKOUT]

Each is a fresh Python, in this checkout and in the other one. A round before the first fills the files' caches.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch

from vqvae import VQVAE

ROOT = Path(__file__).parents[1]
TORCH = "import torch"
QUICK = "--rounds 1"
ENCODE = "model.encode(torch.zeros(1, 1, 28, 28, dtype=torch.uint8))"
READ = f"import sys, torch, vqvae; model = vqvae.VQVAE.from_pretrained(sys.argv[1]); {ENCODE}"


def main(rounds: int = 7, beside: Path | None = None) -> None:
    """Measure, and print a table.

    Args:
        rounds: how often each is done.
        beside: another checkout.
    """
    checkouts = [ROOT] if beside is None else [beside.resolve(), ROOT]
    with tempfile.TemporaryDirectory() as folder:
        VQVAE(image_size=28, num_channels=1).save_pretrained(folder)
        cases = {
            "vqvae --help": ["-m", "vqvae", "--help"],
            "import vqvae": ["-c", "import vqvae"],
            "import vqvae; vqvae.VQVAE": ["-c", "import vqvae; vqvae.VQVAE"],
            "vqvae info --help": ["-m", "vqvae", "info", "--help"],
            "VQVAE.from_pretrained, an image encoded": ["-c", READ, folder],
        }
        taken: dict[tuple[str, Path], list[float]] = defaultdict(list)
        for number in range(rounds + 1):
            round_of = {(TORCH, ROOT): seconds(["-c", TORCH], ROOT)}
            for name, words in cases.items():
                round_of |= {(name, checkout): seconds(words, checkout) for checkout in checkouts}
            for key, value in round_of.items() if number else ():
                taken[key].append(value)
    print(f"torch {torch.__version__}; {rounds} rounds; CPU seconds, and their ratio to those of {TORCH}")
    unit = statistics.median(taken[TORCH, ROOT])
    for (name, checkout), values in taken.items():
        middle, span = statistics.median(values), f"{min(values):.2f} to {max(values):.2f}"
        print(f"{name:40} {checkout.name:16} {middle:.2f} ({span})  {middle / unit:.2f}")


def seconds(words: list[str], checkout: Path) -> float:
    """CPU seconds of a fresh Python with these words, and of its children."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], cwd=checkout, env=environment, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
