"""Several runs side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from vqvae.report import charts
from vqvae.report.curves import Curves, shown_as
from vqvae.report.figures import Figures, duration, said
from vqvae.report.gallery import MOST_PIXELS
from vqvae.report.markup import Markup, element, joined, table
from vqvae.report.page import charts as beside_each_other
from vqvae.report.page import command, notes, page, section, versions
from vqvae.report.run_page import eye_rows, pixels, protocol

# Images that are shown of each run.
_MOST_SHOWN = 8
_SIDE = 128


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A run among others.

    Attributes:
        name: of the run.
        model: a line that says what it is.
        figures: of images that all were evaluated on alike.
        reconstructions: of the images that all show.
        looks: figures of the eye, one for each evaluation that has some.
        curves: of the training.
        num_positions: positions of its prior an image; None where there is no prior over codes.
        command: the command line that makes such a run.
    """

    name: str
    model: str
    figures: Figures
    reconstructions: UInt8[Tensor, "n c h w"]
    looks: Sequence[Mapping[str, Any]] = ()
    curves: Curves
    num_positions: int | None = None
    command: str | None = None


def shown_of(height: int, width: int) -> int:
    """How many images of a size a comparison shows."""
    return min(_MOST_SHOWN, max(4, MOST_PIXELS // (height * width)))


def comparison_page(
    runs: Sequence[Compared],
    images: UInt8[Tensor, "n c h w"],
    *,
    data: str,
    said_first: Sequence[str] = (),
) -> str:
    """The page of several runs as the text of an HTML file.

    Args:
        images: what the reconstructions are of.
        data: what the images are called.
        said_first: what has to be known before one reads on.

    Raises:
        ValueError: figures of different images, or of different numbers of them.
    """
    first = runs[0].figures
    for run in runs[1:]:
        if run.figures.protocol != first.protocol:
            raise ValueError(
                f"{run.name} was evaluated on other images than {runs[0].name}: expected figures of the same"
            )
    return page(
        f"{len(runs)} runs compared",
        element("p", "Runs compared", class_="eyebrow"),
        element("h1", ", ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs"),
        notes(said_first),
        section("Runs", None, element("div", *(_chip(number, run) for number, run in enumerate(runs)))),
        section(
            "Bits",
            f"What the same {first['images']:,} images of {data} cost, in bits/dim, under the last prior of each run.",
            _bits(runs),
        ),
        *_eye(runs),
        section("Training", "Test images during training, each run by its own steps.", _curves(runs)),
        section(
            "Reconstructions",
            "The same images, and below them what each run makes of its codes.",
            _strip("images", images),
            *(_strip(run.name, run.reconstructions, number) for number, run in enumerate(runs)),
        ),
        _commands(runs),
        element("footer", "Written by vqvae report. All of this page is in this one file."),
    )


def _chip(number: int, run: Compared) -> Markup:
    colour = element("i", class_=f"chip c{number % charts.NUM_COLOURS}")
    return element("p", colour, element("b", run.name), element("br"), element("span", run.model, class_="what"))


def _bits(runs: Sequence[Compared]) -> Markup:
    heads = ["", "bits/dim", "rate", "distortion", "PSNR", "usage", "perplexity", "time", "prior"]
    rows = []
    for run in runs:
        figures = run.figures
        rate, distortion = (
            None if nats is None else figures.bits(nats) for nats in (figures.rate, figures["distortion"])
        )
        rows.append(
            [
                run.name,
                said(figures["bits_per_dim"], ".4f"),
                said(rate, ".4f"),
                said(distortion, ".4f"),
                said(figures["psnr"], ".2f", " dB"),
                said(figures["usage"], ".1%"),
                said(figures["perplexity"], ",.1f"),
                duration(figures["seconds"]),
                figures.prior,
            ]
        )
    return table(heads, rows)


def _eye(runs: Sequence[Compared]) -> list[Markup | None]:
    """A section for each protocol: what was measured otherwise is not in the same column."""
    groups: list[tuple[Any, list[tuple[str, Mapping[str, Any]]]]] = []
    for run in runs:
        for looks in run.looks:
            # Distances of more samples are smaller, so their number belongs to it.
            key = (looks["protocol"], looks.get("num_samples"))
            same = [found for known, found in groups if known == key]
            if not same:
                same = [[]]
                groups.append((key, same[0]))
            same[0].append((run.name, looks))
    return [_eye_alike(found) for _, found in groups]


def _eye_alike(found: Sequence[tuple[str, Mapping[str, Any]]]) -> Markup | None:
    parts: list[object] = []
    for kind, title in (("reconstructions", "Reconstructions"), ("samples", "Samples")):
        if not any(looks.get(kind) for _, looks in found):
            continue
        rows = {name: {row[0]: row for row in eye_rows(looks.get(kind, {}))} for name, looks in found}
        names = list(dict.fromkeys(each for row in rows.values() for each in row))
        cells = [[name, *(_estimate(row.get(name)) for row in rows.values())] for name in names]
        count = f", {found[0][1].get('num_samples')} of each run" if kind == "samples" else ""
        parts += [element("h3", title + count), table(["", *rows], cells)]
    says = "Values above their 95 % intervals, of runs that were measured in the same way."
    return section("Figures of the eye", says, *parts, protocol(found[0][1]))


def _estimate(row: list[str] | None) -> object:
    """A value above its interval."""
    return "–" if row is None else joined(row[1], element("small", row[2]))


def _curves(runs: Sequence[Compared]) -> Markup | None:
    found = []
    for stage, name in (("codebook", "distortion"), ("codebook", "psnr"), ("codebook", "usage"), ("prior", "rate")):
        curve, unit, series = shown_as(stage, name), shown_as(stage, name).unit, []
        for number, run in enumerate(runs):
            points = run.curves.points(stage, name, "test")
            if (stage, name) == ("prior", "rate"):  # as many positions as they have, so per image
                if run.num_positions is None:
                    continue
                factor, unit = run.num_positions / run.figures["dims"], "bits/dim"
                points = [(step, value * factor) for step, value in points]
            series.append(charts.Series(run.name, points, number))
        found.append(charts.lines(f"{curve.title}, {stage}", series, "step", unit))
    return beside_each_other(found)


def _strip(name: str, images: Tensor, number: int | None = None) -> Markup:
    colour = None if number is None else element("i", class_=f"chip c{number % charts.NUM_COLOURS}")
    cells = [pixels(image, _SIDE, f"image {at}, {name}") for at, image in enumerate(torch.unbind(images))]
    style = f"grid-template-columns: repeat({len(cells)}, minmax(0, 1fr)); max-width: {len(cells) * 132}px"
    return joined(element("div", colour, name, class_="under"), element("div", *cells, class_="strip", style=style))


def _commands(runs: Sequence[Compared]) -> Markup | None:
    parts: list[object] = []
    for run in runs:
        if run.command is not None:
            parts += [element("h3", run.name), command(run.command)]
    return section(
        "How to reproduce", "The command line that trains each; a path is named by its last part.", *parts, versions()
    )
