"""Pictures of codes, of bits and of differences, as arrays for a page: uint8 "h w 3"."""

import math

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int, UInt8
from torch import Tensor

Picture = np.ndarray
# About as many pixels a side as a picture has on the page.
SIDE = 336


def enlarged(image: UInt8[Tensor, "c h w"], side: int = SIDE) -> Picture:
    """An image whose pixels can be seen: each as a square, where it is small."""
    by = max(1, math.ceil(side / max(image.shape[1:])))
    return repeat(image.expand(3, -1, -1), "c h w -> (h a) (w b) c", a=by, b=by).contiguous().numpy()


def difference(image: UInt8[Tensor, "c h w"], decoded: UInt8[Tensor, "c h w"]) -> Picture:
    """How much lighter or darker the second is: grey where they are equal."""
    return enlarged(((decoded.int() - image.int()) // 2 + 128).clamp(0, 255).to(torch.uint8))


def heat(values: Float[Tensor, "h w"], side: int = SIDE) -> Picture:
    """From black, 0, over red to light yellow, the largest."""
    from matplotlib import colormaps

    levels = (values / values.max().clamp_min(1e-6)).clamp(0, 1).cpu().numpy()
    colours = torch.from_numpy(colormaps["magma"](levels, bytes=True)[..., :3])
    return enlarged(rearrange(colours, "h w c -> c h w"), side)


def colours_of(num_codes: int) -> UInt8[Tensor, "k 3"]:
    """A colour for each code. Neighbouring numbers of codes mean nothing to each other, so they are by chance."""
    colours = torch.rand(num_codes, 3, generator=torch.Generator().manual_seed(0), device="cpu") * 0.85 + 0.1
    return (255 * colours).to(torch.uint8)


def code_map(codes: Int[Tensor, "h w"], num_codes: int) -> Picture:
    """Each code as a square of its colour."""
    return enlarged(rearrange(colours_of(num_codes)[codes], "h w c -> c h w"))


def marked(picture: Picture, grid: tuple[int, int], position: tuple[int, int] | None) -> Picture:
    """A picture with a frame around one position of its grid."""
    if position is None:
        return picture
    found, (high, wide) = picture.copy(), (picture.shape[0] / grid[0], picture.shape[1] / grid[1])
    top, left = round(position[0] * high), round(position[1] * wide)
    bottom, right = round((position[0] + 1) * high), round((position[1] + 1) * wide)
    thick = max(1, round(min(high, wide) / 10))
    frame = found[top:bottom, left:right]
    inside = frame[thick:-thick, thick:-thick].copy()
    frame[:] = (230, 60, 60)
    frame[thick:-thick, thick:-thick] = inside
    return found
