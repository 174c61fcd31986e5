"""How long exact EM takes, in how much memory, and what bits it ends with, as a small markdown table.

    python benchmarks/em.py [--num-components 100 1000] [--num-images 2000] [--num-steps 3] [--threads 1]
    python benchmarks/em.py --source fashion-mnist --root FOLDER --split train --num-images 60000

Each line is a fresh process: choose a start, fit `num_steps` EM steps to the first `num_images` images of the split,
then evaluate on as many of the other split. An EM step is E and M; the E step is timed alone too. Peak is ru_maxrss
when the fit is over, and "fit" how much of it came since the images were loaded: a categorical table takes
K * 784 * 256 * 4 bytes (766 MiB for K = 1000), and an M step fills a second one.

The bits/dim are those of levels: Gaussians are discretised for them. Those of the Bernoulli lines are of images
thresholded at 127, so they compare with no other line. A few steps from random seeds say how EM goes, not how well
a mixture can do.
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqvae import load_images
from vqvae.data import batches
from vqvae.em import BernoulliPixels, CategoricalPixels, GaussianPixels, Mixture

FAMILIES = {
    "categorical": CategoricalPixels(),
    "Bernoulli": BernoulliPixels(),
    "Gaussian": GaussianPixels(),
    "Gaussian, shared variance": GaussianPixels(variance="shared"),
}


def peak_mib() -> float:
    # Bytes on macOS, KiB elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def read(path: Path, family: str) -> Tensor:
    images = torch.from_numpy(np.load(path))
    return (images > 127).to(torch.uint8) if family == "Bernoulli" else images


def measure(family: str, num_components: int, num_steps: int, folder: Path) -> dict[str, float]:
    images = read(folder / "fit.npy", family)
    before = peak_mib()
    shape = (images.shape[1], images.shape[2], images.shape[3])
    mixture = Mixture(num_components=num_components, shape=shape, pixels=FAMILIES[family])
    mixture.fit(images, num_steps=0)  # takes memory from the system, which takes seconds once
    times = [time.perf_counter()]
    mixture.fit(images, num_steps=0, generator=torch.Generator().manual_seed(0))
    times.append(time.perf_counter())
    fit = mixture.fit(images, num_steps=num_steps, tolerance=0.0, generator=torch.Generator().manual_seed(0))
    times.append(time.perf_counter())
    mixture.log_prob(images)
    times.append(time.perf_counter())
    peak = peak_mib()
    none, some, e_step = (after - earlier for earlier, after in itertools.pairwise(times))
    done = len(fit.objective) - 1
    if isinstance(mixture.config.pixels, GaussianPixels):
        mixture = mixture.discretised()
    test = read(folder / "test.npy", family)
    return {
        "start": none - e_step,  # a fit ends with an E step
        "e_step": e_step,
        "em_step": (some - none) / done,
        "peak": peak,
        "fit": peak - before,
        "steps": done,
        "fitted": float(mixture.elbo(images).bits_per_dim(mixture.num_dims).mean()),
        "test": float(mixture.elbo(test).bits_per_dim(mixture.num_dims).mean()),
    }


def save(path: Path, options: argparse.Namespace, split: str) -> None:
    images = load_images(options.source, split, root=options.root)
    first: list[Tensor] = []
    for batch in batches(images, 1000):
        first.append(batch.images)
        if sum(map(len, first)) >= options.num_images:
            break
    np.save(path, torch.cat(first)[: options.num_images].numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure exact EM.")
    parser.add_argument("--source", default="fashion-mini")
    parser.add_argument("--root")
    parser.add_argument("--split", default="test", choices=["train", "test"], help="that the mixtures are fitted to")
    parser.add_argument("--num-images", type=int, default=2000)
    parser.add_argument("--num-components", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--num-steps", type=int, default=3)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # the program gives this one to itself
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.folder:
        answer = measure(options.families[0], options.num_components[0], options.num_steps, Path(options.folder))
        print(json.dumps(answer))
        return
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "fit.npy", options, options.split)
        save(Path(folder) / "test.npy", options, "train" if options.split == "test" else "test")
        print(f"{options.num_images} images of {options.source}, {options.split}; {options.threads} threads\n")
        print(
            "| pixels | K | start, s | E step, s | EM step, s | peak, MiB | fit, MiB | steps | bits/dim | of others |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|")
        for num_components in options.num_components:
            for family in options.families:
                command = [sys.executable, __file__, "--families", family, "--folder", folder]
                for name in ("threads", "num_steps"):
                    command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
                command += ["--num-components", str(num_components)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                row: dict[str, Any] = json.loads(done.stdout)
                print(
                    f"| {family} | {num_components} | {row['start']:.2f} | {row['e_step']:.2f} | {row['em_step']:.2f} "
                    f"| {row['peak']:,.0f} | {row['fit']:,.0f} | {row['steps']} | {row['fitted']:.3f} "
                    f"| {row['test']:.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
