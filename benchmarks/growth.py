"""How time and memory grow: with the side of an image, the codes of a codebook, the positions of a grid, the batch.

    python -m benchmarks growth
    python -m benchmarks growth --only side codes --most 128

Each point is a process of its own, on one thread: the least CPU time of a few steps, and by how much the largest
resident set grew from before them.

side        a training step of a VQVAE of f = 8 and width 32 on one image of 32 to 512 pixels; floor: the pixels
codes       a training step of `EMAVectorQuantizer` on 4,096 vectors of 64 channels, K of 2^10 to 2^18; floor: the codes
positions   sampling one grid of 49 to 4,096 codes from a prior of 5M weights; floor: the codes, as long as what is
            read of the cache is less than the weights, 6.4 MB in bfloat16 a thousand positions beside 9.6 MB
batch       sampling 1 to 256 grids of 49 codes; floor: the grids

The picture has both axes in logarithms, and the floor as a line through the last point: what is steeper grows faster
than its floor. `slope` is that of the last two points.
"""

import gc
import math
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from priors import Sampling, TransformerPrior
from vqvae import VQVAE
from vqvae.likelihoods import Normal
from vqvae.quantizers import EMAVectorQuantizer

QUICK = "--only batch --most 2 --output runs/benchmarks/growth-quick"
POINTS = {
    "side": (32, 64, 128, 256, 512),
    "codes": tuple(2**power for power in range(10, 19, 2)),
    "positions": (49, 256, 1024, 4096),
    "batch": (1, 4, 16, 64, 256),
}
# The power of the point with which its floor grows.
FLOORS = {"side": 2, "codes": 1, "positions": 1, "batch": 1}
LABELS = {"side": "side in pixels", "codes": "codes K", "positions": "positions of a grid", "batch": "grids at once"}


def main(
    only: tuple[str, ...] = (), most: int | None = None, rounds: int = 3, output: Path = harness.OUT / "growth"
) -> None:
    """Measure each kind of growth; --most leaves out points beyond it, and what --output holds is taken from there."""
    output.mkdir(parents=True, exist_ok=True)
    kept = harness.Kept(output / "results.json")
    found: dict[str, dict[int, list[float]]] = {}
    for kind, points in harness.pick(POINTS, only).items():
        table = harness.Table(LABELS[kind], "CPU s", "MiB more", "slope", "of the floor")
        found[kind], before = {}, None
        for point in points:
            if most is not None and point > most:
                continue
            name = f"{kind} | {point}"
            seconds, memory = kept.fill({name: lambda at=point, of=kind: harness.in_child(measure, of, at, rounds)})[
                name
            ]
            slope = ""
            if before is not None:
                slope = f"{math.log(seconds / found[kind][before][0]) / math.log(point / before):.2f}"
            found[kind][point] = [seconds, memory]
            table.row(f"{point:,}", f"{seconds:.4f}", f"{memory:,.0f}", slope, FLOORS[kind])
            before = point
        print()
    draw(found, output / "growth.png")


def measure(kind: str, point: int, rounds: int) -> list[float]:
    """CPU seconds of a step, and MiB that it took, in this process."""
    torch.manual_seed(0)
    step = {"side": _side, "codes": _codes, "positions": _positions, "batch": _batch}[kind](point)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    seconds = min(harness.timed(step).counted for _ in range(rounds))
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return [seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit]


def _side(size: int) -> Callable[[], object]:
    model = VQVAE(image_size=size, num_channels=3, width=32, downsampling=8, likelihood=Normal.Config()).train()
    images = torch.randint(256, (1, 3, size, size), dtype=torch.uint8)
    return _trained(model, lambda: model(images).distortion.mean() / model.num_dims)


def _codes(num_codes: int) -> Callable[[], object]:
    quantizer = EMAVectorQuantizer(num_codes=num_codes, dim=64).train()
    vectors = torch.randn(4096, 64, requires_grad=True)
    return _trained(quantizer, lambda: quantizer(vectors).z_q.square().mean())


def _trained(model: Any, loss: Callable[[], torch.Tensor]) -> Callable[[], object]:
    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            value = loss()
        value.backward()
        model.zero_grad()
        model.update()

    return step


def _positions(num: int) -> Callable[[], object]:
    side = math.isqrt(num)
    prior = TransformerPrior(num_codes=512, grid=(side, side), width=256, depth=6, num_heads=8).eval()
    return lambda: prior.sample(1, sampling=Sampling(precision="bfloat16"))


def _batch(num: int) -> Callable[[], object]:
    prior = TransformerPrior(num_codes=512, grid=(7, 7), width=256, depth=6, num_heads=8).eval()
    return lambda: prior.sample(num, sampling=Sampling(precision="bfloat16", batch_size=num))


def draw(found: dict[str, dict[int, list[float]]], path: Path) -> None:
    """A panel of time and one of memory for each kind, with its floor."""
    columns = max(1, len(found))
    with harness.picture(path, 2, columns, figsize=(3.2 * columns, 5.5), layout="constrained", squeeze=False) as (
        _,
        axes,
    ):
        for column, (kind, points) in enumerate(found.items()):
            x = list(points)
            for row, (which, title) in enumerate((("CPU seconds a step", 0), ("MiB more than before", 1))):
                y = [max(points[point][title], 1e-3) for point in x]
                panel = axes[row][column]
                panel.loglog(x, y, "o-", color="#4477aa", markersize=4)
                if x:
                    floor = [y[-1] * (point / x[-1]) ** FLOORS[kind] for point in x]
                    panel.loglog(x, floor, "--", color="#999999", linewidth=1)
                panel.minorticks_off()
                panel.set_xticks(x, [f"{point:,}" for point in x], fontsize=7)
                panel.set_xlabel(LABELS[kind])
                panel.set_ylabel(which)
