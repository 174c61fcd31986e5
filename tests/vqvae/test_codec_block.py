"""A block's content: its layout byte by byte, and that whatever else is refused without harm."""

import tracemalloc
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqvae.codec.block import MAX_TILES, STORED, BlockContent, tiles_of
from vqvae.codec.container import MAX_IMAGES, DamagedFile, varint
from vqvae.codec.tiles import MAX_SIDE, Tiling

SIZE = 4
MOST = 2**32 - 1


def a_content(shapes, kinds=(0,), *, num_channels=1, has_labels=False, check=0, stream=b"", names=None):
    """With these kinds over and over, and as many stored pixels as they need."""
    tilings = [Tiling(shape=shape, num_channels=num_channels, size=(SIZE, SIZE)) for shape in shapes]
    tiles = tiles_of(tilings)
    kinds = [kinds[i % len(kinds)] for i in range(len(tiles))]
    num = sum(tiling.inside_bytes(tile) for (tiling, tile), kind in zip(tiles, kinds, strict=True) if kind == STORED)
    stored = bytes(i * 7 % 256 for i in range(num))
    return BlockContent(
        tilings=tilings, kinds=kinds, has_labels=has_labels, check=check, stream=stream, stored=stored, names=names
    )


def read(data, num_channels=1):
    return BlockContent.unpack(data, num_channels, (SIZE, SIZE))


shapes = st.lists(
    st.tuples(st.sampled_from([1, 3]), st.integers(1, 3 * SIZE), st.integers(1, 3 * SIZE)), min_size=1, max_size=6
)
repeated = st.lists(st.tuples(shapes, st.integers(1, 4)), min_size=1, max_size=3).map(
    lambda parts: [shape for some, times in parts for shape in some * times]
)
a_kind = st.one_of(st.integers(0, 15), st.just(STORED), st.just(0))
a_name = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)


@st.composite
def contents(draw):
    """Arguments of `a_content`: types are checked at random places, which a strategy must not see."""
    some = draw(st.one_of(shapes, repeated))
    options = {
        "num_channels": draw(st.sampled_from([1, 3])),
        "has_labels": draw(st.booleans()),
        "check": draw(st.integers(0, MOST)),
        "stream": draw(st.binary(max_size=300)),
        "names": draw(st.one_of(st.none(), st.lists(a_name, min_size=len(some), max_size=len(some)))),
    }
    return some, draw(st.lists(a_kind, min_size=1, max_size=30)), options


@settings(max_examples=150, deadline=None, derandomize=True)
@given(contents(), st.floats(0, 1, exclude_max=True))
def test_what_is_packed_is_read_whole_or_not_at_all(arguments, where):
    some, kinds, options = arguments
    content, num_channels = a_content(some, kinds, **options), options["num_channels"]
    data = content.pack()
    assert read(data, num_channels) == content
    with pytest.raises(DamagedFile):
        read(data[: int(where * len(data))], num_channels)
    with pytest.raises(DamagedFile, match="1 bytes at its end that mean nothing"):
        read(data + b"\0", num_channels)


def test_the_layout_is_as_documented():
    content = a_content(
        [(1, 4, 4), (1, 4, 4), (3, 5, 300)],
        [0, 0, 0, 3, 3, STORED] + [0] * 450,
        has_labels=True,
        check=0x12345678,
        stream=b"s" * 200,
        names=["a", "", "ü"],
    )
    expected = b"\x03" + b"\x03"
    expected += b"\x02\x01\x04\x04" + b"\x01\x03\x05\xac\x02"
    expected += b"\x02" + b"\x03\x02\x03" + b"\x00\x01\xff"
    expected += bytes.fromhex("78563412") + b"\xc8\x01" + b"s" * 200
    expected += bytes(i * 7 for i in range(16))  # the sixth tile is the fourth of the long image, whole
    assert content.pack()[: len(expected)] == expected
    assert zlib.decompress(content.pack()[len(expected) :]) == b"a\0" + b"\0" + b"\xc3\xbc\0"


def test_the_least_content():
    assert a_content([(1, 4, 4)]).pack() == bytes.fromhex("01 00 01 01 04 04 00 00000000 00")
    many = a_content([(1, 4, 4)] * 5000).pack()
    assert many == varint(5000) + b"\0" + varint(5000) + bytes.fromhex("01 04 04 00 00000000 00")


def spelled(num_images=1, flags=b"\x00", shapes=b"\x01\x01\x04\x04", kinds=b"\x00", rest=bytes(5)):
    return varint(num_images) + flags + shapes + kinds + rest


def shape_run(run, channels, height, width):
    return varint(run) + bytes([channels]) + varint(height) + varint(width)


def runs_of_kinds(*runs):
    return varint(len(runs)) + b"".join(varint(gap) + varint(length) + bytes([kind]) for gap, length, kind in runs)


def with_names(packed, num_images=1):
    return spelled(num_images, flags=b"\x02", shapes=shape_run(num_images, 1, 4, 4)) + packed


def bomb(byte):
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(byte * 2**20) for _ in range(64)) + packer.flush()


