"""Encoded images to uint8 tensors, with Pillow.

One image is opened, turned upright, laid over white where it is transparent, brought to 8 bits,
scaled so that its short side fits, cropped about the centre and given the wanted channels:

    scale = max(h / H, w / W),   then the middle h x w of the scaled H x W image

Any way in which a file fails to be an image comes out as one kind of error, `ValueError`, so that a
caller can name the file and go on. Where the bytes themselves can't be had (a disk that fails, a
folder that is gone) it is an `OSError` with its number, which says nothing about the image. Only
raster formats that Pillow reads by itself are tried: a file that claims to be PostScript, say,
never reaches an outside program. Only regular files are opened. A PNG is held against its own
checksums (`vqvae.data.png`), which Pillow reads over.

To be varied (`vqvae.data.augmentation`) a picture is needed whole: `picture` stops before the crop.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from io import BufferedIOBase, BytesIO
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from vqvae.data import png
from vqvae.data.files import check_regular, read_bytes
from vqvae.data.views import View, scaled

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
SUFFIXES = frozenset(
    (
        *(".avif", ".apng", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
        *(".j2k", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
    )
)
# An encoded image of more bytes is not read: the pixels of the largest (Pillow's limit) take fewer, unpacked.
MAX_BYTES = 1 << 30

# EXIF tag 0x0112: how the camera was held -> what turns the picture upright.
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LYING = tuple(_UPRIGHT[number] for number in (5, 6, 7, 8))


def decode(source: Path | BytesIO, size: tuple[int, int], channels: int) -> UInt8[Tensor, "c h w"]:
    """Read one encoded image at `size` (height, width) with 1 or 3 channels.

    Raises ValueError, or OSError where the file can't be read.
    """
    return fit(read(source, cover=max(size)), size, channels)


def read(source: Path | BytesIO, cover: int | None = None) -> Image.Image:
    """Read one encoded image, upright and whole, in Pillow's mode "L" where it is grey, else "RGB".

    Of an animation, the first frame. With `cover`, a JPEG much larger than needed may come back
    reduced (its decoder skips the detail), its short side still at least twice `cover`.
    Raises ValueError for what is not an image, is cut off, is damaged (where a checksum tells), is
    too large to be safe (Pillow's limit, 89 million pixels), has levels without a known range, or
    is no regular file; OSError where the file can't be read.
    """
    return read_sized(source, None if cover is None else lambda width, height: float(cover))[0]


def read_sized(
    source: Path | BytesIO, cover: Callable[[int, int], float] | None = None
) -> tuple[Image.Image, tuple[int, int]]:
    """What `read` gives, and the width and height of the image as it is encoded, of which `cover` is a function."""
    data = source.getvalue() if isinstance(source, BytesIO) else read_bytes(source, MAX_BYTES)
    check_sums(data)
    with _as_value_errors(), Image.open(BytesIO(data), formats=FORMATS) as image:
        size = image.size
        if cover is not None:
            _skip_detail(image, cover(*size))
        image.load()
        return _eight_bits(_upright(image)), size


def size_of(source: Path | BytesIO) -> tuple[int, int]:
    """Height and width of an encoded image, upright, by its header; no pixel is decoded. Errors as `read`."""
    if isinstance(source, Path):
        check_regular(source)
    with (
        source.open("rb") if isinstance(source, Path) else contextlib.nullcontext(source) as file,
        _as_value_errors(of_system=True),
        Image.open(file, formats=FORMATS) as image,
    ):
        # Pillow turns the size of a TIFF by itself, and would decode a PNG to look for what may come after its pixels;
        # before them it is said there in one of three ways.
        said = {"exif", "XML:com.adobe.xmp", "xmp"} & image.info.keys()
        if image.format == "PNG" and not said:
            turned = _late_turn(file) in _LYING
        else:
            turned = image.format != "TIFF" and _turn(image) in _LYING
        return (image.width, image.height) if turned else (image.height, image.width)


@contextlib.contextmanager
def _as_value_errors(*, of_system: bool = False) -> Iterator[None]:
    """Whatever Pillow makes of what is no image is a ValueError.

    of_system: the bytes are still read, and so an error of the system, which has a number, stays one.
    """
    with warnings.catch_warnings():
        # What Pillow warns of in a file that it can read changes nothing here; the limit does.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield
        except Image.UnidentifiedImageError:
            raise ValueError("not an image in a known format") from None
        except Exception as error:
            if of_system and isinstance(error, OSError) and error.errno is not None:
                raise
            # Decoders raise whatever a damaged file drives them to: SyntaxError, struct.error,
            # KeyError, EOFError, zlib.error, ... None of them may end a training run.
            raise ValueError(f"{error or type(error).__name__}") from error


def picture(
    source: Path | BytesIO, scale: Callable[[int, int], float], channels: int, large: float
) -> tuple[Image.Image, bool]:
    """One encoded image whole, as `fit` takes it; and whether it was large, and so was scaled down first.

    scale: what an image of some width and height may be scaled by. large: those are scaled for which that is at most so
    much. Errors as `read`.
    """
    found, (width, height) = read_sized(source, lambda width, height: scale(width, height) * min(width, height))
    if channels == 1:
        found = _in_mode(found, "L")
    by = scale(width, height)
    if by > large:
        return found, False
    # Of the image as it is encoded, which may lie on its side, and of which a decoder may have skipped the detail.
    short, long = (max(1, round(by * side)) for side in sorted((width, height)))
    size = (long, short) if found.width >= found.height else (short, long)
    return scaled(found, size, (0.0, 0.0, float(found.width), float(found.height))), True


def check_sums(data: bytes) -> None:
    """Raise ValueError for what is empty, and for a PNG that its own checksums refute."""
    if not data:
        raise ValueError("the file is empty")
    if data.startswith(png.SIGNATURE) and (damage := png.damage(data)):
        raise ValueError(damage)


# What `fit` does, in words, for whoever reports figures of what came out.
FITTED = "centre crop, bicubic with antialiasing (Pillow), large JPEGs halved by their decoder before"


def fit(image: Image.Image, size: tuple[int, int], channels: int, view: View | None = None) -> UInt8[Tensor, "c h w"]:
    """Scale the short side to fit `size` (height, width), crop the centre, set the channels.

    image: of mode "L" or "RGB". view: what to show instead of the centre. Scaling is bicubic with antialiasing; grey
    from colour is ITU-R 601 luma; an image of the right size keeps its levels.
    """
    height, width = size
    if channels == 1:
        image = _in_mode(image, "L")
    if view is not None:
        image = view.of(image, size)
    elif image.size != (width, height):
        # Cropping and scaling in one step reads only the pixels that stay.
        ratio = min(image.width / width, image.height / height)
        left, top = (image.width - width * ratio) / 2, (image.height - height * ratio) / 2
        image = scaled(image, (width, height), (left, top, left + width * ratio, top + height * ratio))
    return as_tensor(np.array(image), channels)


def as_tensor(pixels: UInt8[np.ndarray, "..."], channels: int) -> UInt8[Tensor, "c h w"]:
    """An array of uint8, "h w" or "h w c", as a tensor."""
    levels = torch.from_numpy(pixels)
    if levels.ndim == 2:
        return repeat(levels, "h w -> c h w", c=channels)
    return rearrange(levels, "h w c -> c h w").contiguous()


def as_array(image: UInt8[Tensor, "c h w"]) -> UInt8[np.ndarray, "..."]:
    """What `as_tensor` takes: "h w" of one channel, else "h w c"."""
    return (image[0] if len(image) == 1 else rearrange(image, "c h w -> h w c").contiguous()).numpy()


def refit(
    image: UInt8[Tensor, "c h w"], size: tuple[int, int], view: View | None = None
) -> UInt8[Tensor, "c height width"]:
    """`fit` of an image in memory; its channels stay, whatever their number."""
    if len(image) in (1, 3):
        return fit(Image.fromarray(as_array(image)), size, len(image), view)
    return torch.cat([refit(plane[None], size, view) for plane in image])


def _skip_detail(image: Image.Image, cover: float) -> None:
    ratio = 2 * cover / min(image.size)
    if ratio < 1:
        image.draft(None, (math.ceil(image.width * ratio), math.ceil(image.height * ratio)))


def _upright(image: Image.Image) -> Image.Image:
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        # Damaged metadata beside sound pixels: take the pixels as they lie.
        return None


def _late_turn(file: BufferedIOBase) -> Image.Transpose | None:
    """What the Exif of a PNG says, wherever it lies: from chunk to chunk, without their contents."""
    file.seek(8)
    while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
        if head[4:] == b"eXIf":
            found = Image.Exif()
            try:
                found.load(file.read(int.from_bytes(head[:4])))
                return _UPRIGHT.get(found.get(_ORIENTATION, 1))
            except Exception:  # as in `_turn`
                return None
        file.seek(int.from_bytes(head[:4]) + 4, 1)
    return None


def _eight_bits(image: Image.Image) -> Image.Image:
    grey = image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")
    if image.mode == "F":
        raise ValueError("its levels are floats, of no known range; expected 8 or 16 bits")
    if image.mode.startswith("I"):
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError("its levels have 32 bits, of no known range; expected 8 or 16 bits")
        return Image.fromarray(((levels.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        image = Image.alpha_composite(white, picture)
    return _in_mode(image, "L" if grey else "RGB")


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)  # which would copy it
