"""What is left of a damaged file of the image codec: blocks that are whole, for `BlockDecoder.decode_alone`.

Where the index cannot be trusted it looks for markers, and any bytes may claim to be a block: taking the CRC of each
claim costs the square of the file's size where many long claims overlap. It is linear all the same, and no claim is
left untried. One pass keeps the CRC c(p) of the file's first p
bytes at every 1,024th p. Since crc(AB) = crc(A)·x^(8|B|) + crc(B) over GF(2)[x] modulo the CRC's polynomial, the
check of a claim whose content spans [s, e), with h the CRC of its marker and length, must be

    check = (h + c(s)) · x^(8(e - s)) + c(e),

so a false claim costs two reads below 1,024 bytes and a few products, however long its content. What passes is
read and its CRC taken plainly. Blocks do not overlap, so that is linear too.
"""

import functools
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vqvae.codec.archive import CHUNK, Archive, read_header
from vqvae.codec.container import BLOCK, HEADER, MARKER, TRAILER, Header, count_images, varint
from vqvae.codec.storage import DamagedFile, FileOnDisk, Memory, Storage

POLYNOMIAL = 0xEDB88320  # of CRC-32; the highest bit is the coefficient of x^0

STRIDE = 1 << 10  # between the kept CRCs of `recover`


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """What `recover` found.

    `header` is None where it is damaged. `blocks` are (number of images, content) in the order of the file; the number
    is None where the content does not say one, or says another than the index. `damage` has a sentence for each thing
    that is wrong, with the range of bytes; a whole file has none.
    """

    header: Header | None
    blocks: list[tuple[int | None, bytes]]
    damage: list[str]


def recover(source: bytes | str | Path) -> Recovered:
    """Read what is whole of a damaged file (its bytes, or its path); the blocks are all in memory at the end.

    A whole index tells where the blocks are. Without one, what begins with a marker and fulfils its CRC-32 is a block,
    wherever it lies outside another; its content says how many images it has. See the module's text for the cost.

    Raises:
        ValueError: there is no such file, or it may not be read.
    """
    reader = Memory(source) if isinstance(source, bytes) else FileOnDisk(source)
    try:
        try:
            archive = Archive(reader)
        except DamagedFile as error:
            return _scan(reader, error.args[0])
        return _follow(archive)
    finally:
        reader.close()


def _follow(archive: Archive) -> Recovered:
    blocks: list[tuple[int | None, bytes]] = []
    damage = []
    for i, block in enumerate(archive.blocks):
        try:
            content = archive._checked(i)
        except DamagedFile as error:
            damage.append(error.args[0])
            continue
        count = count_images(content)
        if count != block.num_images:
            damage.append(archive._miscounted(i, count))
            count = None
        blocks.append((count, content))
    return Recovered(header=archive.header, blocks=blocks, damage=damage)


def _scan(source: Storage, reason: str) -> Recovered:
    damage = [reason]
    try:
        header = read_header(source)
    except DamagedFile:
        header = None
    blocks: list[tuple[int | None, bytes]] = []
    index = bytearray()
    end = 0 if header is None else HEADER.size
    sums = _prefix_sums(source)
    for start, head in _claims(source):
        if start < end or not _plausible(source, sums, start, head):
            continue
        _, length, check = BLOCK.unpack(head)
        content = source.read(start + BLOCK.size, length)
        if zlib.crc32(content, zlib.crc32(head[:8])) != check:  # the file changed between the two reads
            continue
        if end < start and (end, start) != (0, HEADER.size):  # a damaged header is named already
            damage.append(f"bytes {end} to {start - 1} hold no whole block")
        count = count_images(content)
        if count is None:
            damage.append(f"the block at byte {start} does not say its number of images")
        blocks.append((count, content))
        index += varint(count or 0) + varint(length)
        end = start + BLOCK.size + length
    # Where only the header or the trailer is damaged, the rest is the index of just these blocks: nothing is lost.
    is_index = source.size - end == len(index) + TRAILER.size and source.read(end, len(index)) == index
    if end < source.size and not is_index:
        damage.append(f"bytes {end} to {source.size - 1} hold no whole block; the index was there, or blocks, or both")
    return Recovered(header=header, blocks=blocks, damage=damage)


def _claims(source: Storage) -> Iterator[tuple[int, bytes]]:
    """Every (start, 12 bytes) that begins with a marker and whose content fits into the file."""
    for base in range(0, source.size, CHUNK):
        data = source.read(base, min(CHUNK + BLOCK.size - 1, source.size - base))
        at = data.find(MARKER)
        while 0 <= at < CHUNK and at + BLOCK.size <= len(data):
            head = data[at : at + BLOCK.size]
            if 1 <= BLOCK.unpack(head)[1] <= source.size - base - at - BLOCK.size:
                yield base + at, head
            at = data.find(MARKER, at + 1)


def _prefix_sums(source: Storage) -> array:
    """The CRC-32 of the first 0, STRIDE, 2·STRIDE, ... bytes."""
    sums = array("I", [0])
    for base in range(0, source.size, CHUNK):
        data = memoryview(source.read(base, min(CHUNK, source.size - base)))
        for at in range(0, len(data), STRIDE):
            sums.append(zlib.crc32(data[at : at + STRIDE], sums[-1]))
    return sums


def _prefix_sum(source: Storage, sums: array, num_bytes: int) -> int:
    """The CRC-32 of the first `num_bytes` bytes."""
    whole = num_bytes // STRIDE
    return zlib.crc32(source.read(whole * STRIDE, num_bytes % STRIDE), sums[whole])


def _plausible(source: Storage, sums: array, start: int, head: bytes) -> bool:
    """Whether a claim fulfils its check, by the equation of the module's text."""
    _, length, check = BLOCK.unpack(head)
    content = start + BLOCK.size
    remainder = zlib.crc32(head[:8]) ^ _prefix_sum(source, sums, content)
    # Two factors, so that few distinct ones are ever made.
    for num_bytes in (length & 0xFFFF, length & ~0xFFFF):
        remainder = _multiply(remainder, _power(num_bytes))
    return remainder ^ _prefix_sum(source, sums, content + length) == check


def _multiply(a: int, b: int) -> int:
    """a · b modulo the polynomial."""
    product = 0
    while a:
        if a & 0x80000000:
            product ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ (POLYNOMIAL if b & 1 else 0)
    return product


@functools.lru_cache(maxsize=1 << 16)
def _power(num_bytes: int) -> int:
    """x^(8·num_bytes) modulo the polynomial."""
    result, square = 1 << 31, 1 << 23  # x^0 and x^8
    while num_bytes:
        if num_bytes & 1:
            result = _multiply(result, square)
        square = _multiply(square, square)
        num_bytes >>= 1
    return result
