"""WebDataset archives: plain tar files whose members, grouped by name, are samples; with random access.

A member's name up to the first dot of its last part says which sample it belongs to, what follows says what it is:

    n01440764/0007.jpg    the image of sample n01440764/0007, by the ending of an image file
    n01440764/0007.cls    its label, a whole number as text, or the name of its class
    n01440764/0007.json   its label too, where it is an object with a whole number as "label"

Samples without an image are passed over. Of one with several (0007.png beside 0007.depth.png) the one without a further
dot in its ending is taken; where no sample has such a one, that of the first ending that all samples have. Where some
have it and others not, which is meant cannot be told, and it is an error.

There are labels where every image has one, from 0 on; names of classes are numbered in the order of their letters, and
either all are names or none. A .json that says nothing of a label is no label; a .cls always is one.

The archives are read once from header to header, over the data, to find where each image lies; that takes some
20 µs a member and more where the disk is far. An image then costs one read. An archive that ends early, or whose
headers are damaged, is an error: its images would be missing without a trace.
"""

import errno
import os
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from tqdm import tqdm

from vqvae.data.decode import read
from vqvae.data.folder import SUFFIXES, files_of, held_out
from vqvae.data.images import EncodedImages, check_shape, check_split
from vqvae.data.tar_index import ArchiveIndex, agreed, index_of, read_bytes

TEST_PARTS = ("test", "validation", "valid", "val")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
# Images that are tried for the first that can be read, which sets the default size and channels.
_FIRST_IMAGES = 64


class ImageArchives(EncodedImages):
    """Images inside tar files, read when asked for. Of each image memory holds its name and some 30 bytes.

    To `digest` an image is its member's name, place and size, and its archive's name, size and time of change.
    Made by `image_archives`. Raises ValueError where none of them can be read.
    """

    def __init__(
        self,
        archives: list[Path],
        index: ArchiveIndex,
        shape: tuple[int, int, int],
        labels: Int64[Tensor, " n"] | None = None,
        num_classes: int | None = None,
        class_names: tuple[str, ...] | None = None,
        *,
        name: str = "archives",
    ):
        super().__init__(shape, labels, num_classes, class_names, name)
        self.archives, self._index = archives, index
        self.check_readable()

    def __len__(self) -> int:
        return len(self._index.offsets)

    def key(self, index: int) -> str:
        """The archive's name, "/", and the member's."""
        index = range(len(self))[index]
        return f"{self.archives[self._index.archives[index]].name}/{os.fsdecode(self._index.name(index))}"

    def _encoded(self, index: int) -> BytesIO:
        return _image(self.archives, self._index, index)

    def _stamps(self, indices: range) -> Iterator[bytes]:
        index = self._index
        known: dict[int, bytes] = {}
        for each in indices:
            archive = int(index.archives[each])
            if archive not in known:
                path = self.archives[archive]
                status = path.stat()
                known[archive] = b"%b\0%d %d" % (os.fsencode(path.name), status.st_size, status.st_mtime_ns)
            yield b"%b\0%d %d %b" % (index.name(each), index.offsets[each], index.sizes[each], known[archive])


def image_archives(
    source: str | Path, split: str = "train", *, size: int | None = None, channels: int | None = None
) -> ImageArchives:
    """The images of a .tar file, of a folder of them, or of files by a pattern such as "photos-{0000..0012}.tar".

    In a folder, where there are train*.tar they are the training images, and test*.tar, validation*.tar or val*.tar
    those to test on. Of anything else about one image in ten is held out for test, by a hash of its name. `size`: scale
    and crop to `size` by `size`; by default all take the first training image's height and width. `channels`: 1 or 3;
    by default 1 where that image is grey, else 3.
    Raises ValueError for missing, cut or damaged archives, and for archives without a readable image.
    """
    check_split(split)
    check_shape((channels, size, size))
    files = _parts(str(source))
    every = [path for part in files.values() for path in part]
    indices = dict(zip(every, agreed(every, _indices(every, str(source))), strict=True))
    parts = {part: ArchiveIndex.joined([indices[path] for path in paths]) for part, paths in files.items()}
    for part, paths in files.items():
        if not len(parts[part].offsets):
            kinds = " ".join(sorted(SUFFIXES))
            raise ValueError(f"{paths[0]} and what goes with it hold no images; expected members that end in {kinds}")
    if size is None or channels is None:
        first_size, first_channels = _first(files["train"], parts["train"], str(source))
        shape = (channels or first_channels, *(first_size if size is None else (size, size)))
    else:
        shape = (channels, size, size)
    together = np.concatenate([part.labels for part in parts.values()])
    unlabelled = int((together < 0).sum())
    class_names = parts["train"].classes or None
    num_classes = None
    if not unlabelled:
        num_classes = int(together.max()) + 1 if class_names is None else len(class_names)
    where = split if split in parts else "train"
    chosen = parts[where]
    if "test" not in parts:
        held = held_out(chosen.name(each) for each in range(len(chosen.offsets)))
        chosen = chosen.at(np.flatnonzero(held == (split == "test")))
    if not len(chosen.offsets):
        raise ValueError(f"{source} has {len(together)} image(s), none of them for split={split!r}")
    labels = None if num_classes is None else torch.from_numpy(chosen.labels)
    if num_classes is None:
        class_names = None
    images = ImageArchives(files[where], chosen, shape, labels, num_classes, class_names, name=str(source))
    images.unlabelled = unlabelled if unlabelled < len(together) else 0
    return images


