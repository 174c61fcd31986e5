"""WebDataset archives: plain tar files whose members, grouped by name, are samples; with random access.

A member's name up to the first dot of its last part says which sample it belongs to, what follows says what it is:

    n01440764/0007.jpg    the image of sample n01440764/0007, by the ending of an image file
    n01440764/0007.cls    its label, a whole number as text
    n01440764/0007.json   its label too, where it is an object with a whole number as "label"

Of a sample with several images the first is taken; samples without one are passed over. There are labels where every
image has one, from 0 on.

The archives are read once from header to header, over the data, to find where each image lies; that takes some
20 µs a member and more where the disk is far. An image then costs one read. An archive that ends early, or whose
headers are damaged, is an error: its images would be missing without a trace.
"""

import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import IO

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from tqdm import tqdm

from vqvae.data.decode import read
from vqvae.data.folder import SUFFIXES, held_out
from vqvae.data.images import EncodedImages, check_shape, check_split

TEST_PARTS = ("test", "validation", "valid", "val")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_UNKNOWN = -1
# Descriptions beside an image are of some kB; what is larger holds no label.
_MAX_JSON = 1 << 24
# Images that are tried for the first that can be read, which sets the default size and channels.
_FIRST_IMAGES = 64


@dataclass(frozen=True, kw_only=True)
class _Index:
    """Where the images of archives lie, in order. An image that is no plain run of bytes has a size below 0."""

    archives: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    names: bytes
    ends: np.ndarray

    def name(self, index: int) -> bytes:
        return self.names[self.ends[index] : self.ends[index + 1]]

    def at(self, chosen: np.ndarray) -> "_Index":
        names = [self.name(index) for index in chosen.tolist()]
        return _Index(
            archives=self.archives[chosen],
            offsets=self.offsets[chosen],
            sizes=self.sizes[chosen],
            labels=self.labels[chosen],
            names=b"".join(names),
            ends=np.fromiter(accumulate(map(len, names), initial=0), np.int64),
        )

    @staticmethod
    def joined(parts: "list[_Index]") -> "_Index":
        """Of one archive after another, which are numbered so."""
        shifts = accumulate((len(part.names) for part in parts), initial=0)
        ends = [part.ends[1:] + shift for part, shift in zip(parts, shifts, strict=False)]
        return _Index(
            archives=np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.offsets) for part in parts]),
            offsets=np.concatenate([part.offsets for part in parts]),
            sizes=np.concatenate([part.sizes for part in parts]),
            labels=np.concatenate([part.labels for part in parts]),
            names=b"".join([part.names for part in parts]),
            ends=np.concatenate([np.zeros(1, np.int64), *ends]),
        )


class ImageArchives(EncodedImages):
    """Images inside tar files, read when asked for. Of each image memory holds its name and some 30 bytes.

    Made by `image_archives`. Raises ValueError where none of them can be read.
    """

    def __init__(
        self,
        archives: list[Path],
        index: _Index,
        shape: tuple[int, int, int],
        labels: Int64[Tensor, " n"] | None = None,
        num_classes: int | None = None,
        *,
        name: str = "archives",
    ):
        super().__init__(shape, labels, num_classes, None, name)
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
    indices = dict(zip(every, _indices(every, str(source)), strict=True))
    parts = {part: _Index.joined([indices[path] for path in paths]) for part, paths in files.items()}
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
    num_classes = None if (together < 0).any() else int(together.max()) + 1
    where = split if split in parts else "train"
    chosen = parts[where]
    if "test" not in parts:
        held = held_out(chosen.name(each) for each in range(len(chosen.offsets)))
        chosen = chosen.at(np.flatnonzero(held == (split == "test")))
    if not len(chosen.offsets):
        raise ValueError(f"{source} has {len(together)} image(s), none of them for split={split!r}")
    labels = None if num_classes is None else torch.from_numpy(chosen.labels)
    return ImageArchives(files[where], chosen, shape, labels, num_classes, name=str(source))


def is_archives(source: str) -> bool:
    """Whether a source is for `image_archives`: it ends in .tar, or is a folder that holds such files."""
    path = Path(source).expanduser()
    return path.suffix == ".tar" or (path.is_dir() and any(path.glob("*.tar")))


