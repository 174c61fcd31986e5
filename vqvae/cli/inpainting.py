"""An image with a part of it to be sampled anew, as a prior over codes takes it.

The image is brought to the model's size as `vqvae.data` does it: upright, scaled until its short side fits, the middle
cropped. So is the mask, by itself: one of the image's shape lies over the same pixels, and so does one of the model's
own size. It is white (over 127) where to sample. Nothing masked is lost on the way: a pixel of the model's is masked if
any of the mask's own pixels under it is, and a position of the code grid if any of its pixels is.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import reduce
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from vqvae import Autoencoder
from vqvae.data.decoding import decode, read

_GREY = 128


@dataclass(frozen=True, kw_only=True)
class Inpainting:
    """What to sample, and around what.

    Attributes:
        image: at the model's size.
        mask: the pixels to sample anew.
        codes: of the whole image. Those beside the mask have seen a little of what is under it.
        positions: the codes to sample anew.
    """

    image: UInt8[Tensor, "c h w"]
    mask: Bool[Tensor, "h w"]
    codes: Int[Tensor, "*grid"]
    positions: Bool[Tensor, "*grid"]

    def shown(self) -> UInt8[Tensor, "1 c h w"]:
        """The image, grey where it is to be sampled anew."""
        return self.image.masked_fill(self.mask, _GREY)[None]

    def given(self, num: int) -> dict[str, Tensor]:
        """The arguments `given` and `mask` of `Prior.sample`, for `num` grids."""
        return {"given": self.codes.expand(num, *self.codes.shape), "mask": self.positions}

    def put_back(self, sampled: UInt8[Tensor, "b c h w"]) -> UInt8[Tensor, "b c h w"]:
        """Images with the pixels outside the mask as they are in the image."""
        return torch.where(self.mask, sampled, self.image)


def read_inpainting(
    image: Path, mask: Path, model: Autoencoder, encode: Callable[[UInt8[Tensor, "b c h w"]], Tensor]
) -> Inpainting:
    """An image file and the file of its mask.

    Args:
        encode: images to codes of the model's grid.

    Raises:
        ValueError: no such file, or no image; a mask without white; or a model whose codes are no positions of a
            picture.
    """
    grid, (rows, columns) = model.grid, model.feature_grid
    if tuple(grid[:2]) != (rows, columns):
        raise ValueError(
            f"the codes of this model are a row of {math.prod(grid)} over several scales, so that none is a "
            "position of the picture; inpainting needs a model with a grid of codes, of any quantizer but "
            "MultiScaleQuantizer"
        )
    pixels = _opened("--inpaint", image, decode, model.size, model.config.num_channels)
    masked = _opened("--mask", mask, _read_mask, model.size)
    if not masked.any():
        raise ValueError(
            f"nothing to sample: {mask} has no white (over 127) in what is left of it at the model's size; paint white "
            "what to sample anew"
        )
    cells = reduce(masked.float(), "(h p) (w q) -> h w", "max", h=rows, w=columns) > 0
    positions = cells.reshape(rows, columns, *[1] * (len(grid) - 2)).expand(grid)
    return Inpainting(image=pixels, mask=masked, codes=encode(pixels[None])[0].cpu(), positions=positions)


def _opened(option: str, path: Path, reader: Callable[..., Any], *args: Any) -> Any:
    if not path.is_file():
        raise ValueError(f"no file at {path}; name an image with {option}")
    try:
        return reader(path, *args)
    except ValueError as error:
        raise ValueError(f"{option} {path}: {error}") from error


def _read_mask(path: Path, size: tuple[int, int]) -> Bool[Tensor, "h w"]:
    levels = read(path).convert("L")
    # The part that `fit` keeps of an image; a pixel that it keeps half of counts.
    height, width = levels.height, levels.width
    if height * size[1] < width * size[0]:
        width = height * size[1] / size[0]
    else:
        height = width * size[0] / size[1]
    left, top = (levels.width - width) / 2, (levels.height - height) / 2
    box = (math.floor(left), math.floor(top), math.ceil(left + width), math.ceil(top + height))
    kept = levels.crop(box)
    white = torch.from_numpy(np.array(kept)) > 127
    return F.adaptive_max_pool2d(white[None].float(), size)[0] > 0
