"""A run so small that a test can afford it: 60 images of 8x8 in a folder, two classes."""

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from run_files import SMALL

import train


def make_images(folder: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for index in range(60):
        # Two kinds that codes can tell apart: bright left or bright right, with noise.
        pixels = torch.randint(0, 60, (8, 8), generator=generator)
        kind = index % 2
        pixels[:, 4 * kind : 4 * kind + 4] += 180
        place = folder / ("left", "right")[kind]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(place / f"{index:02}.png")
    return folder


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
