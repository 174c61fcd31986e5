"""What training for the eye does to pictures and bits: the likelihood alone, and with terms for the eye beside it.

    apt-get install ukui-wallpapers lomiri-wallpapers-16.04
    python -m benchmarks looks /usr/share/backgrounds --steps 500
    python -m benchmarks looks /usr/share/backgrounds --steps 500 --seeds 5 --only adversarial

The photographs of a folder are cut into patches of 64x64, at several scales, and split by photograph, every fifth for
the test; drawings without texture are left out. Every system has the same network, codes, steps and batches, and is
judged in features of EfficientNet-Lite2, which none was trained with. `decoder` trains the decoder of `likelihood`
again, by all terms, and leaves its codes as they are: its bits are those of the first, and its prior's rate too.
`shuffled` is `likelihood` with a decoder that is not smooth. The lattice is by how much the mean difference of two
neighbours depends on where they stand in the 8x8 pixels of a code: a relative standard deviation, of photographs 0.007.
`fall` is the most that PSNR on the watched test images fell after the discriminator had joined in, in dB, looked at
after every tenth of the steps.
"""

import csv
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from tyro.conf import Positional

from benchmarks import harness
from priors import UniformPrior
from vqvae import VQVAE, pictures
from vqvae.data import batches, load_images
from vqvae.evaluation import evaluate
from vqvae.fingerprint import of_tokenizer
from vqvae.looks import EfficientNetLite, LooksMeter
from vqvae.training.options import LooksConfig

QUICK = "--steps 2 --only likelihood"
SIDE = 64
MODEL = (
    *("--preset", "folder", "--model.image-size", SIDE, "--model.downsampling", 8, "--likelihood", "Normal"),
    *("--model.width", 32, "--model.quantizer.num-codes", 1024, "--stage", "codebook"),
)
PERCEPTUAL = ("--looks.perceptual", 1)
ADVERSARIAL = (*PERCEPTUAL, "--looks.adversarial", 0.1, "--looks.width", 32)
SYSTEMS = {
    "likelihood": (),
    "perceptual": PERCEPTUAL,
    "adversarial": ADVERSARIAL,
    "decoder": ADVERSARIAL,
    "shuffled": ("--model.no-smooth",),
}
TITLES = ("PSNR", "distance", "Fréchet", "kernel", "CPU s", "lattice", "fall")
FIGURES = ("PSNR", "EfficientNet-Lite2 distance", "EfficientNet-Lite2 Frechet", "EfficientNet-Lite2 kernel")


def main(
    photographs: Positional[Path],
    steps: int = 500,
    seeds: int = 1,
    only: tuple[str, ...] = (),
    output: Path = harness.OUT / "looks",
) -> None:
    """Cut, train and judge; what --output holds of it already is taken from there."""
    data = output / "patches"
    if not (data / "done").exists():
        cut(photographs, data)
    kept = harness.Kept(output / "results.json")
    chosen = harness.pick(SYSTEMS, only)
    table = harness.Table("system", "seed", "bits/dim", "usage", *TITLES)
    first: list[float] = []
    for seed in range(seeds):
        for name in chosen:
            run = output / f"{name}-{steps}-{seed}"
            found = kept.fill({f"{name} | {steps} | {seed}": partial(measure, name, data, run, steps, seed)})
            row = found[f"{name} | {steps} | {seed}"]
            first = first or row
            shares = [f"{new / old - 1:+.0%}" for new, old in zip(row[4:6], first[4:6], strict=True)]
            looks = (f"{row[2]:.2f}", f"{row[3]:.4f}", f"{row[4]:.1f} ({shares[0]})", f"{row[5]:.4f} ({shares[1]})")
            more = (f"{row[7]:.3f}", f"{row[8]:.2f}")
            table.row(name, seed, f"{row[0]:.3f}", f"{row[1]:.1%}", *looks, f"{row[6]:.0f}", *more)
    if seeds == 1:
        models = {name: VQVAE.from_pretrained(output / f"{name}-{steps}-0" / "codebook") for name in chosen}
        draw(data, {name: model.reconstruct for name, model in models.items()}, output / "looks.png")


