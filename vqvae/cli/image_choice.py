"""Which images a command looks at: those of a run, those of a set or a folder, or single files."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

import safefolder
from safefolder import Options
from vqvae import Autoencoder
from vqvae.cli.common import codes_of_run, images_of_run, printable, tell
from vqvae.data import Batch, Images, ImageTensors, load_images
from vqvae.data.batch import places
from vqvae.data.decoding import FITTED, fit, read
from vqvae.data.images import SPLITS, reason
from vqvae.data.own_sizes import PADDED
from vqvae.levels import times
from vqvae.tokens.buckets import of_bucket

Split = Literal["train", "test", "all"]
# Ends of names of what is no image by itself, and holds many.
_SETS = (".parquet", ".tar")
_GREY = "colour is turned to grey, as the model sees it"


class Original(NamedTuple):
    """An image as large as it is, and what its source calls it."""

    name: str
    image: UInt8[Tensor, "c h w"]


@dataclass(frozen=True, kw_only=True)
class ImageChoice(Options):
    """Which images."""

    data: tuple[str, ...] | None = None
    """images: a folder, a parquet file, the name of a set, or one or more image files; the run's own unless given"""
    split: Split | None = None
    """which part of a set: those to train on, those held out to test, or all; test unless given. Image files are all
    taken"""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Images that were chosen.

    Attributes:
        images: at the model's size.
        name: of the set, or of the file.
        split: which part of it.
        notes: what else is to be said of them.
        prepared: how they came to their size, as protocols of figures say it.
    """

    images: Images
    name: str
    split: Split
    notes: tuple[str, ...] = ()
    prepared: str = FITTED

    @property
    def public_name(self) -> str:
        """The name as others may be shown it, without where it lies."""
        return safefolder.cards.public_name(self.name)

    @property
    def what(self) -> str:
        """What they are called after their number."""
        return "images" if self.split == "all" else {"train": "training images", "test": "test images"}[self.split]

    def told(self, num: int | None = None) -> str:
        """A line that says which they are.

        Args:
            num: how many of them are looked at; all unless given.
        """
        total, name = len(self.images), printable(self.name)
        part = "all" if num is None or num == total else f"{num:,} of"
        # A single one of which nothing else is a part is a file.
        which = name if total == 1 and self.split == "all" else f"{part} {total:,} {self.what} of {name}"
        return "; ".join([which, *self.notes])


def choose(source: str, choice: ImageChoice, model: Autoencoder, *, any_size: bool = False) -> Chosen:
    """The images that are named, or else the run's own, at the model's size.

    Args:
        source: the run or the model. Of a run whose prior is on the codes of images of one size (`vqvae tokenize --size
            keep`) its own are those of that size.
        any_size: of such a run, too, all of them.

    Raises:
        ValueError: there are none, or they cannot be read.
    """
    size, channels = model.size, model.config.num_channels
    if choice.data is not None and not choice.data:
        raise ValueError("got --data without a name; expected a folder, a parquet file, a set, or image files")
    if choice.data is not None and (len(choice.data) > 1 or _is_file(choice.data[0])):
        if choice.split not in (None, "all"):
            raise ValueError(f"--split {choice.split} is a part of a set, and image files are none: leave it out")
        return _of_files([Path(name) for name in choice.data], size, channels)
    if choice.data is None:
        name, root = images_of_run(source)
    else:
        name, root = choice.data[0], None
    split = choice.split or "test"
    load = functools.partial(load_images, name, root=root, size=size)
    wanted = list(SPLITS) if split == "all" else [split]
    parts = [load(each, channels=None if channels == 1 else channels) for each in wanted]
    notes = [] if choice.split is not None else ["--split all takes those to train on, too"]
    if any(each.shape[0] != channels for each in parts):
        parts = [load(each, channels=channels) for each in wanted]
        notes.append(_GREY)
    of_codes = None if choice.data is not None or any_size else _of_codes(source, wanted, parts, model.factor)
    if of_codes is not None:
        parts = of_codes
        notes.append(f"those of {times(size)} alone, as the codes of its prior: others are named with --data")
    elif any(images.uses_workers for images in parts):
        notes.append(f"scaled and cropped to {times(size)}")
    if split == "all":
        notes.append(" and ".join(f"{len(part):,} {each}" for each, part in zip(wanted, parts, strict=True)))
    images = parts[0] if len(parts) == 1 else Joined(parts)
    prepared = FITTED if of_codes is None else PADDED
    return Chosen(images=images, name=parts[0].name, split=split, notes=tuple(notes), prepared=prepared)


def _of_codes(source: str, wanted: Sequence[str], parts: Sequence[Images], factor: int) -> list[Images] | None:
    """Of a run whose prior is on the codes of one size the images of that size; None of any other."""
    if (codes := codes_of_run(source)) is None:
        return None
    found = [of_bucket(codes, split, part, multiple=factor) for split, part in zip(wanted, parts, strict=True)]
    known = [each for each in found if each is not None]
    return known if len(known) == len(found) else None


def _is_file(name: str) -> bool:
    """Whether it is a single image, as far as one can tell without reading it."""
    path = Path(name).expanduser()
    return path.suffix.lower() not in _SETS and not name.startswith("hf:") and path.is_file()


def _of_files(paths: Sequence[Path], size: tuple[int, int], channels: int) -> Chosen:
    pictures = [_read(given, cover=max(size)) for given in paths]
    found = [fit(picture, size, channels) for picture in pictures]
    name = str(paths[0]) if len(paths) == 1 else f"{len(paths)} files"
    notes = [f"scaled and cropped to {size[0]}x{size[1]}"]
    if channels == 1 and any(picture.mode != "L" for picture in pictures):
        notes.append(_GREY)
    return Chosen(images=ImageTensors(torch.stack(found), name=name), name=name, split="all", notes=tuple(notes))


def _read(given: Path, cover: int | None = None) -> Image.Image:
    """An image file that was named."""
    path = given.expanduser()
    if path.is_dir() or path.suffix.lower() in _SETS:
        raise ValueError(f"got {given} among several --data, expected image files; name a set by itself")
    if not path.exists():
        raise ValueError(f"no file at {given}; expected image files with --data, or one set")
    try:
        return read(path, cover=cover)
    except OSError as error:
        raise ValueError(f"{given} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{given}: {error}") from error


def as_large_as_they_are(source: str, choice: ImageChoice, model: Autoencoder, num: int) -> Iterator[Original]:
    """The first `num` of the images that `choose` chooses, one by one; those of a set that cannot be read are named.

    Raises:
        ValueError: as `choose`, or a file that cannot be read.
    """
    channels = model.config.num_channels
    if choice.data is not None and (len(choice.data) > 1 or (choice.data and _is_file(choice.data[0]))):
        choose(source, choice, model)  # what is wrong with any of them, before the first is worked on
        for name in choice.data[:num]:
            picture = _read(Path(name))
            yield Original(name, fit(picture, (picture.height, picture.width), channels))
        return
    images = choose(source, choice, model, any_size=True).images
    found = 0
    for index in range(len(images)):
        if found == num:
            return
        try:
            image = images.original(index)
        except (OSError, ValueError) as error:
            tell(f"skipped {printable(images.key(index))}: {printable(reason(error))}")
            continue
        found += 1
        yield Original(images.key(index), image)


class Joined(Images):
    """Parts of a set, one after the other."""

    def __init__(self, parts: Sequence[Images]):
        self.parts, first = list(parts), parts[0]
        self.shape, self.name = first.shape, first.name
        self.num_classes, self.class_names = first.num_classes, first.class_names
        known = [part.labels for part in parts if part.labels is not None]
        self.labels = torch.cat(known) if len(known) == len(parts) else None
        self.label_note = next((part.label_note for part in parts if part.label_note), "")
        self._starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> Batch:
        found = places(indices, len(self))
        of = np.searchsorted(self._starts, found, side="right") - 1
        batches: list[Any] = []
        for number, group in itertools.groupby(zip(of.tolist(), found.tolist(), strict=True), lambda each: each[0]):
            inside = [index - int(self._starts[number]) for _, index in group]
            batches.append(self.parts[number].__getitems__(inside))
        labels = [batch.labels for batch in batches if batch.labels is not None]
        images = [batch.images for batch in batches] or [torch.empty((0, *self.shape)).byte()]
        return Batch(
            torch.cat(images),
            torch.cat(labels) if batches and len(labels) == len(batches) else None,
            tuple(itertools.chain.from_iterable(batch.skipped for batch in batches)),
        )

    def _at(self, index: int) -> tuple[Images, int]:
        """The part of an image, and its number there."""
        index = range(len(self))[index]
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.parts[number], index - int(self._starts[number])

    def key(self, index: int) -> str:
        part, inside = self._at(index)
        return part.key(inside)

    def original_size(self, index: int) -> tuple[int, int]:
        part, inside = self._at(index)
        return part.original_size(inside)

    def original(self, index: int) -> UInt8[Tensor, "c h w"]:
        part, inside = self._at(index)
        return part.original(inside)
