"""PNG, WebP, JPEG-XL and xz: bits of each image as a file of its own, on the test images of any set.

    python -m benchmarks other_codecs SOURCE [--root FOLDER] [--codecs PNG WebP] [--size 32] [--channels 3]

SOURCE is what `load_images` takes, the embedded set unless given. Whole files are counted, headers included, as
somebody who stores one image would pay for them; `payload` is the bytes without a file's headers, where these can be
told apart (IDAT of PNG, the LZMA2 stream of xz). All files are decoded and compared. PNG is written with Pillow's
`optimize`, the others with the most effort, JPEG-XL as a bare codestream. `codec` measures our files beside these.

A picture is uint8 "h w", or "h w 3". Many pictures as one are a mosaic, near to a square and filled up with black, for
the formats of pictures, and one picture after the other for xz. xz gets a dictionary as large as its input where
preset 9 would take 64 MiB: the bytes are the same and short inputs do not pay for clearing it.
"""

import io
import lzma
import math
import statistics
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from tyro.conf import Positional

from benchmarks import harness

Picture = np.ndarray
Jobs = dict[tuple[str, str], Callable[[], object]]
QUICK = "--num 50"


def pictures_of(images: UInt8[Tensor, "b c h w"]) -> np.ndarray:
    """Images as pictures "b h w", or "b h w 3"."""
    pictures = rearrange(images, "b c h w -> b h w c").contiguous().numpy()
    return pictures[..., 0] if pictures.shape[3] == 1 else pictures


def mosaic(pictures: np.ndarray) -> Picture:
    """All pictures as one, row by row."""
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    black = np.zeros((rows * columns - len(pictures), *pictures.shape[1:]), np.uint8)
    tiled = rearrange(np.concatenate((pictures, black)), "(r q) h w ... -> (r h) (q w) ...", r=rows)
    return np.ascontiguousarray(tiled)


def cut(picture: Picture, num: int, shape: Sequence[int]) -> np.ndarray:
    """The first `num` pictures of a mosaic of this shape."""
    return rearrange(picture, "(r h) (q w) ... -> (r q) h w ...", h=shape[0], w=shape[1])[:num]


def _pillow(picture: Picture, **how: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, **how)
    return file.getvalue()


def from_pillow(data: bytes, shape: Sequence[int]) -> Picture:
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("L" if len(shape) == 2 else "RGB"))


def jpegxl(picture: Picture, **how: Any) -> bytes:
    """A bare codestream, on one thread."""
    import imagecodecs

    return bytes(imagecodecs.jpegxl_encode(picture, usecontainer=False, numthreads=1, **how))


def _from_jpegxl(data: bytes, shape: Sequence[int]) -> Picture:
    import imagecodecs

    return imagecodecs.jpegxl_decode(data, numthreads=1).reshape(shape)


def xz(picture: Picture, form: int = lzma.FORMAT_XZ) -> bytes:
    """A whole file of xz, or the LZMA2 stream alone."""
    size = max(4096, picture.size)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": size}]
    return lzma.compress(picture.tobytes(), form, filters=filters)


def _from_xz(data: bytes, shape: Sequence[int]) -> Picture:
    return np.frombuffer(lzma.decompress(data), np.uint8).reshape(shape)


def _png_payload(picture: Picture, data: bytes) -> int:
    at, total = 8, 0
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        total += length * (kind == b"IDAT")
        at += 12 + length
    return total


def _xz_payload(picture: Picture, data: bytes) -> int:
    return len(xz(picture, lzma.FORMAT_RAW))


def jpeg(picture: Picture, quality: float) -> bytes:
    """Lossy, of a whole quality; progressive where that is smaller."""
    how = {"format": "jpeg", "quality": round(quality), "optimize": True}
    return min((_pillow(picture, progressive=progressive, **how) for progressive in (False, True)), key=len)


def _webp(picture: Picture, **how: Any) -> bytes:
    return _pillow(picture, format="webp", method=6, **how)


@dataclass(frozen=True, kw_only=True)
class OtherCodec:
    """A lossless codec; `payload` is the bytes without a file's headers, where these can be told apart."""

    encode: Callable[[Picture], bytes]
    decode: Callable[[bytes, Sequence[int]], Picture]
    payload: Callable[[Picture, bytes], int] | None = None
    as_one: Callable[[np.ndarray], np.ndarray] = mosaic

    def file(self, picture: Picture) -> bytes:
        """Decoded and compared."""
        data = self.encode(picture)
        if not np.array_equal(self.decode(data, picture.shape), picture):
            raise ValueError("other pixels came back than went in")
        return data


SLOW = "JPEG-XL e10"
CODECS = {
    "PNG": OtherCodec(encode=partial(_pillow, format="png", optimize=True), decode=from_pillow, payload=_png_payload),
    "WebP": OtherCodec(encode=partial(_webp, lossless=True, quality=100, exact=True), decode=from_pillow),
    "JPEG-XL e9": OtherCodec(encode=partial(jpegxl, effort=9, lossless=True), decode=_from_jpegxl),
    SLOW: OtherCodec(encode=partial(jpegxl, effort=10, lossless=True), decode=_from_jpegxl),
    "xz": OtherCodec(encode=xz, decode=_from_xz, payload=_xz_payload, as_one=np.ascontiguousarray),
}


