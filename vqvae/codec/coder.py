"""Integer intervals to bytes and back, by the range coder and the ANS coder of `constriction` (Bamler 2022).

Each symbol is an interval of [0, 2^24). constriction takes probabilities as floats and makes integers of them; given
`width - 1` for each symbol it makes exactly these widths (it adds the 1 and finds nothing to rescale), so the integers
here are those in the stream. To encode a symbol that is known, a table of three does: what lies left of it, the symbol,
what lies right of it.

A range coder's stream is a queue; its end is cut to whole bytes, the fewest that no other stream could be taken for,
where constriction's own ends after a word of 32 bits. An ANS coder's is a stack.

Both are read beyond their end without an error: a queue goes on in zeros, and a stack at its bottom pops the first
symbol for ever. So each has a rule by which a stream that is exhausted is told from one that is not.

A queue: what it holds is read in parts (labels; a group of tiles), and no part but the first begins once the symbols
before it hold more than 8 (n + SLACK) bits, for a stream of n bytes. The last part may hold any number: a message that
ends in first symbols (code 0, a black pixel) lies at the lower end of its interval and takes no byte for them, since
zeros at the end are left out. Whoever writes adds zeros where the rule asks for more bytes than the message.

A stack: what lies below `bottom` words is never popped, and the coder's own state stays full (at least 2^32), as it is
wherever something is left. This is exact: a decoder goes through the encoder's states, and is nowhere lower than that.
"""

from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import Tensor

from vqvae.codec.integer_tables import PRECISION, TOTAL, Intervals

_WORD = 4
# Bytes that a queue may lack when a part of it begins: 16 bits for each of 128 images. A message at no edge, of which
# this is the chance, lacks a byte with probability 2^-8.
SLACK = 256
_FULL = 1 << 32  # of the state of a stack that is not at its bottom
_EXHAUSTED = "the stream has ended before its images have: it has {} bytes, what was read holds {:,.0f}"


class BadStream(ValueError):  # noqa: N818 - as container.DamagedFile
    """A stream that is no message of these models."""


def require_constriction() -> ModuleType:
    """The package `constriction`; ValueError where there is none."""
    try:
        import constriction
    except ImportError as error:
        raise ValueError("files of bits need the package constriction: pip install 'vqvae-priors[codec]'") from error
    return constriction


def _family() -> Any:
    return require_constriction().stream.model.Categorical(perfect=False)


def _threes(intervals: Intervals) -> tuple[np.ndarray, np.ndarray]:
    """For each interval a table of three widths, less 1, and the place of the interval in it."""
    left, width = (part.flatten().cpu().numpy() for part in intervals)
    right = TOTAL - left - width
    assert len(left) == 0 or (left.min() >= 0 and width.min() >= 1 and right.min() >= 0), "not an interval of the total"
    table = np.stack([left, width, right], -1)
    place = np.ones(len(left), np.int32)
    # At an end there is nothing on one side, and no width may be 0: what is on the other side is two symbols.
    first, last = left == 0, right == 0
    table[first] = np.stack([width[first], np.ones_like(width[first]), right[first] - 1], -1)
    place[first] = 0
    table[last] = np.stack([left[last] - 1, np.ones_like(width[last]), width[last]], -1)
    place[last] = 2
    return place, table.astype(np.float64) - 1


def _widths_less_one(widths: Int[Tensor, "n k"]) -> np.ndarray:
    # constriction reads a table whose rows do not follow each other in memory wrongly, without saying so.
    return np.ascontiguousarray(widths.cpu().numpy(), np.float64) - 1


