"""Every system of variational inference at equal training time on the embedded images: one table of the bound's terms.

    python benchmarks/systems.py                                    # all systems, 360 CPU seconds each
    python benchmarks/systems.py --systems "VQ, EMA" "Gaussian VAE" --seconds 200
    python benchmarks/systems.py --draw                             # the table and the picture of what was measured

Each system is `train.py` with the options below, and otherwise its defaults: the same encoder, decoder, likelihood,
batches and seed. All get the same CPU seconds on one thread for everything before the evaluation: codebook, encoding,
prior; programs beside them change those less than the clock's. How many steps that is, is measured first on short
runs, since the learning rate's schedule has to know; the CPU seconds that a run then took stand in the table. The
mixture has no network: it is fitted by exact EM in as many seconds. Results are kept in systems.json after each system,
and a system that is there is not run again.

Bits are those of `vqvae.evaluation`. Where codes can be drawn (or vectors), `drawn` is the bound on draws, which
bits-back coding pays, and `likeliest` that of the most probable codes, an exact code length.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import safefolder
from vqvae import load_images
from vqvae.em import CategoricalPixels, Mixture

ROOT = Path(__file__).parents[1]
SYSTEMS: dict[str, list[str]] = {
    "VQ, EMA": [],
    "VQ, learned": ["--quantizer", "VectorQuantizer"],
    "soft-EM VQ": ["--quantizer", "SoftEMVectorQuantizer"],
    "FSQ": ["--quantizer", "FSQ", "--model.quantizer.levels", "8", "8", "8"],
    "Gumbel": ["--quantizer", "GumbelQuantizer"],
    "SQ-VAE": ["--quantizer", "StochasticVectorQuantizer"],
    "SQ-VAE, prior in the loop": ["--quantizer", "StochasticVectorQuantizer", "--model.beta", "1"],
    "rate-aware VQ": ["--model.beta", "1"],
    "Gaussian VAE": ["--latents", "gaussian", "--model.dim", "16"],
}
MIXTURE = "mixture, exact EM"
NUM_CODES, DIM = 512, 32
# Of the time for training: what the codebook gets; the rest encodes the images and trains the prior, which has learned
# before where it is in the loop.
CODEBOOK_SHARE, LOOP_SHARE = 0.75, 0.8
# Steps of the two short runs that say how long a step takes.
FEW, MANY = 10, 110
RESULTS = ROOT / "benchmarks" / "systems.json"
PICTURE = ROOT / "benchmarks" / "systems.png"


def cpu_seconds(command: list[str]) -> float:
    """Run a command on one thread; its CPU seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {errors[-2000:]}")
    return usage.ru_utime + usage.ru_stime


def train(folder: Path, stage: str, options: list[str], num_steps: int = 0) -> float:
    """Run a stage of train.py in a folder; its CPU seconds."""
    command = [sys.executable, str(ROOT / "train.py"), "--run", str(folder), "--stage", stage, *options]
    if num_steps:
        command += [f"--{stage}-fit.num-steps", str(num_steps)]
    return cpu_seconds(command)


def steps_in(seconds: float, few: float, many: float) -> int:
    """How many steps take so many CPU seconds in all, of what two short runs took."""
    per_step = (many - few) / (MANY - FEW)
    return max(1, FEW + int((seconds - few) / per_step))


def run_system(name: str, options: list[str], seconds: float, folder: Path) -> dict[str, Any]:
    """Train and evaluate one system in a fresh folder; its elbo.json, with steps and CPU seconds."""
    took = [train(folder / f"codebook{steps}", "codebook", options, steps) for steps in (FEW, MANY)]
    share = LOOP_SHARE if "--model.beta" in options else CODEBOOK_SHARE
    steps = {"codebook": steps_in(share * seconds, *took)}
    spent = train(folder / "run", "codebook", options, steps["codebook"])
    took = []
    for few_or_many in (FEW, MANY):
        copy = shutil.copytree(folder / "run", folder / f"prior{few_or_many}")
        took.append(train(copy, "prior", [], few_or_many))
    steps["prior"] = steps_in(seconds - spent, *took)
    spent += train(folder / "run", "prior", [], steps["prior"])
    train(folder / "run", "evaluate", [])
    result = json.loads((folder / "run" / "elbo.json").read_text())
    return {**result, "steps": steps, "cpu_seconds": spent}


