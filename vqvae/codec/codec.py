"""Images to files and back: the negative ELBO, written out.

    codec = Codec(model, prior)
    data = codec.compress(images)                   # bytes; images uint8 "b c h w", or a list of "c h w" of any sizes
    codec.decompress(data)                          # the same pixels

A file's size is the negative ELBO of its images in bits, plus some bytes a block and a file (`vqvae.codec.container`,
`vqvae.codec.body`), which the tests state. The modes:

- `Mode.LOSSLESS`: codes under the prior, then pixels under the decoder's likelihood.
- `Mode.LOSSY`: codes alone; the decoder's mean comes back.
- `Mode.BITS_BACK`: for a model with a posterior over codes, from which they are drawn by bits that come back in
  decoding, so that a file has rate + distortion - entropy (`vqvae.codec.bits_back`).

Images of a block share a stream, so that its end and its checks are paid once; to read one image is to decode its
block. An image that the model finds hopeless is stored as it is. The tables that a file was written with come out the
same on every machine, with any number of threads and in any batch: see `vqvae.codec.tables`.
"""

import contextlib
import functools
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from vqvae.autoencoder import Autoencoder
from vqvae.codec import container
from vqvae.codec.bits_back import BitsBack
from vqvae.codec.body import STORED, Body, check_size, units_of
from vqvae.codec.coder import RangeReader, RangeWriter
from vqvae.codec.container import Archive, DamagedFile, Header, Mode
from vqvae.codec.fingerprint import fingerprint
from vqvae.codec.recovery import recover
from vqvae.codec.tables import Intervals
from vqvae.codec.unit_coder import Plan, Source, UnitCoder, WalkingPrior
from vqvae.codec.units import Cut

