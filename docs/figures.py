"""The figures of README.md and the pages, each from a computation or a run; nothing is drawn by hand.

    pip install -e .
    python train.py                                # the run that `overview` shows, runs/fashion-mini
    python docs/figures.py                         # all of them, about two minutes on one core
    python docs/figures.py em gumbel_bias          # some of them

They are written into docs/figures/, whatever the working directory. Seeds are fixed, but most of the figures stand on
trained models, which no two processors train to the last digit.

- overview, layers: see docs/overview.py.
- gumbel_bias: the relaxed gradient of five codes against the enumerated one, as in tests/vqvae/test_posterior.py.
- em: exact and hard EM on 2,000 images of the embedded Fashion-MNIST, reduced to 7x7 pixels of two levels.
- importance_weighted: the bound of k draws for a small Gaussian VAE, trained here.
- terms: rate, distortion and entropy in the `metrics.csv` of a run of train.py, made here in a temporary folder.
"""

import argparse
import csv
import io
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from overview import layers, overview  # pyrefly: ignore  (beside this file)
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import safefolder
from priors import NormalPrior
from vqvae import GaussianVAE, load_images
from vqvae.bound import sampled_elbo
from vqvae.data import batches
from vqvae.em import BernoulliPixels, Mixture
from vqvae.likelihoods import LogisticMixture
from vqvae.quantizers import GumbelQuantizer, StochasticVectorQuantizer
from vqvae.training.objectives import RAMP, START

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "figures"
BLUE, RED, YELLOW, GREEN, GREY = "#4477aa", "#cc6677", "#ddaa33", "#228833", "#777777"


# --- the relaxed gradient ---------------------------------------------------------------------------------------------

Kind = type[GumbelQuantizer] | type[StochasticVectorQuantizer]


def task(z_q: Tensor) -> Tensor:
    """Something that is not linear in the code's vector, as a decoder's distortion is not."""
    return z_q.square().sum(-1) + z_q[..., 0].sin()


