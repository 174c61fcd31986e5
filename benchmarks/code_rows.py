"""Rows a second out of a tokenized set, when its shards are first touched and after.

    python -m benchmarks code_rows [--num-rows 2000000] [--rounds 5] [--against CHECKOUT] [--folder FOLDER]

A set of random codes (16x16, uint16, shards of 8,192 rows) is read in batches of 1,024, in order and shuffled, twice by
each process: the first epoch touches every shard for the first time, which reads all of it and compares its checksums.
`in memory`: the operating system has the files; `on the disk`: it was asked to let go of them before each process.
`first batch` is how long that of the first epoch takes, `CPU` is by the process's own time, which others on the machine
leave as it is. With --against the same is measured of another checkout of this repository (as of `git worktree add`),
process by process in turns. One thread of arithmetic; medians of the rounds, in thousands of rows a second.
"""

import os
import tempfile
import time
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np

from benchmarks import harness
from vqvae.tokens import CodeDataset
from vqvae.tokens.layout import Plan
from vqvae.tokens.shards import Encoded, finish, write_shard

SHARD_SIZE = 8192
BATCH_SIZE = 1024
QUICK = "--num-rows 20000 --rounds 1"


def make_set(folder: Path, num_rows: int) -> None:
    """Random codes with labels and keys."""
    generator = np.random.default_rng(0)
    todo = Plan(
        folder=folder,
        num_images=num_rows,
        image_shape=(3, 256, 256),
        source="random",
        split="train",
        num_classes=1000,
        class_names=None,
        tokenizer={"class": "VQVAE", "config": {}, "fingerprint": "0" * 64, "source": None},
        num_codes=16384,
        grid=(16, 16),
        batch_size=SHARD_SIZE,
        shard_size=SHARD_SIZE,
        digests=("0",) * -(-num_rows // SHARD_SIZE),
    )
    for shard in range(todo.num_shards):
        images = todo.images(shard)
        part = Encoded(
            first=images.start,
            codes=generator.integers(0, 16384, (len(images), 16, 16), np.int64),
            labels=generator.integers(0, 1000, len(images)),
            keys=tuple(f"n{number // 1000:08}/{number:08}.JPEG" for number in images),
            skipped=(),
        )
        write_shard(todo, shard, [part])
    assert finish(todo) is not None


def two_epochs(folder: str, order: str) -> dict[str, float]:
    """Rows a second of each epoch, of wall and of CPU time, and the seconds of the first batch."""
    codes = CodeDataset(folder)
    seed = 0 if order == "shuffled" else None
    stream = codes.batches(BATCH_SIZE, seed=seed, epochs=2)
    epochs, first, rows = [], 0.0, 0
    start = time.perf_counter(), time.process_time()
    for batch in stream:
        rows += len(batch.codes)
        first = first or time.perf_counter() - start[0]
        if rows >= len(codes) - BATCH_SIZE:  # with a seed what is left at an epoch's end is dropped
            now = time.perf_counter(), time.process_time()
            epochs.append([rows / (end - begin) for begin, end in zip(start, now, strict=True)])
            start, rows = now, 0
            if len(epochs) == 2:
                break
    (wall, cpu), (wall_again, cpu_again) = epochs
    return {"wall": wall, "again": wall_again, "cpu": cpu, "cpu again": cpu_again, "batch": first}


def prepare(folder: Path, place: str) -> None:
    """Let the operating system have all of a folder's files in memory, or nothing of them."""
    for path in folder.iterdir():
        if place == "in memory":
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass
            continue
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def measure(folder: Path, place: str, order: str, checkout: Path) -> dict[str, float]:
    prepare(folder, place)
    return harness.in_child(two_epochs, folder, order, checkout=checkout)


def main(num_rows: int = 2_000_000, rounds: int = 5, against: Path | None = None, folder: Path | None = None) -> None:
    """Make the set, in a folder that may be given, and read it."""
    checkouts = {"this": harness.ROOT} | ({} if against is None else {"the other": against.resolve()})
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        codes = Path(temporary) / "codes"
        make_set(codes, num_rows)
        os.sync()
        ways = product(("in memory", "on the disk"), ("in order", "shuffled"), checkouts)
        jobs = {way: partial(measure, codes, *way[:2], checkouts[way[2]]) for way in ways}
        found = harness.interleaved(jobs, rounds)
    print(f"{num_rows:,} rows of 16x16 codes\n")
    table = harness.Table(
        "files", "order", "checkout", "first epoch", "second", "first, CPU", "second, CPU", "first batch"
    )
    for way, each in found.items():
        median = harness.medians(each)
        speeds = (f"{median[key] / 1000:,.0f}" for key in ("wall", "again", "cpu", "cpu again"))
        table.row(*way, *speeds, f"{median['batch']:.2f} s")
