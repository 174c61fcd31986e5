"""The rate-distortion curve that beta traces, on the embedded images, with a picture.

    python -m benchmarks rate_distortion                         # five betas, and a plain codebook of several sizes
    python -m benchmarks rate_distortion --betas 0.5 1 --steps 400

A point is a run of `train.py` with its defaults but for the options here: as many steps of the codebook and half as
many of the prior for all, on one thread. `--model.beta` weighs the rate of a prior in the loop; each gives two points,
codes that are drawn (net rate: rate less posterior entropy) and the most probable codes (an exact code length). Plain
codebooks have one point each, and trade rate for distortion by their number of codes. Results are kept after each run,
and a run that is there is not made again.
"""

import math
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import harness

LIKELIEST, DRAWN, PLAIN = "prior in the loop, likeliest codes", "prior in the loop, drawn codes", "plain codebook"
QUICK = "--betas 1 --num-codes 64 --steps 4"


class Point(NamedTuple):
    """A point of a curve, rate and distortion in bits/dim; its label is beta, or the number of codes."""

    curve: str
    rate: float
    label: str
    distortion: float


def run(steps: int, *options: str) -> dict[str, Any]:
    """The elbo.json of a run."""
    with tempfile.TemporaryDirectory() as folder:
        harness.train(Path(folder) / "run", *harness.steps(steps, steps // 2), *options)
        return harness.elbo_of(Path(folder) / "run")


def points(label: str, result: dict[str, Any], plain: bool) -> list[Point]:
    """Those of one run."""
    bits = 1 / (math.log(2) * result["dims"])
    bounds = {PLAIN: result} if plain else {DRAWN: result, LIKELIEST: result["deterministic"]}
    found = []
    for curve, bound in bounds.items():
        net = list(bound["rate"].values())[-1] - bound["entropy"]
        found.append(Point(curve, net * bits, label, bound["distortion"] * bits))
    return found


def draw(found: list[Point], path: Path) -> None:
    with harness.picture(path, figsize=(7, 4.5), layout="constrained") as (_, axes):
        for curve, colour in ((DRAWN, "#cc6677"), (LIKELIEST, "#4477aa"), (PLAIN, "#999933")):
            chosen = [point for point in found if point.curve == curve]
            rates, distortions = [point.rate for point in chosen], [point.distortion for point in chosen]
            axes.plot(rates, distortions, "o-", color=colour, label=curve, markersize=4)
            sign = "K = " if curve == PLAIN else "β = "
            how = {"textcoords": "offset points", "xytext": (-30, -12) if curve == DRAWN else (5, 4), "fontsize": 7}
            for point in chosen:
                axes.annotate(sign + point.label, (point.rate, point.distortion), **how)
        # Along a line of slope −1 the sum, the negative ELBO, is the same.
        best = min(point.rate + point.distortion for point in found)
        axes.margins(0.12)
        low, high = axes.get_xlim()
        bottom, top = axes.get_ylim()
        axes.plot([low, high], [best - low, best - high], ":", color="grey", linewidth=1, label=f"sum {best:.3f}")
        axes.set(xlim=(low, high), ylim=(bottom, top))
        axes.set(xlabel="net rate: rate − posterior entropy (bits/dim)", ylabel="distortion (bits/dim)")
        axes.legend(frameon=False, loc=(0.55, 0.6))


def main(
    betas: tuple[str, ...] = ("0.25", "0.5", "1", "2", "4"),
    num_codes: tuple[str, ...] = ("64", "512"),
    steps: int = 800,
    beside: int = 2,
    results: Path = harness.OUT / "rate_distortion.json",
    output: Path = harness.OUT / "rate_distortion.png",
) -> None:
    """Make the runs that are not there, so many beside each other; then the table and the picture."""
    jobs = {f"beta {beta} | {steps}": partial(run, steps, "--model.beta", beta) for beta in betas}
    option = "--model.quantizer.num-codes"
    jobs |= {f"K {number} | {steps}": partial(run, steps, option, number) for number in num_codes}
    found: list[Point] = []
    for key, result in harness.Kept(results).fill(jobs, beside).items():
        kind, label = key.partition(" | ")[0].split()
        found += points(label, result, plain=kind == "K")
    found.sort()
    table = harness.Table("curve", "beta, or codes", "net rate (bits/dim)", "distortion (bits/dim)", "sum")
    for curve, rate, label, distortion in found:
        table.row(curve, label, f"{rate:.4f}", f"{distortion:.4f}", f"{rate + distortion:.4f}")
    draw(found, output)
