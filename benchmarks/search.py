"""How long the search for the nearest code takes, here and elsewhere, as a small markdown table.

    pip install vector-quantize-pytorch faiss-cpu
    python benchmarks/search.py [--threads 1 2] [--num-codes 1024 16384] [--rounds 5]

65,536 vectors of width 64 meet one random codebook. The contestants take turns in one process for each number of
threads, and again on a GPU where there is one. Extra memory is the growth of a fresh process's peak (VmHWM, so Linux
only) over what it held before the search, after a warm-up on a few vectors; on a GPU that of torch's allocator.

faiss is a contestant and not the back end: it is slower, a GEMM of its own and a scan of the products, and its float32
answers would have to be checked for near ties all the same.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from vqvae.quantizers import EMAVectorQuantizer, nearest

try:
    import faiss
    from vector_quantize_pytorch import VectorQuantize
except ImportError as error:
    sys.exit(f"{error}: the others are missing; pip install vector-quantize-pytorch faiss-cpu")

SHAPE = (64, 1024, 64)  # images, places, width
DIM = SHAPE[-1]
# At 16384 codes it holds the distances of all pairs four times over: 16 GiB.
HUNGRY, HUNGRY_CODES, HUNGRY_GIB = "vector-quantize-pytorch, forward", 16384, 18

Search = Callable[[Tensor], object]


def ours(codebook: Tensor) -> Search:
    quantizer = EMAVectorQuantizer(num_codes=len(codebook), dim=DIM).to(codebook.device).eval()
    quantizer.get_buffer("codebook").copy_(codebook)
    return quantizer


def bare(codebook: Tensor) -> Search:
    return lambda features: nearest(features.flatten(0, 1), codebook)


def theirs(codebook: Tensor) -> Search:
    quantizer = VectorQuantize(dim=DIM, codebook_size=len(codebook)).to(codebook.device).eval()
    quantizer.get_buffer("_codebook.embed").copy_(codebook[None])
    return quantizer


def all_pairs(codebook: Tensor) -> Search:
    return lambda features: torch.cdist(features.flatten(0, 1), codebook).argmin(1)


def flat_index(codebook: Tensor) -> Search:
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(DIM)
    index.add(codebook.numpy())
    return lambda features: index.search(features.flatten(0, 1).numpy(), 1)


CONTESTANTS: dict[str, Callable[[Tensor], Search]] = {
    "EMAVectorQuantizer, forward": ours,
    "nearest": bare,
    HUNGRY: theirs,
    "torch.cdist().argmin": all_pairs,
    "faiss IndexFlatL2": flat_index,
}


def make(name: str, num_codes: int, device: str) -> tuple[Search, Tensor]:
    """A warm contestant and the features it is to quantise."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(SHAPE, generator=generator).to(device)
    search = CONTESTANTS[name](torch.randn(num_codes, DIM, generator=generator).to(device))
    search(features[:1])
    return search, features


def seconds(search: Search, features: Tensor) -> float:
    if features.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    search(features)
    if features.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def status_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def extra_mib(name: str, num_codes: int, device: str) -> float:
    search, features = make(name, num_codes, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        search(features)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status_mib("VmRSS")
    search(features)
    return status_mib("VmHWM") - before


def child(*arguments: object) -> dict[str, float]:
    """What this program, started again, prints as JSON."""
    command = [sys.executable, __file__, *map(str, arguments)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def medians(names: list[str], num_codes: int, device: str, rounds: int) -> dict[str, float]:
    contestants = {name: make(name, num_codes, device) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name, contestant in contestants.items():
            # Half a minute a time on a CPU: once is enough to see it.
            if number == 0 or device == "cuda" or name != HUNGRY or num_codes < HUNGRY_CODES:
                times[name].append(seconds(*contestant))
    return {name: statistics.median(passed) for name, passed in times.items()}


def has_memory() -> bool:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return False
    line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) / 2**20 >= HUNGRY_GIB


def table(num_codes: int, device: str, num_threads: int, rounds: int) -> None:
    names = [name for name in CONTESTANTS if device == "cpu" or name != "faiss IndexFlatL2"]
    skipped = device == "cpu" and num_codes >= HUNGRY_CODES and not has_memory()
    running = [name for name in names if not (skipped and name == HUNGRY)]
    common = ["--device", device, "--threads", num_threads, "--num-codes", num_codes, "--rounds", rounds]
    times = child("--time", *running, *common)
    where = "GPU" if device == "cuda" else f"{num_threads} thread{'s' * (num_threads > 1)}"
    print(f"\n{num_codes} codes, {where}\n\n| search | seconds | times as fast | extra MiB |\n|---|---|---|---|")
    for name in names:
        if name not in running:
            print(f"| {name} | skipped | | |", flush=True)
            continue
        ratio = f"{times[HUNGRY] / times[name]:.1f}" if HUNGRY in times else ""
        linux = device == "cuda" or sys.platform == "linux"
        memory = f"{child('--memory', name, *common)[name]:,.0f}" if linux else ""
        print(f"| {name} | {times[name]:.4f} | {ratio} | {memory} |", flush=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the search for the nearest code.")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--num-codes", type=int, nargs="+", default=[1024, 16384])
    parser.add_argument("--rounds", type=int, default=5, help="of all contestants; the median counts")
    # The program gives these to itself.
    parser.add_argument("--device", default="cpu", help=argparse.SUPPRESS)
    parser.add_argument("--time", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.time or arguments.memory:
        num_codes = arguments.num_codes[0]
        torch.set_num_threads(arguments.threads[0])
        if arguments.memory:
            answer = {arguments.memory: extra_mib(arguments.memory, num_codes, arguments.device)}
        else:
            answer = medians(arguments.time, num_codes, arguments.device, arguments.rounds)
        print(json.dumps(answer))
        return
    for num_codes in arguments.num_codes:
        for num_threads in arguments.threads:
            table(num_codes, "cpu", num_threads, arguments.rounds)
        if torch.cuda.is_available():
            table(num_codes, "cuda", 1, arguments.rounds)


if __name__ == "__main__":
    main()
