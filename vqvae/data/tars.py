"""WebDataset archives: plain tar files whose members, grouped by name, are samples; with random access.

WebDataset's own reader streams: it knows no image by its number, as resuming exactly and shuffling the whole set need,
and not how many there should be.

A member's name up to the first dot of its last part says which sample it belongs to, what follows says what it is:

    n01440764/0007.jpg    the image of sample n01440764/0007, by the ending of an image file
    n01440764/0007.cls    its label, a whole number as text, or the name of its class
    n01440764/0007.json   its label too, where it is an object with a whole number or a name as "label"

Endings may be in capitals. Samples without an image are passed over. The image of a sample that has only one is taken
whatever its ending. Of several (0007.png beside 0007.depth.png) the one without a further dot in its ending is taken,
and the others belong to it. Where there is no such one, and the endings differ in their numbers only (clip.frame0.png
beside clip.frame1.png, or 2021.05.01.png), dots are part of the names, and each is an image by itself, with the label
of its own whole name (clip.frame0.cls) or else of the sample (clip.cls). Anything else is an error, as which images are
meant cannot be told, and so are members of the same name.

There are labels where every image has one that can be used (`vqvae.data.labels`); why else there are none is said in
`label_note`. A .json that says nothing of a label is no label; a .cls always is one.

The archives are read once from header to header, over the data, to find where each image lies; that takes some
20 µs a member and more where the disk is far. An image then costs one read. An archive that ends early, or whose
headers are damaged, is an error: its images would be missing without a trace.
"""

import errno
import os
import re
from collections.abc import Iterator
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vqvae.data.decoding import MAX_BYTES, SUFFIXES
from vqvae.data.files import check_regular, shown
from vqvae.data.folder import held_out
from vqvae.data.images import FIRST, EncodedImages, Size, check_split, shape_of, wanted
from vqvae.data.labels import Classes
from vqvae.data.splits import Layout, Part, layout
from vqvae.data.tar_index import ArchiveIndex, check_alike, index_of
from vqvae.data.tar_members import read_bytes

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
# Names that a pattern may stand for, and digits of a number in it.
_MAX_NAMES, _MAX_DIGITS = 100_000, 18


class ImageArchives(EncodedImages):
    """Images inside tar files, read when asked for. Of each image memory holds its name and some 30 bytes.

    To `digest` an image is its member's name, place and size, and its archive's name, size and time of change.
    Made by `image_archives`. Raises ValueError where none of them can be read.
    """

    def __init__(
        self, archives: list[Path], index: ArchiveIndex, shape: tuple[int, int, int], classes: Classes, *, name: str
    ):
        super().__init__(name, shape, classes, index.labels)
        self.archives, self._index = archives, index
        # By names alone, unless archives in several folders may have the same.
        folder = os.path.commonpath([path.parent for path in archives])
        self._names = [os.path.relpath(path, folder or os.curdir) for path in archives]
        self.check_readable()

    def __len__(self) -> int:
        return len(self._index.offsets)

    def key(self, index: int) -> str:
        """The archive's path from the folder that holds them all, "/", and the member's."""
        index = range(len(self))[index]
        return f"{self._names[self._index.archives[index]]}/{os.fsdecode(self._index.name(index))}"

    def _encoded(self, index: int) -> BytesIO:
        return _image(self.archives, self._index, index)

    def _stamps(self, indices: range, times: bool) -> Iterator[bytes]:
        index = self._index
        known: dict[int, bytes] = {}
        for each in indices:
            archive = int(index.archives[each])
            if archive not in known:
                path = self.archives[archive]
                status = path.stat()
                known[archive] = b"%b\0%d" % (os.fsencode(path.name), status.st_size)
                known[archive] += b" %d" % status.st_mtime_ns if times else b""
            yield b"%b\0%d %d %b" % (index.name(each), index.offsets[each], index.sizes[each], known[archive])


def image_archives(
    source: str | Path, split: str = "train", *, size: Size | None = None, channels: int | None = None
) -> ImageArchives:
    """The images of a .tar file, of a folder of them, or of files by a pattern such as "photos-{0000..0012}.tar".

    In a folder the names of archives, or of the folders that they are in, say which are to test on
    (`vqvae.data.splits`). Where nothing is named so about one image in ten is held out for test, by a hash of its name.
    A pattern stands for at most 100,000 names. `size`: scale and crop to `size`; by default all take the
    first training image's height and width. `channels`: 1 or 3; by default 1 where that image is grey, else 3.
    Raises ValueError for missing, cut or damaged archives, for archives without a readable image or in which it can't
    be told which images are meant, and for a folder that can be read in two ways.
    """
    folder = Path(os.path.expanduser(source))
    if os.path.isdir(folder):
        return archives_of(layout(folder), split, size=size, channels=channels)
    names = [os.path.expanduser(each) for each in _expanded(str(source))]
    for name in names:
        if not os.path.exists(name):
            raise ValueError(
                f"{shown(name)} does not exist; expected a .tar file, a folder of them, or NAME-{{0..9}}.tar"
            )
    return _archives({"train": Part(Path(), names)}, str(source), split, size, channels)


