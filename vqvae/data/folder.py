"""A folder of images of any size, as images of one size.

    folder/train/..., folder/test/...      the two splits, by the names in `vqvae.data.splits`
    folder/..., or folder/train/...        one image in ten is held out for test, chosen by its name

An image's class is the subfolder, one level down, in which it sits; where any image sits in none
there are no labels. An image belongs to `test` by a hash of its path from the folder:

    test  <=>  blake2b(path) mod 10 = 0

so the choice needs no state, and adding or removing images moves no other.
"""

import os
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path

import numpy as np

from vqvae.data.decoding import SUFFIXES as SUFFIXES
from vqvae.data.decoding import read
from vqvae.data.images import EncodedImages, Size, check_split, wanted
from vqvae.data.labels import Classes, Given
from vqvae.data.splits import Layout, layout

DEFAULT_SIZE = 64


class ImageFiles(EncodedImages):
    """Image files under one folder, read when asked for.

    names: paths from `folder`, with "/" between the parts. To `digest` a file is its name, its size and its time of
    change. Raises ValueError where none of the files can be read.
    """

    def __init__(
        self, folder: Path, names: list[str], shape: tuple[int, int, int], classes: Classes, given: Given, *, name: str
    ):
        super().__init__(name, shape, classes, given)
        self.folder = folder
        # One block of bytes: a list of a million strings is copied page by page into every worker
        # process, as counting references writes to each of them.
        encoded = [os.fsencode(each) for each in names]
        self._names = b"".join(encoded)
        self._ends = np.fromiter(accumulate(map(len, encoded), initial=0), np.int64)
        self.check_readable()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def key(self, index: int) -> str:
        """The path from the folder."""
        index = range(len(self))[index]
        return os.fsdecode(self._names[self._ends[index] : self._ends[index + 1]])

    def _encoded(self, index: int) -> Path:
        return self.folder / self.key(index)

    def _stamps(self, indices: range, times: bool) -> Iterator[bytes]:
        for index in indices:
            name = self._names[self._ends[index] : self._ends[index + 1]]
            try:
                status = os.stat(os.path.join(os.fsencode(self.folder), name))
            except OSError as error:
                raise OSError(error.errno, error.strerror, self.key(index)) from error
            yield b"%b\0%d" % (name, status.st_size) + (b" %d" % status.st_mtime_ns if times else b"")


def image_folder(
    folder: str | Path, split: str = "train", *, size: Size = DEFAULT_SIZE, channels: int | None = None
) -> ImageFiles:
    """The images under `folder`, at any depth, scaled and cropped to `size`.

    Hidden files and files whose names don't end like an image's are passed over; what is named
    like an image and can't be read is listed in `Batch.skipped`. A folder that holds folders
    `train/` and `test/` is split so (other names: `vqvae.data.splits`); of any other, or of
    `train/` alone, about one image in ten is held out for test by a hash of its path (at least one
    in each split where there are two or more).
    `channels`: 1 or 3; by default 1 where the first readable image is grey, else 3.
    Raises ValueError for a missing or empty folder, one without a readable image, and one that can
    be read in two ways.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; expected one that holds images")
    return images_of(layout(folder), split, size=size, channels=channels)


def images_of(found: Layout, split: str, *, size: Size, channels: int | None) -> ImageFiles:
    """`image_folder` for a folder of which it is known what it holds."""
    check_split(split)
    sides, channels = wanted(size, channels)
    assert sides is not None
    parts = found.parts("images", split)
    part = parts.get(split, parts["train"])
    chosen = part.names
    if "test" not in parts:
        test = held_out([os.fsencode(name) for name in chosen])
        chosen = [name for name, held in zip(chosen, test, strict=True) if held == (split == "test")]
    if not chosen:
        raise ValueError(
            f"{part.folder} has no image for split={split!r} ({len(part.names)} found); expected at least one in each"
        )
    if channels is None:
        # The same for both splits, so the training images decide.
        first = parts["train"]
        channels = _first_channels(first.folder / name for name in first.names)
    classes = Classes.of(Given.joined([_given(each.names) for each in parts.values()]))
    images = ImageFiles(part.folder, chosen, (channels, *sides), classes, _given(chosen), name=str(found.folder))
    images.split = split
    return images


def _given(names: list[str]) -> Given:
    return Given.of(name.partition("/")[0] if "/" in name else None for name in names)


def held_out(keys: Iterable[bytes]) -> np.ndarray:
    """Which of `keys` belong to the test split, as booleans: about one in ten, by their hash.

    Of two keys or more at least one is held out and at least one is not.
    """
    hashes = np.array([int.from_bytes(blake2b(key, digest_size=8).digest()) for key in keys], np.uint64)
    held = hashes % 10 == 0
    if len(hashes) > 1 and not held.any():
        held[hashes.argmin()] = True
    if len(hashes) > 0 and held.all():
        held[hashes.argmax()] = False
    return held


def _first_channels(paths: Iterable[Path]) -> int:
    """The channels of the first image that can be read; 3 where none can."""
    for path in paths:
        try:
            return 1 if read(path).mode == "L" else 3
        except (OSError, ValueError):
            continue
    return 3
