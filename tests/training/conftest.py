"""A run so small that a test can afford it: 60 images of 8x8 in a folder, two classes."""

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import train

SMALL = [
    "--preset",
    "folder",
    "--model.image-size",
    "8",
    "--model.num-channels",
    "1",
    "--model.width",
    "8",
    "--model.num-blocks",
    "1",
    "--model.quantizer.num-codes",
    "8",
    "--model.quantizer.dim",
    "4",
    "--model.likelihood.num-components",
    "2",
    "--data.num-workers",
    "0",
    "--codebook-fit.num-steps",
    "8",
    "--codebook-fit.batch-size",
    "8",
    "--codebook-fit.num-warmup",
    "2",
    "--codebook-fit.save-every",
    "2",
    "--codebook-fit.validate-every",
    "4",
    "--prior.width",
    "16",
    "--prior.depth",
    "1",
    "--prior.num-heads",
    "2",
    "--prior.dropout",
    "0.1",
    "--prior-fit.num-steps",
    "6",
    "--prior-fit.batch-size",
    "8",
    "--prior-fit.num-warmup",
    "2",
    "--prior-fit.save-every",
    "2",
    "--prior-fit.validate-every",
    "3",
    "--precision",
    "32-true",
]


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
