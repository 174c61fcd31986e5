"""Options as plain data: what a config may hold, checked and put right before the config is made.

    @dataclass(frozen=True, kw_only=True)
    class Fit(Options):
        num_steps: int
        rates: tuple[float, ...] = (0.1,)

    Fit(num_step=3)                         # ValueError: Fit has no num_step; did you mean num_steps?
    Fit(num_steps=3, rates=(0.1, "a"))      # ValueError: got rates=(0.1, 'a') for Fit, expected a tuple of numbers
    Fit(num_steps=3, rates=[1, 2]).rates    # (1, 2)

Those of a model, a quantizer, a likelihood and a prior are made of the signature of its constructor, see
`safefolder.configured`.

A field's annotation is what is expected of it; there is no second statement. It may be bool, int, float, str, None,
`Literal`, a tuple or `Sequence` of these, a class of `Options`, and unions; a value of another annotation is only held
against its class.

What people mean is taken: numpy's numbers are Python's, an integer stands for a float (and is kept, so that a config
is written as it was given), a list or an array of one axis is a tuple, and where the options of a part are expected, so
are the name of its kind, for the kind's own defaults, and a mapping with the kind's name under "class", which is how
config.json has them (`Options.to_plain`). A bool is no integer, and no float is NaN or infinite.

Values may come from a file that nobody checked. Nothing here runs what they say: a name is looked up among the classes
that the annotation allows, parts inside parts are bounded, and a message shows no more of a value than a line holds.
"""

import dataclasses
import functools
import inspect
import math
import numbers
import types
from abc import ABCMeta
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from safefolder.messages import SHOWN, few_shown, nearest_name, shown

AnyOptions = TypeVar("AnyOptions")
Value = TypeVar("Value")

_GIVEN = "given"
Given = Annotated[Value, _GIVEN]
"""The annotation of an option that is decided by what stands around the part, as the number of codes of a prior: the
whole fills it in, so that neither the config of the whole nor the command line states it again."""

# Parts inside parts.
MOST_LEVELS = 16

_NO = object()


class _Checking(ABCMeta):
    """The class of `Options`: to call it is to check first. It keeps the signature that the dataclass gives."""

    def __call__(cls: type[AnyOptions], *args: Any, **values: Any) -> AnyOptions:  # pyrefly: ignore[bad-override]
        if not dataclasses.is_dataclass(cls):
            raise ValueError(f"{cls.__qualname__} is abstract: take the options of a kind")
        if args:
            raise ValueError(f"{_label(cls)} takes its options by name, got {few_shown(args)} without one")
        return super().__call__(**checked(cls, values))  # pyrefly: ignore[invalid-super-call, missing-attribute]

    @property
    def __signature__(cls) -> inspect.Signature:
        own = inspect.signature(cls.__init__)
        return own.replace(parameters=[each for name, each in own.parameters.items() if name != "self"])


class Options(metaclass=_Checking):
    """Abstract: a frozen, keyword-only dataclass whose fields are held against their annotations.

    Attributes:
        owner: the class whose constructor's options these are, if they are one's.

    Raises:
        ValueError: an option that there is not, one that is missing, or a value of another type.
    """

    owner: ClassVar[type | None] = None

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """An option: which there are, the signature of the owner's constructor says."""

    @classmethod
    def meant(cls, name: str, value: Any) -> Any:
        """The value that people mean by one of another type; here the value itself. Before it is checked.

        Raises:
            ValueError: what cannot be meant, where a sentence of its own says why.
        """
        return value

    def to_plain(self) -> dict[str, Any]:
        """As data for JSON; a part says its class, and leaves out what the whole decides (`Given`)."""
        return {each.name: _to_plain(getattr(self, each.name)) for each in option_fields(type(self))}

    @classmethod
    def from_plain(cls: type[AnyOptions], plain: Mapping[str, Any]) -> AnyOptions:
        """The options that `to_plain` gave.

        Raises:
            ValueError: an option or a class that this version does not know, a value of another type, or one missing
                that was decided by what stood around it.
        """
        given = [each.name for each in option_fields(cls) if is_given(cls, each.name)]
        if missing := [name for name in given if name not in plain]:
            raise ValueError(f"{_label(cls)} needs {' and '.join(missing)}, got {few_shown(plain) or 'nothing'}")
        return cls(**plain)


def option_fields(kind: type) -> list[dataclasses.Field[Any]]:
    """The options of a kind that can be given, in their order."""
    return [each for each in dataclasses.fields(kind) if each.init]


def is_given(kind: type, name: str) -> bool:
    """Whether an option of a kind is decided by what stands around it (`Given`)."""
    hint = _hints(kind)[name]
    return get_origin(hint) is Annotated and _GIVEN in get_args(hint)[1:]


