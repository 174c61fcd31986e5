"""The codec's file: its layout byte by byte, and that no damage ever gives wrong bytes."""

import contextlib
import errno
import io
import os
import pickle
import random
import resource
import struct
import threading
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqvae.codec import container, recovery
from vqvae.codec.container import (
    Archive,
    DamagedFile,
    Header,
    Mode,
    append,
    pack,
    read_varint,
    varint,
    write,
)
from vqvae.codec.recovery import recover

HEADER = Header(mode=Mode.LOSSY, fingerprint=b"12345678")
OTHER = Header(mode=Mode.LOSSY, fingerprint=b"12345679")
PNG = b"\x89PNG\r\n\x1a\n" + bytes(40)


def block(num_images, tail):
    return num_images, varint(num_images) + tail


BLOCKS = [block(3, b"first"), block(1, b""), block(200, bytes(range(150))), block(65_535, b"last")]
PACKED = pack(HEADER, BLOCKS)

a_block = st.builds(block, st.integers(1, 65_535), st.binary(max_size=300))
a_header = st.builds(
    lambda mode, fingerprint: Header(mode=mode, fingerprint=fingerprint),
    st.sampled_from(Mode),
    st.binary(min_size=8, max_size=8),
)


def sealed(start, index):
    """A file's bytes before its index, its index, and a trailer whose CRC holds."""
    length = struct.pack("<I", len(index))
    return start + index + length + struct.pack("<I", zlib.crc32(start[:16] + index + length)) + b"\xfa\x5a"


def contents(data):
    """Each block's content, or None where it is damaged."""
    with Archive.from_bytes(data) as archive:
        found = []
        for i in range(len(archive.blocks)):
            try:
                found.append((archive.blocks[i].num_images, archive.content(i)))
            except DamagedFile:
                found.append(None)
    return found


def spans(blocks):
    """(first byte, byte behind the last) of each block."""
    at = 16
    for _, content in blocks:
        yield at, at + 12 + len(content)
        at += 12 + len(content)


# ---- the layout


def test_the_layout_is_as_documented():
    start = bytes.fromhex("8956510a 01 01") + b"12345678"
    start += struct.pack("<H", zlib.crc32(start) & 0xFFFF)
    data = start
    for _, content in BLOCKS:
        head = bytes.fromhex("b5424bfa") + struct.pack("<I", len(content))
        data += head + struct.pack("<I", zlib.crc32(head + content)) + content
    index = b"\x03\x06" + b"\x01\x01" + b"\xc8\x01\x98\x01" + b"\xff\xff\x03\x07"
    assert sealed(data, index) == PACKED


def test_a_file_of_no_blocks_has_26_bytes():
    data = pack(HEADER, [])
    assert len(data) == 26
    with Archive.from_bytes(data) as archive:
        assert (archive.blocks, archive.num_images) == ((), 0)


@pytest.mark.parametrize(
    ("num_bytes", "overhead"),
    [(1, 40), (127, 40), (128, 41), (2**14 - 1, 41), (2**14, 42), (2**21 - 1, 42), (2**21, 43)],
)
def test_the_overhead_of_one_image(num_bytes, overhead):
    _, content = block(1, bytes(num_bytes - 1))
    assert len(pack(HEADER, [(1, content)])) - len(content) == overhead <= 44


def test_the_overhead_of_the_longest_content_is_44():
    assert len(varint(container.MAX_CONTENT)) == 5
    assert 16 + 12 + len(varint(1)) + 5 + 10 == 44


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 2**14, 2**21 - 1, 2**28, 2**32 - 1])
def test_varints_round_trip(value):
    assert read_varint(b"\x80" + varint(value) + b"\x80", 1) == (value, 1 + len(varint(value)))


@pytest.mark.parametrize(
    "spelling", ["", "80", "8000", "ff00", "8080808000", "ffffffff1f", "8080808010", "ffffffffff01"]
)
def test_other_spellings_of_varints_are_refused(spelling):
    with pytest.raises(DamagedFile, match=r"expected a varint below 2\^32 in as few bytes as it needs"):
        read_varint(bytes.fromhex(spelling))


@pytest.mark.parametrize("value", [-1, 2**32])
def test_numbers_that_are_no_varint(value):
    with pytest.raises(ValueError, match=rf"got {value}, expected a number from 0"):
        varint(value)


