"""PNG, WebP, JPEG-XL and xz on pictures: what `codec.py` measures this project's codec beside.

A picture is uint8 "h w", or "h w 3". Many pictures as one are a mosaic, near to a square and filled up with black, for
the formats of pictures, and one picture after the other for xz. xz gets a dictionary as large as its input where
preset 9 would take 64 MiB: the bytes are the same and short inputs do not pay for clearing it.
"""

import io
import lzma
import math
import statistics
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from tqdm import tqdm

try:
    import imagecodecs
except ImportError:
    raise SystemExit("this benchmark needs the package imagecodecs, for JPEG-XL: pip install imagecodecs") from None

Picture = np.ndarray
Setting = Callable[[Picture, float], bytes]
# How lossy settings are searched: so many from end to end, then so many around the best of them.
_COARSE, _FINE = 40, 20


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


def one_after_another(pictures: np.ndarray) -> np.ndarray:
    """All pictures as one array for a codec of bytes."""
    return pictures


def _pillow(picture: Picture, **how: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, **how)
    return file.getvalue()


def _from_pillow(data: bytes, shape: Sequence[int]) -> Picture:
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("L" if len(shape) == 2 else "RGB"))


def png(picture: Picture) -> bytes:
    """As small as Pillow makes it."""
    return _pillow(picture, format="png", optimize=True)


def webp(picture: Picture) -> bytes:
    """Lossless, with the most effort."""
    return _pillow(picture, format="webp", lossless=True, quality=100, method=6, exact=True)


def jpegxl(effort: int) -> Callable[[Picture], bytes]:
    """Lossless, as a bare codestream, on one thread."""

    def encode(picture: Picture) -> bytes:
        how = {"effort": effort, "lossless": True, "usecontainer": False, "numthreads": 1}
        return bytes(imagecodecs.jpegxl_encode(picture, **how))

    return encode


def _from_jpegxl(data: bytes, shape: Sequence[int]) -> Picture:
    return imagecodecs.jpegxl_decode(data, numthreads=1).reshape(shape)