def single(name: str, pictures: np.ndarray) -> dict[str, list[int]]:
    """Bytes of each picture as a file of its own, and of its payload where it can be told apart."""
    codec = CODECS[name]
    found: dict[str, list[int]] = {"single": [], "payload": []}
    for picture in tqdm(pictures, desc=name, unit="img", disable=None):
        data = codec.file(picture)
        found["single"].append(len(data))
        if codec.payload is not None:
            found["payload"].append(codec.payload(picture, data))
    return found


def measure(name: str, images: Tensor, timed: Tensor, num_slow: int, rounds: int) -> dict[str, Any]:
    """One codec: bytes of each image and of all as one, and speeds; the slowest codes `num_slow` images alone."""
    codec, pictures = CODECS[name], pictures_of(images)
    found = single(name, pictures[:num_slow] if name == SLOW else pictures)
    archive = len(codec.file(codec.as_one(pictures)))
    jobs: Jobs = {}
    pictures = pictures_of(timed)
    for kind, parts in (("single", pictures), ("archive", codec.as_one(pictures)[None])):
        files = [codec.encode(part) for part in parts]
        jobs[kind, "encode"] = lambda parts=parts: [codec.encode(part) for part in parts]
        jobs[kind, "decode"] = lambda files=files, parts=parts: [codec.decode(file, parts.shape[1:]) for file in files]
    return {
        **found,
        "archive": archive,
        "speed": speeds(jobs, dict.fromkeys(("single", "archive"), len(timed)), rounds),
    }


def speeds(jobs: Jobs, nums: Mapping[str, int], rounds: int) -> dict[str, dict[str, float]]:
    """Images a second by `single` or `archive`, of so many images, and by what is done: medians of CPU time."""
    found: dict[str, dict[str, float]] = {}
    timed = {key: partial(harness.timed, job) for key, job in jobs.items()}
    for (kind, what), spent in harness.interleaved(timed, rounds).items():
        seconds = statistics.median(each.counted for each in spent)
        found.setdefault(kind, {})[what] = nums[kind] / seconds
    return found


# -------------------------------------------------------------------------------------------------------------- lossy

# How a picture is written with a setting, the settings, and how it is read.
LOSSY: dict[str, tuple[Callable[[Picture, float], bytes], np.ndarray, Callable[[bytes, Sequence[int]], Picture]]] = {
    "WebP": (lambda picture, quality: _webp(picture, quality=quality), np.linspace(0, 100, 101), from_pillow),
    "JPEG-XL": (
        lambda picture, distance: jpegxl(picture, effort=9, lossless=False, distance=distance),
        np.geomspace(25, 0.05, 80),
        _from_jpegxl,
    ),
}


class Lossy(NamedTuple):
    """Bytes in all, the pictures that come back, and how many files are over our bytes and the smallest there are."""

    num_bytes: int
    pictures: np.ndarray
    num_smallest: int


def nearest_above(picture: Picture, name: str, least: int) -> Lossy:
    """The smallest lossy file of one picture of at least so many bytes; its largest where that is smaller."""
    encode, settings, decode = LOSSY[name]
    files = sorted((encode(picture, float(setting)) for setting in settings), key=len)
    data = next((file for file in files if len(file) >= least), files[-1])
    return Lossy(len(data), decode(data, picture.shape), int(least < len(data) == len(files[0])))


def at_least(pictures: np.ndarray, name: str, least: Sequence[int]) -> Lossy:
    """Each picture as a file of at least its number of bytes; all as one mosaic where one number is given."""
    if len(least) == 1:
        found = nearest_above(mosaic(pictures), name, least[0])
        return found._replace(pictures=cut(found.pictures, len(pictures), pictures.shape[1:]))
    each = [nearest_above(picture, name, size) for picture, size in zip(pictures, least, strict=True)]
    num_bytes, back, num_smallest = zip(*each, strict=True)
    return Lossy(sum(num_bytes), np.stack(back), sum(num_smallest))


def main(
    source: Positional[str] = "fashion-mini",
    root: Path | None = None,
    num: int = 10_000,
    codecs: tuple[str, ...] = ("PNG", "WebP"),
    size: int | None = None,
    channels: int | None = None,
) -> None:
    """Code each of the first `num` test images by itself."""
    images = harness.images(source, "test", num, root=root, size=size, channels=channels)
    table = harness.Table("format, each image its own file", "bits/dim", "of which payload", "images")
    for name in harness.pick(CODECS, codecs):
        found = single(name, pictures_of(images))
        bits = (f"{8 * sum(found[what]) / images.numel():.3f}" if found[what] else "" for what in ("single", "payload"))
        table.row(name, *bits, f"{len(images):,}")
