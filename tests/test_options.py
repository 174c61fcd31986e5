"""Options held against their annotations: what is taken, what is refused and how, whatever it is."""

import abc
import copy
import dataclasses
import inspect
import json
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safefolder import Options
from safefolder.options import MOST_LEVELS, checked


@dataclass(frozen=True, kw_only=True)
class PartOptions(Options):
    """Abstract: the options of a part."""

    @abc.abstractmethod
    def build(self) -> object: ...


@dataclass(frozen=True, kw_only=True)
class RoundConfig(PartOptions):
    radius: float = 1.0
    num_points: int = 8

    def build(self) -> object:
        return object()


@dataclass(frozen=True, kw_only=True)
class NestedConfig(PartOptions):
    inner: PartOptions = field(default_factory=RoundConfig)

    def build(self) -> object:
        return object()


@dataclass(frozen=True, kw_only=True)
class Whole(Options):
    needed: int
    size: int = 28
    rate: float = 0.5
    switch: bool = False
    name: str = "x"
    levels: tuple[int, ...] = (8, 5)
    pair: tuple[int, float] = (1, 2.0)
    grid: Sequence[int] = (1,)
    policy: Literal["dead", "off"] = "dead"
    beta: float | None = None
    mixed: Literal["shared"] | float = "shared"
    part: PartOptions = field(default_factory=RoundConfig)


def whole(**options: Any) -> Whole:
    return Whole(**{"needed": 1, **options})


@pytest.mark.parametrize(
    ("name", "given_value", "want"),
    [
        ("size", np.int64(3), 3),
        ("rate", 1, 1),
        ("rate", np.float32(0.5), 0.5),
        ("switch", np.bool_(True), True),
        ("levels", [8, 5, 5], (8, 5, 5)),
        ("levels", range(2, 4), (2, 3)),
        ("levels", np.array([8, 5]), (8, 5)),
        ("pair", [2, 3], (2, 3)),
        ("grid", [7, np.int64(7)], (7, 7)),
        ("name", np.str_("y"), "y"),
        ("policy", np.str_("off"), "off"),
        ("beta", None, None),
        ("mixed", 2, 2),
        ("part", {"class": "Round", "radius": 2.0}, RoundConfig(radius=2.0)),
        ("part", {"class": "Nested", "inner": "Nested"}, NestedConfig(inner=NestedConfig())),
        ("part", NestedConfig(inner="Round"), NestedConfig()),
    ],
)
def test_case_28_what_people_mean_is_taken(name, given_value, want):
    got = getattr(whole(**{name: given_value}), name)
    assert got == want
    assert type(got) is type(want)
    json.dumps(dataclasses.asdict(whole(**{name: given_value})))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": True}, "got size=True for Whole, expected an integer"),
        ({"size": 28.0}, "got size=28.0 for Whole, expected an integer"),
        ({"size": np.array(3)}, "got size=array(3) for Whole, expected an integer"),
        ({"rate": "0.5"}, "got rate='0.5' for Whole, expected a finite number"),
        ({"rate": float("nan")}, "got rate=nan for Whole, expected a finite number"),
        ({"rate": 10**400}, "expected a finite number"),
        ({"switch": 1}, "got switch=1 for Whole, expected True or False"),
        ({"name": 3}, "got name=3 for Whole, expected a string"),
        ({"levels": "85"}, "got levels='85' for Whole, expected a tuple of integers"),
        ({"levels": [8, 5.0]}, "got levels=[8, 5.0] for Whole, expected a tuple of integers"),
        ({"pair": (1,)}, "got pair=(1,) for Whole, expected a tuple of 2 integers"),
        ({"policy": "daed"}, "unknown policy 'daed', expected one of dead, off; did you mean 'dead'?"),
        ({"policy": 3}, "got policy=3 for Whole, expected one of 'dead', 'off'"),
        ({"beta": "4"}, "got beta='4' for Whole, expected a finite number, or None"),
        ({"mixed": "full"}, "got mixed='full' for Whole, expected one of 'shared', or a finite number"),
        ({"part": "Ruond"}, "unknown part 'Ruond', expected one of Round, Nested; did you mean 'Round'?"),
        ({"part": 3}, "got part=3 for Whole, expected the options of a part, or the name of one: Round, Nested"),
        ({"part": RoundConfig}, "give RoundConfig(...)"),
        ({"part": {"radius": 1.0}}, "unknown part None, expected one of Round, Nested"),
        ({"part": {"class": "Round", 3: 4}}, "expected the names of options"),
        ({"part": {"class": "Round", "radus": 4}}, "RoundConfig has no radus; did you mean radius?"),
        ({"siez": 3}, "Whole has no siez; did you mean size?"),
        ({"num_points": 512}, "Whole has no num_points; part=RoundConfig(num_points=512) has"),
        ({"num_point": 512}, "Whole has no num_point; did you mean the num_points of part=RoundConfig(...)?"),
        ({"part": NestedConfig(), "inner": 3}, "Whole has no inner; part=NestedConfig(inner=3) has"),
        ({"a\nb": 1}, r"Whole has no 'a\nb', expected needed, size"),
        ({"x" * 500: 1}, "xxx', expected needed, size"),
        ({"zzzzzz": 1}, "Whole has no zzzzzz, expected needed, size, rate, switch"),
    ],
)
def test_case_33_what_is_refused_is_said(options, message):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        whole(**options)
    assert message in str(error.value)


