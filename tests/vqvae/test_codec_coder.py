"""Intervals to bytes and back: what is written comes back, in as few bytes as it can, and damage is harmless."""

import contextlib
import sys

import constriction
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vqvae.codec.coder import RangeReader, RangeWriter, Stack
from vqvae.codec.integer_tables import TOTAL, Intervals

seeds = st.integers(0, 2**32)


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
    reader = RangeReader(data)
    return [reader.get(widths).tolist() for widths in tables]


# The queue


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(messages, max_size=4))
def test_what_is_written_is_read(parts):
    data = written(*parts)
    assert read(data, *(widths for widths, _ in parts)) == [symbols.tolist() for _, symbols in parts]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(messages)
def test_three_entries_code_as_the_whole_table_does(part):
    """Word for word, in the state too; so the integers are those that constriction itself has."""
    widths, symbols = part
    writer = RangeWriter()
    writer.put(at(widths, symbols))
    theirs = constriction.stream.queue.RangeEncoder()
    family = constriction.stream.model.Categorical(perfect=False)
    if len(symbols):
        theirs.encode(symbols.numpy().astype(np.int32), family, widths.double().numpy() - 1)
    assert writer._encoder.pos() == theirs.pos()
    assert np.array_equal(writer._encoder.get_compressed(), theirs.get_compressed())
    own = constriction.stream.queue.RangeDecoder(theirs.get_compressed())
    if len(symbols):
        assert own.decode(family, widths.double().numpy() - 1).tolist() == symbols.tolist()


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


def test_the_end_takes_a_byte_at_most():
    """Never over information + 8 bits, but for what the coder's own 32 bits round away."""
    overheads, ordinary = [], []
    for seed in range(3000):
        num = (0, 1, 2, 5, 40, 1000 if seed % 20 == 0 else 100)[seed % 6]
        widths, symbols = message(seed % 7, num, (3, 16, 100)[seed % 3], seed)
        data = written((widths, symbols))
        information = float(at(widths, symbols).bits().sum())
        overheads.append(8 * len(data) - information)
        ordinary += [overheads[-1]] * (num > 0 and seed % 7 == 0)
        assert 8 * len(data) <= information + 8 + 2e-3 * num
        assert data == data.rstrip(b"\0")
        assert num or data == b""
        assert read(data + bytes(seed % 11), widths) == [symbols.tolist()]
    # Messages drawn at their odds; others may be far cheaper, since zeros at the end are left out.
    assert 3.5 < np.mean(ordinary) < 4.5


def test_no_shorter_stream_would_do():
    shorter = 0
    for seed in range(60):
        widths, symbols = message(0, 4, 16, seed)
        data = written((widths, symbols))
        if len(data) == 2:
            shorter += 1
            assert all(read(bytes([byte]), widths) != [symbols.tolist()] for byte in range(256))
    assert shorter > 10


def test_a_message_of_certain_symbols_takes_nothing():
    widths = torch.tensor([[TOTAL - 2, 1, 1]]).expand(100_000, 3)
    assert written((widths, torch.zeros(100_000, dtype=torch.int64))) == b""
    assert read(b"", widths) == [[0] * 100_000]


def test_carries():
    """An upper bound that stays at the top for long, then falls below or stays: whole words of ones or a carry."""
    for length in range(0, 120, 3):
        for final in (0, 1, 2):
            top = torch.tensor([[1, 1, TOTAL - 2]]).expand(length, 3)
            half = torch.tensor([[1 << 23, (1 << 23) - 1, 1]])
            parts = [
                (half, torch.tensor([0])),
                (top, torch.full((length,), 2)),
                (torch.tensor([[1, 1, TOTAL - 2]]).expand(9, 3), torch.full((9,), 1)),
                (half, torch.tensor([final])),
            ]
            data = written(*parts)
            assert read(data, *(widths for widths, _ in parts)) == [symbols.tolist() for _, symbols in parts]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(messages, st.integers(0, 40))
def test_zeros_behind_the_end_are_no_matter(part, zeros):
    widths, symbols = part
    assert read(written(part) + bytes(zeros), widths) == [symbols.tolist()]


