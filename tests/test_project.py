"""Promises about the whole: public names, the import contract, and the README's own words."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import priors
import vqvae
import vqvae.codec
import vqvae.data
import vqvae.em
import vqvae.interop
import vqvae.likelihoods
import vqvae.quantizers
import vqvae.tokens

ROOT = Path(__file__).parents[1]


def test_public_names():
    """A name that leaves the page is somebody's broken program: docs/names.md is written by docs/names.py."""
    done = subprocess.run([sys.executable, "docs/names.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == (ROOT / "docs" / "names.md").read_text()
    names = [line for line in done.stdout.splitlines() if line.startswith("| `")]
    assert len(names) <= 90
    assert all(line.split("|")[2].strip() for line in names), "each has its sentence"


def test_signatures_at_the_seams():
    names = list(inspect.signature(priors.Prior.sample).parameters)
    assert names[:5] == ["self", "num", "labels", "sampling", "generator"]
    assert names[5:] == ["given", "mask", "prefix", "seeds", "progress"]
    assert list(inspect.signature(priors.Prior.samples).parameters) == names
    assert list(inspect.signature(priors.Prior.log_prob).parameters) == ["self", "codes", "labels"]
    names = list(inspect.signature(priors.ContinuousPrior.sample).parameters)
    assert names == ["self", "num", "labels", "sampling", "generator"]
    assert list(inspect.signature(priors.ContinuousPrior.log_prob).parameters) == ["self", "latents", "labels"]
    assert list(inspect.signature(vqvae.quantizers.Quantizer.forward).parameters) == ["self", "z_e", "mask"]


def test_the_import_contract():
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_the_images(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    listed = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheel)], capture_output=True, text=True, check=True
    ).stdout
    inside = ("vqvae/cli/measuring.py", "vqvae/codec/codec.py", "priors/transformer.py", "safefolder/__init__.py")
    for name in (*inside, "assets/fashion-mini/train-00"):
        assert name in listed
    assert "tests/" not in listed
