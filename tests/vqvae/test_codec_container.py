"""The codec's file: its layout byte by byte, and that no damage ever gives wrong bytes."""

import errno
import io
import os
import pickle
import random
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqvae.codec import archive, container, recovery
from vqvae.codec.archive import Archive, append, write
from vqvae.codec.container import DamagedFile, Header, Mode, pack, read_varint, varint
from vqvae.codec.recovery import recover

HEADER = Header(mode=Mode.LOSSY, fingerprint=b"12345678")
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
    found = []
    with Archive.from_bytes(data) as archive:
        for i, each in enumerate(archive.blocks):
            try:
                found.append((each.num_images, archive.content(i)))
            except DamagedFile:
                found.append(None)
    return found


def spans(blocks):
    """(first byte, byte behind the last) of each block."""
    at = 16
    for _, content in blocks:
        yield at, at + 12 + len(content)
        at += 12 + len(content)


def test_the_layout_is_as_documented():
    start = bytes.fromhex("8956510a 01 01") + b"12345678"
    start += struct.pack("<H", zlib.crc32(start) & 0xFFFF)
    data = start
    for _, content in BLOCKS:
        head = bytes.fromhex("b5424bfa") + struct.pack("<I", len(content))
        data += head + struct.pack("<I", zlib.crc32(head + content)) + content
    index = b"\x03\x06" + b"\x01\x01" + b"\xc8\x01\x98\x01" + b"\xff\xff\x03\x07"
    assert sealed(data, index) == PACKED


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 2**14, 2**21 - 1, 2**28, 2**32 - 1])
def test_varints_round_trip(value):
    assert read_varint(b"\x80" + varint(value) + b"\x80", 1) == (value, 1 + len(varint(value)))


@pytest.mark.parametrize("spelling", ["", "80", "8000", "8080808000", "ffffffff1f", "ffffffffff01"])
def test_other_spellings_of_varints_are_refused(spelling):
    with pytest.raises(DamagedFile, match=r"expected a varint below 2\^32"):
        read_varint(bytes.fromhex(spelling))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(a_header, st.lists(a_block, max_size=8))
def test_what_is_packed_is_read(header, blocks):
    data = pack(header, blocks)
    with Archive.from_bytes(data) as archive:
        assert archive.header == header
        assert archive.size == len(data)
        assert archive.num_images == sum(num for num, _ in blocks)
        assert [data[b.offset : b.offset + b.length] for b in archive.blocks] == [content for _, content in blocks]
    assert contents(data) == blocks
    found = recover(data)
    assert (found.header, found.blocks, found.damage) == (header, blocks, [])


def test_every_image_is_located():
    counts = [3, 1, 1, 9, 2]
    with Archive.from_bytes(pack(HEADER, [block(n, b"x") for n in counts])) as archive:
        expected = [(i, j) for i, n in enumerate(counts) for j in range(n)]
        assert [archive.locate(image) for image in range(archive.num_images)] == expected
        for image in (-1, 16):
            with pytest.raises(ValueError, match=f"got image {image}, expected 0 to 15"):
                archive.locate(image)
        for i in (-1, 5):
            with pytest.raises(ValueError, match=f"got block {i}, expected 0 to 4"):
                archive.content(i)


@pytest.mark.parametrize("num", [0, 2, 4])
def test_appending_gives_the_bytes_of_packing_all_and_keeps_rights_and_links(tmp_path, monkeypatch, num):
    monkeypatch.setattr(archive, "CHUNK", 7)
    write(tmp_path / "a.vq", HEADER, BLOCKS[:num])
    (tmp_path / "a.vq").chmod(0o600)
    (tmp_path / "link.vq").symlink_to("a.vq")
    append(tmp_path / "link.vq", HEADER, iter(BLOCKS[num:]))
    assert (tmp_path / "link.vq").is_symlink()
    assert (tmp_path / "a.vq").read_bytes() == PACKED
    assert (tmp_path / "a.vq").stat().st_mode & 0o777 == 0o600


