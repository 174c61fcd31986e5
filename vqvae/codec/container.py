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

import enum
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vqvae.codec.storage import DamagedFile

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

    def __str__(self) -> str:
        return f"mode {self.mode.name} and fingerprint {self.fingerprint.hex()}"


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


def count_images(content: bytes) -> int | None:
    """The number of images that the content of a block says it has."""
    try:
        count, _ = read_varint(content)
    except DamagedFile:
        return None
    return count if 1 <= count <= MAX_IMAGES else None


def spell_header(header: Header) -> bytes:
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


def spell_rest(header: bytes, index: bytearray, blocks: Iterable[tuple[int, bytes]]) -> Iterator[bytes]:
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


def spell(header: Header, blocks: Iterable[tuple[int, bytes]]) -> Iterator[bytes]:
    start = spell_header(header)
    yield start
    yield from spell_rest(start, bytearray(), blocks)


def pack(header: Header, blocks: Iterable[tuple[int, bytes]]) -> bytes:
    """The bytes of a file of `blocks`, each (number of images, content); this begins with the number as a varint."""
    return b"".join(spell(header, blocks))
