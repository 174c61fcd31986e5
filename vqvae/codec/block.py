"""What is in a block, its content: which images, in what shape, which tiles are stored as they are, and the stream.

    number of images     varint
    flags                u8: 1 labels are in the stream, 2 names follow at the end
    shapes               runs until they cover the images: varint how many, u8 channels, varint height, varint width
    kinds                varint number of runs; each: varint tiles of kind 0 before it, varint length, u8 kind
                         0 coded; 1 to 15 coded on a grid shifted by so many sixteenths; 255 stored
    check                u32, CRC-32 of what must come out: the shape of each image (three u32) with its pixels after
                         it; where only codes are kept, all shapes, then the codes (u32 each); then labels (u32 each)
    stream               varint length, bytes; fewer than its images need only as far as `vqvae.codec.coder` allows
    stored pixels        of the tiles of kind 255, those inside the image
    names                to the end: zlib of UTF-8 strings, each ended by a zero byte

An image's tiles are those of `vqvae.codec.tiles`. Little-endian; varints as in `vqvae.codec.container`.
"""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from vqvae.codec.container import MAX_IMAGES, DamagedFile, read_varint, varint
from vqvae.codec.tiles import Tiling

STORED = 255
# A block that claims more is refused before anything is allocated for it.
MAX_TILES = 1 << 16
# Of images, and of tiles with what pads them.
MAX_PIXELS = 1 << 28
_MAX_NAME = 4096
_MAX_NAMES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class BlockContent:
    """What is in a block.

    Attributes:
        tilings: how each image is cut into tiles.
        kinds: of each tile: its grid's offset, or `STORED`.
        has_labels: whether the stream begins with labels.
        check: CRC-32, see above.
        stored: pixels of the stored tiles, one after the other.
        names: of the images, or None.
    """

    tilings: Sequence[Tiling]
    kinds: Sequence[int]
    has_labels: bool
    check: int
    stream: bytes
    stored: bytes
    names: Sequence[str] | None

    def pack(self) -> bytes:
        """As bytes.

        Raises:
            ValueError: another number of names than of images, or names that cannot be written.
        """
        parts = [varint(len(self.tilings)), bytes([self.has_labels | 2 * (self.names is not None)])]
        for shape, run in groupby(tiling.shape for tiling in self.tilings):
            channels, height, width = shape
            parts += [varint(len(list(run))), bytes([channels]), varint(height), varint(width)]
        runs, gap = [], 0
        for kind, run in groupby(self.kinds):
            length = len(list(run))
            if kind == 0:
                gap = length
            else:
                runs.append(varint(gap) + varint(length) + bytes([kind]))
                gap = 0
        parts += [varint(len(runs)), *runs, struct.pack("<I", self.check), varint(len(self.stream)), self.stream]
        parts.append(self.stored)
        if self.names is not None:
            if len(self.names) != len(self.tilings):
                raise ValueError(f"got {len(self.names)} names for {len(self.tilings)} images, expected one each")
            spelled = b"".join(map(_spell_name, self.names))
            if len(spelled) > _MAX_NAMES:
                raise ValueError(
                    f"got names of {len(spelled):,} bytes in a block, expected at most {_MAX_NAMES:,}; "
                    "put fewer images into a block"
                )
            parts.append(zlib.compress(spelled, 9))
        return b"".join(parts)

    @classmethod
    def unpack(cls, data: bytes, num_channels: int, size: tuple[int, int]) -> "BlockContent":
        """What `pack` made, for a model of `num_channels` and of images of `size`.

        Raises:
            DamagedFile: it cannot be.
        """
        reader = _Reader(data)
        num_images = reader.varint()
        if not 1 <= num_images <= MAX_IMAGES:
            raise DamagedFile(f"a block claims {num_images} images, expected 1 to {MAX_IMAGES}")
        flags = reader.byte()
        if flags > 3:
            raise DamagedFile(f"a block has the flags {flags:#x}, of which this version knows 1 and 2")
        tilings = reader.tilings(num_images, num_channels, size)
        num_tiles = sum(tiling.num_tiles for tiling in tilings)
        kinds = reader.kinds(num_tiles)
        (check,) = struct.unpack("<I", reader.take(4))
        stream = reader.take(reader.varint())
        num_stored = 0
        if STORED in kinds:
            tiles = zip(tiles_of(tilings), kinds, strict=True)
            num_stored = sum(tiling.inside_bytes(tile) for (tiling, tile), kind in tiles if kind == STORED)
        stored = reader.take(num_stored)
        names = reader.names(num_images) if flags & 2 else None
        reader.finish()
        return cls(
            tilings=tilings,
            kinds=kinds,
            has_labels=bool(flags & 1),
            check=check,
            stream=stream,
            stored=stored,
            names=names,
        )


