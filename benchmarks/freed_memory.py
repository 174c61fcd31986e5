"""Encoding and training on the CPU where freed memory is kept and where it is not, as a small markdown table.

    python benchmarks/freed_memory.py [--rounds 3] [--models small large vqgan]

Models are those of `tokenizing.py`, on random levels: `small` 64 images of 64x64 at once, `large` 16 of 256x256,
`vqgan` 4 of 256x256. Encoding is in float32, training steps (backward and AdamW) in bfloat16 autocast, all on both
cores. Each figure is of a process of its own, six batches, the last three of which count; rounds are interleaved, and
medians are shown. `system` is the share of CPU time that was spent in the kernel; `peak` the largest resident memory.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from tokenizing import MODELS  # pyrefly: ignore [missing-import]

from vqvae.allocator import keep_freed_memory

NUM_IMAGES = {"small": 64, "large": 16, "vqgan": 4}
NUM_BATCHES, COUNTED = 6, 3


def measure(name: str, work: str, memory: str) -> None:
    """In a process of its own: print what it took as JSON."""
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
    found = {
        "speed": COUNTED * NUM_IMAGES[name] / seconds,
        "system": system / (system + end.ru_utime - start.ru_utime),
        "peak": end.ru_maxrss / 2**20,
    }
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=tuple(MODELS))
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure)
        return
    heads = ["images/s, given back", "kept", "ratio", "system, given back", "kept", "peak GiB, given back", "kept"]
    print(f"| model | work | {' | '.join(heads)} |")
    print(f"{'|---' * 9}|")
    for name in args.models:
        for work in ("encode", "train"):
            found: dict[str, list[dict[str, float]]] = {"given back": [], "kept": []}
            for _ in range(args.rounds):
                for memory, rounds in found.items():
                    command = [sys.executable, __file__, "--measure", name, work, memory]
                    rounds.append(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))
            back, kept = (
                {key: statistics.median(each[key] for each in rounds) for key in rounds[0]} for rounds in found.values()
            )
            cells = [f"{back['speed']:.1f}", f"{kept['speed']:.1f}", f"{kept['speed'] / back['speed']:.2f}"]
            cells += [f"{each['system']:.0%}" for each in (back, kept)]
            cells += [f"{each['peak']:.2f}" for each in (back, kept)]
            print(f"| {name} | {work} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
