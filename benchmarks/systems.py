"""Every system of variational inference at equal training time on the embedded images: one table of the bound's terms.

    python -m benchmarks systems                                    # all systems, 360 CPU seconds each
    python -m benchmarks systems --systems "VQ, EMA" "Gaussian VAE" --seconds 200

Each system is `train.py` with the options below, and otherwise its defaults: the same encoder, decoder, likelihood,
batches and seed. All get the same CPU seconds on one thread for everything before the evaluation: codebook, encoding,
prior; programs beside them change those less than the clock's. How many steps that is, is measured first on short
runs, since the learning rate's schedule has to know; the CPU seconds that a run then took stand in the table. The
mixture has no network: it is fitted by exact EM in as many seconds. Results are kept after each system, and one that is
there is not run again.

Bits are those of `vqvae.evaluation`. Where codes can be drawn (or vectors), `drawn` is the bound on draws, which
bits-back coding pays, and `likeliest` that of the most probable codes, an exact code length.
"""

import math
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from vqvae.em import CategoricalPixels, Mixture

CODES = ["--model.quantizer.num-codes", "512", "--model.quantizer.dim", "32"]
SYSTEMS: dict[str, list[str]] = {
    "VQ, EMA": CODES,
    "VQ, learned": ["--quantizer", "VectorQuantizer", *CODES],
    "soft-EM VQ": ["--quantizer", "SoftEMVectorQuantizer", *CODES],
    "FSQ": ["--quantizer", "FSQ", "--model.quantizer.levels", "8", "8", "8"],
    "Gumbel": ["--quantizer", "GumbelQuantizer", *CODES],
    "SQ-VAE": ["--quantizer", "StochasticVectorQuantizer", *CODES],
    "SQ-VAE, prior in the loop": ["--quantizer", "StochasticVectorQuantizer", "--model.beta", "1", *CODES],
    "rate-aware VQ": ["--model.beta", "1", *CODES],
    "Gaussian VAE": ["--latents", "gaussian", "--model.dim", "16"],
    "mixture, exact EM": [],
}
# Of the time for training: what the codebook gets; the rest encodes the images and trains the prior, which has learned
# before where it is in the loop.
CODEBOOK_SHARE, LOOP_SHARE = 0.75, 0.8
# Steps of the two short runs that say how long a step takes.
FEW, MANY = 10, 110
QUICK = "--seconds 5 --beside 1 --systems FSQ"


def train(folder: Path, stage: str, options: list[str], num_steps: int = 0) -> float:
    """Run a stage of train.py in a folder; its CPU seconds."""
    fit = [f"--{stage}-fit.num-steps", num_steps] if num_steps else []
    return harness.train(folder, "--stage", stage, *options, *fit).cpu


def steps_in(seconds: float, few: float, many: float) -> int:
    """How many steps take so many CPU seconds in all, of what two short runs took."""
    per_step = (many - few) / (MANY - FEW)
    return max(1, FEW + int((seconds - few) / per_step))


def run_system(options: list[str], seconds: float) -> dict[str, Any]:
    """Train and evaluate one system in a fresh folder; its elbo.json, with steps and CPU seconds."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
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
        return {**harness.elbo_of(folder / "run"), "steps": steps, "cpu_seconds": spent}


def run_mixture(seconds: float, num_components: int = 1000) -> dict[str, Any]:
    """Exact EM of a mixture of images with categorical pixels, for as long as the others train."""
    torch.set_num_threads(1)
    images = {split: harness.images("fashion-mini", split) for split in ("train", "test")}
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


def bounds(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A system's bounds: on draws and on the likeliest codes, where it has both."""
    if "deterministic" in result:
        return {"drawn": result, "likeliest": result["deterministic"]}
    return {"drawn" if result["entropy"] else "likeliest": result}


def best(result: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return min(bounds(result).items(), key=lambda item: item[1]["bits_per_dim"])


def draw(ranked: dict[str, dict[str, Any]], path: Path) -> None:
    """Net rate and distortion of each system as bars, in bits/dim, from the worst at the bottom."""
    size = (8, 0.42 * len(ranked) + 1.2)
    with harness.picture(path, figsize=size, layout="constrained") as (_, axes):
        names = list(reversed(ranked))
        distortions, totals = [], []
        for place, name in enumerate(names):
            kind, bound = best(ranked[name])
            distortion, total = bound["distortion"] / (math.log(2) * ranked[name]["dims"]), bound["bits_per_dim"]
            axes.barh(place, distortion, color="#4477aa", label="distortion" if not place else None)
            label = "rate − entropy" if not place else None
            axes.barh(place, total - distortion, left=distortion, color="#cc6677", label=label)
            axes.text(total + 0.01, place, f"{total:.3f}  {kind}", va="center", fontsize=8)
            distortions.append(distortion)
            totals.append(total)
        axes.set_yticks(range(len(names)), names)
        low, high = 0.9 * min(distortions), max(totals)
        axes.set(xlabel="bits/dim", xlim=(low, high + 0.25 * (high - low)))
        axes.legend(frameon=False, loc="upper right")


def main(
    systems: tuple[str, ...] = (),
    seconds: float = 360,
    beside: int = 2,
    results: Path = harness.OUT / "systems.json",
    output: Path = harness.OUT / "systems.png",
) -> None:
    """Run the systems that have no result yet, so many beside each other; then the table and the picture."""
    jobs = {
        f"{name} | {seconds:g} s": partial(run_system, options, seconds) if options else partial(run_mixture, seconds)
        for name, options in harness.pick(SYSTEMS, systems).items()
    }
    kept = harness.Kept(results).fill(jobs, beside)
    found = {key.partition(" | ")[0]: result for key, result in kept.items()}
    ranked = dict(sorted(found.items(), key=lambda item: best(item[1])[1]["bits_per_dim"]))
    terms = ("rate", "distortion", "entropy", "negative ELBO")
    table = harness.Table("system", "codes", *terms, "bits/dim", "steps", "CPU s")
    for name, result in ranked.items():
        steps = " + ".join(f"{number:,}" for number in result["steps"].values())
        for kind, bound in bounds(result).items():
            rate = list(bound["rate"].values())[-1]
            nats = (rate, bound["distortion"], bound["entropy"], bound["negative_elbo"])
            cells = (*(f"{each:.1f}" for each in nats), f"{bound['bits_per_dim']:.4f}")
            table.row(name, kind, *cells, steps, f"{result['cpu_seconds']:.0f}")
    draw(ranked, output)
