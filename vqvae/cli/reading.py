"""The pixels of image files, exactly as they are stored.

`vqvae.data` brings images to what a model is trained on: upright, over white, at one size, with 8 bits. Here nothing is
changed. What 8-bit grey or RGB cannot hold, such as transparency or 16 bits, is refused, and so is what Pillow would
cut down to 8 bits without saying so, and a PNG that its own checksums refute. The picture is what is kept: comments,
colour profiles and how a camera was held are not of it. Of a format that is lossy itself (JPEG), the pixels are those
that it decodes to.
"""

import os
import warnings
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from vqvae.data.decoding import FORMATS, MAX_BYTES, SUFFIXES, check_sums
from vqvae.data.files import names_of, read_bytes

_START_OF_JPEG2000 = b"\xff\x4f\xff\x51"
_MODES = "expected 8-bit grey or RGB, convert it first"


def image_files(paths: Iterable[Path]) -> list[tuple[Path, str]]:
    """Files, and those under folders that are named like images, with the names under which they are kept.

    A folder's files come sorted, and are named by their path from it; hidden ones are passed over, and so are links to
    folders. A folder without images, or one that cannot be read, is in the list itself.
    """
    found: list[tuple[Path, str]] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(_under(path))
            found += [(path / name, _text(name)) for name in inside] if inside else [(path, _text(path.name))]
        else:
            found.append((path, _text(path.name)))
    return found


def _under(folder: Path) -> list[str]:
    unreadable: list[str] = []
    names = [
        name
        for name in names_of(folder, follow=False, unreadable=unreadable.append)
        if os.path.splitext(name)[1].lower() in SUFFIXES
    ]
    return names + unreadable


def _text(name: str) -> str:
    """A name as text, where its bytes are none."""
    return os.fsencode(name).decode("utf-8", "replace")


def read_exactly(path: Path) -> UInt8[Tensor, "c h w"]:
    """The pixels of an image file, 1 or 3 channels.

    Raises:
        ValueError: no image, or one that 8-bit grey or RGB cannot hold; or no regular file, which is not opened.
        OSError: the file cannot be opened.
    """
    if path.is_dir():
        os.listdir(path)  # an OSError where it cannot be read
        raise ValueError("the folder holds no images")
    data = read_bytes(path, MAX_BYTES)
    check_sums(data)
    with warnings.catch_warnings():
        # What Pillow warns of in a file that it can read changes nothing here; its limit of size does.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(BytesIO(data), formats=FORMATS) as image:
                _check(image, data[:4096])
                image.load()
                exact = _grey_or_colour(image)
        except Image.UnidentifiedImageError:
            raise ValueError("not an image in a known format") from None
        except Exception as error:
            # Decoders raise whatever a damaged file drives them to: SyntaxError, struct.error, EOFError, ...
            raise ValueError(f"{error or type(error).__name__}") from error
    pixels = torch.from_numpy(np.array(exact))
    return rearrange(pixels, "h w -> 1 h w" if pixels.ndim == 2 else "h w c -> c h w").contiguous()


def _check(image: Image.Image, head: bytes) -> None:
    """Before the pixels are read: ValueError where Pillow would drop some of their bits, or other pictures."""
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise ValueError(f"it has {getattr(image, 'n_frames', 1)} pictures, expected one")
    for tile in getattr(image, "tile", []):
        raw, most = "", 255
        for arg in tile.args if isinstance(tile.args, tuple) else (tile.args,):
            raw = raw or (arg if isinstance(arg, str) else "")
            most = arg if isinstance(arg, int) and image.format == "PPM" else most
        deep = image.format in ("PNG", "TIFF") and ";16" in raw
        if deep or (image.mode in ("L", "RGB") and most > 255):
            raise ValueError(f"it has over 8 bits a channel; {_MODES}")
        if image.format == "TIFF" and raw.endswith("X"):
            raise ValueError(f"it has channels beside its colours; {_MODES}")
    start = head.find(_START_OF_JPEG2000)
    depths = head[start + 42 : start + 42 + 3 * head[start + 41] : 3] if 0 <= start < len(head) - 41 else b""
    config = head.find(b"av1C")
    av1_is_deep = image.format == "AVIF" and 0 <= config < len(head) - 6 and head[config + 6] & 0x40
    if av1_is_deep or (image.format == "JPEG2000" and any((depth & 127) > 7 for depth in depths)):
        raise ValueError(f"it has over 8 bits a channel; {_MODES}")


def _grey_or_colour(image: Image.Image) -> Image.Image:
    mode = image.mode
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getextrema()[-1] != (255, 255):
            raise ValueError(f"it is transparent in places; {_MODES}")
    elif mode == "1":
        return image.convert("L")
    elif mode not in ("L", "RGB", "P"):
        raise ValueError(f"its pixels are of mode {mode}; {_MODES}")
    if image.mode in ("L", "RGB"):
        return image
    image = image.convert("RGB")
    red, green, blue = image.split()
    # A palette is a way to write colours down; one of greys makes a grey image.
    is_grey = mode not in ("RGB", "RGBA") and red.tobytes() == green.tobytes() == blue.tobytes()
    return red if is_grey else image
