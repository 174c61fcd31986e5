"""Files of blocks: opened, written, and added to. Their layout is that of `vqvae.codec.container`."""

import bisect
import contextlib
import itertools
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from safefolder.files import replacing
from safefolder.locks import one_writer
from vqvae.codec.container import (
    BLOCK,
    END_MAGIC,
    HEADER,
    MAGIC,
    MARKER,
    MAX_IMAGES,
    TRAILER,
    VERSION,
    Header,
    Mode,
    count_images,
    read_varint,
    spell,
    spell_header,
    spell_rest,
)
from vqvae.codec.storage import DamagedFile, FileOnDisk, Memory, Storage, file_to_write, shown

CHUNK = 1 << 20


class Block(NamedTuple):
    """One line of the index: number of images, where the content lies in the file, bytes of the content."""

    num_images: int
    offset: int
    length: int


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
            file.writelines(spell(header, blocks))

    def append(self, header: Header, blocks: Iterable[tuple[int, bytes]]) -> None:
        """As the function `append`."""
        with self.open() as old:
            if old.header != header:
                raise ValueError(
                    f"{shown(self._path)} is of {old.header}, got blocks of {header}; write them to a file of their own"
                )
            with replacing(self._target) as scratch, open(scratch, "wb") as file:
                for offset in range(0, old._index_offset, CHUNK):
                    file.write(old._source.read(offset, min(CHUNK, old._index_offset - offset)))
                index = old._source.read(old._index_offset, old.size - TRAILER.size - old._index_offset)
                file.writelines(spell_rest(spell_header(header), bytearray(index), blocks))
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
