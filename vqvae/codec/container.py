r"""The file of the image codec: a header, blocks of images, an index, a trailer.

A block is a whole number of images coded together; its content is opaque here but for one thing: it begins with its
number of images as a varint. So a block that lost its index still says how many images it holds, and the two are
checked against each other. Every integer is little-endian. A varint is unsigned LEB128 below 2^32, in as few bytes
as the value needs; a longer spelling is refused, so a file has one spelling only.

    header       0  magic            89 56 51 0A ("\x89VQ\n": no text, and a changed line end shows)
    16 bytes     4  version          u8, 1
                 5  mode             u8, see `Mode`
                 6  fingerprint      8 bytes, which model and settings wrote the file
                14  check            u16, low half of the CRC-32 of the 14 bytes before

    block        0  marker           B5 42 4B FA
    12 bytes     4  length           u32, bytes of the content, at least 1
    and content  8  check            u32, CRC-32 of marker, length and content
                12  content

    index           for each block:  varint number of images (1 to 65,535), varint length of the content

    trailer      0  index length     u32
    10 bytes     4  check            u32, CRC-32 of header, index and index length
                 8  end magic        FA 5A

The four parts fill the file: nothing lies between, before or after. A file of one image whose content has n bytes has
16 + 12 + (1 + v) + 10 = 39 + v more, v being the bytes of n as a varint: 40 below 128 bytes, 41 below 16 KiB, 42
below 2 MiB, never above 44. Each further block costs 12 bytes and its index entry, 2 to 8 bytes.

Every later version keeps the 16 bytes of the header and its check, so an old reader can tell "newer" from "damaged".
"""

import bisect
import contextlib
import enum
import itertools
import shutil
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from safefolder.files import replacing
from safefolder.locks import one_writer
from vqvae.codec.storage import RECOVER, DamagedFile, FileOnDisk, Memory, Storage, file_to_write, shown

__all__ = [
    "RECOVER",
    "Archive",
    "Block",
    "DamagedFile",
    "Destination",
    "Header",
    "Mode",
    "append",
    "destination",
    "pack",
    "read_varint",
    "varint",
    "write",
]

MAGIC = b"\x89VQ\n"
MARKER = b"\xb5BK\xfa"  # read as a length it is over 4 GB, so markers in a row are no blocks
END_MAGIC = b"\xfaZ"
VERSION = 1
FINGERPRINT_BYTES = 8
MAX_IMAGES = 65_535  # of a block
MAX_CONTENT = 2**32 - 1  # bytes of a block's content, and of the index

HEADER = struct.Struct("<4sBB8sH")
BLOCK = struct.Struct("<4sII")
TRAILER = struct.Struct("<II2s")
CHUNK = 1 << 20


class Mode(enum.IntEnum):
    """What the blocks of a file hold: the images themselves, an approximation, or images coded with bits back."""

    LOSSLESS = 0
    LOSSY = 1
    BITS_BACK = 2


@dataclass(frozen=True, kw_only=True)
class Header:
    """What all blocks of a file share. `fingerprint` is 8 bytes that tell which model reads them."""

    mode: Mode
    fingerprint: bytes

    def __post_init__(self) -> None:
        object.__setattr__(self, "mode", Mode(self.mode))
        if not isinstance(self.fingerprint, bytes) or len(self.fingerprint) != FINGERPRINT_BYTES:
            raise ValueError(f"got the fingerprint {self.fingerprint!r}, expected {FINGERPRINT_BYTES} bytes")


class Block(NamedTuple):
    """One line of the index: number of images, where the content lies in the file, bytes of the content."""

    num_images: int
    offset: int
    length: int


