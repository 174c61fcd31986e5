"""HTML that is escaped unless it was made here: names of classes and folders are anybody's."""

import html
import io
from base64 import b64encode
from typing import Any

from PIL import Image

# Elements without an end tag: of HTML, and of SVG, where they are closed.
_EMPTY = {**dict.fromkeys(("meta", "img", "br"), ">"), **dict.fromkeys(("rect", "path", "line", "circle"), "/>")}


class Markup(str):
    """Text that is HTML already. All other text is escaped where it is put into an element."""

    __slots__ = ()


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element, with all that comes from outside escaped.

    >>> element("p", "a < b", class_="note")
    '<p class="note">a &lt; b</p>'

    Args:
        name: of the element.
        children: text, elements, or None, which is nothing.
        attributes: with an underscore for a hyphen, and one at the end of a name that Python has taken; those that are
            None are left out, and of True the name stands alone.
    """
    parts = [name]
    for key, value in attributes.items():
        written = key.removesuffix("_").replace("_", "-")
        if value is True:
            parts.append(written)
        elif value is not None:
            parts.append(f'{written}="{html.escape(str(value))}"')
    start = f"<{' '.join(parts)}"
    return Markup(start + _EMPTY[name] if name in _EMPTY else f"{start}>{joined(*children)}</{name}>")


def joined(*children: object) -> Markup:
    """Text and elements one after the other, escaped as `element` does."""
    return Markup("".join(_escaped(each) for each in children if each is not None))


def _escaped(value: object) -> str:
    if isinstance(value, Markup):
        return value
    return html.escape("".join(each if each.isprintable() or each == "\n" else "?" for each in str(value)))


def picture(png: bytes, alt: str, **attributes: object) -> Markup:
    """A picture that is in the page itself."""
    with Image.open(io.BytesIO(png)) as opened:
        width, height = opened.size
    source = f"data:image/png;base64,{b64encode(png).decode('ascii')}"
    return element("img", src=source, alt=alt, width=width, height=height, **attributes)


def table(heads: list[str], rows: list[list[Any]], **attributes: object) -> Markup:
    """A table whose first column names the rows; wider than the page, it scrolls by itself."""
    head = element("tr", *(element("th", each, scope="col") for each in heads))
    body = [
        element("tr", element("th", row[0], scope="row"), *(element("td", each) for each in row[1:])) for row in rows
    ]
    parts = [element("thead", head) if any(heads) else None, element("tbody", *body)]
    return element("div", element("table", *parts, **attributes), class_="scrolls")


def details(summary: str, *children: object) -> Markup:
    """What is shown when it is asked for."""
    return element("details", element("summary", summary), *children)
