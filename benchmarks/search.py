"""How long the search for the nearest code takes, here and elsewhere.

    pip install vector-quantize-pytorch faiss-cpu
    python -m benchmarks search [--threads 1 2] [--num-codes 1024 16384] [--rounds 5]
    python -m benchmarks search --device cuda

65,536 vectors of width 64 meet one random codebook. The contestants take turns in one process for each number of
threads, or on a GPU. Extra memory is the growth of a fresh process's peak (VmHWM, so Linux
only) over what it held before the search, after a warm-up on a few vectors; on a GPU that of torch's allocator.
"""

import re
import statistics
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import harness
from vqvae.quantizers import EMAVectorQuantizer, nearest

DIM = 64
# At 16384 codes it holds the distances of all pairs four times over: 16 GiB.
HUNGRY, HUNGRY_CODES, HUNGRY_GIB = "vector-quantize-pytorch, forward", 16384, 18
FAISS = "faiss IndexFlatL2"
QUICK = "--threads 1 --num-codes 64 --rounds 1 --num-images 1"

Search = Callable[[Tensor], object]


def ours(codebook: Tensor) -> Search:
    quantizer = EMAVectorQuantizer(num_codes=len(codebook), dim=DIM).to(codebook.device).eval()
    quantizer.get_buffer("codebook").copy_(codebook)
    return quantizer


def bare(codebook: Tensor) -> Search:
    return lambda features: nearest(features.flatten(0, 1), codebook)


def theirs(codebook: Tensor) -> Search:
    from vector_quantize_pytorch import VectorQuantize

    quantizer = VectorQuantize(dim=DIM, codebook_size=len(codebook)).to(codebook.device).eval()
    quantizer.get_buffer("_codebook.embed").copy_(codebook[None])
    return quantizer


def all_pairs(codebook: Tensor) -> Search:
    return lambda features: torch.cdist(features.flatten(0, 1), codebook).argmin(1)


def flat_index(codebook: Tensor) -> Search:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(DIM)
    index.add(codebook.numpy())
    return lambda features: index.search(features.flatten(0, 1).numpy(), 1)


CONTESTANTS: dict[str, Callable[[Tensor], Search]] = {
    "EMAVectorQuantizer, forward": ours,
    "nearest": bare,
    HUNGRY: theirs,
    "torch.cdist().argmin": all_pairs,
    FAISS: flat_index,
}


def make(name: str, num_images: int, num_codes: int, device: str) -> Callable[[], object]:
    """A warm contestant, to be called on the features it is to quantise."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(num_images, 1024, DIM, generator=generator).to(device)
    search = CONTESTANTS[name](torch.randn(num_codes, DIM, generator=generator).to(device))
    search(features[:1])
    return partial(search, features)


def status_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


@torch.no_grad()
def extra_mib(name: str, num_images: int, num_codes: int, device: str) -> float:
    """In a process of its own."""
    search = make(name, num_images, num_codes, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        search()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status_mib("VmRSS")
    search()
    return status_mib("VmHWM") - before


@torch.no_grad()
def seconds(names: list[str], num_images: int, num_codes: int, device: str, rounds: int) -> dict[str, float]:
    """In a process of its own: medians of all contestants, in turns."""

    def timed(search: Callable[[], object]) -> float:
        return harness.timed(search, device).wall

    jobs = {name: partial(timed, make(name, num_images, num_codes, device)) for name in names}
    # Half a minute a time on a CPU: once is enough to see it.
    slow = [name for name in names if name == HUNGRY and device == "cpu" and num_codes >= HUNGRY_CODES]
    found = harness.interleaved({name: job for name, job in jobs.items() if name not in slow}, rounds)
    found |= {name: [jobs[name]()] for name in slow}
    return {name: statistics.median(found[name]) for name in names}


def available_gib() -> float:
    """Memory that programs could still have; none where the system does not say."""
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: *(\d+)", meminfo.read_text()) if meminfo.exists() else None
    return int(found[1]) / 2**20 if found else 0.0


def compare(num_images: int, num_codes: int, device: str, threads: int, rounds: int) -> None:
    """A table."""
    names = [name for name in CONTESTANTS if device == "cpu" or name != FAISS]
    if device == "cpu" and num_codes >= HUNGRY_CODES and available_gib() < HUNGRY_GIB:
        names.remove(HUNGRY)
        print(f"\n{HUNGRY} left out: it wants {HUNGRY_GIB} GiB")
    sizes = (num_images, num_codes, device)
    times = harness.in_child(seconds, names, *sizes, rounds, threads=threads)
    print(f"\n{num_codes} codes, {'GPU' if device == 'cuda' else f'{threads} threads'}\n")
    table = harness.Table("search", "seconds", "times as fast", "extra MiB")
    for name in names:
        ratio = f"{times[HUNGRY] / times[name]:.1f}" if HUNGRY in times else ""
        linux = device == "cuda" or sys.platform == "linux"
        memory = f"{harness.in_child(extra_mib, name, *sizes, threads=threads):,.0f}" if linux else ""
        table.row(name, f"{times[name]:.4f}", ratio, memory)


def main(
    threads: tuple[int, ...] = (1, 2),
    num_codes: tuple[int, ...] = (1024, 16384),
    rounds: int = 5,
    num_images: int = 64,
    device: harness.Device = "cpu",
) -> None:
    """Measure every contestant in every case; on a GPU threads are not looked at."""
    for number, num_threads in product(num_codes, threads if device == "cpu" else (1,)):
        compare(num_images, number, device, num_threads, rounds)
