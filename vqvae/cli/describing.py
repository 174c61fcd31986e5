"""What a file of bits holds and where its bytes go: info."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import safefolder
from vqvae.cli.common import MODES, File, load_codec, printable
from vqvae.codec import Archive, Codec, Mode
from vqvae.codec.bits_back import BitsBack
from vqvae.codec.block import STORED, BlockContent
from vqvae.codec.codec import DecodedBlock
from vqvae.codec.coder import RangeReader
from vqvae.codec.container import BLOCK, HEADER, TRAILER, VERSION, read_varint
from vqvae.codec.storage import file_to_write

_SHOWN = 20
# Images are measured together up to so many pixels.
_MOST_BYTES = 1 << 21
_COLUMNS = ("image", "height", "width", "channels", "rate", "distortion", "total", "bits/dim", "PNG bits/dim", "stored")

_NOTES = {
    Mode.LOSSLESS: "Bits of the integer tables, measured on the decoded images.",
    Mode.LOSSY: "Bits of the codes in the file. No pixels are in it: PNG is that of the images that come back.",
    Mode.BITS_BACK: "Rate and distortion are of each image's most probable codes, measured on the decoded images. The "
    "file has codes that were sampled: it pays for those, and gets back the bits that chose them.",
}


@dataclass(kw_only=True)
class _Found:
    """What was counted in the blocks: bytes, and a row an image."""

    dims: int = 0
    streams: int = 0
    stored: int = 0
    names: int = 0
    initial_bits: int = 0
    disagree: int = 0
    rows: list[tuple[Any, ...]] = field(default_factory=list)


def info(
    file: File,
    run_or_model: Annotated[str | None, tyro.conf.Positional] = None,
    *,
    prior: str | None = None,
    csv: Path | None = None,
) -> None:
    """State what a compressed file holds, and what its images cost.

    The costs take the model that wrote it; those of PNG stand beside them.

    Example: vqvae info album.vq runs/fashion-mini --csv album.csv

    Args:
        file: a file that `vqvae compress` wrote.
        run_or_model: what it was written with: a run's folder; or a tokenizer's folder or hub id, with --prior.
        prior: folder or hub id of the prior; the run's own unless given.
        csv: a CSV file to write a line for each image to.
    """
    if run_or_model is None and (csv is not None or prior is not None):
        raise ValueError("--csv and --prior need the model that wrote the file; name its run after the file")
    if csv is not None:
        file_to_write(csv)
    with Archive.open(file) as archive:
        if run_or_model is None:
            dims = sum(_num_dims(archive.content(i)) for i in range(len(archive.blocks)))
            print("\n".join(_summary(file, archive, dims)))
            return
        codec, num_weights = load_codec(run_or_model, prior)
        codec.check_header(archive.header)
        found = _look(codec, archive)
        lines = _summary(file, archive, found.dims)
    if csv is not None:
        safefolder.files.write_text(csv, _as_csv(found.rows))
    mode = archive.header.mode
    heads = sum(block.length for block in archive.blocks) - found.streams - found.stored - found.names
    lines += [
        f"    streams      {found.streams:,} bytes",
        f"    stored       {found.stored:,} bytes of pixels that the model finds incompressible",
        f"    names        {found.names:,} bytes",
        f"    the rest     {heads:,} bytes: shapes, kinds of tiles, checks of pixels",
        f"weights          {num_weights:,} bytes of the model and the prior, which the file does not hold",
    ]
    if mode == Mode.BITS_BACK:
        lines.append(f"initial bits     {found.initial_bits:,} of the streams, {found.initial_bits // 8:,} bytes")
    if found.disagree:
        lines.append(f"In {found.disagree} images the file stores other tiles than these figures are for.")
    print("\n".join([*lines, "", *_table(found.rows), _NOTES[mode]]))


def _summary(file: Path, archive: Archive, dims: int) -> list[str]:
    contents = sum(block.length for block in archive.blocks)
    heads = len(archive.blocks) * BLOCK.size
    index = archive.size - HEADER.size - TRAILER.size - heads - contents
    mode = next(name for name, mode in MODES.items() if mode == archive.header.mode)
    per_dim = f", {8 * archive.size / dims:.4f} bits/dim" if dims else ""
    return [
        f"{file}",
        f"mode             {mode}",
        f"version          {VERSION}",
        f"fingerprint      {archive.header.fingerprint.hex()}",
        f"images           {archive.num_images:,} in {len(archive.blocks):,} blocks, {dims:,} pixels times channels",
        f"size             {archive.size:,} bytes{per_dim}",
        f"  container      {archive.size - contents:,} bytes: header {HEADER.size}, heads of blocks {heads:,}, "
        f"index {index:,}, trailer {TRAILER.size}",
        f"  contents       {contents:,} bytes",
    ]


def _num_dims(content: bytes) -> int:
    """Pixels times channels of a block's images, without the model. See `vqvae.codec.block`."""
    left, at = read_varint(content)
    at, dims = at + 1, 0
    while left > 0:
        run, at = read_varint(content, at)
        channels, at = int.from_bytes(content[at : at + 1]), at + 1
        height, at = read_varint(content, at)
        width, at = read_varint(content, at)
        run = min(max(run, 1), left)
        dims += run * channels * height * width
        left -= run
    return dims


