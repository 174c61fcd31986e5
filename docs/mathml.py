"""Equations as MathML: drawn by the browser, with no script and no network."""

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

# Sizes of brackets, and negative space: MathML has brackets grow by themselves.
_LEFT_OUT = re.compile(r"\\(?:[bB]igg?[lr]?(?![a-zA-Z])|!)")
# Of a logarithm without brackets, browsers put no space before its argument.
_LOGARITHM = re.compile(r"\\ln(?![a-zA-Z(])")


def _mathml(text: str, block: bool = False) -> str:
    text = _LEFT_OUT.sub("", text).replace(r"\dots", r"\ldots")
    return latex2mathml.tex2mathml(_LOGARITHM.sub(r"\\ln\\,", text), as_block=block)


def _inline(writer: HTML5Translator, node: nodes.math) -> None:
    writer.body.append(_mathml(node.astext()))
    raise nodes.SkipNode


def _block(writer: HTML5Translator, node: nodes.math_block) -> None:
    writer.body.append(f'<div class="math">{_mathml(node.astext(), block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))  # pyrefly: ignore[bad-argument-type]
    return {"parallel_read_safe": True}
