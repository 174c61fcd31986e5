"""This checkout beside another one (as of `git worktree add`), job by job in turns.

    python -m benchmarks against CHECKOUT [--rounds 5] [--jobs start "folder, PNG 28"]

    start       `vqvae sample --mistyped`: until the one line that names the option
    default     `train.py` as it is, with 300 + 150 steps in place of 3,200 + 1,500: all its parts, seconds
    folder ...  the sets of `loader`, images a second, no workers
    tokenize    JPEG files of 64x64 to shards of codes by a small model, images a second
    save        a model's folder of 1 MB written and read again, times a second

Each job is a process of its own on one thread of arithmetic (`default` on all); medians of the rounds, and of the
rounds' own ratios. Beside itself, which is the default, a checkout shows what the machine's noise does.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tyro.conf import Positional

from benchmarks import harness, loader
from vqvae import VQVAE, load_images
from vqvae.tokens import tokenize

SECONDS = 4.0
QUICK = "--rounds 1 --jobs start save"


def tokenized(folder: str) -> float:
    """Images a second."""
    torch.manual_seed(0)
    model = VQVAE(image_size=64, num_channels=3, width=16, num_blocks=1).eval()
    images = load_images(Path(folder) / "jpeg", size=64)
    with tempfile.TemporaryDirectory() as output:
        tokenize(model, images, Path(output) / "warm")
        start = time.perf_counter()
        for number in range(3):
            tokenize(model, images, Path(output) / str(number))
        return 3 * len(images) / (time.perf_counter() - start)


def saved(_: str) -> float:
    """Times a second."""
    model = VQVAE(width=32)
    with tempfile.TemporaryDirectory() as output:
        num, start = 0, time.perf_counter()
        while time.perf_counter() - start < SECONDS:
            model.save_pretrained(Path(output) / "model")
            VQVAE.from_pretrained(Path(output) / "model")
            num += 1
        return num / (time.perf_counter() - start)


def started(_: str, checkout: Path) -> float:
    words = ("-m", "vqvae", "sample", "x", "--mistyped", "1")
    return harness.command(*words, checkout=checkout, threads=None, status=2).wall


def trained(_: str, checkout: Path) -> float:
    with tempfile.TemporaryDirectory() as run:
        return harness.train(Path(run), *harness.steps(300, 150), checkout=checkout, threads=None).wall


# With the unit; of what is in seconds less is better.
JOBS: dict[str, tuple[Callable[..., float], str]] = {
    "start": (started, "s"),
    "default": (trained, "s"),
    **{name: (partial(harness.in_child, loader.images_per_second, name), "/s") for name in loader.FILES},
    "tokenize": (partial(harness.in_child, tokenized), "/s"),
    "save": (partial(harness.in_child, saved), "/s"),
}


def main(checkout: Positional[Path] = harness.ROOT, jobs: tuple[str, ...] = (), rounds: int = 5) -> None:
    """Run the jobs in both checkouts."""
    places = {"there": checkout.resolve(), "here": harness.ROOT}
    with tempfile.TemporaryDirectory() as folder:
        loader.make_files(Path(folder))
        table = harness.Table("job", "there", "here", "here / there")
        for name, (job, unit) in harness.pick(JOBS, jobs).items():
            more = (0, SECONDS) if name in loader.FILES else ()
            turns = {where: partial(job, folder, *more, checkout=place) for where, place in places.items()}
            found = harness.interleaved(turns, rounds)
            medians = (f"{statistics.median(found[where]):,.2f} {unit}" for where in places)
            table.row(name, *medians, f"{harness.ratio(found['here'], found['there']):.3f}")
