"""Images of any size as tiles: what a model of one size and one number of channels can code.

An image is cut into tiles of the model's size from its upper left corner on; where the last ones reach beyond it, its
border is repeated. Tiles come row by row, and are cropped back. A model of grey images takes the channels of a colour
image one after another, each cut into tiles; a model of colour takes a grey image three times over and gives it back
once.
"""

import functools
import math
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import UInt8
from torch import Tensor
from torch.nn import functional as F

# An image of more sides or channels than this is none.
MAX_SIDE = 65_535
MAX_CHANNELS = 4


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How an image "c h w" is cut for a model of `num_channels` and of images of `size`, their height and width.

    Raises:
        ValueError: no size of an image, or channels that the model cannot take.
    """

    shape: tuple[int, int, int]
    num_channels: int
    size: tuple[int, int]

    def __post_init__(self) -> None:
        c, h, w = self.shape
        if not (1 <= h <= MAX_SIDE and 1 <= w <= MAX_SIDE and 1 <= c <= MAX_CHANNELS):
            raise ValueError(
                f"got an image of {c} channels and {h} x {w} pixels, expected 1 to {MAX_CHANNELS} channels and sides "
                f"from 1 to {MAX_SIDE}"
            )
        if self.num_channels != 1 and c not in (1, self.num_channels):
            raise ValueError(
                f"got an image of {c} channels for a model of {self.num_channels}, expected {self.num_channels} or 1; "
                "convert it, or take a model of grey images"
            )

    @property
    def planes(self) -> int:
        """How many times the model goes over the image."""
        return self.shape[0] if self.num_channels == 1 else 1

    @functools.cached_property
    def rows_and_columns(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return math.ceil(self.shape[1] / self.size[0]), math.ceil(self.shape[2] / self.size[1])

    @functools.cached_property
    def num_tiles(self) -> int:
        return self.planes * math.prod(self.rows_and_columns)

    @property
    def num_padded(self) -> int:
        """Of the pixels of all tiles, which are padded."""
        return self.num_tiles * self.num_channels * math.prod(self.size)

    def split(self, image: UInt8[Tensor, "c h w"]) -> UInt8[Tensor, "t cm y x"]:
        """The image's tiles."""
        _, h, w = self.shape
        (rows, columns), (y, x) = self.rows_and_columns, self.size
        tall, wide = rows * y - h, columns * x - w
        # Padding of integers is not implemented for repeated borders, and float32 holds them exactly.
        padded = F.pad(image[None].float(), (0, wide, 0, tall), mode="replicate")[0].to(torch.uint8)
        if self.num_channels != 1 and self.shape[0] == 1:
            padded = padded.expand(self.num_channels, -1, -1)
        return rearrange(padded, "(p c) (r y) (q x) -> (p r q) c y x", c=self.num_channels, y=y, x=x).contiguous()

    def join(self, tiles: UInt8[Tensor, "t cm y x"]) -> UInt8[Tensor, "c h w"]:
        """The image that these are the tiles of."""
        c, h, w = self.shape
        rows, columns = self.rows_and_columns
        image = rearrange(tiles, "(p r q) c y x -> (p c) (r y) (q x)", r=rows, q=columns)
        return image[:c, :h, :w].contiguous()

    def place(self, tile: int) -> tuple[slice, slice, slice]:
        """Where that part of a tile lies in the image "c h w"."""
        plane, within = divmod(tile, math.prod(self.rows_and_columns))
        at = divmod(within, self.rows_and_columns[1])
        corner = (plane, *(side * number for side, number in zip(self.size, at, strict=True)))
        parts = zip(corner, self.inside(tile), strict=True)
        return tuple(slice(start, start + part.stop) for start, part in parts)  # pyrefly: ignore[bad-return]

    def inside(self, tile: int) -> tuple[slice, slice, slice]:
        """Which part of a tile "cm y x" is of the image: what is stored of an incompressible one."""
        row, column = divmod(tile % math.prod(self.rows_and_columns), self.rows_and_columns[1])
        height = min(self.size[0], self.shape[1] - row * self.size[0])
        width = min(self.size[1], self.shape[2] - column * self.size[1])
        channels = 1 if self.shape[0] == 1 else self.num_channels
        return slice(0, channels), slice(0, height), slice(0, width)

    def inside_bytes(self, tile: int) -> int:
        """How many pixels, over channels, that is."""
        return math.prod(part.stop for part in self.inside(tile))