class Long(bytes):
    def __len__(self):
        return 2**32


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([(0, b"\0")], "a block of 0 images, expected 1 to 65,535"),
        ([(65_536, varint(65_536))], "a block of 65536 images, expected 1 to 65,535"),
        ([(1, b"")], "got 0 bytes of content, expected 1 to 4,294,967,295"),
        ([(1, Long(b"\1"))], "got 4,294,967,296 bytes of content, expected 1 to 4,294,967,295"),
        ([(200, b"\xc8")], "a block of 200 images whose content begins with c8, expected .* c8 01$"),
    ],
)
def test_blocks_that_are_none_are_refused(tmp_path, blocks, message):
    for act in (lambda: pack(HEADER, blocks), lambda: write(tmp_path / "a.vq", HEADER, blocks)):
        with pytest.raises(ValueError, match=message):
            act()
    assert os.listdir(tmp_path) == []


def test_what_does_not_fit_is_refused(monkeypatch):
    for value in (-1, 2**32):
        with pytest.raises(ValueError, match=f"got {value}, expected a number from 0"):
            varint(value)
    for fingerprint in (b"", b"123456789"):
        with pytest.raises(ValueError, match=r"fingerprint .*, expected 8 bytes"):
            Header(mode=Mode.LOSSY, fingerprint=fingerprint)
    monkeypatch.setattr(container, "MAX_CONTENT", 8)
    assert pack(HEADER, [block(1, b"")] * 4)
    with pytest.raises(ValueError, match="the index exceeds 8 bytes"):
        pack(HEADER, [block(1, b"")] * 5)


class Full(io.FileIO):
    """On a disk that has room for 100 bytes."""

    def write(self, data):
        if self.tell() + len(data) > 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def stop(*_):
    raise KeyboardInterrupt


def cut_short(blocks):
    yield from blocks
    raise KeyboardInterrupt


@pytest.mark.parametrize("act", [write, append])
@pytest.mark.parametrize("cut", ["blocks", "replace", "fsync", "disk"])
def test_a_write_that_is_cut_leaves_the_old_file(tmp_path, monkeypatch, act, cut):
    write(tmp_path / "a.vq", HEADER, BLOCKS)
    new, error, message = BLOCKS, KeyboardInterrupt, None
    with monkeypatch.context() as patch:
        if cut == "blocks":
            new = cut_short(BLOCKS)
        elif cut == "disk":
            patch.setattr(archive, "open", Full, raising=False)
            error, message = ValueError, r"no space is left .* untouched"
        else:
            patch.setattr(os, cut, stop)
        with pytest.raises(error, match=message):
            act(tmp_path / "a.vq", HEADER, new)
    assert (tmp_path / "a.vq").read_bytes() == PACKED
    assert os.listdir(tmp_path) == ["a.vq"]


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
        hit = [start <= at < end for start, end in reaches]
        left = [None if lost else b for b, lost in zip(BLOCKS, hit, strict=True)]
        for bit in range(8):
            data = PACKED[:at] + bytes([PACKED[at] ^ 1 << bit]) + PACKED[at + 1 :]
            if any(hit):
                assert contents(data) == left
            else:
                with pytest.raises(DamagedFile):
                    Archive.from_bytes(data)
            found = recover(data)
            assert found.blocks == [b for b in left if b is not None]
            assert found.header == (None if at < 16 else HEADER)
            assert len(found.damage) == (2 if reaches[-1][1] <= at < len(PACKED) - 10 else 1)


def test_lost_ranges_are_named():
    data = bytearray(PACKED)
    data[5] ^= 128  # the header
    data[35] ^= 1  # the second block, at 34
    found = recover(bytes(data))
    assert found.header is None
    assert found.blocks == [BLOCKS[0], *BLOCKS[2:]]
    first, second, third = found.damage
    assert "the header (bytes 0 to 15, version 1; this reads 1) is damaged" in first
    assert second == "bytes 34 to 46 hold no whole block"
    assert third.startswith("bytes 230 to 251 hold no whole block; the index was there")


