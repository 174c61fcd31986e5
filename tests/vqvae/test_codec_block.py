"""A block's content: its layout byte by byte, and that whatever else is refused without harm."""

import struct
import tracemalloc
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqvae.codec.block import MAX_TILES, STORED, BlockContent, tiles_of
from vqvae.codec.container import MAX_IMAGES, DamagedFile, varint
from vqvae.codec.tiles import MAX_SIDE, Tiling

SIZE = 4


def tilings_of(*shapes, num_channels=1):
    return [Tiling(shape=shape, num_channels=num_channels, size=SIZE) for shape in shapes]


def a_content(shapes, kinds=None, *, num_channels=1, has_labels=False, check=0, stream=b"", names=None):
    """With as many stored pixels as its kinds need."""
    tilings = tilings_of(*shapes, num_channels=num_channels)
    tiles = tiles_of(tilings)
    kinds = [0] * len(tiles) if kinds is None else [kinds[i % len(kinds)] for i in range(len(tiles))]
    num = sum(tiling.inside_bytes(tile) for (tiling, tile), kind in zip(tiles, kinds, strict=True) if kind == STORED)
    return BlockContent(
        tilings=tilings,
        kinds=kinds,
        has_labels=has_labels,
        check=check,
        stream=stream,
        stored=bytes(i * 7 % 256 for i in range(num)),
        names=names,
    )


def read(data, num_channels=1):
    return BlockContent.unpack(data, num_channels, SIZE)


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
    some = draw(st.one_of(shapes, repeated))
    names = draw(st.one_of(st.none(), st.lists(a_name, min_size=len(some), max_size=len(some))))
    num_channels = draw(st.sampled_from([1, 3]))
    kinds = draw(st.lists(a_kind, min_size=1, max_size=30))
    has_labels, check = draw(st.booleans()), draw(st.integers(0, 2**32 - 1))
    stream = draw(st.binary(max_size=300))
    # Types are checked at random places, which a strategy must not see: the test itself makes the content.
    return num_channels, lambda: a_content(
        some,
        kinds,
        num_channels=num_channels,
        has_labels=has_labels,
        check=check,
        stream=stream,
        names=names,
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(contents())
def test_what_is_packed_is_read(pair):
    num_channels, content = pair[0], pair[1]()
    assert read(content.pack(), num_channels) == content


@settings(max_examples=100, deadline=None, derandomize=True)
@given(contents(), st.floats(0, 1, exclude_max=True))
def test_truncations_are_refused(pair, where):
    num_channels, content = pair[0], pair[1]()
    data = content.pack()
    with pytest.raises(DamagedFile):
        read(data[: int(where * len(data))], num_channels)
    with pytest.raises(DamagedFile, match="a block has 1 bytes at its end that mean nothing"):
        read(data + b"\0", num_channels)


@pytest.mark.parametrize("names", [None, ["a", "b.png", "ü"]])
def test_every_truncation_is_refused(names):
    content = a_content([(1, 4, 4), (1, 4, 4), (3, 5, 2)], [0, STORED, 3], stream=bytes(range(150)), names=names)
    data = content.pack()
    assert read(data) == content
    for length in range(len(data)):
        with pytest.raises(DamagedFile):
            read(data[:length])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=60))
def test_any_bytes(data):
    """Refused, or what packs to a content of the same content."""
    try:
        content = read(data)
    except DamagedFile:
        return
    assert read(content.pack()) == content


# The layout


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
    assert content.pack()[: len(expected)] == expected
    # The sixth tile is the fourth of the long image, whole: 16 pixels.
    assert content.stored == bytes(i * 7 for i in range(16))
    assert content.pack()[len(expected) : len(expected) + 16] == content.stored
    names = b"a\0" + b"\0" + b"\xc3\xbc\0"
    assert zlib.decompress(content.pack()[len(expected) + 16 :]) == names


def test_the_least_content():
    assert a_content([(1, 4, 4)]).pack() == bytes.fromhex("01 00 01 01 04 04 00 00000000 00")


def test_only_pixels_inside_are_stored():
    assert len(a_content([(1, 5, 5)], [STORED]).stored) == 25
    assert len(a_content([(3, 5, 5)], [STORED]).stored) == 75
    assert len(a_content([(1, 5, 5)], [STORED], num_channels=3).stored) == 25


