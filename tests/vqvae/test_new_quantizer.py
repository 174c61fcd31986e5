"""The page that adds a quantizer, docs/new-quantizer.md: its code is run as it stands there, and keeps the contract."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import test_quantizer_contract as contract

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "new-quantizer.md"
FILE, BY_ITSELF, IN_A_MODEL, COMMAND, TESTS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.M)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files of the page, as somebody has them who followed it."""
    for name, text in (
        ("one_hot.py", FILE),
        ("by_itself.py", BY_ITSELF),
        ("in_a_model.py", f"{IN_A_MODEL}\nprint(*distortions)"),
        ("mine.py", COMMAND),
        ("test_one_hot.py", TESTS),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def run(folder: Path, *command: str, code: int = 0) -> str:
    """What a program printed. In a process of its own, or the page's kind would be one of all kinds for other tests."""
    paths = os.pathsep.join(map(str, (folder, ROOT, ROOT / "tests", ROOT / "tests" / "vqvae")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


def test_the_class_has_about_forty_lines():
    body = re.sub(r'""".*?"""\n', "", FILE, flags=re.DOTALL)
    assert 25 < len([line for line in body.splitlines() if line.strip()]) <= 45


@pytest.mark.slow
def test_it_keeps_the_contract(folder):
    """The page's own test file, with warnings as errors and with types checked, as the suite has it."""
    (folder / "types_checked.py").write_text((ROOT / "tests" / "conftest.py").read_text(encoding="utf-8"))
    settings = ("-c", str(ROOT / "pyproject.toml"), "--rootdir", ".", "-p", "no:cacheprovider", "-n", "0", "-q")
    options = (*settings, "-p", "types_checked")
    said = run(folder, "-m", "pytest", *options, "test_one_hot.py")
    suite = [name for name in vars(contract) if name.startswith("test_")]
    passed, skipped = (int(re.search(rf"(\d+) {word}", said)[1]) for word in ("passed", "skipped"))
    # Two members; some statements are of several modes. Skipped is what is of codebooks that gather.
    assert passed >= 2 * len(suite)
    assert skipped == 2


def test_it_works_by_itself(folder):
    run(folder, "-W", "error", "by_itself.py")


@pytest.mark.slow
def test_it_trains_in_a_model(folder):
    first, *_, last = map(float, run(folder, "in_a_model.py").split())
    assert first > 3600
    assert last < 3000


@pytest.mark.slow
def test_the_command_knows_it_and_others_do_not(folder):
    small = "--model.width 8 --model.num-blocks 1 --prior.width 16 --prior.depth 1 --prior.num-heads 2 --test-images 50"
    steps = "--codebook-fit.num-steps 3 --prior-fit.num-steps 3"
    train, sample = re.findall(r"^python (mine\.py .*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    run(folder, *train.split(), *small.split(), *steps.split())
    run(folder, *sample.split())
    assert (folder / "sneakers.png").exists()
    said = run(folder, "-m", "vqvae", *sample.split()[1:], code=2)
    assert "unknown quantizer 'OneHotQuantizer'" in said
