"""What a tokenized set of images is on the disk, and which images each shard takes.

    codes-00000.safetensors ...   the shards; shard s is of the source's images s S ... (s + 1) S - 1
        codes       uint16, or uint32 above 65,536 codes, "n *grid": the images that could be read, in order
        labels      int64, "n", where the source has labels
        key_bytes, key_ends       uint8 and int64 "n": what the source calls each image, in the bytes that it has there:
                                  UTF-8, save for names of files that are none; key i is
                                  key_bytes[key_ends[i - 1] : key_ends[i]]
        and one entry of metadata, "about": JSON that says of which tokenizer and images it is, which of them are no
        images, and the CRC-32 of each tensor and of itself
    index.json                    everything else, and of each shard its rows and the CRC-32 of its header, which pins
                                  all that is in it; written last

Which images a shard is of is said by a digest (`Images.digest`: names and labels, and of files their sizes and times of
change), so that a source that was changed between two runs is noticed, and one that was only moved is the same. Where
it lies, and where the tokenizer was loaded from, are notes in the index for people (see `origins`). Nothing in a set
says where on a machine it was made: of absolute paths, also in keys and reasons, there are only the last parts.

Within a shard images are encoded in slices of the batch size from its first image on, the last one padded, so the
numbers of a batch never depend on where a run was stopped or who made which shard: the files of an undisturbed run,
of a resumed one and of many processes are the same, byte for byte. (On the same kind of device and with the same
number of threads. Kernels for others round differently, which can move a code between two that are equally near.)
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped, UInt8
from torch import Tensor

from safefolder import Options
from safefolder.fingerprint import options_of
from safefolder.messages import shown
from vqvae import fingerprint
from vqvae.data import Images, ImageTensors
from vqvae.levels import height_and_width
from vqvae.tokens import origins

FORMAT = 1
INDEX_NAME = "index.json"
CLASS_NAME = "CodeDataset"
# Of one batch of images, which is padded to its full size, and of the codes of one shard, which wait in memory until
# the shard is written.
MAX_BATCH_BYTES = 1 << 30
MAX_SHARD_BYTES = 1 << 32
# Of any number in an index: floats, which some readers of JSON use, are exact up to there.
MAX_NUMBER = 1 << 53


@dataclass(frozen=True, kw_only=True)
class ShardSizes(Options):
    """How many images go together."""

    batch_size: int = 64
    """images that are encoded at once; at most 1 GB of them, as the model takes them"""
    shard_size: int = 8192
    """images to a file, and what a run that is stopped may have to do again"""

    @classmethod
    def meant(cls, name: str, value: Any) -> Any:
        """The value, held against its range first."""
        if name in ("batch_size", "shard_size") and (
            not isinstance(value, int | np.integer) or isinstance(value, bool) or not 1 <= value <= MAX_NUMBER
        ):
            raise ValueError(f"got {name}={shown(value)}; expected a whole number from 1 to {MAX_NUMBER:,}")
        return value


@dataclass(frozen=True, kw_only=True)
class Tokenizing(ShardSizes):
    """How images become shards of codes, and which of the shards."""

    split: str = "train"
    """which part of the source the images are, train or test; it is noted, and nothing else"""
    tile: int | None = None
    """pixels a side of the tiles in which images are encoded that are larger (`vqvae.Tiled`); none is whole"""
    tokenizer_source: str | None = None
    """where the model was loaded from, for people to find it again; its fingerprint is what counts"""
    num_workers: int = 0
    """processes that read and decode ahead; 0 does it here. A set in memory uses none"""
    rank: int = 0
    """of several processes, which need not know each other, this one; from 0"""
    world_size: int = 1
    """how many processes there are, of which each takes every such shard"""


@runtime_checkable
class Tokenizer(Protocol):
    """What is asked of a tokenizer; a `VQVAE` is one. It is also a torch module, on the device that is to encode.

    `config.build()` makes it anew, for Ray's workers, and its `options_of` are what a set notes of it.
    """

    config: Any

    @property
    def num_codes(self) -> int: ...

    @property
    def grid(self) -> tuple[int, ...]: ...

    def encode(self, images: UInt8[Tensor, "b c h w"]) -> Shaped[Tensor, "b *grid"]: ...

    def parameters(self) -> Iterator[Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What is known of a tokenized set alike when it is to be made (a `Plan`) and when it is read (an `Index`).

    Attributes:
        num_images: images of the source, readable or not.
        image_shape: (c, h, w) of each.
        split: which part of the source, "train" or "test".
        num_classes, class_names: of the labels; None where there are none.
        tokenizer: class, config, fingerprint, `any_size` (the fingerprint whatever the size of images; versions before
            did not note it), and the source that it was loaded from as `origins.note` makes it.
        num_codes, grid: of the tokenizer.
        batch_size: images that are encoded at once.
        shard_size: images of the source to a shard.
        tile: pixels a side of the tiles that images are encoded in; None is whole.
    """

    num_images: int
    image_shape: tuple[int, int, int]
    split: str
    num_classes: int | None
    class_names: tuple[str, ...] | None
    tokenizer: dict[str, Any]
    num_codes: int
    grid: tuple[int, ...]
    batch_size: int
    shard_size: int
    tile: int | None = None

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.shard_size)

    @property
    def has_labels(self) -> bool:
        return self.num_classes is not None

    @property
    def dtype(self) -> np.dtype:
        """Of the codes on the disk."""
        return code_dtype(self.num_codes)

    def images(self, shard: int) -> range:
        """Which images of the source a shard is of."""
        first = shard * self.shard_size
        return range(first, min(first + self.shard_size, self.num_images))

    def of_all(self, tokenizer: Any) -> dict[str, Any]:
        """What index and shards say alike, save for how they say the tokenizer. Of whole images there is no tile."""
        return {
            **({} if self.tile is None else {"tile": self.tile}),
            "format": FORMAT,
            "class": CLASS_NAME,
            "tokenizer": tokenizer,
            "split": self.split,
            "batch_size": self.batch_size,
            "shard_size": self.shard_size,
            "num_images": self.num_images,
            "image_shape": list(self.image_shape),
            "num_classes": self.num_classes,
        }

    def of_shard(self, shard: int) -> dict[str, Any]:
        """What a shard's file says of itself, less which images it is of, what could not be read and its checksums."""
        images = self.images(shard)
        return {**self.of_all(self.tokenizer["fingerprint"]), "first": images.start, "stop": images.stop}


