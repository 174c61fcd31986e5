"""A picture of any size as codes, and what each code and each pixel costs.

It is cut into tiles of the model's size, as the codec cuts it, so that the prior has a say in every code and the bits
are those of a file, but for its header.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from priors import Prior
from vqvae import VQVAE
from vqvae.codec.tiles import Tiling
from vqvae.likelihoods.base import Symbols
from vqvae.metrics import psnr

# Of the tiles that are worked on together, numbers whose distributions over 256 levels are held: 128 MiB of them.
_NUMBERS_AT_ONCE = 1 << 17


@dataclass(frozen=True, kw_only=True)
class Coded:
    """A picture, its codes, and their costs.

    Attributes:
        image, decoded: the picture, and what its codes decode to.
        codes: of all tiles side by side.
        code_bits: what each costs under the prior.
        pixel_bits: what each pixel costs beside the codes, its channels together.
    """

    image: UInt8[Tensor, "c h w"]
    decoded: UInt8[Tensor, "c h w"]
    codes: Int[Tensor, "rows columns"]
    code_bits: Float[Tensor, "rows columns"]
    pixel_bits: Float[Tensor, "h w"]

    @property
    def psnr(self) -> float:
        """Of the picture and what was decoded, in dB."""
        return psnr(self.image[None], self.decoded[None]).item()

    @property
    def bits_per_dim(self) -> float:
        """Bits of all codes and pixels for each number that the picture has."""
        return (self.code_bits.sum() + self.pixel_bits.sum()).item() / self.image.numel()


@torch.no_grad()
def coded(
    model: VQVAE,
    prior: Prior,
    image: UInt8[Tensor, "c h w"],
    codes: Tensor | None = None,
    watch: Callable[[int, int], object] | None = None,
) -> Coded:
    """A picture through the model.

    Args:
        image: with the model's channels.
        codes: to decode in place of the picture's own, as `Coded.codes` has them.
        watch: is told how many tiles are done, and how many there are.

    Raises:
        ValueError: codes of another grid, or that the model has not.
    """
    c, h, w = image.shape
    tiling = Tiling(shape=(c, h, w), num_channels=model.config.num_channels, size=model.size)
    rows, columns = tiling.rows_and_columns
    tiles = tiling.split(image)
    at_once = max(1, _NUMBERS_AT_ONCE // model.num_dims)
    if codes is None:
        grids = torch.cat([model.through(prior).encode(part) for part in tiles.split(at_once)])
    else:
        high, wide = model.feature_grid
        if tuple(codes.shape) != (rows * high, columns * wide):
            raise ValueError(f"got codes of {tuple(codes.shape)}, expected {(rows * high, columns * wide)}")
        grids = rearrange(codes, "(r y) (q x) -> (r q) y x", r=rows, q=columns)
    decoded, code_bits, costs = [], [], []
    for grid, tile in zip(grids.split(at_once), tiles.split(at_once), strict=True):
        found = prior.log_conditionals(grid).gather(-1, grid[..., None])[..., 0]
        code_bits.append(-found / math.log(2))
        features = model.decoder(model.vectors(grid))
        decoded.append(model.point_estimate(features))
        costs.append(pixel_bits(model, tile, features).sum(1))
        if watch is not None:
            watch(sum(map(len, costs)), len(tiles))
    together = "(r q) y x -> (r y) (q x)"
    return Coded(
        image=image,
        decoded=tiling.join(torch.cat(decoded)),
        codes=rearrange(grids, together, r=rows),
        code_bits=rearrange(torch.cat(code_bits), together, r=rows),
        pixel_bits=rearrange(torch.cat(costs), together, r=rows)[:h, :w],
    )


def pixel_bits(model: VQVAE, images: UInt8[Tensor, "b c h w"], features: Tensor) -> Float[Tensor, "b c h w"]:
    """What each number of images costs beside their codes, in bits, given the decoder's features."""
    parameters = model.likelihood.symbol_parameters(images, features)
    log_probs = Symbols(parameters.flatten(0, 3), model.likelihood).log_probs()
    found = log_probs.gather(1, images.flatten()[:, None].long()) / -math.log(2)
    return found.view(images.shape)
