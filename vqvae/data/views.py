"""A view of a picture: which part of it fills an image, turned and mirrored, cut out in one resampling.

    box        (left, top, right, bottom) in pixels of the picture, fractions of one too, upright
    degrees    the box is scaled to the image's proportions, turned counter-clockwise about its centre, and the upright
               rectangle inside is what stays; the box is as much larger, so that nothing beyond the picture is seen
    mirrored   left and right change places

Without a turn it is one resampling, bicubic with antialiasing. A turn is a second one, at twice the image's pixels,
where it costs little sharpness, and a third halves them.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

_TURNED_AT = 2
_EDGE = 8


@dataclass(frozen=True)
class View:
    """A part of a picture.

    box: left, top, right, bottom in the picture's pixels.
    degrees: what it is turned by, counter-clockwise, from -45 to 45.
    """

    box: tuple[float, float, float, float]
    degrees: float = 0.0
    mirrored: bool = False

    def of(self, picture: Image.Image, size: tuple[int, int]) -> Image.Image:
        """An image of `size` (height, width)."""
        height, width = size
        if not self.degrees:
            found = scaled(picture, (width, height), self.box)
        else:
            wider, higher = room(self.degrees, size)
            around = (math.ceil(_TURNED_AT * width * wider), math.ceil(_TURNED_AT * height * higher))
            turned = _edged(scaled(picture, around, self.box)).rotate(self.degrees, Image.Resampling.BICUBIC)
            # What a turn leaves, about the centre.
            across, down = around[0] / wider, around[1] / higher
            left, top = (turned.width - across) / 2, (turned.height - down) / 2
            found = scaled(turned, (width, height), (left, top, left + across, top + down))
        return found.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.mirrored else found


def _edged(picture: Image.Image) -> Image.Image:
    """A picture whose outermost pixels go on beyond it, as far as the filters of a turn look at the corners."""
    pixels = np.asarray(picture)
    sides = [(_EDGE, _EDGE), (_EDGE, _EDGE), (0, 0)][: pixels.ndim]
    return Image.fromarray(np.pad(pixels, sides, "edge"))


def room(degrees: float, size: tuple[int, int]) -> tuple[float, float]:
    """How many times wider and higher than an image of `size` (height, width) the box is in which it can be turned."""
    height, width = size
    sine, cosine = abs(math.sin(math.radians(degrees))), math.cos(math.radians(degrees))
    return cosine + sine * height / width, cosine + sine * width / height


def scaled(picture: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float]) -> Image.Image:
    """A box of a picture at `size` (width, height), bicubic with antialiasing; a whole one of that size as it is."""
    left, top, right, bottom = box
    # Rounding may lead past the end by less than a pixel's millionth.
    box = (max(left, 0.0), max(top, 0.0), min(right, picture.width), min(bottom, picture.height))
    if picture.size == size and box == (0, 0, *size):
        return picture
    return picture.resize(size, Image.Resampling.BICUBIC, box=box)
