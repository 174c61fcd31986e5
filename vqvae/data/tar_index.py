"""Where the images and labels of tar files lie, and which images of a sample are taken.

What the members are to each other is said in `vqvae.data.tars`.
"""

import json
import os
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import IO

import numpy as np

from vqvae.data.decoding import SUFFIXES
from vqvae.data.labels import MAX_NAME, NONE, UNUSABLE, Given, class_name
from vqvae.data.tar_members import members, read_bytes

# Descriptions beside an image are of some kB; what is larger holds no label.
_MAX_JSON = 1 << 24
_EXPECTED = (
    "expected of each sample one image without a dot in its ending, as 0007.png beside 0007.depth.png (what follows "
    "the first dot of a name is its ending): rename the others, or leave them out"
)

# Name, start and size of a member.
_Member = tuple[str, int, int]


@dataclass(frozen=True, kw_only=True)
class ArchiveIndex:
    """Where the images of archives lie, in order. An image that is no plain run of bytes has a size below 0.

    alone, beside: what images have between the first and the last dot of their names, if they are taken, or if they
    belong to another one that is; each with one such member. Numbers are all 0 there.
    stray: members that hold labels of no image.
    """

    archives: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: Given
    names: bytes
    ends: np.ndarray
    alone: dict[str, str]
    beside: dict[str, str]
    stray: tuple[str, ...]

    def name(self, index: int) -> bytes:
        return self.names[self.ends[index] : self.ends[index + 1]]

    def at(self, chosen: np.ndarray) -> "ArchiveIndex":
        names = [self.name(index) for index in chosen.tolist()]
        return replace(
            self,
            archives=self.archives[chosen],
            offsets=self.offsets[chosen],
            sizes=self.sizes[chosen],
            labels=self.labels.at(chosen),
            names=b"".join(names),
            ends=_ends(names),
        )

    @staticmethod
    def joined(parts: "list[ArchiveIndex]") -> "ArchiveIndex":
        """Of one archive after another, which are numbered so."""
        shifts = accumulate((len(part.names) for part in parts), initial=0)
        ends = [part.ends[1:] + shift for part, shift in zip(parts, shifts, strict=False)]
        return ArchiveIndex(
            archives=np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.offsets) for part in parts]),
            offsets=np.concatenate([part.offsets for part in parts]),
            sizes=np.concatenate([part.sizes for part in parts]),
            labels=Given.joined([part.labels for part in parts]),
            names=b"".join([part.names for part in parts]),
            ends=np.concatenate([np.zeros(1, np.int64), *ends]),
            alone={ending: name for part in parts for ending, name in part.alone.items()},
            beside={ending: name for part in parts for ending, name in part.beside.items()},
            stray=tuple(name for part in parts for name in part.stray),
        )


def _ends(names: list[bytes]) -> np.ndarray:
    return np.fromiter(accumulate(map(len, names), initial=0), np.int64)


def check_alike(index: ArchiveIndex, source: str) -> None:
    """Raise ValueError where images of one kind are taken in some samples and belong to another image in others."""
    for between, name in index.alone.items():
        if between in index.beside:
            raise ValueError(
                f"{source}: the image {index.beside[between]} belongs to another of its sample, {name} is alone in its "
                f"own; {_EXPECTED}"
            )


