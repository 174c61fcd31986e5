"""Images as large as they are through a model, in tiles: reconstruct --size keep."""

import os
from pathlib import Path

from tqdm import tqdm

from vqvae import Autoencoder, Tiled, pictures
from vqvae.cli.common import printable
from vqvae.cli.image_choice import ImageChoice, Original, as_large_as_they_are
from vqvae.cli.opening import Opened
from vqvae.metrics import psnr, ssim

# Bytes of a file's name that are taken over; systems take 255.
_LONGEST = 200


def reconstruct_whole(opened: Opened, shown: Autoencoder, choice: ImageChoice, num: int, output: Path) -> None:
    """Write the reconstruction of each image as a PNG: of one to a file, of several into a folder.

    Args:
        shown: whose decoder makes the images.

    Raises:
        ValueError: images that cannot be read, a model whose codes are of its own size alone, or an output that does
            not fit their number.
    """
    if opened.has_loop:
        raise ValueError(
            f"the codes of {opened.source} are chosen through a prior, which is for images of its own size: leave out "
            "--size keep"
        )
    is_file = output.suffix.lower() == ".png" and not output.is_dir()
    if not is_file and output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file, and no .png; name a .png file for one image, or a folder for several")
    for name in choice.data or ():
        if os.path.realpath(name) == os.path.realpath(output):
            raise ValueError(f"{output} holds the images that are read; name another file or folder with --output")
    images = as_large_as_they_are(opened.source, choice, opened.model, num)
    first = next(images, None)
    if first is None:
        raise ValueError("there is no image that can be read")
    second = next(images, None)
    if second is not None and is_file:
        raise ValueError(f"got {output} for several images; name a folder with --output, or take --num 1")
    if is_file:
        _write(opened.model, shown, first, output)
        return
    for number, each in enumerate([first, *([] if second is None else [second])]):
        _write(opened.model, shown, each, output / _name(number, each))
    for number, each in enumerate(images, 2):
        _write(opened.model, shown, each, output / _name(number, each))


def _name(number: int, original: Original) -> str:
    stem = Path(original.name).stem.encode("utf-8", "surrogateescape")[:_LONGEST].decode("utf-8", "ignore")
    return f"{number:06}-{stem}.png"


def _write(model: Autoencoder, shown: Autoencoder, original: Original, path: Path) -> None:
    image = original.image[None].to(next(model.parameters()).device)
    height, width = image.shape[2:]
    with tqdm(desc=Path(original.name).name, unit="tile", disable=None, leave=False) as bar:

        def watch(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        codes = Tiled(model, watch=watch).encode(image, pad=True)
        bar.reset()
        again = Tiled(shown, watch=watch).decode(codes, size=(height, width))
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures.save_image(path, again[0])
    figures = f"PSNR {psnr(image, again).item():.2f} dB"
    if min(height, width) >= 11:
        figures += f", SSIM {ssim(image, again).item():.4f}"
    print(f"{path}: {printable(original.name)}, {width}x{height}, {figures}")