def archives_of(found: Layout, split: str, *, size: Size | None, channels: int | None) -> ImageArchives:
    """`image_archives` for a folder of which it is known what it holds."""
    return _archives(found.parts("archives", split), str(found.folder), split, size, channels)


def _archives(
    files: dict[str, Part], source: str, split: str, size: Size | None, channels: int | None
) -> ImageArchives:
    check_split(split)
    sides, channels = wanted(size, channels)
    paths = {part: each.paths for part, each in files.items() if each.names}
    found = _indices(paths, source)
    parts = {part: ArchiveIndex.joined(each) for part, each in found.items()}
    for part, index in parts.items():
        if not len(index.offsets):
            kinds = " ".join(sorted(SUFFIXES))
            raise ValueError(
                f"{paths[part][0]} and what goes with it hold no images; expected members that end in {kinds}"
            )
    every = ArchiveIndex.joined([*parts.values()])
    check_alike(every, source)
    first = (
        partial(_image, paths["train"], parts["train"], at) for at in range(min(len(parts["train"].offsets), FIRST))
    )
    shape = shape_of(sides, channels, first, source)
    classes = Classes.of(every.labels)
    if classes == Classes() and every.stray:
        stray = f"{len(every.stray):,} labels belong to no image by their names, as {every.stray[0]}"
        classes = Classes(note=f"{stray}, so none are used")
    where = split if split in files else "train"
    chosen = parts[where]
    if "test" not in files:
        held = held_out(chosen.name(each) for each in range(len(chosen.offsets)))
        chosen = chosen.at(np.flatnonzero(held == (split == "test")))
    if not len(chosen.offsets):
        raise ValueError(f"{source} has {len(every.offsets)} image(s), none of them for split={split!r}")
    images = ImageArchives(paths[where], chosen, shape, classes, name=source)
    images.split = split
    return images


def _expanded(pattern: str) -> list[str]:
    """Names by a pattern with ranges in braces, as a shell expands them."""
    pieces = _RANGE.split(pattern)
    num = 1
    for first, last in zip(pieces[1::3], pieces[2::3], strict=True):
        if max(len(first), len(last)) > _MAX_DIGITS or int(first) > int(last):
            raise ValueError(
                f"got {{{shown(first)}..{shown(last)}}} in the name of archives; expected the lower number first, of "
                f"at most {_MAX_DIGITS} digits"
            )
        num *= int(last) - int(first) + 1
    if num > _MAX_NAMES:
        raise ValueError(f"{shown(pattern)} stands for {num:,} archives; expected at most {_MAX_NAMES:,}")
    names = [pieces[0]]
    for first, last, text in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        width = len(first) if first.startswith("0") else 0
        numbers = range(int(first), int(last) + 1)
        names = [f"{name}{number:0{width}}{text}" for name in names for number in numbers]
    return list(dict.fromkeys(names))


def _indices(paths: dict[str, list[Path]], name: str) -> dict[str, list[ArchiveIndex]]:
    """The index of each archive, with a progress bar at a terminal."""
    every = [path for part in paths.values() for path in part]
    found: dict[Path, ArchiveIndex] = {}
    status = [_status(path) for path in every]
    total = sum(each.st_size for each in status)
    with tqdm(total=total, desc=f"index {name}", unit="B", unit_scale=True, leave=False, disable=None) as bar:
        for path, each in zip(every, status, strict=True):
            try:
                found[path] = index_of(path, each.st_size, each.st_mtime_ns)
            except OSError as error:
                raise ValueError(f"{path} can't be read: {error.strerror or error}") from error
            bar.update(each.st_size)
    return {part: [found[path] for path in some] for part, some in paths.items()}


def _status(path: Path) -> os.stat_result:
    try:
        return check_regular(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from error


def _image(archives: list[Path], index: ArchiveIndex, at: int) -> BytesIO:
    length = int(index.sizes[at])
    if length < 0:
        raise ValueError("the member is a link or a sparse file")
    if length > MAX_BYTES:
        raise ValueError(f"the member has {length:,} bytes; expected at most {MAX_BYTES:,}")
    with archives[index.archives[at]].open("rb") as file:
        data = read_bytes(file, int(index.offsets[at]), length)
    if len(data) < length:
        raise OSError(errno.ESTALE, "the archive has become shorter")
    return BytesIO(data)
