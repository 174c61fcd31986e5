"""Images out of a prior: sample, and inpaint."""

import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from priors import ContinuousPrior, Prior, Sampling
from priors.sampling import guidance_ramp
from safefolder import Options
from vqvae import Autoencoder, pictures
from vqvae.bound import check_fit
from vqvae.cli.common import Model, Output, at_least_one, load_decoder
from vqvae.cli.inpainting import Inpainting, read_inpainting
from vqvae.cli.opening import Opened
from vqvae.data.folder import SUFFIXES
from vqvae.evaluation import images_at_once

# Grids of vectors that are sampled together.
_VECTORS_AT_ONCE = 100
# Names of files have six digits; and a block of this many grids is more than any machine is faster with.
_MOST_FILES = 1_000_000
_MOST_AT_ONCE = 16_384
_COLUMNS = 8
# With a seed for each image its pixels have numbers of their own: the same ones sampled its codes.
_FOR_PIXELS = 0x5BD1E995


@dataclass(frozen=True, kw_only=True)
class Draws(Options):
    """What is sampled."""

    num: int | None = None
    """how many images; 64 unless given, or one for each of --seeds"""
    label: tuple[int, ...] | None = None
    """class to sample, or several in turn. Unless given, a prior that knows classes samples all in turn, and with
    --inpaint none"""
    seed: int | None = None
    """the same seed gives the same images; 0 unless given"""
    seeds: tuple[int, ...] | None = None
    """a seed for each image, which is then the same whatever others are sampled with it. Where classes take
    turns, seed s has the turn of the image number s, counted from 0"""
    pixels: bool = False
    """sample each pixel from the likelihood too, instead of its mean"""
    verbose: bool = False
    """say in which arithmetic, and by how many proposals, the codes are sampled, and what else was measured"""
    columns: int | None = None
    """images in a row of the grid; 8 unless given, or a multiple of the classes, which then are the columns"""


@dataclass(frozen=True, kw_only=True)
class InpaintingFiles(Options):
    """An image of which a part is sampled anew."""

    inpaint: Path | None = None
    """an image file, a part of which to sample anew. It is scaled and cropped to the model's size"""
    mask: Path | None = None
    """an image file of that part: white where to sample, black where to keep. It is scaled and cropped as the image is;
    where a code's position has any white, the code is sampled anew"""
    keep_pixels: bool = True
    """with --inpaint, put the pixels outside the mask back from the image, with a hard edge. Otherwise they are decoded
    too, as all of the picture is"""


@dataclass(frozen=True, kw_only=True)
class SamplingFlags(Sampling):
    """How it is sampled, by a prior of codes; one of vectors has the temperature alone."""

    guidance: float | None = None
    draft: str | None = None  # pyrefly: ignore[bad-override]
    """folder or hub id of a cheap prior, or of a draft head, that proposes codes, so that sampling takes fewer passes;
    the run's own head unless given, where it has one and it pays; none for a code at a time"""
    guidance_power: float | None = None
    """let guidance rise from 1 at the first position to its strength at the last, by this power of the way; 1 is a
    straight line"""

    def for_positions(self, num_positions: int, draft: Any = None) -> Sampling:
        """The options of the prior, of a grid of so many positions, with the model of its draft."""
        options = {**dataclasses.asdict(self), "draft": draft}
        power = options.pop("guidance_power")
        if self.guidance is not None and power is not None:
            options["guidance"] = guidance_ramp(self.guidance, num_positions, power)
        return Sampling(**options)