def _parts(source: str) -> dict[str, list[Path]]:
    """The archives of each split."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        paths = [Path(each).expanduser() for each in _expanded(source)]
        for path in paths:
            if not path.is_file():
                raise ValueError(f"{path} does not exist; expected a .tar file, a folder of them, or NAME-{{0..9}}.tar")
        return {"train": paths}
    if not (train := sorted(folder.glob("train*.tar"))):
        return {"train": sorted(folder.glob("*.tar"))}
    for part in TEST_PARTS:
        if test := sorted(folder.glob(f"{part}*.tar")):
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


def _indices(paths: list[Path], name: str) -> list[_Index]:
    """The index of each archive, with a progress bar at a terminal."""
    try:
        status = [path.stat() for path in paths]
        total = sum(each.st_size for each in status)
        indices = []
        with tqdm(total=total, desc=f"index {name}", unit="B", unit_scale=True, leave=False, disable=None) as bar:
            for path, each in zip(paths, status, strict=True):
                indices.append(_index(path, each.st_size, each.st_mtime_ns))
                bar.update(each.st_size)
    except OSError as error:
        raise ValueError(f"{name} can't be read: {error.strerror or error}") from error
    return indices


# The two splits of a source are asked for one after the other, and indexing takes long.
@lru_cache(maxsize=4096)
def _index(path: Path, size: int, changed: int) -> _Index:
    """The index of one archive of this size and time of change."""
    samples: dict[str, _Sample] = {}
    with path.open("rb") as file:
        for name, start, length in _members(path, file):
            folder, slash, last = name.rpartition("/")
            stem, dot, kind = last.partition(".")
            if not stem or not dot:
                continue
            sample = samples.setdefault(folder + slash + stem, _Sample())
            suffix = os.path.splitext(last)[1].lower()
            if suffix in SUFFIXES:
                sample.images[name] = start, length
            elif kind in ("cls", "json") and (kind == "cls" or length <= _MAX_JSON):
                sample.labels[kind] = _label(path, name, _bytes(file, start, length) if length >= 0 else b"")
    found = [sample for sample in samples.values() if sample.images]
    firsts = [next(iter(sample.images.items())) for sample in found]
    names = [os.fsencode(name) for name, _ in firsts]
    return _Index(
        archives=np.zeros(len(found), np.int32),
        offsets=np.array([start for _, (start, _) in firsts], np.int64),
        sizes=np.array([length for _, (_, length) in firsts], np.int64),
        labels=np.array([sample.label for sample in found], np.int64),
        names=b"".join(names),
        ends=np.fromiter(accumulate(map(len, names), initial=0), np.int64),
    )


@dataclass
class _Sample:
    """What was found of one sample: images by member, and labels by what they are in."""

    images: dict[str, tuple[int, int]] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)

    @property
    def label(self) -> int:
        return self.labels.get("cls", self.labels.get("json", _UNKNOWN))


def _members(path: Path, file: IO[bytes]) -> Iterator[tuple[str, int, int]]:
    """Name, start and size of every file in an archive; the size is below 0 where it is no plain run of bytes."""
    seen: dict[str, tuple[int, int]] = {}
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # pyrefly: ignore  (or it keeps every header)
                if member.islnk():
                    seen[member.name] = seen.get(member.linkname, (0, -1))
                elif member.isreg() and not member.issparse():
                    seen[member.name] = member.offset_data, member.size
                elif member.isdir():
                    continue
                else:
                    seen[member.name] = 0, -1
                yield member.name, *seen[member.name]
            end = archive.offset
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise _damaged(path, str(error) or type(error).__name__) from error
    # The reader takes a damaged header for the end. What is left has to be the empty blocks of a real one.
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise _damaged(path, f"it stops at byte {end:,} without the empty blocks that end an archive")
    while block:
        if block.count(0) != len(block):
            raise _damaged(path, f"from byte {end:,} on there is no header, but there is data")
        block = file.read(1 << 20)


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} is cut, damaged, or no plain tar file ({why}); get or make it again")


def _bytes(file: IO[bytes], start: int, length: int) -> bytes:
    file.seek(start)
    return file.read(length)


def _label(path: Path, name: str, text: bytes) -> int:
    """The label in a member; -1 where there is none."""
    try:
        if name.endswith(".cls"):
            return max(int(text), _UNKNOWN)
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: its member {name} holds no label ({error}); mend it or leave it out") from error
    label = found.get("label") if isinstance(found, dict) else None
    return max(label, _UNKNOWN) if isinstance(label, int) and not isinstance(label, bool) else _UNKNOWN


def _image(archives: list[Path], index: _Index, at: int) -> BytesIO:
    length = int(index.sizes[at])
    if length < 0:
        raise ValueError("the member is a link or a sparse file")
    with archives[index.archives[at]].open("rb") as file:
        data = _bytes(file, int(index.offsets[at]), length)
    if len(data) < length:
        raise ValueError("the archive has become shorter")
    return BytesIO(data)


def _first(archives: list[Path], index: _Index, name: str) -> tuple[tuple[int, int], int]:
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