def test_options_are_dataclasses_as_any():
    with pytest.raises(ValueError, match=r"^Whole needs needed, got size=3$"):
        Whole(size=3)
    with pytest.raises(ValueError, match=r"^Whole takes its options by name, got 28 without one$"):
        Whole(28)
    options = whole(part="Nested", beta=1)
    assert list(inspect.signature(Whole).parameters)[:2] == ["needed", "size"]
    assert inspect.signature(Whole).parameters["rate"].default == 0.5
    for twin in (copy.deepcopy(options), pickle.loads(pickle.dumps(options)), dataclasses.replace(options)):
        assert twin == options
    assert dataclasses.replace(options, levels=[3]).levels == (3,)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.size = 3


class Loud:
    def __repr__(self) -> str:
        raise RuntimeError("no picture of me")


@pytest.mark.parametrize(
    "value",
    [[1] * 10**6, ["x\n" * 10**6], 10**5000, Loud()],
    ids=["list", "text", "integer", "no repr"],
)
def test_case_22_a_message_shows_no_more_than_a_line(value):
    with pytest.raises(ValueError, match=r"^got part=[^\n]*$") as error:
        whole(part=value)
    assert len(str(error.value)) < 300


HOSTILE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@settings(max_examples=80, deadline=None)
@given(name=st.sampled_from([each.name for each in dataclasses.fields(Whole)] + ["other"]), value=HOSTILE)
def test_whatever_comes_is_taken_or_refused_in_a_line(name, value):
    """Also by the function alone, for the fields of any dataclass; what is taken is of its type and writes as JSON."""
    message, values = None, {}
    try:
        values = checked(Whole, {"needed": 1, name: value})
    except ValueError as error:
        message = str(error)
    if message is not None:
        assert len(message) < 600
        assert "\n" not in message
        with pytest.raises(ValueError, match=re.escape(message)):
            whole(**{name: value})
        return
    got = values[name]
    assert whole(**{name: value}) == Whole(**values)
    assert isinstance(got, PartOptions) or json.loads(json.dumps(got)) == (list(got) if isinstance(got, tuple) else got)


def test_case_22_parts_inside_parts_are_bounded():
    for levels in (MOST_LEVELS + 1, 5000):
        deep: Any = "Round"
        for _ in range(levels):
            deep = {"class": "Nested", "inner": deep}
        with pytest.raises(ValueError, match=f"expected {MOST_LEVELS} at most"):
            whole(part=deep)
