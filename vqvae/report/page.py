"""What the pages of reports share: one file with all in it, which needs no network and runs no script."""

import functools
import platform
import shlex
from collections.abc import Sequence
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import safefolder
from vqvae.report.markup import Markup, element, joined, table

_PACKAGES = ("vqvae-priors", "torch", "numpy")


def page(title: str, *parts: object) -> str:
    """The text of an HTML file."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        # Nothing is fetched, whatever a name in the page might say.
        element(
            "meta",
            http_equiv="Content-Security-Policy",
            content="default-src 'none'; img-src data:; style-src 'unsafe-inline'",
        ),
        element("title", title),
        element("style", _style()),
    )
    body = element("body", element("main", *parts))
    return f'<!DOCTYPE html>\n<html lang="en">\n{head}\n{body}\n</html>\n'


def write(path: Path, text: str) -> None:
    """Write a page whole or not at all."""
    safefolder.files.write_text(path, text)


def section(title: str, says: str | None, *children: object) -> Markup | None:
    """A part of a page with a sentence that says what is seen; None where there is nothing to see."""
    kept = [each for each in children if each]
    if not kept:
        return None
    return element("section", element("h2", title), element("p", says, class_="says") if says else None, *kept)


def charts(found: Sequence[Markup]) -> Markup | None:
    """Charts beside each other, as many as fit."""
    kept = [each for each in found if each]
    return element("div", *kept, class_="charts") if kept else None


def head_row(figures: Sequence[tuple[str, str, str]]) -> Markup:
    """The figures that one looks for first: name, value, and what else is to be said."""
    cards = [
        element("div", element("span", name), element("b", value), element("span", under), class_="head")
        for name, value, under in figures
    ]
    return element("div", *cards, class_="heads")


def notes(said: Sequence[str]) -> Markup:
    """What has to be known before one reads on."""
    return joined(*(element("p", each, class_="note") for each in said))


def command(line: str) -> Markup:
    """A command line that breaks between its options, and is copied as it is."""
    groups: list[list[str]] = [[]]
    for word in shlex.split(line):
        if word.startswith("--"):
            groups.append([])
        groups[-1].append(word)
    parts = [part for words in groups if words for part in (element("span", shlex.join(words)), " ")]
    return element("pre", *parts[:-1], class_="command")


def versions() -> Markup:
    """What this page was written with."""
    rows = [["Python", platform.python_version()]]
    for name in _PACKAGES:
        try:
            rows.append([name, version(name)])
        except PackageNotFoundError:
            rows.append([name, "not installed"])
    return table([], rows, class_="words")


@functools.cache
def _style() -> Markup:
    return Markup(resources.files("vqvae.report").joinpath("page.css").read_text(encoding="utf-8"))
