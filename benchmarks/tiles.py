"""A photograph of many megapixels through a tokenizer in tiles, beside the whole of it at once.

    python -m benchmarks tiles PHOTO.jpg --model runs/photos
    python -m benchmarks tiles PHOTO.jpg --model runs/with-attention --crop 1024 1536

The model is a run's or a saved one; without --model it is a fresh one of width 32 that divides by 8. Each way is a
process of its own on one thread: its largest memory, of which `read` is that with the photograph alone, CPU seconds to
encode and to decode, and how many codes and pixels differ from those of the whole. Of a model with attention or norms
over the image tiles differ: `apart` is by how many levels, on average, and `step` how much that changes from pixel to
pixel next to the borders of tiles, as a ratio to the most that it does elsewhere: above 1 would be a seam.
"""

import resource
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tyro.conf import Positional

from benchmarks import harness
from vqvae import VQVAE, Tiled
from vqvae.data.decoding import fit, read
from vqvae.likelihoods import Normal

QUICK = "--crop 64 64 --tiles 32"


def main(
    photograph: Positional[Path],
    model: Path | None = None,
    tiles: tuple[int, ...] = (1024, 512, 256),
    crop: tuple[int, int] | None = None,
    output: Path = harness.OUT / "tiles",
) -> None:
    """Measure the whole, and tiles of several sizes."""
    output.mkdir(parents=True, exist_ok=True)
    table = harness.Table(
        "tile", "read, GiB", "peak, GiB", "encode, CPU s", "decode, CPU s", "codes", "pixels", "apart", "step"
    )
    for tile in (None, *tiles):
        found = harness.in_child(measure, photograph, model, tile, crop, output / f"{tile}.pt")
        apart = compared(output / f"{tile}.pt", output / "None.pt", tile)
        name = "whole" if tile is None else f"{tile}"
        table.row(
            name,
            f"{found['read']:.2f}",
            f"{found['peak']:.2f}",
            f"{found['encode']:.1f}",
            f"{found['decode']:.1f}",
            *apart,
        )


def measure(
    photograph: str, model: str | None, tile: int | None, crop: list[int] | None, output: str
) -> dict[str, float]:
    """In a process of its own: GiB and seconds."""
    tokenizer = made(model)
    picture = read(Path(photograph))
    image = fit(picture, (picture.height, picture.width), tokenizer.config.num_channels)[None]
    if crop is not None:
        image = image[..., : crop[0], : crop[1]].contiguous()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    way: Any = tokenizer if tile is None else Tiled(tokenizer, tile=tile)
    start = time.process_time()
    codes = way.encode(image, pad=True)
    middle = time.process_time()
    again = way.decode(codes, size=tuple(image.shape[2:]))
    end = time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    torch.save({"codes": codes, "image": again}, output)
    return {"read": before, "peak": peak, "encode": middle - start, "decode": end - middle}


def made(model: str | None) -> VQVAE:
    """The tokenizer, in evaluation."""
    torch.manual_seed(0)
    if model is None:
        fresh = VQVAE(image_size=64, num_channels=3, downsampling=8, width=32, smooth=True, likelihood=Normal.Config())
        with torch.no_grad():
            for weight in fresh.decoder.parameters():
                if weight.ndim > 1:
                    torch.nn.init.normal_(weight, std=1 / weight[0].numel() ** 0.5)
        return fresh.eval()
    return VQVAE.from_pretrained(model)


def compared(path: Path, whole: Path, tile: int | None) -> tuple[str, str, str, str]:
    """Codes and pixels that differ, levels apart on average, and the step at borders."""
    if tile is None:
        return "", "", "", ""
    one, other = (torch.load(each, weights_only=True) for each in (path, whole))
    codes, pixels = ((one[name] != other[name]).double().mean().item() for name in ("codes", "image"))
    difference = one["image"].float() - other["image"].float()
    return f"{codes:.2%}", f"{pixels:.2%}", f"{difference.abs().mean():.3f}", f"{step(difference, tile):.3f}"


def step(difference: Tensor, tile: int) -> float:
    """How much a difference changes across the borders of tiles, relative to elsewhere."""
    ratios = []
    for axis in (2, 3):
        changes = difference.diff(dim=axis).abs().movedim(axis, 0).flatten(1).mean(1)
        size, num = difference.shape[axis], -(-difference.shape[axis] // tile)
        if num < 2:
            continue
        # Parts are even to a position, so the border is near.
        edges = torch.tensor([round(at * size / num) for at in range(1, num)])
        near = (torch.arange(len(changes))[:, None] - edges).abs().amin(1) <= 8
        ratios.append(changes[near].amax() / changes[~near].amax().clamp_min(1e-9))
    return max(ratios).item() if ratios else 0.0
