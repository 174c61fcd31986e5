"""What large photographs cost a training step: decoding, with a cache of shrunk copies and without, beside the model.

    python -m benchmarks photographs [--folder /usr/share/backgrounds] [--sizes 64 128 256] [--batch-size 16]

CPU seconds a step on one thread, without workers: of making a batch, and of the model of the preset `folder` at that
size, forward and backward. "First" are the steps in which the cache is filled, a pass over all images; "then" those
that follow. Without a folder, pictures of 3000 x 2000 pixels are made here, of blurred noise.
"""

import dataclasses
import statistics
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from benchmarks import harness
from benchmarks.loader import make_folder
from vqvae.data import Batch, Images, batches, load_images
from vqvae.data.augmentation import Augment
from vqvae.data.cache import Cache
from vqvae.training.objectives import codebook_objective
from vqvae.training.presets import PRESETS

QUICK = "--sizes 16 --batch-size 2 --num-steps 2 --num-pictures 3"
VARIED = {"centre": Augment(), "crop 0.5, flip": Augment(crop=0.5, flip=True)}
GIGABYTES = 20


def main(
    folder: Path | None = None,
    sizes: tuple[int, ...] = (64, 128, 256),
    batch_size: int = 16,
    num_steps: int = 10,
    num_pictures: int = 24,
) -> None:
    """Measure each size once. num_pictures: that are made here."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        if folder is None:
            folder = Path(scratch) / "pictures"
            make_folder(folder, ".jpg", num_pictures, 3000, 2000)
        heads = ("decoding, no cache", "first", "then", "model", "step before", "step after", "MB an image")
        table = harness.Table("pixels", "shown", *heads)
        for size in sizes:
            images = load_images(folder, size=size, channels=3)
            model = _model_seconds(images, batch_size, num_steps)
            for name, augment in VARIED.items():
                where = Path(scratch) / f"cache-{size}-{name}"
                cached = images.cached(Cache(where, GIGABYTES * 10**9))
                whole_pass = -(-len(images) // batch_size)
                before = _decoding(images, augment, batch_size, num_steps)
                first = _decoding(cached, augment, batch_size, whole_pass)
                # What a pass leaves out at its end is no part of either.
                list(batches(cached, batch_size, seed=0, epochs=1, drop_last=False, augment=augment))
                then = _decoding(cached, augment, batch_size, num_steps, start=whole_pass)
                taken = sum(path.stat().st_size for path in where.rglob("*") if path.is_file())
                seconds = (before, first, then, model, before + model, then + model)
                cells = (f"{each:.3f}" for each in seconds)
                table.row(f"{size}x{size}", name, *cells, f"{taken / 1e6 / len(images):.2f}")


def _decoding(images: Images, augment: Augment, batch_size: int, num_steps: int, start: int = 0) -> float:
    """CPU seconds of a batch, the mean."""
    stream: Iterator[Batch] = batches(images, batch_size, seed=0, start=start, augment=augment)
    return harness.timed(lambda: list(islice(stream, num_steps))).counted / num_steps


def _model_seconds(images: Images, batch_size: int, num_steps: int) -> float:
    """CPU seconds of a step of the model, the median."""
    _, height, _ = images.shape
    preset = PRESETS["folder"]
    run = dataclasses.replace(preset, model=dataclasses.replace(preset.model, image_size=height))
    torch.manual_seed(0)
    objective = codebook_objective(run, run.model.build(), {"train": images, "test": images}).train()
    levels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (batch_size, *images.shape), np.uint8))

    def step() -> None:
        objective.zero_grad()
        objective(levels, None)["objective"].backward()

    step()
    return statistics.median(harness.timed(step).counted for _ in range(min(num_steps, 3)))
