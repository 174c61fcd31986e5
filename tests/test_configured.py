"""Classes whose options are the signature of their constructor, on toy classes."""

import abc
import dataclasses
import inspect
import pickle
from typing import Any

import pytest
from torch import nn

from safefolder.configured import Configured, ConfiguredOptions, concrete, option_sentences
from safefolder.options import Given


class Shape(nn.Module, Configured):
    class Config(ConfiguredOptions):
        """Abstract: the options of a shape."""

    def __init__(self, *, colour: str = "red"):
        super().__init__()
        self.colour = colour

    @abc.abstractmethod
    def area(self) -> float: ...


class Sized(Shape):
    """Abstract.

    Args:
        size: of a side,
            at least 1.
        axes: how many.
    """

    def __init__(self, *, size: int = 2, axes: Given[int] = 2, **shape: Any):
        super().__init__(**shape)
        self.size = size


class Square(Sized):
    """A square.

    Args:
        size: of each side.
        colour: its colour.
        hollow: without its inside.
    """

    def __init__(self, *, hollow: bool = False, size: int = 3, **sized: Any):
        super().__init__(size=size, **sized)
        self.found = self.config  # which is there before the constructor

    def area(self) -> float:
        return float(self.size**2)


class Frame(Shape):
    """A frame around another shape."""

    def __init__(self, *, inside: Shape.Config = Square.Config()):
        super().__init__(colour="black")
        self.inside = inside.build()

    def area(self) -> float:
        return 1.0


def test_what_is_handed_on_is_an_option_and_the_nearest_default_counts():
    assert list(inspect.signature(Square).parameters) == ["colour", "size", "axes", "hollow"]
    square = Square(colour="blue")
    assert (square.colour, square.size, square.config.hollow) == ("blue", 3, False)
    assert square.found is square.config
    assert dataclasses.replace(square.config, size=5).build().area() == 25
    assert pickle.loads(pickle.dumps(square.config)) == Square.Config(colour="blue")
    # A constructor that hands nothing on has its own options alone.
    assert list(inspect.signature(Frame).parameters) == ["inside"]
    assert option_sentences(Square) == {
        "colour": "its colour.",
        "size": "of each side.",
        "axes": "how many.",
        "hollow": "without its inside.",
    }


def test_abstract_classes_have_no_options_and_are_not_built():
    assert {*concrete(Shape)} == {Square, Frame}
    with pytest.raises(TypeError, match="abstract"):
        Sized()

    class Solid(Square, abc.ABC):
        @abc.abstractmethod
        def volume(self) -> float: ...

    assert Solid.Config is Sized.Config is Shape.Config
    assert not dataclasses.is_dataclass(Shape.Config)
    with pytest.raises(ValueError, match="is abstract"):
        Solid.Config(size=3)


def test_what_the_whole_decides_is_not_written_with_a_part():
    plain = Frame(inside=Square.Config(axes=4)).config.to_plain()
    assert plain == {"inside": {"class": "Square", "colour": "red", "size": 3, "hollow": False}}
    assert Frame.Config.from_plain(plain).inside == Square.Config()
    assert Square.Config(axes=4).to_plain()["axes"] == 4
    with pytest.raises(ValueError, match="Square needs axes"):
        Square.Config.from_plain({"size": 3})


def test_a_class_of_the_users_may_stand_anywhere():
    class Plain:
        """Without a constructor."""

    class First(Plain, Square):
        pass

    class Last(Square, Plain):
        pass

    class Handing(Square):
        def __init__(self, *args: Any, depth: int = 1, **options: Any):
            super().__init__(*args, **options)

    for kind in (First, Last):
        assert kind(size=4).area() == 16
        assert kind.Config is not Square.Config
    assert Handing(size=5, depth=2).config == Handing.Config(size=5, depth=2)
    with pytest.raises(TypeError, match="leave Config out"):

        class Twice(Square):
            class Config(Square.Config):
                pass


def test_a_class_that_is_defined_again_takes_the_place_of_the_first():
    def define(number: int) -> type:
        class Again(Square):
            version = number

        return Again

    kinds = [define(number) for number in range(3)]
    assert Frame(inside="Again").inside.version == kinds[-1].version == 2
