"""Images from arbitrary bits: decompression of what nobody compressed.

A stack of bits, whatever they are, is popped under the prior and then under the likelihood, tile by tile, as a file is
decoded. If the bits are evenly random, the images are samples of the model (Shannon 1948: an ideal code makes its
output look random, so that random input looks like what it was made for). Each image takes as many bits as it costs.
Its symbols, pushed in the opposite order, give the bits back to the last one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from safefolder.building import neutrally
from vqvae.codec.codec import Codec
from vqvae.codec.coder import Stack

_WORD = 4


@dataclass(frozen=True, kw_only=True)
class Dream:
    """Images out of bits.

    Attributes:
        images: uint8 "b c h w".
        codes: int64 "b *grid". They belong to the dream: other codes may stand for the same image.
        left: bytes that the images did not use up, with what the last symbols left over of theirs.
        length: of the bytes that it was made from.
    """

    images: UInt8[Tensor, "b c h w"]
    codes: Int[Tensor, "b *grid"]
    left: bytes
    length: int


def bytes_for_an_image(codec: Codec) -> int:
    """Bytes that are enough for an image of 8 bits a dimension; one that the model finds unlikely may take more."""
    coder = codec.coder
    return coder.model.num_dims + 3 * int(np.prod(coder.model.grid)) + 2 * _WORD


def most_bytes(codec: Codec, num: int) -> int:
    """Bytes that so many images take at most, whatever they are: `dream` gets no further from the end of its bytes."""
    coder = codec.coder
    # A symbol takes 24 bits and, over many of them, far less than another 8 that the coder rounds away.
    return 4 * num * (int(np.prod(coder.model.grid)) + 2 * coder.model.num_dims) + bytes_for_an_image(codec) + 64


@neutrally
def dream(codec: Codec, data: bytes, most: int = 1024, watch: Callable[[], object] | None = None) -> Dream:
    """Bytes as images: as many as the bytes pay for, and at most so many.

    An image is decoded only while the stack holds `bytes_for_an_image`, so there may be none, and some bits are left
    over at the end. Where an image takes more than there is, the rest of it is made of zeros.

    Args:
        watch: called after each image.
    """
    coder = codec.coder
    stack = Stack(_to_words(data), any_bits=True)
    enough = -(-bytes_for_an_image(codec) // _WORD)
    offset = torch.zeros(1, dtype=torch.int64, device=coder.device)
    tiles, codes = [], []
    while len(tiles) < most and stack.depth > enough:
        code = coder.decode_codes([(stack, 1)], None, offset)
        tiles.append(coder.decode_tiles([(stack, 1)], code, offset))
        codes.append(code)
        if watch is not None:
            watch()
    return Dream(
        images=torch.cat(tiles) if tiles else torch.zeros(0, coder.num_channels, *coder.size, dtype=torch.uint8),
        codes=torch.cat(codes) if codes else torch.zeros(0, *coder.model.grid, dtype=torch.int64),
        left=stack.words().astype("<u4").tobytes(),
        length=len(data),
    )


@neutrally
def undream(codec: Codec, dreamt: Dream) -> bytes:
    """The bytes that a dream was made from."""
    coder = codec.coder
    stack = Stack(np.frombuffer(dreamt.left, "<u4").astype(np.uint32))
    offset = torch.zeros(1, dtype=torch.int64, device=coder.device)
    for i in reversed(range(len(dreamt.images))):
        # The walk once more, with known symbols: the same steps on the same shapes give the same integer tables.
        stack.push(coder.walked(dreamt.images[i : i + 1], dreamt.codes[i : i + 1], offset))
    return stack.any_bits().astype("<u4").tobytes()[: dreamt.length]


def _to_words(data: bytes) -> np.ndarray:
    return np.frombuffer(data + bytes(-len(data) % _WORD), "<u4").astype(np.uint32)