# ---- round trips


@settings(max_examples=100, deadline=None, derandomize=True)
@given(a_header, st.lists(a_block, max_size=8))
def test_what_is_packed_is_read(header, blocks):
    data = pack(header, blocks)
    with Archive.from_bytes(data) as archive:
        assert archive.header == header
        assert archive.size == len(data)
        assert archive.num_images == sum(num for num, _ in blocks)
        assert [b.num_images for b in archive.blocks] == [num for num, _ in blocks]
        assert [data[b.offset : b.offset + b.length] for b in archive.blocks] == [content for _, content in blocks]
        assert [archive.content(i) for i in range(len(blocks))] == [content for _, content in blocks]
    found = recover(data)
    assert (found.header, found.blocks, found.damage) == (header, blocks, [])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_every_image_is_located(counts):
    with Archive.from_bytes(pack(HEADER, [block(n, b"x") for n in counts])) as archive:
        expected = [(i, j) for i, n in enumerate(counts) for j in range(n)]
        assert [archive.locate(image) for image in range(archive.num_images)] == expected
        for image in (-1, archive.num_images):
            with pytest.raises(ValueError, match=f"got image {image}, expected 0 to {archive.num_images - 1}"):
                archive.locate(image)


def test_written_files_are_the_packed_bytes(tmp_path):
    path = tmp_path / "new folder" / "a.vq"
    write(path, HEADER, iter(BLOCKS))
    assert path.read_bytes() == PACKED
    with Archive.open(path) as archive:
        assert [archive.content(i) for i in range(4)] == [content for _, content in BLOCKS]
    found = recover(path)
    assert (found.header, found.blocks, found.damage) == (HEADER, BLOCKS, [])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(a_block, max_size=5), st.lists(a_block, max_size=5))
def test_appending_gives_the_bytes_of_packing_all(tmp_path_factory, old, new):
    path = tmp_path_factory.mktemp("append") / "a.vq"
    write(path, HEADER, old)
    append(path, HEADER, iter(new))
    assert path.read_bytes() == pack(HEADER, old + new)


def test_appending_copies_more_than_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(container, "CHUNK", 7)
    write(tmp_path / "a.vq", HEADER, BLOCKS)
    append(tmp_path / "a.vq", HEADER, BLOCKS)
    assert (tmp_path / "a.vq").read_bytes() == pack(HEADER, BLOCKS + BLOCKS)


def test_appending_keeps_rights_and_links(tmp_path):
    write(tmp_path / "a.vq", HEADER, BLOCKS[:1])
    (tmp_path / "a.vq").chmod(0o600)
    (tmp_path / "link.vq").symlink_to("a.vq")
    append(tmp_path / "link.vq", HEADER, BLOCKS[1:])
    assert (tmp_path / "link.vq").is_symlink()
    assert (tmp_path / "a.vq").read_bytes() == PACKED
    assert (tmp_path / "a.vq").stat().st_mode & 0o777 == 0o600


def test_an_open_archive_keeps_what_it_opened(tmp_path):
    write(tmp_path / "a.vq", HEADER, BLOCKS[:2])
    with Archive.open(tmp_path / "a.vq") as archive:
        append(tmp_path / "a.vq", HEADER, BLOCKS[2:])
        assert archive.num_images == 4
        assert archive.content(0) == BLOCKS[0][1]


# ---- what is refused when writing


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([(0, b"\0")], "got a block of 0 images, expected 1 to 65,535"),
        ([(65_536, varint(65_536))], "got a block of 65536 images, expected 1 to 65,535"),
        ([(1, b"")], "got 0 bytes of content, expected 1 to 4,294,967,295"),
        ([(1, b"\x02abc")], "got a block of 1 images whose content begins with 02 61 62, expected .* 01$"),
        ([(200, b"\xc8")], "got a block of 200 images whose content begins with c8, expected .* c8 01$"),
    ],
)
def test_blocks_that_are_none_are_refused(tmp_path, blocks, message):
    with pytest.raises(ValueError, match=message):
        pack(HEADER, blocks)
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "a.vq", HEADER, blocks)
    assert os.listdir(tmp_path) == []


