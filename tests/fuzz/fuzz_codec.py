r"""Coverage-guided fuzzing of the codec's decoder, with atheris (libFuzzer).

    python tests/fuzz/fuzz_codec.py -runs=20000

An input is a byte, which names the mode, and the content of a block for a model of 8x8 grey images with 2x2 codes of
four, whose weights are random. Contents are valid ones, mutated: bytes by libFuzzer, or whole parts (other shapes,
kinds, flags, streams, stored pixels, names), with a check of pixels that no decoder has seen, or sometimes the right
one.

What must hold for any bytes at all:
    only DamagedFile is raised, and soon;
    what comes out are images of the shapes, labels and names that the content claims, and their check is the content's;
    no more tiles are decoded than one group has, and those that the stream has bits for (groups and what a stream may
    lack are small here, so that this matters);
    no more memory is asked for than the input's pixels and names take, times a constant.
"""

import contextlib
import dataclasses
import itertools
import random
import sys
from pathlib import Path

import atheris
import torch
from guided import fuzz, seen

sys.path.insert(0, str(Path(__file__).parents[2]))
PARTS = ("bits_back", "block", "block_decoder", "codec", "coder", "container", "integer_tables", "tile_coder", "tiles")
# With only these instrumented, the rest may be imported here as well.
with atheris.instrument_imports(include=[f"vqvae.codec.{part}" for part in PARTS]):
    from priors import UniformPrior
    from vqvae import VQVAE
    from vqvae.codec import block as blocks
    from vqvae.codec import coder as coders
    from vqvae.codec.block import STORED, BlockContent, tiles_of
    from vqvae.codec.block_decoder import check_of
    from vqvae.codec.codec import Codec, Compression
    from vqvae.codec.container import DamagedFile, Mode
    from vqvae.codec.tiles import Tiling
    from vqvae.likelihoods import LogisticMixture
    from vqvae.quantizers import StochasticVectorQuantizer

SIZE = 8
MAX_SIZE = 2048
# So that a block cannot ask for more work than a moment's.
blocks.MAX_TILES = 24
blocks.MAX_PIXELS = 1 << 12
coders.SLACK = 4
GROUP = 4


class Labelled(UniformPrior):
    """A uniform prior that knows of classes."""

    def __init__(self, **options):
        super().__init__(**options)
        self.num_classes = 3


def make_codec() -> Codec:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = VQVAE.Config(
        image_size=SIZE,
        width=2,
        num_blocks=0,
        likelihood=LogisticMixture.Config(num_components=1, zero_component=True),
        quantizer=StochasticVectorQuantizer.Config(num_codes=4, dim=2),
    )
    model = config.build()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    codec = Codec(model, Labelled(num_codes=4, grid=(2, 2)))
    codec.coder.group_size = GROUP
    return codec


codec = make_codec()
begun: list[int] = []
decode_codes = codec.coder.decode_codes


def counted(sources, labels, offsets):
    """With each group: it is noted once the stream let it begin."""
    codes = decode_codes(sources, labels, offsets)
    begun.append(len(offsets))
    return codes


codec.coder.decode_codes = counted


def check(data: bytes) -> None:
    mode, content_bytes = Mode(data[0] % 3 if data else 0), data[1:]
    content = None
    with contextlib.suppress(DamagedFile):
        content = BlockContent.unpack(content_bytes, 1, (SIZE, SIZE))
    begun.clear()
    try:
        [block] = codec.decoder.decode([(0, content_bytes)], mode)
    except DamagedFile as error:
        check_work(mode, content)
        seen[f"ended before its images, {mode.name}"] += "has ended" in str(error) or "gives back" in str(error)
        seen[f"unpacked, then refused, {mode.name}"] += content is not None
        return
    assert content is not None
    check_work(mode, content)
    assert BlockContent.unpack(content.pack(), 1, (SIZE, SIZE)) == content
    assert [tuple(image.shape) for image in block.images] == [tiling.shape for tiling in content.tilings]
    assert all(image.dtype == torch.uint8 for image in block.images)
    assert block.names == content.names
    assert (block.labels is not None) == content.has_labels
    if block.labels is not None:
        assert block.labels.shape == (len(content.tilings),)
        assert 0 <= int(block.labels.min()) <= int(block.labels.max()) < 3
    if mode != Mode.LOSSY:
        assert check_of(block.images, block.labels, None) == content.check
    seen[f"decoded, {mode.name}"] += 1
    seen["decoded, with labels"] += content.has_labels
    seen["decoded, with names"] += content.names is not None
    seen["decoded, some stored"] += STORED in content.kinds


