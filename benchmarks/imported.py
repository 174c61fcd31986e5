"""Imported tokenizers beside the originals: codes and pixels of the same images.

    python -m benchmarks imported [--num-images 1000] [--names amused taming-f16-1024 ...]

Networks have the full widths of released models and random weights, since hubs cannot be reached here; the codebook is
put about where features are. Originals of diffusers are its own `VQModel`, written by `save_pretrained`; those of
taming-transformers and LlamaGen are the reference functions of the tests (`tests/vqvae/vqgan_references.py`), written
from their published layouts in their own names of weights. Half the images are photographs of clothes, half random
levels, all 32x32. A tie is another code that is as near within rounding (`vqvae.interop.code_agreement`); `wrong` is
all else. Pixels are compared on 24 images: the decoder's output, whose range is about -1 to 1, and levels of the
picture.
"""

import importlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import harness
from vqvae import VQVAE
from vqvae.interop import compare_codes, import_diffusers, import_llamagen, import_taming

SIZE = 32
BATCH_SIZE = 50
NUM_DECODED = 24
QUICK = "--num-images 24 --names narrow-codes"

Coder = Callable[[Tensor], Tensor]


def references() -> Any:
    """The reference functions of the tests."""
    folder = str(harness.ROOT / "tests" / "vqvae")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("vqgan_references")


def pair(name: str, folder: Path) -> tuple[VQVAE, Coder, Coder]:
    """Our model, and the original's images to codes, and codes to pictures."""
    if name in references().RELEASED:
        peer = references().vq_model(name)
        peer.save_pretrained(folder)

        def encode(images: Tensor) -> Tensor:
            latents = peer.encode(images / 127.5 - 1).latents
            return peer.quantize(latents)[2][2].reshape(len(latents), *latents.shape[2:])

        def decode(codes: Tensor) -> Tensor:
            vectors = peer.quantize.embedding(codes).movedim(-1, 1)
            guide = vectors if peer.config.norm_type == "spatial" else None
            return peer.decoder(peer.post_quant_conv(vectors), guide)

        return import_diffusers(folder, image_size=SIZE), encode, decode
    reference = references().published(name)
    of_llamagen = name.startswith("llamagen")
    torch.save({"model" if of_llamagen else "state_dict": dict(reference.weights)}, folder / "model.pt")
    read = import_llamagen if of_llamagen else import_taming
    model = read(folder / "model.pt", image_size=SIZE)
    return model, lambda images: reference.codes(reference.encode(images)), reference.decode


@torch.no_grad()
def compare(name: str, num_images: int) -> tuple[object, ...]:
    """A row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        model, encode, decode = pair(name, Path(folder))
    compared = ties = wrong = 0
    found = []
    images = references().pictures(num_images, SIZE).split(BATCH_SIZE)
    for part in tqdm(images, desc=name, unit="batch", disable=None):
        codes = encode(part)
        agreement = compare_codes(model, part, codes)
        compared += agreement.num_codes_compared
        ties += agreement.num_ties
        wrong += agreement.num_wrong
        found.append(codes)
    codes = torch.cat(found)
    chosen = torch.cat([codes[: NUM_DECODED // 2], codes[-NUM_DECODED // 2 :]])
    largest, num_levels = 0.0, 0
    for part in chosen.split(12):
        theirs = decode(part)
        largest = max(largest, (model.decoder(model.vectors(part)) - theirs).abs().max().item())
        num_levels += int((model.decode(part) != (127.5 * (1 + theirs)).round().clamp(0, 255)).sum())
    used = f"{len(codes.unique()):,} of {model.num_codes:,}"
    pixels = len(chosen) * 3 * SIZE**2
    return name, f"{compared:,}", used, ties, wrong, f"{largest:.1e}", f"{num_levels} of {pixels:,}"


def main(num_images: int = 1000, names: tuple[str, ...] = ()) -> None:
    """Compare each model, or those of --names, with its original."""
    heads = ("original", "codes", "in use", "ties", "wrong", "largest difference", "levels that differ (by 1)")
    table = harness.Table(*heads)
    for name in harness.pick(dict.fromkeys([*references().RELEASED, *references().PUBLISHED]), names):
        table.row(*compare(name, num_images))
