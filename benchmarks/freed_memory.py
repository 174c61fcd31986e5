"""Encoding and training on the CPU where freed memory is kept and where it is not.

    python -m benchmarks freed_memory [--rounds 3] [--models small large vqgan]

Models are those of `tokenizing`, on random levels: `small` 64 images of 64x64 at once, `large` 16 of 256x256, `vqgan` 4
of 256x256. Encoding is in float32, training steps (backward and AdamW) in bfloat16 autocast, all on every core. Each
figure is of a process of its own, six batches, the last three of which count; rounds are interleaved, and medians are
shown. `system` is the share of CPU time that was spent in the kernel; `peak` the largest resident memory.
"""

import resource
import time
from functools import partial
from itertools import product
from typing import Literal

import torch

from benchmarks import harness
from benchmarks.tokenizing import MODELS
from vqvae.allocator import keep_freed_memory

NUM_IMAGES = {"small": 64, "large": 16, "vqgan": 4}
NUM_BATCHES, COUNTED = 6, 3
WAYS = ("given back", "kept")
QUICK = "--rounds 1 --models small"


def measure(name: str, work: str, memory: str) -> dict[str, float]:
    """In a process of its own."""
    if memory == "kept":
        assert keep_freed_memory(), "this C library keeps nothing"
    torch.manual_seed(0)
    model = MODELS[name].build().train(work == "train")
    optimizer = torch.optim.AdamW(model.parameters())
    size = model.config.image_size
    clock, start = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    for batch in range(NUM_BATCHES):
        images = torch.randint(256, (NUM_IMAGES[name], 3, size, size), dtype=torch.uint8)
        if batch == NUM_BATCHES - COUNTED:
            clock, start = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        if work == "encode":
            model.encode(images)
        else:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                distortion = model(images).distortion.mean()
            distortion.backward()
            optimizer.step()
            optimizer.zero_grad()
    seconds, end = time.perf_counter() - clock, resource.getrusage(resource.RUSAGE_SELF)
    system = end.ru_stime - start.ru_stime
    return {
        "speed": COUNTED * NUM_IMAGES[name] / seconds,
        "system": system / (system + end.ru_utime - start.ru_utime),
        "peak": end.ru_maxrss / 2**20,
    }


def main(rounds: int = 3, models: tuple[Literal["small", "large", "vqgan"], ...] = ("small", "large", "vqgan")) -> None:
    """Measure both ways with each model."""
    columns = ("images/s, given back", "kept", "ratio", "system, given back", "kept", "peak GiB, given back", "kept")
    table = harness.Table("model", "work", *columns)
    for name, work in product(models, ("encode", "train")):
        jobs = {memory: partial(harness.in_child, measure, name, work, memory, threads=None) for memory in WAYS}
        found = harness.interleaved(jobs, rounds)
        back, kept = (harness.medians(found[memory]) for memory in WAYS)
        speeds = (f"{back['speed']:.1f}", f"{kept['speed']:.1f}", f"{kept['speed'] / back['speed']:.2f}")
        shares = (f"{each['system']:.0%}" for each in (back, kept))
        peaks = (f"{each['peak']:.2f}" for each in (back, kept))
        table.row(name, work, *speeds, *shares, *peaks)