def test_recovery_follows_a_whole_index_past_blocks_in_a_content():
    other = Header(mode=Mode.LOSSY, fingerprint=b"12345679")
    blocks = [block(1, pack(other, [block(7, b"inside")])), block(2, b"outer")]
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


def test_recovery_without_an_index(monkeypatch):
    """Of long blocks; and of any, over the edges of what is read at once."""
    chance = random.Random(0)
    blocks = [block(1, chance.randbytes(length)) for length in (0, 65_534, 65_535, 70_001, 200_000)]
    assert recover(b"?" * 9 + pack(HEADER, blocks)[16:-1]).blocks == blocks
    monkeypatch.setattr(recovery, "CHUNK", 64)
    monkeypatch.setattr(recovery, "STRIDE", 16)
    for shift in range(70):
        assert recover(bytes(shift) + PACKED[16:]).blocks == BLOCKS


class Counting:
    """zlib whose CRCs count their bytes."""

    num_bytes = 0

    def crc32(self, data, value=0):
        self.num_bytes += len(data)
        return zlib.crc32(data, value)


@pytest.mark.parametrize(
    ("claim", "size"),
    [
        (container.MARKER, 4_000_000),
        (container.MARKER + struct.pack("<I", 150_000) + b"\1\1\1\1", 300_000),
        (container.MARKER + struct.pack("<I", 100_000), 200_000),
    ],
)
def test_the_work_of_recovery_is_linear(monkeypatch, claim, size):
    """However many long claims overlap."""
    counting = Counting()
    monkeypatch.setattr(archive, "zlib", counting)
    monkeypatch.setattr(recovery, "zlib", counting)
    num_claims = size // len(claim)
    assert recover(claim * num_claims + PACKED[16:]).blocks == BLOCKS
    assert counting.num_bytes <= 3 * size + 2 * recovery.STRIDE * num_claims * (len(claim) > 4) + 10_000


def with_header(version=1, mode=1):
    start = struct.pack("<4sBB8s", b"\x89VQ\n", version, mode, b"12345678")
    return start + struct.pack("<H", zlib.crc32(start) & 0xFFFF)


FRAME = PACKED[16:34]  # the first block


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty: 0 bytes, expected at least 26"),
        (PNG, "magic is damaged: it begins with 89 50 4e 47, expected 89 56 51 0a"),
        (PACKED[:25], "is cut short: 25 bytes, expected at least 26"),
        (PACKED + b"\0", "goes on behind its end"),
        (sealed(with_header(version=2), b""), "is of version 2, this reads version 1; upgrade"),
        (PACKED[:4] + b"\2" + PACKED[5:], r"the header \(bytes 0 to 15, version 2; this reads 1\) is damaged"),
        (sealed(with_header(mode=3), b""), r"mode \(byte 5\) is 3, expected 0 \(LOSSLESS\), .*; upgrade"),
        (PACKED[:-10] + b"\xff\xff\xff\xff" + PACKED[-6:], "an index of 4,294,967,295 bytes, at most 226 fit"),
        (PACKED[:-11] + b"\0" + PACKED[-10:], r"the index \(bytes 230 to 251\) is damaged: its CRC-32 is"),
        (sealed(with_header() + FRAME, b"\0\6"), "block 0 claims 0 images, expected 1 to 65,535"),
        (sealed(with_header() + FRAME, b"\3\7"), "block 0 claims 7 bytes of content, expected 1 to 6"),
        (sealed(with_header() + FRAME, b"\3\5"), "end at byte 33, expected 34"),
        (sealed(with_header() + FRAME, b"\3"), "block 0, got nothing at byte 1, expected a varint"),
    ],
)
def test_files_that_are_none_say_why(tmp_path, data, message):
    (tmp_path / "a.vq").write_bytes(data)
    for open_it, name in ((lambda: Archive.from_bytes(data), ""), (lambda: Archive.open(tmp_path / "a.vq"), "a.vq")):
        with pytest.raises(DamagedFile, match=message) as caught:
            open_it()
        assert name in str(caught.value)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(("content", "says"), [(BLOCKS[0][1], "3 images"), (b"\0x", "no number of images")])
