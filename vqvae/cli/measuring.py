"""Look at what a run made, from its folder or from its parts: reconstruct, evaluate."""

from pathlib import Path

from vqvae import Autoencoder, pictures
from vqvae.cli.common import (
    Model,
    at_least_one,
    first_images,
    load_decoder,
    load_test_images,
)
from vqvae.cli.evaluating import NOT_ASKED, Network, measure, named, reconstructions
from vqvae.metrics import psnr, ssim


def reconstruct(
    run_or_model: Model,
    data: str | None = None,
    decoder: str | None = None,
    num: int = 32,
    output: Path = Path("reconstructions.png"),
) -> None:
    """Encode and decode images, and write both as pairs of rows.

    The images are above. A run with a prior in its loop encodes through that prior, without labels.

    Example: vqvae reconstruct runs/fashion-mini --data photos --num 16 --output pairs.png

    Args:
        run_or_model: a run's folder, a tokenizer's folder, or a hub id.
        data: images: a folder, a parquet file, or the name of a set; the run's own test images unless given.
        decoder: a model of the same codes whose decoder is to make the images (`vqvae train --train decoder`); the
            run's own unless given.
        num: how many images.
        output: the PNG file to write.
    """
    at_least_one(num, "--num")
    model = Autoencoder.from_pretrained(run_or_model)
    shown = load_decoder(model, decoder)
    if num > (most := pictures.most(*model.size) // 2):
        raise ValueError(f"got --num {num:,}, expected at most {most:,}, which is what one picture holds")
    images = first_images(load_test_images(run_or_model, data, model), num)
    others = reconstructions(run_or_model, model, images, shown)
    pictures.save_reconstructions(output, images, others)
    figures = f"PSNR {psnr(images, others).mean().item():.2f} dB"
    if min(images.shape[-2:]) >= 11:
        figures += f", SSIM {ssim(images, others).mean().item():.4f}"
    print(f"{output}: {len(images)} images above their reconstructions, {figures}")


def evaluate(
    run_or_model: Model,
    prior: str | None = None,
    data: str | None = None,
    looks: tuple[Network, ...] = NOT_ASKED,
    num_samples: int | None = None,
    output: Path | None = None,
) -> None:
    """State the negative ELBO of images, and how they look.

    With --looks come PSNR, SSIM, MS-SSIM (of images of 176 pixels and more), the perceptual distance, and the Fréchet
    and kernel distance of reconstructions and of as many samples of the prior, with 95 % intervals and with what they
    were measured with. Networks: lite2 (for figures of what was trained with lite0), lite0, vgg16 (whose perceptual
    distance is LPIPS), inception (whose distances are FID and KID). The first two need the extra `looks` and no
    download.

    Example: vqvae evaluate runs/fashion-mini --looks lite2 --output figures.json

    Args:
        run_or_model: a run's folder, or a tokenizer's folder or hub id.
        prior: folder or hub id of a prior; the run's own unless given. Without any, the rate is that of even codes.
        data: images: a folder, a parquet file, or the name of a set; the run's own test images unless given.
        looks: feature networks for the figures of the eye; none are measured unless named.
        num_samples: with --looks, how many samples of the prior are measured, 0 for none; as many as there are images
            unless given.
        output: a JSON file to write the figures to.
    """
    networks = named(looks)
    model = Autoencoder.from_pretrained(run_or_model)
    images = load_test_images(run_or_model, data, model)
    result = measure(run_or_model, model, images, prior=prior, looks=networks, num_samples=num_samples)
    print(result.evaluation.table())
    if result.looks is not None:
        print("\n" + "\n".join(result.looks.lines()))
    if output is not None:
        result.save(output)
