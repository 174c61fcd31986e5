"""Several tokenizers on the same images, side by side: compare."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import tyro

from vqvae import pictures
from vqvae.cli.common import Output, at_least_one, first_images, printable
from vqvae.cli.evaluating import NOT_ASKED, Measured, Network, measure, named
from vqvae.cli.image_choice import ImageChoice, choose
from vqvae.cli.opening import Opened


def compare(
    runs_or_models: Annotated[tuple[str, ...], tyro.conf.Positional],
    *,
    data: str | None = None,
    looks: tuple[Network, ...] = NOT_ASKED,
    num: int = 8,
    output: Output = Path("comparison.png"),
) -> None:
    """Set tokenizers side by side on the same images.

    The picture has the images in its first row, and below them what each tokenizer makes of them, in the order named.
    Bits and figures of the eye stand in columns of their own; figures of different images are refused.

    Example: vqvae compare runs/small runs/large --data photos --looks lite2 --output pairs.png

    Args:
        runs_or_models: runs' folders, tokenizers' folders, or hub ids.
        data: images: a folder, a parquet file, or the name of a set; the first run's own test images unless given.
        looks: feature networks to measure figures of the eye with, which are lite0, lite2, vgg16 and inception; see
            `vqvae evaluate`.
        num: how many images the picture shows.
        output: the PNG file to write.
    """
    if len(runs_or_models) < 2:
        raise ValueError(f"a comparison takes two or more runs or models, got {len(runs_or_models)}")
    at_least_one(num, "--num")
    networks = named(looks)
    opened = [Opened(name) for name in runs_or_models]
    models = [each.model for each in opened]
    for name, model in zip(runs_or_models, models, strict=True):
        for option in ("image_size", "num_channels"):
            if (got := getattr(model.config, option)) != (first := getattr(models[0].config, option)):
                raise ValueError(
                    f"{name} has {option} {got} and {runs_or_models[0]} {first}: they see different images, whose "
                    "figures are not comparable"
                )
    chosen = choose(runs_or_models[0], ImageChoice(data=None if data is None else (data,)), models[0])
    results = [measure(each, chosen, looks=networks, num_samples=0 if networks else None) for each in opened]
    print("\n".join(_table(runs_or_models, results)))
    shown = first_images(chosen.images, num)
    rows = [each.reconstructed(shown) for each in opened]
    pictures.save_grid(output, torch.cat([shown, *rows]), len(shown))
    print(f"{output}: {len(shown)} images, and below them the reconstructions of each, in this order")


def _table(names: Sequence[str], results: Sequence[Measured]) -> list[str]:
    """A row a tokenizer; a column a figure: first the bits, then the looks."""
    figures = [_figures(result) for result in results]
    width = max(len("tokenizer"), *(len(printable(name)) for name in names))
    heads = {name: max(len(name), 9) for name in figures[0]}
    lines = [" ".join([f"{'tokenizer':<{width}}", *(f"{name:>{wide}}" for name, wide in heads.items())])]
    for name, row in zip(names, figures, strict=True):
        cells = [f"{row[head]:>{wide}}" for head, wide in heads.items()]
        lines.append(" ".join([f"{printable(name):<{width}}", *cells]))
    lines.append("Rate, distortion and bits/dim are in bits/dim, under the last prior of each: bits that were counted.")
    if (seen := results[0].looks) is not None:
        lines.append("The figures of the eye, of reconstructions, were measured with:")
        lines += [f"  {name}: {value}" for name, value in seen.protocol.items()]
    return lines


def _figures(result: Measured) -> dict[str, str]:
    evaluation = result.evaluation
    bits, bound = evaluation.bits, evaluation.bound
    prior, rate = list(bound.rate.items())[-1]
    row = {
        "prior": prior,
        "rate": f"{bits(rate - bound.entropy):.4f}",
        "distortion": f"{bits(bound.distortion):.4f}",
        "bits/dim": f"{evaluation.bits_per_dim:.4f}",
        "usage": f"{evaluation.code_usage.usage:.1%}",
    }
    if result.looks is None:
        return row | {"PSNR": f"{evaluation.psnr:.2f}"}
    return row | {name: f"{estimate.value:.5g}" for name, estimate in result.looks.reconstructions.items()}
