"""Images to files and back: the negative ELBO, written out.

    codec = Codec(model, prior)
    data = codec.compress(images)                   # bytes; images uint8 "b c h w", or a list of "c h w" of any sizes,
                                                    # as tensors, numpy arrays or pictures of Pillow
    codec.decompress(data)                          # the same pixels

A file's size is the negative ELBO of its images in bits, plus some bytes a block and a file (`vqvae.codec.container`,
`vqvae.codec.block`), which the tests state. The modes:

- `Mode.LOSSLESS`: codes under the prior, then pixels under the decoder's likelihood.
- `Mode.LOSSY`: codes alone; the decoder's mean comes back.
- `Mode.BITS_BACK`: for a model with a posterior over codes, from which they are drawn by bits that come back in
  decoding, so that a file has rate + distortion - entropy (`vqvae.codec.bits_back`).

Images of a block share a stream, so that its end and its checks are paid once; to read one image is to decode its
block. An image that the model finds incompressible is stored as it is. The integer tables that a file was written with
come out the same on every machine, with any number of threads and in any batch: see `vqvae.codec.integer_tables`.
"""

import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Integer, UInt8
from torch import Tensor

from safefolder import Options
from safefolder.building import neutrally
from vqvae.autoencoder import Autoencoder
from vqvae.codec import container
from vqvae.codec.archive import Archive
from vqvae.codec.bits_back import BitsBack
from vqvae.codec.block import STORED, BlockContent, check_size, tiles_of
from vqvae.codec.block_decoder import BlockDecoder, DecodedBlock, bytes_of, check_of, labels_of_tiles
from vqvae.codec.coder import RangeWriter
from vqvae.codec.container import DamagedFile, Header, Mode
from vqvae.codec.integer_tables import Intervals
from vqvae.codec.model_fingerprint import fingerprint
from vqvae.codec.pixels import AnyImage, as_images
from vqvae.codec.tile_coder import TileCoder, TileIntervals, WalkingPrior
from vqvae.codec.tiles import Tiling
from vqvae.fingerprint import check_same_codes

IMAGES_PER_BLOCK = 128

ImagesLike = UInt8[Tensor, "b c h w"] | UInt8[np.ndarray, "b c h w"] | Sequence[AnyImage]
LabelsLike = Integer[Tensor, " b"] | Integer[np.ndarray, " b"] | Sequence[int]


@dataclass(frozen=True, kw_only=True)
class BlockOptions(Options):
    """How a block is made."""

    images_per_block: int = IMAGES_PER_BLOCK
    """more make a smaller file, fewer are faster to get at one by one"""
    verify: bool = True
    """decode every block after it was coded, and store its images as they are should other pixels come back"""

    @classmethod
    def meant(cls, name: str, value: Any) -> Any:
        """The value, held against its range first."""
        if (
            name == "images_per_block"
            and isinstance(value, int | np.integer)
            and not 1 <= value <= container.MAX_IMAGES
        ):
            raise ValueError(f"got images_per_block={value}, expected 1 to {container.MAX_IMAGES}")
        return value


