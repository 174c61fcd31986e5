"""The report of one run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from vqvae.autoencoder import Autoencoder
from vqvae.metrics import ChannelUsage, CodeUsage
from vqvae.report import charts
from vqvae.report.curves import Curves
from vqvae.report.figures import Figures, duration, said
from vqvae.report.gallery import Gallery, Shown, of_at_most, thumbnail
from vqvae.report.markup import Markup, details, element, joined, picture, table
from vqvae.report.page import charts as beside_each_other
from vqvae.report.page import command, head_row, notes, page, section, versions

# Pixels along the longer side of a picture in the page; smaller ones are enlarged where they are shown.
_SIDE, _SMALL_SIDE = 192, 80
# Of the picture of samples.
_MOST_BYTES = 500_000
# Dots of a scatter plot.
_MOST_DOTS = 2000


@dataclass(frozen=True, kw_only=True)
class RunContents:
    """What the page of a run is made of.

    Attributes:
        name: of the run.
        model: a line that says what it is.
        data: what its images are called.
        figures: of the evaluation.
        looks: figures of the eye, one for each evaluation that has some.
        gallery: images with what they cost.
        usage: of the latents of those images.
        curves: of the training.
        samples: a picture of samples of the prior; None where there is no prior.
        class_names: of the images' labels.
        columns: the classes of the picture of samples, one a column.
        options: names and values; none of a model that is no run.
        command: the command line that makes such a run.
        notes: what has to be known first, as that the run is not finished.
    """

    name: str
    model: str
    data: str
    figures: Figures
    gallery: Gallery
    usage: CodeUsage | ChannelUsage
    looks: Sequence[Mapping[str, Any]] = ()
    curves: Curves = field(default_factory=lambda: Curves({}))
    samples: bytes | None = None
    class_names: Sequence[str] | None = None
    columns: Sequence[str] | None = None
    options: Sequence[tuple[str, str]] = ()
    command: str | None = None
    notes: Sequence[str] = ()


def described(model: Autoencoder, prior: nn.Module | None, name: str) -> str:
    """A line that says what a model is, and which prior it has, called by that name; None where none was trained."""
    quantizer = getattr(model, "quantizer", None)
    grid = "x".join(map(str, model.grid))
    if quantizer is None:
        latents = f"real vectors on a grid of {grid}"
    else:
        latents = f"{type(quantizer).__name__}, {model.num_codes:,} codes on a grid of {grid}"
    parts = [type(model).__name__, latents, f"{type(model.likelihood).__name__} likelihood", _weights(model)]
    return " · ".join([*parts, "no prior yet" if prior is None else f"{name} prior, {_weights(prior)}"])


def _weights(of: nn.Module) -> str:
    return f"{sum(each.numel() for each in of.parameters()):,} weights"


def run_page(contents: RunContents) -> str:
    """The page of a run as the text of an HTML file."""
    figures = contents.figures
    images = f"{figures['images']:,} {_images(figures)} of {contents.data}"
    return page(
        f"{contents.name}: report",
        element("p", "Report of a run", class_="eyebrow"),
        element("h1", contents.name),
        element("p", contents.model, class_="what"),
        notes(contents.notes),
        head_row(_heads(figures)),
        section(
            "Bits", f"What {images} cost, on average, and where the bits go.", _split_bar(figures), *_bits(figures)
        ),
        *(_eye(looks) for looks in contents.looks),
        _training(contents.curves),
        _reconstructions(contents),
        _samples(contents),
        _usage(contents),
        _each_image(contents),
        _options(contents),
        element("footer", "Written by vqvae report. All of this page is in this one file."),
    )


def _images(figures: Figures) -> str:
    return {"train": "training images", "test": "test images"}.get(str(figures["split"]), "images")


def _heads(figures: Figures) -> list[tuple[str, str, str]]:
    heads = [
        (
            "bits/dim",
            said(figures["bits_per_dim"], ".3f"),
            f"negative ELBO, {said(figures['negative_elbo'], ',.1f')} nats an image",
        ),
        ("PSNR of reconstructions", said(figures["psnr"], ".2f", " dB"), "mean over images"),
    ]
    if figures["kl"] is None:
        heads.append(
            ("usage of codes", said(figures["usage"], ".1%"), f"perplexity {said(figures['perplexity'], ',.1f')}")
        )
    else:
        heads.append(
            ("active channels", said(figures["usage"], ".1%"), f"KL {said(figures['kl'], ',.1f')} nats an image")
        )
    if figures["seconds"] is not None:
        heads.append(("time", duration(figures["seconds"]), "training and evaluation"))
    return heads


def _split_bar(figures: Figures) -> Markup | None:
    """Rate and distortion as parts of the whole."""
    rate, distortion = figures.rate, figures["distortion"]
    if rate is None or distortion is None or rate < 0 or distortion < 0 or not rate + distortion:
        return None
    bits = {"rate": figures.bits(rate), "distortion": figures.bits(distortion)}
    total = sum(bits.values())
    parts = [
        element("div", class_=f"c{at}", style=f"flex: {value / total:.4f}") for at, value in enumerate(bits.values())
    ]
    legend = [
        element("span", element("i", class_=f"chip c{at}"), f"{name} {value:.3f} bits/dim, {value / total:.0%}")
        for at, (name, value) in enumerate(bits.items())
    ]
    told = ", ".join(f"{name} {value:.3f} bits/dim" for name, value in bits.items())
    return joined(
        element("div", *parts, class_="split", role="img", aria_label=told), element("div", *legend, class_="legend")
    )


def _bits(figures: Figures) -> list[Markup | None]:
    heads = ["", "nats/image", "bits/dim"]
    rows: list[list[Any]] = [[name, *figures.nats(nats)] for name, nats in figures.rows()]
    if figures["importance_weighted"] is not None:
        rows.append([f"on {figures['draws']} draws together", *figures.nats(figures["importance_weighted"])])
    if figures["features_distortion"] is not None:
        rows.append(["distortion, no context", *figures.nats(_number(figures["features_distortion"]))])
    if figures["kl"] is not None:
        rows.append(["KL to N(0, I)", *figures.nats(figures["kl"])])
    error = figures["rate_error"]
    under = [
        "Rate: the latents under each prior. Distortion: the 8-bit pixels under the decoder's likelihood. The negative "
        "ELBO is that of the last prior. "
        f"Over {figures['images']:,} {_images(figures)} of {figures['dims']:,} dimensions"
        + (f"; {figures['skipped']:,} more could not be read" if figures["skipped"] else "")
        + (
            f"; rates are means over {figures['draws']} draws, standard error {said(error, '.2g')} nats"
            if error
            else ""
        )
        + "."
    ]
    parts: list[Markup | None] = [
        table(heads, rows, class_="sums"),
        *(element("p", each, class_="under") for each in under),
    ]
    if instead := figures.rows("deterministic"):
        parts.append(
            details(
                "With the most probable codes instead",
                table(heads, [[name, *figures.nats(_number(nats))] for name, nats in instead]),
            )
        )
    return parts


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def eye_rows(estimates: Mapping[str, Any]) -> list[list[str]]:
    """Figures of the eye: name, value and interval."""
    return [
        [name, said(each.get("value"), ".5g"), f"{said(each.get('low'), '.5g')} to {said(each.get('high'), '.5g')}"]
        for name, each in estimates.items()
    ]


def protocol(looks: Mapping[str, Any]) -> Markup:
    """What figures of the eye were measured with."""
    rows = [[name, value] for name, value in looks["protocol"].items()]
    return details("What they were measured with", table([], rows, class_="words"))


def _eye(looks: Mapping[str, Any]) -> Markup | None:
    parts: list[object] = []
    for kind, title in (("reconstructions", "Reconstructions"), ("samples", "Samples")):
        if estimates := looks.get(kind):
            count = f", {looks.get('num_samples')} of them" if kind == "samples" else ""
            parts += [element("h3", title + count), table(["", "value", "95 % interval"], eye_rows(estimates))]
    says = (
        "How near reconstructions and samples are to the images in the eyes of other networks, which bits do not tell."
    )
    return section("Figures of the eye", says, *parts, protocol(looks))


def _training(curves: Curves) -> Markup | None:
    parts: list[object] = []
    for stage in curves.stages:
        first, rest = curves.names(stage)
        shown = beside_each_other([curves.chart(stage, name) for name in first])
        more = beside_each_other([curves.chart(stage, name) for name in rest])
        if shown or more:
            parts += [element("h3", stage), shown]
        if more:
            parts.append(details("More curves", more))
    says = (
        "Each stage by its steps; the test images are the first few hundred, and nothing is chosen by them. Usage and "
        "perplexity of training are those of one batch, which has too few positions to use every code."
    )
    return section("Training", says, *parts)


def pixels(image: Any, side: int, alt: str) -> Markup:
    """An image of the page; one of few pixels stays sharp where it is enlarged."""
    sharp = max(image.shape[-2:]) <= side
    return picture(thumbnail(image, side), alt, class_="pixels" if sharp else None)


def _pairs(shown: Shown, contents: RunContents, side: int, column: int) -> Markup:
    cells = []
    for at in range(len(shown)):
        number, label, decibels = int(shown.index[at]), int(shown.labels[at]), shown.psnr[at].item()
        name = f"image {number}"
        if contents.class_names is not None and 0 <= label < len(contents.class_names):
            name += f", {contents.class_names[label]}"
        bits = contents.figures.bits(shown.nats[at].item())
        under = element(
            "div",
            element("b", said(bits, ".2f")),
            " bits/dim",
            element("br"),
            said(decibels, ".1f", " dB") if math.isfinite(decibels) else "equal",
            element("br"),
            name,
            class_="under",
        )
        cells.append(
            element(
                "figure",
                pixels(shown.images[at], side, f"{name}"),
                pixels(shown.reconstructions[at], side, f"reconstruction of {name}"),
                under,
            )
        )
    return element("div", *cells, class_="pairs", style=f"--side: {column}px")


def _reconstructions(contents: RunContents) -> Markup | None:
    shown = contents.gallery.first
    column = 112 if max(shown.images.shape[-2:]) <= 64 else 150
    says = "The first images, each above what the decoder makes of its codes."
    if contents.figures["kl"] is not None:
        says = "The first images, each above what the decoder makes of its latents."
    return section("Reconstructions", says, _pairs(shown, contents, _SIDE, column))


def _samples(contents: RunContents) -> Markup | None:
    if contents.samples is None:
        return None
    names = contents.columns or ()
    by_class = "A class in each column: " + ", ".join(names[:10]) + "." if names else ""
    alt = f"Samples of the prior. {by_class}".strip()
    return section(
        "Samples",
        f"New images: codes that the prior sampled, decoded. {by_class}".strip(),
        picture(of_at_most(contents.samples, _MOST_BYTES), alt, class_="wide"),
    )


def _usage(contents: RunContents) -> Markup | None:
    usage = contents.usage
    if isinstance(usage, ChannelUsage):
        heights = sorted(usage.channels, reverse=True)
        title = f"KL of each channel to N(0, 1): {usage.usage:.1%} of {usage.dim} are active"
        chart = charts.bars(
            title, [float(at) for at in range(len(heights) + 1)], heights, "channel, highest first", "nats a position"
        )
        says = "A channel near zero says nothing about its image."
        return section("Usage of channels", says, beside_each_other([chart]))
    series = []
    shares = [counts.sort(descending=True).values.double() / counts.sum().clamp_min(1) for counts in usage.counts]
    shown = min(usage.num_codes, max(2 * max(len(share) for share in shares), 64))
    for number, share in enumerate(shares[: charts.NUM_COLOURS]):
        heights = share.tolist() + [0.0] * (shown - len(share))
        name = "share" if len(shares) == 1 else f"codebook {number}"
        series.append(charts.Series(name, [(float(at), each) for at, each in enumerate(heights, start=1)], number))
    even = 1 / usage.num_codes
    series.append(charts.Series("even use", [(1.0, even), (float(shown), even)], 5, True))
    title = f"Share of positions of each code: {usage.usage:.1%} of {usage.num_codes:,} are used"
    chart = charts.lines(title, series, "code, most frequent first", "share", is_training=False)
    of = "" if len(shares) == 1 else f", means over {len(shares)} codebooks"
    of += f", of which the first {charts.NUM_COLOURS} are drawn" if len(shares) > charts.NUM_COLOURS else ""
    says = (
        f"How often each code occurs in {len(contents.gallery):,} images: perplexity {usage.perplexity:,.1f}, which an "
        f"even use of all would make {usage.num_codes:,}{of}."
    )
    return section("Usage of codes", says, beside_each_other([chart]))


def _each_image(contents: RunContents) -> Markup | None:
    gallery, bits = contents.gallery, contents.figures.bits
    rates = [bits(value) for value in gallery.rates.tolist()]
    distortions = [bits(value) for value in gallery.distortions.tolist()]
    every = math.ceil(len(rates) / _MOST_DOTS)
    points = list(zip(rates, distortions, strict=True))
    ends = {int(at) for shown in (gallery.best, gallery.worst) for at in shown.index.tolist()}
    marked = charts.Series("cheapest and dearest", [points[at] for at in sorted(ends)], 1)
    dots = charts.Series("images", points[::every], 0, True)
    scatter = charts.scatter(
        "Rate and distortion of each image", [dots, marked], "rate, bits/dim", "distortion, bits/dim"
    )
    totals = [rate + distortion for rate, distortion in points]
    counts = charts.histogram("What images cost", totals, "bits/dim", "images")
    says = f"What each of {len(gallery):,} images costs by itself, under the last prior."
    return section(
        "Image by image",
        says,
        beside_each_other([scatter, counts]),
        element("h3", f"The {len(gallery.best)} that cost least"),
        _pairs(gallery.best, contents, _SMALL_SIDE, 92),
        element("h3", f"The {len(gallery.worst)} that cost most"),
        _pairs(gallery.worst, contents, _SMALL_SIDE, 92),
    )


def _options(contents: RunContents) -> Markup | None:
    figures = contents.figures
    marks = {"models": "weights of model and prior", "tokenizer": "tokenizer", "data_digest": "images"}
    digests = [[told, figures[name]] for name, told in marks.items() if isinstance(figures[name], str)]
    parts: list[object] = []
    if contents.command is not None:
        parts += [
            element("p", "The command line that trains such a run; a path is named by its last part.", class_="says"),
            command(contents.command),
        ]
    if contents.options:
        options = table([], [[name, value] for name, value in contents.options], class_="words")
        parts.append(details("All options", options))
    parts.append(details("Versions that wrote this page", versions()))
    if digests:
        parts.append(details("Digests", table([], digests, class_="words")))
    return section("Options and how to reproduce", None, *parts)
