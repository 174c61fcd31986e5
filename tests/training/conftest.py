"""A run so small that a test can afford it: 60 images of 8x8 in a folder, two classes."""

import sys
from pathlib import Path

import pytest
from run_files import SMALL, make_images

import train
import vqvae.cli


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def options(photos: Path, tmp_path: Path) -> list[str]:
    """Command line of the small run, into `tmp_path/run`."""
    return [*SMALL, "--data.source", str(photos), "--run", str(tmp_path / "run")]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    """Call train.py in this process; or `vqvae`, of which the first word is a command."""

    def call(*args: object) -> None:
        is_command = args[0] in vqvae.cli.COMMANDS
        monkeypatch.setattr(sys, "argv", ["vqvae" if is_command else "train.py", *map(str, args)])
        (vqvae.cli.main if is_command else train.main)()

    return call


@pytest.fixture
def fails(run, capsys: pytest.CaptureFixture[str]):
    """The same; it must exit with 2 and one line, which comes back."""

    def call(*args: object) -> str:
        with pytest.raises(SystemExit) as stopped:
            run(*args)
        assert stopped.value.code == 2
        said = capsys.readouterr().err
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert "Traceback" not in said
        assert "not foreseen" not in said
        return lines[0]

    return call