def _to_plain(value: Any) -> Any:
    if isinstance(value, Options):
        inside = {
            each.name: _to_plain(getattr(value, each.name))
            for each in option_fields(type(value))
            if not is_given(type(value), each.name)
        }
        return {"class": kind_name(type(value)), **inside}
    if isinstance(value, tuple | list):
        return [_to_plain(each) for each in value]
    return str(value) if isinstance(value, PurePath) else value


def checked(kind: type, values: Mapping[str, Any], *, level: int = 0) -> dict[str, Any]:
    """The values for the fields of a dataclass, as their annotations have them; those that are not given stay out.

    Raises:
        ValueError: a name that is no field, a field that is missing, or a value of another type.
    """
    fields = {each.name: each for each in option_fields(kind)}
    for name in values:
        if name not in fields:
            raise ValueError(_unknown(kind, name, values))
    needed = [name for name, each in fields.items() if _has_no_default(each) and name not in values]
    if needed:
        raise ValueError(f"{_label(kind)} needs {' and '.join(needed)}, got {few_shown(values) or 'nothing'}")
    hints = _hints(kind)
    meant: Callable[[str, Any], Any] = getattr(kind, "meant", lambda name, value: value)
    found = {}
    for name, value in values.items():
        value = meant(name, value)
        found[name] = fitted(value, hints[name], name, owner=_label(kind), level=level)
    return found


def fitted(value: Any, hint: Any, name: str, *, owner: str | None = None, level: int = 0) -> Any:
    """The value as the annotation `hint` has it.

    Args:
        name, owner: what a message calls it: "got name=... for owner".
        level: how many parts it stands inside.

    Raises:
        ValueError: it is of another type, or unknown where names are listed.
    """
    members = _members(hint)
    if kinds := _kinds(hint):
        part = _part(value, kinds, name, level)
        if part is not _NO:
            return part
    for member in members:
        found = _fit(value, member)
        if found is not _NO:
            return found
    listed = [each for member in members if get_origin(member) is Literal for each in get_args(member)]
    if len(members) == 1 and isinstance(value, str) and listed and all(isinstance(each, str) for each in listed):
        raise ValueError(f"unknown {name} {shown(value)}, {_one_of(listed, value)}")
    place = f"{name}={shown(value)}" + ("" if owner is None else f" for {owner}")
    raise ValueError(f"got {place}, expected {_described(members, kinds, name)}{_call_it(value, kinds)}")


def kind_name(kind: type) -> str:
    """What the kind is called whose options these are: FSQ for `FSQ.Config`, Diffusers for a DiffusersConfig."""
    owner = getattr(kind, "owner", None)
    return kind.__name__.removesuffix("Config") if owner is None else owner.__name__


