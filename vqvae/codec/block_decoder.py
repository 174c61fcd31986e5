"""Blocks to images: streams, walked through by the models, and pixels that were stored.

Blocks that fit into one group of tiles are decoded together, each from its own stream.
"""

import contextlib
import copy
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from safefolder.building import neutrally
from vqvae.autoencoder import Autoencoder
from vqvae.codec.bits_back import BitsBack
from vqvae.codec.block import STORED, BlockContent
from vqvae.codec.coder import BadStream, RangeReader
from vqvae.codec.container import DamagedFile, Mode
from vqvae.codec.tile_coder import Source, TileCoder
from vqvae.codec.tiles import Tiling


@dataclass(frozen=True, kw_only=True)
class DecodedBlock:
    """The images of one block: uint8 "c h w" each, their labels "b" and their names, where it has any."""

    images: list[Tensor]
    labels: Int[Tensor, " b"] | None
    names: Sequence[str] | None


class BlockDecoder:
    """Decodes what a `Codec` with the same models wrote.

    Args:
        shown: the model whose decoder makes images of the codes of lossy files; the coder's unless given.
    """

    def __init__(self, coder: TileCoder, shown: Autoencoder | None = None):
        self.coder = coder
        # A copy, as the coder has of its model, and as precise.
        self.shown = coder.model if shown is None else copy.deepcopy(shown).double().to(coder.device).eval()

    @neutrally
    def decode(self, contents: Iterable[tuple[int, bytes]], mode: Mode) -> Iterator[DecodedBlock]:
        """Blocks by their numbers and contents, as many at once as make a full group of tiles."""
        waiting: list[tuple[int, BlockContent]] = []
        for number, data in contents:
            try:
                content = BlockContent.unpack(data, self.coder.num_channels, self.coder.size)
                if mode == Mode.LOSSY and STORED in content.kinds:
                    raise DamagedFile("a block of a lossy file has pixels in it")
            except DamagedFile as error:
                raise DamagedFile(f"block {number}: {error.args[0]}", error.args[1]) from error
            num_waiting = sum(len(other.kinds) for _, other in waiting)
            fits = num_waiting + len(content.kinds) <= self.coder.group_size
            if waiting and not (fits and waiting[0][1].has_labels == content.has_labels and mode != Mode.BITS_BACK):
                yield from self.decode_together(waiting, mode)
                waiting = []
            waiting.append((number, content))
        if waiting:
            yield from self.decode_together(waiting, mode)

    def decode_alone(self, number: int, content: bytes, mode: Mode | None) -> DecodedBlock:
        """One block. A mode that is lost is found: under another one the block's check does not hold.

        Raises:
            DamagedFile: it cannot be decoded.
        """
        if mode is not None:
            [decoded] = self.decode([(number, content)], mode)
            return decoded
        for mode in (Mode.LOSSY, Mode.BITS_BACK):
            with contextlib.suppress(ValueError):
                return self.decode_alone(number, content, mode)
        return self.decode_alone(number, content, Mode.LOSSLESS)

    def decode_together(self, numbered: Sequence[tuple[int, BlockContent]], mode: Mode) -> Iterator[DecodedBlock]:
        """The images of blocks that are alike in having labels, group by group of their tiles."""
        contents = [content for _, content in numbered]
        try:
            back = BitsBack(self.coder) if mode == Mode.BITS_BACK else None
            sources: list[Any] = [
                back.open(content.stream) if back else RangeReader(content.stream) for content in contents
            ]
            labels = [
                self.coder.decode_labels(source, len(content.tilings)) if content.has_labels else None
                for source, content in zip(sources, contents, strict=True)
            ]
            of_tiles = [labels_of_tiles(content.tilings, mine) for content, mine in zip(contents, labels, strict=True)]
            if back:
                parts = zip(sources, contents, of_tiles, strict=True)
                results = [back.decode(source, content.kinds, mine) for source, content, mine in parts]
            else:
                results = self._decode_streams(sources, contents, of_tiles, lossy=mode == Mode.LOSSY)
        except (BadStream, DamagedFile) as error:
            if len(numbered) > 1:
                # Which of them it is shows when they are alone, and the ones before it are had.
                for one in numbered:
                    yield from self.decode_together([one], mode)
                return
            raise DamagedFile(f"block {numbered[0][0]}: {error.args[0]}") from error
        for (number, content), mine, (tiles, codes) in zip(numbered, labels, results, strict=True):
            yield self._assemble(number, content, tiles, codes, mine, mode)

    def _decode_streams(
        self,
        sources: Sequence[Source],
        contents: Sequence[BlockContent],
        labels: Sequence[Tensor | None],
        *,
        lossy: bool,
    ) -> list[tuple[Tensor, Tensor]]:
        """Coded tiles, and codes, of each block."""
        size = self.coder.group_size
        every = [torch.tensor(content.kinds) for content in contents]
        coded = [(kinds != STORED).nonzero()[:, 0] for kinds in every]
        found = [[self.coder.no_tiles()] for _ in contents]
        for start in range(0, max(len(content.kinds) for content in contents), size):
            here = [rows[(rows >= start) & (rows < start + size)] for rows in coded]
            if not any(map(len, here)):
                continue
            counted = [(source, len(rows)) for source, rows in zip(sources, here, strict=True)]
            kinds = torch.cat([mine[rows] for mine, rows in zip(every, here, strict=True)])
            offsets = kinds.to(self.coder.device)
            known = [mine[rows] for mine, rows in zip(labels, here, strict=True) if mine is not None]
            codes = self.coder.decode_codes(counted, torch.cat(known) if known else None, offsets)
            tiles = self.shown.decode(codes) if lossy else self.coder.decode_tiles(counted, codes, offsets)
            counts = [len(rows) for rows in here]
            for mine, tile, code in zip(found, tiles.split(counts), codes.split(counts), strict=True):
                mine.append((tile, code))
        return [(torch.cat([tile for tile, _ in parts]), torch.cat([code for _, code in parts])) for parts in found]

    def _assemble(
        self, number: int, content: BlockContent, coded: Tensor, codes: Tensor, labels: Tensor | None, mode: Mode
    ) -> DecodedBlock:
        """Images of tiles, coded and stored ones, with their check."""
        images, at, first, left = [], 0, 0, coded.cpu()
        for tiling in content.tilings:
            kinds = content.kinds[first : first + tiling.num_tiles]
            first += tiling.num_tiles
            num_coded = sum(kind != STORED for kind in kinds)
            mine, left = left[:num_coded], left[num_coded:]
            if num_coded == len(kinds):
                images.append(tiling.join(mine))
                continue
            # Tile by tile, so that a stored one takes no more memory than its pixels.
            image, of_mine = torch.zeros(tiling.shape, dtype=torch.uint8), iter(mine)
            for tile, kind in enumerate(kinds):
                place = image[tiling.place(tile)]
                if kind == STORED:
                    pixels = bytearray(content.stored[at : at + place.numel()])
                    at += place.numel()
                    place.copy_(torch.frombuffer(pixels, dtype=torch.uint8).view(place.shape))
                else:
                    place.copy_(next(of_mine)[tiling.inside(tile)])
            images.append(image)
        check = check_of(images, labels, codes if mode == Mode.LOSSY else None)
        if check != content.check:
            raise DamagedFile(
                f"block {number}: other {'codes' if mode == Mode.LOSSY else 'pixels'} come out than went in: CRC-32 "
                f"{check:08x}, expected {content.check:08x}",
                "the stream was changed, or this machine computes the model differently",
            )
        return DecodedBlock(images=images, labels=labels, names=content.names)


def labels_of_tiles(tilings: Sequence[Tiling], labels: Int[Tensor, " b"] | None) -> Int[Tensor, " t"] | None:
    """The label of each tile's image."""
    if labels is None:
        return None
    return labels.cpu().repeat_interleave(torch.tensor([tiling.num_tiles for tiling in tilings]))


def bytes_of(pixels: UInt8[Tensor, "*n"]) -> bytes:
    """Pixels as they lie in an image."""
    return pixels.cpu().contiguous().numpy().tobytes()


def check_of(images: Iterable[Tensor], labels: Int[Tensor, " b"] | None, codes: Int[Tensor, "t *grid"] | None) -> int:
    """The CRC-32 of what must come out: of images, or where there are codes of their shapes and those; of labels."""
    crc = 0
    for image in images:
        crc = zlib.crc32(struct.pack("<3I", *image.shape), crc)
        if codes is None:
            crc = zlib.crc32(bytes_of(image), crc)
    for numbers in (codes, labels):
        if numbers is not None:
            crc = zlib.crc32(numbers.cpu().numpy().astype("<u4").tobytes(), crc)
    return crc
