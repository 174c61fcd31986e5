"""Training images varied by random crops, flips and turns, as a function of (seed, epoch, image) alone.

    batches(images, 64, seed=0, augment=Augment(crop=0.5, flip=True))

In epoch e (`vqvae.data.batching`) image i of a set is shown by numbers u_1 ... u_24, uniform in [0, 1), that
numpy's SeedSequence makes of (seed, e, i). Nothing else enters: neither the step's place in its batch, nor the process
that decodes, nor what was sampled before. So a run that is resumed shows what an uninterrupted one does, whatever the
number of workers and ranks.

A crop is that of torchvision's RandomResizedCrop: of a W × H picture,

    area    =  W H · U(crop, 1)
    aspect  =  that of the image · exp U(ln least, ln greatest)          of `ratio`

ten are tried, and the first that fits lies anywhere in the picture, with equal probability. Where none does, the
middle is taken, as large as it can be: as wide or high as `ratio` allows. (Szegedy et al., "Going Deeper with
Convolutions", 2015.) It is cut out of the picture as it was decoded and comes to the image's size in the same
resampling.

Pictures much larger than any crop needs are first scaled to `MARGIN` times that; they differ from one resampling by
less than the rounding to 8 bits (52 dB on photographs). That is done whether or not a cache holds them, so a cache
changes no bit.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from safefolder.options import Options
from vqvae.data.decoding import refit
from vqvae.data.views import View, room

# Sides of the scaled picture, relative to what the smallest crop needs. Of one resampling against two PSNR is 41 to 43
# dB without a margin, 51 to 53 with this one, 56 with 2 (27 photographs, crops to 64 and 256 pixels).
MARGIN = 1.5
# Pictures are scaled down first where both sides halve at least.
LARGE = 0.5
MAX_DEGREES = 45.0

_TRIES = 10
_NUMBERS = 2 * _TRIES + 4
# What tells these numbers from others that are made of the same seed.
_VIEWS, _TRANSFORMS = 1, 2


@dataclass(frozen=True, kw_only=True)
class Augment(Options):
    """How training images are varied each time that they are seen; as it stands, not at all."""

    crop: float = 1.0
    """smallest share of a picture's area that a random crop takes, 0.5 is usual for photographs; 1 is the middle of the
    picture, always"""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """least and greatest width over height of a random crop, relative to the images' own; 1 1 stretches nothing"""
    flip: bool = False
    """mirror half of the images, at random"""
    rotate: float = 0.0
    """most degrees that images are turned by, to either side; a turned crop is smaller, so that none shows an edge"""

    def __post_init__(self) -> None:
        least, greatest = self.ratio
        if not 0 < self.crop <= 1:
            raise ValueError(
                f"got crop={self.crop:g}; expected more than 0 and at most 1, the smallest share of a picture's area "
                "that a crop takes"
            )
        if not 1 / 16 <= least <= 1 <= greatest <= 16:
            raise ValueError(
                f"got ratio={least:g} {greatest:g}; expected two numbers, from 1/16 to 1 and from 1 to 16: the least "
                "and the greatest width over height of a crop, relative to that of the images"
            )
        if not 0 <= self.rotate <= MAX_DEGREES:
            raise ValueError(f"got rotate={self.rotate:g}; expected 0 to {MAX_DEGREES:g} degrees")

    @property
    def moves(self) -> bool:
        """Whether images show other parts of their pictures than the middle."""
        return self.crop < 1 or self.rotate > 0

    @property
    def is_on(self) -> bool:
        return self.moves or self.flip

    def scale(self, width: int, height: int, size: tuple[int, int]) -> float:
        """What a picture can be scaled by so that images of `size` (height, width) lose nothing; of its sides in either
        order."""
        rows, columns = size
        stretch = max(1 / self.ratio[0], self.ratio[1])
        crop = math.sqrt(rows * columns * stretch / (self.crop * width * height)) if self.crop < 1 else 0.0
        return MARGIN * max(max(size) / min(width, height), crop) * max(room(self.rotate, size))

    def view(self, numbers: np.ndarray, width: int, height: int, size: tuple[int, int]) -> View:
        """What an image of `size` (height, width) shows of a picture.

        numbers: `Variation.numbers` of the image.
        """
        aspect = size[1] / size[0]
        x, y, mirror, turn = numbers[2 * _TRIES :].tolist()
        if self.crop < 1:
            across, down = self._crop(numbers, width, height, aspect)
        else:
            across, down = _largest(width, height, aspect)
            x = y = 0.5
        degrees = self.rotate * (2 * turn - 1)
        if degrees:
            wider, higher = room(degrees, size)
            fitting = min(1.0, width / (across * wider), height / (down * higher))
            across, down = across * wider * fitting, down * higher * fitting
        left, top = (width - across) * x, (height - down) * y
        return View((left, top, left + across, top + down), degrees, self.flip and mirror < 0.5)

    def _crop(self, numbers: np.ndarray, width: int, height: int, aspect: float) -> tuple[float, float]:
        """Width and height of a crop in the picture's pixels."""
        least, greatest = map(math.log, self.ratio)
        for share, shape in numbers[: 2 * _TRIES].reshape(_TRIES, 2).tolist():
            area = width * height * (self.crop + (1 - self.crop) * share)
            ratio = aspect * math.exp(least + (greatest - least) * shape)
            across, down = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if across <= width and down <= height:
                return across, down
        nearest = min(max(width / height, aspect * self.ratio[0]), aspect * self.ratio[1])
        return _largest(width, height, nearest)


def _largest(width: int, height: int, aspect: float) -> tuple[float, float]:
    """The largest part of a picture with an aspect ratio, width and height."""
    return min(float(width), height * aspect), min(float(height), width / aspect)


@dataclass(frozen=True, kw_only=True)
class Variation:
    """How the images of a set are varied in one epoch."""

    augment: Augment
    seed: int
    epoch: int

    def numbers(self, index: int) -> np.ndarray:
        """What decides on image `index`: 24 float64 in [0, 1)."""
        words = self._words(index, _VIEWS, _NUMBERS)
        return (words >> np.uint64(11)) * 2.0**-53

    def torch_seed(self, index: int) -> int:
        """What torch's generator starts from when image `index` is transformed; 63 bits."""
        return int(self._words(index, _TRANSFORMS, 1)[0] >> np.uint64(1))

    def _words(self, index: int, purpose: int, num: int) -> np.ndarray:
        # Its algorithm is part of numpy's promises; that of a Generator's floats is not.
        return np.random.SeedSequence((self.seed, self.epoch, index, purpose)).generate_state(num, np.uint64)

    def view(self, index: int, width: int, height: int, size: tuple[int, int]) -> View:
        """What image `index` shows, at `size` (height, width), of its picture."""
        return self.augment.view(self.numbers(index), width, height, size)

    def shown(self, image: UInt8[Tensor, "c h w"], index: int) -> UInt8[Tensor, "c h w"]:
        """Image `index` of a set in memory, which is its own picture."""
        if not self.augment.moves:
            return self.mirrored(image, index)
        _, height, width = image.shape
        return refit(image, (height, width), self.view(index, width, height, (height, width)))

    def mirrored(self, image: UInt8[Tensor, "c h w"], index: int) -> UInt8[Tensor, "c h w"]:
        """Image `index`, whose part of the picture is decided, mirrored or not."""
        if not self.augment.flip:
            return image
        _, height, width = image.shape
        return image.flip(-1) if self.view(index, width, height, (height, width)).mirrored else image
