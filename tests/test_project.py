"""Promises about the whole: public names, the import contract, and the README's own words."""

import inspect
import os
import socket
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

import pytest

import priors
import vqvae
import vqvae.quantizers

ROOT = Path(__file__).parents[1]


def test_public_names():
    """A name that leaves the page is somebody's broken program: docs/names.md is written by docs/names.py."""
    done = subprocess.run([sys.executable, "docs/names.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == (ROOT / "docs" / "names.md").read_text()
    names = [line for line in done.stdout.splitlines() if line.startswith("| `")]
    assert len(names) <= 103, (
        "ninety, nine of vqvae.looks, Augment, CodeBuckets and Tiled for photographs, and DraftHead"
    )
    assert all(line.split("|")[2].strip() for line in names), "each has its sentence"


def test_signatures_at_the_seams():
    drawn = "self num labels sampling generator"
    for function, names in (
        (priors.Prior.sample, f"{drawn} given mask prefix seeds progress"),
        (priors.Prior.samples, f"{drawn} given mask prefix seeds progress"),
        (priors.Prior.log_prob, "self codes labels"),
        (priors.ContinuousPrior.sample, drawn),
        (priors.ContinuousPrior.log_prob, "self latents labels"),
        (vqvae.quantizers.Quantizer.forward, "self z_e mask"),
    ):
        assert " ".join(inspect.signature(function).parameters) == names


def test_the_import_contract():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_the_images(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    listed = "\n".join(zipfile.ZipFile(wheel).namelist())
    for name in (
        "vqvae/cli/measuring.py",
        "vqvae/report/page.css",
        "priors/transformer.py",
        "safefolder/__init__.py",
        "fashion-mini/train-00",
    ):
        assert name in listed
    for name in ("fashion-28/codebook/model", "fashion-28-any-order/prior/model", "py.typed", "models/README.md"):
        assert name in listed
    assert "tests/" not in listed
    check_wheel(wheel, tmp_path)


def check_wheel(wheel: Path, folder: Path) -> None:
    """Unpacked, elsewhere, without the clone: it trains, samples, and shows its page."""
    site, home = folder / "site", folder / "home"
    home.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    where = {**os.environ, "PYTHONPATH": str(site), "HOME": str(home), "HF_HUB_OFFLINE": "1"}

    def run(*words: str) -> str:
        command = [sys.executable, *words]
        return subprocess.run(command, cwd=home, env=where, check=True, capture_output=True, text=True).stdout

    code = "import vqvae, priors, safefolder; print(vqvae.__file__, priors.__file__, safefolder.__file__)"
    assert run("-c", code).count(str(site)) == 3
    vqvae = ("-m", "vqvae")
    steps = ["--codebook-fit.num-steps", "3", "--prior-fit.num-steps", "2", "--test-images", "64"]
    sizes = ["--model.width", "8", "--prior.width", "16", "--prior.depth", "1", "--prior.num-heads", "1"]
    run(*vqvae, "train", "--run", "run", *steps, *sizes)
    for name in ("run", "fashion-28"):
        run(*vqvae, "sample", name, "--num", "2", "--output", f"{name}.png")
        assert (home / f"{name}.png").is_file()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, *vqvae, "demo", "--port", str(port)]
    with subprocess.Popen(command, cwd=home, env=where, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "shows fashion-28" in process.stdout.readline()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as page:
            assert b"gradio" in page.read()
        process.terminate()
