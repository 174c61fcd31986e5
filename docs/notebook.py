"""Runs the notebook docs/first-look.md, and writes the pictures that its page shows.

    pip install -e '.[dev]'
    python docs/notebook.py                   # into docs/figures/, about a minute on one core
    python docs/notebook.py FOLDER            # or elsewhere, as its test does

Cells run one after the other in one namespace, as in a notebook, and what the last line of a cell gives is printed. A
cell that leaves a `figure` is followed by a picture, whose name on the page is the file's.
"""

import argparse
import ast
import io
import re
from pathlib import Path
from typing import Any

import jupytext
import matplotlib
import torch
from PIL import Image

import safefolder

PAGE = Path(__file__).with_name("first-look.md")


def run(folder: Path) -> dict[str, Any]:
    """What all cells together leave; their pictures go into a folder."""
    cells = jupytext.read(PAGE).cells  # pyrefly: ignore[missing-attribute]
    names = iter(re.findall(r"!\[[^\]]*\]\(figures/(\w+\.png)\)", PAGE.read_text(encoding="utf-8")))
    found: dict[str, Any] = {}
    for number, cell in enumerate(each for each in cells if each.cell_type == "code"):
        tree = ast.parse(cell.source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"cell {number}", "exec"), found)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), found)
            print("" if value is None else value)
        if "figure" in found:
            drawn = io.BytesIO()
            found.pop("figure").savefig(drawn, dpi=100, format="png")
            with safefolder.files.replacing(folder / next(names)) as scratch:
                Image.open(drawn).convert("RGB").quantize(96).save(scratch, format="png", optimize=True)
    assert next(names, None) is None, "a picture of the page that no cell draws"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=PAGE.parent / "figures")
    matplotlib.use("agg")
    torch.set_num_threads(1)
    run(parser.parse_args().folder)


if __name__ == "__main__":
    main()