def test_too_long_a_content_is_refused():
    class Long(bytes):
        def __len__(self):
            return 2**32

    with pytest.raises(ValueError, match=r"got 4,294,967,296 bytes of content, expected 1 to 4,294,967,295"):
        pack(HEADER, [(1, Long(b"\1"))])


def test_too_long_an_index_is_refused(monkeypatch):
    monkeypatch.setattr(container, "MAX_CONTENT", 8)
    assert pack(HEADER, [block(1, b"")] * 4)
    with pytest.raises(ValueError, match="the index exceeds 8 bytes"):
        pack(HEADER, [block(1, b"")] * 5)


@pytest.mark.parametrize("fingerprint", [b"", b"1234567", b"123456789"])
def test_other_fingerprints_are_refused(fingerprint):
    with pytest.raises(ValueError, match=r"got the fingerprint .*, expected 8 bytes"):
        Header(mode=Mode.LOSSY, fingerprint=fingerprint)


def test_appending_to_another_header_is_refused(tmp_path):
    write(tmp_path / "a.vq", HEADER, BLOCKS)
    with pytest.raises(ValueError, match=r"LOSSY and fingerprint 3132333435363738, got .*39; write them to a file of"):
        append(tmp_path / "a.vq", OTHER, BLOCKS)
    assert (tmp_path / "a.vq").read_bytes() == PACKED
    assert os.listdir(tmp_path) == ["a.vq"]


def test_appending_to_nothing_or_to_damage_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no file at"):
        append(tmp_path / "a.vq", HEADER, BLOCKS)
    (tmp_path / "a.vq").write_bytes(PACKED[:-1])
    with pytest.raises(DamagedFile):
        append(tmp_path / "a.vq", HEADER, BLOCKS)
    assert (tmp_path / "a.vq").read_bytes() == PACKED[:-1]


@pytest.mark.parametrize("act", [write, append])
def test_a_folder_is_never_written_over(tmp_path, act):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").touch()
    with pytest.raises(ValueError, match="is there and is no plain file"):
        act(tmp_path / "folder", HEADER, BLOCKS)
    assert (tmp_path / "folder" / "kept").exists()


# ---- a write that is cut


def cut_short(blocks):
    yield from blocks
    raise KeyboardInterrupt


@pytest.mark.parametrize("act", [write, append])
def test_a_cut_while_blocks_come_leaves_the_old_file(tmp_path, act):
    write(tmp_path / "a.vq", HEADER, BLOCKS)
    with pytest.raises(KeyboardInterrupt):
        act(tmp_path / "a.vq", HEADER, cut_short(BLOCKS))
    assert (tmp_path / "a.vq").read_bytes() == PACKED
    assert os.listdir(tmp_path) == ["a.vq"]


@pytest.mark.parametrize("act", [write, append])
@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_cut_at_the_rename_leaves_the_old_file(tmp_path, monkeypatch, act, call):
    def stop(*_):
        raise KeyboardInterrupt

    write(tmp_path / "a.vq", HEADER, BLOCKS)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, stop)
        with pytest.raises(KeyboardInterrupt):
            act(tmp_path / "a.vq", HEADER, BLOCKS)
    assert (tmp_path / "a.vq").read_bytes() == PACKED
    assert os.listdir(tmp_path) == ["a.vq"]


