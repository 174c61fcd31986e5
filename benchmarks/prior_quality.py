"""What each prior makes of the codes of one fixed tokenizer, at equal CPU time: bits per code, pictures, codes a step.

    python benchmarks/prior_quality.py RUN --seconds 900 --out FOLDER      # RUN: a run of train.py with a codebook
    python benchmarks/prior_quality.py RUN --out FOLDER --pictures         # samples, inpainting, quality against steps

Training is interleaved: the priors take turns of 20 CPU seconds in one process on one thread, so that whatever else the
machine does meets all of them alike. Each has its own share of seconds, AdamW, a warm-up of 2 % and a cosine decay over
its CPU time, batches of 64, bfloat16 autocast. Rates are means over the whole test set. A prior with classes pays
ln(number of classes) for the label of each image; uniform, unigram and n-gram know no classes.

Quality against steps: `AnyOrderPrior` draws grids with several codes a step. Two figures for each number of steps: bits
a code that the raster transformer, another model, gives the samples (test codes: its rate), and the Frechet distance of
decoded samples from decoded test codes in the 64 first principal components of the latter.
"""

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import torch
from torch import Tensor
from tqdm import tqdm

from priors import AnyOrderPrior, NGramPrior, PixelCNNPrior, Prior, TransformerPrior, UniformPrior, UnigramPrior
from vqvae import VQVAE, load_images, pictures
from vqvae.data import batches

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TURN = 20.0
BATCH = 64
RATES = {"PixelCNN": 3e-3, "raster transformer": 2e-3, "random-order transformer": 2e-3}
STEPS = (1, 2, 4, 6, 8, 12, 16, 24, 49)
NUM_DRAWN = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--seconds", type=float, default=900.0, help="CPU seconds for each learned prior")
    parser.add_argument("--out", type=Path, default=Path("priors-benchmark"))
    parser.add_argument("--pictures", action="store_true", help="only the pictures, of priors trained before")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    model = VQVAE.from_pretrained(args.run / "codebook").eval()
    codes = saved_codes(args.run, model, args.out / "codes.pt")
    if not args.pictures:
        train_all(model, codes, args.seconds, args.out)
    draw_pictures(model, codes, args.out)


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


def rate(prior: Prior, codes: dict[str, Tensor]) -> float:
    """Bits per code of the test set, the label's share included."""
    labels = codes["test_labels"] if prior.num_classes else None
    nats = []
    with torch.no_grad():
        for part in torch.arange(len(codes["test"])).split(500):
            nats.append(-prior.log_prob(codes["test"][part], None if labels is None else labels[part]))
    label = math.log(prior.num_classes) if prior.num_classes else 0.0
    return (torch.cat(nats).mean().item() + label) / prior.num_places / math.log(2)


def train_all(model: VQVAE, codes: dict[str, Tensor], seconds: float, out: Path) -> None:
    sizes = {"num_codes": model.num_codes, "grid": model.grid}
    uniform, unigram, ngram = UniformPrior(**sizes), UnigramPrior(**sizes), NGramPrior(**sizes)
    begin = time.process_time()
    ngram.fit(codes["train"])
    counting = time.process_time() - begin
    unigram.fit(codes["train"])
    rows = {"uniform": (rate(uniform, codes), 0.0, 0), "unigram": (rate(unigram, codes), 0.0, 0)}
    rows["n-gram (left, up)"] = (rate(ngram, codes), counting, 0)
    torch.manual_seed(0)
    labelled = {**sizes, "num_classes": int(codes["train_labels"].max()) + 1}
    learned: dict[str, Prior] = {
        "PixelCNN": PixelCNNPrior(**labelled),
        "raster transformer": TransformerPrior(**labelled),
        "random-order transformer": AnyOrderPrior(**labelled),
    }
    turns = {name: fitting(prior, codes, RATES[name], seconds) for name, prior in learned.items()}
    steps = dict.fromkeys(learned, 0)
    with tqdm(total=seconds * len(learned), desc="train", unit="s", disable=None) as bar:
        for name in itertools.cycle(list(learned)):
            if not turns:
                break
            if name in turns:
                done = next(turns[name], None)
                if done is None:
                    del turns[name]
                else:
                    steps[name] = done
                    bar.update(TURN)
    for name, prior in learned.items():
        prior.eval().save_pretrained(out / name.replace(" ", "-"))
        rows[name] = (rate(prior, codes), seconds, steps[name])
    best = min(bits for name, (bits, _, _) in rows.items() if "transformer" not in name)
    lines = ["| prior | bits per code | of the best without attention | CPU seconds | steps |", "|---|---|---|---|---|"]
    for name, (bits, spent, num) in rows.items():
        lines.append(f"| {name} | {bits:.3f} | {bits / best:.3f} | {spent:.0f} | {num or ''} |")
    print("\n".join(lines))
    (out / "rates.md").write_text("\n".join(lines) + "\n")


