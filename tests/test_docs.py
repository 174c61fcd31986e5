"""The pages under docs, and the README's links: every file is there, every test named is a test, every example runs."""

import ast
import functools
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lanes import some

import priors
import vqvae
from vqvae import cli
from vqvae.training import parsing

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
ELBO_PAGE = ROOT / "docs" / "elbo.md"
WITH_PYTHON = [
    README,
    *(ROOT / "docs" / f"{name}.md" for name in ("elbo", "reuse", "codec", "priors", "training", "quantizers", "looks")),
    *(ROOT / "docs" / f"{name}.md" for name in ("start", "own-images", "demo")),
]


def prose(page: Path) -> str:
    """The text of a page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Text and target of each link and picture that leads to a file of the repository."""
    for text, target in re.findall(r"\[([^\]]+)\]\(([^)\s]+)\)", prose(page)):
        if not re.match(r"[a-z]+:", target):
            yield text, target


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    titles = re.findall(r"^#+ +(.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@functools.cache
def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    found, wrong = list(links(page)), []
    assert found
    for text, target in found:
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not (path.is_relative_to(ROOT) and path.exists()):
            wrong.append(f"{target} is not there")
        elif anchor and anchor not in anchors(path):
            wrong.append(f"{target} has no such heading")
        elif (test := re.fullmatch(r"`(test_\w+)`", text)) and test[1] not in functions(path):
            wrong.append(f"{test[1]} is not in {target}")
    assert not wrong, f"{page.name}: {'; '.join(wrong)}"


def test_the_page_of_the_elbo_names_tests():
    named = {text for text, _ in links(ELBO_PAGE) if text.startswith("`test_")}
    assert len(named) > 40
    # A test that is named must be a link, or nobody would notice when it goes.
    outside = re.sub(r"\[`test_\w+`\]\([^)]+\)", "", prose(ELBO_PAGE))
    assert "test_" not in outside


def test_figures_are_small_and_shown_and_the_readme_begins_with_one():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    assert text.index("![") < text.index("```")
    shown = {(page.parent / target).resolve() for page in PAGES for _, target in links(page)}
    for path in (ROOT / "docs" / "figures").glob("*.png"):
        assert path.stat().st_size < 80_000, path.name
        assert path in shown, path.name


@pytest.mark.parametrize("page", some(WITH_PYTHON, every=4), ids=lambda page: page.name)
def test_the_python_of_the_page_runs(page, tmp_path, monkeypatch):
    """Every block, one after the other in one folder, on run folders of untrained parts."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert blocks
    sizes, codes = {"width": 8, "num_blocks": 1}, {"num_codes": 16, "dim": 4}
    quantizer = vqvae.quantizers.EMAVectorQuantizer.Config(**codes)
    torch.manual_seed(0)
    models = {
        "sqvae": vqvae.VQVAE(quantizer=vqvae.quantizers.StochasticVectorQuantizer.Config(**codes), **sizes),
        "rate-aware": vqvae.VQVAE(quantizer=quantizer, beta=1.0, **sizes),
        "vae": vqvae.GaussianVAE(dim=2, **sizes),
        "fashion-mini": vqvae.VQVAE(quantizer=quantizer, **sizes),
        "drafted": vqvae.VQVAE(quantizer=quantizer, **sizes),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / "runs" / name / "codebook")
        if isinstance(model, vqvae.VQVAE):
            small = {"num_classes": 10, "width": 16, "depth": 1, "num_heads": 2}
            prior = priors.TransformerPrior(num_codes=model.num_codes, grid=model.grid, **small)
            prior.save_pretrained(tmp_path / "runs" / name / "prior")
            priors.DraftHead.of(prior).save_pretrained(tmp_path / "runs" / name / "draft")
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, page.name, "exec"), {})


@pytest.mark.parametrize("page", [*WITH_PYTHON, ROOT / "docs" / "scaling.md"], ids=lambda page: page.name)
def test_the_commands_of_the_page_parse(page, monkeypatch):
    """Every line of train.py and of vqvae is understood; the files it names need not be there."""
    monkeypatch.setattr(parsing.Autoencoder, "from_pretrained", lambda source: vqvae.VQVAE.Config().build())
    for name in ("source_of", "images_of"):
        monkeypatch.setattr(parsing, name, lambda codes: "somewhere")
    monkeypatch.setattr(parsing, "image_size_of", lambda codes: None)
    text = re.sub(r"\\\n *", "", page.read_text(encoding="utf-8"))
    lines = re.findall(r"^(?:python|torchrun .* --) train\.py(?: +(.*))?$", text, re.MULTILINE)
    assert lines or page.name == "demo.md"
    # A run that goes on is not there, nor what a run's folder would tell.
    lines = [line for line in lines if "--resume" not in line]
    lines = [line.replace("--stage prior ", "") if "--tokenizer" not in line else line for line in lines]
    runs = [parsing.parse(line.split("#")[0].split()).run for line in lines]
    assert page.name == "reuse.md" or len(set(runs)) == len(runs)

    called = []
    for name, place in cli.COMMANDS.items():

        def note(*args, name=name, **options):
            called.append(name)

        command = functools.wraps(pkgutil.resolve_name(place))(note)
        monkeypatch.setattr(place.replace(":", "."), command)
    lines = re.findall(r"^(?:torchrun .* -m vqvae --|vqvae) +(.*)$", text, re.MULTILINE)
    assert lines or page.name == "quantizers.md"
    for line in lines:
        monkeypatch.setattr(sys, "argv", ["vqvae", *line.split("#")[0].split()])
        cli.main()
    assert called == [line.split()[0] for line in lines]