def test_a_number_of_images_that_contradicts_the_index_is_unknown(content, says):
    head = container.MARKER + struct.pack("<I", len(content))
    frame = head + struct.pack("<I", zlib.crc32(head + content)) + content
    data = sealed(with_header() + frame, varint(4) + varint(len(content)))
    with pytest.raises(DamagedFile, match=f"the content of block 0 says {says}, the index says 4"):
        Archive.from_bytes(data).content(0)
    found = recover(data)
    assert found.blocks == [(None, content)]
    assert found.damage == [f"this data: the content of block 0 says {says}, the index says 4"]
    # Without an index the content's own word is all there is.
    found = recover(data[:-1])
    assert found.blocks == [(container.count_images(content), content)]
    assert ("the block at byte 16 does not say its number of images" in found.damage) == (content == b"\0x")


def test_only_the_block_asked_for_is_read(tmp_path, monkeypatch):
    write(tmp_path / "a.vq", HEADER, BLOCKS)
    amounts, pread = [], os.pread

    def counted(handle, length, offset):
        amounts.append(length)
        return pread(handle, length, offset)

    monkeypatch.setattr(os, "pread", counted)
    with Archive.open(tmp_path / "a.vq") as archive:
        assert sum(amounts) == 16 + 10 + 12 + 16  # the index has 12 bytes, whose check covers the header
        for i, (_, content) in enumerate(BLOCKS):
            amounts.clear()
            assert archive.content(i) == content
            assert sum(amounts) == 12 + len(content)


def test_pickled_archives_open_the_same_file(tmp_path, monkeypatch):
    write(tmp_path / "a.vq", HEADER, BLOCKS)
    monkeypatch.chdir(tmp_path)
    with Archive.open("a.vq") as archive:
        pickled = pickle.dumps(archive)
    monkeypatch.chdir("/")
    for again in (pickle.loads(pickled), pickle.loads(pickle.dumps(Archive.from_bytes(PACKED)))):
        with again:
            assert again.header == HEADER
            assert again.content(2) == BLOCKS[2][1]
    append(tmp_path / "a.vq", HEADER, BLOCKS)
    with pytest.raises(ValueError, match="changed after it was opened elsewhere"):
        pickle.loads(pickled)


def test_closed_archives_say_so_and_leave_no_handle(tmp_path):
    write(tmp_path / "a.vq", HEADER, BLOCKS)
    before = len(os.listdir("/proc/self/fd"))
    archive = Archive.open(tmp_path / "a.vq")
    assert len(os.listdir("/proc/self/fd")) == before + 1
    archive.close()
    archive.close()
    with pytest.raises(ValueError, match="archive is closed"):
        archive.content(0)
    (tmp_path / "a.vq").write_bytes(PNG)
    with pytest.raises(DamagedFile):
        Archive.open(tmp_path / "a.vq")
    assert len(os.listdir("/proc/self/fd")) == before


def test_files_that_are_missing_or_shrink_or_fail(tmp_path, monkeypatch):
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(ValueError, match="no file at"):
            Archive.open(path)
    write(tmp_path / "a.vq", HEADER, BLOCKS)
    with Archive.open(tmp_path / "a.vq") as archive:
        os.truncate(tmp_path / "a.vq", 100)
        assert archive.content(1) == BLOCKS[1][1]
        with pytest.raises(DamagedFile, match="ends at byte 100 now, it had 252"):
            archive.content(2)

        def broken(*_):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "pread", broken)
        with pytest.raises(DamagedFile, match="byte 16 could not be read: Input/output error"):
            archive.content(0)
