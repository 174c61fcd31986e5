"""Files that somebody dropped on the page, read and checked before anything is decoded."""

from pathlib import Path

from jaxtyping import UInt8
from torch import Tensor

from vqvae.data.decoding import fit, read, size_of

# Of a file, and of its pixels, as its header states them.
MOST_BYTES = 20 << 20
MOST_PIXELS = 50_000_000
# Larger pictures are scaled down to this side: a page is to answer in seconds.
MOST_SIDE = 448
_LEAST_SIDE = 4


def read_picture(path: str | Path | None, channels: int, size: tuple[int, int] | None = None) -> UInt8[Tensor, "c h w"]:
    """A picture file, upright, with so many channels; of an animation the first frame.

    Args:
        size: to scale and crop to; else it is as large as it is, scaled down to at most `MOST_SIDE`.

    Raises:
        ValueError: no file, no picture, or one that is too large; in words for whoever dropped it.
    """
    if path is None:
        raise ValueError("there is no picture yet: drop one, or click an example")
    path = Path(path)
    if not path.is_file():
        raise ValueError("the picture is not there any more: drop it again")
    if (num_bytes := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"the file has {num_bytes / 2**20:.0f} MB, expected at most {MOST_BYTES >> 20}")
    if not num_bytes:
        raise ValueError("the file is empty")
    try:
        height, width = size_of(path)
        if height * width > MOST_PIXELS:
            raise ValueError(
                f"it has {height * width / 1e6:.0f} million pixels, expected at most {MOST_PIXELS // 10**6} million"
            )
        if min(height, width) < _LEAST_SIDE or max(height, width) > 100 * min(height, width):
            raise ValueError(f"it is {width}x{height} pixels, which is a line; expected a picture")
        ratio = MOST_SIDE / max(height, width)
        if size is None:
            size = (height, width) if ratio >= 1 else (max(1, round(height * ratio)), max(1, round(width * ratio)))
        return fit(read(path, cover=max(size)), size, channels)
    except (ValueError, OSError) as error:
        # The place of an upload says nothing to whoever dropped it.
        reason = str(error).replace(str(path), "the file")
        if "decompression bomb" in reason:  # Pillow's own limit, which is a little higher
            reason = f"it has more than {MOST_PIXELS // 10**6} million pixels"
        raise ValueError(f"this cannot be read as a picture: {reason}") from error
