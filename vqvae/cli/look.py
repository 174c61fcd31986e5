"""Look at what a run made, from its folder or from its parts: reconstruct, sample, evaluate."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from priors import ContinuousPrior, NormalPrior, Prior, UniformPrior
from vqvae import GaussianVAE, pictures
from vqvae.cli.common import Model, at_least_one, load_prior, load_test_images, load_tokenizer
from vqvae.data import Batch, Images, batches
from vqvae.elbo import check_fit
from vqvae.evaluation import evaluate as evaluate_images
from vqvae.metrics import psnr, ssim

BATCH_SIZE = 100


def reconstruct(
    run_or_model: Model,
    data: str | None = None,
    num: int = 32,
    output: Path = Path("reconstructions.png"),
) -> None:
    """Encode and decode images, and write both as pairs of rows, images above.

    A run with a prior in its loop encodes through that prior, without labels.

    Example: vqvae reconstruct runs/fashion-mini --data photos --num 16 --output pairs.png

    Args:
        run_or_model: a run's folder, a tokenizer's folder, or a hub id.
        data: images: a folder, a parquet file, or the name of a set; the run's own test images unless given.
        num: how many images.
        output: the PNG file to write.
    """
    at_least_one(num, "--num")
    model = load_tokenizer(run_or_model)
    images = torch.cat([batch.images for batch in _first(load_test_images(run_or_model, data, model), num)])[:num]
    has_prior = (Path(run_or_model) / "prior").is_dir()
    encoder = model.through(load_prior(run_or_model, None)) if has_prior else model
    others = torch.cat([model.decode(encoder.encode(part)) for part in images.split(BATCH_SIZE)])
    pictures.save_reconstructions(output, images, others)
    figures = f"PSNR {psnr(images, others).mean().item():.2f} dB"
    if min(images.shape[-2:]) >= 11:
        figures += f", SSIM {ssim(images, others).mean().item():.4f}"
    print(f"{output}: {len(images)} images above their reconstructions, {figures}")


def sample(
    run_or_model: Model,
    prior: str | None = None,
    num: int = 64,
    label: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float | None = None,
    seed: int = 0,
    pixels: bool = False,
    output: Path = Path("samples.png"),
) -> None:
    """Draw latents from the prior, decode them, and write the images as a grid.

    Example: vqvae sample runs/fashion-mini --label 7 --num 16 --temperature 0.9 --output sneakers.png

    Args:
        run_or_model: a run's folder; or a tokenizer's folder or hub id, together with --prior.
        prior: folder or hub id of the prior; the run's own unless given.
        num: how many images.
        label: class to draw; all classes in turn unless given, for a prior that knows classes.
        temperature: under 1 more typical, over 1 more varied; 0 is the likeliest code each time.
        top_k: draw among the k likeliest codes only.
        top_p: draw among the likeliest codes that hold this share of the probability.
        guidance: strength of the class; 1 is none.
        seed: the same seed gives the same images.
        pixels: draw each pixel from the likelihood too, instead of its mean.
        output: the PNG file to write.
    """
    at_least_one(num, "--num")
    model = load_tokenizer(run_or_model)
    known = load_prior(run_or_model, prior)
    check_fit(model, known, "prior")
    options: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "guidance": guidance}
    if isinstance(known, ContinuousPrior):
        if given := [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]:
            raise ValueError(f"{' and '.join(given)} cannot be had of a prior over real vectors; leave it out")
        options = {}
    generator = torch.Generator().manual_seed(seed)
    labels = _labels(known, num, label)
    images = []
    with tqdm(total=num, desc="sample", unit="img", disable=None) as bar:
        for start in range(0, num, BATCH_SIZE):
            part = slice(start, min(num, start + BATCH_SIZE))
            latents = known.sample(
                part.stop - part.start,
                labels=None if labels is None else labels[part],
                temperature=temperature,
                generator=generator,
                **options,
            )
            images.append(model.decode(latents, sample=pixels, generator=generator))
            bar.update(len(latents))
    columns = 10 if num >= 10 and label is None and labels is not None else 8
    pictures.save_grid(output, torch.cat(images), columns)
    print(f"{output}: {num} images")


def evaluate(
    run_or_model: Model,
    prior: str | None = None,
    data: str | None = None,
    output: Path | None = None,
) -> None:
    """State the negative ELBO of test images, in nats per image and bits/dim.

    Example: vqvae evaluate runs/fashion-mini --output elbo.json

    Args:
        run_or_model: a run's folder, or a tokenizer's folder or hub id.
        prior: folder or hub id of a prior; the run's own unless given. Without any, the rate is that of even codes.
        data: images: a folder, a parquet file, or the name of a set; the run's own test images unless given.
        output: a JSON file to write the figures to.
    """
    model = load_tokenizer(run_or_model)
    folder = Path(run_or_model)
    priors: dict[str, Prior | ContinuousPrior]
    if isinstance(model, GaussianVAE):
        priors = {"normal": NormalPrior(dim=model.dim, grid=model.grid)}
    else:
        priors = {"uniform": UniformPrior(num_codes=model.num_codes, grid=model.grid)}
    if (folder / "unigram").is_dir():
        priors["unigram"] = Prior.from_pretrained(folder / "unigram")
    if prior is not None or (folder / "prior").is_dir():
        last = load_prior(run_or_model, prior)
        priors[type(last).__name__.removesuffix("Prior").removeprefix("Mixture").lower()] = last
    images = load_test_images(run_or_model, data, model)
    bar = tqdm(total=len(images), desc="evaluate", unit="img", disable=None)
    with bar:
        result = evaluate_images(model, priors, _watched(batches(images, BATCH_SIZE), bar))
    if output is not None:
        result.save(output)
    print(result.table())


def _first(images: Images, num: int) -> Iterable[Batch]:
    """Batches with at least the first `num` images that can be read; unreadable ones are named."""
    for batch in batches(images, min(num, BATCH_SIZE)):
        for name, reason in batch.skipped:
            print(f"skipped {name}: {reason}", file=sys.stderr)
        yield batch
        num -= len(batch.images)
        if num <= 0:
            return


def _watched(stream: Iterable[Batch], bar: tqdm) -> Iterable[Batch]:
    for batch in stream:
        for name, reason in batch.skipped:
            bar.write(f"skipped {name}: {reason}", file=sys.stderr)
        yield batch
        bar.update(len(batch.images))


def _labels(prior: Prior | ContinuousPrior, num: int, label: int | None) -> torch.Tensor | None:
    if prior.num_classes is None:
        if label is not None:
            raise ValueError(f"got --label {label}, but this prior knows no classes")
        return None
    if label is None:
        return torch.arange(num) % prior.num_classes
    if not 0 <= label < prior.num_classes:
        raise ValueError(f"--label must lie in [0, {prior.num_classes}), got {label}")
    return torch.full((num,), label)
