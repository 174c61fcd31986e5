"""Intervals to bytes and back: what is written comes back, in as few bytes as it can, and damage is harmless."""

import hashlib
from collections.abc import Sequence

import constriction
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vqvae.codec.coder import SLACK, BadStream, RangeReader, RangeWriter, Stack
from vqvae.codec.integer_tables import TOTAL, Intervals

seeds = st.integers(0, 2**32)
# Of the message below, by the writer before the rule of `SLACK`: its length, and the beginning of its SHA-256.
FIXED = (119, "32cbe4b1f1652887")


def some_widths(num: int, num_symbols: int, seed: int, sharpness: float = 1.0) -> Tensor:
    """Tables "n k" of at least 1 each; the sharper, the closer to one symbol for certain."""
    draw = torch.Generator().manual_seed(seed)
    probs = (torch.randn(num, num_symbols, generator=draw, dtype=torch.float64) * sharpness).softmax(-1)
    widths = (probs * (TOTAL - num_symbols)).long() + 1
    widths.scatter_add_(1, widths.argmax(1, keepdim=True), TOTAL - widths.sum(1, keepdim=True))
    return widths


def drawn(widths: Tensor, seed: int) -> Tensor:
    """Symbols at the odds of their tables."""
    points = torch.randint(0, TOTAL, (len(widths), 1), generator=torch.Generator().manual_seed(seed))
    return (points >= widths.cumsum(-1)).sum(-1)


def at(widths: Tensor, symbols: Tensor) -> Intervals:
    width = widths.gather(1, symbols[:, None])[:, 0]
    return Intervals(widths.cumsum(1).gather(1, symbols[:, None])[:, 0] - width, width)


