"""A run so small that a test can afford it: 60 images of 8x8 in a folder, two classes."""

import sys
from pathlib import Path

import pytest
from run_files import SMALL, make_images

import train


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def options(photos: Path, tmp_path: Path) -> list[str]:
    """Command line of the small run, into `tmp_path/run`."""
    return [*SMALL, "--data.source", str(photos), "--run", str(tmp_path / "run")]


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Call train.py in this process; it must exit with 2 and one line, which comes back."""

    def call(*args: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train.py", *args])
        with pytest.raises(SystemExit) as stopped:
            train.main()
        assert stopped.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    return call


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    """Call train.py in this process."""

    def call(*args: str) -> None:
        monkeypatch.setattr(sys, "argv", ["train.py", *args])
        train.main()

    return call