def measure(name: str, data: Path, run: Path, num_steps: int, seed: int) -> list[float]:
    """Bits/dim of pixels, usage, PSNR, perceptual, Fréchet and kernel distance, CPU seconds, lattice, fall."""
    often = max(1, num_steps // 10)
    length = ("--codebook-fit.num-steps", num_steps, "--codebook-fit.validate-every", often, "--seed", seed)
    options = ["--data.source", data.absolute(), *length, *SYSTEMS[name]]
    codes = run.parent / f"likelihood-{num_steps}-{seed}"
    if name == "decoder":
        if not (codes / "codebook").exists():
            raise ValueError(f"{codes} is not trained yet: the system decoder needs likelihood before it")
        options += ["--tokenizer", codes, "--train", "decoder"]
    ran = harness.train(run, *MODEL, *options, threads=None)
    model = VQVAE.from_pretrained(run / "codebook")
    if name == "decoder":
        assert of_tokenizer(model) == of_tokenizer(VQVAE.from_pretrained(codes / "codebook"))
    meter = LooksMeter([EfficientNetLite(size=2)])
    uniform = {"uniform": UniformPrior(num_codes=model.num_codes, grid=model.grid)}
    test = load_images(data, "test", size=SIDE, channels=3)
    result = evaluate(model, uniform, batches(test, 50), observe=meter.add)
    looks = meter.looks().reconstructions
    figures = [looks[figure].value for figure in FIGURES]
    some = torch.cat([model.reconstruct(batch.images) for batch in batches(test, 50)])
    more = (lattice(some, model.factor), fall(run, num_steps) if "--looks.adversarial" in SYSTEMS[name] else 0.0)
    return [result.bits(result.bound.distortion), result.code_usage.usage, *figures, ran.cpu, *more]


def lattice(images: torch.Tensor, period: int) -> float:
    """Relative standard deviation, over the phases of a period, of the mean difference of neighbours."""
    spreads = []
    for axis in (2, 3):
        steps = images.float().diff(dim=axis).abs().movedim(axis, 0).flatten(1).mean(1)
        phases = torch.stack([steps[phase::period].mean() for phase in range(period)])
        spreads.append(phases.std() / phases.mean())
    return torch.stack(spreads).mean().item()


def fall(run: Path, num_steps: int) -> float:
    """The largest fall of PSNR on the watched test images since the discriminator joined in."""
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if (row["split"], row["name"]) == ("test", "psnr")]
    start = LooksConfig().first_step(num_steps)
    figures = [float(row["value"]) for row in rows if int(row["step"]) >= start]
    return max(0.0, *(max(figures[: at + 1]) - figure for at, figure in enumerate(figures)))


def cut(photographs: Path, data: Path) -> None:
    """Patches of the photographs under a folder, as PNGs under train/ and test/."""
    paths = sorted(path for path in photographs.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        raise ValueError(f"there are no JPEGs under {photographs}")
    for at, path in enumerate(tqdm(paths, desc="cut", disable=None, leave=False)):
        folder = data / ("test" if at % 5 == 4 else "train")
        folder.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            picture = image.convert("RGB")
        for short in (192, 384, 768):
            scale = short / min(picture.size)
            size = [round(side * scale) for side in picture.size]
            pixels = np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
            for top in range(0, pixels.shape[0] - SIDE + 1, SIDE):
                for left in range(0, pixels.shape[1] - SIDE + 1, SIDE):
                    patch = pixels[top : top + SIDE, left : left + SIDE]
                    if patch.std(axis=(0, 1)).max() > 12:
                        Image.fromarray(patch).save(folder / f"{path.stem}-{short}-{top}-{left}.png")
    (data / "done").touch()


def draw(data: Path, systems: Mapping[str, Callable[[Tensor], Tensor]], output: Path) -> None:
    """Ten patches, and below them what each system makes of them."""
    test = load_images(data, "test", size=SIDE, channels=3)
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:10].tolist()
    images = torch.cat([test[at : at + 1].images for at in order])
    rows = [images, *(reconstruct(images) for reconstruct in systems.values())]
    pictures.save_grid(output, torch.cat(rows), len(images))
    print(f"{output}: {len(images)} images, and below them {', '.join(systems)}")
