"""How long exact EM takes, in how much memory, and what bits it ends with.

    python -m benchmarks em [--num-components 100 1000] [--num-images 2000] [--num-steps 3] [--threads 1]
    python -m benchmarks em --source fashion-mnist --root FOLDER --split train --num-images 60000

Each line is a fresh process: choose a start, fit `num_steps` EM steps to the first `num_images` images of the split,
then evaluate on as many of the other split. An EM step is E and M; the E step is timed alone too. Peak is ru_maxrss
when the fit is over, and "fit" how much of it came since the images were loaded: a categorical table takes
K * 784 * 256 * 4 bytes (766 MiB for K = 1000), and an M step fills a second one.

The bits/dim are those of levels: Gaussians are discretised for them. Those of the Bernoulli lines are of images
thresholded at 127, so they compare with no other line. A few steps from random seeds say how EM goes, not how well
a mixture can do.
"""

import resource
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks import harness
from vqvae.em import BernoulliPixels, CategoricalPixels, GaussianPixels, Mixture

FAMILIES = {
    "categorical": CategoricalPixels(),
    "Bernoulli": BernoulliPixels(),
    "Gaussian": GaussianPixels(),
    "Gaussian, shared variance": GaussianPixels(variance="shared"),
}
QUICK = "--num-components 10 --num-images 200 --num-steps 1"


def peak_mib() -> float:
    # Bytes on macOS, KiB elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def read(path: Path, family: str) -> Tensor:
    images = torch.from_numpy(np.load(path))
    return (images > 127).to(torch.uint8) if family == "Bernoulli" else images


def measure(family: str, num_components: int, num_steps: int, folder: str) -> dict[str, float]:
    """In a process of its own."""
    images = read(Path(folder) / "fit.npy", family)
    before = peak_mib()
    shape = (images.shape[1], images.shape[2], images.shape[3])
    mixture = Mixture(num_components=num_components, shape=shape, pixels=FAMILIES[family])
    mixture.fit(images, num_steps=0)  # takes memory from the system, which takes seconds once
    none = harness.timed(lambda: mixture.fit(images, num_steps=0, generator=torch.Generator().manual_seed(0))).wall
    start = harness.now().wall
    fit = mixture.fit(images, num_steps=num_steps, tolerance=0.0, generator=torch.Generator().manual_seed(0))
    some = harness.now().wall - start
    e_step = harness.timed(lambda: mixture.log_prob(images)).wall
    peak = peak_mib()
    done = len(fit.objective) - 1
    found = mixture.discretised() if isinstance(mixture.config.pixels, GaussianPixels) else mixture
    test = read(Path(folder) / "test.npy", family)
    return {
        "start": none - e_step,  # a fit ends with an E step
        "e_step": e_step,
        "em_step": (some - none) / done,
        "peak": peak,
        "fit": peak - before,
        "steps": done,
        "fitted": float(found.elbo(images).bits_per_dim(found.num_dims).mean()),
        "test": float(found.elbo(test).bits_per_dim(found.num_dims).mean()),
    }


def main(
    source: str = "fashion-mini",
    root: Path | None = None,
    split: Literal["train", "test"] = "test",
    num_images: int = 2000,
    num_components: tuple[int, ...] = (100, 1000),
    num_steps: int = 3,
    families: tuple[str, ...] = (),
    threads: int = 1,
) -> None:
    """Fit every family of pixels, or those of --families, to images that `load_images` takes."""
    with tempfile.TemporaryDirectory() as folder:
        other = "train" if split == "test" else "test"
        for name, part in (("fit", split), ("test", other)):
            np.save(Path(folder) / f"{name}.npy", harness.images(source, part, num_images, root=root).numpy())
        print(f"{num_images} images of {source}, {split}; {threads} threads\n")
        times = ("start, s", "E step, s", "EM step, s")
        table = harness.Table("pixels", "K", *times, "peak, MiB", "fit, MiB", "steps", "bits/dim", "of others")
        for number, family in product(num_components, harness.pick(FAMILIES, families)):
            found = harness.in_child(measure, family, number, num_steps, folder, threads=threads)
            seconds = (f"{found[part]:.2f}" for part in ("start", "e_step", "em_step"))
            memory = (f"{found[part]:,.0f}" for part in ("peak", "fit"))
            bits = (f"{found[part]:.3f}" for part in ("fitted", "test"))
            table.row(family, number, *seconds, *memory, found["steps"], *bits)