def gradient_errors(kind: Kind, tau: float, *, hard: bool, num: int) -> tuple[float, float, float]:
    """Bias, spread of one sample, and standard error of the bias, each relative to the enumerated gradient's length."""
    torch.manual_seed(0)
    options = {"num_codes": 5, "dim": 3, "hard": hard, "temperature": tau, "final_temperature": tau}
    quantizer = kind(**options).double()
    z = torch.randn(1, 3, generator=torch.Generator().manual_seed(1)).double()

    exact_at = z.clone().requires_grad_()
    weight, bias = quantizer.logits()
    probs = F.softmax(exact_at @ weight.T + bias, dim=-1)
    (exact,) = torch.autograd.grad((probs * task(quantizer.table.detach())).sum(), exact_at)

    torch.manual_seed(0)
    found = []
    for _ in range(num // 200_000):
        many = z.expand(200_000, 3).clone().requires_grad_()
        found.append(torch.autograd.grad(task(quantizer(many).z_q).sum(), many)[0])
    estimates = torch.cat(found)
    spread = (estimates - estimates.mean(0)).square().sum(1).mean().sqrt().item()
    off = (estimates.mean(0) - exact[0]).norm().item()
    length = exact.norm().item()
    return off / length, spread / length, spread / length / len(estimates) ** 0.5


def gumbel_bias() -> Figure:
    taus = [2 ** (exponent / 2) for exponent in range(4, -9, -1)]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    kinds: list[tuple[str, Kind, str]] = [
        ("Gumbel softmax", GumbelQuantizer, BLUE),
        ("SQ-VAE", StochasticVectorQuantizer, RED),
    ]
    for name, kind, colour in kinds:
        for hard, style in ((False, "o-"), (True, "s:")):
            # Where samples spread more, more of them.
            draws = [200_000 if tau >= 0.5 else 1_600_000 for tau in taus]
            rows = [gradient_errors(kind, tau, hard=hard, num=num) for tau, num in zip(taus, draws, strict=True)]
            bias, spread, error = zip(*rows, strict=True)
            label = f"{name}, {'hard sample' if hard else 'relaxed sample'}"
            left.errorbar(taus, bias, yerr=error, fmt=style, color=colour, label=label, markersize=3, linewidth=1.2)
            right.plot(taus, spread, style, color=colour, label=label, markersize=3, linewidth=1.2)
    for axes, title in ((left, "bias"), (right, "standard deviation of one sample")):
        axes.set(xscale="log", yscale="log", xlabel="temperature τ (falls to the right)", title=title)
        axes.set_xticks([4, 2, 1, 1 / 2, 1 / 4, 1 / 8, 1 / 16], ["4", "2", "1", "1/2", "1/4", "1/8", "1/16"])
        axes.minorticks_off()
        axes.invert_xaxis()
        axes.grid(alpha=0.3)
    left.set(ylabel="lengths of the exact gradient", ylim=(2e-3, 1.5))
    right.legend(frameon=False, fontsize=8)
    return figure


# --- EM ---------------------------------------------------------------------------------------------------------------


def half_steps(images: Tensor, num_steps: int, *, hard: bool) -> tuple[list[float], list[float]]:
    """The negative ELBO after each E step and each M step, in turns; and -ln P(y) of the parameters at that time."""
    config = Mixture.Config(num_components=20, shape=(1, 7, 7), pixels=BernoulliPixels(alpha=0.0))
    mixture = config.build().double()
    mixture.fit(images, num_steps=0, generator=torch.Generator().manual_seed(0))
    bounds, evidence = [], []
    for step in range(num_steps + 1):
        encoder = mixture.posterior(images)  # E
        if hard:
            encoder = F.one_hot(encoder.argmax(1), encoder.shape[1]).double()
        for part in range(1 if step == num_steps else 2):
            if part:
                mixture.fit(images, num_steps=1, hard=hard, tolerance=0.0, resume=True)  # M, for that encoder
            bounds.append(mixture.elbo(images, encoder).negative.mean().item())
            evidence.append(-mixture.log_prob(images).mean().item())
    return bounds, evidence


def em() -> Figure:
    full = load_images("fashion-mini", "train")[:2000].images
    images = (F.avg_pool2d(full.float(), 4) > 127).to(torch.uint8)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for hard, colour, name in ((False, BLUE, "exact EM"), (True, RED, "hard EM")):
        bounds, evidence = half_steps(images, 20, hard=hard)
        right.plot(range(21), bounds[::2], "o-", color=colour, label=f"{name}: negative ELBO", markersize=3)
        right.plot(range(21), evidence[::2], ":", color=colour, label=f"{name}: −ln P(y)")
        if not hard:
            some = 9
            places = [place / 2 for place in range(some)]
            left.plot(places, bounds[:some], "-", color=colour, linewidth=1)
            left.plot(places[::2], bounds[:some:2], "o", color=colour, label="negative ELBO after an E step")
            left.plot(places[1::2], bounds[1:some:2], "s", color=YELLOW, label="negative ELBO after an M step")
            left.plot(places, evidence[:some], ":", color="black", label="−ln P(y)")
    left.set(xlabel="steps of EM", ylabel="nats an image", title="exact EM, half step by half step", xticks=range(5))
    right.set(xlabel="steps of EM", title="exact and hard EM", ylim=(11.1, 11.7), xticks=range(0, 21, 4))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    return figure


# --- the importance-weighted bound ------------------------------------------------------------------------------------


def small_vae(num_steps: int) -> GaussianVAE:
    torch.manual_seed(0)
    likelihood = LogisticMixture.Config(num_components=5, zero_component=True)
    model = GaussianVAE(width=16, num_blocks=1, dim=4, likelihood=likelihood)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    stream = batches(load_images("fashion-mini", "train"), 32, seed=0)
    for _ in tqdm(range(num_steps), desc="Gaussian VAE", disable=None, leave=False):
        out = model(next(stream).images)
        (out.distortion.mean() / model.num_dims + sum(out.auxiliary.values())).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.update()
    return model.eval()


def importance_weighted() -> Figure:
    model = small_vae(600)
    images = load_images("fashion-mini", "test")[:100].images
    prior = NormalPrior(dim=model.dim, grid=model.grid)
    generator = torch.Generator().manual_seed(0)
    log_weights = sampled_elbo(model, prior, images, num_samples=512, generator=generator).log_weights.double()
    sizes = [2**exponent for exponent in range(7)]
    means, errors = [], []
    for k in sizes:
        # Groups of k draws: each gives the bound of every image once.
        bounds = math.log(k) - log_weights.unflatten(0, (-1, k)).logsumexp(1)
        means.append(bounds.mean().item())
        errors.append((bounds.var(0).mean() / len(images)).sqrt().item())
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.errorbar(sizes, means, yerr=errors, fmt="o-", color=BLUE, capsize=3, markersize=4)
    left.set(ylabel="nats an image", title="mean of the bound over 100 images")
    right.plot(sizes, errors, "o-", color=BLUE, markersize=4)
    right.set(ylabel="nats an image", title="its standard error on k draws an image")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlabel("draws k an image")
        axes.grid(alpha=0.3)
    return figure


# --- the terms during training ----------------------------------------------------------------------------------------

STEPS, NUM_CODES, WEIGHT = 800, 64, 1 / 256
OPTIONS = [
    *("--quantizer", "StochasticVectorQuantizer", "--model.quantizer.num-codes", str(NUM_CODES)),
    *("--model.quantizer.dim", "16", "--model.quantizer.hard", "--model.quantizer.weight", str(WEIGHT)),
    *("--model.beta", "1", "--model.width", "16", "--model.num-blocks", "1", "--model.likelihood.num-components", "3"),
    *("--prior.no-labels", "--prior.width", "64", "--prior.depth", "2"),
    *("--codebook-fit.num-steps", str(STEPS), "--codebook-fit.batch-size", "64"),
]


def run_metrics(options: list[str]) -> dict[str, dict[int, float]]:
    """The training figures of stage `codebook` of a run, by name and step."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "train.py"), "--run", f"{folder}/run", "--stage", "codebook", *options]
        subprocess.run(command, cwd=ROOT, check=True)
        with (Path(folder) / "run" / "metrics.csv").open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
    figures: dict[str, dict[int, float]] = {}
    for row in rows:
        figures.setdefault(row["name"], {})[int(row["step"])] = float(row["value"])
    return figures


def smoothed(values: list[float]) -> list[float]:
    """Means over up to eleven neighbours, since a figure is of one batch; fewer at the start, where all falls fast."""
    parts = [values[place - reach : place + reach + 1] for place in range(len(values)) for reach in [min(5, place)]]
    return [sum(part) / len(part) for part in parts]


def net_rate(figures: dict[str, dict[int, float]], step: int) -> tuple[float, float]:
    """Rate and posterior entropy in nats per dimension, of terms of the objective and their weights."""
    if step in figures["kl"]:  # before the prior joins in: to even odds, in nats a place, a place for 16 pixels
        return math.log(NUM_CODES) / 16, (math.log(NUM_CODES) - figures["kl"][step] / WEIGHT) / 16
    weight = min(1.0, (step - math.ceil(START * STEPS)) / math.ceil(RAMP * STEPS))
    return figures["rate"][step] / weight, -figures["posterior_entropy"][step] / weight


def terms() -> Figure:
    figures = run_metrics(OPTIONS)
    steps = sorted(figures["distortion"])
    bits = 1 / math.log(2)
    distortion = [figures["distortion"][step] * bits for step in steps]
    pairs = [net_rate(figures, step) for step in steps]
    rate, entropy = ([pair[place] * bits for pair in pairs] for place in (0, 1))
    total = [d + r - h for d, r, h in zip(distortion, rate, entropy, strict=True)]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)

    for values, colour, label in ((total, "black", "negative ELBO"), (distortion, BLUE, "distortion")):
        left.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        left.plot(steps, smoothed(values), color=colour, label=label)
    right.plot(steps, rate, color=RED, label="rate")
    right.plot(steps, entropy, color=GREEN, label="posterior entropy")
    right.plot(steps, [r - h for r, h in zip(rate, entropy, strict=True)], color="black", label="rate − entropy")
    left.set(ylim=(min(distortion) - 0.05, min(distortion) + 1))
    for axes in (left, right):
        for share in (START, START + RAMP):
            axes.axvline(share * STEPS, color=GREY, linestyle=":", linewidth=1)
        axes.set(xlabel="training step", ylabel="bits/dim")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "overview": overview,
    "layers": layers,
    "gumbel_bias": gumbel_bias,
    "em": em,
    "importance_weighted": importance_weighted,
    "terms": terms,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(FIGURES), metavar="name", help=", ".join(FIGURES))
    names = parser.parse_args().names
    if unknown := set(names) - set(FIGURES):
        parser.error(f"got {', '.join(sorted(unknown))}, expected some of {', '.join(FIGURES)}")
    torch.set_num_threads(1)
    for name in names:
        drawn = io.BytesIO()
        FIGURES[name]().savefig(drawn, dpi=100, format="png")
        with safefolder.files.replacing(FOLDER / f"{name}.png") as scratch:
            Image.open(drawn).convert("RGB").quantize(96).save(scratch, format="png", optimize=True)  # a third in size
        print(FOLDER / f"{name}.png")


if __name__ == "__main__":
    main()
