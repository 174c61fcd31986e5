"""Pages that show files of the repository, for links that lead to one which is no page itself.

    [the loop](../vqvae/training/loop.py)       source/vqvae/training/loop.py.html
    [`test_x`](../tests/test_y.py)              the same, at the line of that function
    [tests](../tests)                           a list of what is in the folder

On a git host the same links lead to the same files.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from docutils import nodes
from markupsafe import escape
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

FOLDER = "source"


class SourceLinks(SphinxTransform):
    """Links to files and folders that are no pages become links to their page under `source/`."""

    default_priority = 1  # before what makes downloads of them

    def apply(self, **options: Any) -> None:
        root = Path(self.env.srcdir).resolve()
        here = root / Path(self.env.docname).parent
        for link in [
            *self.document.findall(addnodes.download_reference),
            *self.document.findall(addnodes.pending_xref),
        ]:
            target = unquote(str(link.get("reftarget", "")).partition("#")[0])
            path = (root / target[1:] if target.startswith("/") else here / target).resolve()
            if not target or not path.is_relative_to(root) or not path.exists():
                continue
            name = path.relative_to(root).as_posix()
            if path.is_file() and self.env.path2doc(str(path)) in self.env.found_docs:
                continue
            shown: set[str] = self.env.metadata[self.env.docname].setdefault("shown", set())  # pyrefly: ignore
            shown.add(name)
            up = "../" * self.env.docname.count("/")
            line = _line_of(path, link.astext())
            uri = f"{up}{FOLDER}/{name}.html{line and f'#line-{line}'}"
            link.replace_self(nodes.reference("", "", *link.children, internal=True, refuri=uri))


def _line_of(path: Path, text: str) -> str:
    """The line of a function whose name a link has for its text."""
    if path.suffix == ".py" and re.fullmatch(r"\w+", text):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if line.startswith((f"def {text}(", f"class {text}")):
                return str(number)
    return ""


def _pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    root = Path(app.srcdir)
    names = sorted({name for data in app.env.metadata.values() for name in data.get("shown", ())})  # pyrefly: ignore
    for name in names:
        path = root / name
        body = _folder(path, root, names) if path.is_dir() else _file(path)
        yield (
            f"{FOLDER}/{name}",
            {"title": name, "body": f"<h1>{escape(name)}</h1>\n{body}", "parents": []},
            "page.html",
        )


def _file(path: Path) -> str:
    try:
        lexer = get_lexer_for_filename(path.name)
    except ClassNotFound:
        lexer = TextLexer()
    shown = highlight(path.read_text(encoding="utf-8"), lexer, HtmlFormatter(lineanchors="line", cssclass="highlight"))
    # The theme colours what stands in such a block.
    return f'<div class="source-file highlight-python notranslate">{shown}</div>'


def _folder(path: Path, root: Path, shown: list[str]) -> str:
    """What is in a folder, with links to what has a page."""
    rows = []
    for each in sorted(path.iterdir()):
        if not each.name.startswith((".", "__pycache__")):
            known = each.relative_to(root).as_posix() in shown
            name = escape(each.name)
            rows.append(f'<li><a href="{path.name}/{name}.html">{name}</a></li>' if known else f"<li>{name}</li>")
    return f"<ul>{''.join(rows)}</ul>"


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_transform(SourceLinks)
    app.connect("html-collect-pages", _pages)
    return {"parallel_read_safe": True}
