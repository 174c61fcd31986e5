"""Rows a second out of a tokenized set, when its shards are first touched and after, as a small markdown table.

    python benchmarks/code_rows.py [--num-rows 2000000] [--rounds 5] [--against CHECKOUT] [--folder FOLDER]

A set of random codes (16x16, uint16, shards of 8,192 rows) is read in batches of 1,024, in order and shuffled, twice by
each process: the first epoch touches every shard for the first time, which reads all of it and compares its checksums.
`in memory`: the operating system has the files; `on the disk`: it was asked to let go of them before each process.
`first batch` is how long that of the first epoch takes, `CPU` is by the process's own time, which others on the machine
leave as it is. With --against the same is measured of another checkout of this
repository (as of `git worktree add`), process by process in turns. One thread of arithmetic; medians of the rounds, in
thousands of rows a second.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch

from vqvae.tokens import CodeDataset, Encoded, Plan, finish, write_shard

SHARD_SIZE = 8192
BATCH_SIZE = 1024
ORDERS = ("in order", "shuffled")


def make_set(folder: Path, num_rows: int) -> None:
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


def measure(folder: Path, order: str) -> None:
    """In a process of its own: two epochs, and what they took as JSON."""
    torch.set_num_threads(1)
    codes = CodeDataset(folder)
    stream = codes.batches(BATCH_SIZE, seed=0, epochs=2) if order == "shuffled" else codes.batches(BATCH_SIZE, epochs=2)
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
    print(json.dumps({"wall": wall, "again": wall_again, "cpu": cpu, "cpu again": cpu_again, "batch": first}))


def let_go(folder: Path) -> None:
    """Ask the operating system to keep nothing of a folder's files in memory."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def read_all(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-rows", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--folder", type=Path, help="where to make the set; somewhere temporary unless given")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(Path(args.measure[0]), args.measure[1])
        return
    here = Path(__file__).parents[1]
    checkouts = {"this": here} | ({} if args.against is None else {"the other": args.against})
    found: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary) / "codes"
        make_set(folder, args.num_rows)
        os.sync()
        for _, place, order, (name, checkout) in product(
            range(args.rounds), ("in memory", "on the disk"), ORDERS, checkouts.items()
        ):
            (read_all if place == "in memory" else let_go)(folder)
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)}
            command = [sys.executable, __file__, "--measure", str(folder), order]
            written = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
            found.setdefault((place, order, name), []).append(json.loads(written))
    print(f"{args.num_rows:,} rows of 16x16 codes\n")
    print("| files | order | checkout | first epoch | second | first, CPU | second, CPU | first batch |")
    print("|---|---|---|---|---|---|---|---|")
    for (place, order, name), rounds in found.items():
        median = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        speeds = " | ".join(f"{median[key] / 1000:,.0f}" for key in ("wall", "again", "cpu", "cpu again"))
        print(f"| {place} | {order} | {name} | {speeds} | {median['batch']:.2f} s |")


if __name__ == "__main__":
    main()
