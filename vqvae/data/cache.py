"""Shrunk copies of large images on the disk, so that each is decoded once and not in every epoch.

    folder/fitted/000000/000000012      image 12 of a set as it comes out of the set
    folder/pictures/000000/000000012    its whole picture, as crops of it need it (`vqvae.data.augmentation`)
    folder/bytes                        what the entries take: 64 bits for each that was written, added up; counted
                                        anew from the entries where it is cut or gone
    folder/stopped                      a writer has met a full disk, and has said so

An entry is

    "vqshrunk" · 16 bytes that tell what it was made of · CRC-32 of the rest · 1 or 3 channels, a byte · lossless WebP

What it was made of is the digest of the image's own stamp (name, size, time of change), its number, and the size and
options that it was made for; of anything else it counts as missing, and is written anew. WebP takes a quarter of the
bytes that the pixels do; to unpack it costs an eighth of decoding a photograph (256 pixels: 13 ms for 110).

Nothing here changes what a set gives: what is read is what would be made, to the bit, and what cannot be written is
made again the next time. So a cache may be full, damaged, removed, or written by several processes at once, and a
resumed run goes on the same with it as without.

A bound on all entries holds for all processes together, save for one entry each. A disk is never filled: `RESERVE`
bytes are left, for checkpoints and other programs.
"""

import contextlib
import errno
import os
import secrets
import shutil
import warnings
import zlib
from collections.abc import Callable
from hashlib import blake2b
from io import BytesIO
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

# Free bytes of the disk below which nothing is added.
RESERVE = 1 << 30
MAGIC = b"vqshrunk"
_STAMP, _SUM = 16, 4
# Bytes of a number in `bytes`.
_NUMBER = 8
_HEAD = len(MAGIC) + _STAMP + _SUM
# Longest side that WebP has.
_MAX_SIDE = 16383
# Entries in one folder.
_TOGETHER = 1000


class Cache:
    """Shrunk copies of the images of one set.

    folder: made with the first entry. most_bytes: that all entries may take. tell: is told, in a sentence and once for
    all processes, where no more can be written; by default a warning.
    """

    def __init__(self, folder: Path, most_bytes: int, tell: Callable[[str], None] = warnings.warn):
        self.folder, self.most_bytes, self.tell = folder, most_bytes, tell
        self._is_open = True
        # Of the bytes that entries take, and of the file that says so, what this process has added up.
        self._used = self._read = 0

    def get(self, kind: str, number: int, of: bytes) -> UInt8[np.ndarray, "..."] | None:
        """The pixels of an entry, "h w" or "h w c"; None where there is none, or one of something else."""
        try:
            data = self._path(kind, number).read_bytes()
        except OSError:
            return None
        body = data[_HEAD:]
        if len(body) < 1 or data[:_HEAD] != _head(kind, number, of, body):
            return None
        try:
            with Image.open(BytesIO(body[1:]), formats=("WEBP",)) as image:
                pixels = np.array(image)
        except Exception:  # its checksum fits: of another version of a library, then, and can be made again
            return None
        return pixels[..., 0].copy() if body[0] == 1 else pixels  # WebP has no greys

    def put(self, kind: str, number: int, of: bytes, pixels: UInt8[np.ndarray, "..."]) -> None:
        """Write an entry, if there is room for it."""
        if not self._is_open or max(pixels.shape[:2]) > _MAX_SIDE:
            return
        path = self._path(kind, number)
        scratch = self.folder / ".writing" / secrets.token_hex(8)
        try:
            if self._total() >= self.most_bytes:
                self._is_open = False
                return
            packed = BytesIO()
            Image.fromarray(pixels).save(packed, "WEBP", lossless=True, quality=0, method=0)
            body = bytes([1 if pixels.ndim == 2 else 3]) + packed.getvalue()
            data = _head(kind, number, of, body) + body
            for folder in (scratch.parent, path.parent):
                folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
            if free < RESERVE + len(data):
                left = f"its disk has {free / 1e9:.1f} GB left, of which {RESERVE / 1e9:.1f} stay free"
                raise OSError(errno.ENOSPC, left)
            before = path.stat().st_size if path.exists() else 0
            self._add(len(data) - before)
            try:
                scratch.write_bytes(data)
                os.replace(scratch, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    self._add(before - len(data))
                raise
        except (FileNotFoundError, FileExistsError):
            pass  # somebody is removing the cache; its folder was there, and then it was not
        except OSError as error:
            self._stop(error.strerror or str(error))
        finally:
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what killed writers left, count anew what is miscounted, ask to be told of a full disk again."""
        with contextlib.suppress(OSError):
            if self._is_miscounted():
                self._count_anew()
        with contextlib.suppress(OSError):
            # A number that a kill cut short would spoil all behind it.
            if rest := (self.folder / "bytes").stat().st_size % 8:
                os.truncate(self.folder / "bytes", (self.folder / "bytes").stat().st_size - rest)
        with contextlib.suppress(OSError):
            (self.folder / "stopped").unlink(missing_ok=True)
            for left in (self.folder / ".writing").iterdir():
                left.unlink(missing_ok=True)

    def _path(self, kind: str, number: int) -> Path:
        return self.folder / kind / f"{number // _TOGETHER:06}" / f"{number:09}"

    def _total(self) -> int:
        """What all entries take."""
        try:
            with (self.folder / "bytes").open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                if size < self._read or size % _NUMBER:  # counted anew meanwhile, or cut
                    self._used = self._read = 0
                file.seek(self._read)
                found = file.read()
        except FileNotFoundError:
            self._used = self._read = 0
            return 0
        if len(found) % _NUMBER:
            self._count_anew()
            return self._total()
        self._used += int(np.frombuffer(found, "<i8").sum())
        self._read += len(found)
        return self._used

    def _count_anew(self) -> None:
        """Write `bytes` as one number, of the entries that are there.

        What is appended to a cut file would all be read wrongly from there on.
        """
        total = 0
        for path in self.folder.glob("*/*/*"):
            with contextlib.suppress(OSError):  # another one removes it
                total += path.stat().st_size
        scratch = self.folder / ".writing" / secrets.token_hex(8)
        scratch.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(_number(total))
        os.replace(scratch, self.folder / "bytes")

    def _is_miscounted(self) -> bool:
        """Whether `bytes` is cut, as far as its length tells, or there are entries and no numbers."""
        path = self.folder / "bytes"
        size = path.stat().st_size if path.exists() else 0
        return size % _NUMBER != 0 or (not size and any(self.folder.glob("*/*/*")))

    def _add(self, num_bytes: int) -> None:
        # What is appended in one piece stays in one piece, whoever else appends.
        handle = os.open(self.folder / "bytes", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(handle, _number(num_bytes))
        finally:
            os.close(handle)

    def _stop(self, reason: str) -> None:
        """Write no more in this process, and say so unless another has."""
        self._is_open = False
        with contextlib.suppress(OSError):
            try:
                os.close(os.open(self.folder / "stopped", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
        self.tell(f"the cache {self.folder} is not filled further, and images are decoded as without it: {reason}")


def _number(value: int) -> bytes:
    return value.to_bytes(_NUMBER, "little", signed=True)


def _head(kind: str, number: int, of: bytes, body: bytes) -> bytes:
    stamp = blake2b(b"%b\0%d\0%b" % (kind.encode(), number, of), digest_size=_STAMP).digest()
    return MAGIC + stamp + zlib.crc32(body).to_bytes(_SUM)