def tiles_of(tilings: Sequence[Tiling]) -> list[tuple[Tiling, int]]:
    """Each tile as its image's tiling and its number there."""
    return [(tiling, tile) for tiling in tilings for tile in range(tiling.num_tiles)]


def _spell_name(name: str) -> bytes:
    try:
        spelled = name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"got the name {name!r}, expected one that can be written as UTF-8; rename it") from error
    if len(spelled) > _MAX_NAME or 0 in spelled:
        raise ValueError(
            f"got a name of {len(spelled):,} bytes, {name[:32]!r}.., expected at most {_MAX_NAME:,} and none of them "
            "zero; rename it"
        )
    return spelled + b"\0"


def check_size(tilings: Sequence[Tiling]) -> None:
    """ValueError for more in one block than a reader takes."""
    num_tiles, num_pixels = sum(tiling.num_tiles for tiling in tilings), sum(tiling.num_padded for tiling in tilings)
    if num_tiles > MAX_TILES or num_pixels > MAX_PIXELS:
        raise ValueError(
            f"a block of {len(tilings)} images has {num_tiles} tiles with {num_pixels} bytes of pixels, expected at "
            f"most {MAX_TILES} and {MAX_PIXELS}; put fewer images into a block, or cut them"
        )


class _Reader:
    """Reads on through the content of a block, and never beyond it."""

    def __init__(self, data: bytes):
        self._data = data
        self._at = 0

    def varint(self) -> int:
        value, self._at = read_varint(self._data, self._at)
        return value

    def byte(self) -> int:
        return self.take(1)[0]

    def take(self, length: int) -> bytes:
        left = len(self._data) - self._at
        if length > left:
            raise DamagedFile(f"a block claims {length} more bytes at byte {self._at} of its content and has {left}")
        self._at += length
        return self._data[self._at - length : self._at]

    def tilings(self, num_images: int, num_channels: int, size: tuple[int, int]) -> list[Tiling]:
        tilings: list[Tiling] = []
        num_tiles = num_pixels = 0
        while len(tilings) < num_images:
            run, channels, height, width = self.varint(), self.byte(), self.varint(), self.varint()
            if not 1 <= run <= num_images - len(tilings):
                raise DamagedFile(f"a block of {num_images} images has {run} of one shape after {len(tilings)} others")
            try:
                tiling = Tiling(shape=(channels, height, width), num_channels=num_channels, size=size)
            except ValueError as error:
                raise DamagedFile(f"a block cannot be read: {error}") from error
            num_tiles += run * tiling.num_tiles
            num_pixels += run * tiling.num_padded
            if num_tiles > MAX_TILES or num_pixels > MAX_PIXELS:
                raise DamagedFile(
                    f"a block claims {num_tiles} tiles with {num_pixels} bytes of pixels, expected at most {MAX_TILES} "
                    f"and {MAX_PIXELS}"
                )
            tilings += [tiling] * run
        return tilings

    def kinds(self, num_tiles: int) -> list[int]:
        kinds: list[int] = []
        for _ in range(self.varint()):
            gap, length, kind = self.varint(), self.varint(), self.byte()
            if length < 1 or gap + length > num_tiles - len(kinds) or not (1 <= kind <= 15 or kind == STORED):
                raise DamagedFile(
                    f"a block of {num_tiles} tiles has {length} of kind {kind} after {len(kinds)} and {gap} others"
                )
            kinds += [0] * gap + [kind] * length
        return kinds + [0] * (num_tiles - len(kinds))

    def names(self, num_images: int) -> list[str]:
        unpacker = zlib.decompressobj()
        try:
            # One byte more than there may be, since at its limit zlib stops before it looks for the end.
            most = min(num_images * (_MAX_NAME + 1), _MAX_NAMES)
            plain = unpacker.decompress(self._data[self._at :], most + 1)
            # Counted before they are made: zeros alone would be millions of names.
            whole = unpacker.eof and len(plain) <= most and plain.count(0) == num_images and plain[-1] == 0
            spelled = plain.split(b"\0")[:-1] if whole else []
            if not whole or max(map(len, spelled)) > _MAX_NAME:
                raise DamagedFile(
                    f"a block of {num_images} images has {plain.count(0)} names, or some over {_MAX_NAME} bytes, or "
                    f"more than {_MAX_NAMES} bytes of them"
                )
            names = [name.decode() for name in spelled]
        except (zlib.error, UnicodeDecodeError) as error:
            raise DamagedFile(f"the names in a block cannot be read: {error}") from error
        self._at = len(self._data) - len(unpacker.unused_data)
        return names

    def finish(self) -> None:
        if self._at != len(self._data):
            raise DamagedFile(f"a block has {len(self._data) - self._at} bytes at its end that mean nothing")
