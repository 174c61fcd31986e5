"""What a model's page on the hub says: a README.md with a header that the hub reads.

A card states what the model is, how to use it, and figures where they were measured; it makes up none. Figures are the
entries of an `elbo.json`: means over test images, in nats per image where nothing else is said. The header repeats
them to the last digit as the hub's `model-index`; the table rounds. What the model is comes as plain data: no class of
a model is known here.
"""

import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

LIBRARY = "vqvae-priors"
# What images are called, by the part of a set that they are.
_WHAT = {"test": "test images", "train": "training images", "all": "images"}
# Pictures of a run that a card shows, and what is said of them.
PICTURES = {
    "reconstructions.png": "Test images, and below each its reconstruction",
    "samples.png": "Images drawn from the prior",
    "usage.png": "How the latents are used",
}


class _Row(NamedTuple):
    """A measured figure: its key for the hub, its name and unit for people, and how the table writes it."""

    key: str
    name: str
    unit: str
    value: float
    shown: str


# Entries of elbo.json that are one number each: name, unit, digits after the point.
_NAMES: dict[str, tuple[str, str, str]] = {
    "bits_per_dim": ("Negative ELBO, a bound of the negative log-likelihood", "bits per dimension", ".4f"),
    "negative_elbo": ("Negative ELBO", "nats per image", ".2f"),
    "importance_weighted": ("Importance-weighted bound", "nats per image", ".2f"),
    "rate": ("Rate", "nats per image", ".2f"),
    "distortion": ("Distortion", "nats per image", ".2f"),
    "entropy": ("Entropy of the posterior", "nats per image", ".2f"),
    "kl": ("KL to N(0, I)", "nats per image", ".2f"),
    "psnr": ("PSNR of the reconstructions", "dB", ".2f"),
    "usage": ("Usage", "share of the codes or channels", ".1%"),
    "perplexity": ("Perplexity of the codes", "codes", ".1f"),
}


def card(
    *,
    title: str,
    summary: str,
    facts: Mapping[str, object],
    usage: str,
    tags: Sequence[str] = (),
    figures: Mapping[str, Any] | None = None,
    data: str | None = None,
    pictures: Sequence[str] = (),
    pipeline_tag: str | None = None,
) -> str:
    """The text of a README.md.

    Args:
        title: the heading, and the model's name in the header.
        summary: what it is, in a sentence or two of Markdown.
        facts: a table of what it is made of.
        usage: Markdown with the lines that load and use it.
        tags: for the hub's search.
        figures: as in elbo.json; None or an empty mapping where nothing was measured, which the card then says.
        data: what the test images are called.
        pictures: names among `PICTURES` that lie beside the card.
        pipeline_tag: the hub's name of the task.

    Raises:
        ValueError: a figure that is no number.
    """
    title, rows = _line(title), list(_rows(figures or {}))
    parts = [f"# {title}", summary.strip(), _table(("", ""), [(name, str(value)) for name, value in facts.items()])]
    parts += ["## Use", f"```sh\npip install {LIBRARY}\n```", usage.strip(), "## Figures"]
    if rows:
        parts += [_about(figures or {}, data)]
        parts += [_table(("figure", "value", "unit"), [(row.name, row.shown, row.unit) for row in rows])]
    else:
        parts += ["No figures were measured with this model, so this card states none."]
    if known := [name for name in PICTURES if name in pictures]:
        parts += ["## Pictures", *(f"{PICTURES[name]}:\n\n![{PICTURES[name]}]({name})" for name in known)]
    split = _split(figures or {})
    header = _header(title, rows, tags=tags, data=data, split=split, pipeline_tag=pipeline_tag)
    return f"---\n{header}\n---\n\n" + "\n\n".join(parts) + "\n"


def import_line(kind: type) -> str:
    """The line that imports a class, from its package where that exports it."""
    package = kind.__module__.partition(".")[0]
    is_public = getattr(sys.modules.get(package), kind.__name__, None) is kind
    return f"from {package if is_public else kind.__module__} import {kind.__name__}"