def _label(kind: type) -> str:
    """What a message calls a kind of options: as its owner, whose options these are too."""
    owner = getattr(kind, "owner", None)
    return kind.__name__ if owner is None else owner.__name__


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _has_no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _members(hint: Any) -> list[Any]:
    """The members of a union, or the annotation itself."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    return list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]


def _kinds(hint: Any) -> dict[str, type]:
    """The options that an annotation allows, by the names of their kinds."""
    roots = [each for each in _members(hint) if isinstance(each, type) and issubclass(each, Options)]
    found: dict[str, type] = {}
    while roots:
        kind = roots.pop(0)
        if dataclasses.is_dataclass(kind) and not inspect.isabstract(kind):
            known = found.setdefault(kind_name(kind), kind)
            if (known.__module__, known.__qualname__) == (kind.__module__, kind.__qualname__):
                found[kind_name(kind)] = kind  # defined again, as in a notebook
        roots += kind.__subclasses__()
    return found


def _part(value: Any, kinds: Mapping[str, type], name: str, level: int) -> Any:
    """The options of a part: as they are, by the name of their kind, or by a mapping; else `_NO`."""
    if isinstance(value, tuple(kinds.values())):
        return value
    if isinstance(value, str):
        return _kind(value, kinds, name)()
    if not isinstance(value, Mapping):
        return _NO
    if level >= MOST_LEVELS:
        raise ValueError(f"got a {name} inside {level} others, expected {MOST_LEVELS} at most")
    fields = {each: value[each] for each in value if each != "class"}
    if not all(isinstance(each, str) for each in fields):
        raise ValueError(f"got {name}={shown(value)}, expected the names of options, and their values")
    if "class" in value or len(kinds) > 1:
        kind = _kind(value.get("class"), kinds, name)
    else:
        (kind,) = kinds.values()
    # Made by what was checked here, one level further in, so that the inside of a file is bounded.
    return type.__call__(kind, **checked(kind, fields, level=level + 1))


def _kind(name: Any, kinds: Mapping[str, type], what: str) -> type:
    if not isinstance(name, str) or name not in kinds:
        raise ValueError(f"unknown {what} {shown(name)}, {_one_of(list(kinds), name)}")
    return kinds[name]


def _one_of(known: Sequence[str], name: Any) -> str:
    near = nearest_name(name, known) if isinstance(name, str) else None
    return f"expected one of {', '.join(known)}" + ("" if near is None else f"; did you mean {near!r}?")


def _fit(value: Any, hint: Any) -> Any:
    """The value as one annotation that is no union has it, or `_NO`."""
    origin = get_origin(hint)
    if hint is Any:
        return value
    if hint is None or hint is type(None):
        return None if value is None else _NO
    if hint is bool:
        return _bool(value)
    if hint in (int, float):
        return _number(value, hint)
    if hint is str:
        return str(value) if isinstance(value, str) else _NO
    if origin is Literal:
        plain = str(value) if isinstance(value, str) else value
        return next((each for each in get_args(hint) if type(each) is type(plain) and each == plain), _NO)
    if origin in (tuple, Sequence):
        return _tuple(value, hint)
    if hint is Path and isinstance(value, str | PurePath):
        return Path(value)
    if isinstance(hint, type):
        return value if isinstance(value, hint) else _NO
    return value  # an annotation that says more than this module reads


def _bool(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    # numpy's, which is no Python bool; an array of no axes is none.
    return bool(value) if type(value).__name__ == "bool" and type(value).__module__ == "numpy" else _NO


def _number(value: Any, hint: type) -> Any:
    if isinstance(value, bool):
        return _NO
    if not isinstance(value, numbers.Integral if hint is int else numbers.Real):
        return _NO
    number = int(value) if isinstance(value, numbers.Integral) else float(value)
    if hint is int:
        return number
    try:
        return number if math.isfinite(number) else _NO
    except OverflowError:  # an integer that no float holds
        return _NO


def _tuple(value: Any, hint: Any) -> Any:
    if not isinstance(value, list | tuple | range):
        if not (hasattr(value, "tolist") and getattr(value, "ndim", 0) == 1):
            return _NO
        value = value.tolist()  # an array of numpy's
    inside = get_args(hint)
    each = inside[:1] * len(value) if get_origin(hint) is not tuple or inside[1:] == (...,) else inside
    if len(each) != len(value):
        return _NO
    found = []
    for one, own in zip(value, each, strict=True):
        fits = (_fit(one, member) for member in _members(own))
        first = next((fit for fit in fits if fit is not _NO), _NO)
        if first is _NO:
            return _NO
        found.append(first)
    return tuple(found)


def _described(members: Sequence[Any], kinds: Mapping[str, type], name: str) -> str:
    words = [_word(each) for each in members if not (isinstance(each, type) and issubclass(each, Options))]
    if kinds:
        words.insert(0, f"the options of a {name}, or the name of one: {', '.join(kinds)}")
    return ", or ".join(words)


def _word(hint: Any) -> str:
    simple = {bool: "True or False", int: "an integer", float: "a finite number", str: "a string", type(None): "None"}
    if hint in simple:
        return simple[hint]
    inside = get_args(hint)
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, inside))}"
    if get_origin(hint) in (tuple, Sequence):
        plural = {int: "integers", float: "numbers", str: "strings", bool: "booleans"}
        number = f"{len(inside)} " if get_origin(hint) is tuple and inside[1:] != (...,) else ""
        return f"a tuple of {number}{plural.get(inside[0], 'values')}"
    return f"a {getattr(hint, '__name__', hint)}"


def _call_it(value: Any, kinds: Mapping[str, type]) -> str:
    """What to do with a kind itself, or one that is built, where its options are expected."""
    kind = value if isinstance(value, type) else type(value)
    options = kinds.get(kind_name(kind))
    return "" if options is None else f"; give {options.__qualname__}(...)"


def _unknown(kind: type, name: str, values: Mapping[str, Any]) -> str:
    """That there is no such option, and where one of this name is, or which is like it."""
    own = [each.name for each in option_fields(kind) if not is_given(kind, each.name)]
    inside: list[tuple[str, type]] = []
    for each in dataclasses.fields(kind):
        kinds = list(_kinds(_hints(kind).get(each.name)).values())
        if kinds:
            # First of all the part's own kind, that was given or is the default.
            given = values.get(each.name, None if _has_no_default(each) else _default(each))
            kinds.sort(key=lambda other, given=given: not isinstance(given, other))
            inside += [(each.name, other) for other in kinds]
    label = name if name.isidentifier() and len(name) <= SHOWN else shown(name)
    for part, other in inside:
        if name in {each.name for each in dataclasses.fields(other)}:
            place = f"{part}={other.__qualname__}({name}={shown(values[name])})"
            return f"{_label(kind)} has no {label}; {place} has"
    near = nearest_name(name, own)
    if near is not None:
        return f"{_label(kind)} has no {label}; did you mean {near}?"
    for part, other in inside:
        near = nearest_name(name, [each.name for each in dataclasses.fields(other)])
        if near is not None:
            return f"{_label(kind)} has no {label}; did you mean the {near} of {part}={other.__qualname__}(...)?"
    return f"{_label(kind)} has no {label}, expected {', '.join(own) or 'none: it has no options'}"


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