def strided(widths: Tensor) -> dict[str, Tensor]:
    """The same table, otherwise in memory."""
    wide = torch.zeros(len(widths), 2 * widths.shape[1], dtype=torch.int64)
    wide[:, ::2] = widths
    return {"columns first": widths.T.contiguous().T, "every second": wide[:, ::2], "plain": widths}


def test_tables_in_any_order_in_memory():
    widths = some_widths(50, 7, 3)
    symbols = drawn(widths, 4)
    data = written((widths, symbols))
    for layout, table in strided(widths).items():
        assert layout == "plain" or not table.is_contiguous()
        assert read(data, table) == [symbols.tolist()]
        stack = Stack()
        stack.push(at(widths, symbols))
        assert stack.get(table).tolist() == symbols.tolist()


def test_one_table_for_all():
    one = some_widths(1, 7, 5)
    widths = one.expand(40, 7)
    assert widths.stride(0) == 0
    symbols = drawn(widths, 6)
    assert read(written((widths, symbols)), widths) == [symbols.tolist()]


def test_intervals_of_any_shape():
    widths = some_widths(24, 5, 8)
    symbols = drawn(widths, 9)
    intervals = at(widths, symbols)
    writer = RangeWriter()
    writer.put(Intervals(*(part.view(4, 6).T.contiguous().T for part in intervals)))
    assert read(writer.finish(), widths) == [symbols.tolist()]


@pytest.mark.parametrize(("left", "width"), [(-1, 5), (0, 0), (TOTAL - 3, 4), (5, -1)])
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
        assert found.min() >= 0
        assert found.max() < num_symbols


def test_damage_is_harmless():
    """Each byte changed, or the stream cut: other symbols or an error."""
    widths, symbols = message(0, 60, 16, 0)
    data = written((widths, symbols))
    same = 0
    for i in range(len(data)):
        for damaged in (data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1 :], data[:i], data[:i] + data[i + 1 :]):
            with contextlib.suppress(ValueError):
                same += read(damaged, widths) == [symbols.tolist()]
    assert same <= 1


def test_a_stream_that_no_writer_makes():
    """The highest number of all lies above what a table's rounding leaves: the one error that there is."""
    widths = torch.tensor([[5, TOTAL - 10, 5]]).expand(50, 3)
    with pytest.raises(ValueError, match="the stream is no message of this model"):
        read(b"\xff" * 80, widths)


# The stack


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(messages, max_size=4))
def test_what_is_pushed_is_popped(parts):
    stack = Stack()
    for widths, symbols in parts:
        stack.push(at(widths, symbols))
    again = Stack(stack.words())
    for widths, symbols in reversed(parts):
        assert stack.get(widths).tolist() == symbols.tolist()
        assert again.get(widths).tolist() == symbols.tolist()
    assert len(stack.words()) == len(again.words()) == 0


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
    assert stack.depth in (len(stack.words()) - 1, len(stack.words()) - 2)


def test_a_clone_is_another_stack():
    widths, symbols = message(0, 100, 16, 2)
    stack = Stack()
    stack.push(at(widths, symbols))
    before = stack.words()
    other = stack.clone()
    other.get(widths[:50])
    assert np.array_equal(stack.words(), before)
    stack.push(at(widths, symbols))
    assert other.get(widths[50:]).tolist() == symbols[50:].tolist()
    assert len(other.words()) == 0


def test_nothing_is_nothing():
    none = torch.zeros(0, 5, dtype=torch.int64)
    empty = Intervals(none[:, 0], none[:, 0])
    writer, stack = RangeWriter(), Stack()
    writer.put(empty)
    stack.push(empty)
    assert writer.finish() == b""
    assert RangeReader(b"").get(none).shape == stack.get(none).shape == (0,)
    assert len(stack.words()) == 0


@pytest.mark.parametrize("make", [RangeWriter, lambda: RangeReader(b""), Stack])
def test_without_constriction(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ValueError, match=r"need the package constriction: pip install 'vqvae-priors\[codec\]'"):
        make()
