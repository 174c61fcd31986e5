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

import atexit
import random
import sys
import tempfile
import tracemalloc
from pathlib import Path

import atheris
import torch

from vqvae.codec import Compression

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
    from vqvae.codec.codec import Codec
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
CONSTANT = 8 << 20
TELL_EVERY = 5000
seen = {"inputs": 0, "unpacked": 0, "decoded": 0, "largest memory": 0}
seen |= {f"decoded, {mode.name}": 0 for mode in Mode} | {f"unpacked, then refused, {mode.name}": 0 for mode in Mode}
seen |= {f"ended before its images, {mode.name}": 0 for mode in Mode} | {"most tiles beyond those paid for": 0}
seen |= {"decoded, with labels": 0, "decoded, with names": 0, "decoded, some stored": 0, "decoded, mutated": 0}
valid: set[bytes] = set()


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
    seen["inputs"] += 1
    mode, content_bytes = Mode(data[0] % 3 if data else 0), data[1:]
    try:
        content = BlockContent.unpack(content_bytes, 1, SIZE)
    except DamagedFile as error:
        str(error)
        content = None
    begun.clear()
    try:
        decoded = list(codec.decoder.decode([(0, content_bytes)], mode))
    except DamagedFile as error:
        seen[f"ended before its images, {mode.name}"] += "has ended" in str(error) or "gives back" in str(error)
        check_work(mode, content)
        seen["unpacked"] += content is not None
        seen[f"unpacked, then refused, {mode.name}"] += content is not None
        return
    assert content is not None
    check_work(mode, content)
    [block] = decoded
    assert BlockContent.unpack(content.pack(), 1, SIZE) == content
    assert [tuple(image.shape) for image in block.images] == [tiling.shape for tiling in content.tilings]
    assert all(image.dtype == torch.uint8 for image in block.images)
    assert block.names == content.names
    assert (block.labels is not None) == content.has_labels
    if block.labels is not None:
        assert block.labels.shape == (len(content.tilings),)
        assert 0 <= int(block.labels.min()) <= int(block.labels.max()) < 3
        seen["decoded, with labels"] += 1
    if mode != Mode.LOSSY:
        assert check_of(block.images, block.labels, None) == content.check
    seen["unpacked"] += 1
    seen["decoded"] += 1
    seen[f"decoded, {mode.name}"] += 1
    seen["decoded, with names"] += content.names is not None
    seen["decoded, some stored"] += STORED in content.kinds
    seen["decoded, mutated"] += data not in valid


def check_work(mode: Mode, content: BlockContent | None) -> None:
    """Codes are at even odds here, 8 bits a tile: what they take alone bounds the tiles of a stream."""
    if content is None:
        assert not begun
        return
    if mode != Mode.BITS_BACK:
        beyond = sum(begun) - (len(content.stream) + coders.SLACK)
        seen["most tiles beyond those paid for"] = max(seen["most tiles beyond those paid for"], beyond)
        assert beyond <= GROUP, f"{sum(begun)} tiles from {len(content.stream)} bytes"


def tell() -> None:
    print(*(f"{name}: {number:,}" for name, number in seen.items()), sep="\n", flush=True)


def test_one_input(data: bytes) -> None:
    # Started once: starting and stopping for each input leaks. Tensors' own memory is bounded by MAX_PIXELS.
    before, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    check(data)
    peak = tracemalloc.get_traced_memory()[1] - before
    seen["largest memory"] = max(seen["largest memory"], peak)
    if seen["inputs"] % TELL_EVERY == 0:
        tell()
    assert peak <= CONSTANT, f"{peak} bytes of memory for an input of {len(data)}"


def mended(mode: Mode, content: BlockContent) -> BlockContent:
    """With the check of what really comes out, if anything does."""
    try:
        list(codec.decoder.decode([(0, content.pack())], mode))
    except DamagedFile as error:
        _, found, rest = error.args[0].partition("CRC-32 ")
        return replaced(content, check=int(rest[:8], 16)) if found else content
    return content


def replaced(content: BlockContent, **changes) -> BlockContent:
    names = ("tilings", "kinds", "has_labels", "check", "stream", "stored", "names")
    return BlockContent(**{name: changes.get(name, getattr(content, name)) for name in names})


