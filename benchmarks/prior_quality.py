"""What each prior makes of the codes of one fixed tokenizer, at equal CPU time: bits per code, pictures, codes a step.

    python -m benchmarks prior_quality RUN --seconds 900 --out FOLDER      # RUN: a run of train.py with a codebook
    python -m benchmarks prior_quality RUN --out FOLDER --pictures         # of priors trained before, pictures alone

Without a run a small one of our own is trained. Training is interleaved: the priors take turns of 20 CPU seconds in one
process on one thread, so that whatever else the machine does meets all of them alike. Each has its own share of
seconds, AdamW, a warm-up of 2 % and a cosine decay over its CPU time, batches of 64, bfloat16 autocast. Rates are means
over the whole test set. A prior with classes pays ln(number of classes) for the label of each image; uniform, unigram
and n-gram know no classes.

Quality against steps: `AnyOrderPrior` draws grids with several codes a step. Two figures for each number of steps: bits
a code that the raster transformer, another model, gives the samples (test codes: its rate), and the Frechet distance of
decoded samples from decoded test codes in the 64 first principal components of the latter.
"""

import json
import math
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor
from tqdm import tqdm
from tyro.conf import Positional, arg

from benchmarks import harness
from priors import (
    AnyOrderPrior,
    NGramPrior,
    PixelCNNPrior,
    Prior,
    Sampling,
    TransformerPrior,
    UniformPrior,
    UnigramPrior,
)
from vqvae import VQVAE, load_images, pictures
from vqvae.data import batches

TURN = 20.0
BATCH = 64
RATES = {"PixelCNN": 3e-3, "raster transformer": 2e-3, "random-order transformer": 2e-3}
STEPS = (1, 2, 4, 6, 8, 12, 16, 24, 49)
QUICK = "--seconds 0.5 --num-steps 4 --num-drawn 100 --out runs/benchmarks/priors-quick"


def main(
    run: Positional[Path | None] = None,
    seconds: float = 900.0,
    out: Path = harness.OUT / "priors",
    pictures_only: Annotated[bool, arg(name="pictures")] = False,
    num_steps: int = 1000,
    num_drawn: int = 2000,
) -> None:
    """Train each learned prior for so many CPU seconds, and draw with them.

    Args:
        num_steps: of a run of our own
        num_drawn: grids for each number of steps
    """
    torch.set_num_threads(1)
    run = harness.some_run(run, num_steps)
    out.mkdir(parents=True, exist_ok=True)
    model = VQVAE.from_pretrained(run / "codebook").eval()
    codes = saved_codes(run, model, out / "codes.pt")
    if not pictures_only:
        train_all(model, codes, seconds, out)
    draw_pictures(model, codes, num_drawn, out)


