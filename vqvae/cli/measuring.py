"""Look at what a run made, from its folder or from its parts: reconstruct, evaluate."""

import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from tqdm import tqdm

import safefolder
from priors import Prior
from vqvae import Autoencoder, pictures
from vqvae.cli.common import Model, at_least_one, check_pair, has_prior, load_prior, load_test_images
from vqvae.codec.model_fingerprint import fingerprint
from vqvae.data import Batch, Images, batches
from vqvae.evaluation import evaluate as evaluate_images
from vqvae.metrics import psnr, ssim
from vqvae.training.prior_kinds import name_of, untrained

BATCH_SIZE = 100


def reconstruct(
    run_or_model: Model,
    data: str | None = None,
    num: int = 32,
    output: Path = Path("reconstructions.png"),
) -> None:
    """Encode and decode images, and write both as pairs of rows.

    The images are above. A run with a prior in its loop encodes through that prior, without labels.

    Example: vqvae reconstruct runs/fashion-mini --data photos --num 16 --output pairs.png

    Args:
        run_or_model: a run's folder, a tokenizer's folder, or a hub id.
        data: images: a folder, a parquet file, or the name of a set; the run's own test images unless given.
        num: how many images.
        output: the PNG file to write.
    """
    at_least_one(num, "--num")
    model = Autoencoder.from_pretrained(run_or_model)
    if num > (most := pictures.most(model.config.image_size) // 2):
        raise ValueError(f"got --num {num:,}, expected at most {most:,}, which is what one picture holds")
    images = torch.cat([batch.images for batch in _first(load_test_images(run_or_model, data, model), num)])[:num]
    encoder = model
    if has_prior(run_or_model):
        known = load_prior(run_or_model, None)
        check_pair(model, known, run_or_model)
        encoder = model.through(known)
    others = torch.cat([model.decode(encoder.encode(part)) for part in images.split(BATCH_SIZE)])
    pictures.save_reconstructions(output, images, others)
    figures = f"PSNR {psnr(images, others).mean().item():.2f} dB"
    if min(images.shape[-2:]) >= 11:
        figures += f", SSIM {ssim(images, others).mean().item():.4f}"
    print(f"{output}: {len(images)} images above their reconstructions, {figures}")


def evaluate(
    run_or_model: Model,
    prior: str | None = None,
    data: str | None = None,
    output: Path | None = None,
) -> None:
    """State the negative ELBO of images, in nats each and bits/dim.

    Example: vqvae evaluate runs/fashion-mini --output elbo.json

    Args:
        run_or_model: a run's folder, or a tokenizer's folder or hub id.
        prior: folder or hub id of a prior; the run's own unless given. Without any, the rate is that of even codes.
        data: images: a folder, a parquet file, or the name of a set; the run's own test images unless given.
        output: a JSON file to write the figures to.
    """
    model = Autoencoder.from_pretrained(run_or_model)
    priors = untrained(model)
    for name in ("unigram", "ngram"):
        if safefolder.folder.has_part(run_or_model, name):
            priors[name] = Prior.from_pretrained(run_or_model, subfolder=name)
            check_pair(model, priors[name], run_or_model)
    if prior is not None or has_prior(run_or_model):
        last = load_prior(run_or_model, prior)
        check_pair(model, last, run_or_model, prior)
        priors.pop(name_of(last), None)  # the last is that of the bound
        priors[name_of(last)] = last
    images = load_test_images(run_or_model, data, model)
    with tqdm(total=len(images), desc="evaluate", unit="img", disable=None) as bar:
        result = evaluate_images(model, priors, _watched(batches(images, BATCH_SIZE), bar))
    if output is not None:
        last = list(priors.values())[-1]
        result.save(
            output, models=fingerprint(model, last).hex(), data=safefolder.cards.public_name(images.name), split="test"
        )
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
