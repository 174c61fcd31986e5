"""Files that a repository is expected to have: they are valid, and what they name is there."""

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml
from test_docs import anchors, links

from vqvae import cli
from vqvae.training import parsing

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "docs" / "releasing.md"]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# Programs that are not this project's own, and what in its extras brings them.
TOOLS = {"pytest": "pytest", "ruff": "ruff", "pyrefly": "pyrefly", "lint-imports": "import-linter"}
TOOLS |= {"pre-commit": "pre-commit", "sphinx-build": "sphinx"}
OF_THE_SYSTEM = {"pip", "git", "source"}


def commands(page: Path) -> list[list[str]]:
    """The words of every command in a page's blocks."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(part, comments=True) for line in lines for part in line.split("#")[0].split("&&")]


def check(words: list[str]) -> None:
    """AssertionError for a command that is not there, or that names a file that is not."""
    program, *rest = words
    if program == "python" and rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]), words
    elif program == "python":
        assert (ROOT / rest[0]).is_file(), words
    elif Path(program).name == "vqvae":
        assert rest[0] == "train" or rest[0] in cli.COMMANDS, words
        if rest[0] == "train" and "--help" not in rest:
            parsing.parse(rest[1:])
    elif program.startswith("."):
        assert (ROOT / program).is_file(), words
    elif program in TOOLS:
        extras = PROJECT["project"]["optional-dependencies"].values()
        assert any(re.match(rf"{TOOLS[program]}\b", each) for extra in extras for each in extra), words
        assert all((ROOT / word).exists() for word in rest if word.endswith(".py")), words
    else:
        assert Path(program).name in OF_THE_SYSTEM, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page):
    found = list(links(page))
    assert len(found) >= 3
    for _, target in found:
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target
    for words in commands(page):
        check(words)
    # Dicts of the tests and of the package that something new has its line in.
    for name, target in re.findall(r"`([A-Z_]+)` (?:in|of) \[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        assert re.search(rf"^{name}\b", (page.parent / target).read_text(encoding="utf-8"), re.MULTILINE), target


def test_a_wrong_command_is_found():
    for line in ("python docs/nothing.py", "vqvae nothing", ".ci/nothing", "nothing --at all", "python -m vqvae.none"):
        with pytest.raises(AssertionError):
            check(line.split())


def test_contributing_names_lines_of_the_contract():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    contracts = {each["name"]: each for each in PROJECT["tool"]["importlinter"]["contracts"]}
    named = {" ".join(each.split()) for each in re.findall(r'the contract "([^"]+)"', page)}
    assert named == {"layers of priors", "layers of other projects' formats"}
    assert "diffusers | taming | llamagen | onnx" in contracts["layers of other projects' formats"]["layers"]
    assert any("transformer |" in layer for layer in contracts["layers of priors"]["layers"])


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    # What version 1.2.0 of the format asks for, and types; its schema is checked by cffconvert at a release.
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    assert citation["authors"] == [{"name": "The vqvae-priors authors"}]
    assert citation["version"] == PROJECT["project"]["version"]
    assert citation["title"] == PROJECT["project"]["name"]
    assert citation["license"] == PROJECT["project"]["license"]
    assert citation["keywords"] == PROJECT["project"]["keywords"]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_issue_forms_are_ones(form):
    """By the rules of forms: a body of known elements, each with a label, questions with an id of their own."""
    found = yaml.safe_load(form.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(found) <= {"name", "description", "body", "labels", "title"}
    questions = [each for each in found["body"] if each["type"] != "markdown"]
    assert {each["type"] for each in questions} <= {"textarea", "input", "dropdown", "checkboxes"}
    assert any(each.get("validations", {}).get("required") for each in questions)
    ids = [each["id"] for each in questions]
    assert len(set(ids)) == len(ids)
    assert all(each["attributes"]["label"] for each in questions)
    assert {key for each in found["body"] for key in each} <= {"type", "id", "attributes", "validations"}
    assert all(each["attributes"]["value"] for each in found["body"] if each["type"] == "markdown")


def test_there_are_forms_for_both():
    assert {form.stem for form in FORMS} == {"bug", "feature"}
