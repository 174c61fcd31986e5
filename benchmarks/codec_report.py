"""The tables and pictures of `codec`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange, repeat
from torch import Tensor

from benchmarks import harness

# Bytes and speeds by codec.
Found = Mapping[str, Mapping[str, Any]]
# Colours of runs, and of what is not ours: coded pixels and, lighter, the rest of a file.
OURS, THEIRS = ("#cc6677", "#ddaa33", "#117733", "#882255"), "#4477aa"
COLUMNS = 16


class Row(NamedTuple):
    """A lossy result: codec, pixels "b c h w", how many files cannot go down to our bytes, and quality."""

    name: str
    back: Tensor
    num_bytes: int
    num_smallest: int
    PSNR: float
    SSIM: float

    @property
    def size(self) -> str:
        smallest = {0: "", 1: " (its smallest)"}.get(self.num_smallest, f" ({self.num_smallest} at its smallest)")
        return f"{self.num_bytes:,}{smallest}"


def ours(name: str) -> str:
    """A run among codecs."""
    return f"ours, {name}"


def of_ours(found: Found) -> dict[str, Mapping[str, Any]]:
    return {name: codec for name, codec in found.items() if name.startswith("ours, ")}


def bits(sizes: Sequence[int], dims: int) -> float:
    """A mean in bits/pixel."""
    return 8 * float(np.mean(sizes)) / dims


def print_tables(found: Found, rows: Sequence[Row], images: Tensor) -> None:
    """All figures."""
    dims, num = images[0].numel(), len(images)
    table = harness.Table("bits/pixel", "each its own file", "of which payload", "one mosaic or archive")
    for name, codec in sorted(found.items(), key=lambda item: -item[1]["archive"]):
        single = f"{bits(codec['single'], dims):.3f}"
        if len(codec["single"]) < num:
            single += f" (first {len(codec['single']):,})"
        payload = f"{bits(codec['payload'], dims):.3f}" if codec["payload"] else ""
        table.row(name, single, payload, f"{8 * codec['archive'] / dims / num:.3f}")
    print()
    _elbo_table(list(of_ours(found).values()), list(of_ours(found)), images)
    print()
    _speed_table(found, dims)
    print()
    table = harness.Table(f"lossy, {len(rows[0].back)} images", "bytes", "PSNR (dB)", "SSIM")
    for row in rows:
        table.row(row.name, row.size, f"{row.PSNR:.2f}", f"{row.SSIM:.3f}")


def _elbo_table(codecs: Sequence[Mapping[str, Any]], names: Sequence[str], images: Tensor) -> None:
    dims = images[0].numel()
    table = harness.Table("file against ELBO", *names)

    def per_pixel(what: str, name: str) -> None:
        table.row(what, *(f"{codec['bounds'][name] / dims:.5f}" for codec in codecs))

    per_pixel("negative ELBO, float64 (bits/pixel)", "ELBO")
    per_pixel("code length of the integer tables", "tables")
    per_pixel("of which codes", "rate")
    for size in codecs[0]["archives"]:
        archives = [codec["archives"][size] for codec in codecs]
        table.row(f"archive of {size:,} over the ELBO (aim: 0.2 %)", *(f"{each['over']:+.3%}" for each in archives))
        for part in ("bytes", "header and trailer", "blocks", "blocks' own", "index", "streams", "stored pixels"):
            table.row(f"archive of {size:,}, {part}", *(f"{each[part]:,}" for each in archives))
        shares = (f"{each['shifted']:.1%}; {each['stored']:.1%}" for each in archives)
        table.row("images on a shifted grid; stored as they are", *shares)
    above = (f"{codec['above'].mean():.1f}, {codec['above'].max():.1f} bits" for codec in codecs)
    table.row("payload of one image over its tables' bits: mean, most (aim: 24 bits)", *above)
    around = (f"{np.mean(codec['single']) - np.mean(codec['payload']):.0f} bytes" for codec in codecs)
    table.row("a file of one image over its payload", *around)
    table.row("weights of model and prior", *(f"{codec['weights'] / 1e6:.1f} MB" for codec in codecs))
    spread = (f"{8 * codec['weights'] / images.numel():.1f}" for codec in codecs)
    table.row("the weights spread over these images (bits/pixel)", *spread)


def _speed_table(found: Found, dims: int) -> None:
    heads = ("encode (images/s)", "verified", "decode (images/s)", "symbols/s")
    table = harness.Table("codec, on one thread", "images as", *heads)
    for kind, title in (("archive", "one mosaic or archive"), ("single", "each its own file")):
        for name, codec in found.items():
            speed = codec["speed"][kind]
            verified = f"{speed['encode, verified']:,.1f}" if "encode, verified" in speed else ""
            symbols = speed["decode"] * (dims + codec.get("codes", 0))
            cells = (f"{speed['encode']:,.1f}", verified, f"{speed['decode']:,.1f}", f"{symbols:,.0f}")
            table.row(name, title, *cells)


def draw_bits(found: Found, images: Tensor, path: Path) -> None:
    """Bits/pixel of all codecs as bars, files of their own and archives."""
    dims = images[0].numel()
    colours = dict(zip(of_ours(found), OURS * len(found), strict=False))
    singles = {name: bits(sizes["single"], dims) for name, sizes in found.items()}
    payloads = {name: bits(sizes["payload"], dims) for name, sizes in found.items() if sizes["payload"]}
    archives = {name: 8 * sizes["archive"] / images.numel() for name, sizes in found.items()}
    size = (10, max(4.2, 0.45 * len(found) + 1.5))
    with harness.picture(path, 1, 2, figsize=size, layout="constrained") as (_, (single, archive)):
        _bars(single, singles, payloads, colours)
        single.set(title="each image its own file", xlabel="bits/pixel; headers in a lighter colour, where known")
        _bars(archive, archives, {}, colours)
        archive.set(title=f"{len(images):,} images as one mosaic or archive", xlabel="bits/pixel")


def _bars(axes: Any, sizes: Mapping[str, float], payloads: Mapping[str, float], colours: Mapping[str, str]) -> None:
    names = sorted(sizes, key=lambda name: -sizes[name])
    for position, name in enumerate(names):
        colour = colours.get(name, THEIRS)
        axes.barh(position, sizes[name], color=colour, alpha=0.45 if name in payloads else 1, linewidth=0)
        text = f"{sizes[name]:.3f}"
        if name in payloads:
            axes.barh(position, payloads[name], color=colour, linewidth=0)
            text += f"  ({payloads[name]:.3f})"
        axes.text(sizes[name], position, f" {text}", va="center", fontsize=9)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(0, 1.3 * max(sizes.values()))
    axes.spines[["top", "right"]].set_visible(False)


def draw_lossy(images: Tensor, rows: Sequence[Row], path: Path) -> None:
    """The first images and what comes back of them, a row a codec, beside bytes, PSNR and SSIM."""
    strips: list[tuple[str, Tensor]] = [("original", images)]
    for row in rows:
        quality = f"{row.PSNR:.1f} dB   SSIM {row.SSIM:.3f}"
        strips.append((f"{row.name}\n{row.size} bytes   {quality}", row.back))
    columns = min(COLUMNS, len(images))
    width, height = 4 + 0.7 * columns, 0.74 * len(strips) + 0.4
    with harness.picture(path, len(strips), figsize=(width, height), squeeze=False) as (figure, every):
        figure.subplots_adjust(left=4 / width, right=0.995, top=1 - 0.4 / height, bottom=0.01)
        for axes, (label, back) in zip(every[:, 0], strips, strict=True):
            axes.imshow(_strip(back[:columns]), interpolation="nearest", aspect="auto")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        shown = f"the first {columns} of {len(images)} images; figures are of all {len(images)}"
        figure.suptitle(f"Lossy at equal bytes, or the next above: {shown}", fontsize=10)


def _strip(images: Tensor) -> np.ndarray:
    """Images side by side with white between, in colour."""
    factor = max(1, math.ceil(64 / images.shape[-1]))
    levels = repeat(images.numpy(), "b c h w -> b c (h f) (w g)", f=factor, g=factor)
    levels = np.pad(levels, ((0, 0), (0, 0), (2, 2), (2, 2)), constant_values=255)
    strip = rearrange(levels, "b c h w -> h (b w) c")
    return np.repeat(strip, 3, 2) if strip.shape[2] == 1 else strip
