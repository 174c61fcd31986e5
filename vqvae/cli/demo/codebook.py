"""What each code of a codebook looks like, how often it is used, and which ones are near."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import UInt8
from torch import Tensor

from vqvae import VQVAE
from vqvae.evaluation import images_at_once

# Positions on each side of a code that are shown with it.
_MARGIN = 1


class CodebookViews:
    """Codes as they stand in pictures.

    Args:
        model: with a grid of codes, one for each position of a picture.
        images: pictures in which they are looked for.
        encode: pictures to codes.

    Attributes:
        counts: how often each code is used in the images.
        ranked: all codes, the most used first.
    """

    @torch.no_grad()
    def __init__(self, model: VQVAE, images: UInt8[Tensor, "b c h w"], encode: Callable[[Tensor], Tensor]):
        self.model = model
        parts = images.split(images_at_once(*model.size))
        self.codes = torch.cat([encode(part) for part in parts])
        self.decoded = torch.cat([model.decode(part) for part in self.codes.split(images_at_once(*model.size))])
        self.counts = self.codes.flatten().bincount(minlength=model.num_codes)
        self.ranked = self.counts.argsort(descending=True, stable=True)
        height, width = model.size
        self.cell = height // model.feature_grid[0], width // model.feature_grid[1]

    def in_context(self, code: int, num: int = 8) -> list[UInt8[Tensor, "c y x"]]:
        """What was decoded around some of the places where a code is used; of one that nobody uses, what it gives all
        over a picture."""
        found = (self.codes == code).nonzero()
        if not len(found):
            picture = self.model.decode(torch.full((1, *self.model.grid), code))[0]
            return [self._around(picture, self.model.feature_grid[0] // 2, self.model.feature_grid[1] // 2)]
        chosen = found[torch.linspace(0, len(found) - 1, min(num, len(found)), device="cpu").long()]
        return [self._around(self.decoded[b], row, column) for b, row, column in chosen.tolist()]

    def _around(self, picture: UInt8[Tensor, "c h w"], row: int, column: int) -> UInt8[Tensor, "c y x"]:
        high, wide = self.cell
        edges = (_MARGIN * wide, _MARGIN * wide, _MARGIN * high, _MARGIN * high)
        padded = torch.nn.functional.pad(picture[None].float(), edges, mode="replicate")[0].to(torch.uint8)
        top, left = row * high, column * wide
        return padded[:, top : top + (2 * _MARGIN + 1) * high, left : left + (2 * _MARGIN + 1) * wide]

    def neighbours(self, code: int, num: int = 8) -> list[int]:
        """The codes whose vectors are nearest to a code's own, nearest first."""
        vectors = self.vectors()
        distances = (vectors - vectors[code]).square().sum(1)
        distances[code] = torch.inf
        return distances.argsort()[:num].tolist()

    def vectors(self) -> Tensor:
        """z_q of each code, "k d"."""
        with torch.no_grad():
            return self.model.quantizer.decode(torch.arange(self.model.num_codes)[:, None])[:, 0].float()

    def atlas(self, codes: Sequence[int]) -> UInt8[Tensor, "n c y x"]:
        """The mean of what was decoded at a code's position, for each of some codes."""
        return torch.stack([self._mean(code) for code in codes])

    def _mean(self, code: int) -> UInt8[Tensor, "c y x"]:
        parts = self.in_context(code, 32)
        (high, wide), margin = self.cell, _MARGIN
        inner = [part[:, margin * high : (margin + 1) * high, margin * wide : (margin + 1) * wide] for part in parts]
        return torch.stack(inner).float().mean(0).round().to(torch.uint8)