@dataclass(frozen=True, kw_only=True)
class Plan(Layout):
    """What a folder of codes will hold: plain data, which goes to any process.

    Attributes:
        folder: where shards and index lie.
        source: what the set calls itself.
        origin: the same as the index notes it, see `origins.note`; None is as it is.
        digests: of each shard's images.
    """

    folder: Path
    source: str
    digests: tuple[str, ...]
    origin: origins.Note = None

    def slices(self, shard: int) -> Iterator[range]:
        """The images of a shard, as many at a time as are encoded at once."""
        images = self.images(shard)
        return (images[at : at + self.batch_size] for at in range(0, len(images), self.batch_size))

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / shard_name(shard)

    def about(self, shard: int) -> dict[str, Any]:
        """What the file of a shard says of itself, less what could not be read and its checksums."""
        return {**self.of_shard(shard), "images": self.digests[shard]}

    def index(self) -> dict[str, Any]:
        """What the index says before any shard is there."""
        return {
            **self.of_all(self.tokenizer),
            "grid": list(self.grid),
            "num_codes": self.num_codes,
            "dtype": str(self.dtype),
            "class_names": None if self.class_names is None else list(self.class_names),
            "source": self.source if self.origin is None else self.origin,
        }


def plan(model: Tokenizer, images: Images, folder: str | Path, options: Tokenizing = Tokenizing()) -> Plan:
    """What `folder` will hold of these images.

    Raises:
        ValueError: a model without codes, or for other images; more than memory has to hold; an image that is not
            there, as a file that was removed since, or a link to nothing.
    """
    batch_size, shard_size, tokenizer_source = options.batch_size, options.shard_size, options.tokenizer_source
    if not hasattr(model, "num_codes"):
        raise ValueError(
            f"{type(model).__name__} has no codes, its latents are real vectors; expected a tokenizer such as VQVAE"
        )
    expected = (model.config.num_channels, *height_and_width(model.config.image_size))
    if images.shape != expected:
        raise ValueError(
            f"the tokenizer is for images of shape {expected}, got {images.shape} of {images.name}; "
            f"load them with size={model.config.image_size} and channels={expected[0]}"
        )
    _check_memory(batch_size, prod(expected), MAX_BATCH_BYTES, "batch_size", "images of a batch")
    row_bytes = prod(model.grid) * code_dtype(model.num_codes).itemsize
    _check_memory(min(shard_size, len(images)), row_bytes, MAX_SHARD_BYTES, "shard_size", "codes of a shard")
    shards = (range(first, min(first + shard_size, len(images))) for first in range(0, len(images), shard_size))
    try:
        digests = tuple(map(images.digest, shards))
    except OSError as error:
        raise not_there(images, error) from error
    plain = json.loads(json.dumps(options_of(model)))  # as it will be read again, tuples being lists
    folder = Path(folder)
    # A set in memory has a name that somebody gave it, whatever else is called so.
    is_path = not isinstance(images, ImageTensors)
    return Plan(
        folder=folder,
        num_images=len(images),
        image_shape=images.shape,
        source=images.name,
        split=options.split,
        num_classes=images.num_classes,
        class_names=images.class_names,
        tokenizer={
            "class": type(model).__name__,
            "config": plain,
            "fingerprint": fingerprint.of_tokenizer(model),
            "any_size": fingerprint.of_tokenizer(model, any_size=True),
            "source": None if tokenizer_source is None else origins.note(tokenizer_source, folder),
        },
        num_codes=model.num_codes,
        grid=tuple(model.grid),
        batch_size=batch_size,
        shard_size=shard_size,
        tile=options.tile,
        digests=digests,
        origin=origins.note(images.name, folder, may_be_relative=is_path),
    )


def _check_memory(num: int, num_bytes: int, most: int, what: str, of: str) -> None:
    if num * num_bytes > most:
        raise ValueError(
            f"got {what}={num:,}, but memory has to hold the {of}, {num * num_bytes / 1e9:,.1f} GB; expected at most "
            f"{most // num_bytes:,}"
        )


def not_there(images: Images, error: OSError) -> ValueError:
    """What to say of an image that may be one, but cannot be had."""
    which = f"{error.filename} of {images.name}" if error.filename else f"an image of {images.name}"
    return ValueError(
        f"{which} cannot be read: {error.strerror or error}; expected all images to be there, as a row that is "
        "left out is left out for good: bring it back, or take it out of the source, and run again"
    )


def code_dtype(num_codes: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every code.

    Raises:
        ValueError: more codes than 32 bits tell apart.
    """
    if num_codes > 1 << 32:
        raise ValueError(f"got num_codes={num_codes:,}; codes of tokenized sets have at most 32 bits")
    return np.dtype(np.uint16 if num_codes <= 1 << 16 else np.uint32)


def shard_name(shard: int) -> str:
    return f"codes-{shard:05}.safetensors"