class RangeWriter:
    """Encodes symbols in the order in which they will be decoded."""

    def __init__(self) -> None:
        self._family = _family()
        self._encoder = require_constriction().stream.queue.RangeEncoder()
        self._bits_before = 0

    def put(self, intervals: Intervals) -> None:
        """Append a part: symbols that are neither the whole of [0, 2^24) nor within one unit of it."""
        place, table = _threes(intervals)
        if len(place):
            # No less than the symbols' own: all by which the coder's interval has shrunk.
            position, (_, span) = self._encoder.pos()
            self._bits_before = 8 * _WORD * (position + 2) - span.bit_length() + 1
            self._encoder.encode(place, self._family, table)

    def finish(self) -> bytes:
        """All of it, in as few bytes as give the message back where zeros are read after them and `SLACK` allows."""
        if self._encoder.is_empty():
            return b""
        position, (lower, span) = self._encoder.pos()
        words = self._encoder.get_compressed()
        whole = int.from_bytes(words.astype(">u4").tobytes(), "big") << 32 * (position + 2 - len(words))
        # Any number from `start` to `start + span` is this message; this is the one with the most zeros at its end.
        start = whole - (whole - lower) % (1 << 64)
        for size in range(9):
            unit = 8 * (8 - size)
            shortest = -(-start >> unit)
            if shortest << unit < start + span:
                break
        data = shortest.to_bytes(position * _WORD + size, "big").rstrip(b"\0")
        # A byte more than the rule asks for: a reader adds up logarithms.
        return data.ljust(-(-self._bits_before // 8) - SLACK + 1, b"\0")


class RangeReader:
    """Decodes what a `RangeWriter` wrote; a damaged stream gives other symbols, or a ValueError."""

    def __init__(self, data: bytes):
        self._family = _family()
        self._num_bytes, self._bits = len(data), 0.0
        padded = data + bytes(2 * _WORD + -len(data) % _WORD)
        words = np.frombuffer(padded, ">u4").astype(np.uint32)
        self._decoder = require_constriction().stream.queue.RangeDecoder(words)

    def begin(self) -> None:
        """A part begins. Raises BadStream where it cannot, as the stream is exhausted."""
        if self._bits > 8 * (self._num_bytes + SLACK):
            raise BadStream(_EXHAUSTED.format(self._num_bytes, self._bits / 8))

    def get(self, widths: Int[Tensor, "n k"]) -> np.ndarray:
        """The next n symbols, int32, each under its own widths, which add up to 2^24."""
        if not len(widths):
            return np.zeros(0, np.int32)
        table = _widths_less_one(widths)
        try:
            found = self._decoder.decode(self._family, table)
        except AssertionError as error:
            raise BadStream("the stream is no message of this model") from error
        self._bits += PRECISION * len(found) - float(np.log2(table[np.arange(len(found)), found] + 1).sum())
        return found


class Stack:
    """A stack of symbols by ANS: what was pushed last is popped first."""

    def __init__(self, words: np.ndarray | None = None, *, any_bits: bool = False, bottom: int | None = None):
        """With words "n" uint32: what `words()` gave; with `any_bits`, anything. With a `bottom`, see above."""
        self._family = _family()
        self._bottom = bottom
        coder = require_constriction().stream.stack.AnsCoder
        self._coder = coder() if words is None else coder(words, seal=any_bits)

    def push(self, intervals: Intervals) -> None:
        """Push symbols, the last one first, so that they are popped in their order."""
        place, table = _threes(intervals)
        if len(place):
            self._coder.encode_reverse(place, self._family, table)

    def get(self, widths: Int[Tensor, "n k"]) -> np.ndarray:
        """The top n symbols, int32, under widths that add up to 2^24. Raises BadStream below the bottom."""
        if not len(widths):
            return np.zeros(0, np.int32)
        found = self._coder.decode(self._family, _widths_less_one(widths))
        if self._bottom is not None:
            depth, state = self._coder.pos()
            if depth < self._bottom or state < _FULL:
                raise BadStream("the stream has ended before its images have: its stack was popped below its bottom")
        return found

    def begin(self) -> None:
        """A part begins: whether it can shows with each symbol."""

    @property
    def depth(self) -> int:
        """How many words of 32 bits lie under those that the next symbol may change."""
        return self._coder.pos()[0]

    @property
    def num_bits(self) -> int:
        """What the stack holds, to a bit."""
        depth, state = self._coder.pos()
        return 8 * _WORD * depth + state.bit_length()

    def clone(self) -> "Stack":
        other = Stack.__new__(Stack)
        other._family, other._coder, other._bottom = self._family, self._coder.clone(), self._bottom
        return other

    def words(self) -> np.ndarray:
        """The stack, "n" uint32."""
        return self._coder.get_compressed()

    def any_bits(self) -> np.ndarray:
        """The words that a stack of any bits began with, once all that was popped is pushed again."""
        try:
            return self._coder.get_compressed(unseal=True)
        except AssertionError as error:
            raise BadStream("the symbols that were pushed are not those that were popped") from error