def test_flags():
    for has_labels in (False, True):
        for names in (None, ["n"]):
            data = a_content([(1, 4, 4)], has_labels=has_labels, names=names).pack()
            assert data[1] == has_labels + 2 * (names is not None)
    data = bytearray(a_content([(1, 4, 4)]).pack())
    for flags in (4, 8, 128, 255):
        data[1] = flags
        with pytest.raises(DamagedFile, match=rf"a block has the flags {flags:#x}, of which this version knows 1 and"):
            read(bytes(data))


# Hostile values


def spelled(num_images=b"\x01", flags=b"\x00", shapes=b"\x01\x01\x04\x04", kinds=b"\x00", rest=bytes(5)):
    return num_images + flags + shapes + kinds + rest


def peak_of(data, match):
    """The most memory taken while a content is refused."""
    tracemalloc.start()
    try:
        with pytest.raises(DamagedFile, match=match):
            read(data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def shape_run(run, channels, height, width):
    return varint(run) + bytes([channels]) + varint(height) + varint(width)


@pytest.mark.parametrize("num_images", [0, MAX_IMAGES + 1, 2**32 - 1])
def test_numbers_of_images(num_images):
    match = f"a block claims {num_images} images, expected 1 to {MAX_IMAGES}"
    assert peak_of(spelled(num_images=varint(num_images)), match) < 100_000


@pytest.mark.parametrize(("run", "after"), [(0, 0), (3, 0), (2**32 - 1, 0), (2, 1)])
def test_runs_of_shapes(run, after):
    first = shape_run(1, 1, 4, 5) if after else b""
    data = spelled(num_images=b"\x02", shapes=first + shape_run(run, 1, 4, 4))
    assert peak_of(data, f"a block of 2 images has {run} of one shape after {after} others") < 100_000


@pytest.mark.parametrize(
    ("channels", "height", "width"),
    [(0, 4, 4), (5, 4, 4), (255, 4, 4), (1, 0, 4), (1, 4, 0), (1, MAX_SIDE + 1, 4), (1, 4, 2**32 - 1)],
)
def test_sides_and_channels(channels, height, width):
    data = spelled(shapes=shape_run(1, channels, height, width))
    match = f"a block cannot be read: got an image of {channels} channels and {height} x {width} pixels"
    assert peak_of(data, match) < 100_000


def test_channels_that_the_model_cannot_take():
    data = spelled(shapes=shape_run(1, 2, 4, 4))
    assert len(read(data).kinds) == 2
    with pytest.raises(DamagedFile, match="a block cannot be read: got an image of 2 channels for a model of 3"):
        read(data, num_channels=3)


@pytest.mark.parametrize(
    ("num_images", "shape"),
    [
        (1, (1, MAX_SIDE, MAX_SIDE)),
        (1, (4, 2048 * SIZE, 2048 * SIZE)),
        (MAX_IMAGES, (1, 5 * SIZE, 5 * SIZE)),
        (MAX_IMAGES, (4, MAX_SIDE, MAX_SIDE)),
    ],
)
def test_tiles_beyond_the_most(num_images, shape):
    data = spelled(num_images=varint(num_images), shapes=shape_run(num_images, *shape))
    assert peak_of(data, f"tiles with .* bytes of pixels, expected at most {MAX_TILES} and") < 100_000


def test_tiles_beyond_the_most_in_many_runs():
    """They are counted while they are read."""
    run = shape_run(1, 1, 64 * SIZE, 64 * SIZE)
    data = spelled(num_images=varint(1000), shapes=run * 1000)
    assert peak_of(data, f"a block claims {17 * 2**12} tiles") < 100_000


def test_pixels_beyond_the_most():
    """Those that pad count too: a pixel alone takes a whole tile of the model."""
    for shape, num_tiles in (((1, 30_000, 30_000), 450), ((1, 1, 1), 2)):
        data = spelled(num_images=b"\x02", shapes=shape_run(2, *shape))
        size = 2000 if num_tiles == 450 else 20_000
        with pytest.raises(DamagedFile, match=f"a block claims {num_tiles} tiles with {num_tiles * size**2} bytes"):
            BlockContent.unpack(data, 1, size)


@pytest.mark.parametrize(
    "runs",
    [
        [(0, 0, 1)],
        [(0, 2, 1)],
        [(1, 1, 1)],
        [(2**32 - 1, 1, 1)],
        [(0, 2**32 - 1, 1)],
        [(0, 1, 1), (0, 1, 2)],
        [(0, 1, 0)],
        [(0, 1, 16)],
        [(0, 1, 254)],
    ],
)
def test_runs_of_kinds(runs):
    """Of one tile."""
    kinds = varint(len(runs)) + b"".join(varint(gap) + varint(length) + bytes([kind]) for gap, length, kind in runs)
    gap, length, kind = runs[-1]
    match = f"a block of 1 tiles has {length} of kind {kind} after {len(runs) - 1} and {gap} others"
    assert peak_of(spelled(kinds=kinds), match) < 100_000


def test_claims_of_more_than_there_is():
    most = varint(2**32 - 1)
    assert (
        peak_of(spelled(kinds=most), r"got nothing at byte 11, expected a varint|a block of 1 tiles has 0 of kind 0")
        < 100_000
    )
    assert peak_of(spelled(rest=bytes(4) + most), r"a block claims 4294967295 more bytes at byte 16 of .* has 0") < 1e5
    stored = spelled(shapes=shape_run(1, 1, 400, 400), kinds=varint(1) + varint(0) + varint(10**4) + b"\xff")
    match = "a block claims 160000 more bytes"
    with pytest.raises(DamagedFile, match=match):
        read(stored)


def with_names(packed, num_images=1):
    return spelled(num_images=varint(num_images), flags=b"\x02", shapes=shape_run(num_images, 1, 4, 4)) + packed


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (b"", "a block of 1 images has 0 names"),
        (b"a", "a block of 1 images has 0 names"),
        (b"a\0b", "a block of 1 images has 1 names"),
        (b"a\0b\0", "a block of 1 images has 2 names"),
        (b"a\0\0", "a block of 1 images has 2 names"),
        (b"\xff\0", "the names in a block cannot be read: 'utf-8'"),
        (b"a" * 4097 + b"\0", "a block of 1 images has 1 names, or some over 4096 bytes"),
        (b"a" * 9000 + b"\0", "a block of 1 images has 0 names, or some over 4096 bytes"),
    ],
)
def test_names_that_are_none(names, message):
    with pytest.raises(DamagedFile, match=message):
        read(with_names(zlib.compress(names)))


