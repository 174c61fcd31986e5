"""Images out of a file of bits: decompress."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from tqdm import tqdm

import vqvae.codec
from vqvae.cli.common import File, Model, Output, load_codec, printable, speed, tell
from vqvae.cli.naming import Places, check_place
from vqvae.codec import Archive, Codec, DamagedFile, Mode
from vqvae.codec.block import BlockContent
from vqvae.codec.codec import DecodedBlock
from vqvae.codec.storage import check_folder_to_write, check_readable
from vqvae.pictures import save_image

# Images whose places are looked at before the first is decoded.
_MOST_AHEAD = 1 << 16


def decompress(
    run_or_model: Model,
    file: File,
    *,
    output: Output,
    prior: str | None = None,
    decoder: str | None = None,
    images: tuple[int, ...] | None = None,
    recover: bool = False,
    force: bool = False,
) -> int:
    """Write the images of a compressed file as PNGs.

    They come under their names, or as 000000.png, 000001.png, ... where it has none. Names are not trusted: whatever
    they are, nothing is written outside of the folder, through a link, or over another image of the file, which gets a
    number at its name's end instead. Each PNG is written whole or not at all.

    Example: vqvae decompress runs/fashion-mini album.vq -o again --images 0 5 7

    Args:
        run_or_model: what the file was written with: a run's folder; or a tokenizer's folder or hub id, with --prior.
        file: a file that `vqvae compress` wrote.
        output: the folder to write to.
        prior: folder or hub id of the prior; the run's own unless given.
        decoder: for lossy files, a model of the same codes whose decoder makes the images (`vqvae train --train
            decoder`); the run's own unless given.
        images: numbers of the images to write, from 0; their blocks alone are read. All unless given.
        recover: write what is whole of a damaged file, name on stderr what is not, and exit with 1 if anything is
            lost. If the file's index is lost too, images without names are numbered in the order of what is left.
        force: replace files that are there.
    """
    if images is not None and recover:
        raise ValueError("--images needs a file that is whole and --recover is for one that is not; give one of them")
    check_readable(file)
    check_folder_to_write(output)
    codec, _ = load_codec(run_or_model, prior, decoder)
    start, num_done = time.perf_counter(), 0
    with contextlib.closing(_Blocks(codec, file, recover=recover)) as blocks:
        if decoder is not None and blocks.mode not in (Mode.LOSSY, None):
            raise ValueError(f"--decoder is for lossy files, which hold codes alone; {file} holds pixels: leave it out")
        wanted, firsts = blocks.wanted(images), list(accumulate(blocks.counts, initial=0))
        _check_places(blocks, wanted, firsts, output, replace=force)
        places = Places()
        num_wanted = sum(map(len, wanted.values()))
        with tqdm(total=num_wanted, desc="decompress", unit="img", disable=None) as bar:
            for number, decoded in blocks.decoded(list(wanted)):
                for i in wanted[number]:
                    place = places.place(decoded.names[i] if decoded.names else None, firsts[number] + i)
                    save_image(check_place(output, place, replace=force), decoded.images[i])
                    num_done += 1
                    bar.update()
        for line in blocks.damage:
            tell(f"lost: {printable(line)}")
    print(f"{output}: {num_done:,} images of {file}; {speed(num_done, time.perf_counter() - start)}")
    return 1 if blocks.damage else 0


class _Blocks:
    """The blocks of a file, or what is left of them.

    Attributes:
        mode: that of the file; None where its header is lost.
        counts: how many images each block has.
        damage: what is lost, a sentence each; known in full once the blocks were decoded.

    Raises:
        DamagedFile: the file cannot be read, and is not to be recovered.
        ValueError: no such file, or one of another model.
    """

    def __init__(self, codec: Codec, file: Path, *, recover: bool):
        self.codec, self.recover = codec, recover
        self.damage: list[str] = []
        self._archive: Archive | None = None
        self._rescued: list[bytes] = []
        try:
            self._archive = Archive.open(file)
            header = self._archive.header
            self.counts = [block.num_images for block in self._archive.blocks]
        except DamagedFile:
            if not recover:
                raise
            found = vqvae.codec.recover(file)
            header, self.damage = found.header, list(found.damage)
            # A block that does not say its number of images is none, and says so when it is unpacked.
            self.counts = [count or 0 for count, _ in found.blocks]
            self._rescued = [content for _, content in found.blocks]
        if header is not None:
            codec.check_header(header)
        self.mode = None if header is None else header.mode

    def close(self) -> None:
        if self._archive is not None:
            self._archive.close()

    def wanted(self, images: Sequence[int] | None) -> dict[int, Sequence[int]]:
        """The blocks that hold these images, all unless given, and which of theirs."""
        if images is None or self._archive is None:
            return {number: range(count) for number, count in enumerate(self.counts)}
        blocks: dict[int, list[int]] = {}
        for number, within in sorted({self._archive.locate(image) for image in images}):
            blocks.setdefault(number, []).append(within)
        return dict(blocks)

    def names(self, number: int) -> Sequence[str] | None:
        """The names in a block. Raises DamagedFile."""
        coder = self.codec.coder
        return BlockContent.unpack(self._content(number), coder.num_channels, coder.size).names

    def decoded(self, numbers: Sequence[int]) -> Iterator[tuple[int, DecodedBlock]]:
        """Blocks, several at once; or one by one where some may be damaged."""
        if not self.recover:
            contents = ((number, self._content(number)) for number in numbers)
            assert self.mode is not None  # only what is recovered may lack a header
            yield from zip(numbers, self.codec.decoder.decode(contents, self.mode), strict=True)
            return
        for number in numbers:
            try:
                yield number, self.codec.decoder.decode_alone(number, self._content(number), self.mode)
            except DamagedFile as error:
                self.damage.append(error.args[0])

    def _content(self, number: int) -> bytes:
        return self._rescued[number] if self._archive is None else self._archive.content(number)


def _check_places(
    blocks: _Blocks, wanted: dict[int, Sequence[int]], firsts: Sequence[int], output: Path, *, replace: bool
) -> None:
    """ValueError where one of the first images cannot go, before any is decoded. A file may claim any number."""
    places, left = Places(), _MOST_AHEAD
    is_free = not output.exists() or not any(output.iterdir())
    for number, within in wanted.items():
        if left <= 0:
            return
        try:
            names = blocks.names(number)
        except DamagedFile as error:
            if blocks.recover:
                continue  # it is noted when it is decoded
            prefix = "" if "block" in error.args[0] else f"block {number}: "
            raise DamagedFile(f"{prefix}{error.args[0]}", error.args[1]) from error
        for i in () if is_free else within[:left]:
            check_place(output, places.place(None if names is None else names[i], firsts[number] + i), replace=replace)
        left -= len(within)
