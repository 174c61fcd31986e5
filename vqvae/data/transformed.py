"""A set whose images go through a transform, as torchvision's v2 has them, or any function of a uint8 tensor.

    load_images("photos", size=96, channels=3, transform=v2.RandomCrop(64)).shape         # (3, 64, 64)

A transform gets each image as uint8 "c h w", scaled and cropped as the set is without it, and gives uint8 "c h w" back,
of one shape for all images: that of the first is the set's. `images[0]` samples from torch's global generator, as
torchvision's own sets do. In `batches` torch's generator starts, for each image, from a number that (seed, epoch,
image) gives, and is put back afterwards; so workers, ranks and resuming change nothing. Python's `random` and numpy are
left alone: what samples from them, as no transform of v2 does, does not repeat itself.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vqvae.data.augmentation import Variation
from vqvae.data.batch import Batch, places
from vqvae.data.cache import Cache
from vqvae.data.images import FIRST, Images

Transform = Callable[[Tensor], Tensor]


class TransformedImages(Images):
    """The images of a set, each as a transform gives it.

    Raises ValueError where the transform gives something else than uint8 "c h w" of one shape, or fails.
    """

    uses_workers = True

    def __init__(self, images: Images, transform: Transform):
        if not callable(transform):
            raise ValueError(f"got transform={transform!r}; expected a function of a tensor, as torchvision's v2 has")
        self.images, self.transform = images, transform
        self.num_classes, self.class_names, self.name = images.num_classes, images.class_names, images.name
        self.split, self.labels, self.label_note = images.split, images.labels, images.label_note
        self.shape = self._first_shape()

    def _first_shape(self) -> tuple[int, int, int]:
        with _sampled_from(0):
            for index in range(min(len(self.images), FIRST)):
                for image in self.images.__getitems__([index]).images:
                    channels, height, width = self._given(image, self.images.key(index)).shape
                    return channels, height, width
        raise ValueError(f"none of the first {FIRST} images of {self.name} can be read")

    def _given(self, image: Tensor, key: str) -> Tensor:
        """What the transform makes of an image."""
        try:
            found: Any = self.transform(image)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(
                f"the transform failed on {key}, a tensor of uint8 {tuple(image.shape)} ({reason})"
            ) from error
        shape = getattr(self, "shape", None)
        fits = isinstance(found, Tensor) and found.dtype == torch.uint8 and found.ndim == 3
        if not fits or (shape is not None and found.shape != shape):
            got = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            expected = "c h w" if shape is None else f"{tuple(shape)}, as of the first image"
            raise ValueError(
                f"got {got} from the transform of {self.name} for {key}; expected uint8 {expected}: leave out what "
                "makes floats or normalises, and end with a crop or a resize to one size"
            )
        return found.as_subclass(Tensor)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> Batch:
        return self._batch(indices, self.images.__getitems__)

    def read(self, indices: Sequence[int] | np.ndarray) -> Batch:
        return self._batch(indices, self.images.read)

    def varied(self, indices: Sequence[int] | np.ndarray, variation: Variation) -> Batch:
        return self._batch(indices, lambda some: self.images.varied(some, variation), variation)

    def _batch(
        self,
        indices: Sequence[int] | np.ndarray,
        of: Callable[[list[int]], Batch],
        variation: Variation | None = None,
    ) -> Batch:
        parts = []
        for index in places(indices, len(self)).tolist():
            part = of([index])
            seeded = contextlib.nullcontext() if variation is None else _sampled_from(variation.torch_seed(index))
            with seeded:
                # One, or none that can be read.
                given = [self._given(image, self.key(index)) for image in part.images]
            parts.append(replace(part, images=torch.stack(given) if given else self._none()))
        return Batch.joined(parts) if parts else Batch(self._none(), None if self.labels is None else self.labels[:0])

    def _none(self) -> Tensor:
        return torch.empty((0, *self.shape), dtype=torch.uint8)

    def cached(self, cache: Cache) -> Images:
        return TransformedImages(self.images.cached(cache), self.transform)

    def original_size(self, index: int) -> tuple[int, int]:
        return self.images.original_size(index)

    def original(self, index: int) -> Tensor:
        return self.images.original(index)

    def key(self, index: int) -> str:
        return self.images.key(index)

    def _stamps(self, indices: range, times: bool) -> Iterator[bytes]:
        transform = self.transform
        kind = transform if isinstance(transform, type) or hasattr(transform, "__qualname__") else type(transform)
        # Modules say their options; of other objects the address would be another each time.
        options = repr(transform) if isinstance(transform, nn.Module) else ""
        yield f"{kind.__module__}.{kind.__qualname__} {options}".encode()
        yield from self.images._stamps(indices, times)


@contextlib.contextmanager
def _sampled_from(seed: int) -> Iterator[None]:
    """torch's generator of the CPU starts from `seed` in the block, and is put back after it."""
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)