def is_archives(source: str) -> bool:
    """Whether a source is for `image_archives`: it ends in .tar, or is a folder that holds such files.

    Raises ValueError for a folder that holds images besides, as some would be left out without a word.
    """
    path = Path(source).expanduser()
    if not path.is_dir():
        return path.suffix == ".tar"
    archives = _archives(path, "")
    if not archives:
        return False
    image = next((each for each in files_of(path) if each.suffix.lower() in SUFFIXES), None)
    if image is not None:
        raise ValueError(
            f"{path} holds archives ({archives[0].name}) and images ({image.relative_to(path)}); expected one of the "
            f"two: name {archives[0]} itself, or archives as {path}/NAME-{{0..9}}.tar, or keep them in folders apart"
        )
    return True


def _archives(folder: Path, start: str) -> list[Path]:
    return sorted(path for path in folder.glob(f"{start}*.tar") if path.is_file())


def _parts(source: str) -> dict[str, list[Path]]:
    """The archives of each split."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        paths = [Path(each).expanduser() for each in _expanded(source)]
        for path in paths:
            if not path.is_file():
                raise ValueError(f"{path} does not exist; expected a .tar file, a folder of them, or NAME-{{0..9}}.tar")
        return {"train": paths}
    if not (train := _archives(folder, "train")):
        if not (every := _archives(folder, "")):
            raise ValueError(f"{folder} holds no .tar files; expected at least one")
        return {"train": every}
    for part in TEST_PARTS:
        if test := _archives(folder, part):
            return {"train": train, "test": test}
    return {"train": train}


def _expanded(pattern: str) -> Iterator[str]:
    """Names by a pattern with ranges in braces, as a shell expands them."""
    found = _RANGE.search(pattern)
    if found is None:
        yield pattern
        return
    first, last = found.groups()
    width = len(first) if first.startswith("0") else 0
    for number in range(int(first), int(last) + 1):
        yield from _expanded(pattern[: found.start()] + f"{number:0{width}}" + pattern[found.end() :])


def _indices(paths: list[Path], name: str) -> list[ArchiveIndex]:
    """The index of each archive, with a progress bar at a terminal."""
    try:
        status = [path.stat() for path in paths]
        total = sum(each.st_size for each in status)
        indices = []
        with tqdm(total=total, desc=f"index {name}", unit="B", unit_scale=True, leave=False, disable=None) as bar:
            for path, each in zip(paths, status, strict=True):
                indices.append(index_of(path, each.st_size, each.st_mtime_ns))
                bar.update(each.st_size)
    except OSError as error:
        raise ValueError(f"{name} can't be read: {error.strerror or error}") from error
    return indices


def _image(archives: list[Path], index: ArchiveIndex, at: int) -> BytesIO:
    length = int(index.sizes[at])
    if length < 0:
        raise ValueError("the member is a link or a sparse file")
    with archives[index.archives[at]].open("rb") as file:
        data = read_bytes(file, int(index.offsets[at]), length)
    if len(data) < length:
        raise OSError(errno.ESTALE, "the archive has become shorter")
    return BytesIO(data)


def _first(archives: list[Path], index: ArchiveIndex, name: str) -> tuple[tuple[int, int], int]:
    """Size (height, width) and channels of the first image that can be read."""
    reason = ""
    for at in range(min(len(index.offsets), _FIRST_IMAGES)):
        try:
            found = read(_image(archives, index, at))
        except (OSError, ValueError) as error:
            reason = str(error)
            continue
        return (found.height, found.width), 1 if found.mode == "L" else 3
    raise ValueError(f"{name} has no readable image among its first {_FIRST_IMAGES} ({reason})")