def sample(
    run_or_model: Model,
    *,
    prior: str | None = None,
    decoder: str | None = None,
    output: Output = Path("samples.png"),
    draws: Annotated[Draws, tyro.conf.OmitArgPrefixes] = Draws(),
    inpainting: Annotated[InpaintingFiles, tyro.conf.OmitArgPrefixes] = InpaintingFiles(),
    sampling: Annotated[SamplingFlags, tyro.conf.OmitArgPrefixes] = SamplingFlags(),
) -> None:
    """Draw images, and write them as a grid or as files in a folder.

    Latents are sampled from the prior, and decoded.

    Example: vqvae sample runs/fashion-mini --label 7 --num 16 --temperature 0.9 --output sneakers.png

    With --inpaint and --mask a part of an image is sampled anew: whatever is white in the mask. White borders continue
    the image outwards (outpainting). A prior in raster order can only sample what comes after all that is kept; one
    that was trained with `vqvae train --stage prior --prior-kind AnyOrder` samples anywhere. The grid then starts with
    the image, grey where it is masked. Of a run that is still training, or was stopped, the prior is that of the last
    checkpoint.

    Example: vqvae sample runs/any-order --inpaint shirt.png --mask sleeve.png --num 7 --output sleeves.png

    Args:
        run_or_model: a run's folder; or a tokenizer's folder or hub id, together with --prior.
        prior: folder or hub id of the prior; the run's own unless given.
        decoder: a model of the same codes whose decoder is to make the images (`vqvae train --train decoder`); the
            run's own unless given.
        output: a .png file to write a grid to; or a folder, for a PNG of each image, written as soon as it is sampled:
            000000.png, 000001.png, ... or, with --seeds, seed-3.png, ...
    """
    num = _check_num(draws, sampling.batch_size)
    if (inpainting.inpaint is None) != (inpainting.mask is None):
        raise ValueError("--inpaint names an image and --mask what to sample anew in it; give both or neither")
    if inpainting.inpaint is None and not inpainting.keep_pixels:
        raise ValueError("--no-keep-pixels belongs to --inpaint; leave it out, or name an image with --inpaint")
    if sampling.guidance_power is not None and sampling.guidance is None:
        raise ValueError("--guidance-power is how --guidance rises; give its strength with --guidance")
    names = None if output.suffix.lower() == ".png" and not output.is_dir() else _names(num, draws.seeds)
    if names is not None:
        _check_folder(output, names, draws.columns)

    opened = Opened(run_or_model)
    model, known = opened.model, opened.prior(prior)
    check_fit(model, known, "prior")
    shown = load_decoder(model, decoder)
    if names is None:
        _check_grid(num + (inpainting.inpaint is not None), model.size, draws.columns)
    choices = _classes(known, draws.label, everything=inpainting.inpaint is None)
    if sampling.guidance is not None and known.num_classes is not None and not choices:
        raise ValueError("--guidance leads to a class, and with --inpaint none is sampled unless named; add --label")
    turns = torch.tensor(draws.seeds or range(num))
    labels = torch.tensor(choices)[turns % len(choices)] if choices else None
    generator = None if draws.seeds else torch.Generator().manual_seed(draws.seed or 0)

    hole = None
    if isinstance(known, ContinuousPrior):
        _refuse(sampling, seeds=draws.seeds, inpaint=inpainting.inpaint)
        latents = _vectors(known, num, labels, sampling, generator)
    else:
        if inpainting.inpaint is not None and inpainting.mask is not None:
            hole = read_inpainting(inpainting.inpaint, inpainting.mask, model, _encoder(opened, known).encode)
        draft = _draft(opened, known, sampling, draws.seeds)
        if draws.verbose:
            logging.getLogger("priors").setLevel(logging.INFO)
            logging.basicConfig(format="%(message)s")
        options = sampling.for_positions(known.num_positions, draft)
        latents = _codes(known, num, labels, options, generator, draws.seeds, hole)
    images = _decoded(shown, latents, generator, draws.seeds, draws.pixels)
    if hole is not None and inpainting.keep_pixels:
        images = map(hole.put_back, images)
    if names is None:
        width = draws.columns or _columns(1 if hole is not None or draws.seeds else len(choices))
        grid = torch.cat([*([] if hole is None else [hole.shown()]), *images])
        width = min(width, len(grid))
        heads = _heads(known, choices, width) if hole is None and not draws.seeds else ()
        pictures.save_grid(output, grid, width, heads=heads)
    else:
        for name, image in zip(names, (image for block in images for image in block), strict=True):
            pictures.save_image(output / name, image)
    print(f"{output}: {num} images")


def _check_num(draws: Draws, batch_size: int | None) -> int:
    """How many images."""
    num, seed, seeds = draws.num, draws.seed, draws.seeds
    if num is not None:
        at_least_one(num, "--num")
        if num > _MOST_FILES:
            raise ValueError(f"got --num {num:,}, expected at most {_MOST_FILES:,}; draw more with other seeds")
    if batch_size is not None and batch_size > _MOST_AT_ONCE:
        raise ValueError(f"got --batch-size {batch_size:,}, expected at most {_MOST_AT_ONCE:,}")
    if seed is not None and not 0 <= seed < 2**32:
        raise ValueError(f"--seed must lie in [0, 2^32), got {seed}")
    if seeds is None:
        return 64 if num is None else num
    if seed is not None or batch_size is not None:
        option = "--seed" if seed is not None else "--batch-size"
        raise ValueError(f"--seeds samples each image by itself, so {option} has no say; give one of them")
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


