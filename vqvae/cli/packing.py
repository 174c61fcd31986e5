"""Images to a file of bits: compress."""

import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from torch import Tensor
from tqdm import tqdm

from safefolder import Options
from vqvae.cli.common import (
    MODES,
    Model,
    Output,
    at_least_one,
    load_codec,
    load_test_images,
    printable,
    speed,
    tell,
)
from vqvae.cli.reading import image_files, read_exactly
from vqvae.codec import Codec, Compression
from vqvae.codec.archive import destination
from vqvae.codec.block import MAX_PIXELS, MAX_TILES
from vqvae.codec.codec import BlockOptions
from vqvae.codec.tiles import Tiling
from vqvae.data import Images, batches

# A block holds no more pixels than this, but for an image that is larger by itself.
BLOCK_BYTES = 1 << 21
_BATCH_SIZE = 100

Paths = Annotated[tuple[Path, ...], tyro.conf.Positional]


class _Incoming:
    """Images with their names, read as they are asked for; what cannot be read is named and counted."""

    def __init__(self) -> None:
        self.num_read = self.num_bytes = self.num_skipped = 0
        self.total = 0

    def files(self, paths: Sequence[Path], codec: Codec) -> Iterator[tuple[Tensor, str | None]]:
        """Files as they are, in any size."""
        found = image_files(paths)
        self.total = len(found)
        for path, name in found:
            try:
                image = read_exactly(path)
                c, h, w = image.shape
                tiling = Tiling(shape=(c, h, w), num_channels=codec.coder.num_channels, size=codec.coder.size)
                if tiling.num_tiles > MAX_TILES or tiling.num_padded > MAX_PIXELS:
                    raise ValueError(f"it has {h:,} x {w:,} pixels, which are too many for this model's tiles")
            except OSError as error:
                self._skip(str(path), error.strerror or str(error))
            except ValueError as error:
                self._skip(str(path), str(error))
            else:
                yield self._counted(image), name

    def set(self, images: Images, num: int | None) -> Iterator[tuple[Tensor, str | None]]:
        """A set's images, at the model's size."""
        self.total = min(len(images), num or len(images))
        for batch in batches(images, min(self.total, _BATCH_SIZE)):
            for name, reason in batch.skipped:
                self._skip(name, reason)
            for image in batch.images:
                yield self._counted(image), None
                if self.num_read == num:
                    return

    def _counted(self, image: Tensor) -> Tensor:
        self.num_read += 1
        self.num_bytes += image.numel()
        return image

    def _skip(self, name: str, reason: str) -> None:
        self.num_skipped += 1
        tell(f"skipped {printable(name)}: {' '.join(reason.split())}")


@dataclass(frozen=True, kw_only=True)
class Source(Options):
    """What is compressed."""

    images: Paths = ()
    """image files, and folders, of which all image files are taken at any depth, in the order of their names"""
    data: str | None = None
    """instead of files, a set's images at the model's size: a folder, a parquet file, or the name of a set"""
    split: Literal["train", "test"] | None = None
    """of --data, which part; test unless given"""
    num: int | None = None
    """of --data, how many images; all unless given"""


@dataclass(frozen=True, kw_only=True)
class CompressionFlags(BlockOptions):
    """How images become bytes. Large images make blocks of fewer."""

    mode: Literal["lossless", "lossy", "bits-back"] = "lossless"
    """lossless; or lossy, the codes alone, of which the decoder's mean comes back; or bits-back, lossless, for a model
    that samples its codes"""


@dataclass(frozen=True, kw_only=True)
class Target(Options):
    """What the file holds beside them, and what was there."""

    names: bool = True
    """keep the files' names: paths from the folder that was given, or the file's own name"""
    append: bool = False
    """add to the file that is there, of the same model and mode; write it where there is none"""
    force: bool = False
    """replace the file that is there"""


