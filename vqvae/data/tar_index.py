"""Where the images and labels of tar files lie, found from header to header.

What the members are to each other is said in `vqvae.data.tars`.
"""

import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import IO

import numpy as np

from vqvae.data.folder import SUFFIXES
from vqvae.data.images import MAX_LABEL

_UNKNOWN = -1
# Descriptions beside an image are of some kB; what is larger holds no label.
_MAX_JSON = 1 << 24
# Bytes of a .cls; what is longer is no number and no name.
_MAX_CLS = 1024


@dataclass(frozen=True, kw_only=True)
class ArchiveIndex:
    """Where the images of archives lie, in order. An image that is no plain run of bytes has a size below 0.

    Where there are `classes`, labels are places among them.
    """

    archives: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    names: bytes
    ends: np.ndarray
    ending: str
    classes: tuple[str, ...]

    def name(self, index: int) -> bytes:
        return self.names[self.ends[index] : self.ends[index + 1]]

    def at(self, chosen: np.ndarray) -> "ArchiveIndex":
        names = [self.name(index) for index in chosen.tolist()]
        return ArchiveIndex(
            archives=self.archives[chosen],
            offsets=self.offsets[chosen],
            sizes=self.sizes[chosen],
            labels=self.labels[chosen],
            names=b"".join(names),
            ends=np.fromiter(accumulate(map(len, names), initial=0), np.int64),
            ending=self.ending,
            classes=self.classes,
        )

    def with_classes(self, classes: tuple[str, ...]) -> "ArchiveIndex":
        """With labels that are places among these, of which its own are some."""
        number = {name: place for place, name in enumerate(classes)}
        places = np.array([number[name] for name in self.classes] + [_UNKNOWN], np.int64)
        return replace(self, classes=classes, labels=places[self.labels])

    @staticmethod
    def joined(parts: "list[ArchiveIndex]") -> "ArchiveIndex":
        """Of one archive after another, which are numbered so."""
        shifts = accumulate((len(part.names) for part in parts), initial=0)
        ends = [part.ends[1:] + shift for part, shift in zip(parts, shifts, strict=False)]
        return ArchiveIndex(
            archives=np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.offsets) for part in parts]),
            offsets=np.concatenate([part.offsets for part in parts]),
            sizes=np.concatenate([part.sizes for part in parts]),
            labels=np.concatenate([part.labels for part in parts]),
            names=b"".join([part.names for part in parts]),
            ends=np.concatenate([np.zeros(1, np.int64), *ends]),
            ending=parts[0].ending,
            classes=parts[0].classes,
        )


def agreed(paths: list[Path], indices: list[ArchiveIndex]) -> list[ArchiveIndex]:
    """The indices with labels of one numbering. ValueError where archives do not go together."""
    found = [(path, each) for path, each in zip(paths, indices, strict=True) if len(each.offsets)]
    for path, each in found:
        if each.ending != found[0][1].ending:
            one, other = (index.ending or "ENDING" for index in (found[0][1], each))
            raise ValueError(
                f"{path} has images that end in .{other}, {found[0][0]} has such that end in .{one}; expected one kind "
                "in all archives"
            )
    labelled = [(path, each) for path, each in found if each.classes or (each.labels >= 0).any()]
    named = [path for path, each in labelled if each.classes]
    if not named:
        return indices
    for path, each in labelled:
        if not each.classes:
            raise ValueError(f"{named[0]} has names of classes for labels, {path} has numbers; expected one of the two")
    classes = tuple(sorted({name for each in indices for name in each.classes}))
    return [each.with_classes(classes) for each in indices]