@pytest.mark.parametrize("packed", [b"", b"no zlib", zlib.compress(b"a\0")[:-1], zlib.compress(b"a\0")[:-4] + bytes(4)])
def test_names_that_are_no_zlib(packed):
    with pytest.raises(DamagedFile, match=r"the names in a block cannot be read|a block of 1 images has"):
        read(with_names(packed))


def test_bytes_behind_the_names():
    with pytest.raises(DamagedFile, match="a block has 3 bytes at its end that mean nothing"):
        read(with_names(zlib.compress(b"a\0") + b"end"))


@pytest.mark.parametrize("byte", [b"\0", b"a"])
def test_names_that_unpack_to_gigabytes(byte):
    packer = zlib.compressobj(9)
    bomb = b"".join(packer.compress(byte * 2**20) for _ in range(64)) + packer.flush()
    assert len(bomb) < 100_000
    assert peak_of(with_names(bomb), "a block of 1 images has") < 1_000_000
    assert peak_of(with_names(bomb, 500), "a block of 500 images has") < 20_000_000


def test_the_longest_names():
    """As long as they may be, all of them; zlib stops short of its end just there."""
    for names in (["x" * 4096], ["ü" * 2048] * 3, [str(i).ljust(4096, "y") for i in range(5)]):
        content = a_content([(1, 4, 4)] * len(names), names=names)
        assert read(content.pack()) == content


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a\0b"], r"got a name of 3 bytes, 'a\\x00b'.., expected at most 4,096 and none of them zero; rename it"),
        (["x" * 4097], "got a name of 4,097 bytes, 'xxx"),
        (["ü" * 2049], "got a name of 4,098 bytes, 'üüü"),
        (["\udc80"], r"got the name '\\udc80', expected one that can be written as UTF-8; rename it"),
        (["a", "b"], "got 2 names for 1 images, expected one each"),
        ([], "got 0 names for 1 images, expected one each"),
    ],
)
def test_names_that_cannot_be_written(names, message):
    with pytest.raises(ValueError, match=message):
        a_content([(1, 4, 4)], names=names).pack()


def test_many_images_of_one_shape_take_few_bytes():
    content = a_content([(1, 4, 4)] * 5000)
    assert len(content.pack()) == len(varint(5000)) * 2 + 1 + 3 + 1 + 4 + 1
    assert read(content.pack()) == content


def test_the_check_is_little_endian():
    data = a_content([(1, 4, 4)], check=0xA1B2C3D4).pack()
    assert struct.pack("<I", 0xA1B2C3D4) in data
    assert read(data).check == 0xA1B2C3D4
