"""Where a set's images and its tokenizer came from, noted without telling where on a machine that is.

    "fashion-mini", "hf:owner/name", "owner/name"       a name, as it was given
    {"name": "photos", "path": "../../photos"}          a path: its last part, and the way there from the set's folder
    {"name": "photos", "path": null}                    a path that shares no folder with the set but the root

So a set that is moved together with what it was made of still finds it, and one that is handed on tells nobody's
folders. Sets made by versions before have absolute paths, and are read as they are.
"""

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

Note = str | dict[str, str | None] | None

_HUB = "hf:"
# An absolute path in a text: one in quotes or brackets ends with these, any other with what few names of files have.
_START = r"(?:file:)?(?:/|[A-Za-z]:[\\/])"
_QUOTED = re.compile(rf"(?<=\()({_START}[^()]*)(?=\))|(?<=')({_START}[^']*)(?=')|(?<=\")({_START}[^\"]*)(?=\")")
_BARE = re.compile(rf"(?:(?<=[\s<\[=:;,|`])(?!(?<=:)//)|^)({_START}[^\s'\"<>()\[\]:;,|`]+)")
_ROW = re.compile(r"(row \d+) \((.*)\)", re.DOTALL)


class Origin(NamedTuple):
    """What a source is called, and what loads it from here; None where it is not known where it lies."""

    name: str
    source: str | None


def note(source: str, folder: Path, *, may_be_relative: bool = True) -> Note:
    """What the index of the set in `folder` says of a source.

    Args:
        source: a name, or a path.
        may_be_relative: whether it is a path if there is a file or a folder of that name here. An absolute one is.
    """
    hub, text = (_HUB, source.removeprefix(_HUB)) if source.startswith(_HUB) else ("", source)
    path = os.path.expanduser(text)
    is_path = os.path.isabs(path) or (may_be_relative and (path.endswith(".tar") or os.path.exists(path)))
    if not is_path:
        return source
    # As it was spelt, where that will do: a link in a shared folder goes on leading where it is set to.
    base, place = os.path.realpath(folder), os.path.abspath(path)
    relative = _relative(place, base) or _relative(os.path.realpath(path), base)
    return {"name": hub + (os.path.basename(place) or "the root folder"), "path": relative}


def _relative(place: str, base: str) -> str | None:
    try:
        shared = os.path.commonpath([place, base])
    except ValueError:  # of two drives
        return None
    return None if shared == os.path.dirname(shared) else Path(os.path.relpath(place, base)).as_posix()


def is_note(noted: Any) -> bool:
    """Whether JSON of an index is a note of a source."""
    if isinstance(noted, str):
        return True
    if not isinstance(noted, dict) or noted.keys() != {"name", "path"} or not isinstance(noted["name"], str):
        return False
    path = noted["path"]
    return path is None or (isinstance(path, str) and "\0" not in path and not PurePosixPath(path).is_absolute())


def names_a_place(noted: Any) -> bool:
    """Whether it says where on a machine a source lies, as versions before did."""
    text = noted.removeprefix(_HUB) if isinstance(noted, str) else ""
    return bool(re.match(_START, text)) or text.startswith("~")


def origin(noted: Note, folder: Path) -> Origin | None:
    """What a note in the index of the set in `folder` is of."""
    if noted is None:
        return None
    if isinstance(noted, str):
        return Origin(last_part(noted) if names_a_place(noted) else noted, noted)
    name, path = noted["name"], noted["path"]
    assert name is not None
    if path is None:
        return Origin(name, None)
    place = os.path.normpath(os.path.join(os.path.realpath(folder), path))
    return Origin(name, (_HUB if name.startswith(_HUB) else "") + place)


def same(one: Origin, other: Origin) -> bool:
    """Whether two notes can be of one source, as far as they tell."""
    places = [each.source for each in (one, other) if each.source is not None and names_a_place(each.source)]
    if len(places) == 2:
        one_place, other_place = (os.path.realpath(os.path.expanduser(each)) for each in places)
        return one_place == other_place
    # Of a path that is not known, or was noted as somebody typed it, there is the last part.
    return one.name == other.name or (len(places) == 1 and last_part(one.name) == last_part(other.name))


def last_part(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1] or "the root folder"


def without_places(text: str) -> str:
    """A text in which absolute paths are their last parts."""
    if "/" not in text and "\\" not in text:
        return text
    for pattern in (_QUOTED, _BARE):
        text = pattern.sub(lambda found: last_part(found[0]), text)
    return text


def key_without_places(key: str) -> str:
    """What a source calls an image, without where it lies on a machine: a relative path stays what it is."""
    if match := _ROW.fullmatch(key):
        return f"{match[1]} ({key_without_places(match[2])})"
    return last_part(key) if re.match(_START, key) else key