IMAGES_PER_BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What images cost in a stream that goes on, in bits per image, "b", of the integer tables.

    Attributes:
        rate: codes, and the label where there is one.
        distortion: pixels; for an image that is stored, 8 bits each.
        stored: how many of its units are stored.
    """

    rate: Float[Tensor, " b"]
    distortion: Float[Tensor, " b"]
    stored: Int[Tensor, " b"]

    @property
    def total(self) -> Float[Tensor, " b"]:
        """Bits per image."""
        return self.rate + self.distortion


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """The images of one block: uint8 "c h w" each, their labels "b" and their names, where it has any."""

    images: list[Tensor]
    labels: Int[Tensor, " b"] | None
    names: Sequence[str] | None


class Codec:
    """A model and a prior as a codec of images.

    Args:
        model: a VQVAE.
        prior: over its codes. Both are copied, in float64.

    Raises:
        ValueError: a prior for other codes, a model whose latents are no codes, or no `constriction` installed.
    """

    def __init__(self, model: Autoencoder, prior: WalkingPrior):
        self.fingerprint = fingerprint(model, prior)
        self.coder = UnitCoder(model, prior)

    def compress(
        self,
        images: UInt8[Tensor, "b c h w"] | Sequence[Tensor],
        labels: Int[Tensor, " b"] | None = None,
        *,
        mode: Mode = Mode.LOSSLESS,
        images_per_block: int = IMAGES_PER_BLOCK,
        verify: bool = True,
    ) -> bytes:
        """Images as the bytes of a file.

        Args:
            images: uint8 "b c h w", or a sequence of "c h w" of any sizes.
            labels: classes, for a prior that takes them: they are stored, at log2(num_classes) bits an image.
            images_per_block: more make a smaller file, fewer are faster to get at.
            verify: decode every block, and store its images as they are should other pixels come back.

        Raises:
            ValueError: images of another type, or with channels that the model cannot take; labels that the prior
                cannot take; bits-back for a model without a posterior.
        """
        blocks = self.blocks(images, labels, mode=mode, images_per_block=images_per_block, verify=verify)
        return container.pack(self.header(mode), blocks)

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
        images: Iterable[Tensor],
        labels: Int[Tensor, " b"] | None = None,
        *,
        names: Sequence[str] | None = None,
        mode: Mode = Mode.LOSSLESS,
        images_per_block: int = IMAGES_PER_BLOCK,
        verify: bool = True,
    ) -> Iterator[tuple[int, bytes]]:
        """The blocks of a file, one after the other: for `container.write` and `container.append`.

        Images may come from any iterable of "c h w"; memory holds one block of them. Otherwise as `compress`.
        """
        if not 1 <= images_per_block <= container.MAX_IMAGES:
            raise ValueError(f"got images_per_block={images_per_block}, expected 1 to {container.MAX_IMAGES}")
        if labels is not None and self.coder.num_classes is None:
            raise ValueError("got labels, expected none: this prior was made without num_classes")
        start, incoming = 0, iter(images)
        given = {"labels": labels, "names": names}
        while part := list(islice(incoming, images_per_block)):
            here = slice(start, start + len(part))
            start = here.stop
            for what, values in given.items():
                if values is not None and len(values) < start:
                    raise ValueError(f"got {len(values)} {what} for {start} images or more, expected one for each")
            body = self._body(
                part,
                None if labels is None else labels[here],
                None if names is None else names[here],
                mode,
                verify,
            )
            yield len(part), body.pack()
        for what, values in given.items():
            if values is not None and len(values) > start:
                raise ValueError(f"got {len(values)} {what} for {start} images, expected one for each")

    def decode(self, archive: Archive, blocks: Iterable[int] | None = None) -> Iterator[Decoded]:
        """Blocks of an archive, all unless named, in their order. Errors as `decompress`."""
        self.check_header(archive.header)
        wanted = range(len(archive.blocks)) if blocks is None else blocks
        yield from self.decode_bodies(((i, archive.body(i)) for i in wanted), archive.header.mode)

    def rescue(self, source: bytes | str | Path) -> tuple[list[Decoded], list[str]]:
        """What can be had of a damaged file: the blocks that are whole and decode to what went in, and what is damaged.

        Raises:
            ValueError: no such file, or one of another model.
        """
        found = recover(source)
        if found.header is not None:
            self.check_header(found.header)
        blocks, damage = [], list(found.damage)
        for number, (_, body) in enumerate(found.blocks):
            try:
                blocks.append(self.decode_alone(number, body, None if found.header is None else found.header.mode))
            except DamagedFile as error:
                damage.append(error.args[0])
        return blocks, damage

    def decode_alone(self, number: int, body: bytes, mode: Mode | None) -> Decoded:
        """One block. A mode that is lost is found: under another one the block's check does not hold.

        Raises:
            DamagedFile: it cannot be decoded.
        """
        if mode is not None:
            [decoded] = self.decode_bodies([(number, body)], mode)
            return decoded
        for mode in (Mode.LOSSY, Mode.BITS_BACK):
            with contextlib.suppress(ValueError):
                return self.decode_alone(number, body, mode)
        return self.decode_alone(number, body, Mode.LOSSLESS)

    def check_header(self, header: Header) -> None:
        """ValueError unless a file is of this model and prior."""
        if header.fingerprint != self.fingerprint:
            raise ValueError(
                f"the file was written with the model and prior {header.fingerprint.hex()}, these are "
                f"{self.fingerprint.hex()}; decompress it with those that wrote it"
            )

    def decode_bodies(self, bodies: Iterable[tuple[int, bytes]], mode: Mode) -> Iterator[Decoded]:
        """Numbered bodies, as many at once as make a full group of units."""
        waiting: list[tuple[int, Body]] = []
        for number, data in bodies:
            try:
                body = Body.unpack(data, self.coder.num_channels, self.coder.size)
            except DamagedFile as error:
                raise DamagedFile(f"block {number}: {error.args[0]}", error.args[1]) from error
            num_waiting = sum(len(other.kinds) for _, other in waiting)
            fits = num_waiting + len(body.kinds) <= self.coder.group_size
            if waiting and not (fits and waiting[0][1].has_labels == body.has_labels and mode != Mode.BITS_BACK):
                yield from self._decode_together(waiting, mode)
                waiting = []
            waiting.append((number, body))
        if waiting:
            yield from self._decode_together(waiting, mode)

    @torch.no_grad()
    def measure(
        self, images: UInt8[Tensor, "b c h w"] | Sequence[Tensor], labels: Int[Tensor, " b"] | None = None
    ) -> Cost:
        """What images cost by the integer tables, in bits, without writing anything."""
        cuts = [self._cut(image) for image in images]
        owner = torch.tensor([i for i, cut in enumerate(cuts) for _ in range(cut.num_units)]).long()
        sizes = torch.tensor([8.0 * cut.inside_bytes(unit) for cut, unit in units_of(cuts)], dtype=torch.float64)
        groups = [
            (plan.rate().cpu(), plan.distortion().cpu(), kinds) for plan, kinds in self._groups(cuts, images, labels)
        ]
        rates, distortions, kinds = (torch.cat([sizes[:0], *column]) for column in zip(*groups, strict=True))
        stored = kinds == STORED
        zeros = torch.zeros(len(cuts), dtype=torch.float64)
        return Cost(
            rate=zeros.index_add(0, owner, rates.masked_fill(stored, 0))
            + (0 if labels is None else self.coder.label_bits),
            distortion=zeros.index_add(0, owner, torch.where(stored, sizes, distortions)),
            stored=zeros.long().index_add(0, owner, stored.long()),
        )

    def _cut(self, image: Tensor) -> Cut:
        if image.dtype != torch.uint8 or image.ndim != 3:
            raise ValueError(f'got an image of {image.dtype} {tuple(image.shape)}, expected uint8 "c h w"')
        c, h, w = image.shape
        return Cut(shape=(c, h, w), num_channels=self.coder.num_channels, size=self.coder.size)

    def _units(self, cuts: Sequence[Cut], images: Iterable[Tensor]) -> UInt8[Tensor, "u c s s"]:
        none = torch.zeros(0, self.coder.num_channels, self.coder.size, self.coder.size, dtype=torch.uint8)
        return torch.cat([none, *(cut.split(image.cpu()) for cut, image in zip(cuts, images, strict=True))])

    def _unit_labels(self, cuts: Sequence[Cut], labels: Tensor | None) -> Tensor | None:
        if labels is None:
            return None
        return labels.cpu().repeat_interleave(torch.tensor([cut.num_units for cut in cuts]))

    def _groups(
        self, cuts: Sequence[Cut], images: Iterable[Tensor], labels: Tensor | None, pixels: bool = True
    ) -> Iterator[tuple[Plan, Int[Tensor, " u"]]]:
        """Group by group of the units, how each is coded: its plan, and its kind."""
        units, labels = self._units(cuts, images), self._unit_labels(cuts, labels)
        limits = torch.tensor([8.0 * cut.inside_bytes(unit) for cut, unit in units_of(cuts)], dtype=torch.float64)
        for rows in torch.arange(len(units)).split(self.coder.group_size):
            known = None if labels is None else labels[rows]
            codes = self.coder.encode(units[rows], known)
            plan, offsets = self.coder.settle(units[rows], codes, known, pixels=pixels)
            hopeless = ~plan.clear.cpu()
            if pixels:
                hopeless |= (plan.rate() + plan.distortion()).cpu() >= limits[rows]
            elif hopeless.any():
                raise ValueError("codes of some images cannot be written so that every machine reads them the same")
            yield plan, offsets.masked_fill(hopeless, STORED)

    def _body(
        self,
        images: Sequence[Tensor],
        labels: Tensor | None,
        names: Sequence[str] | None,
        mode: Mode,
        verify: bool,
    ) -> Body:
        cuts = [self._cut(image) for image in images]
        check_size(cuts)
        first = None if labels is None else self.coder.labels_as_intervals(labels)
        if mode == Mode.BITS_BACK:
            units, known = self._units(cuts, images), self._unit_labels(cuts, labels)
            stream, kinds = BitsBack(self.coder).encode(units, known, first)
            check = _check_pixels(images)
        else:
            writer, kinds, codes = _writer(first), [], []
            for plan, mine in self._groups(cuts, images, labels, pixels=mode == Mode.LOSSLESS):
                writer.put(self.coder.in_order(plan.rows((mine != STORED).nonzero()[:, 0])))
                kinds += mine.tolist()
                codes.append(plan.codes)
            stream = writer.finish()
            check = _check_codes(torch.cat(codes)) if mode == Mode.LOSSY else _check_pixels(images)
        body = self._with_stored(cuts, images, kinds, labels is not None, check, stream, names)
        if verify and not self._comes_back(body, images, mode):
            if mode == Mode.LOSSY:
                raise ValueError("the codes that were written do not come back; this machine computes them in two ways")
            warnings.warn("a block did not come back as it was, so its images are stored as they are", stacklevel=3)
            none = self._units([], [])
            stream = (
                BitsBack(self.coder).encode(none, None, first)[0] if mode == Mode.BITS_BACK else _writer(first).finish()
            )
            body = self._with_stored(cuts, images, [STORED] * len(kinds), labels is not None, check, stream, names)
        return body

    def _with_stored(
        self,
        cuts: Sequence[Cut],
        images: Sequence[Tensor],
        kinds: Sequence[int],
        has_labels: bool,
        check: int,
        stream: bytes,
        names: Sequence[str] | None,
    ) -> Body:
        stored, unit = [], 0
        for cut, image in zip(cuts, images, strict=True):
            mine = kinds[unit : unit + cut.num_units]
            unit += cut.num_units
            if STORED in mine:
                stored += [_bytes(each[cut.inside(i)]) for i, each in enumerate(cut.split(image)) if mine[i] == STORED]
        return Body(
            cuts=cuts,
            kinds=kinds,
            has_labels=has_labels,
            check=check,
            stream=stream,
            stored=b"".join(stored),
            names=names,
        )

    def _comes_back(self, body: Body, images: Sequence[Tensor], mode: Mode) -> bool:
        try:
            [decoded] = self._decode_together([(0, body)], mode)
        except ValueError:
            return False
        return mode == Mode.LOSSY or all(
            torch.equal(mine, theirs.cpu()) for mine, theirs in zip(decoded.images, images, strict=True)
        )

    def _decode_together(self, numbered: Sequence[tuple[int, Body]], mode: Mode) -> Iterator[Decoded]:
        """The images of bodies that are alike in having labels, group by group of their units."""
        bodies = [body for _, body in numbered]
        try:
            back = BitsBack(self.coder) if mode == Mode.BITS_BACK else None
            sources: list[Any] = [back.open(body.stream) if back else RangeReader(body.stream) for body in bodies]
            labels = [
                self.coder.decode_labels(source, len(body.cuts)) if body.has_labels else None
                for source, body in zip(sources, bodies, strict=True)
            ]
            of_units = [self._unit_labels(body.cuts, mine) for body, mine in zip(bodies, labels, strict=True)]
            if back:
                parts = zip(sources, bodies, of_units, strict=True)
                results = [back.decode(source, body.kinds, mine) for source, body, mine in parts]
            else:
                results = self._decode_streams(sources, bodies, of_units, lossy=mode == Mode.LOSSY)
        except ValueError as error:
            numbers = f"{numbered[0][0]} to {numbered[-1][0]}" if len(numbered) > 1 else str(numbered[0][0])
            raise DamagedFile(f"block {numbers}: {error}") from error
        for (number, body), mine, (units, codes) in zip(numbered, labels, results, strict=True):
            yield self._assemble(number, body, units, codes, mine, mode)

    def _decode_streams(
        self, sources: Sequence[Source], bodies: Sequence[Body], labels: Sequence[Tensor | None], *, lossy: bool
    ) -> list[tuple[Tensor, Tensor]]:
        """Coded units, and codes, of each body."""
        size = self.coder.group_size
        coded = [torch.tensor([kind != STORED for kind in body.kinds]).nonzero()[:, 0] for body in bodies]
        found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in bodies]
        for start in range(0, max(len(body.kinds) for body in bodies), size):
            here = [rows[(rows >= start) & (rows < start + size)] for rows in coded]
            counted = [(source, len(rows)) for source, rows in zip(sources, here, strict=True)]
            kinds = [torch.tensor(body.kinds)[rows] for body, rows in zip(bodies, here, strict=True)]
            offsets = torch.cat(kinds).to(self.coder.device)
            known = [mine[rows] for mine, rows in zip(labels, here, strict=True) if mine is not None]
            codes = self.coder.decode_codes(counted, torch.cat(known) if known else None, offsets)
            units = self.coder.means(codes) if lossy else self.coder.decode_units(counted, codes, offsets)
            begin = 0
            for mine, rows in zip(found, here, strict=True):
                mine.append((units[begin : begin + len(rows)], codes[begin : begin + len(rows)]))
                begin += len(rows)
        return [(torch.cat([unit for unit, _ in parts]), torch.cat([code for _, code in parts])) for parts in found]

    def _assemble(
        self, number: int, body: Body, coded: Tensor, codes: Tensor, labels: Tensor | None, mode: Mode
    ) -> Decoded:
        """Images of units, coded and stored ones, with their check."""
        stored = torch.tensor(body.kinds) == STORED
        size, channels = self.coder.size, self.coder.num_channels
        units = torch.zeros(len(body.kinds), channels, size, size, dtype=torch.uint8)
        units[~stored] = coded.cpu()
        position = 0
        for i, (cut, unit) in enumerate(units_of(body.cuts)):
            if stored[i]:
                length = cut.inside_bytes(unit)
                pixels = torch.frombuffer(bytearray(body.stored[position : position + length]), dtype=torch.uint8)
                inside = cut.inside(unit)
                units[i][inside] = pixels.view(units[i][inside].shape)
                position += length
        counts = [cut.num_units for cut in body.cuts]
        images = [cut.join(mine) for cut, mine in zip(body.cuts, units.split(counts), strict=True)]
        check = _check_codes(codes) if mode == Mode.LOSSY else _check_pixels(images)
        if check != body.check:
            raise DamagedFile(
                f"block {number}: other {'codes' if mode == Mode.LOSSY else 'pixels'} come out than went in: CRC-32 "
                f"{check:08x}, expected {body.check:08x}",
                "the stream was changed, or this machine computes the model differently",
            )
        return Decoded(images=images, labels=labels, names=body.names)


def _writer(first: Intervals | None) -> RangeWriter:
    writer = RangeWriter()
    if first is not None:
        writer.put(first)
    return writer


def _bytes(pixels: Tensor) -> bytes:
    return pixels.cpu().contiguous().numpy().tobytes()


def _check_pixels(images: Iterable[Tensor]) -> int:
    return functools.reduce(lambda crc, image: zlib.crc32(_bytes(image), crc), images, 0)


def _check_codes(codes: Tensor) -> int:
    return zlib.crc32(codes.cpu().numpy().astype("<u4").tobytes())