def reparted(mode: Mode, content: BlockContent, chance: random.Random) -> BlockContent:
    """Another content that has the form of one."""
    tilings, kinds = list(content.tilings), list(content.kinds)
    stream, names, has_labels = bytearray(content.stream), content.names, content.has_labels
    match chance.randrange(8):
        case 0:
            at = chance.randrange(len(stream) + 1)
            stream[at:] = chance.randbytes(chance.randrange(20))
        case 1:
            at = chance.randrange(len(kinds))
            kinds[at : at + chance.randrange(1, 4)] = [chance.choice((0, 1, 15, STORED))]
        case 2:
            shape = (chance.choice((1, 1, 2, 3)), chance.randrange(1, 2 * SIZE + 2), chance.randrange(1, 2 * SIZE + 2))
            tilings.insert(chance.randrange(len(tilings) + 1), Tiling(shape=shape, num_channels=1, size=SIZE))
        case 3:
            del tilings[chance.randrange(len(tilings)) :]
        case 4:
            names = None if names else [chance.choice(("", "a", "ü.png")) for _ in tilings]
        case 5:
            has_labels = not has_labels
        case 6 if stream:
            stream[chance.randrange(len(stream))] ^= 1 << chance.randrange(8)
        case 7:
            stream[chance.randrange(len(stream) + 1) :] = b"" if chance.random() < 0.5 else bytes(chance.randrange(9))
    tilings = tilings or list(content.tilings)
    tiles = tiles_of(tilings)
    kinds = (kinds + [0] * len(tiles))[: len(tiles)]
    num = sum(tiling.inside_bytes(tile) for (tiling, tile), kind in zip(tiles, kinds, strict=True) if kind == STORED)
    stored = (content.stored + chance.randbytes(64) + bytes(num))[:num]
    if names is not None:
        names = (list(names) + [""] * len(tilings))[: len(tilings)]
    return replaced(
        content, tilings=tilings, kinds=kinds, stream=bytes(stream), stored=stored, names=names, has_labels=has_labels
    )


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    chance = random.Random(seed)
    if not data or chance.random() < 0.3:
        data = atheris.Mutate(data, max_size) or b"\0"
    try:
        content = BlockContent.unpack(data[1:], 1, SIZE)
    except DamagedFile:
        return bytes(data)[:max_size]
    mode = Mode(data[0] % 3) if chance.random() < 0.9 else chance.choice(list(Mode))
    while chance.random() < 0.5:
        content = reparted(mode, content, chance)
    if chance.random() < 0.3:
        content = mended(mode, content)
    return (bytes([mode]) + content.pack())[:max_size]


def seeds(folder: Path) -> None:
    """Valid contents of images of all kinds in all modes, for libFuzzer to begin with."""
    draw = torch.Generator().manual_seed(0)
    shapes = [[(1, 8, 8)], [(1, 8, 8)] * 3, [(1, 3, 11), (3, 8, 8)], [(2, 17, 1)]]
    for number, some in enumerate(shapes):
        images = [torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8) for shape in some]
        smooth = [image // 64 for image in images]
        labels = torch.arange(len(some)) % 3
        for mode in Mode:
            for kind, (pixels, known, names) in enumerate(
                [(images, None, None), (smooth, None, None), (smooth, labels, None), (smooth, None, ["n"] * len(some))]
            ):
                [(_, content)] = codec.blocks(pixels, known, Compression(mode=mode), names=names)
                valid.add(bytes([mode]) + content)
                (folder / f"{number}-{mode.name}-{kind}").write_bytes(bytes([mode]) + content)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        seeds(Path(folder))
        # At its end libFuzzer leaves at once, and runs no more of Python: this is for an error.
        atexit.register(tell)
        arguments = [sys.argv[0], f"-max_len={MAX_SIZE}", "-timeout=20", *sys.argv[1:], folder]
        atheris.Setup(arguments, test_one_input, custom_mutator=mutate)
        tracemalloc.start()
        atheris.Fuzz()


if __name__ == "__main__":
    main()