def compress(
    run_or_model: Model,
    source: Annotated[Source, tyro.conf.OmitArgPrefixes] = Source(),
    *,
    output: Output,
    prior: str | None = None,
    compression: Annotated[CompressionFlags, tyro.conf.OmitArgPrefixes] = CompressionFlags(),
    target: Annotated[Target, tyro.conf.OmitArgPrefixes] = Target(),
) -> int:
    """Write images to a file, which `vqvae decompress` reads.

    That takes the same model and prior. Image files of any size are taken as they are: 8-bit grey or RGB, pixel for
    pixel. How a camera was held (EXIF) is not applied, and is not kept, as nothing beside the pixels is. A file that
    cannot be read, or has more than 8-bit grey or RGB can hold (16 bits, transparency, several pictures), is named on
    stderr and left out, and the exit status is then 1. The file is written whole or not at all, by one process at a
    time.

    Example: vqvae compress runs/fashion-mini photos more/photo.png -o album.vq

    Args:
        run_or_model: a run's folder; or a tokenizer's folder or hub id, together with --prior.
        output: the file to write.
        prior: folder or hub id of the prior; the run's own unless given.
    """
    images, data, split, num = source.images, source.data, source.split, source.num
    append, force = target.append, target.force
    if bool(images) == (data is not None):
        raise ValueError("name image files or folders, or a set with --data: one of the two")
    if data is None and (split is not None or num is not None):
        raise ValueError("--split and --num belong to --data; leave them out, or name a set with --data")
    if num is not None:
        at_least_one(num, "--num")
    if append and force:
        raise ValueError("--append keeps what is there and --force replaces it; give one of them")
    # Before any work: who else writes the file, and whether a file can be written there, is known first.
    with destination(output) as place:
        if place.exists() and not (append or force):
            raise ValueError(f"{output} is there already; pass --append to add to it, or --force to replace it")
        append = append and place.exists()
        if append:
            place.open().close()
        codec, _ = load_codec(run_or_model, prior)
        incoming, start = _Incoming(), time.perf_counter()
        if data is None:
            stream = incoming.files(images, codec)
        else:
            found = load_test_images(run_or_model, data, codec.coder.model, split or "test")
            stream = incoming.set(found, num)
        keep_names = target.names and data is None
        before = output.stat().st_size if append else 0
        mode, per_block = MODES[compression.mode], compression.images_per_block
        options = Compression(mode=mode, images_per_block=per_block, verify=compression.verify)
        with tqdm(desc="compress", unit="img", disable=None) as bar, warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = _note
            blocks = _blocks(codec, stream, keep_names, options)
            (place.append if append else place.write)(codec.header(mode), _watched(blocks, incoming, bar))
        seconds = time.perf_counter() - start
        size = output.stat().st_size - before
    done = "added" if append else "written"
    print(
        f"{output}: {incoming.num_read:,} images {done}, {compression.mode}, in {size:,} bytes, "
        f"{8 * size / incoming.num_bytes:.4f} bits/dim of {incoming.num_bytes:,}; {speed(incoming.num_read, seconds)}"
    )
    return 1 if incoming.num_skipped else 0


def _note(message: Warning | str, *_: Any, **__: Any) -> None:
    tell(f"note: {message}")


def _blocks(
    codec: Codec,
    stream: Iterable[tuple[Tensor, str | None]],
    keep_names: bool,
    options: Compression,
) -> Iterator[tuple[int, bytes]]:
    for part in _parts(stream, options.images_per_block):
        yield from codec.blocks(
            [image for image, _ in part],
            options=options,
            names=[name or "" for _, name in part] if keep_names else None,
        )


def _parts(
    stream: Iterable[tuple[Tensor, str | None]], images_per_block: int
) -> Iterator[list[tuple[Tensor, str | None]]]:
    """So many images at a time, or fewer where they are large."""
    part: list[tuple[Tensor, str | None]] = []
    num_bytes = 0
    for image, name in stream:
        if part and (len(part) == images_per_block or num_bytes + image.numel() > BLOCK_BYTES):
            yield part
            part, num_bytes = [], 0
        part.append((image, name))
        num_bytes += image.numel()
    if part:
        yield part


def _watched(blocks: Iterable[tuple[int, bytes]], incoming: _Incoming, bar: tqdm) -> Iterator[tuple[int, bytes]]:
    for num_images, content in blocks:
        yield num_images, content
        bar.total = incoming.total
        bar.update(num_images)
    if not incoming.num_read:
        raise ValueError(f"none of the {incoming.total} images can be read; nothing was written")
