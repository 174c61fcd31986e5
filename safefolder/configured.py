"""Classes whose options are stated once, in the signature of their constructor.

    class FSQ(Quantizer):                   # a Quantizer is Configured
        def __init__(self, *, levels: Sequence[int] = (8, 5, 5, 5)): ...

    FSQ(levels=(8, 5))                      # the quantizer
    FSQ.Config(levels=(8, 5))               # its options: frozen, checked, plain data
    FSQ.Config(levels=(8, 5)).build()       # the same quantizer
    FSQ(levels=(8, 5)).config               # FSQ.Config(levels=(8, 5))

To call the class is to make its `Config`, which checks the options as `safefolder.options` says, and to build that. So
a constructor gets them right and typed, and finds them in `self.config`, too.

A constructor that takes `**options` and hands them on with `super().__init__(**options)` has the options of the class
after it in the method resolution order beside its own; one that is stated again has the nearer default. It hands
them on as it got them: what a class further on builds may also be read from `self.config`, which says what the whole
was made of.

The sentence of an option stands in the docstring of the class, under "Args:".
"""

import dataclasses
import inspect
import re
import sys
from abc import ABCMeta
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from safefolder.messages import few_shown
from safefolder.options import Options

Made = TypeVar("Made", bound="Configured")
_ENTRY = re.compile(r"    (\w+(?:, \w+)*): (.*)")


class ConfiguredOptions(Options):
    """Abstract: the options of a constructor. A family of classes has one of its own, its subclasses that are made."""

    owner: ClassVar[type["Configured"]]

    if TYPE_CHECKING:
        __dataclass_fields__: ClassVar[dict[str, Any]]

        def __init__(self, **options: Any): ...

    def __post_init__(self) -> None:
        self.owner.check_options(self)

    def build(self) -> Any:
        """What these are the options of, with fresh weights.

        Raises:
            ValueError: options that cannot work together.
        """
        made = self.owner.__new__(self.owner)
        # Past a module's own bookkeeping, which begins with its constructor.
        object.__setattr__(made, "config", self)
        made.__init__(**{each.name: getattr(self, each.name) for each in dataclasses.fields(self)})
        return made

    def put(self, **values: Any) -> None:
        """Put values right; for `check_options`, while the options are being made."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


class _Making(ABCMeta):
    """The class of classes with a `Config`: to call one is to check its options first."""

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any):
        super().__init__(name, bases, namespace, **options)
        families = [each for each in cls.__mro__[1:] if isinstance(each, _Making) and "Config" in vars(each)]
        if not families:
            return
        if "Config" not in namespace:
            made = _family(cls) if inspect.isabstract(cls) else _config_class(cls)  # pyrefly: ignore[bad-argument-type]
            cls.Config = made  # pyrefly: ignore[missing-attribute]
        elif "owner" in vars(families[0].Config):  # pyrefly: ignore[missing-attribute]
            raise TypeError(
                f"{name} states a Config of its own; state its options in the signature of its constructor, and leave "
                "Config out"
            )

    def __call__(cls: type[Made], *args: Any, **options: Any) -> Made:  # pyrefly: ignore[bad-override]
        if inspect.isabstract(cls):
            return type.__call__(cls)  # Python's own error
        if args:
            advice = "; call its build()" if isinstance(args[0], Options) else ""
            raise ValueError(f"{cls.__name__} takes its options by name, got {few_shown(args)} without one{advice}")
        return cls.Config(**options).build()

    @property
    def __signature__(cls) -> inspect.Signature:
        return inspect.signature(cls.Config)  # pyrefly: ignore[missing-attribute]


class Configured(metaclass=_Making):
    """Abstract: a class whose constructor's signature is the one statement of its options."""

    Config: ClassVar[type[ConfiguredOptions]] = ConfiguredOptions
    """Its options as plain data: frozen, checked when they are made; `build` makes the object."""
    config: Any
    """The options that this object was made of, a `Config` of its class."""

    @classmethod
    def check_options(cls, options: ConfiguredOptions) -> None:
        """Raise ValueError for options that cannot work together; called when they are made. May `put` some right."""


def concrete(kind: type[Made]) -> Iterator[type[Made]]:
    """A class and those below it that can be built, each once."""
    seen: set[type] = set()
    family = [kind]
    while family:
        each = family.pop(0)
        family.extend(each.__subclasses__())
        if each not in seen and not inspect.isabstract(each):
            seen.add(each)
            yield each


def option_sentences(kind: type[Configured]) -> dict[str, str]:
    """What each option is, from the docstrings of the classes that state them; the nearest class has the last word."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if isinstance(each, _Making):
            found.update(_entries(vars(each).get("__doc__") or ""))
    return {name: found[name] for name in _options(kind.__mro__) if name in found}


def _entries(docstring: str) -> dict[str, str]:
    """The names under "Args:" in a docstring, and what is said of each."""
    _, _, section = inspect.cleandoc(docstring).partition("\nArgs:\n")
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        if not line.startswith("    "):
            break
        entry = _ENTRY.fullmatch(line)
        names = entry[1].split(", ") if entry else names
        for name in names:
            found[name] = entry[2] if entry else f"{found[name]} {line.strip()}"
    return found


def _config_class(kind: type[Configured]) -> type[ConfiguredOptions]:
    """The options of a class that can be built, as a dataclass of its family's."""
    fields = [(name, hint, _field(default)) for name, (hint, default) in _options(kind.__mro__).items()]
    namespace = {
        "owner": kind,
        "__doc__": f"The options of `{kind.__name__}`, as plain data.",
        "__module__": kind.__module__,
        "__qualname__": f"{kind.__qualname__}.Config",
    }
    return dataclasses.make_dataclass(
        "Config", fields, bases=(_family(kind),), namespace=namespace, frozen=True, kw_only=True
    )


def _family(kind: type) -> type[ConfiguredOptions]:
    """What the options of a class and of those beside it have in common: the abstract `Config` that is nearest."""
    configs = (vars(each).get("Config") for each in kind.__mro__)
    return next(each for each in configs if each is not None and "owner" not in vars(each))


def _field(default: Any) -> Any:
    return dataclasses.field() if default is inspect.Parameter.empty else dataclasses.field(default=default)


def _options(kinds: Sequence[type]) -> dict[str, tuple[Any, Any]]:
    """Annotation and default of each option of the first constructor among some classes, and of what it hands on to."""
    for index, kind in enumerate(kinds):
        if "__init__" not in vars(kind):
            continue
        if not isinstance(kind, _Making):
            break
        own: dict[str, tuple[Any, Any]] = {}
        handed: dict[str, tuple[Any, Any]] = {}
        _, *parameters = inspect.signature(vars(kind)["__init__"]).parameters.values()
        for each in parameters:
            if each.kind is each.VAR_KEYWORD:
                handed = _options(kinds[index + 1 :])
            elif each.kind is not each.VAR_POSITIONAL:
                own[each.name] = (_annotation(each.annotation, kind), each.default)
        return {**handed, **own}
    return {}


def _annotation(found: Any, kind: type) -> Any:
    """An annotation as the module of its class has it; what cannot be looked up there is not checked."""
    if found is inspect.Parameter.empty:
        return Any
    if not isinstance(found, str):
        return found
    try:
        return eval(found, vars(sys.modules[kind.__module__]))
    except Exception:  # a name for type checkers alone
        return Any
