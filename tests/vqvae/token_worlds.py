"""Small tokenizers and images on the disk, for tests of tokenized sets."""

from pathlib import Path
from typing import Any

import torch
from image_files import save

from vqvae import VQVAE, tokens
from vqvae.quantizers import FSQ, ResidualQuantizer, VectorQuantizer
from vqvae.tokens import CodeBatch, Tokenized, Tokenizing, TokenizingOnRay, layout
from vqvae.tokens.layout import Plan

QUANTIZERS = {
    "plain": VectorQuantizer.Config(num_codes=16, dim=4),
    "residual": ResidualQuantizer.Config(depth=3, quantizer=VectorQuantizer.Config(num_codes=16, dim=4)),
    "many": FSQ.Config(levels=(9, 9, 9, 9, 9, 9)),  # 531,441 codes
}


def tokenizer(kind: str = "plain", seed: int = 0) -> VQVAE:
    torch.manual_seed(seed)
    quantizer = QUANTIZERS[kind]
    return VQVAE(image_size=8, num_channels=3, width=8, num_blocks=1, quantizer=quantizer).eval()


def tokenize(
    model: Any, images: Any, folder: Any, *, progress: Any = None, timings: Any = None, **options: Any
) -> Tokenized:
    """`vqvae.tokens.tokenize`, by options of `Tokenizing` among its other arguments."""
    return tokens.tokenize(model, images, folder, Tokenizing(**options), progress=progress, timings=timings)


def tokenize_on_ray(model: Any, images: Any, folder: Any, **options: Any) -> Tokenized:
    """`vqvae.tokens.tokenize_on_ray`, likewise."""
    others = {name: options.pop(name) for name in ("session", "open_images", "progress") if name in options}
    return tokens.tokenize_on_ray(model, images, folder, TokenizingOnRay(**options), **others)


def plan(model: Any, images: Any, folder: Any, **options: Any) -> Plan:
    """`vqvae.tokens.layout.plan`, likewise."""
    return layout.plan(model, images, folder, Tokenizing(**options))


def photos(folder: Path, num: int = 50, broken: tuple[int, ...] = ()) -> Path:
    """A folder of images of two classes, and one to test on; some are no images."""
    generator = torch.Generator().manual_seed(7)
    for number in range(num):
        pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8, generator=generator).numpy()
        path = save(folder / "train" / "ab"[number >= num // 2] / f"{number:03}.png", pixels)
        if number in broken:
            path.write_bytes(b"broken")
    save(folder / "test" / "a" / "0.png", pixels)
    return folder


def joined(batches: list[CodeBatch]) -> CodeBatch:
    """Batches one after another, as one."""
    labels = [batch.labels for batch in batches if batch.labels is not None]
    return CodeBatch(torch.cat([batch.codes for batch in batches]), torch.cat(labels) if labels else None)


def equal(left: CodeBatch, right: CodeBatch) -> bool:
    same_labels = left.labels is right.labels is None or torch.equal(left.labels, right.labels)
    return torch.equal(left.codes, right.codes) and same_labels


def copied(source: Path, folder: Path) -> Path:
    """A copy of a tokenized set in a folder that is made."""
    folder.mkdir(parents=True)
    for name, data in contents(source).items():
        (folder / name).write_bytes(data)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