def _check_grid(num: int, size: tuple[int, int], columns: int | None) -> None:
    """ValueError for a picture so large that readers would refuse it."""
    if columns is not None:
        at_least_one(columns, "--columns")
    if num > (most := pictures.most(*size)):
        raise ValueError(f"{num:,} images are too many for one picture, which holds {most:,}; name a folder")


def _classes(prior: Prior | ContinuousPrior, label: Sequence[int] | None, *, everything: bool) -> Sequence[int]:
    """The classes to sample in turn; none where no label is to be given."""
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


def _heads(prior: Prior | ContinuousPrior, choices: Sequence[int], columns: int) -> Sequence[str]:
    """The names of the classes, where they have some and each column is of one."""
    if prior.class_names is None or not choices or columns % len(choices):
        return ()
    return [prior.class_names[choices[column % len(choices)]] for column in range(columns)]


def _refuse(flags: SamplingFlags, **others: Any) -> None:
    """ValueError for options that a prior over real vectors has not."""
    names = [name for name in flags.changed() if name not in ("temperature", "batch_size", "guidance_power")]
    names += [name for name, value in others.items() if value is not None]
    if given := [f"--{name.replace('_', '-')}" for name in names]:
        raise ValueError(f"{' and '.join(given)} cannot be had of a prior over real vectors; leave it out")


def _draft(opened: Opened, prior: Prior, flags: SamplingFlags, seeds: Sequence[int] | None) -> Any:
    """What proposes codes. Where each image has a seed, or steps are compiled, the run's own head does not."""
    if flags.draft is None and (seeds or flags.compiled or flags.num_steps is not None):
        return None
    return opened.draft(flags.draft, prior)


def _encoder(opened: Opened, prior: Prior) -> Any:
    """The model, through the prior that its codes were trained with where there is one."""
    if not opened.has_loop:
        return opened.model
    return opened.model.through(opened.own_prior or prior)


def _codes(
    prior: Prior,
    num: int,
    labels: Tensor | None,
    sampling: Sampling,
    generator: torch.Generator | None,
    seeds: Sequence[int] | None,
    hole: Inpainting | None,
) -> Iterator[Tensor]:
    """What is wrong with the options is said before the first block."""
    around = {} if hole is None else hole.given(num)
    try:
        blocks = prior.samples(num, labels, sampling, generator, **around, seeds=seeds, progress=True)
    except ValueError as error:
        if "AnyOrderPrior" not in str(error):
            raise
        raise ValueError(f"{error}, which `vqvae train --stage prior --prior-kind AnyOrder` trains") from error
    return _compiled(blocks) if sampling.compiled else blocks


def _compiled(blocks: Iterator[Tensor]) -> Iterator[Tensor]:
    try:
        yield from blocks
    except RuntimeError as error:  # no C++ compiler, for one
        raise ValueError(f"--compiled does not work here, leave it out: {str(error).splitlines()[0]}") from error


def _vectors(
    prior: ContinuousPrior, num: int, labels: Tensor | None, flags: SamplingFlags, generator: torch.Generator | None
) -> Iterator[Tensor]:
    size, sampling = flags.batch_size or _VECTORS_AT_ONCE, Sampling(temperature=flags.temperature)
    with tqdm(total=num, desc="sample", unit="img", disable=None) as bar:
        for start in range(0, num, size):
            part = slice(start, min(num, start + size))
            chosen = None if labels is None else labels[part]
            yield prior.sample(part.stop - start, chosen, sampling, generator)
            bar.update(part.stop - start)


def _decoded(
    model: Autoencoder,
    latents: Iterator[Tensor],
    generator: torch.Generator | None,
    seeds: Sequence[int] | None,
    pixels: bool,
) -> Iterator[Tensor]:
    """Images, block by block; each by itself where it has a seed, since other batches are rounded otherwise."""
    parts = (part for block in latents for part in block.split(1 if seeds else images_at_once(*model.size)))
    for i, part in enumerate(parts):
        own = torch.Generator().manual_seed(seeds[i] ^ _FOR_PIXELS) if seeds else generator
        yield model.decode(part, sample=pixels, generator=own)
