"""What is in a block: which images, in what shape, which units are stored as they are, and the stream.

    number of images     varint
    flags                u8: 1 labels are in the stream, 2 names follow at the end
    shapes               runs until they cover the images: varint how many, u8 channels, varint height, varint width
    kinds                varint number of runs; each: varint units of kind 0 before it, varint length, u8 kind
                         0 coded; 1 to 15 coded on a grid shifted by so many sixteenths; 255 stored
    check                u32, CRC-32 of what must come out: the shape of each image (three u32) with its pixels after
                         it; where only codes are kept, all shapes, then the codes (u32 each); then labels (u32 each)
    stream               varint length, bytes; fewer than its images need only as far as `vqvae.codec.coder` allows
    stored pixels        of the units of kind 255, those inside the image
    names                to the end: zlib of UTF-8 strings, each ended by a zero byte

An image's units are those of `vqvae.codec.units`. Little-endian; varints as in `vqvae.codec.container`.
"""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from vqvae.codec.container import MAX_IMAGES, DamagedFile, read_varint, varint
from vqvae.codec.units import Cut

STORED = 255
# A block that claims more is refused before anything is allocated for it.
MAX_UNITS = 1 << 16
# Of images, and of units with what pads them.
MAX_PIXELS = 1 << 28
_MAX_NAME = 4096
_MAX_NAMES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Body:
    """A block's content.

    Attributes:
        cuts: how each image is cut into units.
        kinds: of each unit: its grid's offset, or `STORED`.
        has_labels: whether the stream begins with labels.
        check: CRC-32, see above.
        stored: pixels of the stored units, one after the other.
        names: of the images, or None.
    """

    cuts: Sequence[Cut]
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
        parts = [varint(len(self.cuts)), bytes([self.has_labels | 2 * (self.names is not None)])]
        for shape, run in groupby(cut.shape for cut in self.cuts):
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
            if len(self.names) != len(self.cuts):
                raise ValueError(f"got {len(self.names)} names for {len(self.cuts)} images, expected one each")
            spelled = b"".join(map(_spell_name, self.names))
            if len(spelled) > _MAX_NAMES:
                raise ValueError(
                    f"got names of {len(spelled):,} bytes in a block, expected at most {_MAX_NAMES:,}; "
                    "put fewer images into a block"
                )
            parts.append(zlib.compress(spelled, 9))
        return b"".join(parts)

    @classmethod
    def unpack(cls, data: bytes, num_channels: int, size: int) -> "Body":
        """What `pack` made, for a model of `num_channels` and `size`.

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
        cuts = reader.cuts(num_images, num_channels, size)
        num_units = sum(cut.num_units for cut in cuts)
        kinds = reader.kinds(num_units)
        (check,) = struct.unpack("<I", reader.take(4))
        stream = reader.take(reader.varint())
        num_stored = 0
        if STORED in kinds:
            units = zip(units_of(cuts), kinds, strict=True)
            num_stored = sum(cut.inside_bytes(unit) for (cut, unit), kind in units if kind == STORED)
        stored = reader.take(num_stored)
        names = reader.names(num_images) if flags & 2 else None
        reader.finish()
        return cls(
            cuts=cuts,
            kinds=kinds,
            has_labels=bool(flags & 1),
            check=check,
            stream=stream,
            stored=stored,
            names=names,
        )


def units_of(cuts: Sequence[Cut]) -> list[tuple[Cut, int]]:
    """Each unit as its image's cut and its number there."""
    return [(cut, unit) for cut in cuts for unit in range(cut.num_units)]


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


def check_size(cuts: Sequence[Cut]) -> None:
    """ValueError for more in one block than a reader takes."""
    num_units, num_pixels = sum(cut.num_units for cut in cuts), sum(cut.num_padded for cut in cuts)
    if num_units > MAX_UNITS or num_pixels > MAX_PIXELS:
        raise ValueError(
            f"a block of {len(cuts)} images has {num_units} units with {num_pixels} bytes of pixels, expected at most "
            f"{MAX_UNITS} and {MAX_PIXELS}; put fewer images into a block, or cut them"
        )


class _Reader:
    """Reads on through a body, and never beyond it."""

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
            raise DamagedFile(f"a block claims {length} more bytes at byte {self._at} of its body and has {left}")
        self._at += length
        return self._data[self._at - length : self._at]

    def cuts(self, num_images: int, num_channels: int, size: int) -> list[Cut]:
        cuts: list[Cut] = []
        num_units = num_pixels = 0
        while len(cuts) < num_images:
            run, channels, height, width = self.varint(), self.byte(), self.varint(), self.varint()
            if not 1 <= run <= num_images - len(cuts):
                raise DamagedFile(f"a block of {num_images} images has {run} of one shape after {len(cuts)} others")
            try:
                cut = Cut(shape=(channels, height, width), num_channels=num_channels, size=size)
            except ValueError as error:
                raise DamagedFile(f"a block cannot be read: {error}") from error
            num_units += run * cut.num_units
            num_pixels += run * cut.num_padded
            if num_units > MAX_UNITS or num_pixels > MAX_PIXELS:
                raise DamagedFile(
                    f"a block claims {num_units} units with {num_pixels} bytes of pixels, expected at most {MAX_UNITS} "
                    f"and {MAX_PIXELS}"
                )
            cuts += [cut] * run
        return cuts

    def kinds(self, num_units: int) -> list[int]:
        kinds: list[int] = []
        for _ in range(self.varint()):
            gap, length, kind = self.varint(), self.varint(), self.byte()
            if length < 1 or gap + length > num_units - len(kinds) or not (1 <= kind <= 15 or kind == STORED):
                raise DamagedFile(
                    f"a block of {num_units} units has {length} of kind {kind} after {len(kinds)} and {gap} others"
                )
            kinds += [0] * gap + [kind] * length
        return kinds + [0] * (num_units - len(kinds))

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