@dataclass(frozen=True, kw_only=True)
class Compression(BlockOptions):
    """How images become the bytes of a file."""

    mode: Mode = Mode.LOSSLESS
    """what is written of an image: codes and pixels, codes alone, or both with bits back"""

    @classmethod
    def meant(cls, name: str, value: Any) -> Any:
        """As `BlockOptions`; a mode may be given by its number."""
        return Mode(value) if name == "mode" and value in list(Mode) else super().meant(name, value)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What images cost in a stream that goes on, in bits per image, "b", of the integer tables.

    Attributes:
        rate: codes, and the label where there is one.
        distortion: pixels; for an image that is stored, 8 bits each.
        stored: how many of its tiles are stored.
    """

    rate: Float[Tensor, " b"]
    distortion: Float[Tensor, " b"]
    stored: Int[Tensor, " b"]

    @property
    def total(self) -> Float[Tensor, " b"]:
        """Bits per image."""
        return self.rate + self.distortion


class Codec:
    """A model and a prior as a codec of images.

    Args:
        model: a VQVAE.
        prior: over its codes. Both are copied, in float64.
        decoder: a model of the same codes (`vqvae train --train decoder`), which makes the images of lossy files.

    Raises:
        ValueError: a prior or a decoder for other codes, a model whose latents are no codes, or no `constriction`
            installed.
    """

    def __init__(self, model: Autoencoder, prior: WalkingPrior, *, decoder: Autoencoder | None = None):
        if decoder is not None:
            check_same_codes(model, decoder, "the decoder")
        self.coder = TileCoder(model, prior)
        self.fingerprint = fingerprint(model, prior)
        self.decoder = BlockDecoder(self.coder, decoder)

    def compress(
        self,
        images: ImagesLike,
        labels: LabelsLike | None = None,
        options: Compression = Compression(),
    ) -> bytes:
        """Images as the bytes of a file.

        Args:
            images: uint8 "b c h w", or a sequence of "c h w" of any sizes; tensors or numpy arrays. Pictures of Pillow
                too, in mode L or RGB.
            labels: classes, "b" or a sequence of ints, for a prior that takes them: they are stored, at
                log2(num_classes) bits an image.

        Raises:
            ValueError: images of another type (floats, channels last), or with channels that the model cannot take;
                labels that the prior cannot take; bits-back for a model without a posterior.
        """
        return container.pack(self.header(options.mode), self.blocks(images, labels, options))

    def decompress(self, data: bytes) -> Tensor | list[Tensor]:
        """All images of a file: uint8 "b c h w" where they are of one shape, else a list of "c h w".

        Raises:
            DamagedFile: what cannot be read, or decodes to other pixels than were compressed.
            ValueError: a file of another model.
        """
        with Archive.from_bytes(data) as archive:
            images = [image for block in self.decode(archive) for image in block.images]
        if len({image.shape for image in images}) == 1:
            return torch.stack(images)
        return images

    def header(self, mode: Mode) -> Header:
        """The header of a file by this codec."""
        return Header(mode=mode, fingerprint=self.fingerprint)

    def blocks(
        self,
        images: Iterable[AnyImage],
        labels: LabelsLike | None = None,
        options: Compression = Compression(),
        *,
        names: Sequence[str] | None = None,
    ) -> Iterator[tuple[int, bytes]]:
        """The blocks of a file, one after the other: for `archive.write` and `archive.append`.

        Images may come from any iterable of "c h w"; memory holds one block of them. Otherwise as `compress`.
        """
        known = None if labels is None else self.coder.checked_labels(labels)
        start, incoming = 0, as_images(images)
        given = {"labels": known, "names": names}
        while part := list(islice(incoming, options.images_per_block)):
            here = slice(start, start + len(part))
            start = here.stop
            for what, values in given.items():
                if values is not None and len(values) < start:
                    raise ValueError(f"got {len(values)} {what} for {start} images or more, expected one for each")
            content = self._content(
                part,
                None if known is None else known[here],
                None if names is None else names[here],
                options.mode,
                options.verify,
            )
            yield len(part), content.pack()
        for what, values in given.items():
            if values is not None and len(values) > start:
                raise ValueError(f"got {len(values)} {what} for {start} images, expected one for each")

    def decode(self, archive: Archive, blocks: Iterable[int] | None = None) -> Iterator[DecodedBlock]:
        """Blocks of an archive, all unless named, in their order. Errors as `decompress`."""
        self.check_header(archive.header)
        wanted = range(len(archive.blocks)) if blocks is None else blocks
        yield from self.decoder.decode(((i, archive.content(i)) for i in wanted), archive.header.mode)

    def check_header(self, header: Header) -> None:
        """ValueError unless a file is of this model and prior."""
        if header.fingerprint != self.fingerprint:
            raise ValueError(
                f"the file was written with the model and prior {header.fingerprint.hex()}, these are "
                f"{self.fingerprint.hex()}; decompress it with those that wrote it"
            )

    @neutrally
    @torch.no_grad()
    def measure(self, images: ImagesLike, labels: LabelsLike | None = None) -> Cost:
        """What images cost by the integer tables, in bits, without writing anything. Arguments as `compress`."""
        pixels = list(as_images(images))
        tilings = [self._tiling(image) for image in pixels]
        known = None if labels is None else self.coder.checked_labels(labels, len(tilings))
        owner = torch.tensor([i for i, tiling in enumerate(tilings) for _ in range(tiling.num_tiles)]).long()
        sizes = _stored_bits(tilings)
        groups = [
            (intervals.rate().cpu(), intervals.distortion().cpu(), kinds)
            for intervals, kinds in self._groups(tilings, pixels, known)
        ]
        rates, distortions, kinds = (torch.cat([sizes[:0], *column]) for column in zip(*groups, strict=True))
        stored = kinds == STORED
        zeros = torch.zeros(len(tilings), dtype=torch.float64)
        return Cost(
            rate=zeros.index_add(0, owner, rates.masked_fill(stored, 0))
            + (0 if known is None else self.coder.label_bits),
            distortion=zeros.index_add(0, owner, torch.where(stored, sizes, distortions)),
            stored=zeros.long().index_add(0, owner, stored.long()),
        )

    def _tiling(self, image: Tensor) -> Tiling:
        c, h, w = image.shape
        return Tiling(shape=(c, h, w), num_channels=self.coder.num_channels, size=self.coder.size)

    def _tiles(self, tilings: Sequence[Tiling], images: Iterable[Tensor]) -> UInt8[Tensor, "t c h w"]:
        none = torch.zeros(0, self.coder.num_channels, *self.coder.size, dtype=torch.uint8)
        return torch.cat([none, *(tiling.split(image) for tiling, image in zip(tilings, images, strict=True))])

    def _groups(
        self, tilings: Sequence[Tiling], images: Iterable[Tensor], labels: Tensor | None, pixels: bool = True
    ) -> Iterator[tuple[TileIntervals, Int[Tensor, " t"]]]:
        """Group by group of the tiles, how each is coded: its intervals, and its kind."""
        tiles, labels = self._tiles(tilings, images), labels_of_tiles(tilings, labels)
        limits = _stored_bits(tilings)
        for rows in torch.arange(len(tiles)).split(self.coder.group_size):
            known = None if labels is None else labels[rows]
            codes = self.coder.encode(tiles[rows], known)
            intervals, offsets = self.coder.settle(tiles[rows], codes, known, pixels=pixels)
            incompressible = ~intervals.clear.cpu()
            if pixels:
                incompressible |= (intervals.rate() + intervals.distortion()).cpu() >= limits[rows]
            elif incompressible.any():
                raise ValueError("codes of some images cannot be written so that every machine reads them the same")
            yield intervals, offsets.masked_fill(incompressible, STORED)

    @neutrally
    def _content(
        self,
        images: Sequence[Tensor],
        labels: Tensor | None,
        names: Sequence[str] | None,
        mode: Mode,
        verify: bool,
    ) -> BlockContent:
        tilings = [self._tiling(image) for image in images]
        check_size(tilings)
        first = None if labels is None else self.coder.labels_as_intervals(labels)
        codes = None
        if mode == Mode.BITS_BACK:
            tiles, known = self._tiles(tilings, images), labels_of_tiles(tilings, labels)
            stream, kinds = BitsBack(self.coder).encode(tiles, known, first)
        else:
            writer, kinds, found = self._writer(first), [], []
            for intervals, mine in self._groups(tilings, images, labels, pixels=mode == Mode.LOSSLESS):
                writer.put(self.coder.in_order(intervals.rows((mine != STORED).nonzero()[:, 0])))
                kinds += mine.tolist()
                found.append(intervals.codes)
            stream = writer.finish()
            codes = torch.cat(found) if mode == Mode.LOSSY else None
        content = BlockContent(
            tilings=tilings,
            kinds=kinds,
            has_labels=labels is not None,
            check=check_of(images, labels, codes),
            stream=stream,
            stored=_stored_pixels(tilings, images, kinds),
            names=names,
        )
        if mode == Mode.LOSSY:
            if verify and not self._comes_back(content, images, labels, mode):
                raise ValueError("the codes that were written do not come back; this machine computes them in two ways")
            return content
        none_coded, without_tiles = [STORED] * len(kinds), self._without_tiles(first, mode)
        pixels = _stored_pixels(tilings, images, none_coded)
        stored = dataclasses.replace(content, kinds=none_coded, stream=without_tiles, stored=pixels)
        if len(stored.pack()) <= len(content.pack()):
            return stored
        if verify and not self._comes_back(content, images, labels, mode):
            warnings.warn("a block did not come back as it was, so its images are stored as they are", stacklevel=3)
            return stored
        return content

    def _without_tiles(self, first: Intervals | None, mode: Mode) -> bytes:
        """The stream of a block whose tiles are all stored."""
        if mode == Mode.BITS_BACK:
            return BitsBack(self.coder).encode(self._tiles([], []), None, first)[0]
        return self._writer(first).finish()

    def _writer(self, first: Intervals | None) -> RangeWriter:
        """A writer, of what comes first if anything does: labels, in their parts."""
        writer = RangeWriter()
        if first is not None:
            for left, width in zip(*(part.split(self.coder.labels_per_part) for part in first), strict=True):
                writer.put(Intervals(left, width))
        return writer

    def _comes_back(self, content: BlockContent, images: Sequence[Tensor], labels: Tensor | None, mode: Mode) -> bool:
        try:
            [decoded] = self.decoder.decode([(0, content.pack())], mode)
        except DamagedFile:
            return False
        if labels is not None and (decoded.labels is None or not torch.equal(decoded.labels, labels)):
            return False
        return mode == Mode.LOSSY or all(
            torch.equal(mine, theirs.cpu()) for mine, theirs in zip(decoded.images, images, strict=True)
        )


def _stored_bits(tilings: Sequence[Tiling]) -> Float[Tensor, " t"]:
    """What each tile costs as it is."""
    return torch.tensor([8.0 * tiling.inside_bytes(tile) for tiling, tile in tiles_of(tilings)], dtype=torch.float64)


def _stored_pixels(tilings: Sequence[Tiling], images: Sequence[Tensor], kinds: Sequence[int]) -> bytes:
    """The pixels of the tiles that are stored, one after the other."""
    stored, first = [], 0
    for tiling, image in zip(tilings, images, strict=True):
        mine = kinds[first : first + tiling.num_tiles]
        first += tiling.num_tiles
        if STORED in mine:
            tiles = zip(tiling.split(image), mine, strict=True)
            stored += [bytes_of(tile[tiling.inside(i)]) for i, (tile, kind) in enumerate(tiles) if kind == STORED]
    return b"".join(stored)
