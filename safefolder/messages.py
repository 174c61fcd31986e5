"""Values and names in the messages of errors: no more of a value than a line holds, and the name that was meant."""

import difflib
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

# Characters of a value in a message.
SHOWN = 100
# Longer integers are told by their length: to write them down takes the square of it.
_MOST_BITS = 256


def shown(value: Any) -> str:
    """A value in one short line, whatever it is."""
    try:
        text = _SHORT.repr(value)
    except Exception:  # a message must not fail for what it is about
        text = f"a {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def few_shown(values: Sequence[Any] | Mapping[str, Any]) -> str:
    """The first of some values, with their names where they have any, and how many more."""
    if isinstance(values, Mapping):
        each = [f"{name}={shown(value)}" for name, value in list(values.items())[:3]]
    else:
        each = [shown(value) for value in values[:3]]
    return ", ".join(each) + (f" and {len(values) - 3} more" if len(values) > 3 else "")


def nearest_name(name: str, known: Sequence[str]) -> str | None:
    """The known name that is meant by one that is mistyped, or None where it is like none of them."""
    lower, mine = {each.lower(): each for each in known}, name[:SHOWN].lower()
    found = difflib.get_close_matches(mine, lower, n=3, cutoff=0.5)

    def likeness(other: str) -> tuple[float, bool]:
        # Of several as near, the one that begins as it does: few mistype the first letter.
        return difflib.SequenceMatcher(None, mine, other).ratio(), other[:1] == mine[:1]

    return lower[max(found, key=likeness)] if found else None


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, SHOWN, SHOWN

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= _MOST_BITS else f"an integer of {x.bit_length()} bits"


_SHORT = _Short()
