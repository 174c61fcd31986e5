"""Rate, distortion and perception: our lossy files beside JPEG, WebP and JPEG-XL, in bytes that were really written.

    python -m benchmarks perception /usr/share/backgrounds --steps 500 --prior-steps 500
    python -m benchmarks perception /usr/share/backgrounds --recipe likelihood --num-codes 64 1024

Patches, network and recipes are those of `looks`. For each size of the codebook a model is trained, then a prior; the
codec's lossy form (`vqvae compress --mode lossy`) writes the codes of --num test patches under the prior, all in one
file and each in one of its own, and what is decoded from the file is judged: PSNR, distance and kernel distance in
features of EfficientNet-Lite2, which nothing was trained with. Weights are not in the bytes, as tables of other formats
are not. The others write the same patches at several qualities, each its own file, of which headers take most, and all
as one mosaic. JPEG has optimised tables and is progressive where that is smaller; efforts of the others are the most.
At 64x64 their files do not go down to our bytes, and mosaics hardly.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tyro.conf import Positional

from benchmarks import harness, looks
from benchmarks import other_codecs as others
from benchmarks.codec import codec_of
from vqvae.codec import Compression, Mode
from vqvae.looks import EfficientNetLite, LooksMeter

QUICK = "--num-codes 16 --formats JPEG --steps 2 --prior-steps 2 --batch 4 --num 8"
# How a format writes and reads a picture, and its settings here, from few bytes to many.
FORMATS: dict[str, tuple[Callable[..., bytes], Callable[..., others.Picture], tuple[float, ...]]] = {
    "JPEG": (others.jpeg, others.from_pillow, (1, 3, 5, 10, 20)),
    "WebP": (others.LOSSY["WebP"][0], others.LOSSY["WebP"][2], (0, 1, 5, 10, 20)),
    "JPEG-XL": (others.LOSSY["JPEG-XL"][0], others.LOSSY["JPEG-XL"][2], (25, 20, 15, 10, 7)),
}
COLOURS = {"ours": "#cc6677", "JPEG": "#ddaa33", "WebP": "#4477aa", "JPEG-XL": "#117733"}
ONE, OWN = "one file", "files of their own"
LOSSY = Compression(mode=Mode.LOSSY)
# PSNR, distance and kernel distance.
FIGURES = (looks.FIGURES[0], looks.FIGURES[1], looks.FIGURES[3])


def train(run: Path, data: Path, recipe: str, downsampling: int, fit: dict[str, int]) -> None:
    """A codebook and a prior, as far as the run does not have them."""
    if not (run / "codebook").exists():
        sizes = ("--model.downsampling", downsampling, "--model.quantizer.num-codes", fit["num_codes"])
        length = ("--codebook-fit.num-steps", fit["steps"], "--codebook-fit.validate-every", fit["steps"])
        more = ("--codebook-fit.batch-size", fit["batch"], "--prior-fit.num-steps", fit["prior_steps"])
        options = [*looks.MODEL, *sizes, *looks.SYSTEMS[recipe], "--data.source", data.absolute(), *length, *more]
        began = (run / "state" / "run.json").exists()
        again = ("--resume", "--stage", "codebook") if began else (*options, "--seed", fit["seed"])
        harness.train(run, *again)
    if not (run / "prior").exists():
        harness.train(run, "--resume", "--stage", "prior")


def judged(images: Tensor, back: Tensor) -> list[float]:
    meter = LooksMeter([EfficientNetLite(size=2)])
    for pair in zip(images.split(50), back.split(50), strict=True):
        meter.add(*pair)
    found = meter.looks().reconstructions
    return [found[figure].value for figure in FIGURES]


def ours(training: Callable[[Path], None], run: Path, images: Tensor) -> dict[str, list[float]]:
    """Bytes an image and figures, of one file and of files of their own."""
    training(run)
    codec = codec_of(run)
    data = codec.compress(images, options=LOSSY)
    (run / "lossy.vq").write_bytes(data)
    back = torch.stack(list(codec.decompress(data)))
    figures = judged(images, back)
    # The codes are the same, and `compress` looks whether they come back.
    own = [len(codec.compress(image, options=LOSSY)) for image in images.split(1)]
    return {ONE: [len(data) / len(images), *figures], OWN: [sum(own) / len(images), *figures]}


def theirs(name: str, setting: float, images: Tensor) -> dict[str, list[float]]:
    """The same, of another format with a setting."""
    encode, decode, _ = FORMATS[name]
    pictures = others.pictures_of(images)
    found: dict[str, list[float]] = {}
    for how, parts in ((ONE, others.mosaic(pictures)[None]), (OWN, pictures)):
        files = [encode(part, setting) for part in parts]
        back = np.stack([decode(file, parts.shape[1:]) for file in files])
        back = others.cut(back[0], len(pictures), pictures.shape[1:]) if how == ONE else back
        levels = rearrange(torch.from_numpy(np.ascontiguousarray(back)), "b h w c -> b c h w")
        found[how] = [sum(map(len, files)) / len(images), *judged(images, levels)]
    return found


def draw(found: dict[str, dict[str, dict[str, list[float]]]], path: Path) -> None:
    """PSNR and perceptual distance over bytes an image; of each format a line for each kind of file."""
    with harness.picture(path, 1, 2, figsize=(11, 4.5), layout="constrained") as (_, panels):
        for at, (axes, title) in enumerate(zip(panels, ("PSNR (dB)", "distance in Lite2 features"), strict=True), 1):
            for name, results in found.items():
                for how, line in ((ONE, "o-"), (OWN, "o:")):
                    points = sorted((row[how][0], row[how][at]) for row in results.values())
                    label, colour = f"{name}, {how}", COLOURS[name]
                    axes.plot(*zip(*points, strict=True), line, color=colour, label=label, markersize=4)
            axes.set(xscale="log", xlabel="bytes an image", ylabel=title)
            axes.minorticks_off()
            axes.set_xticks((50, 100, 200, 400), ("50", "100", "200", "400"))
        panels[0].legend(frameon=False, fontsize=8)


def main(
    photographs: Positional[Path],
    num_codes: tuple[int, ...] = (64, 512, 4096),
    steps: int = 500,
    prior_steps: int = 500,
    recipe: str = "adversarial",
    downsampling: int = 8,
    batch: int = 32,
    seed: int = 0,
    num: int = 200,
    formats: tuple[str, ...] = (),
    output: Path = harness.OUT / "perception",
) -> None:
    """Train what is not there, write and judge files; what is kept is not done again.

    Args:
        recipe: a system of `looks`: likelihood, perceptual or adversarial
        num: test patches, spread evenly over all
        batch: of the codebook's training
        formats: of the others; all unless given
    """
    harness.pick({name: () for name in looks.SYSTEMS if name != "decoder"}, (recipe,))
    data = output / "patches"
    if not (data / "done").exists():
        looks.cut(photographs, data)
    test = harness.images(str(data), "test", None, size=looks.SIDE, channels=3)
    images = test[torch.linspace(0, len(test) - 1, num).round().long()]
    jobs: dict[str, dict[str, Callable[[], Any]]] = {"ours": {}}
    for number in num_codes:
        fit = {"num_codes": number, "steps": steps, "prior_steps": prior_steps, "batch": batch, "seed": seed}
        run = output / f"{recipe}-f{downsampling}-{'-'.join(map(str, fit.values()))}"
        training = partial(train, data=data, recipe=recipe, downsampling=downsampling, fit=fit)
        jobs["ours"][f"{number} codes"] = partial(ours, training, run, images)
    for name, (_, _, settings) in harness.pick(FORMATS, formats).items():
        jobs[name] = {f"{setting:g}": partial(theirs, name, setting, images) for setting in settings}
    kept = harness.Kept(output / "results.json")
    of_ours = f"{recipe} | f{downsampling} | {steps} | {prior_steps} | {batch} | {seed} | "
    table = harness.Table("format", "setting", "files", "bytes an image", "PSNR", "Lite2 distance", "kernel")
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name, each in jobs.items():
        prefix = f"{name} | {of_ours if name == 'ours' else ''}{num} | "
        results = kept.fill({prefix + setting: job for setting, job in each.items()})
        found[name] = {key.removeprefix(prefix): result for key, result in results.items()}
        for setting, result in found[name].items():
            for how, (size, decibels, distance, kernel) in result.items():
                table.row(name, setting, how, f"{size:.1f}", f"{decibels:.2f}", f"{distance:.4f}", f"{kernel:.4f}")
    draw(found, output / "perception.png")