def _lzma2(size: int) -> list[dict[str, Any]]:
    return [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": max(4096, size)}]


def xz(picture: Picture) -> bytes:
    """A whole file of xz."""
    return lzma.compress(picture.tobytes(), filters=_lzma2(picture.size))


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
    return len(lzma.compress(picture.tobytes(), lzma.FORMAT_RAW, filters=_lzma2(picture.size)))


@dataclass(frozen=True, kw_only=True)
class OtherCodec:
    """A lossless codec; `payload` is the bytes without a file's headers, where these can be told apart."""

    encode: Callable[[Picture], bytes]
    decode: Callable[[bytes, Sequence[int]], Picture]
    payload: Callable[[Picture, bytes], int] | None = None
    as_one: Callable[[np.ndarray], np.ndarray] = mosaic


SLOW = "JPEG-XL e10"
PER_IMAGE = "JPEG-XL e9"
CODECS = {
    "PNG": OtherCodec(encode=png, decode=_from_pillow, payload=_png_payload),
    "WebP": OtherCodec(encode=webp, decode=_from_pillow),
    PER_IMAGE: OtherCodec(encode=jpegxl(9), decode=_from_jpegxl),
    SLOW: OtherCodec(encode=jpegxl(10), decode=_from_jpegxl),
    "xz": OtherCodec(encode=xz, decode=_from_xz, payload=_xz_payload, as_one=one_after_another),
}


def _encoded(name: str, picture: Picture) -> bytes:
    codec = CODECS[name]
    data = codec.encode(picture)
    if not np.array_equal(codec.decode(data, picture.shape), picture):
        raise ValueError(f"{name} gave other pixels back than it got")
    return data


def measure(pictures: np.ndarray, num_slow: int) -> dict[str, dict[str, Any]]:
    """Bytes of every codec: `single` and `payload` of each image, `archive` of all as one; all decoded and compared.

    Args:
        num_slow: how many of the first images the slowest codec gets as files of their own.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, codec in CODECS.items():
        some = pictures[:num_slow] if name == SLOW else pictures
        single, payload = [], []
        for picture in tqdm(some, desc=name, unit="img", disable=None):
            data = _encoded(name, picture)
            single.append(len(data))
            if codec.payload is not None:
                payload.append(codec.payload(picture, data))
        found[name] = {"single": single, "archive": len(_encoded(name, codec.as_one(pictures)))}
        if payload:
            found[name]["payload"] = payload
    return found


Job = Callable[[], Any]


def timing_jobs(pictures: np.ndarray) -> dict[tuple[str, str, str], tuple[Job, int]]:
    """What is timed, by codec, `single` or `archive`, and `encode` or `decode`; with the number of images."""
    jobs: dict[tuple[str, str, str], tuple[Job, int]] = {}
    for name, codec in CODECS.items():
        for kind, parts in (("single", pictures), ("archive", codec.as_one(pictures)[None])):
            jobs |= {
                (name, kind, what): (job, len(pictures)) for what, job in _both_ways(codec, np.asarray(parts)).items()
            }
    return jobs


def _both_ways(codec: OtherCodec, parts: np.ndarray) -> dict[str, Job]:
    files = [codec.encode(part) for part in parts]
    return {
        "encode": lambda: [codec.encode(part) for part in parts],
        "decode": lambda: [codec.decode(file, parts.shape[1:]) for file in files],
    }


def images_per_second(jobs: Mapping[Any, tuple[Job, int]], rounds: int) -> dict[Any, float]:
    """Of each job, by the median of its CPU times in rounds over all jobs."""
    seconds: dict[Any, list[float]] = {key: [] for key in jobs}
    with tqdm(total=rounds * len(jobs), desc="timing", disable=None) as bar:
        for _ in range(rounds):
            for key, (job, _) in jobs.items():
                began = time.process_time()
                job()
                seconds[key].append(time.process_time() - began)
                bar.update()
    return {key: num / statistics.median(seconds[key]) for key, (_, num) in jobs.items()}


# -------------------------------------------------------------------------------------------------------------- lossy


def _lossy_webp(picture: Picture, quality: float) -> bytes:
    return _pillow(picture, format="webp", quality=quality, method=6)


def _lossy_jpegxl(picture: Picture, distance: float) -> bytes:
    how = {"effort": 9, "distance": distance, "lossless": False, "usecontainer": False, "numthreads": 1}
    return bytes(imagecodecs.jpegxl_encode(picture, **how))


LOSSY: dict[str, tuple[Setting, Iterable[float], Callable[[bytes, Sequence[int]], Picture]]] = {
    "WebP": (_lossy_webp, np.linspace(0, 100, _COARSE), _from_pillow),
    "JPEG-XL": (_lossy_jpegxl, np.geomspace(25, 0.05, _COARSE), _from_jpegxl),
}


class Lossy(NamedTuple):
    """Bytes in all, the pictures that come back, and how many files are over our bytes and the smallest there are."""

    num_bytes: int
    pictures: np.ndarray
    num_smallest: int


def nearest_above(picture: Picture, name: str, least: int) -> Lossy:
    """The smallest lossy file of one picture of at least so many bytes, over the codec's quality.

    Where even its largest is smaller, that one.
    """
    encode, grid, decode = LOSSY[name]
    settings = [float(setting) for setting in grid]
    files = {setting: encode(picture, setting) for setting in settings}

    def best() -> float:
        above = [setting for setting in files if len(files[setting]) >= least]
        return min(above, key=lambda s: len(files[s])) if above else max(files, key=lambda s: len(files[s]))

    if len(files[best()]) > least:
        at = settings.index(best())
        around = settings[max(0, at - 1) : at + 2]
        files |= {float(s): encode(picture, float(s)) for s in np.linspace(around[0], around[-1], _FINE)}
    data = files[best()]
    smallest = least < len(data) == min(map(len, files.values()))
    return Lossy(len(data), decode(data, picture.shape), int(smallest))


def lossy(pictures: np.ndarray, name: str, least: int) -> Lossy:
    """All pictures as one mosaic of at least so many bytes."""
    found = nearest_above(mosaic(pictures), name, least)
    return found._replace(pictures=cut(found.pictures, len(pictures), pictures.shape[1:]))


def lossy_each(pictures: np.ndarray, name: str, least: Sequence[int]) -> Lossy:
    """Each picture as a file of at least its number of bytes."""
    found = [nearest_above(picture, name, size) for picture, size in zip(pictures, least, strict=True)]
    num_bytes, back, num_smallest = zip(*found, strict=True)
    return Lossy(sum(num_bytes), np.stack(back), sum(num_smallest))
