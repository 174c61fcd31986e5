"""Our files of bits beside PNG, WebP, JPEG-XL and xz, on the same test images: bits, speed, and pictures.

    python -m benchmarks codec RUN [MORE RUNS...] --source fashion-mnist --root FOLDER
    python -m benchmarks codec RUN --source fashion-mnist --root FOLDER --others FILE   # theirs are measured once

A run is a folder with `codebook` and `prior`, as `train.py` makes it; without any a small run of our own is trained.
Everything is on one thread, on the first --num test images. All files of all codecs are decoded and compared with what
went in.

Bits are those of whole files, headers included; `payload` is a file's coded pixels alone: IDAT of PNG, the LZMA2 stream
of xz, our stream and stored pixels. An image's code length is that of the integer tables, `Codec.measure`. No labels
are stored, and the ELBO is without labels too. Times are CPU times, the median of interleaved rounds, on --num-timed
images. Lossy files of WebP and JPEG-XL are the smallest that have at least our bytes, and the smallest they make at all
where that is larger; PSNR and SSIM are means over images.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm
from tyro.conf import Positional, arg

from benchmarks import codec_report as report
from benchmarks import harness
from benchmarks import other_codecs as others
from benchmarks.codec_report import Row, ours
from priors import Prior
from vqvae import VQVAE
from vqvae.bound import elbo
from vqvae.codec import Archive, Codec, Compression, Mode, container
from vqvae.codec.block import STORED, BlockContent
from vqvae.metrics import psnr, ssim

ARCHIVES = (2000, 10_000)
NUM_LOSSY = 64
# One image by itself takes so much longer that fewer are timed.
ALONE_OF = 8
BATCH = 500
QUICK = "--num 16 --num-timed 8 --num-slow 2 --rounds 1 --num-steps 4"


def codec_of(run: Path) -> Codec:
    """A trained model and prior as a codec."""
    model = VQVAE.from_pretrained(run / "codebook").eval()
    return Codec(model, Prior.from_pretrained(run / "prior").eval())


@torch.no_grad()
def bounds(codec: Codec, images: Tensor) -> dict[str, np.ndarray]:
    """Bits of each image: the negative ELBO in float64, the integer tables' code length, and the codes' part of it."""
    found: dict[str, list[Tensor]] = {"ELBO": [], "tables": [], "rate": []}
    for part in tqdm(images.split(BATCH), desc="ELBO", disable=None):
        found["ELBO"].append(elbo(codec.coder.model, codec.coder.prior, part).negative / math.log(2))
        cost = codec.measure(part)
        found["tables"].append(cost.total)
        found["rate"].append(cost.rate)
    return {name: torch.cat(parts).numpy() for name, parts in found.items()}


def written(codec: Codec, images: Tensor) -> bytes:
    """A file of images that was decoded and compared with what went in."""
    data = codec.compress(images, options=Compression(verify=False))
    back = codec.decompress(data)
    if not torch.equal(back if isinstance(back, Tensor) else torch.stack(back), images):
        raise ValueError("other pixels came back than went in")
    return data


def parts_of(codec: Codec, data: bytes) -> dict[str, Any]:
    """What a file's bytes are spent on, and how its images are coded."""
    coder = codec.coder
    with Archive.from_bytes(data) as archive:
        packed = [archive.content(i) for i in range(len(archive.blocks))]
    contents = [BlockContent.unpack(content, coder.num_channels, coder.size) for content in packed]
    kinds = [kind for content in contents for kind in content.kinds]
    ends = container.HEADER.size + container.TRAILER.size
    streams, stored = (sum(len(getattr(content, part)) for content in contents) for part in ("stream", "stored"))
    blocks = container.BLOCK.size * len(packed) + sum(map(len, packed))
    return {
        "bytes": len(data),
        "header and trailer": ends,
        "blocks' own": blocks - streams - stored,
        "index": len(data) - ends - blocks,
        "streams": streams,
        "stored pixels": stored,
        "blocks": len(packed),
        "shifted": sum(0 < kind < STORED for kind in kinds) / len(kinds),
        "stored": sum(kind == STORED for kind in kinds) / len(kinds),
    }


