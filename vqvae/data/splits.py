"""What a folder holds, and which of it is to train on and which to test on.

Images, parquet files and archives are told by the endings of their names, and a folder is of one of the three. Its
parts are told by names, in small letters or capitals:

    to train on    train, training
    to test on     test, testing; where there is none: valid, validation, val, dev, eval

    train/..., test/...           folders, with whatever is in them at any depth; names may go on, as train2017/
    train-0.tar, test-0.tar       parquet files and archives, by the first word of their names, at any depth
    train/... alone               that is the set, of which a part is held out; train/ is no class of images
    ...                           and so is anything without such names

Beside a part to test on by its first names, one by the others is left aside. They may lie in a folder inside the one
that is named, as data/train-0.parquet, if all does. What can be read in two ways is refused: two names for one part,
parts beside what is none, parts without one to train on, parts in several folders, archives beside folders of such,
and several kinds in one folder.
Hidden files and folders are passed over, and links are followed.
"""

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from vqvae.data.decoding import SUFFIXES
from vqvae.data.files import is_folder, names_of

TRAIN = ("train", "training")
TEST = ("test", "testing")
# These stand for test where there is none.
VALIDATION = ("valid", "validation", "val", "dev", "eval")

_GROUPS = {name: names for names in (TRAIN, TEST, VALIDATION) for name in names}
# What a name may be joined to without losing its meaning: trainset.tar.
_JOINED = ("set", "split", "data")
# Folders inside folders in which parts are looked for.
_MAX_DESCENT = 8
KINDS = {"images": SUFFIXES, "parquet files": {".parquet"}, "archives": {".tar"}}
_KIND_OF = {suffix: kind for kind, suffixes in KINDS.items() for suffix in suffixes}


@dataclass(frozen=True)
class Part:
    """Files of one part of a set: `names` are their paths from `folder`, sorted, with "/" between the parts."""

    folder: Path
    names: list[str]

    @property
    def paths(self) -> list[Path]:
        return [self.folder / name for name in self.names]


@dataclass(frozen=True)
class Layout:
    """What a folder holds.

    folder: as it was named.
    found: of "train" and, where it is there, "test", or of "" where nothing is named so: its folder, and the paths from
        there of the files of each kind.
    """

    folder: Path
    found: dict[str, tuple[Path, dict[str, list[str]]]]

    @property
    def kinds(self) -> list[str]:
        """Those of `KINDS` that are there."""
        return [kind for kind in KINDS if any(kind in by_kind for _, by_kind in self.found.values())]

    def parts(self, kind: str, split: str, beside: tuple[str, ...] = ()) -> dict[str, Part]:
        """The files of one kind: of "train", and of "test" where the folder has such a part, which may be empty.

        split: the part that is wanted. beside: kinds that may be there too. Raises ValueError where there is nothing of
        the kind in that part or to train on, and where other kinds are.
        """
        kinds = self.kinds
        if kind not in kinds:
            ending = " ".join(sorted(KINDS[kind]))
            raise ValueError(f"{self.folder} holds no {kind}; expected files that end in {ending}")
        for other in kinds:
            if other not in (kind, *beside):
                one, two = (self._first(each) for each in (kind, other))
                raise ValueError(
                    f"{self.folder} holds {kind} ({one}) and {other} ({two}); expected one of the two: keep them in "
                    f"folders apart, or name {self.folder / (two if kind == 'images' else one)} itself"
                )
        found = {part: Part(base, by_kind.get(kind, [])) for part, (base, by_kind) in self.found.items()}
        if "" in found:
            whole = found.pop("")
            found = {"train": whole} if kind == "images" else _by_names(whole, kind)
            _check_inside(whole)
        for part in ("train", split if split in found else "train"):
            if not found[part].names:
                raise ValueError(
                    f"{found[part].folder} holds no {kind}, and is named as a part of a set; expected some there, or "
                    "no such folder"
                )
        if "test" in found:
            _check_others(found["train"], found["test"], kind)
        return found

    def _first(self, kind: str) -> str:
        return next(
            (base / by_kind[kind][0]).relative_to(self.folder).as_posix()
            for base, by_kind in self.found.values()
            if kind in by_kind
        )


