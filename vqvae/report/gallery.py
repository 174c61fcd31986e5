"""What a page shows of single images, collected while a test set is evaluated."""

import io
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from vqvae.evaluation import ImageBounds

# Pixels of the first images and of their reconstructions that are kept, so that a page of photographs stays small.
MOST_PIXELS = 2**18
MOST_FIRST = 16
# How many images are the best and the worst.
EXTREMES = 10


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Images that were picked, with what they cost in nats.

    Attributes:
        index: which they are of those that were evaluated.
        labels: -1 where an image has none.
    """

    images: UInt8[Tensor, "n c h w"]
    reconstructions: UInt8[Tensor, "n c h w"]
    index: Int[Tensor, " n"]
    labels: Int[Tensor, " n"]
    nats: Float[Tensor, " n"]
    psnr: Float[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: Tensor | slice) -> "Shown":
        return Shown(**{name: each[rows] for name, each in vars(self).items()})

    def joined(self, other: "Shown") -> "Shown":
        """These and then those."""
        return Shown(**{name: torch.cat([each, getattr(other, name)]) for name, each in vars(self).items()})


class Gallery:
    """The first images, those that cost least and most, and what every one costs.

    In memory it keeps three numbers an image, and the pictures of those that are shown. `add` is for the
    `observe_bounds` of `vqvae.evaluation.evaluate`.
    """

    def __init__(self) -> None:
        self._first: Shown | None = None
        self._best: Shown | None = None
        self._worst: Shown | None = None
        self._terms: list[Tensor] = []
        self._num = 0

    def add(self, seen: ImageBounds) -> None:
        """Count a batch."""
        bound = seen.bound
        rates = (bound.rate - bound.entropy).double().cpu()
        distortions = bound.distortion.double().cpu()
        self._terms.append(torch.stack([rates, distortions, seen.psnr.double().cpu()]))
        num = len(rates)
        batch = Shown(
            images=seen.images.cpu(),
            reconstructions=seen.reconstructions.cpu(),
            index=torch.arange(self._num, self._num + num),
            labels=torch.full((num,), -1) if seen.labels is None else seen.labels.long().cpu(),
            nats=rates + distortions,
            psnr=seen.psnr.double().cpu(),
        )
        self._num += num
        num_pixels = batch.images[0, 0].numel()
        most = min(MOST_FIRST, max(4, MOST_PIXELS // (2 * num_pixels)))
        if self._first is None or len(self._first) < most:
            self._first = batch[:most] if self._first is None else self._first.joined(batch)[:most]
        known = batch[~batch.nats.isnan()]
        self._best = self._extremes(self._best, known, descending=False)
        self._worst = self._extremes(self._worst, known, descending=True)

    @staticmethod
    def _extremes(before: Shown | None, batch: Shown, *, descending: bool) -> Shown:
        found = batch if before is None else before.joined(batch)
        # Of equals those that came first.
        return found[found.nats.sort(stable=True, descending=descending).indices[:EXTREMES]]

    def __len__(self) -> int:
        return self._num

    @property
    def first(self) -> Shown:
        assert self._first is not None
        return self._first

    @property
    def best(self) -> Shown:
        """Those that cost least; the cheapest comes first."""
        assert self._best is not None
        return self._best

    @property
    def worst(self) -> Shown:
        """Those that cost most; the dearest comes first."""
        assert self._worst is not None
        return self._worst

    @property
    def rates(self) -> Float[Tensor, " n"]:
        """What the latents of each image cost, in nats, less the entropy of a posterior."""
        return torch.cat(self._terms, 1)[0]

    @property
    def distortions(self) -> Float[Tensor, " n"]:
        """What the pixels of each image cost, in nats."""
        return torch.cat(self._terms, 1)[1]


def thumbnail(image: UInt8[Tensor, "c h w"], side: int) -> bytes:
    """An image as PNG, shrunk to so many pixels a side where it is larger."""
    return small_png(_opened(image), side)


def small_png(opened: Image.Image, side: int) -> bytes:
    """A picture as PNG, shrunk so that its longer side has at most so many pixels."""
    factor = side / max(opened.size)
    if factor < 1:
        size = (max(1, round(opened.width * factor)), max(1, round(opened.height * factor)))
        opened = opened.resize(size, Image.Resampling.BOX)
    buffer = io.BytesIO()
    opened.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def is_png(data: bytes) -> bool:
    """Whether a picture can be read, as one that lay in a folder."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as opened:
            opened.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False
    return True


def of_at_most(png: bytes, num_bytes: int) -> bytes:
    """A picture of no more bytes: shrunk where it has more."""
    with Image.open(io.BytesIO(png)) as opened:
        opened.load()
        side = max(opened.size)
        while len(png) > num_bytes and side > 64:
            side = side * 3 // 4
            png = small_png(opened.convert("RGB"), side)
    return png


def _opened(image: Tensor) -> Image.Image:
    pixels = rearrange(image, "c h w -> h w c").contiguous().numpy()
    if len(image) == 1:
        return Image.fromarray(pixels[..., 0])
    if len(image) == 3:
        return Image.fromarray(pixels)
    raise ValueError(f"a page shows images of 1 or 3 channels, got {len(image)}")
