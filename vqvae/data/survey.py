"""What a set of image files holds at a glance: sizes, and what is no image, by headers; and pictures in two sets.

A glance is bounded, however large the sets are: so many images of a set, spread over all of it by a shuffle, and so
many seconds. All of a smaller set are looked at.

Two files are the same picture where their perceptual hashes (64 bits of the signs of low frequencies: Zauner,
"Implementation and Benchmarking of Perceptual Image Hash Functions", 2010; by the package ImageHash, extra `photos`)
differ in `MAX_BITS` at most, and their grey thumbnails of 16 × 16 by `MAX_LEVELS` on average: another size or quality
of a picture passes, another picture of the same scene does not. What is flat has no such hash and is passed over.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vqvae.data.decoding import read
from vqvae.data.images import EncodedImages, Images, reason
from vqvae.data.permutation import Permutation
from vqvae.data.transformed import TransformedImages

# Images of a set that are looked at, and seconds in which no more are begun.
MOST, SECONDS = 256, 2.0
# Of 64 bits, and of 256 levels.
MAX_BITS, MAX_LEVELS = 6, 4.0
# Standard deviation of levels below which a thumbnail is flat.
_FLAT = 2.0
_THUMBNAIL = 16


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What some images of a set are.

    looked_at: how many. smallest, largest: (height, width) by area; None where none is an image.
    unusable: (name, reason) of those that are no images by their headers, or can't be had.
    """

    looked_at: int
    smallest: tuple[int, int] | None
    largest: tuple[int, int] | None
    unusable: tuple[tuple[str, str], ...] = ()


def survey(images: Images, *, most: int = MOST, seconds: float = SECONDS) -> Survey:
    """What a set's images are at their source, by their headers."""
    sizes, unusable = [], []
    for index in _some(len(images), most, seconds):
        try:
            sizes.append(images.original_size(index))
        except (OSError, ValueError) as error:
            unusable.append((images.key(index), reason(error)))
    by_area = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    return Survey(
        looked_at=len(sizes) + len(unusable),
        smallest=by_area[0] if by_area else None,
        largest=by_area[-1] if by_area else None,
        unusable=tuple(unusable),
    )


def same_pictures(
    train: Images, test: Images, *, most: int = MOST, seconds: float = SECONDS
) -> list[tuple[str, str]] | None:
    """Names of test images each with a training image that is the same picture; None without the package ImageHash.

    Sets in memory are not looked at.
    """
    files = [found for images in (train, test) if (found := _files(images)) is not None]
    if len(files) < 2:
        return []
    try:
        import imagehash
    except ImportError:
        return None
    (keys, bits, levels), (test_keys, test_bits, test_levels) = (
        _seen(images, imagehash, most, seconds) for images in files
    )
    found = []
    for key, own_bits, own_levels in zip(test_keys, test_bits, test_levels, strict=True):
        near = np.flatnonzero((bits != own_bits).sum(1) <= MAX_BITS)
        near = near[np.abs(levels[near] - own_levels).mean(1) <= MAX_LEVELS]
        if len(near):
            found.append((key, keys[near[0]]))
    return found


def _files(images: Images) -> EncodedImages | None:
    """The image files of a set, whatever is done with them; None where it has none."""
    while isinstance(images, TransformedImages):
        images = images.images
    return images if isinstance(images, EncodedImages) else None


def _seen(images: EncodedImages, imagehash: Any, most: int, seconds: float) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names, bits and thumbnails of some images."""
    keys: list[str] = []
    bits, levels = [np.zeros((0, 64), bool)], [np.zeros((0, _THUMBNAIL**2))]
    for index in _some(len(images), most, seconds):
        try:
            picture = read(images._encoded(index), cover=2 * _THUMBNAIL).convert("L")
        except (OSError, ValueError):
            continue
        small = picture.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BICUBIC)
        thumbnail = np.asarray(small, np.float64).reshape(1, -1)
        if thumbnail.std() >= _FLAT:
            keys.append(images.key(index))
            bits.append(imagehash.phash(picture).hash.reshape(1, -1))
            levels.append(thumbnail)
    return keys, np.concatenate(bits), np.concatenate(levels)


def _some(num: int, most: int, seconds: float) -> Iterator[int]:
    """Images of a set of so many, spread over it; at least one."""
    end = time.monotonic() + seconds
    for number, index in enumerate(Permutation(num, (0,))(np.arange(min(num, most))).tolist()):
        if number and time.monotonic() > end:
            return
        yield index