def layout(folder: Path) -> Layout:
    """What a folder holds, and in which parts. Raises ValueError where that can be read in two ways."""
    root, names = _split_folders(folder)
    bases = {part: _unwrapped(root / name) for part, name in names.items()} or {"": folder}
    return Layout(folder, {part: (base, _kinds_in(base)) for part, base in bases.items()})


def _unwrapped(folder: Path) -> Path:
    """A part's folder, or one inside it that is named as a part too and holds everything, as unpacking makes them."""
    for _ in range(_MAX_DESCENT):
        folders, file = _entries(folder) if os.path.isdir(folder) else ([], None)
        if file is not None or len(folders) != 1 or folders[0].casefold() not in _GROUPS:
            break
        folder = folder / folders[0]
    return folder


def _kinds_in(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    if os.path.isdir(folder):  # and no link to nothing
        for name in names_of(folder):
            if (kind := _kind_of(name)) is not None:
                found.setdefault(kind, []).append(name)
    return {kind: sorted(names) for kind, names in found.items()}


def _kind_of(name: str) -> str | None:
    return _KIND_OF.get(os.path.splitext(name)[1].lower())


def _holds_data(folder: Path) -> bool:
    return os.path.isdir(folder) and any(_kind_of(name) is not None for name in names_of(folder))


def _split_folders(folder: Path) -> tuple[Path, dict[str, str]]:
    """Where the folders of the parts lie, and their names; none where there are no such folders."""
    here = folder
    for _ in range(_MAX_DESCENT):
        folders, file = _entries(here)
        exact = [name for name in folders if name.casefold() in _GROUPS]
        named = [*exact, *(name for name in folders if name not in exact and _word(name) and _holds_data(here / name))]
        if any(_holds_data(here / name) for name in named):
            other = next((f"{name}/" for name in folders if name not in named and _holds_data(here / name)), file)
            if other is None:
                return here, _chosen(here, [(name, f"{name}/") for name in named])
            if exact or len({_group(_word(name) or "") in (TRAIN,) for name in named}) > 1:
                raise ValueError(
                    f"{here} holds {named[0]}/, named as a part of a set, beside {other}; expected parts alone, or "
                    f"none: if {named[0]} is a class, put all of them into a folder {here / 'train'}; else move away "
                    "what is no part"
                )
            break  # classes with such words in their names
        holding = [name for name in folders if len(folders) == 1 or _holds_data(here / name)]
        if file is not None or len(holding) != 1:
            break
        here = here / holding[0]
    return folder, {}


def _entries(folder: Path) -> tuple[list[str], str | None]:
    """The folders in a folder, with links to nothing that are named as parts; and the first file of the known kinds."""
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            gone = entry.name.casefold() in _GROUPS and not os.path.exists(entry.path)
            if gone or is_folder(entry):
                folders.append(entry.name)
            elif _kind_of(entry.name) is not None:
                files.append(entry.name)
    return sorted(folders), min(files, default=None)


def _word(name: str) -> str | None:
    """The word at the beginning of a name that makes it the name of a part, as it is written there."""
    for pattern in (r"[^\W\d_]+", r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])"):  # all its letters; those to a capital: trainA
        found = re.match(pattern, name)
        if found and _group(found.group()):
            return found.group()
    return None


def _group(word: str) -> tuple[str, ...] | None:
    for joined in ("", *_JOINED):
        if group := _GROUPS.get(word.casefold().removesuffix(joined)):
            return group
    return None


def named_parts(where: str, names: list[str]) -> dict[str, str]:
    """Which of the names that a set gives its own parts is "train", and which "test"; others are left aside.

    Raises ValueError for two names of one part, and where there is none to train on.
    """
    known = [name for name in names if name.casefold() in _GROUPS]
    if not any(name.casefold() in TRAIN for name in known):
        raise ValueError(f"{where} has the splits {', '.join(names)}; expected train among them")
    return _chosen(where, [(name, name) for name in known])