def _look(codec: Codec, archive: Archive) -> _Found:
    found, mode = _Found(), archive.header.mode
    with tqdm(total=archive.num_images, desc="info", unit="img", disable=None) as bar:
        for i, decoded in enumerate(codec.decode(archive)):
            data = archive.content(i)
            content = BlockContent.unpack(data, codec.coder.num_channels, codec.coder.size)
            found.streams += len(content.stream)
            found.stored += len(content.stored)
            found.names += len(data) - len(replace(content, names=None).pack())
            if mode == Mode.BITS_BACK:
                found.initial_bits += BitsBack(codec.coder).initial_bits(content.stream)
            owner = torch.tensor([j for j, tiling in enumerate(content.tilings) for _ in range(tiling.num_tiles)])
            is_stored = (torch.tensor(content.kinds) == STORED).long()
            stored = torch.zeros(len(content.tilings), dtype=torch.int64).index_add(0, owner, is_stored)
            rate, distortion, expected = _measured(codec, content, decoded, owner, mode)
            found.disagree += int((stored != expected).sum())
            for j, image in enumerate(decoded.images):
                name = (decoded.names[j] if decoded.names else "") or f"{len(found.rows):06}"
                dims, total = image.numel(), float(rate[j] + distortion[j])
                found.dims += dims
                c, h, w = image.shape
                bits = (float(rate[j]), float(distortion[j]), total, total / dims, 8 * _png_bytes(image) / dims)
                found.rows.append((name, h, w, c, *bits, int(stored[j])))
            bar.update(len(decoded.images))
    return found


def _measured(
    codec: Codec, content: BlockContent, decoded: DecodedBlock, owner: Tensor, mode: Mode
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"], Tensor]:
    """Rate and distortion of a block's images in bits, and how many of their tiles these figures take for stored."""
    num = len(decoded.images)
    if mode == Mode.LOSSY:
        zeros = torch.zeros(num, dtype=torch.float64)
        return _rate_of_codes(codec, content, owner), zeros, zeros.long()
    size = num if sum(image.numel() for image in decoded.images) <= _MOST_BYTES else 1
    parts = [slice(start, start + size) for start in range(0, num, size)]
    labels = decoded.labels
    costs = [codec.measure(decoded.images[part], None if labels is None else labels[part]) for part in parts]
    rate, distortion, stored = ([getattr(cost, name) for cost in costs] for name in ("rate", "distortion", "stored"))
    return torch.cat(rate), torch.cat(distortion), torch.cat(stored)


@torch.no_grad()
def _rate_of_codes(codec: Codec, content: BlockContent, owner: Tensor) -> Float[Tensor, " b"]:
    """Bits of the codes that are in a block of codes alone, and of the labels."""
    coder, reader = codec.coder, RangeReader(content.stream)
    rate = torch.zeros(len(content.tilings), dtype=torch.float64)
    labels = coder.decode_labels(reader, len(content.tilings)) if content.has_labels else None
    for part in torch.arange(len(content.kinds)).split(coder.group_size):
        known = None if labels is None else labels[owner[part]]
        offsets = torch.tensor(content.kinds)[part].to(coder.device)
        codes = coder.decode_codes([(reader, len(part))], known, offsets)
        intervals, _ = coder.code_intervals(codes, known, offsets)
        rate.index_add_(0, owner[part], intervals.bits().sum(1).cpu())
    return rate + (coder.label_bits if content.has_labels else 0)


def _png_bytes(image: Tensor) -> int:
    pixels = rearrange(image, "c h w -> h w c").numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if len(image) == 1 else pixels).save(buffer, format="png", optimize=True)
    return buffer.tell()


def _table(rows: Sequence[tuple[Any, ...]]) -> list[str]:
    """The first rows, and the sums of all."""
    heads = (("image", -32), ("size", 13), ("rate", 11), ("distortion", 13), ("total", 13), ("bits/dim", 9), ("PNG", 8))
    lines = [" ".join([*(f"{name:{'<' if width < 0 else '>'}{abs(width)}}" for name, width in heads), " stored"])]
    for name, h, w, c, rate, distortion, total, per_dim, png, stored in rows[:_SHOWN]:
        name = printable(name)
        shown = name if len(name) <= 32 else f"…{name[-31:]}"
        lines.append(
            f"{shown:<32} {f'{c}x{h}x{w}':>13} {rate:>11,.1f} {distortion:>13,.1f} {total:>13,.1f} {per_dim:>9.4f} "
            f"{png:>8.4f} {stored:>7}"
        )
    if len(rows) > _SHOWN:
        lines.append(f"and {len(rows) - _SHOWN:,} more; --csv writes all")
    dims = sum(h * w * c for _, h, w, c, *_ in rows)
    rate, distortion, total = (sum(row[i] for row in rows) for i in (4, 5, 6))
    png = sum(row[8] * row[1] * row[2] * row[3] for row in rows) / max(dims, 1)
    lines.append(
        f"{f'all {len(rows):,}':<32} {'':>13} {rate:>11,.1f} {distortion:>13,.1f} {total:>13,.1f} "
        f"{total / max(dims, 1):>9.4f} {png:>8.4f} {sum(row[9] for row in rows):>7}"
    )
    return lines


def _as_csv(rows: Sequence[tuple[Any, ...]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows(rows)
    return text.getvalue()