def varint(value: int) -> bytes:
    """Spell 0 <= value < 2^32 in one to five bytes."""
    if not 0 <= value < 2**32:
        raise ValueError(f"got {value}, expected a number from 0 to 2^32 - 1")
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(data: bytes, offset: int = 0) -> tuple[int, int]:
    """Read the varint at `offset`: (value, offset behind it).

    Raises:
        DamagedFile: it is cut short, longer than its value needs, or at least 2^32.
    """
    value = 0
    for i, byte in enumerate(data[offset : offset + 5]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            if (byte == 0 and i > 0) or value >= 2**32:
                break
            return value, offset + i + 1
    got = data[offset : offset + 5].hex(" ") or "nothing"
    raise DamagedFile(f"got {got} at byte {offset}, expected a varint below 2^32 in as few bytes as it needs")


# ------------------------------------------------------------------------------------------------------------ writing


def count_images(content: bytes) -> int | None:
    """The number of images that the content of a block says it has."""
    try:
        count, _ = read_varint(content)
    except DamagedFile:
        return None
    return count if 1 <= count <= MAX_IMAGES else None


def _spell_header(header: Header) -> bytes:
    # The check is the structure's last two bytes: taken over the rest, then written in.
    start = HEADER.pack(MAGIC, VERSION, header.mode, header.fingerprint, 0)[:-2]
    return start + struct.pack("<H", zlib.crc32(start) & 0xFFFF)


def _spell_block(num_images: int, content: bytes) -> bytes:
    """The 12 bytes of a block before its content."""
    if not 1 <= num_images <= MAX_IMAGES:
        raise ValueError(f"got a block of {num_images} images, expected 1 to {MAX_IMAGES:,}; split or drop it")
    if not 1 <= len(content) <= MAX_CONTENT:
        raise ValueError(
            f"got {len(content):,} bytes of content, expected 1 to {MAX_CONTENT:,}; code fewer images a block"
        )
    if count_images(content) != num_images:
        raise ValueError(
            f"got a block of {num_images} images whose content begins with {content[:3].hex(' ')}, "
            f"expected it to begin with its number of images, {varint(num_images).hex(' ')}"
        )
    start = MARKER + struct.pack("<I", len(content))
    return start + struct.pack("<I", zlib.crc32(content, zlib.crc32(start)))


def _spell_rest(header: bytes, index: bytearray, blocks: Iterable[tuple[int, bytes]]) -> Iterator[bytes]:
    """Blocks, then the index that `index` begins, then the trailer, in parts to be written one after another."""
    for num_images, content in blocks:
        yield _spell_block(num_images, content)
        yield content
        index += varint(num_images) + varint(len(content))
        if len(index) > MAX_CONTENT:
            raise ValueError(f"the index exceeds {MAX_CONTENT:,} bytes; put fewer blocks into a file")
    length = struct.pack("<I", len(index))
    check = zlib.crc32(length, zlib.crc32(index, zlib.crc32(header)))
    yield bytes(index)
    yield TRAILER.pack(len(index), check, END_MAGIC)


def _spell(header: Header, blocks: Iterable[tuple[int, bytes]]) -> Iterator[bytes]:
    start = _spell_header(header)
    yield start
    yield from _spell_rest(start, bytearray(), blocks)


def pack(header: Header, blocks: Iterable[tuple[int, bytes]]) -> bytes:
    """The bytes of a file of `blocks`, each (number of images, content); this begins with the number as a varint."""
    return b"".join(_spell(header, blocks))


class Destination:
    """A place for a file that nobody else writes; made by `destination`."""

    def __init__(self, path: str | Path, target: Path):
        self._path, self._target = path, target

    def exists(self) -> bool:
        return self._target.exists()

    def open(self) -> "Archive":
        """What is there. Errors as `Archive.open`."""
        return Archive.open(self._target)

    def write(self, header: Header, blocks: Iterable[tuple[int, bytes]]) -> None:
        """As the function `write`."""
        with replacing(self._target) as scratch, open(scratch, "wb") as file:
            file.writelines(_spell(header, blocks))

    def append(self, header: Header, blocks: Iterable[tuple[int, bytes]]) -> None:
        """As the function `append`."""
        with self.open() as old:
            if old.header != header:
                raise ValueError(
                    f"{shown(self._path)} is of {_describe(old.header)}, got blocks of {_describe(header)}; "
                    "write them to a file of their own"
                )
            with replacing(self._target) as scratch, open(scratch, "wb") as file:
                for offset in range(0, old._index_offset, CHUNK):
                    file.write(old._source.read(offset, min(CHUNK, old._index_offset - offset)))
                index = old._source.read(old._index_offset, old.size - TRAILER.size - old._index_offset)
                file.writelines(_spell_rest(_spell_header(header), bytearray(index), blocks))
                shutil.copymode(self._target, scratch)


@contextlib.contextmanager
def destination(path: str | Path) -> Iterator[Destination]:
    """Be the only one who writes a file until the block is left: what is there stays as it is found.

    Where the path is a link, what it leads to is written, and it stays a link.

    Raises:
        ValueError: another process or thread writes the file; something else than a file is there, or none can be.
    """
    target = file_to_write(path)
    with one_writer(path):
        yield Destination(path, target)


def write(path: str | Path, header: Header, blocks: Iterable[tuple[int, bytes]]) -> None:
    """Write a file of `blocks` whole or not at all; one block and the index are in memory.

    Raises:
        ValueError: another process or thread writes the file, or the place cannot be written, before the first block is
            asked for; a block is no block, or the disk is full. An old file is untouched.
    """
    with destination(path) as place:
        place.write(header, blocks)


def append(path: str | Path, header: Header, blocks: Iterable[tuple[int, bytes]]) -> None:
    """Add blocks to a file of the same header, whole or not at all; one block and the index are in memory.

    The new file is written beside the old one and takes its place: it is byte for byte what `write` of all blocks
    gives, and a reader that has the old file open keeps the old one. Old blocks are copied as they are, so a damaged
    one stays a damaged one and shows when it is read.

    Raises:
        ValueError: the file is missing, damaged or of another header, before the first block is asked for; or as
            `write`.
    """
    with destination(path) as place:
        place.append(header, blocks)


def _describe(header: Header) -> str:
    return f"mode {header.mode.name} and fingerprint {header.fingerprint.hex()}"


# ------------------------------------------------------------------------------------------------------------ reading


def read_header(source: Storage) -> Header:
    name, start = source.name, source.read(0, min(HEADER.size, source.size))
    smallest = HEADER.size + TRAILER.size
    if not start:
        raise DamagedFile(f"{name} is empty: 0 bytes, expected at least {smallest}", "write it again")
    if start[:4] != MAGIC[: len(start)]:
        raise DamagedFile(
            f"{name} is no file of this codec, or its magic is damaged: it begins with {start[:4].hex(' ')}, "
            f"expected {MAGIC.hex(' ')}"
        )
    if source.size < smallest:
        raise DamagedFile(f"{name} is cut short: {source.size} bytes, expected at least {smallest}", "copy it again")
    _, version, mode, fingerprint, check = HEADER.unpack(start)
    if check != (expected := zlib.crc32(start[:-2]) & 0xFFFF):
        raise DamagedFile(
            f"{name}: the header (bytes 0 to 15, version {version}; this reads {VERSION}) is damaged: "
            f"its check is {check:04x}, expected {expected:04x}"
        )
    if version != VERSION:
        raise DamagedFile(f"{name} is of version {version}, this reads version {VERSION}", "upgrade vqvae-priors")
    if mode not in Mode.__members__.values():
        modes = ", ".join(f"{m.value} ({m.name})" for m in Mode)
        raise DamagedFile(f"{name}: the header's mode (byte 5) is {mode}, expected {modes}", "upgrade vqvae-priors")
    return Header(mode=Mode(mode), fingerprint=fingerprint)


def _read_index(source: Storage) -> tuple[list[Block], int, bytes]:
    """The blocks, where the index starts, and the trailer. The blocks tile what lies between header and index."""
    name, end = source.name, source.size - TRAILER.size
    trailer = source.read(end, TRAILER.size)
    length, check, magic = TRAILER.unpack(trailer)
    if magic != END_MAGIC:
        raise DamagedFile(
            f"{name} is cut short or goes on behind its end: its last bytes (from {source.size - 2}) are "
            f"{magic.hex(' ')}, expected {END_MAGIC.hex(' ')}"
        )
    if length > (most := end - HEADER.size):
        raise DamagedFile(f"{name}: the trailer (byte {end}) claims an index of {length:,} bytes, at most {most:,} fit")
    start = end - length
    index = source.read(start, length)
    expected = zlib.crc32(trailer[:4], zlib.crc32(index, zlib.crc32(source.read(0, HEADER.size))))
    if check != expected:
        raise DamagedFile(
            f"{name}: the index (bytes {start} to {source.size - 1}) is damaged: its CRC-32 is {expected:08x}, "
            f"expected {check:08x}"
        )
    blocks, offset, at = [], HEADER.size, 0
    while at < length:
        where = f"{name}: the index of block {len(blocks)}"
        try:
            num_images, at = read_varint(index, at)
            size, at = read_varint(index, at)
        except DamagedFile as error:
            raise DamagedFile(f"{where}, {error.args[0]} of the index") from error
        if not 1 <= num_images <= MAX_IMAGES:
            raise DamagedFile(f"{where} claims {num_images:,} images, expected 1 to {MAX_IMAGES:,}")
        most = start - offset - BLOCK.size
        if not 1 <= size <= most:
            raise DamagedFile(f"{where} claims {size:,} bytes of content, expected 1 to {most:,}, which fit")
        blocks.append(Block(num_images, offset + BLOCK.size, size))
        offset += BLOCK.size + size
    if offset != start:
        raise DamagedFile(f"{name}: the index's blocks end at byte {offset}, expected {start}, where the index starts")
    return blocks, start, trailer


class Archive:
    """A file of blocks, open for reading; made by `Archive.open` or `Archive.from_bytes`.

    Opening checks the header, the index, and that the blocks fill the file. A block is read and checked when asked
    for, so a file larger than memory is no matter. Threads and forked processes may share one; one that was opened
    by its path can be pickled, and is opened again where it is unpickled, if the file there is still the same.

    Attributes: header, blocks, num_images, size (bytes of the file).

    Raises:
        DamagedFile: the file is empty, cut short, newer, damaged or something else.
        ValueError: there is no such file, or it may not be read.
    """

    def __init__(self, source: Storage):
        self._source = source
        self._closed = False
        self.size = source.size
        self.header = read_header(source)
        blocks, self._index_offset, self._trailer = _read_index(source)
        self.blocks = tuple(blocks)
        self._ends = list(itertools.accumulate(block.num_images for block in blocks))
        self.num_images = self._ends[-1] if blocks else 0

    @classmethod
    def from_bytes(cls, data: bytes) -> "Archive":
        return cls(Memory(data))

    @classmethod
    def open(cls, path: str | Path) -> "Archive":
        source = FileOnDisk(path)
        try:
            return cls(source)
        except BaseException:
            source.close()
            raise

    def content(self, i: int) -> bytes:
        """The content of block i, for which nothing else is read.

        Raises:
            DamagedFile: its marker, length, CRC-32 or number of images is not as it must be.
            ValueError: there is no block i, or the archive is closed.
        """
        content = self._checked(i)
        if (got := count_images(content)) != self.blocks[i].num_images:
            raise DamagedFile(self._miscounted(i, got))
        return content

    def _checked(self, i: int) -> bytes:
        if self._closed:
            raise ValueError("this archive is closed; open it again")
        if not 0 <= i < len(self.blocks):
            raise ValueError(f"got block {i}, expected 0 to {len(self.blocks) - 1}: there are {len(self.blocks)}")
        _, offset, length = self.blocks[i]
        data = self._source.read(offset - BLOCK.size, BLOCK.size + length)
        marker, claimed, check = BLOCK.unpack_from(data)
        content = data[BLOCK.size :]
        where = f"{self._source.name}: block {i} (bytes {offset - BLOCK.size} to {offset + length - 1})"
        if marker != MARKER:
            raise DamagedFile(f"{where} begins with {marker.hex(' ')}, expected {MARKER.hex(' ')}")
        if claimed != length:
            raise DamagedFile(f"{where} claims {claimed:,} bytes of content, the index says {length:,}")
        if check != (got := zlib.crc32(content, zlib.crc32(data[:8]))):
            raise DamagedFile(f"{where} is damaged: its CRC-32 is {got:08x}, expected {check:08x}")
        return content

    def _miscounted(self, i: int, got: int | None) -> str:
        says = "no number of images" if got is None else f"{got:,} images"
        return (
            f"{self._source.name}: the content of block {i} says {says}, the index says {self.blocks[i].num_images:,}"
        )

    def locate(self, image: int) -> tuple[int, int]:
        """Where an image is: (block, image within the block)."""
        if not 0 <= image < self.num_images:
            raise ValueError(f"got image {image}, expected 0 to {self.num_images - 1}: there are {self.num_images}")
        i = bisect.bisect_right(self._ends, image)
        return i, image - (self._ends[i] - self.blocks[i].num_images)

    def close(self) -> None:
        self._closed = True
        self._source.close()

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self):
        if isinstance(self._source, FileOnDisk):
            return _reopen, (self._source.path, self.size, self._trailer)
        return Archive.from_bytes, (self._source.data,)


def _reopen(path: Path, size: int, trailer: bytes) -> Archive:
    archive = Archive.open(path)
    if (archive.size, archive._trailer) != (size, trailer):
        archive.close()
        raise ValueError(f"{path} changed after it was opened elsewhere; open it again there")
    return archive