def _chosen(where: str | Path, named: list[tuple[str, str]]) -> dict[str, str]:
    """Which of the names of parts is that of "train", and which that of "test".

    named: words or names that begin with one, and how to call each.
    """
    found: dict[str, str] = {}
    for part, groups in (("train", (TRAIN,)), ("test", (TEST, VALIDATION))):
        for group in groups:
            fitting = [each for each in named if _group(_word(each[0]) or "") == group]
            if len(fitting) > 1:
                raise ValueError(
                    f"{where} holds {fitting[0][1]} and {fitting[1][1]}, which both are named as the part {group[0]}; "
                    "expected one: put what belongs together under one name, and move away what does not"
                )
            if fitting:
                found[part] = fitting[0][0]
                break
    if "train" not in found:
        raise ValueError(
            f"{where} holds {named[0][1]}, named as a part of a set, and nothing to train on; expected {TRAIN[0]} "
            "beside it; or, if it is the whole set, name it itself"
        )
    return found


def _by_names(whole: Part, kind: str) -> dict[str, Part]:
    """Files by the parts that their names say; all of them to train on where none says one."""
    words: dict[str, list[str]] = {}
    rest: list[str] = []
    for name in whole.names:
        word = _word(name.rpartition("/")[2])
        (rest if word is None else words.setdefault(word, [])).append(name)
    if not words:
        low, high = (end(whole.names, key=lambda name: name.count("/")) for end in (min, max))
        if low.count("/") != high.count("/"):
            raise ValueError(
                f"{whole.folder} holds {low} and, in a folder inside, {high}; expected {kind} side by side: name the "
                "folder that holds the set"
            )
        return {"train": whole}
    first = next(iter(words.values()))[0]
    if rest:
        raise ValueError(
            f"{whole.folder} holds {first}, named as a part of a set, beside {rest[0]}; expected names of parts "
            f"({', '.join((*TRAIN, *TEST, *VALIDATION))}) for all {kind}, or for none: move away what is no part"
        )
    folders = sorted({name.rpartition("/")[0] for name in whole.names})
    if len(folders) > 1:
        one, two = (f"{whole.folder / each}" for each in folders[:2])
        raise ValueError(f"{one} and {two} both hold {kind} that are named as parts of a set; expected one: name it")
    chosen = _chosen(whole.folder, [(word, names[0]) for word, names in words.items()])
    return {part: Part(whole.folder, words[word]) for part, word in chosen.items()}


def _check_inside(whole: Part) -> None:
    """Raise ValueError where folders inside a set have parts of their own."""
    groups: dict[str, set[tuple[str, ...]]] = {}
    for folder in {name.rpartition("/")[0] for name in whole.names}:
        outside = ""
        for each in folder.split("/"):
            if group := _GROUPS.get(each.casefold()):
                groups.setdefault(outside, set()).add(group)
            outside += f"{each}/"
    for outside, found in sorted(groups.items()):
        if TRAIN in found and len(found) > 1:
            parts = ", ".join(sorted(group[0] for group in found))
            raise ValueError(
                f"{whole.folder / outside} holds parts of a set ({parts}), and is not all that {whole.folder} holds; "
                f"expected parts in {whole.folder} with everything inside them (as train/cat and test/cat), or the "
                "folder of one set: name it"
            )


def _check_others(train: Part, test: Part, kind: str) -> None:
    """Raise ValueError where both parts are of the same files, by links: to files, or of images to folders."""
    known = {}
    for part in (train, test):
        names = {name.rpartition("/")[0] for name in part.names} if kind == "images" else part.names
        found = {}
        for path in (part.folder / name for name in names):
            with contextlib.suppress(OSError):  # of a link to nothing, which reading it says
                status = os.stat(path)
                found[status.st_dev, status.st_ino] = path
        for same in known.keys() & found.keys():
            raise ValueError(f"{found[same]} and {known[same]} lead to the same files; expected others to test on")
        known = found
