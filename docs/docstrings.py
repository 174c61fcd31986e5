"""Docstrings of this project, which are plain text, as reStructuredText for the reference.

Plain text says `code` in single backquotes, code and equations indented by four, lists by dashes, tables by columns
that stand under each other, and entries under "Args:", "Attributes:", "Returns:", "Yields:" and "Raises:". Everything
else is words, in which no character means anything but itself.
"""

import ast
import re
from collections.abc import Iterator
from typing import Any

from names import CONSTANTS  # pyrefly: ignore  (beside this file)
from sphinx.application import Sphinx
from sphinx.domains.python import PyObject
from sphinx.util.typing import stringify_annotation

from safefolder import arrays
from safefolder.configured import Configured, option_sentences
from vqvae import levels

# Types that stand in many signatures, by their names; docs/reference/types.md says what they are.
ALIASES = {
    stringify_annotation(value, "smart"): name
    for module, names in ((arrays, ("Codes", "Labels", "Mask", "Latents", "Vectors")), (levels, ("Images",)))
    for name in names
    for value in [getattr(module, name)]
}

# How each kind of entry is called in a list of fields.
FIELDS = {"Args": "param", "Attributes": "ivar", "Raises": "raises"}
WHOLE = {"Returns": "returns", "Yields": "returns"}
_ENTRY = re.compile(r"(\*{0,2}\w+(?:, \*{0,2}\w+)*): (.*)")
_ITEM = re.compile(r"(?:- |\d+\. )")
_BORDER = "\\ "
_CODE = re.compile(r"(`[^`]+`)")


def restructured(text: str) -> list[str]:
    """The lines of a docstring, its indentation taken off, as reStructuredText."""
    lines: list[str] = []
    for block in _blocks(text.expandtabs().splitlines()):
        lines += [*_written(block), ""]
    return lines


def _blocks(lines: list[str]) -> Iterator[list[str]]:
    """Paragraphs, lists, sections and indented blocks, each whole; blank lines inside of what is indented are kept."""
    block: list[str] = []
    for line in [*lines, ""]:
        heading = line.rstrip(":") in FIELDS or line.rstrip(":") in WHOLE
        indented = line.startswith("    ")
        inside = bool(block) and (block[0].startswith("    ") or block[0].rstrip(":") in FIELDS | WHOLE)
        starts = heading or _ITEM.match(line) or (indented and not inside and not _is_item(block))
        if not line and inside:
            block.append(line)  # whether what follows belongs to it, shows then
        elif not line or starts or (inside and not indented):
            if any(block):
                yield block
            block = [line] if line else []
        else:
            block.append(line)
    if any(block):
        yield block


def _is_item(block: list[str]) -> bool:
    return bool(block) and _ITEM.match(block[0]) is not None


def _written(block: list[str]) -> list[str]:
    while not block[-1]:
        block = block[:-1]
    name = block[0].rstrip(":")
    if name in FIELDS:
        return _entries(FIELDS[name], [line[4:] for line in block[1:]])
    if name in WHOLE:
        return [f":{WHOLE[name]}: {words(' '.join(line.strip() for line in block[1:]))}"]
    if block[0].startswith("    "):
        return _verbatim([line[4:] for line in block])
    if _is_item(block):
        first, *others = block
        mark = _ITEM.match(first)[0]  # pyrefly: ignore[unsupported-operation]
        text = " ".join([first[len(mark) :], *(line.strip() for line in others)])
        return [f"{mark}{words(text)}"]
    if block[0].startswith(">>> "):
        return [".. code-block:: pycon", "", *(f"   {line}" for line in block)]
    if len(block) > 1 and all(re.search(r"\S {2,}\S", line) for line in block):
        return _verbatim(block)
    return [words(" ".join(line.strip() for line in block))]


def _entries(field: str, lines: list[str]) -> list[str]:
    """A field a name; what is indented further than a name goes on with its sentence."""
    found: list[list[str]] = []
    shared = 0
    for line in lines:
        entry = _ENTRY.fullmatch(line)
        if entry:
            found += [[name.lstrip("*"), entry[2]] for name in entry[1].split(", ")]
            shared = entry[1].count(",") + 1
        elif found and line:
            for each in found[-shared:]:
                each[1] += f" {line.strip()}"
    return [f":{field} {name}: {words(text)}" for name, text in found]


def _verbatim(lines: list[str]) -> list[str]:
    """Blocks of code as they stand; what is Python, and a table of files under it, are blocks of their own."""
    parts: list[tuple[str, list[str]]] = []
    for part in "\n".join(lines).split("\n\n"):
        language = "python" if _is_python(part) else "text"
        if parts and parts[-1][0] == language:
            parts[-1][1].extend(["", *part.split("\n")])
        else:
            parts.append((language, part.split("\n")))
    return [
        written
        for language, part in parts
        for written in (f".. code-block:: {language}", "", *(f"   {line}" if line else "" for line in part), "")
    ]


def _is_python(text: str) -> bool:
    """Whether some lines are Python, and do something."""
    try:
        nodes = [*ast.walk(ast.parse(text))]
    except SyntaxError:
        return False
    return any(isinstance(node, ast.Call | ast.Assign | ast.Import | ast.ImportFrom) for node in nodes)


def words(text: str) -> str:
    """Words in which nothing is markup but `code`."""
    written = ""
    for part in _CODE.split(text):
        if _CODE.fullmatch(part):
            # Code that touches a letter, as in `x`s, needs a border that nobody sees.
            written += f"{_BORDER if written[-1:].isalnum() else ''}`{part}`"
        else:
            touches = written.endswith("`") and part[:1].isalnum()
            written += (_BORDER if touches else "") + re.sub(r"([\\*_|`<>])", r"\\\1", part)
    return written


def _process(app: Sphinx, kind: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    constant = CONSTANTS.get(name.rpartition(".")[2]) if kind == "data" else None
    lines[:] = restructured(constant or "\n".join(lines))
    if kind == "class" and issubclass(value, Configured):
        own = [line for line in lines if line.startswith(":param ")]
        said = {line.split()[1].rstrip(":") for line in own}
        # Options that it has from classes before it stand in their docstrings, which may not be public.
        more = [f":param {each}: {words(text)}" for each, text in option_sentences(value).items() if each not in said]
        at = lines.index(own[-1]) + 1 if own else len(lines)
        lines[at:at] = more


def _sign(
    app: Sphinx, kind: str, name: str, value: Any, options: Any, signature: str | None, answer: str | None
) -> tuple[str | None, str | None] | None:
    """Signatures as they stand in the code: types that have a name by that, and a Config by the class that it is of."""
    if signature in ("(*args, **kwargs)", "(**options)") and kind == "class":
        return "", None  # abstract
    return _named(signature), _named(answer)


def _named(text: str | None) -> str | None:
    if text is None:
        return None
    for written, name in ALIASES.items():
        text = text.replace(written, name)
    text = re.sub(r"~[\w.]*?(\w+)\.Config\b(?!\()", r"\1.Config", text)
    return re.sub(r"~?(?:\w+\.)*Annotated\[(.*?), ~?'given'\]", r"\1", text)


def _skip(app: Sphinx, kind: str, name: str, value: Any, skip: bool, options: Any) -> bool | None:
    """Public constants have their sentence in docs/names.py. `Config` is made of the signature that stands above, and
    an estimator is a function with a place of its own."""
    if name in CONSTANTS:
        return False
    return True if name in ("Config", "estimator") else None


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", _process)
    app.connect("autodoc-process-signature", _sign)
    app.connect("autodoc-skip-member", _skip)
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    return {"parallel_read_safe": True}
