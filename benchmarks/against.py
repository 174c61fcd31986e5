"""This checkout beside another one (as of `git worktree add`), job by job in turns, as a small markdown table.

    python benchmarks/against.py CHECKOUT [--rounds 5] [JOB ...]

    start      `vqvae sample --mistyped`: until the one line that names the option
    default    `train.py` as it is, with 300 + 150 steps in place of 3,200 + 1,500: all its parts, seconds
    png, jpeg  a folder of 256x256 files decoded to 64x64, images a second, no workers
    small png  a folder of 28x28 greys, images a second
    parquet    32x32 JPEG, images a second
    tokenize   JPEG files of 64x64 to shards of codes by a small model, images a second
    save       a model's folder of 1 MB written and read again, times a second

Each job is a process of its own on one thread of arithmetic (`default` on all), the two checkouts by turns; medians of
the rounds, and the median of the rounds' ratios.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parents[1]
SECONDS = 4.0
DEFAULT = ["--codebook-fit.num-steps", "300", "--prior-fit.num-steps", "150"]


def _decoded(kind: str, folder: Path) -> float:
    from vqvae.data import batches, load_images

    sizes: dict[str, Any] = {"small png": {"size": 28, "channels": 1}, "parquet": {}}
    images = load_images(folder / kind.replace(" ", "-"), **sizes.get(kind, {"size": 64}))
    stream = batches(images, 64, seed=0)
    next(stream)
    num, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        num += len(next(stream).images)
    return num / (time.perf_counter() - start)


def _tokenized(_: str, folder: Path) -> float:
    from vqvae import VQVAE, load_images
    from vqvae.tokens import tokenize

    torch.manual_seed(0)
    model = VQVAE(image_size=64, num_channels=3, width=16, num_blocks=1).eval()
    images = load_images(folder / "jpeg", size=64)
    with tempfile.TemporaryDirectory() as output:
        tokenize(model, images, Path(output) / "warm")
        start = time.perf_counter()
        for number in range(3):
            tokenize(model, images, Path(output) / str(number))
        return 3 * len(images) / (time.perf_counter() - start)


def _saved(_: str, __: Path) -> float:
    from vqvae import VQVAE

    model = VQVAE(width=32)
    with tempfile.TemporaryDirectory() as output:
        num, start = 0, time.perf_counter()
        while time.perf_counter() - start < SECONDS:
            model.save_pretrained(Path(output) / "model")
            VQVAE.from_pretrained(Path(output) / "model")
            num += 1
        return num / (time.perf_counter() - start)


JOBS: dict[str, Callable[[str, Path], float]] = {
    **dict.fromkeys(("png", "jpeg", "small png", "parquet"), _decoded),
    "tokenize": _tokenized,
    "save": _saved,
}
# Of these less is better.
TIMED = ("start", "default")


def _measure(checkout: Path, job: str, folder: Path) -> float:
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    if job in TIMED:
        with tempfile.TemporaryDirectory() as run:
            words = ["-m", "vqvae", "sample", "x", "--mistyped", "1"]
            if job == "default":
                words = [str(checkout / "train.py"), *DEFAULT, "--run", run]
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, *words], cwd=checkout, env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode != (2 if job == "start" else 0):
                raise SystemExit(f"{job} of {checkout} failed: {done.stderr[-500:]}")
            return time.perf_counter() - start
    environment["OMP_NUM_THREADS"] = "1"
    words = [sys.executable, __file__, str(checkout), "--measure", job, "--folder", str(folder)]
    done = subprocess.run(words, cwd=checkout, env=environment, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def _make(folder: Path) -> None:
    """The files that jobs read."""
    sys.path.insert(0, str(HERE / "benchmarks"))
    import loader  # pyrefly: ignore
    from PIL import Image

    loader.make_folder(folder / "png", ".png")
    loader.make_folder(folder / "jpeg", ".jpg")
    loader.make_parquet(folder / "parquet.parquet")
    (folder / "parquet").mkdir()
    (folder / "parquet.parquet").rename(folder / "parquet" / "train.parquet")
    (folder / "small-png").mkdir()
    generator = np.random.default_rng(0)
    for number in range(1000):
        loader.blotches(28, generator).convert("L").save(folder / "small-png" / f"{number}.png")
    assert Image.open(folder / "small-png" / "0.png").size == (28, 28)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure this checkout beside another one.")
    parser.add_argument("checkout", type=Path)
    parser.add_argument("jobs", nargs="*", help=f"of {', '.join((*TIMED, *JOBS))}; all unless given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        torch.set_num_threads(1)
        print(json.dumps(JOBS[arguments.measure](arguments.measure, arguments.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _make(folder)
        print("| job | there | here | here / there |")
        print("|---|---|---|---|")
        for job in arguments.jobs or (*TIMED, *JOBS):
            found: dict[Path, list[float]] = {arguments.checkout.resolve(): [], HERE: []}
            for number in range(arguments.rounds):
                for checkout in list(found) if number % 2 else reversed(list(found)):
                    found[checkout].append(_measure(checkout, job, folder))
            there, here = found.values()
            ratio = statistics.median(new / old for new, old in zip(here, there, strict=True))
            unit = "s" if job in TIMED else "/s"
            cells = [job, *(f"{statistics.median(each):,.2f} {unit}" for each in (there, here)), f"{ratio:.3f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