def saved_codes(run: Path, model: VQVAE, path: Path) -> dict[str, Tensor]:
    """Codes and labels of all training and test images, encoded once."""
    if not path.exists():
        data = json.loads((run / "state" / "run.json").read_text())["data"]
        found: dict[str, Tensor] = {}
        for split in ("train", "test"):
            options = {"size": model.config.image_size, "channels": model.config.num_channels, "root": data["root"]}
            images = load_images(data["source"], split, **options)
            parts = list(tqdm(batches(images, 200), desc=f"encode {split}", total=len(images) // 200, disable=None))
            found[split] = torch.cat([model.encode(part.images).short() for part in parts])
            found[f"{split}_labels"] = torch.cat([part.labels for part in parts if part.labels is not None])
        torch.save(found, path)
    return {name: tensor.long() for name, tensor in torch.load(path, weights_only=True).items()}


@torch.no_grad()
def rate(prior: Prior, codes: dict[str, Tensor]) -> float:
    """Bits per code of the test set, the label's share included."""
    nats = []
    for part in torch.arange(len(codes["test"])).split(500):
        labels = codes["test_labels"][part] if prior.num_classes else None
        nats.append(-prior.log_prob(codes["test"][part], labels))
    label = math.log(prior.num_classes) if prior.num_classes else 0.0
    return (torch.cat(nats).mean().item() + label) / prior.num_positions / math.log(2)


def train_all(model: VQVAE, codes: dict[str, Tensor], seconds: float, out: Path) -> None:
    sizes = {"num_codes": model.num_codes, "grid": model.grid}
    uniform, unigram, ngram = UniformPrior(**sizes), UnigramPrior(**sizes), NGramPrior(**sizes)
    counting = harness.timed(lambda: ngram.fit(codes["train"])).counted
    unigram.fit(codes["train"])
    # Bits per code, CPU seconds, steps.
    rows = {"uniform": (rate(uniform, codes), 0.0, 0), "unigram": (rate(unigram, codes), 0.0, 0)}
    rows["n-gram (left, up)"] = (rate(ngram, codes), counting, 0)
    torch.manual_seed(0)
    labelled = {**sizes, "num_classes": int(codes["train_labels"].max()) + 1}
    learned: dict[str, Prior] = {
        "PixelCNN": PixelCNNPrior(**labelled),
        "raster transformer": TransformerPrior(**labelled),
        "random-order transformer": AnyOrderPrior(**labelled),
    }
    # Each has as many turns as the others.
    turns = [fitting(prior, codes, RATES[name], seconds) for name, prior in learned.items()]
    steps = list(tqdm(zip(*turns, strict=True), desc="train", total=math.ceil(seconds / TURN), disable=None))[-1]
    for (name, prior), num in zip(learned.items(), steps, strict=True):
        prior.eval().save_pretrained(out / name.replace(" ", "-"))
        rows[name] = (rate(prior, codes), seconds, num)
    best = min(bits for name, (bits, _, _) in rows.items() if "transformer" not in name)
    table = harness.Table("prior", "bits per code", "of the best without attention", "CPU seconds", "steps")
    for name, (bits, spent, num) in rows.items():
        table.row(name, f"{bits:.3f}", f"{bits / best:.3f}", f"{spent:.0f}", num or "")


def fitting(prior: Prior, codes: dict[str, Tensor], learning_rate: float, seconds: float) -> Iterator[int]:
    """Train for turns of CPU time; after each turn, how many steps there have been."""
    weights = list(prior.parameters())
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    generator = torch.Generator().manual_seed(0)
    steps, spent = 0, 0.0
    prior.train()
    for turn in range(math.ceil(seconds / TURN)):
        begin = harness.now().counted - spent
        while (spent := harness.now().counted - begin) < min(seconds, TURN * (turn + 1)):
            share = spent / seconds
            for group in optimizer.param_groups:
                warm = min(1.0, share / 0.02 + 1e-3)
                group["lr"] = learning_rate * warm * (0.5 + 0.5 * math.cos(math.pi * share))
            chosen = torch.randint(len(codes["train"]), (BATCH,), generator=generator)
            with torch.autocast("cpu", torch.bfloat16):
                nats = -prior(codes["train"][chosen], codes["train_labels"][chosen]).mean() / prior.num_positions
            nats.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
        yield steps


def draw_pictures(model: VQVAE, codes: dict[str, Tensor], num_drawn: int, out: Path) -> None:
    raster = TransformerPrior.from_pretrained(out / "raster-transformer")
    any_order = AnyOrderPrior.from_pretrained(out / "random-order-transformer")
    labels = torch.arange(100) % 10
    for name, prior in (("samples", raster), ("samples-any-order", any_order)):
        generator = torch.Generator().manual_seed(0)
        drawn = prior.sample(100, labels, Sampling(temperature=0.95, guidance=1.5), generator)
        pictures.save_grid(out / f"{name}.png", model.decode(drawn), 10)
    inpainting(model, any_order, codes, out / "inpainting.png")
    against_steps(model, any_order, raster, codes, num_drawn, out)


def inpainting(model: VQVAE, prior: AnyOrderPrior, codes: dict[str, Tensor], path: Path) -> None:
    """Rows of a test image: its codes decoded, what is known of it, and five ways to go on."""
    height, width = model.grid
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    masks = [rows >= height // 2, columns >= width // 2, (rows - 3).abs().max((columns - 3).abs()) <= 1, rows < 3]
    tiles = []
    for i, one in enumerate(codes["test"][: 2 * len(masks)]):
        mask = masks[i % len(masks)]
        known, labels = one.expand(5, -1, -1), codes["test_labels"][i].expand(5)
        generator = torch.Generator().manual_seed(i)
        drawn = prior.sample(5, labels, generator=generator, given=known, mask=mask)
        whole = model.decode(one[None])
        side = whole.shape[-1] // width
        hidden = mask.repeat_interleave(side, 0).repeat_interleave(side, 1)
        tiles += [whole, whole.masked_fill(hidden, 128), model.decode(drawn)]
    pictures.save_grid(path, torch.cat(tiles), 7)


@torch.no_grad()
def against_steps(
    model: VQVAE, prior: AnyOrderPrior, judge: Prior, codes: dict[str, Tensor], num: int, out: Path
) -> None:
    """Quality and time of several codes a step, beside the judge's own draws."""
    labels = torch.arange(num) % 10
    real = model_pixels(model, codes["test"][:num])
    centre = real.mean(0)
    basis = torch.linalg.svd(real - centre, full_matrices=False).Vh[:64].T

    def bits(grids: Tensor, classes: Tensor) -> float:
        return -judge.log_prob(grids, classes).mean().item() / judge.num_positions / math.log(2)

    test = bits(codes["test"][:num], codes["test_labels"][:num])
    print(f"\ntest codes: {test:.3f} bits per code under the raster transformer\n")
    table = harness.Table("steps", "bits per code", "Frechet distance", "CPU ms a grid", "of one alone")
    found = []
    for sampler, steps in [*((prior, steps) for steps in STEPS), (judge, None)]:
        begin = harness.now().counted
        drawn = sampler.sample(num, labels, Sampling(num_steps=steps), torch.Generator().manual_seed(1))
        spent = (harness.now().counted - begin) / num
        one = partial(sampler.sample, 1, torch.tensor([3]), num_steps=steps)
        alone = statistics.median(harness.timed(one).counted for _ in range(5))
        distance = frechet((model_pixels(model, drawn) - centre) @ basis, (real - centre) @ basis)
        found.append((bits(drawn, labels), distance))
        times = (f"{1000 * spent:.2f}", f"{1000 * alone:.1f}")
        table.row(steps or "raster transformer, 49", f"{found[-1][0]:.3f}", f"{distance:.2f}", *times)
    with harness.picture(out / "steps.png", 1, 2, figsize=(8, 3), layout="constrained") as (_, axes):
        for column, label in enumerate(("bits per code under another model", "Frechet distance")):
            axis, values = axes[column], [row[column] for row in found]
            axis.plot(STEPS, values[:-1], "o-", label="any order, several codes a step")
            axis.axhline(values[-1], color="grey", linestyle="--", label="raster, one a step")
            axis.set(xscale="log", xlabel="steps", ylabel=label, xticks=STEPS, xticklabels=STEPS)
            axis.minorticks_off()
        axes[0].axhline(test, color="black", linestyle=":", label="test codes")
        axes[0].legend(fontsize=7)


def model_pixels(model: VQVAE, codes: Tensor) -> Tensor:
    return torch.cat([model.decode(part) for part in codes.split(200)]).flatten(1).double() / 255


def frechet(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of rows "n d"."""
    first, second = torch.cov(a.T), torch.cov(b.T)
    # C_a C_b has the eigenvalues of the symmetric h^T C_b h, where C_a = h h^T.
    values, vectors = torch.linalg.eigh(first)
    half = vectors * values.clamp(min=0).sqrt()
    root = torch.linalg.eigvalsh(half.T @ second @ half).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + first.trace() + second.trace() - 2 * root)