def measure(run: Path, images: Tensor, timed: Tensor, rounds: int) -> dict[str, Any]:
    """Lossless bits of one run, in archives and one by one, and its speeds."""
    codec = codec_of(run)
    each = bounds(codec, images)
    archives = {}
    for num in sorted({min(num, len(images)) for num in ARCHIVES}):
        archives[num] = parts_of(codec, written(codec, images[:num]))
        archives[num]["over"] = 8 * archives[num]["bytes"] / each["ELBO"][:num].sum() - 1
    files = [written(codec, image) for image in tqdm(images.split(1), desc=f"{run.name}: one by one", disable=None)]
    parts = [parts_of(codec, file) for file in files]
    payload = [part["streams"] + part["stored pixels"] for part in parts]
    return {
        "bounds": {name: float(bits.mean()) for name, bits in each.items()},
        "single": list(map(len, files)),
        "payload": payload,
        "archive": archives[max(archives)]["bytes"],
        "archives": archives,
        "above": 8 * np.array(payload) - each["tables"],
        "weights": sum((run / part / "model.safetensors").stat().st_size for part in ("codebook", "prior")),
        "codes": math.prod(codec.coder.model.grid),
        "speed": speeds(codec, timed, rounds),
    }


def speeds(codec: Codec, images: Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """Images a second, as in `other_codecs.speeds`, and of encoding with a look at what comes back."""

    def compress(parts: Sequence[Tensor], verify: bool) -> list[bytes]:
        return [codec.compress(part, options=Compression(verify=verify)) for part in parts]

    def decompress(files: Sequence[bytes]) -> None:
        for file in files:
            codec.decompress(file)

    jobs: dict[tuple[str, str], Callable[[], object]] = {}
    few = images[: max(1, len(images) // ALONE_OF)]
    for kind, parts in (("single", few.split(1)), ("archive", [images])):
        jobs[kind, "encode"] = partial(compress, parts, False)
        jobs[kind, "encode, verified"] = partial(compress, parts, True)
        jobs[kind, "decode"] = partial(decompress, compress(parts, False))
    return others.speeds(jobs, {"single": len(few), "archive": len(images)}, rounds)


def lossy(run: Path, images: Tensor) -> list[Row]:
    """Ours, WebP and JPEG-XL at equal bytes, all images as one file and each as its own: pixels and figures."""
    codec, pictures = codec_of(run), others.pictures_of(images)
    rows = []

    def add(name: str, back: Tensor, num_bytes: int, num_smallest: int = 0) -> None:
        quality = {"PSNR": psnr(images, back).mean().item(), "SSIM": ssim(images, back).mean().item()}
        rows.append(Row(name, back, num_bytes, num_smallest, **quality))

    for how, parts in (("one file", [images]), ("files of their own", images.split(1))):
        files = [codec.compress(part, options=Compression(mode=Mode.LOSSY)) for part in parts]
        back = torch.cat([torch.stack(list(codec.decompress(file))) for file in files])
        add(f"{ours(run.name)}, {how}", back, sum(map(len, files)))
        for name in tqdm(others.LOSSY, desc=f"{run.name}: lossy", disable=None):
            found = others.at_least(pictures, name, [len(file) for file in files])
            levels = torch.from_numpy(np.ascontiguousarray(found.pictures)).view(*pictures.shape[:3], -1)
            add(f"{name}, {how}", rearrange(levels, "b h w c -> b c h w"), found.num_bytes, found.num_smallest)
    return rows


def main(
    runs: Positional[tuple[Path, ...]] = (),
    source: str = "fashion-mini",
    root: Path | None = None,
    num: int = 10_000,
    num_timed: int = 512,
    num_slow: int = 10_000,
    num_steps: int = 1000,
    rounds: int = 3,
    output_dir: Path = harness.OUT,
    others_file: Annotated[Path | None, arg(name="others")] = None,
) -> None:
    """Measure the runs and the other codecs on the same images.

    Args:
        num_slow: images of their own for JPEG-XL e10
        num_steps: of a run of our own
        output_dir: for the pictures
        others_file: keep the other codecs' figures here, and take those that are there
    """
    if len({run.name for run in runs}) < len(runs):
        raise ValueError("two runs have the same name; rename a folder")
    torch.set_num_threads(1)
    runs = runs or (harness.some_run(None, num_steps),)
    images = harness.images(source, "test", num, root=root)
    timed, some = images[:num_timed], images[:NUM_LOSSY]
    rows = [row for run in runs for row in lossy(run, some)]
    of = f"{zlib.crc32(images.numpy().tobytes()):08x}, {len(images)} images, {len(timed)} timed, {num_slow} slow"
    jobs = {f"{name} | {of}": partial(others.measure, name, images, timed, num_slow, rounds) for name in others.CODECS}
    kept = harness.Kept(others_file or output_dir / "other_codecs.json").fill(jobs)
    found = {key.partition(" | ")[0]: figures for key, figures in kept.items()}
    found |= {ours(run.name): measure(run, images, timed, rounds) for run in runs}
    report.print_tables(found, rows, images)
    report.draw_bits(found, images, output_dir / "codec_bits.png")
    report.draw_lossy(some, rows, output_dir / "codec_lossy.png")
