"""A folder of images of any size, as images of one size.

    folder/train/..., folder/test/...      the two splits (val/ or validation/ may stand for test/)
    folder/...                             one image in ten is held out for test, chosen by its name

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
import torch
from jaxtyping import Int64
from torch import Tensor

from vqvae.data.decode import read
from vqvae.data.images import EncodedImages, check_shape, check_split

DEFAULT_SIZE = 64
TEST_FOLDERS = ("test", "validation", "val")
SUFFIXES = frozenset(
    (
        *(".avif", ".apng", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
        *(".j2k", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
    )
)


class ImageFiles(EncodedImages):
    """Image files under one folder, read when asked for.

    names: paths from `folder`, with "/" between the parts. labels: int64, "n", or None. To `digest` a file is its
    name, its size and its time of change.
    Raises ValueError where `names` is empty or none of the files can be read.
    """

    def __init__(
        self,
        folder: Path,
        names: list[str],
        shape: tuple[int, int, int],
        labels: Int64[Tensor, " n"] | None = None,
        class_names: tuple[str, ...] | None = None,
        *,
        name: str = "files",
    ):
        num_classes = None if class_names is None else len(class_names)
        super().__init__(shape, labels, num_classes, class_names, name)
        if not names:
            raise ValueError(f"got no image files in {name}; expected at least one")
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

    def _stamps(self, indices: range) -> Iterator[bytes]:
        for index in indices:
            name = self._names[self._ends[index] : self._ends[index + 1]]
            try:
                status = os.stat(os.path.join(os.fsencode(self.folder), name))
            except OSError as error:
                raise OSError(error.errno, error.strerror, self.key(index)) from error
            yield b"%b\0%d %d" % (name, status.st_size, status.st_mtime_ns)


def image_folder(
    folder: str | Path,
    split: str = "train",
    *,
    size: int = DEFAULT_SIZE,
    channels: int | None = None,
) -> ImageFiles:
    """The images under `folder`, at any depth, scaled and cropped to `size` by `size`.

    Hidden files and files whose names don't end like an image's are passed over; what is named
    like an image and can't be read is listed in `Batch.skipped`. A folder that holds `train/` and
    one of `test/`, `validation/`, `val/` is split so; of any other about one image in ten is held
    out for test by a hash of its path (at least one in each split where there are two or more).
    `channels`: 1 or 3; by default 1 where the first readable image is grey, else 3.
    Raises ValueError for a missing or empty folder, or one without a readable image.
    """
    folder = Path(folder)
    check_split(split)
    check_shape((channels, size, size))
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; expected one that holds images")
    bases = _split_folders(folder)
    names = {base: _image_names(base) for base in set(bases.values())}
    every = [name for base in names.values() for name in base]
    if not every:
        kinds = " ".join(sorted(SUFFIXES))
        raise ValueError(f"{folder} holds no images; expected files that end in {kinds}")
    base = bases[split]
    chosen = names[base]
    if len(names) == 1:
        test = held_out([os.fsencode(name) for name in chosen])
        chosen = [name for name, held in zip(chosen, test, strict=True) if held == (split == "test")]
    if not chosen:
        raise ValueError(
            f"{base} has no image for split={split!r} ({len(every)} found in {folder}); "
            "expected at least one in each split"
        )
    if channels is None:
        # The same for both splits, so the training images decide.
        first = bases["train"] if names[bases["train"]] else base
        channels = _first_channels(first, names[first])
    classes = _class_names(every)
    labels = None
    if classes is not None:
        number = {name: label for label, name in enumerate(classes)}
        labels = torch.tensor([number[name.partition("/")[0]] for name in chosen])
    images = ImageFiles(base, chosen, (channels, size, size), labels, classes, name=str(folder))
    outside = sum("/" not in name for name in every)
    images.unlabelled = outside if outside < len(every) else 0
    return images


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


def _split_folders(folder: Path) -> dict[str, Path]:
    tests = [folder / name for name in TEST_FOLDERS if (folder / name).is_dir()]
    if (folder / "train").is_dir() and tests:
        return {"train": folder / "train", "test": tests[0]}
    return {"train": folder, "test": folder}


def _image_names(folder: Path) -> list[str]:
    """Sorted paths from `folder` of every file in it that is named like an image."""
    return sorted(path.relative_to(folder).as_posix() for path in files_of(folder) if path.suffix.lower() in SUFFIXES)


def files_of(folder: Path) -> Iterator[Path]:
    """Every file in a folder, at any depth, save for hidden ones."""
    return _files(folder, set())


def _files(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    # Data sets are often put together from links to folders, and links can run in circles.
    status = folder.stat()
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _files(Path(entry.path), seen)
            else:
                yield Path(entry.path)


def _class_names(names: list[str]) -> tuple[str, ...] | None:
    if not all("/" in name for name in names):
        return None
    return tuple(sorted({name.partition("/")[0] for name in names}))


def _first_channels(folder: Path, names: list[str]) -> int:
    """The channels of the first image that can be read; 3 where none can."""
    for name in names:
        try:
            return 1 if read(folder / name).mode == "L" else 3
        except (OSError, ValueError):
            continue
    return 3