# The two splits of a source are asked for one after the other, and indexing takes long.
@lru_cache(maxsize=4096)
def index_of(path: Path, size: int, changed: int) -> ArchiveIndex:
    """The index of one archive of this size and time of change."""
    samples: dict[str, list[_Member]] = {}
    labels: dict[str, int | str | None] = {}
    with path.open("rb") as file:
        for name, start, length in members(path, file):
            folder, slash, last = name.rpartition("/")
            stem, dot, _ = last.partition(".")
            if not stem or not dot:
                continue
            images = samples.setdefault(folder + slash + stem, [])
            whole, dot, suffix = name.rpartition(".")
            suffix = dot + suffix.lower()
            if suffix in SUFFIXES:
                images.append((name, start, length))
            elif suffix in (".cls", ".json"):
                label = _label(file, suffix, start, length)
                # Of x.cls and x.CLS it cannot be told which is meant.
                labels[whole + suffix] = UNUSABLE if whole + suffix in labels else label
    taken, alone, beside = _taken(path, samples)
    sources = [_source_of(name, key, labels) for key, (name, _, _) in taken]
    given = [None if each is None else labels[each] for each in sources]
    unusable = next((each for each, label in zip(sources, given, strict=True) if label == UNUSABLE), None)
    used = set(sources)
    names = [os.fsencode(name) for _, (name, _, _) in taken]
    return ArchiveIndex(
        archives=np.zeros(len(taken), np.int32),
        offsets=np.array([start for _, (_, start, _) in taken], np.int64),
        sizes=np.array([length for _, (_, _, length) in taken], np.int64),
        labels=Given.of(given, f"the first is that of {unusable} in {path.name}" if unusable else ""),
        names=b"".join(names),
        ends=_ends(names),
        alone=alone,
        beside=beside,
        stray=tuple(name for name, label in labels.items() if name not in used and name.endswith(".cls")),
    )


def _taken(
    path: Path, samples: dict[str, list[_Member]]
) -> tuple[list[tuple[str, _Member]], dict[str, str], dict[str, str]]:
    """The images that are taken, with the keys of their samples; and `alone` and `beside` of the index."""
    taken: list[tuple[str, _Member]] = []
    alone: dict[str, str] = {}
    beside: dict[str, str] = {}
    for key, images in samples.items():
        if len(images) == 1 and "." not in images[0][0][len(key) + 1 :]:
            taken.append((key, images[0]))
            continue
        # What follows the first dot, in small letters, with all numbers made 0.
        endings = [re.sub(r"[0-9]+", "0", name[len(key) + 1 :].lower()) for name, _, _ in images]
        between = [ending.rpartition(".")[0] for ending in endings]
        if between and between[0] and len(set(endings)) == 1:
            # One image; or several whose endings differ in numbers only, so that the dots belong to their names.
            taken += [(key, image) for image in images]
            alone.setdefault(between[0], images[0][0])
        elif between.count("") == 1 and not any(map(_is_number, between)):
            taken.append((key, images[between.index("")]))
            beside |= {each: name for each, (name, _, _) in zip(between, images, strict=True) if each}
        elif images:
            plain = [at for at, each in enumerate(between) if not each]
            others = [
                at
                for at, each in enumerate(between)
                if (at in plain[1:] if len(plain) > 1 else _is_number(each) if plain else endings[at] != endings[0])
            ]
            one, other = (plain or [0])[0], others[0]
            raise ValueError(
                f"{path}: {images[one][0]} and {images[other][0]} are both images of one sample; {_EXPECTED}"
            )
    return taken, alone, beside


def _is_number(between: str) -> bool:
    return bool(between) and not between.strip("0.")


def _source_of(name: str, key: str, labels: dict[str, int | str | None]) -> str | None:
    """Which of the labels is an image's: that of its own name without the ending, or of its sample's key."""
    own = name.rpartition(".")[0]
    for whole in (key,) if own == key else (own, key):
        for suffix in (".cls", ".json"):
            if labels.get(whole + suffix) is not None:
                return whole + suffix
    return None


def _number(label: int) -> int:
    return label if label >= NONE else UNUSABLE


def _label(file: IO[bytes], suffix: str, start: int, length: int) -> int | str | None:
    """What a member says that holds a label, or may hold one: a number, a name, `UNUSABLE`, or None for none."""
    if suffix == ".cls":
        text = read_bytes(file, start, min(length, MAX_NAME + 1))
        word = class_name(text)
        if not word:
            return UNUSABLE
        return _number(int(word)) if re.fullmatch(r"[+-]?[0-9]+", word) else word
    if length > _MAX_JSON:
        return None
    try:
        found = json.loads(read_bytes(file, start, length))
    except (ValueError, RecursionError):
        return None  # no JSON, or a number of more digits than Python reads
    label = found.get("label") if isinstance(found, dict) else None
    if isinstance(label, str):
        word = class_name(label.encode("utf-8", "surrogatepass"))
        return UNUSABLE if word is None else word or None
    if isinstance(label, int) and not isinstance(label, bool):
        return _number(label)
    return None if label is None else UNUSABLE
