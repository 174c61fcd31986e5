"""The programs under benchmarks: all are listed and understand their options; what they share does what it says."""

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import __main__ as command
from benchmarks import harness
from benchmarks.loader import make_folder

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
NAMES = [program.name for program in command.programs()]


def test_all_programs_are_listed(capsys):
    """Each by the first line of its module; a module without `main` is no program."""
    assert command.main([]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in lines] == NAMES
    with_main = {path.stem for path in FOLDER.glob("*.py") if re.search("^def main", path.read_text(), re.MULTILINE)}
    assert set(NAMES) == with_main - {"__main__"}
    assert all(line.endswith(".") for line in lines)


@pytest.mark.parametrize("name", NAMES)
def test_a_program_understands_its_quick_settings(name):
    """Importing it measures nothing, and parsing neither."""
    needed = next(program.needs for program in command.programs() if program.name == name)
    assert callable(command.parse(name, ["somewhere"] * len(needed) + ["--quick"]))


def test_options_win_over_quick_settings():
    quick = ["--rounds", "1", "--", "--steps", "2"]
    assert command.joined(quick, ["--rounds", "3"]) == ["--rounds", "1", "--rounds", "3", "--", "--steps", "2"]
    assert command.joined(quick, ["--", "--seed", "1"]) == ["--rounds", "1", "--", "--steps", "2", "--seed", "1"]


def test_the_commands_of_the_readme_are_understood():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"python -m benchmarks (\w+)([^#`\n]*)", text)
    assert {name for name, _ in found} >= {name for name in NAMES if name != "embed_fashion_mnist"}
    for name, words in found:
        if name not in ("NAME", "all"):
            assert callable(command.parse(name, words.split()))


def test_what_failed_is_said(capsys):
    assert command.main(["nothing"]) == 2
    assert command.main(["all", "--fast"]) == 2
    found = [command.Program("nothing", "Is not there.", ()), command.Program("more", "Needs a folder.", ("folder",))]
    assert command.run_all(found, []) == 1
    out = capsys.readouterr().out
    assert "left out: it needs folder" in out
    assert out.endswith("failed: nothing\n")


def test_those_with_a_device_are_run_there(monkeypatch, capsys):
    """The others are left out, each with its reason; without a GPU nothing is begun."""
    found = {program.name: program for program in command.programs()}
    devices = {name for name, program in found.items() if program.has_device}
    assert devices == {"compiling", "main_job", "preset_memory", "prior_step", "sampling", "search", "tokenizing"}
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for words in (["--device", "cuda"], ["all", "--device", "cuda", "--quick"]):
        assert command.main(words) == 2
    assert command.main(["search", "--device", "cuda"]) == 1
    written = capsys.readouterr()
    assert not written.out
    assert written.err.count("is_available() is False here; expected a machine with a GPU") == 3
    for words in (["--device"], ["--device", "tpu"], ["--device", "cpu", "--rounds"]):
        assert command.main(words) == 2

    begun: list[list[str]] = []

    def run(words: list[str], **_: object) -> SimpleNamespace:
        begun.append(words[3:])
        return SimpleNamespace(returncode=command.MISSING if words[3] == "search" else int(words[3] == "sampling"))

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("subprocess.run", run)
    assert command.main(["--device", "cuda", "--quick"]) == 1
    assert begun == [[name, "--device", "cuda", "--quick"] for name in found if name in devices]
    out = capsys.readouterr().out
    assert out.count("left out: it has no option `device`") + out.count("left out: it needs ") == len(found) - 6
    assert out.endswith("left out for want of a package: search\n\nfailed: sampling\n")


def test_a_program_that_a_package_is_missing_for_says_so(monkeypatch, capsys):
    def parse(name: str, words: list[str]) -> None:
        raise ModuleNotFoundError("No module named 'faiss'")

    monkeypatch.setattr(command, "parse", parse)
    assert command.main(["search"]) == command.MISSING
    assert "No module named 'faiss'; pip install" in capsys.readouterr().err


def test_rounds_are_interleaved_and_compared_one_by_one():
    order: list[str] = []
    jobs = {name: partial(order.append, name) for name in "abc"}
    found = harness.interleaved(jobs, 3)
    assert "".join(order) == "abccbaabc"
    assert found == {name: [None] * 3 for name in "abc"}
    assert harness.interleaved(jobs, 3, budget=0.0) == {name: [None] for name in "abc"}
    rounds = [{"speed": 1.0, "peak": 5.0}, {"speed": 9.0, "peak": 4.0}, {"speed": 2.0, "peak": 6.0}]
    assert harness.medians(rounds) == {"speed": 2.0, "peak": 5.0}
    # The second round was slow for both.
    assert harness.ratio([2.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == 2.0


def test_results_are_kept(tmp_path):
    calls: list[str] = []

    def job(name: str) -> dict[str, str]:
        calls.append(name)
        return {"name": name}

    path = tmp_path / "kept.json"
    jobs = {name: partial(job, name) for name in "ab"}
    expected = {name: {"name": name} for name in "ab"}
    assert harness.Kept(path).fill(jobs, beside=2) == expected
    assert harness.Kept(path).fill({**jobs, "c": partial(job, "c")}) == {**expected, "c": {"name": "c"}}
    assert sorted(calls) == ["a", "b", "c"]


def test_images_come_from_a_folder_that_is_given(tmp_path):
    make_folder(tmp_path / "files", ".png", 3, 12, 12)
    assert harness.images(str(tmp_path / "files"), "train", 2, size=8).shape == (2, 3, 8, 8)
    assert harness.images(num=5).shape == (5, 1, 28, 28)


def test_processes_use_the_packages_of_a_checkout(tmp_path):
    """And the programs of this one."""
    for name in ("vqvae", "priors", "safefolder"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").write_text("raise ImportError")
    code = "[__import__(name).__file__ for name in ('vqvae', 'benchmarks')] + [__import__('os').environ['WORD']]"
    found = harness.in_child(eval, code, checkout=tmp_path, WORD="given")
    assert found == [str(tmp_path / "vqvae" / "__init__.py"), str(FOLDER / "__init__.py"), "given"]


def test_a_process_that_fails_is_told(tmp_path):
    with pytest.raises(harness.ProcessError, match="division by zero"):
        harness.in_child(eval, "1 / 0")
    with pytest.raises(harness.ProcessError, match="ended with 3"):
        harness.command("-c", "raise SystemExit(3)")
