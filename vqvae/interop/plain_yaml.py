"""Plain data out of a yaml that others wrote, which is held to bounds before anything is made of it."""

from pathlib import Path
from typing import Any

from safefolder.messages import shown
from safefolder.tensors import few, in_short, read_bytes

MOST_BYTES = 256 << 10
# With what aliases stand for counted each time; the yaml of a tokenizer has about a hundred.
MOST_VALUES = 20_000
MOST_DEPTH = 50
MOST_LENGTH = 10_000


def read_yaml(path: Path) -> Any:
    """What a yaml holds: dicts, lists, texts, numbers, dates.

    Raises:
        ValueError: missing, larger than a config is, nested deeper, no yaml in UTF-8, with tags of Python's or what is
            not as its tag says; in one line, which quotes little of the file.
    """
    import yaml  # brought by huggingface-hub; most who import have no checkpoint of this kind

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        text = read_bytes(path, MOST_BYTES).decode("utf-8-sig")
        _check(yaml.parse(text, Loader=loader), yaml.events)
        return yaml.load(text, Loader=loader)
    except Exception as error:  # parsers and constructors of yaml have errors of many types
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        reason = few([str(problem)])[:100] if problem else in_short(error)[:100]
        at = f", line {mark.line + 1}" if mark is not None else ""
        raise ValueError(f"{path} cannot be read as yaml: {reason}{at}") from error


def _check(events: Any, kinds: Any) -> None:
    """Raise ValueError for what would take long, or much memory, to be made; nothing is made here."""
    sizes: dict[str, int] = {}
    # Of each value that is not complete: its anchor, and how many values came before it.
    within: list[tuple[str | None, int]] = []
    total = 0
    for event in events:
        if isinstance(event, kinds.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"it has the alias {shown(event.anchor)} before what it stands for")
            total += sizes[event.anchor]
        elif isinstance(event, kinds.ScalarEvent):
            total += 1
            if len(event.value) > MOST_LENGTH:
                raise ValueError(f"it has a text of {len(event.value):,} characters, expected at most {MOST_LENGTH:,}")
            if event.anchor is not None:
                sizes[event.anchor] = 1
        elif isinstance(event, kinds.CollectionStartEvent):
            within.append((event.anchor, total))
            total += 1
            if len(within) > MOST_DEPTH:
                raise ValueError(f"it is nested too deeply, expected at most {MOST_DEPTH} levels")
        elif isinstance(event, kinds.CollectionEndEvent):
            anchor, before = within.pop()
            if anchor is not None:
                sizes[anchor] = total - before
        if total > MOST_VALUES:
            raise ValueError(f"it has over {MOST_VALUES:,} values")
