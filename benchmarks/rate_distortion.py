"""The rate-distortion curve that beta traces, on the embedded images, with a picture.

    python benchmarks/rate_distortion.py                         # five betas, and a plain codebook of several sizes
    python benchmarks/rate_distortion.py --betas 0.5 1 --steps 400
    python benchmarks/rate_distortion.py --draw                  # the table and the picture of what was measured

A point is a run of `train.py` with its defaults but for the options here: as many steps of the codebook and the prior
for all. `--model.beta` weighs the rate of a prior in the loop; each gives two points, codes that are drawn (net rate:
rate less posterior entropy) and the most probable codes (an exact code length). Plain codebooks have one point each,
and trade rate for distortion by their number of codes. Results are kept in rate_distortion.json after each run.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import safefolder

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "rate_distortion.json"
PICTURE = ROOT / "benchmarks" / "rate_distortion.png"
LIKELIEST, DRAWN, PLAIN = "prior in the loop, likeliest codes", "prior in the loop, drawn codes", "plain codebook"


def run(options: list[str], steps: int) -> dict[str, Any]:
    """The elbo.json of a run."""
    with tempfile.TemporaryDirectory() as folder:
        fits = ["--codebook-fit.num-steps", str(steps), "--prior-fit.num-steps", str(steps // 2)]
        command = [sys.executable, str(ROOT / "train.py"), "--run", f"{folder}/run", *fits, *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
        return json.loads((Path(folder) / "run" / "elbo.json").read_text())


def measure(runs: dict[str, list[str]], steps: int, jobs: int, results: Path) -> None:
    """Do the runs that `results` lacks, and keep each result at once."""
    kept: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}

    def one(name: str) -> None:
        kept[name] = run(runs[name], steps)
        safefolder.files.write_text(results, json.dumps(kept, indent=1) + "\n")
        print(f"{name}: {kept[name]['bits_per_dim']:.4f} bits/dim", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, [name for name in runs if name not in kept]))


def points(kept: dict[str, Any]) -> list[tuple[str, str, float, float]]:
    """Curve, label, net rate and distortion in bits/dim."""
    found = []
    for name, result in kept.items():
        kind, _, value = name.partition(" ")
        bits = 1 / (math.log(2) * result["dims"])
        bounds = [(PLAIN, result)] if kind == "K" else [(DRAWN, result), (LIKELIEST, result["deterministic"])]
        for curve, bound in bounds:
            net = list(bound["rate"].values())[-1] - bound["entropy"]
            found.append((curve, value, net * bits, bound["distortion"] * bits))
    return sorted(found, key=lambda point: (point[0], point[2]))


def table(found: list[tuple[str, str, float, float]]) -> str:
    lines = ["| curve | beta, or codes | net rate (bits/dim) | distortion (bits/dim) | sum |", "|---|---|---|---|---|"]
    lines += [
        f"| {curve} | {label} | {rate:.4f} | {distortion:.4f} | {rate + distortion:.4f} |"
        for curve, label, rate, distortion in found
    ]
    return "\n".join(lines)


def draw(found: list[tuple[str, str, float, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for curve, colour in ((DRAWN, "#cc6677"), (LIKELIEST, "#4477aa"), (PLAIN, "#999933")):
        chosen = [point for point in found if point[0] == curve]
        rates, distortions = [point[2] for point in chosen], [point[3] for point in chosen]
        axes.plot(rates, distortions, "o-", color=colour, label=curve, markersize=4)
        sign = "K = " if curve == PLAIN else "β = "
        offset = (-30, -12) if curve == DRAWN else (5, 4)
        for _, label, rate, distortion in chosen:
            axes.annotate(sign + label, (rate, distortion), textcoords="offset points", xytext=offset, fontsize=7)
    # Along a line of slope −1 the sum, the negative ELBO, is the same.
    best = min(rate + distortion for *_, rate, distortion in found)
    axes.margins(0.12)
    low, high = axes.get_xlim()
    bottom, top = axes.get_ylim()
    axes.plot([low, high], [best - low, best - high], ":", color="grey", linewidth=1, label=f"sum {best:.3f}")
    axes.set(xlim=(low, high), ylim=(bottom, top))
    axes.set(xlabel="net rate: rate − posterior entropy (bits/dim)", ylabel="distortion (bits/dim)")
    axes.legend(frameon=False, loc=(0.55, 0.6))
    with safefolder.files.replacing(path) as scratch:
        figure.savefig(scratch, dpi=120, format="png")
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--betas", nargs="+", default=["0.25", "0.5", "1", "2", "4"])
    parser.add_argument("--num-codes", nargs="+", default=["64", "512"], help="of plain codebooks")
    parser.add_argument("--steps", type=int, default=800, help="of the codebook; half as many of the prior")
    parser.add_argument("--jobs", type=int, default=2, help="runs beside each other, a thread each")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--draw", action="store_true", help="only the table and the picture")
    options = parser.parse_args()
    runs = {f"beta {beta}": ["--model.beta", beta] for beta in options.betas}
    runs |= {f"K {number}": ["--model.quantizer.num-codes", number] for number in options.num_codes}
    if not options.draw:
        measure(runs, options.steps, options.jobs, options.results)
    found = points(json.loads(options.results.read_text()))
    print(table(found))
    draw(found, PICTURE)


if __name__ == "__main__":
    main()
