"""A run so small that a test can afford it: its options and images, what tests read from its folder, and stops."""

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from PIL import Image

from vqvae.training.records import Stop

ROOT = Path(__file__).parents[2]
SECONDS = 300
# 60 images of 8x8 and models to match, in seconds; pairs of an option and its value.
SMALL = shlex.split("""
--preset folder --precision 32-true --data.num-workers 0
--model.image-size 8 --model.num-channels 1 --model.width 8 --model.num-blocks 1
--model.quantizer.num-codes 8 --model.quantizer.dim 4 --model.likelihood.num-components 2
--codebook-fit.num-steps 8 --codebook-fit.batch-size 8 --codebook-fit.num-warmup 2
--codebook-fit.save-every 2 --codebook-fit.validate-every 4
--prior.width 16 --prior.depth 1 --prior.num-heads 2 --prior.dropout 0.1
--prior-fit.num-steps 6 --prior-fit.batch-size 8 --prior-fit.num-warmup 2
--prior-fit.save-every 2 --prior-fit.validate-every 3
""")


def without(start: str, options: list[str]) -> list[str]:
    """Pairs of an option and its value, less those of options that begin so."""
    pairs = zip(options[::2], options[1::2], strict=True)
    return [word for pair in pairs if not pair[0].startswith(start) for word in pair]


def gaussian(options: list[str]) -> list[str]:
    """The small run's options for Gaussian latents, which have no quantizer."""
    return [*without("--model.quantizer.", options), "--latents", "gaussian", "--model.dim", "3"]


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


def weights(folder: Path) -> dict[str, bytes]:
    """The bytes of every model of a run."""
    return {path.parent.name: path.read_bytes() for path in sorted(folder.glob("*/model.safetensors"))}


def start(*args: object, **options: bool) -> subprocess.Popen:
    """train.py in a process of its own."""
    words = [sys.executable, str(ROOT / "train.py"), *map(str, args)]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **options)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.005)


def finish(process: subprocess.Popen, code: int | None = 0) -> str:
    """Wait for a run to end; what it wrote to stderr."""
    _, errors = process.communicate(timeout=SECONDS)
    assert code in (None, process.returncode), errors
    return errors


def stopped(run, monkeypatch: pytest.MonkeyPatch, folder: Path, args: Iterable[str], **steps: Iterable[int]) -> None:
    """A run that a signal stops after these steps of the stages, each time but the first resumed; not yet its end."""
    left = [(stage, step) for stage, each in steps.items() for step in each]

    def requested(self, fabric, step):
        stage = "prior" if (folder / "codebook").exists() else "codebook"
        if (stage, step + 1) not in left:
            return 0
        left.remove((stage, step + 1))
        return signal.SIGTERM

    with monkeypatch.context() as patch:
        patch.setattr(Stop, "requested", requested)
        for attempt in range(len(left)):
            with pytest.raises(SystemExit) as end:
                run(*args, *(["--resume"] if attempt else []))
            assert end.value.code == 128 + signal.SIGTERM
    assert not left
