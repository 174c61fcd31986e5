"""Which of many alike tests the fast lane has."""

from collections.abc import Iterable
from typing import Any

import pytest


def some(values: Iterable[Any], every: int = 3) -> list[Any]:
    """Parameters of which every third, from the first, is a fast test, and the others are slow ones.

    A tuple is the values of several names.
    """
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=[pytest.mark.slow] if at % every else [])
        for at, value in enumerate(values)
    ]
