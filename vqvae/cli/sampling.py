"""Images out of a prior: sample, and inpaint."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from priors import ContinuousPrior, Prior
from priors.numerics import Precision
from priors.sampling import guidance_ramp
from vqvae import Autoencoder, pictures
from vqvae.cli.common import Model, Output, at_least_one, has_prior, load_pair, load_prior
from vqvae.cli.inpainting import read_inpainting
from vqvae.data.folder import SUFFIXES
from vqvae.elbo import check_fit

BATCH_SIZE = 100
# Names of files have six digits; and a block of this many grids is more than any machine is faster with.
_MOST_FILES = 1_000_000
_MOST_AT_ONCE = 16_384
_COLUMNS = 8
# With a seed for each image its pixels have numbers of their own: the same ones drew its codes.
_FOR_PIXELS = 0x5BD1E995


def sample(
    run_or_model: Model,
    prior: str | None = None,
    num: int | None = None,
    label: tuple[int, ...] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    guidance: float | None = None,
    guidance_power: float | None = None,
    seed: int | None = None,
    seeds: tuple[int, ...] | None = None,
    num_steps: int | None = None,
    inpaint: Path | None = None,
    mask: Path | None = None,
    keep_pixels: bool = True,
    pixels: bool = False,
    precision: Precision = "auto",
    compiled: bool = False,
    batch_size: int | None = None,
    columns: int | None = None,
    output: Output = Path("samples.png"),
) -> None:
    """Draw images, and write them as a grid or as files in a folder.

    Latents are drawn from the prior, and decoded.

    Example: vqvae sample runs/fashion-mini --label 7 --num 16 --temperature 0.9 --output sneakers.png

    With --inpaint and --mask a part of an image is drawn anew: whatever is white in the mask. White borders continue
    the image outwards (outpainting). A prior in raster order can only draw what comes after all that is kept; one that
    was trained with `train.py --stage prior --prior-kind AnyOrder` draws anywhere. The grid then starts with the image,
    grey where it is masked.

    Example: vqvae sample runs/any-order --inpaint shirt.png --mask sleeve.png --num 7 --output sleeves.png

    Args:
        run_or_model: a run's folder; or a tokenizer's folder or hub id, together with --prior.
        prior: folder or hub id of the prior; the run's own unless given.
        num: how many images; 64 unless given, or one for each of --seeds.
        label: class to draw, or several in turn. Unless given, a prior that knows classes draws all in turn, and
            with --inpaint none.
        temperature: under 1 more typical, over 1 more varied; 0 is the likeliest code each time.
        top_k: draw among the k likeliest codes only.
        top_p: draw among the likeliest codes that hold this share of the probability.
        min_p: draw among the codes at least this share as likely as the likeliest.
        guidance: strength of the class; 1 is none.
        guidance_power: let guidance rise from 1 at the first place to its strength at the last, by this power of the
            way; 1 is a straight line.
        seed: the same seed gives the same images; 0 unless given.
        seeds: a seed for each image, which is then the same whatever others are drawn with it. Where classes are drawn
            in turn, seed s has the turn of the image number s, counted from 0.
        num_steps: draw several codes at once, in so many steps, with a prior that can: faster, a little worse.
        inpaint: an image file, a part of which to draw anew. It is scaled and cropped to the model's size.
        mask: an image file of that part: white where to draw, black where to keep. It is scaled and cropped as the
            image is; where a code's place has any white, the code is drawn anew.
        keep_pixels: with --inpaint, put the pixels outside the mask back from the image, with a hard edge. Otherwise
            they are decoded too, as all of the picture is.
        pixels: draw each pixel from the likelihood too, instead of its mean.
        precision: arithmetic of the draws; auto takes what is fastest here.
        compiled: use torch.compile, which pays for many images.
        batch_size: how many images are drawn at once; other sizes give other images.
        columns: images in a row of the grid; 8 unless given, or a multiple of the classes, which then are the columns.
        output: a .png file to write a grid to; or a folder, for a PNG of each image, written as soon as it is drawn:
            000000.png, 000001.png, ... or, with --seeds, seed-3.png, ...
    """
    num = _check_num(num, seed, seeds, batch_size)
    if (inpaint is None) != (mask is None):
        raise ValueError("--inpaint names an image and --mask what to draw anew in it; give both or neither")
    if inpaint is None and not keep_pixels:
        raise ValueError("--no-keep-pixels belongs to --inpaint; leave it out, or name an image with --inpaint")
    if guidance_power is not None and guidance is None:
        raise ValueError("--guidance-power is how --guidance rises; give its strength with --guidance")
    names = None if output.suffix.lower() == ".png" and not output.is_dir() else _names(num, seeds)
    if names is not None:
        _check_folder(output, names, columns)

    model, known = load_pair(run_or_model, prior)
    check_fit(model, known, "prior")
    if names is None:
        _check_grid(num + (inpaint is not None), model.config.image_size, columns)
    choices = _classes(known, label, everything=inpaint is None)
    if guidance is not None and known.num_classes is not None and not choices:
        raise ValueError("--guidance leads to a class, and with --inpaint none is drawn unless named; add --label")
    turns = torch.tensor(seeds or range(num))
    labels = torch.tensor(choices)[turns % len(choices)] if choices else None
    generator = None if seeds else torch.Generator().manual_seed(seed or 0)

    filters: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "num_steps": num_steps}
    filters["guidance"] = guidance
    hole = None
    if isinstance(known, ContinuousPrior):
        others = {"seeds": seeds, "inpaint": inpaint, "precision": precision != "auto" or None}
        _refuse({**filters, **others, "compiled": compiled or None})
        latents = _vectors(known, num, labels, temperature, generator, batch_size or BATCH_SIZE)
    else:
        if inpaint is not None and mask is not None:
            hole = read_inpainting(inpaint, mask, model, _encoder(run_or_model, model, known).encode)
        if guidance is not None and guidance_power is not None:
            filters["guidance"] = guidance_ramp(guidance, known.num_places, guidance_power)
        options = {
            **filters,
            "temperature": temperature,
            "generator": generator,
            "seeds": seeds,
            "precision": precision,
            "compiled": compiled,
            "batch_size": batch_size,
            **({} if hole is None else hole.known(num)),
        }
        latents = _codes(known, num, labels, options)
    images = _decoded(model, latents, generator, seeds, pixels)
    if hole is not None and keep_pixels:
        images = map(hole.put_back, images)
    if names is None:
        width = columns or _columns(1 if hole is not None or seeds else len(choices))
        pictures.save_grid(output, torch.cat([*([] if hole is None else [hole.shown()]), *images]), width)
    else:
        for name, image in zip(names, (image for block in images for image in block), strict=True):
            pictures.save_image(output / name, image)
    print(f"{output}: {num} images")


def _check_num(num: int | None, seed: int | None, seeds: Sequence[int] | None, batch_size: int | None) -> int:
    """How many images."""
    if num is not None:
        at_least_one(num, "--num")
        if num > _MOST_FILES:
            raise ValueError(f"got --num {num:,}, expected at most {_MOST_FILES:,}; draw more with other seeds")
    if batch_size is not None:
        at_least_one(batch_size, "--batch-size")
        if batch_size > _MOST_AT_ONCE:
            raise ValueError(f"got --batch-size {batch_size:,}, expected at most {_MOST_AT_ONCE:,}")
    if seed is not None and not 0 <= seed < 2**32:
        raise ValueError(f"--seed must lie in [0, 2^32), got {seed}")
    if seeds is None:
        return 64 if num is None else num
    if seed is not None or batch_size is not None:
        option = "--seed" if seed is not None else "--batch-size"
        raise ValueError(f"--seeds draws each image by itself, so {option} has no say; give one of them")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError("--seeds takes one or more numbers, each once, as the same seed gives the same image")
    if min(seeds) < 0 or max(seeds) >= 2**32:
        raise ValueError(f"--seeds must lie in [0, 2^32), got {min(seeds) if min(seeds) < 0 else max(seeds)}")
    if num is not None and num != len(seeds):
        raise ValueError(f"got {len(seeds)} --seeds for --num {num}, expected one for each image; leave --num out")
    return len(seeds)


def _names(num: int, seeds: Sequence[int] | None) -> list[str]:
    return [f"{i:06}.png" for i in range(num)] if seeds is None else [f"seed-{seed}.png" for seed in seeds]


def _check_folder(folder: Path, names: Sequence[str], columns: int | None) -> None:
    if folder.suffix.lower() in SUFFIXES and not folder.is_dir():
        raise ValueError(f"{folder} would be no PNG, which pictures are written as; name a .png file or a folder")
    if columns is not None:
        raise ValueError("--columns is for a grid; leave it out, or name a .png file with --output")
    if folder.is_dir():
        there = set(os.listdir(folder))
        if taken := [name for name in names if name in there]:
            raise ValueError(f"{folder / taken[0]} is there already; remove it, or take another --output")
    elif os.path.lexists(folder):
        raise ValueError(f"{folder} is no folder; name a .png file or a folder")


def _check_grid(num: int, size: int, columns: int | None) -> None:
    """ValueError for a picture so large that readers would refuse it."""
    if columns is not None:
        at_least_one(columns, "--columns")
    if num > (most := pictures.most(size)):
        raise ValueError(f"{num:,} images are too many for one picture, which holds {most:,}; name a folder")


def _classes(prior: Prior | ContinuousPrior, label: Sequence[int] | None, *, everything: bool) -> Sequence[int]:
    """The classes to draw in turn; none where no label is to be given."""
    if label is None:
        return range(prior.num_classes or 0) if everything else ()
    if prior.num_classes is None:
        raise ValueError(f"got --label {' '.join(map(str, label))}, but this prior knows no classes")
    if not label:
        raise ValueError("--label takes one or more classes, got none")
    for each in label:
        if not 0 <= each < prior.num_classes:
            raise ValueError(f"--label must lie in [0, {prior.num_classes}), got {each}")
    return label


def _columns(num_classes: int) -> int:
    """Columns of a grid in which each holds one class, where there are not too many of them."""
    return max(1, 10 // num_classes) * num_classes if 1 < num_classes <= 16 else _COLUMNS


def _refuse(options: dict[str, Any]) -> None:
    if given := [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]:
        raise ValueError(f"{' and '.join(given)} cannot be had of a prior over real vectors; leave it out")


def _encoder(source: str, model: Any, prior: Prior) -> Any:
    """The model, through the prior that its codes were trained with where there is one."""
    if model.config.beta is None:
        return model
    return model.through(load_prior(source, None) if has_prior(source) else prior)


def _codes(prior: Prior, num: int, labels: Tensor | None, options: dict[str, Any]) -> Iterator[Tensor]:
    """What is wrong with the options is said before the first block."""
    try:
        blocks = prior.samples(num, labels, **options, progress=True)
    except ValueError as error:
        if "AnyOrderPrior" not in str(error):
            raise
        raise ValueError(f"{error}, which `train.py --stage prior --prior-kind AnyOrder` trains") from error
    return _compiled(blocks) if options["compiled"] else blocks


def _compiled(blocks: Iterator[Tensor]) -> Iterator[Tensor]:
    try:
        yield from blocks
    except RuntimeError as error:  # no C++ compiler, for one
        raise ValueError(f"--compiled does not work here, leave it out: {str(error).splitlines()[0]}") from error


def _vectors(
    prior: ContinuousPrior,
    num: int,
    labels: Tensor | None,
    temperature: float,
    generator: torch.Generator | None,
    batch_size: int,
) -> Iterator[Tensor]:
    with tqdm(total=num, desc="sample", unit="img", disable=None) as bar:
        for start in range(0, num, batch_size):
            part = slice(start, min(num, start + batch_size))
            chosen = None if labels is None else labels[part]
            yield prior.sample(part.stop - start, labels=chosen, temperature=temperature, generator=generator)
            bar.update(part.stop - start)


def _decoded(
    model: Autoencoder,
    latents: Iterator[Tensor],
    generator: torch.Generator | None,
    seeds: Sequence[int] | None,
    pixels: bool,
) -> Iterator[Tensor]:
    """Images, block by block; each by itself where it has a seed, since other batches are rounded otherwise."""
    parts = (part for block in latents for part in block.split(1 if seeds else BATCH_SIZE))
    for i, part in enumerate(parts):
        own = torch.Generator().manual_seed(seeds[i] ^ _FOR_PIXELS) if seeds else generator
        yield model.decode(part, sample=pixels, generator=own)
