"""Pictures of what a run made: for people who would rather look than read."""

import io
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

import safefolder
from vqvae.metrics import ACTIVE, ChannelUsage, CodeUsage

# Small images are enlarged by whole factors to about this many pixels a side, so that each pixel can be seen.
TILE = 64
# So are grids of few columns, to about this many pixels across.
ACROSS = 512
# White pixels between images, and around all of them.
_GAP = 2
# Points of the names above columns; of those that fit, the largest.
_POINTS = (14, 12, 10, 9, 8)


def most(height: int, width: int) -> int:
    """How many images of a size one picture holds that readers do not refuse as too large."""
    return (Image.MAX_IMAGE_PIXELS or 2**26) // (height * width * _enlarged(height, width) ** 2)


def _enlarged(height: int, width: int, *, side: int = TILE) -> int:
    """By which whole factor a small image is enlarged, to about so many pixels a side."""
    return max(1, side // max(height, width))


def side_for(columns: int) -> int:
    """How many pixels a side small images are enlarged to in a grid of so many columns, for a person to look at."""
    return max(TILE, ACROSS // columns)


def grid(
    images: UInt8[Tensor, "b c h w"], columns: int, *, side: int = TILE, heads: Sequence[str] = ()
) -> UInt8[Tensor, "height width 3"]:
    """Tile images row by row, enlarged by a whole factor, in colour.

    Args:
        side: pixels a side that small images are enlarged to, about.
        heads: a name to write above each column; none for a grid without.
    """
    factor = _enlarged(*images.shape[2:], side=side)
    enlarged = F.interpolate(images.cpu(), scale_factor=factor, mode="nearest")
    columns, gap = min(columns, len(images)), _GAP if len(images) > 1 else 0
    # White above and to the left of each, and in place of those that the last row lacks.
    cells = F.pad(enlarged, (gap, 0, gap, 0, 0, 0, 0, -len(images) % columns), value=255)
    tiled = rearrange(cells, "(rows columns) c h w -> (rows h) (columns w) c", columns=columns)
    tiled = F.pad(tiled, (0, 0, 0, gap, 0, gap), value=255).expand(-1, -1, 3)
    if not any(heads):
        return tiled
    return torch.cat([_headline(heads[:columns], enlarged.shape[-1], gap, tiled.shape[1]), tiled])


def _headline(heads: Sequence[str], column: int, gap: int, width: int) -> UInt8[Tensor, "height width 3"]:
    """A white strip with a name over the middle of each column, cut where even the smallest letters are too wide."""
    names = ["".join(each if each.isprintable() else "?" for each in name) for name in heads]
    points = next((each for each in _POINTS if max(map(_font(each).getlength, names)) <= column), _POINTS[-1])
    font = _font(points)
    strip = Image.new("RGB", (width, points + 6), "white")
    pen = ImageDraw.Draw(strip)
    for index, name in enumerate(names):
        shown = name
        while len(shown) > 1 and font.getlength(shown) > column:
            shown = shown.rstrip(".")[:-1] + "."
        left = gap + index * (column + gap) + (column - font.getlength(shown)) / 2
        pen.text((round(left), points + 3), shown, fill="black", font=font, anchor="ls")
    return torch.from_numpy(np.array(strip))


@cache
def _font(points: int) -> ImageFont.FreeTypeFont:
    """Pillow's own, with outlines, as every wheel of it has them."""
    font = ImageFont.load_default(points)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def save_grid(
    path: Path, images: UInt8[Tensor, "b c h w"], columns: int, *, side: int = TILE, heads: Sequence[str] = ()
) -> None:
    """Write a grid of images, see `grid`, as PNG, whole or not at all."""
    save_png(path, to_png(grid(images, columns, side=side, heads=heads)))


def to_png(pixels: UInt8[Tensor, "height width 3"]) -> bytes:
    """A picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, format="png")
    return buffer.getvalue()


def save_png(path: Path, data: bytes) -> None:
    """Write the bytes of a PNG file, whole or not at all."""
    with safefolder.files.replacing(Path(path)) as scratch:
        scratch.write_bytes(data)


def save_image(path: Path, image: UInt8[Tensor, "c h w"]) -> None:
    """Write one image as PNG, pixel for pixel, whole or not at all."""
    pixels = rearrange(image.cpu(), "c h w -> h w c").numpy()
    _save(path, Image.fromarray(pixels[..., 0] if len(image) == 1 else pixels).save)


def pairs(
    images: UInt8[Tensor, "b c h w"],
    reconstructions: UInt8[Tensor, "b c h w"],
    columns: int = 8,
    *,
    side: int = TILE,
) -> UInt8[Tensor, "height width 3"]:
    """Pairs of rows of a grid: images above, their reconstructions below."""
    images, reconstructions, columns = images.cpu(), reconstructions.cpu(), min(columns, len(images))
    rows = [
        part
        for start in range(0, len(images), columns)
        for part in (images[start : start + columns], reconstructions[start : start + columns])
    ]
    # A last row that is not full is padded with white, so that each pair stays one above the other.
    full = [F.pad(row, (0, 0, 0, 0, 0, 0, 0, columns - len(row)), value=255) for row in rows]
    return grid(torch.cat(full), columns, side=side)


def save_reconstructions(
    path: Path,
    images: UInt8[Tensor, "b c h w"],
    reconstructions: UInt8[Tensor, "b c h w"],
    columns: int = 8,
    *,
    side: int = TILE,
) -> None:
    """Write `pairs` as PNG, whole or not at all."""
    save_png(path, to_png(pairs(images, reconstructions, columns, side=side)))


def save_usage(path: Path, usage: CodeUsage | ChannelUsage) -> None:
    """Write how latents are used: the codes' frequencies, or the channels' KL; highest first."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    if isinstance(usage, CodeUsage):
        _draw_codes(axes, usage)
    else:
        _draw_channels(axes, usage)
    axes.legend(frameon=False)
    try:
        _save(path, partial(figure.savefig, dpi=120))
    finally:
        pyplot.close(figure)


def _draw_codes(axes: Any, usage: CodeUsage) -> None:
    """Frequencies of the codes beside those of an even use; a line a codebook."""
    from matplotlib import pyplot

    shares = [counts.sort(descending=True).values.double() / counts.sum().clamp_min(1) for counts in usage.counts]
    # The codes that never occurred are a line at zero, of which the picture shows no more than it can.
    shown = min(usage.num_codes, max(2 * max(len(share) for share in shares), 64))
    for index, share in enumerate(shares):
        heights = F.pad(share, (0, shown - len(share)))
        if len(shares) == 1:
            axes.fill_between(range(shown), heights.numpy(), step="mid", color="#4477aa", linewidth=0)
        else:
            colour = pyplot.get_cmap("viridis")(index / len(shares))
            axes.plot(range(shown), heights.numpy(), color=colour, linewidth=1, label=f"codebook {index}")
    axes.axhline(1 / usage.num_codes, color="#cc6677", linewidth=1, label="even use")
    of = "" if len(shares) == 1 else f", mean of {len(shares)} codebooks"
    axes.set(
        xlabel="code, most frequent first",
        ylabel="share of positions",
        xlim=(0, max(1, shown - 1)),
        ylim=(0, None),
        title=f"{usage.usage:.1%} of {usage.num_codes} codes used, perplexity {usage.perplexity:.0f}{of}",
    )


def _draw_channels(axes: Any, usage: ChannelUsage) -> None:
    """A bar a channel, beside what counts as active."""
    axes.bar(range(usage.dim), sorted(usage.channels, reverse=True), color="#4477aa")
    axes.axhline(ACTIVE, color="#cc6677", linewidth=1, label="active above")
    axes.set(
        xlabel="latent channel, highest KL first",
        ylabel="KL, nats a position",
        ylim=(0, None),
        title=f"{usage.usage:.1%} of {usage.dim} channels active, KL to N(0, I) {usage.kl:.1f} nats an image",
    )


def _save(path: Path, draw: Callable[..., object]) -> None:
    """Write what `draw` gives as PNG, whole or not at all."""
    buffer = io.BytesIO()
    draw(buffer, format="png")
    save_png(path, buffer.getvalue())