# The two splits of a source are asked for one after the other, and indexing takes long.
@lru_cache(maxsize=4096)
def index_of(path: Path, size: int, changed: int) -> ArchiveIndex:
    """The index of one archive of this size and time of change."""
    samples: dict[str, _Sample] = {}
    with path.open("rb") as file:
        for name, start, length in _members(path, file):
            folder, slash, last = name.rpartition("/")
            stem, dot, kind = last.partition(".")
            if not stem or not dot:
                continue
            sample = samples.setdefault(folder + slash + stem, _Sample())
            if os.path.splitext(last)[1].lower() in SUFFIXES:
                ending = kind.lower() if "." in kind else ""
                sample.images.setdefault(ending, (name, start, length))
            elif kind == "cls":
                sample.label = _label(path, name, read_bytes(file, start, min(length, _MAX_CLS)))
            elif kind == "json" and length <= _MAX_JSON:
                sample.described = _described(path, name, read_bytes(file, start, length))
    found = [sample for sample in samples.values() if sample.images]
    ending = _ending(path, found)
    images = [sample.images[ending] for sample in found]
    names = [os.fsencode(name) for name, _, _ in images]
    labels, classes = _numbered(path, found, ending)
    return ArchiveIndex(
        archives=np.zeros(len(found), np.int32),
        offsets=np.array([start for _, start, _ in images], np.int64),
        sizes=np.array([length for _, _, length in images], np.int64),
        labels=labels,
        names=b"".join(names),
        ends=np.fromiter(accumulate(map(len, names), initial=0), np.int64),
        ending=ending,
        classes=classes,
    )


@dataclass
class _Sample:
    """What was found of one sample: its images by ending, which is empty where there is no dot in it; its labels."""

    images: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    label: int | str | None = None
    described: int = _UNKNOWN


def _ending(path: Path, samples: list[_Sample]) -> str:
    """The ending of those images that are taken."""
    if not samples:
        return ""
    common = set(samples[0].images).intersection(*(sample.images for sample in samples))
    if "" in common:
        return ""
    plain = any("" in sample.images for sample in samples)
    if common and not plain:
        return next(ending for ending in samples[0].images if ending in common)
    wanted = "" if plain else next(iter(samples[0].images))
    one = next(sample.images[wanted][0] for sample in samples if wanted in sample.images)
    other = next(next(iter(sample.images.values()))[0] for sample in samples if wanted not in sample.images)
    raise ValueError(
        f"{path}: the images of its samples are of different kinds, as {one} and {other}; expected one ending that all "
        "have (what follows the first dot of a name is its ending: names with more dots have to be changed)"
    )


def _numbered(path: Path, samples: list[_Sample], ending: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """The labels as numbers, and the classes that they count if they are names."""
    labels = [sample.described if sample.label is None else sample.label for sample in samples]
    named = [place for place, label in enumerate(labels) if isinstance(label, str)]
    if not named:
        return np.array(labels, np.int64), ()
    for place, label in enumerate(labels):
        if not isinstance(label, str) and label >= 0:
            raise ValueError(
                f"{path}: the label of {samples[named[0]].images[ending][0]} is the name {labels[named[0]]!r}, that of "
                f"{samples[place].images[ending][0]} the number {label}; expected names for all, or numbers"
            )
    classes = tuple(sorted({str(labels[place]) for place in named}))
    number = {name: place for place, name in enumerate(classes)}
    return np.array([number.get(str(label), _UNKNOWN) for label in labels], np.int64), classes


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


def read_bytes(file: IO[bytes], start: int, length: int) -> bytes:
    """Bytes of an archive; none where the member is no plain run of them."""
    file.seek(start)
    return file.read(max(0, length))


def _label(path: Path, name: str, text: bytes) -> int | str:
    """What a .cls says: a number, -1 for an unknown one, or the name of a class."""
    try:
        word = text.decode().strip()
    except UnicodeDecodeError:
        word = ""
    if not word or not word.isprintable() or len(text) >= _MAX_CLS:
        raise ValueError(
            f"{path}: its member {name} holds no label; expected a whole number or the name of a class: mend it or "
            "leave it out"
        )
    return _checked(path, name, int(word)) if re.fullmatch(r"[+-]?[0-9]+", word) else word


def _described(path: Path, name: str, text: bytes) -> int:
    """The label that a .json gives; -1 where it gives none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return _UNKNOWN  # no JSON, or a number of more digits than Python reads
    label = found.get("label") if isinstance(found, dict) else None
    return _checked(path, name, label) if isinstance(label, int) and not isinstance(label, bool) else _UNKNOWN


def _checked(path: Path, name: str, label: int) -> int:
    if label > MAX_LABEL:
        raise ValueError(f"{path}: its member {name} holds a label above {MAX_LABEL}; expected 0 to {MAX_LABEL}")
    return max(label, _UNKNOWN)