@pytest.mark.parametrize("act", [write, append])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, act):
    class Full(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > 100:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    write(tmp_path / "a.vq", HEADER, BLOCKS)
    with monkeypatch.context() as patch:
        patch.setattr(container, "open", Full, raising=False)
        with pytest.raises(ValueError, match=r"no space is left on the disk; .* untouched"):
            act(tmp_path / "a.vq", HEADER, BLOCKS)
    assert (tmp_path / "a.vq").read_bytes() == PACKED
    assert os.listdir(tmp_path) == ["a.vq"]


@pytest.mark.parametrize("act", [write, append])
def test_a_limit_of_the_system_leaves_the_old_file(tmp_path, act):
    write(tmp_path / "a.vq", HEADER, BLOCKS)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        with pytest.raises(ValueError, match=r"File too large; what was saved there before is untouched"):
            act(tmp_path / "a.vq", HEADER, BLOCKS + BLOCKS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "a.vq").read_bytes() == PACKED
    assert os.listdir(tmp_path) == ["a.vq"]


# ---- damage


def test_every_truncation_is_refused_and_recovers_whole_blocks():
    for length in range(len(PACKED)):
        with pytest.raises(DamagedFile):
            Archive.from_bytes(PACKED[:length])
        found = recover(PACKED[:length])
        assert found.blocks == [b for b, (_, end) in zip(BLOCKS, spans(BLOCKS), strict=True) if end <= length]
        assert found.header == (HEADER if length >= 26 else None)
        assert found.damage


def test_every_flipped_bit_is_noticed_and_costs_one_block_at_most():
    reaches = list(spans(BLOCKS))
    for at in range(len(PACKED)):
        hit = [i for i, (start, end) in enumerate(reaches) if start <= at < end]
        whole = [b for i, b in enumerate(BLOCKS) if i not in hit]
        for bit in range(8):
            data = bytearray(PACKED)
            data[at] ^= 1 << bit
            data = bytes(data)
            if hit:
                assert contents(data) == [None if i in hit else b for i, b in enumerate(BLOCKS)]
            else:
                with pytest.raises(DamagedFile):
                    Archive.from_bytes(data)
            found = recover(data)
            assert found.blocks == whole
            assert found.header == (None if at < 16 else HEADER)
            assert len(found.damage) == (2 if reaches[-1][1] <= at < len(PACKED) - 10 else 1)


def test_every_byte_lost_or_gained_is_noticed():
    reaches = list(spans(BLOCKS))
    for at in range(len(PACKED)):
        for data in (PACKED[:at] + PACKED[at + 1 :], PACKED[:at] + b"\0" + PACKED[at:]):
            with pytest.raises(DamagedFile):
                Archive.from_bytes(data)
            kept = recover(data).blocks
            # To lose the byte before a block that begins with the same byte is to lose the block's.
            edges = [(start - (PACKED[start - 1] == PACKED[start]), end) for start, end in reaches]
            sure = [b for b, (start, end) in zip(BLOCKS, edges, strict=True) if at < start or at >= end]
            assert all(b in kept for b in sure)
            assert all(b in BLOCKS for b in kept)


def test_bytes_behind_the_end_are_refused():
    with pytest.raises(DamagedFile, match="goes on behind its end"):
        Archive.from_bytes(PACKED + b"\0")
    found = recover(PACKED + b"\0")
    assert found.blocks == BLOCKS
    assert found.damage[1].startswith(f"bytes {16 + 48 + 166} to {len(PACKED)} hold no whole block")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(a_block, min_size=1, max_size=6), st.data())
def test_any_damage_gives_no_wrong_bytes(blocks, data):
    packed = bytearray(pack(HEADER, blocks))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(packed) - 1))
        length = data.draw(st.integers(1, 40))
        packed[at : at + length] = data.draw(st.binary(max_size=40))
        packed = packed or bytearray(1)
    packed = bytes(packed)
    assert all(found in blocks for found in recover(packed).blocks)
    with contextlib.suppress(DamagedFile):
        assert all(found is None or found in blocks for found in contents(packed))


def test_lost_ranges_are_named():
    data = bytearray(PACKED)
    data[5] ^= 128  # the header
    data[35] ^= 1  # the second block, at 34
    found = recover(bytes(data))
    assert found.header is None
    assert found.blocks == [BLOCKS[0], *BLOCKS[2:]]
    assert found.damage[0].startswith("this data: the header (bytes 0 to 15, version 1; this reads 1) is damaged")
    assert found.damage[1] == "bytes 34 to 46 hold no whole block"
    assert found.damage[2].startswith("bytes 230 to 251 hold no whole block; the index was there")
    assert len(found.damage) == 3


def test_recovery_follows_a_whole_index_past_blocks_in_a_content():
    inner = pack(OTHER, [block(7, b"inside")])
    blocks = [block(1, inner), block(2, b"outer")]
    data = bytearray(pack(HEADER, blocks))
    data[30] ^= 1
    assert recover(bytes(data)).blocks == blocks[1:]