def message(kind: int, num: int, num_symbols: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tables and symbols: drawn, any at all, the first, the last, the likeliest, the least likely, or at the top."""
    widths = some_widths(num, num_symbols, seed, (0.3, 2.0, 30.0)[seed % 3])
    match kind:
        case 0:
            return widths, drawn(widths, seed)
        case 1:
            draw = torch.Generator().manual_seed(seed)
            return widths, torch.randint(0, num_symbols, (num,), generator=draw)
        case 2:
            return widths, torch.zeros(num, dtype=torch.int64)
        case 3:
            return widths, torch.full((num,), num_symbols - 1)
        case 4:
            return widths, widths.argmax(1)
        case 5:
            return widths, widths.argmin(1)
    # Nearly all of the range, but for its lowest end: the upper bound stays at the top, where carries come from.
    least = 1 + seed % 5
    widths = torch.ones(num, num_symbols, dtype=torch.int64) * least
    widths[:, -1] = TOTAL - least * (num_symbols - 1)
    symbols = torch.full((num,), num_symbols - 1)
    symbols[seed % max(num, 1) :: 7] = num_symbols - 2
    return widths, symbols


messages = st.builds(message, st.integers(0, 6), st.integers(0, 300), st.sampled_from([3, 4, 16, 100]), seeds)


def written(*parts: tuple[Tensor, Tensor]) -> bytes:
    writer = RangeWriter()
    for widths, symbols in parts:
        writer.put(at(widths, symbols))
    return writer.finish()


def read(data: bytes, *tables: Tensor) -> list[list[int]]:
    reader, found = RangeReader(data), []
    for widths in tables:
        reader.begin()
        found.append(reader.get(widths).tolist())
    return found


def comes_back(data: bytes, parts: Sequence[tuple[Tensor, Tensor]]) -> bool:
    return read(data, *(widths for widths, _ in parts)) == [symbols.tolist() for _, symbols in parts]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(messages, max_size=4), st.integers(0, 40))
def test_what_is_written_is_read(parts, zeros):
    """Zeros behind the end are no matter, but for those that the rule asks for."""
    data = written(*parts)
    assert comes_back(data, parts)
    assert comes_back(data + bytes(zeros), parts)
    stripped, bits = data.rstrip(b"\0"), [float(at(*part).bits().sum()) for part in parts]
    if len(data) > len(stripped):
        assert len(data) <= sum(bits[:-1]) / 8 - SLACK + 4
    if sum(bits[:-1]) > 8 * (len(stripped) + SLACK) + 8:
        with pytest.raises(BadStream, match="has ended before its images"):
            comes_back(stripped, parts)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(messages)
def test_three_entries_code_as_the_whole_table_does(part):
    """So the integers are those that constriction itself has, which reads what is written here."""
    widths, symbols = part
    words = np.frombuffer(written(part).ljust(8 + 4 * len(symbols), b"\0"), ">u4").astype(np.uint32)
    theirs = constriction.stream.queue.RangeDecoder(words)
    if len(symbols):
        family = constriction.stream.model.Categorical(perfect=False)
        assert theirs.decode(family, widths.double().numpy() - 1).tolist() == symbols.tolist()


def range_coded(widths: Tensor, symbols: Tensor) -> bytes:
    """A range coder of long integers: a state of 64 bits, of which it moves 32 on where the span gets below them."""
    lower, span, length = 0, 2**64 - 1, 8
    for left, width in zip(*(part.tolist() for part in at(widths, symbols)), strict=True):
        unit = span >> 24
        lower, span = lower + left * unit, width * unit
        if span < 2**32:
            lower, span, length = lower << 32, span << 32, length + 4
    for size in range(length + 1):
        shortest = -(-lower >> 8 * (length - size))
        if shortest << 8 * (length - size) < lower + span:
            return shortest.to_bytes(size, "big")
    raise AssertionError


@settings(max_examples=150, deadline=None, derandomize=True)
@given(messages)
def test_the_stream_is_that_of_another_coder(part):
    widths, symbols = part
    assert written(part) == range_coded(widths, symbols)


def test_a_message_of_certain_symbols_takes_nothing():
    widths = torch.tensor([[TOTAL - 2, 1, 1]]).expand(100_000, 3)
    assert written((widths, torch.zeros(100_000, dtype=torch.int64))) == b""
    assert read(b"", widths) == [[0] * 100_000]


@pytest.mark.parametrize("layout", ["columns first", "every second", "one row for all"])
def test_tables_in_any_order_in_memory(layout):
    widths = some_widths(50, 7, 3)
    match layout:
        case "columns first":
            table = widths.T.contiguous().T
        case "every second":
            table = widths.repeat_interleave(2, 1)[:, ::2]
        case "one row for all":
            table = widths[:1].expand(50, 7)
    assert not table.is_contiguous()
    symbols = drawn(table, 4)
    assert comes_back(written((table, symbols)), [(table, symbols)])
    stack = Stack()
    stack.push(at(table, symbols))
    assert stack.get(table).tolist() == symbols.tolist()


@pytest.mark.parametrize(("left", "width"), [(-1, 5), (0, 0), (TOTAL - 3, 4)])
def test_what_is_no_interval(left, width):
    for coder in (RangeWriter().put, Stack().push):
        with pytest.raises(AssertionError, match="not an interval of the total"):
            coder(Intervals(torch.tensor([left]), torch.tensor([width])))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=60), st.sampled_from([3, 16, 100]), seeds)
def test_any_bytes_are_symbols_or_an_error(data, num_symbols, seed):
    reader = RangeReader(data)
    for part in range(4):
        widths = some_widths(30, num_symbols, seed + part, (0.3, 2.0, 30.0)[seed % 3])
        try:
            found = reader.get(widths)
        except ValueError as error:
            assert str(error) == "the stream is no message of this model"  # noqa: PT017
            return
        assert found.shape == (30,)
        assert 0 <= found.min() <= found.max() < num_symbols


def test_a_stream_that_no_writer_makes():
    """The highest number of all lies above what a table's rounding leaves: the one error that there is."""
    with pytest.raises(ValueError, match="no message of this model"):
        read(b"\xff" * 80, torch.tensor([[5, TOTAL - 10, 5]]).expand(50, 3))


def fixed_message():
    """Parts of 50 symbols each, by integers that are the same everywhere."""
    parts = []
    for part in range(6):
        weights = torch.arange(1, 8)[None] * (torch.arange(50)[:, None] * 7 + part + 1) % 97 + 1
        widths = weights * (TOTAL // weights.sum(1, keepdim=True))
        widths[:, 0] += TOTAL - widths.sum(1)
        parts.append((widths, (torch.arange(50) * 31 + part * 5) % 7))
    return parts


def test_the_bytes_of_a_message_are_those_of_the_version_before():
    data = written(*fixed_message())
    assert (len(data), hashlib.sha256(data).hexdigest()[:16]) == FIXED
    assert comes_back(data, fixed_message())


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(messages, max_size=4))
def test_what_is_pushed_is_popped(parts):
    stack = Stack()
    for widths, symbols in parts:
        stack.push(at(widths, symbols))
    again, clone = Stack(stack.words()), stack.clone()
    for each in (stack, again, clone):
        for widths, symbols in reversed(parts):
            assert each.get(widths).tolist() == symbols.tolist()
        assert len(each.words()) == 0


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(0, 3), st.integers(0, 60), st.sampled_from([3, 16, 100]), seeds)
def test_any_bits_come_back(kind, num, num_symbols, seed):
    """Symbols that random words choose give the words back, be they zeros or none."""
    length = num if kind else 0
    words = np.random.default_rng(seed).integers(0, 2**32, length, np.uint32)
    words *= np.uint32(kind != 1)
    if kind == 2:
        words[length // 2 :] = 0
    stack = Stack(words, any_bits=True)
    assert np.array_equal(stack.any_bits(), words)
    # No symbol takes more than 24 bits.
    parts = [some_widths(length // 3, num_symbols, seed + part) for part in range(3)]
    symbols = [torch.from_numpy(stack.get(widths)).long() for widths in parts]
    for widths, popped in reversed(list(zip(parts, symbols, strict=True))):
        stack.push(at(widths, popped))
    assert np.array_equal(stack.any_bits(), words)


def test_random_words_choose_symbols_at_their_odds():
    widths = torch.tensor([[TOTAL // 2, TOTAL // 4, TOTAL // 4]]).expand(4000, 3)
    words = np.random.default_rng(0).integers(0, 2**32, 1000, np.uint32)
    counts = np.bincount(Stack(words, any_bits=True).get(widths), minlength=3)
    assert np.abs(counts / 4000 - [0.5, 0.25, 0.25]).max() < 0.03


def test_what_a_stack_takes():
    widths, symbols = message(0, 2000, 16, 1)
    stack = Stack()
    stack.push(at(widths, symbols))
    information = float(at(widths, symbols).bits().sum())
    assert -1 < 32 * len(stack.words()) - information < 64
    assert 0 <= stack.num_bits - information < 32
    assert stack.depth in (len(stack.words()) - 1, len(stack.words()) - 2)
    words = stack.words()
    other = stack.clone()
    other.get(widths[:50])
    assert np.array_equal(stack.words(), words)