HOSTILE = [
    *((spelled(num), f"claims {num} images, expected 1 to {MAX_IMAGES}") for num in (0, MAX_IMAGES + 1, MOST)),
    *((spelled(flags=bytes([flags])), f"the flags {flags:#x}") for flags in (4, 255)),
    *(
        (spelled(2, shapes=shape_run(run, 1, 4, 4)), f"2 images has {run} of one shape after 0 others")
        for run in (0, 3, MOST)
    ),
    (spelled(2, shapes=shape_run(1, 1, 4, 5) + shape_run(2, 1, 4, 4)), "2 images has 2 of one shape after 1 others"),
    *(
        (spelled(shapes=shape_run(1, *shape)), "an image of {} channels and {} x {} pixels".format(*shape))
        for shape in ((0, 4, 4), (5, 4, 4), (1, 0, 4), (1, MAX_SIDE + 1, 4), (1, 4, MOST))
    ),
    *(
        (spelled(num, shapes=shape_run(num, *shape)), f"pixels, expected at most {MAX_TILES} and")
        for num, *shape in ((1, 1, MAX_SIDE, MAX_SIDE), (1, 4, 8192, 8192), (MAX_IMAGES, 1, 5 * SIZE, 5 * SIZE))
    ),
    # They are counted while they are read.
    (spelled(1000, shapes=shape_run(1, 1, 64 * SIZE, 64 * SIZE) * 1000), f"claims {17 * 2**12} tiles"),
    # Of one tile.
    *(
        (spelled(kinds=runs_of_kinds((gap, length, kind))), f"has {length} of kind {kind} after 0 and {gap} others")
        for gap, length, kind in ((0, 0, 1), (0, 2, 1), (1, 1, 1), (MOST, 1, 1), (0, MOST, 1), (0, 1, 0), (0, 1, 16))
    ),
    (spelled(kinds=runs_of_kinds((0, 1, 1), (0, 1, 2))), "has 1 of kind 2 after 1 and 0 others"),
    (spelled(kinds=varint(MOST)), "has 0 of kind 0"),
    (spelled(rest=bytes(4) + varint(MOST)), "claims 4294967295 more bytes at byte 16 of .* has 0"),
    (spelled(shapes=shape_run(1, 1, 400, 400), kinds=runs_of_kinds((0, 10**4, STORED))), "claims 160000 more bytes"),
    (with_names(bomb(b"\0")), "1 images has"),
    (with_names(bomb(b"a")), "1 images has"),
]


@pytest.mark.parametrize(("data", "message"), HOSTILE)
def test_claims_are_refused_before_memory_is_taken(data, message):
    assert len(data) < 100_000
    with pytest.raises(DamagedFile, match=message):  # and what Python makes at a first call is there
        read(data)
    tracemalloc.start()
    try:
        with pytest.raises(DamagedFile):
            read(data)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_what_pads_counts_too():
    """A pixel alone takes a whole tile of the model."""
    data = spelled(2, shapes=shape_run(2, 1, 1, 1))
    with pytest.raises(DamagedFile, match=f"claims 2 tiles with {2 * 20_000**2} bytes"):
        BlockContent.unpack(data, 1, (20_000, 20_000))
    with pytest.raises(DamagedFile, match="2 channels for a model of 3"):
        read(spelled(shapes=shape_run(1, 2, 4, 4)), num_channels=3)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (zlib.compress(b""), "1 images has 0 names"),
        (zlib.compress(b"a\0b"), "1 images has 1 names"),
        (zlib.compress(b"a\0\0"), "1 images has 2 names"),
        (zlib.compress(b"\xff\0"), "names in a block cannot be read: 'utf-8'"),
        (zlib.compress(b"a" * 4097 + b"\0"), "or some over 4096 bytes"),
        (zlib.compress(b"a\0") + b"end", "3 bytes at its end that mean nothing"),
        (b"no zlib", "names in a block cannot be read"),
        (zlib.compress(b"a\0")[:-1], "1 images has 1 names"),
        (zlib.compress(b"a\0")[:-4] + bytes(4), "names in a block cannot be read"),
    ],
)
def test_names_that_are_none(names, message):
    with pytest.raises(DamagedFile, match=message):
        read(with_names(names))


def test_the_longest_names():
    """As long as they may be, all of them; zlib stops short of its end just there."""
    for names in (["x" * 4096], ["ü" * 2048] * 3, [str(i).ljust(4096, "y") for i in range(5)]):
        content = a_content([(1, 4, 4)] * len(names), names=names)
        assert read(content.pack()) == content


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a\0b"], r"a name of 3 bytes, 'a\\x00b'.., expected at most 4,096 and none of them zero"),
        (["ü" * 2049], "a name of 4,098 bytes, 'üüü"),
        (["\udc80"], r"the name '\\udc80', expected .* UTF-8"),
        (["a", "b"], "2 names for 1 images"),
    ],
)
def test_names_that_cannot_be_written(names, message):
    with pytest.raises(ValueError, match=message):
        a_content([(1, 4, 4)], names=names).pack()