def test_recovery_of_what_is_no_such_file(tmp_path):
    for data in (b"", b"\x89", PNG, bytes(5000)):
        found = recover(data)
        assert (found.header, found.blocks) == (None, [])
        assert found.damage
    with pytest.raises(ValueError, match="no file at"):
        recover(tmp_path / "missing")


def test_recovery_over_the_edges_of_chunks(monkeypatch):
    monkeypatch.setattr(recovery, "CHUNK", 64)
    monkeypatch.setattr(recovery, "STRIDE", 16)
    for shift in range(70):
        found = recover(bytes(shift) + PACKED[16:])
        assert found.blocks == BLOCKS


def test_the_check_of_a_claim_is_the_plain_crc():
    chance = random.Random(0)
    for length in (0, 1, 5, 255, 65_535, 65_536, 70_001, 200_000):
        tail = chance.randbytes(length)
        start = chance.randbytes(9)
        whole = zlib.crc32(start + tail)
        shifted = recovery._multiply(
            recovery._multiply(zlib.crc32(start), recovery._power(length & 0xFFFF)),
            recovery._power(length & ~0xFFFF),
        )
        assert shifted ^ zlib.crc32(tail) == whole


class Counting:
    """zlib whose CRCs count their bytes."""

    def __init__(self):
        self.num_bytes = 0

    def crc32(self, data, value=0):
        self.num_bytes += len(data)
        return zlib.crc32(data, value)


