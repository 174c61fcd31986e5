"""Look at what a run made, from its folder or from its parts: reconstruct, evaluate."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from vqvae import pictures
from vqvae.cli.common import Model, Output, at_least_one, first_images, load_decoder, tell
from vqvae.cli.evaluating import NOT_ASKED, Network, measure, named
from vqvae.cli.image_choice import ImageChoice, choose
from vqvae.cli.opening import Opened
from vqvae.cli.whole import reconstruct_whole
from vqvae.metrics import psnr, ssim


def reconstruct(
    run_or_model: Model,
    *,
    choice: Annotated[ImageChoice, tyro.conf.OmitArgPrefixes] = ImageChoice(),
    decoder: str | None = None,
    size: Literal["model", "keep"] = "model",
    num: int = 32,
    output: Output = Path("reconstructions.png"),
) -> None:
    """Encode and decode images, and write both as pairs of rows.

    The images are above. A run with a prior in its loop encodes through that prior, without labels. Of a run that is
    still training, or was stopped, the model is that of the last checkpoint.

    Example: vqvae reconstruct runs/fashion-mini --data photos --num 16 --output pairs.png

    Example: vqvae reconstruct runs/fashion-mini --data boots.jpg coat.png

    With --size keep a photograph of any size goes through in tiles, and its reconstruction is written, pixel for pixel.

    Example: vqvae reconstruct runs/photos --data holiday.jpg --size keep --output again.png

    Args:
        run_or_model: a run's folder, a tokenizer's folder, or a hub id.
        decoder: a model of the same codes whose decoder is to make the images (`vqvae train --train decoder`); the
            run's own unless given.
        size: of the images: scaled and cropped to the model's, or kept as it is.
        num: how many images.
        output: the PNG file to write; with --size keep and several images, a folder for a PNG of each.
    """
    at_least_one(num, "--num")
    opened = Opened(run_or_model)
    model = opened.model
    shown = load_decoder(model, decoder)
    if size == "keep":
        reconstruct_whole(opened, shown, choice, num, output)
        return
    if num > (most := pictures.most(*model.size) // 2):
        raise ValueError(f"got --num {num:,}, expected at most {most:,}, which is what one picture holds")
    chosen = choose(run_or_model, choice, model)
    images = first_images(chosen.images, num)
    others = opened.reconstructed(images, shown)
    tell(f"images: {chosen.told(len(images))}")
    columns = min(8, len(images))
    pictures.save_reconstructions(output, images, others, columns, side=pictures.side_for(columns))
    figures = f"PSNR {psnr(images, others).mean().item():.2f} dB"
    if min(images.shape[-2:]) >= 11:
        figures += f", SSIM {ssim(images, others).mean().item():.4f}"
    print(f"{output}: {len(images)} images above their reconstructions, {figures}")


def evaluate(
    run_or_model: Model,
    *,
    prior: str | None = None,
    choice: Annotated[ImageChoice, tyro.conf.OmitArgPrefixes] = ImageChoice(),
    looks: tuple[Network, ...] = NOT_ASKED,
    num_samples: int | None = None,
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
) -> None:
    """State the negative ELBO of images, and how they look.

    With --looks come PSNR, SSIM, MS-SSIM (of images of 176 pixels and more), the perceptual distance, and the Fréchet
    and kernel distance of reconstructions and of as many samples of the prior, with 95 % intervals and with what they
    were measured with. Networks: lite2 (for figures of what was trained with lite0), lite0, vgg16 (whose perceptual
    distance is LPIPS), inception (whose distances are FID and KID). The first two need the extra `looks` and no
    download. Of a run that is still training, or was stopped, the models are those of the last checkpoint.

    Example: vqvae evaluate runs/fashion-mini --looks lite2 --output figures.json

    Args:
        run_or_model: a run's folder, or a tokenizer's folder or hub id.
        prior: folder or hub id of a prior; the run's own unless given. Without any, the rate is that of even codes.
        looks: feature networks for the figures of the eye; none are measured unless named.
        num_samples: with --looks, how many samples of the prior are measured, 0 for none; as many as there are images
            unless given.
        output: a JSON file to write the figures to.
    """
    networks = named(looks)
    opened = Opened(run_or_model)
    chosen = choose(run_or_model, choice, opened.model)
    result = measure(opened, chosen, prior=prior, looks=networks, num_samples=num_samples)
    tell(f"images: {chosen.told()}")
    print(result.evaluation.table(what=chosen.what))
    if result.looks is not None:
        print("\n" + "\n".join(result.looks.lines()))
    if output is not None:
        result.save(output)
