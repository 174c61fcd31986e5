"""A run so small that a test can afford it: its options and images, and what tests read from its folder."""

from pathlib import Path

import torch
from PIL import Image

# 60 images of 8x8 and models to match, in seconds; pairs of an option and its value.
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


def weights(folder: Path) -> dict[str, bytes]:
    """The bytes of every model of a run."""
    return {path.parent.name: path.read_bytes() for path in sorted(folder.glob("*/model.safetensors"))}


def gaussian(options: list[str]) -> list[str]:
    """The small run's options for Gaussian latents, which have no quantizer."""
    pairs = zip(options[::2], options[1::2], strict=True)
    kept = [word for pair in pairs if not pair[0].startswith("--model.quantizer.") for word in pair]
    return [*kept, "--latents", "gaussian", "--model.dim", "3"]