def python(*lines: str) -> str:
    """Lines of Python as Markdown."""
    return "\n".join(["```python", *lines, "```"])


def model_facts(model: Any) -> dict[str, object]:
    """What a model over a grid of latents is made of: its class, `grid`, `parameters()` and, if any, `num_codes`."""
    facts: dict[str, object] = {"class": f"`{type(model).__name__}`", "grid": " × ".join(map(str, model.grid))}
    num_codes = getattr(model, "num_codes", None)  # vectors have none
    if num_codes is not None:
        bits = math.prod(model.grid) * math.log2(num_codes)
        facts |= {"num_codes": f"{num_codes:,}", "bits per image of uniform codes": f"{bits:,.1f}"}
    return {**facts, "parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}"}


def loading(kind: type, source: str, **options: str | None) -> str:
    """The expression that loads a model, with those of `HubOptions` that are given."""
    given = [f"{name}={json.dumps(value)}" for name, value in options.items() if value is not None]
    return f"{kind.__name__}.from_pretrained({', '.join([json.dumps(source), *given])})"


def public_name(source: str) -> str:
    """What others may be shown of where images came from: the name of a set, or of a path its last part alone."""
    is_path = source.startswith(("/", ".", "~")) or source.count("/") > 1 or "\\" in source or Path(source).exists()
    return (Path(source).name or "images") if is_path else source


def data_of(figures: Mapping[str, Any] | None) -> str | None:
    """What the images of the figures are called, without where they lie."""
    data = None if figures is None else figures.get("data")
    return public_name(data) if isinstance(data, str) else None


def _rows(figures: Mapping[str, Any]) -> Iterator[_Row]:
    for key, (name, unit, digits) in _NAMES.items():
        value = figures.get(key)
        several = value if isinstance(value, Mapping) else {None: value}
        for part, number in several.items():
            if number is None:  # not measured, or not of this kind of model
                continue
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise ValueError(f"got {number!r} for the figure {key!r}, expected a number, as elbo.json has")
            of = "" if part is None else f", {_line(str(part))} prior"
            short = key if part is None else f"{key}_{re.sub('[^A-Za-z0-9]+', '_', str(part))}"
            yield _Row(short, name + of, unit, number, format(number, digits))


def _about(figures: Mapping[str, Any], data: str | None) -> str:
    """What the figures are means over."""
    images, skipped, seed = (figures.get(name) for name in ("images", "skipped", "seed"))
    text = f"Means over {'the' if images is None else f'{images:,}'} {_WHAT[_split(figures)]}"
    text += "" if data is None else f" of {_line(data)}"
    text += f"; {skipped:,} more could not be read" if skipped else ""
    text += "" if seed is None else f"; seed {seed}"
    return f"{text}. A nat is 1.4427 bits; a dimension is one channel of one pixel."


def _split(figures: Mapping[str, Any]) -> str:
    """Which part of a set figures are of: "test" where they say no other."""
    split = figures.get("split")
    return split if isinstance(split, str) and split in _WHAT else "test"


def _header(
    title: str, rows: Sequence[_Row], *, tags: Sequence[str], data: str | None, split: str, pipeline_tag: str | None
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    name = f"unnamed {_WHAT[split]}" if data is None else _line(data)
    about: dict[str, Any] = {
        "task_type": pipeline_tag or "image-compression",
        "dataset_type": re.sub("[^A-Za-z0-9._/-]+", "-", name),
        "dataset_name": name,
        "dataset_split": split,
    }
    results = [
        EvalResult(metric_type=row.key, metric_name=f"{row.name} ({row.unit})", metric_value=row.value, **about)
        for row in rows
        if math.isfinite(row.value)  # the hub's JSON knows no infinite PSNR
    ]
    measured: dict[str, Any] = {"model_name": title, "eval_results": results} if results else {}
    return ModelCardData(library_name=LIBRARY, tags=list(tags), pipeline_tag=pipeline_tag, **measured).to_yaml()


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_line(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _line(text: str) -> str:
    return " ".join(text.split())
