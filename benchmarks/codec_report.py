"""The tables and pictures of `codec.py`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange, repeat
from other_codecs import PER_IMAGE  # pyrefly: ignore[missing-import]
from torch import Tensor

import safefolder

# A lossy result: codec, pixels "b c h w", figures.
Row = tuple[str, Tensor, dict[str, float]]
Rows = Mapping[str, Mapping[str, Sequence[Row]]]
# Colours of runs, and of what is not ours: coded pixels and, lighter, the rest of a file.
OURS, THEIRS = ("#cc6677", "#ddaa33", "#117733", "#882255"), "#4477aa"
COLUMNS = 16


def ours(name: str) -> str:
    """A run among codecs."""
    return f"ours, {name}"


def is_ours(name: str) -> bool:
    return name.startswith("ours, ")


def line(*cells: Any) -> str:
    """A row of a table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return "\n".join([line(*head), line(*["---"] * len(head)), *(line(*row) for row in rows)])


def figures(found: Mapping[str, Any], rows: Rows, images: Tensor, num_timed: int, alone_of: int) -> dict[str, Any]:
    """What was measured as plain data: sizes of single images as bits per pixel."""
    dims, reference = images[0].numel(), np.array(found[PER_IMAGE]["single"])
    codecs = {}
    for name, sizes in found.items():
        codecs[name] = {
            **sizes,
            "single": 8 * float(np.mean(sizes["single"])) / dims,
            "num_single": len(sizes["single"]),
            "archive": 8 * sizes["archive"] / dims / len(images),
        }
        if "payload" in sizes:
            codecs[name]["payload"] = 8 * float(np.mean(sizes["payload"])) / dims
        if is_ours(name):
            codecs[name]["share_smaller"] = {
                what: float(np.mean(np.array(sizes[what]) < reference)) for what in ("single", "payload")
            }
            codecs[name]["weight_bits_per_pixel"] = 8 * sizes["weight_bytes"] / images.numel()
    lossy = {
        run: {how: {name: each for name, _, each in of} for how, of in kinds.items()} for run, kinds in rows.items()
    }
    return {
        "num": len(images),
        "dims": dims,
        "num_timed": num_timed,
        "num_timed_alone": max(1, num_timed // alone_of),
        "codecs": codecs,
        "lossy": lossy,
        "num_lossy": len(next(iter(next(iter(rows.values())).values()))[0][1]),
    }


def tables(result: Mapping[str, Any]) -> str:
    """All figures in markdown."""
    parts = [_bits_table(result), _elbo_table(result), _bytes_table(result), _speed_table(result), _lossy_table(result)]
    return "\n\n".join(parts)


def _of_ours(result: Mapping[str, Any]) -> dict[str, Any]:
    return {name: codec for name, codec in result["codecs"].items() if is_ours(name)}


def _bits_table(result: Mapping[str, Any]) -> str:
    rows = []
    for name, codec in sorted(result["codecs"].items(), key=lambda item: -item[1]["archive"]):
        payload = f"{codec['payload']:.3f}" if "payload" in codec else ""
        single = f"{codec['single']:.3f}"
        if codec["num_single"] < result["num"]:
            single += f" (first {codec['num_single']:,})"
        rows.append((name, single, payload, f"{codec['archive']:.3f}"))
    head = (f"bits/pixel of {result['num']:,} images", "each its own file", "its payload", "one mosaic or archive")
    return _table(head, rows)


def _elbo_table(result: Mapping[str, Any]) -> str:
    codecs = _of_ours(result)
    dims = result["dims"]

    def row(what: str, value: Any) -> tuple[str, ...]:
        return (what, *(value(codec) for codec in codecs.values()))

    rows = [
        row("negative ELBO, float32 (bits/pixel)", lambda c: f"{c['bounds']['float32'] / dims:.5f}"),
        row("negative ELBO, float64", lambda c: f"{c['bounds']['float64'] / dims:.5f}"),
        row("code length of the integer tables", lambda c: f"{c['bounds']['tables'] / dims:.5f}"),
        row("of which codes", lambda c: f"{c['bounds']['rate'] / dims:.5f}"),
    ]
    for num in next(iter(codecs.values()))["archives"]:
        for name, against in (("float32", "ELBO, float32"), ("float64", "ELBO, float64"), ("tables", "the tables")):
            rows.append(
                row(
                    f"archive of {int(num):,} over {against} (claim: 0.2 %)",
                    lambda c, num=num, name=name: f"{c['archives'][num][f'over_{name}']:+.3%}",
                )
            )
    rows += [
        row(
            "payload of one image less the tables' bits, mean",
            lambda c: f"{c['payload_above_tables']['mean']:.1f} bits",
        ),
        row("at most (claim: 24 bits)", lambda c: f"{c['payload_above_tables']['max']:.1f} bits"),
        row(f"payloads smaller than {PER_IMAGE} files", lambda c: f"{c['share_smaller']['payload']:.2%}"),
        row(f"files smaller than {PER_IMAGE} files", lambda c: f"{c['share_smaller']['single']:.2%}"),
        row("weights of model and prior", lambda c: f"{c['weight_bytes']:,} bytes"),
        row("the same over these images (bits/pixel)", lambda c: f"{c['weight_bits_per_pixel']:.2f}"),
    ]
    return _table(["", *codecs], rows)


def _bytes_table(result: Mapping[str, Any]) -> str:
    rows = []
    for name, codec in _of_ours(result).items():
        for num, parts in codec["archives"].items():
            counts = [f"{parts[part]:,}" for part in ("bytes", "header", "blocks", "index", "streams", "stored_pixels")]
            shares = [f"{parts[part]:.2%}" for part in ("share_shifted", "share_stored")]
            rows.append((f"{name}, {int(num):,} in {parts['num_blocks']} blocks", *counts, *shares))
    head = ("archive", "bytes", "header and trailer", "blocks' own", "index", "streams", "stored pixels")
    return _table((*head, "images on a shifted grid", "stored"), rows)


def _speed_table(result: Mapping[str, Any]) -> str:
    rows = []
    for kind, title in (("archive", "one mosaic or archive"), ("single", "each its own file")):
        for name, codec in result["codecs"].items():
            num = result["num_timed_alone" if kind == "single" and is_ours(name) else "num_timed"]
            symbols = result["dims"] + codec.get("codes_per_image", 0)
            speed = codec["speed"][kind]
            back = _speeds(speed["decode"], symbols)
            rows.append((name, title, f"{num:,}", *_speeds(speed["encode"], symbols), *back))
            if verified := speed.get("encode, verified"):
                rows.append((f"{name}, verified", title, f"{num:,}", *_speeds(verified, symbols), "", ""))
    head = ("codec, on one thread", "images as", "timed", "encode (images/s)", "symbols/s")
    return _table((*head, "decode (images/s)", "symbols/s"), rows)


def _speeds(images: float, symbols: int) -> tuple[str, str]:
    return f"{images:,.1f}" if images < 100 else f"{images:,.0f}", f"{images * symbols:,.0f}"


def _lossy_table(result: Mapping[str, Any]) -> str:
    rows = []
    for kinds in result["lossy"].values():
        for how, of in kinds.items():
            for name, each in of.items():
                size = (f"{each['bytes']:,}{_smallest(each)}", f"{each['bits_per_pixel']:.3f}")
                rows.append((f"{name}, {how}", *size, f"{each['psnr']:.2f}", f"{each['ssim']:.3f}"))
    return _table((f"lossy, {result['num_lossy']} images", "bytes", "bits/pixel", "PSNR (dB)", "SSIM"), rows)


def _smallest(figures: Mapping[str, float]) -> str:
    """Whether a codec cannot go down to our bytes."""
    num = int(figures["files_at_smallest"])
    if num == 0:
        return ""
    return " (its smallest)" if num == 1 else f" ({num} at its smallest)"


# ----------------------------------------------------------------------------------------------------------- pictures


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    with safefolder.files.replacing(path) as scratch:
        figure.savefig(scratch, dpi=120, format="png")
    _pyplot().close(figure)


def draw_bits(found: Mapping[str, Any], dims: int, num: int, path: Path) -> None:
    """Bits/pixel of all codecs as bars, files of their own and archives; ours against JPEG-XL, image by image."""
    pyplot = _pyplot()
    height = max(4.2, 0.45 * len(found) + 1.5)
    figure, (single, archive, scatter) = pyplot.subplots(
        1, 3, figsize=(15, height), layout="constrained", width_ratios=[1.1, 1, 1]
    )
    colours = dict(zip([name for name in found if is_ours(name)], OURS * len(found), strict=False))
    bits = {name: 8 * float(np.mean(sizes["single"])) / dims for name, sizes in found.items()}
    payloads = {
        name: 8 * float(np.mean(sizes["payload"])) / dims for name, sizes in found.items() if "payload" in sizes
    }
    _bars(single, bits, payloads, colours)
    single.set(title="each image its own file", xlabel="bits/pixel; headers in a lighter colour, where known")
    _bars(archive, {name: 8 * sizes["archive"] / dims / num for name, sizes in found.items()}, {}, colours)
    archive.set(title=f"{num:,} images as one mosaic or archive", xlabel="bits/pixel")
    reference = 8 * np.array(found[PER_IMAGE]["single"]) / dims
    end = reference.max() * 1.05
    for name, colour in colours.items():
        mine = 8 * np.array(found[name]["payload"]) / dims
        smaller = np.mean(mine < reference)
        size, alpha = (14, 0.5) if num < 1000 else (3, 0.25)
        label = f"{name}: {smaller:.2%} below"
        scatter.scatter(reference, mine, s=size, alpha=alpha, color=colour, linewidths=0, label=label)
        end = max(end, mine.max() * 1.05)
    scatter.plot([0, end], [0, end], color="black", linewidth=0.8)
    scatter.set(
        title="each image",
        xlabel=f"{PER_IMAGE}, its file (bits/pixel)",
        ylabel="ours, its payload (bits/pixel)",
        xlim=(0, end),
        ylim=(0, end),
        aspect="equal",
    )
    legend = scatter.legend(frameon=False, loc="upper left", markerscale=2)
    for handle in legend.legend_handles:
        handle.set_alpha(1)
    _save(figure, path)


def _bars(axes: Any, bits: Mapping[str, float], payloads: Mapping[str, float], colours: Mapping[str, str]) -> None:
    names = sorted(bits, key=lambda name: -bits[name])
    for place, name in enumerate(names):
        colour = colours.get(name, THEIRS)
        axes.barh(place, bits[name], color=colour, alpha=0.45 if name in payloads else 1, linewidth=0)
        text = f"{bits[name]:.3f}"
        if name in payloads:
            axes.barh(place, payloads[name], color=colour, linewidth=0)
            text += f"  ({payloads[name]:.3f})"
        axes.text(bits[name], place, f" {text}", va="center", fontsize=9)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(0, 1.3 * max(bits.values()))
    axes.spines[["top", "right"]].set_visible(False)


def draw_lossy(images: Tensor, rows: Rows, path: Path) -> None:
    """The first images and what comes back of them, a row a codec, beside bytes, PSNR and SSIM."""
    pyplot = _pyplot()
    strips: list[tuple[str, Tensor]] = [("original", images)]
    for kinds in rows.values():
        for how, of in kinds.items():
            for name, back, each in of:
                quality = f"{each['psnr']:.1f} dB   SSIM {each['ssim']:.3f}"
                strips.append((f"{name}, {how}\n{each['bytes']:,} bytes{_smallest(each)}   {quality}", back))
    columns = min(COLUMNS, len(images))
    figure, every = pyplot.subplots(
        len(strips), 1, figsize=(4 + 0.7 * columns, 0.74 * len(strips) + 0.4), squeeze=False
    )
    figure.subplots_adjust(
        left=4 / (4 + 0.7 * columns), right=0.995, top=1 - 0.4 / (0.74 * len(strips) + 0.4), bottom=0.01
    )
    for axes, (label, back) in zip(every[:, 0], strips, strict=True):
        axes.imshow(_strip(back[:columns]), interpolation="nearest", aspect="auto")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    shown = f"the first {columns} of {len(images)} images; figures are of all {len(images)}"
    figure.suptitle(f"Lossy at equal bytes, or the next above: {shown}", fontsize=10)
    _save(figure, path)


def _strip(images: Tensor) -> np.ndarray:
    """Images side by side with white between, in colour."""
    factor = max(1, math.ceil(64 / images.shape[-1]))
    levels = repeat(images.numpy(), "b c h w -> b c (h f) (w g)", f=factor, g=factor)
    levels = np.pad(levels, ((0, 0), (0, 0), (2, 2), (2, 2)), constant_values=255)
    strip = rearrange(levels, "b c h w -> h (b w) c")
    return np.repeat(strip, 3, 2) if strip.shape[2] == 1 else strip