def hostile_claims(kind, size):
    if kind == "markers":
        return container.MARKER * (size // 4)
    claim = container.MARKER + struct.pack("<I", size // 2) + b"\1\1\1\1"  # overlapping, each half of the file
    if kind == "dense":
        claim = claim[:8]
    return claim * (size // len(claim))


@pytest.mark.parametrize(("kind", "size"), [("markers", 10_000_000), ("claims", 600_000), ("dense", 400_000)])
def test_the_work_of_recovery_is_linear(monkeypatch, kind, size):
    work = {}
    for num_bytes in (size // 4, size):
        data = hostile_claims(kind, num_bytes) + PACKED[16:]
        counting = Counting()
        products, reads = [0], [0]
        multiply, read = recovery._multiply, container.Memory.read

        def counted_multiply(a, b, products=products, multiply=multiply):
            products[0] += 1
            return multiply(a, b)

        def counted_read(self, offset, length, reads=reads, read=read):
            reads[0] += length
            return read(self, offset, length)

        with monkeypatch.context() as patch:
            patch.setattr(container, "zlib", counting)
            patch.setattr(recovery, "zlib", counting)
            patch.setattr(recovery, "_multiply", counted_multiply)
            patch.setattr(container.Memory, "read", counted_read)
            found = recover(data)
        assert found.blocks == BLOCKS
        num_claims = 0 if kind == "markers" else num_bytes // (8 if kind == "dense" else 12)
        bound = 3 * len(data) + 2 * recovery.STRIDE * num_claims + 10_000
        assert counting.num_bytes <= bound
        assert reads[0] <= bound + len(data)
        assert products[0] <= 2 * num_claims + 500
        work[num_bytes] = counting.num_bytes + reads[0] + products[0]
    assert work[size] <= 4.5 * work[size // 4]


# ---- what is something else, and hostile files with right checks


def with_header(version=1, mode=1):
    start = struct.pack("<4sBB8s", b"\x89VQ\n", version, mode, b"12345678")
    return start + struct.pack("<H", zlib.crc32(start) & 0xFFFF)


FRAMES = PACKED[16:34]  # the first block


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty: 0 bytes, expected at least 26; write it again"),
        (PNG, "no file of this codec, or its magic is damaged: it begins with 89 50 4e 47, expected 89 56 51 0a"),
        (PACKED[:3], "is cut short: 3 bytes, expected at least 26; copy it again"),
        (PACKED[:25], "is cut short: 25 bytes, expected at least 26"),
        (PACKED[:60], r"is cut short or goes on .* \(from 58\).* expected fa 5a; recover\(\) gets the blocks"),
        (sealed(with_header(version=2), b""), "is of version 2, this reads version 1; upgrade vqvae-priors"),
        (PACKED[:4] + b"\2" + PACKED[5:], r"the header \(bytes 0 to 15, version 2; this reads 1\) is damaged: its che"),
        (sealed(with_header(mode=3), b""), r"mode \(byte 5\) is 3, expected 0 \(LOSSLESS\), .*; upgrade vqvae-priors"),
        (PACKED[:-10] + b"\xff\xff\xff\xff" + PACKED[-6:], "claims an index of 4,294,967,295 bytes, at most 226 fit"),
        (PACKED[:-11] + b"\0" + PACKED[-10:], r"the index \(bytes 230 to 251\) is damaged: its CRC-32 is"),
        (sealed(with_header() + FRAMES, b"\0\6"), "the index of block 0 claims 0 images, expected 1 to 65,535"),
        (sealed(with_header() + FRAMES, b"\x80\x80\x04\6"), "claims 65,536 images, expected 1 to 65,535"),
        (sealed(with_header() + FRAMES, b"\3\0"), "block 0 claims 0 bytes of content, expected 1 to 6, which fit"),
        (sealed(with_header() + FRAMES, b"\3\7"), "block 0 claims 7 bytes of content, expected 1 to 6, which fit"),
        (sealed(with_header() + FRAMES, b"\3\xff\xff\xff\xff\x0f"), "4,294,967,295 bytes of content, expected 1 to 6,"),
        (sealed(with_header() + FRAMES, b"\3\5"), "blocks end at byte 33, expected 34, where the index starts"),
        (sealed(with_header() + FRAMES, b""), "blocks end at byte 16, expected 34, where the index starts"),
        (
            sealed(with_header() + FRAMES, b"\3\6\3\6"),
            "the index of block 1 claims 6 bytes of content, expected 1 to -12",
        ),
        (sealed(with_header() + FRAMES, b"\3"), "the index of block 0, got nothing at byte 1, expected a varint"),
        (
            sealed(with_header() + FRAMES, b"\x83\0\6"),
            "the index of block 0, got 83 00 06 at byte 0, expected a varint",
        ),
        (sealed(with_header() + FRAMES + b"\0", b"\3\6"), "blocks end at byte 34, expected 35, where the index starts"),
    ],
)
def test_files_that_are_none_say_why(tmp_path, data, message):
    with pytest.raises(DamagedFile, match=message):
        Archive.from_bytes(data)
    (tmp_path / "a.vq").write_bytes(data)
    with pytest.raises(DamagedFile, match=message) as caught:
        Archive.open(tmp_path / "a.vq")
    assert str(tmp_path / "a.vq") in str(caught.value)


@pytest.mark.parametrize(
    ("frame", "index", "message"),
    [
        (b"\0" + FRAMES[1:], b"\3\6", r"block 0 \(bytes 16 to 33\) begins with 00 42 4b fa, expected b5 42 4b fa"),
        (FRAMES[:4] + b"\7" + FRAMES[5:], b"\3\6", "claims 7 bytes of content, the index says 6"),
        (FRAMES[:-1] + b"?", b"\3\6", r"block 0 \(bytes 16 to 33\) is damaged: its CRC-32 is .*; recover"),
        (FRAMES, b"\4\6", "the content of block 0 says 3 images, the index says 4"),
    ],
)
def test_contents_that_do_not_fit_the_index_say_why(frame, index, message):
    archive = Archive.from_bytes(sealed(with_header() + frame, index))
    with pytest.raises(DamagedFile, match=message):
        archive.content(0)


def test_a_number_of_images_that_contradicts_the_index_is_unknown():
    found = recover(sealed(with_header() + FRAMES, b"\4\6"))
    assert found.blocks == [(None, BLOCKS[0][1])]
    assert found.damage == ["this data: the content of block 0 says 3 images, the index says 4"]


def test_a_block_without_a_number_of_images_is_unknown():
    head = container.MARKER + struct.pack("<I", 2)
    frame = head + struct.pack("<I", zlib.crc32(head + b"\0x")) + b"\0x"
    data = sealed(with_header() + frame, b"\3\2")
    with pytest.raises(DamagedFile, match="the content of block 0 says no number of images, the index says 3"):
        Archive.from_bytes(data).content(0)
    assert recover(data).blocks == [(None, b"\0x")]
    found = recover(data[:-1])
    assert found.blocks == [(None, b"\0x")]
    assert found.damage[1] == "the block at byte 16 does not say its number of images"


# ---- files: what is read, and by whom


def test_only_the_block_asked_for_is_read(tmp_path, monkeypatch):
    path = tmp_path / "sparse.vq"
    hole = 3 << 30
    first, last = PACKED[16:34], PACKED[34:47]
    index = b"\3\6" + b"\1" + varint(hole) + b"\1\1"
    start = with_header()
    end = len(start) + len(first) + 12 + hole + len(last)
    with open(path, "wb") as file:
        file.write(start + first + container.MARKER + struct.pack("<II", hole, 0))
        file.seek(end - len(last))
        file.write(last + sealed(start, index)[16:])
    amounts = []
    pread = os.pread

    def counted(handle, length, offset):
        amounts.append(length)
        return pread(handle, length, offset)

    monkeypatch.setattr(os, "pread", counted)
    with Archive.open(path) as archive:
        assert archive.size > hole
        assert sum(amounts) == 16 + 10 + len(index) + 16
        for i, num_bytes in ((0, 18), (2, 13)):
            amounts.clear()
            assert archive.content(i) == BLOCKS[i // 2][1]
            assert sum(amounts) == num_bytes


def test_pickled_archives_open_the_same_file(tmp_path, monkeypatch):
    write(tmp_path / "a.vq", HEADER, BLOCKS)
    monkeypatch.chdir(tmp_path)
    with Archive.open("a.vq") as archive:
        pickled = pickle.dumps(archive)
    assert len(pickled) < 500
    monkeypatch.chdir("/")
    with pickle.loads(pickled) as again:
        assert again.header == HEADER
        assert again.content(2) == BLOCKS[2][1]
    append(tmp_path / "a.vq", HEADER, BLOCKS)
    with pytest.raises(ValueError, match="changed after it was opened elsewhere"):
        pickle.loads(pickled)
    with pickle.loads(pickle.dumps(Archive.from_bytes(PACKED))) as again:
        assert again.content(2) == BLOCKS[2][1]


def test_pickled_errors_say_the_same():
    with pytest.raises(DamagedFile) as caught:
        Archive.from_bytes(PNG)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_threads_share_an_archive(tmp_path):
    write(tmp_path / "a.vq", HEADER, BLOCKS)
    wrong = []
    with Archive.open(tmp_path / "a.vq") as archive:

        def read(seed):
            chance = random.Random(seed)
            for _ in range(300):
                i = chance.randrange(4)
                if archive.content(i) != BLOCKS[i][1]:
                    wrong.append(i)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize("i", [-1, 4])
def test_blocks_that_are_not_there(i):
    with pytest.raises(ValueError, match=f"got block {i}, expected 0 to 3: there are 4"):
        Archive.from_bytes(PACKED).content(i)


def test_closed_archives_say_so_and_leave_no_handle(tmp_path):
    write(tmp_path / "a.vq", HEADER, BLOCKS)
    before = len(os.listdir("/proc/self/fd"))
    archive = Archive.open(tmp_path / "a.vq")
    assert len(os.listdir("/proc/self/fd")) == before + 1
    archive.close()
    archive.close()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ValueError, match="this archive is closed; open it again"):
        archive.content(0)
    (tmp_path / "a.vq").write_bytes(PNG)
    with pytest.raises(DamagedFile):
        Archive.open(tmp_path / "a.vq")
    assert len(os.listdir("/proc/self/fd")) == before


def test_files_that_are_missing_or_shrink(tmp_path):
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(ValueError, match="no file at"):
            Archive.open(path)
    write(tmp_path / "a.vq", HEADER, BLOCKS)
    with Archive.open(tmp_path / "a.vq") as archive:
        os.truncate(tmp_path / "a.vq", 100)
        assert archive.content(1) == BLOCKS[1][1]
        with pytest.raises(DamagedFile, match="ends at byte 100 now, it had 252 when it was opened"):
            archive.content(2)


def test_a_disk_that_fails_says_where(tmp_path, monkeypatch):
    write(tmp_path / "a.vq", HEADER, BLOCKS)

    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    with Archive.open(tmp_path / "a.vq") as archive:
        monkeypatch.setattr(os, "pread", broken)
        with pytest.raises(DamagedFile, match="byte 16 could not be read: Input/output error"):
            archive.content(0)
