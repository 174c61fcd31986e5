r"""Coverage-guided fuzzing of the codec's file format, with atheris (libFuzzer).

    python tests/fuzz/fuzz_container.py -runs=200000

Inputs are valid files, mutated by libFuzzer. Most of them then have every check mended, so that they get past the CRCs.

What must hold for any bytes at all:
    only DamagedFile is raised;
    a block has a right CRC and the length and place that the index gives; the parts fill the file;
    a file whose contents all read is byte for byte what `pack` makes of them, and `recover` finds no damage in it;
    `recover` finds each content that `Archive.content` reads, and what it finds lies in the file under a right CRC;
    no more memory is asked for than the input's size and a constant.
"""

import contextlib
import itertools
import random
import struct
import sys
import zlib
from pathlib import Path

import atheris
from guided import fuzz, seen

sys.path.insert(0, str(Path(__file__).parents[2]))
with atheris.instrument_imports(include=["vqvae.codec.archive", "vqvae.codec.container", "vqvae.codec.recovery"]):
    from vqvae.codec import container
    from vqvae.codec.archive import Archive
    from vqvae.codec.container import DamagedFile, Header, Mode, pack, varint
    from vqvae.codec.recovery import recover

MAX_SIZE = 4096


def frame(content: bytes) -> bytes:
    start = container.MARKER + struct.pack("<I", len(content))
    return start + struct.pack("<I", zlib.crc32(start + content)) + content


def check(data: bytes) -> None:
    whole: list[tuple[int | None, bytes]] = []
    archive = None
    with contextlib.suppress(DamagedFile):
        archive = Archive.from_bytes(data)
    if archive is not None:
        at = 16
        for i, block in enumerate(archive.blocks):
            assert block.offset == at + 12
            assert 1 <= block.num_images <= 65_535
            at += 12 + block.length
            try:
                content = archive.content(i)
            except DamagedFile:
                continue
            assert data[block.offset - 12 : block.offset + block.length] == frame(content)
            assert len(content) == block.length
            whole.append((block.num_images, content))
        if archive.num_images:
            assert archive.locate(archive.num_images - 1)[0] == len(archive.blocks) - 1
    found = recover(data)
    for _, content in found.blocks:
        assert frame(content) in data
    if archive is None:
        assert found.damage
        seen["not opened, blocks recovered"] += bool(found.blocks)
        return
    seen["opened"] += 1
    assert found.header == archive.header
    assert [block for block in found.blocks if block[0] is not None] == whole
    if len(whole) == len(archive.blocks):
        assert pack(archive.header, whole) == data  # the numbers are known, so they are the index's
        assert not found.damage
        seen["all contents whole" if whole else "empty"] += 1
    else:
        assert found.damage
        seen["opened, not all contents whole"] += 1


def mended(data: bytearray) -> bytes:
    """The same file with every check and mark as it must be, as far as its parts can be told."""
    if len(data) < 26:
        return bytes(data)
    data[:5] = b"\x89VQ\n\x01"
    data[5] %= 3
    data[14:16] = struct.pack("<H", zlib.crc32(data[:14]) & 0xFFFF)
    at = data.find(container.MARKER)
    while at >= 0 and at + 12 <= len(data):
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        end = at + 12 + length
        if end <= len(data):
            data[at + 8 : at + 12] = struct.pack("<I", zlib.crc32(data[at + 12 : end], zlib.crc32(data[at : at + 8])))
        at = data.find(container.MARKER, end if end <= len(data) else at + 1)
    size = int.from_bytes(data[-10:-6], "little")
    if size <= len(data) - 26:
        index = data[len(data) - 10 - size : -6]
        data[-6:-2] = struct.pack("<I", zlib.crc32(index, zlib.crc32(data[:16])))
    data[-2:] = container.END_MAGIC
    return bytes(data)


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    chance = random.Random(seed)
    data = atheris.Mutate(data, max_size)
    if chance.random() < 0.8:
        data = mended(bytearray(data))
    return data[:max_size]


def seeds(folder: Path) -> None:
    """Valid files of 0 to 4 blocks, and one that is cut, for libFuzzer to begin with."""
    chance = random.Random(0)
    for num_blocks, mode in itertools.product(range(5), Mode):
        numbers = [chance.choice((1, 2, 127, 128, 65_535)) for _ in range(num_blocks)]
        blocks = [(number, varint(number) + chance.randbytes(chance.randrange(200))) for number in numbers]
        data = pack(Header(mode=mode, fingerprint=chance.randbytes(8)), blocks)
        (folder / f"{num_blocks}-{mode.name}").write_bytes(data)
        (folder / f"{num_blocks}-{mode.name}-cut").write_bytes(data[: chance.randrange(len(data))])


if __name__ == "__main__":
    fuzz(check, mutate, seeds, f"-max_len={MAX_SIZE}", memory=1 << 20)
