"""What makes a site of the pages: docstrings, equations, the notebook. `.ci/run` builds it, with warnings as errors."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture
def of_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules beside the pages can be imported."""
    pytest.importorskip("sphinx", reason="needs the extra `docs`")
    monkeypatch.syspath_prepend(str(DOCS))


def test_every_page_is_in_the_contents():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = re.findall(
        r"^(?:[\w ]+<)?([\w./-]+)>?$", "\n".join(re.findall(r"```{toctree}\n(.*?)```", index, re.DOTALL)), re.M
    )
    pages = {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.glob("**/*.md")} - {"index"}
    beyond = {
        "../README",
        "../CONTRIBUTING",
        "../SECURITY",
        "../CHANGELOG",
        "../examples/README",
        "../benchmarks/README",
        "../safefolder/models/README",
    }
    assert sorted(listed) == sorted(pages | beyond)
    assert all((DOCS / f"{name}.md").exists() for name in listed)


def test_the_reference_is_of_the_public_packages(of_docs):
    import names

    pages = [path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md") if path.stem != "types"]
    assert sorted(re.findall(r"automodule:: (\S+)", "".join(pages))) == sorted(names.PACKAGES)


def test_types_with_a_name_are_explained(of_docs):
    import docstrings

    page = (DOCS / "reference" / "types.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"py:data:: (\w+)", page)) == sorted(docstrings.ALIASES.values())


DOCSTRING = """Any `code`s of "b *grid d", x_i and |x|.

    q = FSQ(levels=(8, 5))(z_e)

    fsq.py      rounding

- one
- two that
  goes on

kind   codes
FSQ    rounded

>>> 1 + 1
2

Args:
    a, b: two *things*,
        both `int`.
    c: one.

Raises:
    ValueError: never.
"""
WRITTEN = """Any ``code``\\ s of "b \\*grid d", x\\_i and \\|x\\|.

.. code-block:: python

   q = FSQ(levels=(8, 5))(z_e)

.. code-block:: text

   fsq.py      rounding


- one

- two that goes on

.. code-block:: text

   kind   codes
   FSQ    rounded


.. code-block:: pycon

   >>> 1 + 1
   2

:param a: two \\*things\\*, both ``int``.
:param b: two \\*things\\*, both ``int``.
:param c: one.

:raises ValueError: never.
"""


def test_plain_docstrings_become_markup(of_docs):
    import docstrings

    assert "\n".join(docstrings.restructured(DOCSTRING)) == WRITTEN


def test_signatures_have_types_by_their_names(of_docs):
    import docstrings
    from sphinx.util.typing import stringify_annotation

    from priors.base import Prior
    from vqvae.quantizers import Quantizer

    assert docstrings._named(stringify_annotation(Prior.log_prob.__annotations__["codes"], "smart")) == "Codes"
    assert docstrings._named(stringify_annotation(Quantizer.Config, "smart")) == "Quantizer.Config"
    assert docstrings._named("(grid: ~typing.Annotated[int | None, 'given'] = None)") == "(grid: int | None = None)"


def test_every_equation_is_drawn(of_docs):
    import mathml

    text = "".join(page.read_text(encoding="utf-8") for page in DOCS.glob("*.md"))
    found = re.findall(r"^```math\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    found += re.findall(r"\$([^$\n]+)\$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    assert len(found) > 40
    assert all(mathml._mathml(each).startswith("<math") for each in found)


def test_a_link_to_a_test_leads_to_its_line(of_docs):
    import source_pages

    path = Path(__file__)
    line = source_pages._line_of(path, "test_a_link_to_a_test_leads_to_its_line")
    assert path.read_text(encoding="utf-8").splitlines()[int(line) - 1].startswith("def test_a_link_to_a_test")
    assert source_pages._line_of(path, "the words of a link") == ""


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    """All cells, offline and with warnings as errors: it draws the pictures that the page shows, and learns."""
    pytest.importorskip("jupytext", reason="needs the extra `dev`")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", str(DOCS / "notebook.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    pixel, code = (float(re.search(rf"([\d.]+) bits a {each}[,;]", done.stdout)[1]) for each in ("pixel", "code"))
    assert pixel < 4.5  # of 8
    assert code < 3.5  # of 6
    drawn = sorted(path.name for path in tmp_path.glob("*.png"))
    assert drawn == sorted(path.name for path in (DOCS / "figures").glob("first_look_*.png"))
    for name in drawn:
        with Image.open(tmp_path / name) as new, Image.open(DOCS / "figures" / name) as shown:
            assert new.size == shown.size
