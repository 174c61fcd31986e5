"""A small run to show on a page, a page that is served in a process of its own, and files that people drop."""

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from priors import AnyOrderPrior, TransformerPrior
from vqvae import VQVAE
from vqvae.quantizers import VectorQuantizer

ROOT = Path(__file__).parents[2]
SIDE, NUM_CODES, GRID = 8, 16, (4, 4)


def run_in(folder: Path, *, num_channels: int = 1, num_classes: int | None = 3) -> Path:
    """A run's folder with a tokenizer of 8x8 pixels, and beside it one with a prior in any order."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer.Config(num_codes=NUM_CODES, dim=4)
    model = VQVAE(
        image_size=SIDE, num_channels=num_channels, width=8, num_blocks=0, downsampling=2, quantizer=quantizer
    )
    model.eval().save_pretrained(folder / "codebook")
    options = {"num_codes": NUM_CODES, "grid": GRID, "width": 8, "depth": 1, "num_heads": 1, "num_classes": num_classes}
    TransformerPrior(**options).eval().save_pretrained(folder / "prior")
    AnyOrderPrior(**options).eval().save_pretrained(folder.parent / "any-order")
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def served(scratch: Path, *words: object):
    """The address of a page, and the temporary folder of its process."""
    home = scratch / "home"
    (home / "tmp").mkdir(parents=True)
    port = free_port()
    where = {**os.environ, "HOME": str(home), "TMPDIR": str(home / "tmp"), "PYTHONPATH": str(ROOT)}
    where |= {"XDG_CACHE_HOME": str(home / "cache")}
    command = [sys.executable, "-m", "vqvae", "demo", *map(str, words), "--port", str(port)]
    process = subprocess.Popen(
        command,
        env=where,
        cwd=scratch,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As at a terminal: what a shell runs in the background ignores it, and so would the page.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(f"http://127.0.0.1:{port}/ shows"), (line, process.poll())
        yield f"http://127.0.0.1:{port}/", process, home
    finally:
        process.terminate()
        process.communicate()


def dropped(folder: Path) -> dict[str, Path]:
    """Files that are no pictures to be had, and one that is."""
    rng = np.random.default_rng(0)
    made = {name: folder / name for name in ("good.png", "text.png", "huge.png", "moving.gif", "empty.png", "line.png")}
    Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(made["good.png"])
    made["text.png"].write_text("These are words.\n")
    made["huge.png"].write_bytes(_huge())
    frames = [Image.fromarray(rng.integers(0, 256, (20, 20), dtype=np.uint8)) for _ in range(3)]
    frames[0].save(made["moving.gif"], save_all=True, append_images=frames[1:])
    made["empty.png"].write_bytes(b"")
    Image.new("L", (900, 2)).save(made["line.png"])
    return made


def _huge() -> bytes:
    """A PNG of a hundred million pixels, of a few hundred kilobytes."""
    file = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(file, format="png")
    return file.getvalue()
