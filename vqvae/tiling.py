"""Images of any size in tiles, so that memory is bounded by the tile and not by the image.

    tiled = Tiled(model, tile=512)
    codes = tiled.encode(image, pad=True)                 # as `model.encode`
    again = tiled.decode(codes, size=image.shape[2:])     # as `model.decode`

An image is cut into even parts of at most `tile` pixels a side. Each is worked on together with a margin around it.

Where the networks look no further than a bounded reach (`Encoder.reach`, `Decoder.reach`), the margin is that reach and
is cut off again: codes and pixels are those of the whole image, up to the order in which a convolution adds up, which
may differ with the size of what it is given, by rounding in float32.

Attention looks at all positions, and a norm over groups takes its mean and variance from all of them. There a tile is
another image than its part of the whole. So the margin, an eighth of a tile, overlaps with the neighbour's: features
before the quantizer, and pixels before they are rounded, go over from one tile's to the next linearly across it, and
there is no seam; but codes and pixels differ from those of the whole, and colours may shift slowly from tile to tile.
"""

import itertools
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from safefolder.arrays import Latents
from vqvae.autoencoder import Autoencoder
from vqvae.levels import Images

# Of a tile, what overlaps with the next where a network's reach has no bound.
_OVERLAP = 8


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A run of positions along one side: what is made of `low` to `high`, of which `start` to `stop` are its own."""

    start: int
    stop: int
    low: int
    high: int


class Tiled:
    """A model that takes images in tiles. In evaluation, without gradients.

    Args:
        tile: pixels a side, of which each tile has at most so many of its own. Memory grows with its square.
        watch: called after each tile with how many are done, and of how many.

    Attributes:
        exact: whether codes and pixels are those of the whole image; see the module.

    Raises:
        ValueError: a tile that is smaller than the networks' reach, or codes that are no positions of a picture.
    """

    def __init__(self, model: Autoencoder, *, tile: int = 512, watch: Callable[[int, int], None] | None = None):
        if tuple(model.grid[:2]) != model.feature_grid:
            raise ValueError(
                f"{type(model).__name__} has codes of several scales, of the whole image each: they have no tiles"
            )
        if not isinstance(tile, numbers.Integral) or isinstance(tile, bool):
            raise ValueError(f"got tile={tile!r}, expected the side of a tile in pixels, such as 512")
        self.model = model
        self.watch = watch
        reach: list[Any] = [model.encoder.reach, model.decoder.reach]
        self.exact = None not in reach
        # In positions of the latents.
        self.tile = tile // model.factor
        margin = tile // model.factor // _OVERLAP
        self.margins = [margin if each is None else math.ceil(each / model.factor) for each in reach]
        least = max(1, *self.margins) if self.exact else _OVERLAP
        if self.tile < least:
            raise ValueError(
                f"got tiles of {tile} pixels, expected at least {least * model.factor}, "
                + ("how far the networks look" if self.exact else "an eighth of which overlaps")
            )

    @torch.no_grad()
    def encode(self, images: Images, *, pad: bool = False) -> Shaped[Tensor, "b *positions"]:
        """Images to their latents, as `Autoencoder.encode`."""
        model = self.model
        with model.evaluating():
            levels = model.to_levels(images, pad=pad)
            grid = (levels.shape[2] // model.factor, levels.shape[3] // model.factor)
            rows, columns = (_parts(num, self.tile, self.margins[0]) for num in grid)

            def of(row: _Part, column: _Part) -> Tensor:
                f = model.factor
                features = model.encoder(levels[:, :, f * row.low : f * row.high, f * column.low : f * column.high])
                return features.permute(0, 3, 1, 2)

            features = self._joined(rows, columns, 1, model.encoder.reach is not None, of).permute(0, 2, 3, 1)
            strips = [model.latents(features[:, row.start : row.stop]) for row in rows]
            return torch.cat(strips, 1)

    @torch.no_grad()
    def decode(self, latents: Latents, *, size: tuple[int, int] | None = None) -> UInt8[Tensor, "b c h w"]:
        """Latents to the likelihood's point estimates, as `Autoencoder.decode`."""
        model = self.model
        bounded = model.decoder.reach is not None
        vectors = model.vectors(latents)
        model.check_crop(size, vectors)
        rows, columns = (_parts(num, self.tile, self.margins[1]) for num in vectors.shape[1:3])

        def of(row: _Part, column: _Part) -> Tensor:
            features = model.decoder(vectors[:, row.low : row.high, column.low : column.high])
            return model.point_estimate(features) if bounded else model.likelihood.point_estimate(features)

        with model.evaluating():
            images = self._joined(rows, columns, model.factor, bounded, of)
        images = images if bounded else images.round().clamp(0, 255).to(torch.uint8)
        return images if size is None else images[..., : size[0], : size[1]]

    def reconstruct(self, images: Images, *, pad: bool = False) -> UInt8[Tensor, "b c h2 w2"]:
        """What `decode(encode(images))` gives, as `Autoencoder.reconstruct`."""
        levels = self.model.check_images(images) if pad else self.model.to_levels(images)
        return self.decode(self.encode(levels, pad=pad), size=(levels.shape[2], levels.shape[3]))

    def _joined(
        self,
        rows: list[_Part],
        columns: list[_Part],
        scale: int,
        bounded: bool,
        of: Callable[[_Part, _Part], Shaped[Tensor, "b c h w"]],
    ) -> Shaped[Tensor, "b c h w"]:
        """What `of` makes of each tile and its margin, `scale` pixels a position, put together."""
        joined: Tensor | None = None
        num = 0
        for row in rows:
            for column in columns:
                made = of(row, column)
                if joined is None:
                    joined = made.new_zeros(*made.shape[:2], scale * rows[-1].stop, scale * columns[-1].stop)
                if bounded:
                    here = joined[..., _own(row, scale), _own(column, scale)]
                    here.copy_(made[..., _inside(row, scale), _inside(column, scale)])
                else:
                    weights = [_ramp(each, all_of, scale, made) for each, all_of in ((row, rows), (column, columns))]
                    made = made * weights[0][:, None] * weights[1]
                    joined[..., scale * row.low : scale * row.high, scale * column.low : scale * column.high] += made
                num += 1
                if self.watch is not None:
                    self.watch(num, len(rows) * len(columns))
        assert joined is not None
        return joined


def _parts(num: int, size: int, margin: int) -> list[_Part]:
    """`num` positions in even parts of at most `size`, each with a margin as far as there are positions."""
    count = math.ceil(num / size)
    edges = [round(at * num / count) for at in range(count + 1)]
    return [
        _Part(start=start, stop=stop, low=max(0, start - margin), high=min(num, stop + margin))
        for start, stop in itertools.pairwise(edges)
    ]


def _own(part: _Part, scale: int) -> slice:
    return slice(scale * part.start, scale * part.stop)


def _inside(part: _Part, scale: int) -> slice:
    """Where a part's own lies in what was made of it with its margin."""
    return slice(scale * (part.start - part.low), scale * (part.stop - part.low))


def _ramp(part: _Part, parts: list[_Part], scale: int, like: Tensor) -> Float[Tensor, " n"]:
    """Weights of what was made of a part, which with those of its neighbours are one everywhere."""
    at = torch.arange(scale * part.low, scale * part.high, device=like.device) + 0.5
    weights = torch.ones_like(at)
    for before, after in itertools.pairwise(parts):
        margin = scale * (before.high - before.stop)
        share = ((at - scale * before.stop) / (2 * margin) + 0.5).clamp(0, 1)
        if after is part:
            weights *= share
        if before is part:
            weights *= 1 - share
    return weights.to(like.dtype)