def run_mixture(seconds: float, num_components: int = 1000) -> dict[str, Any]:
    """Exact EM of a mixture of images with categorical pixels, for as long as the others train."""
    torch.set_num_threads(1)
    found = {split: load_images("fashion-mini", split) for split in ("train", "test")}
    images = {split: every[:].images for split, every in found.items()}
    mixture = Mixture(num_components=num_components, shape=(1, 28, 28), pixels=CategoricalPixels())
    began, steps, took = time.thread_time(), 0, 0.0
    mixture.fit(images["train"], num_steps=0, generator=torch.Generator().manual_seed(0))
    while (before := time.thread_time()) + took < began + seconds:
        mixture.fit(images["train"], num_steps=5, tolerance=0.0, resume=True)
        took, steps = time.thread_time() - before, steps + 5
    spent = time.thread_time() - began
    terms = mixture.elbo(images["test"])
    dims = mixture.num_dims
    return {
        "rate": {"mixture": terms.rate.mean().item()},
        "distortion": terms.distortion.mean().item(),
        "entropy": terms.entropy.mean().item(),
        "negative_elbo": terms.negative.mean().item(),
        "bits_per_dim": terms.bits_per_dim(dims).mean().item(),
        "dims": dims,
        "steps": {"EM": steps},
        "cpu_seconds": spent,
    }


def measure(names: list[str], seconds: float, jobs: int, results: Path) -> None:
    """Run the systems that `results` lacks, some beside each other, and keep each result at once."""
    kept: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}

    def run(name: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            result = (
                run_mixture(seconds) if name == MIXTURE else run_system(name, options_of(name), seconds, Path(folder))
            )
        kept[name] = result
        safefolder.files.write_text(results, json.dumps(kept, indent=1) + "\n")
        print(f"{name}: {result['bits_per_dim']:.4f} bits/dim", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, [name for name in names if name not in kept]))


def options_of(name: str) -> list[str]:
    options = list(SYSTEMS[name])
    if "gaussian" in options or "FSQ" in options:
        return options
    return [*options, "--model.quantizer.num-codes", str(NUM_CODES), "--model.quantizer.dim", str(DIM)]


def bounds(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """A system's bounds: on draws and on the likeliest codes, where it has both."""
    if "deterministic" in result:
        return [("drawn", result), ("likeliest", result["deterministic"])]
    return [("drawn" if result["entropy"] else "likeliest", result)]


def table(kept: dict[str, Any]) -> str:
    lines = ["| system | codes | rate | distortion | entropy | negative ELBO | bits/dim | steps | CPU s |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    ranked = sorted(kept.items(), key=lambda item: min(bound["bits_per_dim"] for _, bound in bounds(item[1])))
    for name, result in ranked:
        steps = " + ".join(f"{number:,}" for number in result["steps"].values())
        for kind, bound in bounds(result):
            rate = list(bound["rate"].values())[-1]
            lines.append(
                f"| {name} | {kind} | {rate:.1f} | {bound['distortion']:.1f} | {bound['entropy']:.1f} "
                f"| {bound['negative_elbo']:.1f} | {bound['bits_per_dim']:.4f} | {steps} "
                f"| {result['cpu_seconds']:.0f} |"
            )
    return "\n".join(lines)


def draw(kept: dict[str, Any], path: Path) -> None:
    """Net rate and distortion of each system as bars, in bits/dim."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    best = {name: min(bounds(result), key=lambda each: each[1]["bits_per_dim"]) for name, result in kept.items()}
    names = sorted(best, key=lambda name: -best[name][1]["bits_per_dim"])
    figure, axes = pyplot.subplots(figsize=(8, 0.42 * len(names) + 1.2), layout="constrained")
    for place, name in enumerate(names):
        kind, bound = best[name]
        bits = 1 / (math.log(2) * kept[name]["dims"])
        distortion = bound["distortion"] * bits
        net = bound["bits_per_dim"] - distortion
        axes.barh(place, distortion, color="#4477aa", label="distortion" if not place else None)
        axes.barh(place, net, left=distortion, color="#cc6677", label="rate − entropy" if not place else None)
        axes.text(distortion + net + 0.01, place, f"{bound['bits_per_dim']:.3f}  {kind}", va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names)
    low = min(bound["distortion"] / (math.log(2) * kept[name]["dims"]) for name, (_, bound) in best.items())
    high = max(bound["bits_per_dim"] for _, bound in best.values())
    axes.set(xlabel="bits/dim", xlim=(0.9 * low, high + 0.25 * (high - 0.9 * low)))
    axes.legend(frameon=False, loc="upper right")
    with safefolder.files.replacing(path) as scratch:
        figure.savefig(scratch, dpi=120, format="png")
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*SYSTEMS, MIXTURE]
    parser.add_argument("--systems", nargs="+", default=names, choices=names)
    parser.add_argument("--seconds", type=float, default=360, help="CPU seconds of training for each")
    parser.add_argument("--jobs", type=int, default=2, help="systems beside each other, a thread each")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--draw", action="store_true", help="only the table and the picture")
    options = parser.parse_args()
    if not options.draw:
        measure(options.systems, options.seconds, options.jobs, options.results)
    kept = json.loads(options.results.read_text())
    print(table(kept))
    draw(kept, PICTURE)


if __name__ == "__main__":
    main()