def check_work(mode: Mode, content: BlockContent | None) -> None:
    """Codes are at even odds here, 8 bits a tile: what they take alone bounds the tiles of a stream."""
    if content is None:
        assert not begun
        return
    if mode != Mode.BITS_BACK:
        paid = len(content.stream) + coders.SLACK
        assert sum(begun) <= paid + GROUP, f"{sum(begun)} tiles from {len(content.stream)} bytes"


def mended(mode: Mode, content: BlockContent) -> BlockContent:
    """With the check of what really comes out, if anything does."""
    try:
        list(codec.decoder.decode([(0, content.pack())], mode))
    except DamagedFile as error:
        _, found, rest = error.args[0].partition("CRC-32 ")
        return dataclasses.replace(content, check=int(rest[:8], 16)) if found else content
    return content


def reparted(content: BlockContent, chance: random.Random) -> BlockContent:
    """Another content that has the form of one."""
    tilings, kinds = list(content.tilings), list(content.kinds)
    stream, names, has_labels = bytearray(content.stream), content.names, content.has_labels
    match chance.randrange(6):
        case 0:
            end = bytes if chance.random() < 0.5 else chance.randbytes
            stream[chance.randrange(len(stream) + 1) :] = end(chance.randrange(20))
        case 1:
            at = chance.randrange(len(kinds))
            kinds[at : at + chance.randrange(1, 4)] = [chance.choice((0, 1, 15, STORED))]
        case 2:
            shape = (chance.choice((1, 1, 2, 3)), chance.randrange(1, 2 * SIZE + 2), chance.randrange(1, 2 * SIZE + 2))
            tilings.insert(chance.randrange(len(tilings) + 1), Tiling(shape=shape, num_channels=1, size=(SIZE, SIZE)))
        case 3:
            del tilings[chance.randrange(len(tilings)) :]
        case 4:
            names = None if names else [chance.choice(("", "a", "ü.png")) for _ in tilings]
        case 5:
            has_labels = not has_labels
    tilings = tilings or list(content.tilings)
    tiles = tiles_of(tilings)
    kinds = (kinds + [0] * len(tiles))[: len(tiles)]
    num = sum(tiling.inside_bytes(tile) for (tiling, tile), kind in zip(tiles, kinds, strict=True) if kind == STORED)
    stored = (content.stored + chance.randbytes(64) + bytes(num))[:num]
    if names is not None:
        names = (list(names) + [""] * len(tilings))[: len(tilings)]
    return dataclasses.replace(
        content, tilings=tilings, kinds=kinds, stream=bytes(stream), stored=stored, names=names, has_labels=has_labels
    )


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    chance = random.Random(seed)
    if not data or chance.random() < 0.3:
        data = atheris.Mutate(data, max_size) or b"\0"
    try:
        content = BlockContent.unpack(data[1:], 1, (SIZE, SIZE))
    except DamagedFile:
        return bytes(data)[:max_size]
    mode = Mode(data[0] % 3) if chance.random() < 0.9 else chance.choice(list(Mode))
    while chance.random() < 0.5:
        content = reparted(content, chance)
    if chance.random() < 0.3:
        content = mended(mode, content)
    return (bytes([mode]) + content.pack())[:max_size]


def seeds(folder: Path) -> None:
    """Valid contents of images of all kinds in all modes, for libFuzzer to begin with."""
    draw = torch.Generator().manual_seed(0)
    for number, shapes in enumerate([[(1, 8, 8)], [(1, 8, 8)] * 3, [(1, 3, 11), (3, 8, 8)], [(2, 17, 1)]]):
        images = [torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8) for shape in shapes]
        labels, names = torch.arange(len(shapes)) % 3, ["n"] * len(shapes)
        for mode, divisor in itertools.product(Mode, (1, 64)):
            smooth, known = [image // divisor for image in images], labels if divisor > 1 else None
            [(_, content)] = codec.blocks(smooth, known, Compression(mode=mode), names=names if mode else None)
            (folder / f"{number}-{mode.name}-{divisor}").write_bytes(bytes([mode]) + content)


if __name__ == "__main__":
    fuzz(check, mutate, seeds, f"-max_len={MAX_SIZE}", "-timeout=20", memory=8 << 20)
