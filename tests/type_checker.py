"""The type checker of the tests."""

from typing import Any

import beartype


def signature(checked: Any) -> Any:
    """beartype for what can be imported. A function inside another would be checked anew each time that it is made,
    which takes longer than all else."""
    return checked if "<locals>" in getattr(checked, "__qualname__", "") else beartype.beartype(checked)
