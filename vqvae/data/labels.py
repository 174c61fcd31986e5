"""Labels as a source gives them, made numbers of classes; what cannot be used is said, and is no error.

A source gives a whole number or the name of a class with each image. Numbers are classes from 0 on. Names are numbered
in the order of their letters, over all parts of the source. Labels are used if every image has one, all are of one of
the two kinds, and none is a number too large to count classes by.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

# What has larger numbers for labels has identifiers. Of so many classes a model has an embedding.
MAX_LABEL = (1 << 20) - 1
# Bytes of the name of a class; what is longer is a text.
MAX_NAME = 1023

# Of an image that has no label, and of one whose label is neither a number nor a name. What is below is a name.
NONE, UNUSABLE, _NAMES = -1, -2, -3


@dataclass(frozen=True, kw_only=True)
class Given:
    """The labels of some images, as their source gives them.

    codes: int64, one for each: a number; or `NONE`, or `UNUSABLE`; or -3 - i for the name `names[i]`. A number -1 is
        `NONE`, as Hugging Face writes it of a test set whose labels are kept back, and others below 0 are `UNUSABLE`.
    unusable: of the first that is so, where it is.
    """

    codes: np.ndarray
    names: tuple[str, ...] = ()
    unusable: str = ""

    def at(self, chosen: np.ndarray) -> "Given":
        return replace(self, codes=self.codes[chosen])

    @classmethod
    def of(cls, labels: Iterable[int | str | None], unusable: str = "") -> "Given":
        """Of numbers, names, and None where there is no label. Numbers below 0 stand for what they are among codes."""
        numbers: dict[str, int] = {}
        most = np.iinfo(np.int64).max
        codes = [
            _NAMES - numbers.setdefault(label, len(numbers))
            if isinstance(label, str)
            else NONE if label is None else min(label, most)
            for label in labels
        ]  # fmt: skip
        return cls(codes=np.array(codes, np.int64), names=tuple(numbers), unusable=unusable)

    @classmethod
    def joined(cls, parts: "list[Given]") -> "Given":
        """Of one after another."""
        names = tuple(dict.fromkeys(name for part in parts for name in part.names))
        number = {name: place for place, name in enumerate(names)}
        codes = [np.empty(0, np.int64)]
        for part in parts:
            places = np.array([_NAMES - number[name] for name in part.names] or [0], np.int64)
            named = part.codes <= _NAMES
            codes.append(np.where(named, places[np.where(named, _NAMES - part.codes, 0)], part.codes))
        unusable = next((part.unusable for part in parts if part.unusable and UNUSABLE in part.codes), "")
        return cls(codes=np.concatenate(codes), names=names, unusable=unusable)


@dataclass(frozen=True, kw_only=True)
class Classes:
    """What the labels of a whole source come to.

    num_classes, class_names: None where labels are not used, or have no names.
    note: why labels that are there are not used; "" where they are, or where there are none.
    """

    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    note: str = ""

    @classmethod
    def of(cls, given: Given) -> "Classes":
        codes = given.codes
        none, unusable = int((codes == NONE).sum()), int((codes == UNUSABLE).sum())
        named, above = int((codes <= _NAMES).sum()), int((codes > MAX_LABEL).sum())
        numbered, num = int((codes >= 0).sum()), len(codes)
        used = {given.names[place] for place in (_NAMES - np.unique(codes[codes <= _NAMES])).tolist()}
        reasons = []
        if none == num:
            return cls()
        if none:
            reasons.append(f"{none:,} of {num:,} images {'has' if none == 1 else 'have'} no label")
        if unusable:
            at = f" ({given.unusable})" if given.unusable else ""
            reasons.append(f"{unusable:,} of {num:,} labels can't be used{at}")
        if named and numbered:
            reasons.append(f"{named:,} of {num:,} labels are names and {numbered:,} are numbers")
        if above:
            beyond = f"{above:,} of {num:,} are above {MAX_LABEL:,}, and no numbers of classes"
            reasons.append(f"labels go up to {codes.max():,} ({beyond})")
        if len(used) > MAX_LABEL + 1:
            reasons.append(f"labels have {len(used):,} different names, more than the {MAX_LABEL + 1:,} of classes")
        if reasons:
            note = f"{' and '.join(reasons)}, so none are used{'; number them from 0' if above else ''}"
            return cls(note="".join(each if each.isprintable() else "?" for each in note))
        if named:
            return cls(num_classes=len(used), class_names=tuple(sorted(used)))
        return cls(num_classes=int(codes.max()) + 1)

    def labels(self, given: Given) -> Int64[Tensor, " n"] | None:
        """Those of some images of the source as numbers of classes; None where labels are not used."""
        if self.num_classes is None:
            return None
        if not given.names:
            return torch.from_numpy(given.codes.copy())
        number = {name: place for place, name in enumerate(self.class_names or ())}
        places = np.array([number.get(name, 0) for name in given.names], np.int64)
        return torch.from_numpy(places[_NAMES - given.codes])


def class_name(text: bytes) -> str | None:
    """The name that bytes are, without space around it; "" for none at all, None for what can be no name."""
    try:
        word = text.decode().strip()
    except UnicodeDecodeError:
        return None
    return word if word.isprintable() and len(text) <= MAX_NAME else None