def fitting(prior: Prior, codes: dict[str, Tensor], learning_rate: float, seconds: float) -> Iterator[int]:
    """Train for turns of CPU time; after each turn, how many steps there have been."""
    optimizer = torch.optim.AdamW(
        prior.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    generator = torch.Generator().manual_seed(0)
    spent, steps = 0.0, 0
    prior.train()
    while spent < seconds:
        begin = time.process_time()
        while (now := time.process_time() - begin) < TURN and spent + now < seconds:
            share = (spent + now) / seconds
            for group in optimizer.param_groups:
                warm = min(1.0, share / 0.02 + 1e-3)
                group["lr"] = learning_rate * warm * (0.5 + 0.5 * math.cos(math.pi * share))
            chosen = torch.randint(len(codes["train"]), (BATCH,), generator=generator)
            with torch.autocast("cpu", torch.bfloat16):
                nats = -prior(codes["train"][chosen], codes["train_labels"][chosen]).mean() / prior.num_places
            nats.backward()
            torch.nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
        spent += time.process_time() - begin
        yield steps


def draw_pictures(model: VQVAE, codes: dict[str, Tensor], out: Path) -> None:
    raster = TransformerPrior.from_pretrained(out / "raster-transformer")
    any_order = AnyOrderPrior.from_pretrained(out / "random-order-transformer")
    labels = torch.arange(100) % 10
    for name, prior in (("samples", raster), ("samples-any-order", any_order)):
        drawn = prior.sample(100, labels, temperature=0.95, guidance=1.5, generator=torch.Generator().manual_seed(0))
        pictures.save_grid(out / f"{name}.png", model.decode(drawn), 10)
    inpainting(model, any_order, codes, out / "inpainting.png")
    against_steps(model, any_order, raster, codes, out)


def inpainting(model: VQVAE, prior: AnyOrderPrior, codes: dict[str, Tensor], path: Path) -> None:
    """Rows of a test image: its codes decoded, what is known of it, and five ways to go on."""
    height, width = model.grid
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    masks = [rows >= height // 2, columns >= width // 2, (rows - 3).abs().max((columns - 3).abs()) <= 1, rows < 3]
    known = codes["test"][: 2 * len(masks)]
    tiles = []
    for i, one in enumerate(known):
        mask = masks[i % len(masks)]
        again = one.expand(5, -1, -1)
        drawn = prior.sample(5, known=again, mask=mask, labels=codes["test_labels"][i].expand(5),
                             generator=torch.Generator().manual_seed(i))  # fmt: skip
        whole = model.decode(one[None])
        side = whole.shape[-1] // width
        hidden = mask.repeat_interleave(side, 0).repeat_interleave(side, 1)
        tiles += [whole, whole.masked_fill(hidden, 128), model.decode(drawn)]
    pictures.save_grid(path, torch.cat(tiles), 7)


def against_steps(model: VQVAE, prior: AnyOrderPrior, judge: Prior, codes: dict[str, Tensor], out: Path) -> None:
    labels = torch.arange(NUM_DRAWN) % 10
    real = model_pixels(model, codes["test"][:NUM_DRAWN])
    centre = real.mean(0)
    basis = torch.linalg.svd(real - centre, full_matrices=False).Vh[:64].T
    test = -judge.log_prob(codes["test"][:NUM_DRAWN], codes["test_labels"][:NUM_DRAWN]).mean().item()
    bits = judge.num_places * math.log(2)
    lines = [f"test codes: {test / bits:.3f} bits per code under the raster transformer", ""]
    lines += ["| steps | bits per code | Frechet distance | CPU ms a grid | of one alone |", "|---|---|---|---|---|"]
    found = []
    for steps in (*STEPS, None):
        sampler = judge if steps is None else prior
        begin = time.process_time()
        drawn = sampler.sample(NUM_DRAWN, labels, num_steps=steps, generator=torch.Generator().manual_seed(1))
        spent = (time.process_time() - begin) / NUM_DRAWN * 1e3
        alone = statistics.median(seconds_alone(sampler, steps) for _ in range(5)) * 1e3
        with torch.no_grad():
            nats = -judge.log_prob(drawn, labels).mean().item() / bits
        distance = frechet((model_pixels(model, drawn) - centre) @ basis, (real - centre) @ basis)
        name = "raster transformer, 49" if steps is None else str(steps)
        lines.append(f"| {name} | {nats:.3f} | {distance:.2f} | {spent:.2f} | {alone:.1f} |")
        found.append((steps, nats, distance, spent))
    print("\n".join(lines))
    (out / "steps.md").write_text("\n".join(lines) + "\n")
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for axis, column, label in ((axes[0], 1, "bits per code under another model"), (axes[1], 2, "Frechet distance")):
        axis.plot(STEPS, [row[column] for row in found[:-1]], "o-", label="any order, several codes a step")
        axis.axhline(found[-1][column], color="grey", linestyle="--", label="raster, one a step")
        axis.set(xscale="log", xlabel="steps", ylabel=label, xticks=STEPS, xticklabels=STEPS)
        axis.minorticks_off()
    axes[0].axhline(test / bits, color="black", linestyle=":", label="test codes")
    axes[0].legend(fontsize=7)
    figure.savefig(out / "steps.png", dpi=110)


def seconds_alone(sampler: Prior, steps: int | None) -> float:
    begin = time.process_time()
    sampler.sample(1, torch.tensor([3]), num_steps=steps)
    return time.process_time() - begin


def model_pixels(model: VQVAE, codes: Tensor) -> Tensor:
    return torch.cat([model.decode(part) for part in codes.split(200)]).flatten(1).double() / 255


def frechet(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of rows "n d"."""
    first, second = torch.cov(a.T), torch.cov(b.T)
    root = torch.linalg.eigvals(first @ second).real.clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + first.trace() + second.trace() - 2 * root)


if __name__ == "__main__":
    main()
