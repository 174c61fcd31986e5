"""Archives (.vq), for `fuzz_files`, read by a small model whose weights are random, in two of all ways that there are.

Which ones depends on the bytes. Half of the files have their checks mended first, as all of the format lies behind
them.
"""

import contextlib
import csv
import functools
import io
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch
from fuzz_files import Kind

from priors import TransformerPrior
from vqvae import VQVAE
from vqvae.cli import describing, unpacking
from vqvae.codec import Codec, CompressedImages, Compression, Mode, container
from vqvae.quantizers import StochasticVectorQuantizer

_SIZE = 8


@functools.cache
def _codec() -> Codec:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    quantizer = StochasticVectorQuantizer.Config(num_codes=8, dim=4)
    model = VQVAE(image_size=_SIZE, width=4, num_blocks=0, quantizer=quantizer)
    options = TransformerPrior.Config(num_codes=8, grid=model.grid, num_classes=3, width=8, depth=1, num_heads=1)
    return Codec(model, options.build())


def _good(folder: Path) -> Sequence[bytes]:
    draw = torch.Generator().manual_seed(0)
    smooth = torch.randint(126, 129, (6, 1, _SIZE, _SIZE), generator=draw).to(torch.uint8)
    noise = torch.randint(0, 256, (3, 3, 11, 5), generator=draw).to(torch.uint8)
    black = torch.zeros(5, 1, 20, 20, dtype=torch.uint8)
    files = []
    for mode in Mode:
        for images in (smooth, noise, black, [*smooth, *noise]):
            num = len(images)
            for labels, names in ((None, None), (torch.arange(num) % 3, [f"in/{i}.png" for i in range(num)])):
                options = Compression(mode=mode, images_per_block=4, verify=False)
                blocks = _codec().blocks(images, labels, options, names=names)
                files.append(container.pack(_codec().header(mode), blocks))
    return files


def _read(path: Path) -> None:
    data = path.read_bytes()
    chance = random.Random(zlib.crc32(data))
    if chance.random() < 0.5:
        data = _mended(bytearray(data))
        path.write_bytes(data)
    ways: list[Callable[[], object]] = [
        functools.partial(_codec().decompress, data),
        functools.partial(_first, path),
        functools.partial(_info, path, None),
        functools.partial(_info, path, "model"),
        functools.partial(_unpack, path, recover=False),
        functools.partial(_unpack, path, recover=True),
    ]
    refused: list[ValueError] = []
    for way in chance.sample(ways, 2):
        try:
            way()
        except ValueError as error:
            refused.append(error)
    if refused:
        raise refused[0]


def _first(path: Path) -> None:
    dataset = CompressedImages(path, _codec())
    with contextlib.closing(dataset.archive):
        if len(dataset):
            dataset.__getitems__([0, -1])


def _info(path: Path, model: str | None) -> None:
    with _quietly(describing):
        describing.info(path, model, csv=None if model is None else path.with_name("x.csv"))
    if model is not None:
        list(csv.reader(path.with_name("x.csv").open(newline="")))


def _unpack(path: Path, *, recover: bool) -> None:
    out = path.parent / "out"
    with _quietly(unpacking):
        unpacking.decompress("model", path, output=out, recover=recover, force=True)


@contextlib.contextmanager
def _quietly(module):
    """Without a word, and with the one codec that there is."""
    silence = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with mock.patch.object(module, "load_codec", return_value=(_codec(), 0)), silence[0], silence[1]:
        yield


def _mended(data: bytearray) -> bytes:
    """The same file with every check as it must be, and an index that fits its blocks, where they can be told."""
    if len(data) < 26:
        return bytes(data)
    data[14:16] = struct.pack("<H", zlib.crc32(data[:14]) & 0xFFFF)
    start, index, at = bytes(data[:16]), b"", 16
    while data[at : at + 4] == container.MARKER and at + 12 < len(data):
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        content = bytes(data[at + 12 : at + 12 + length])
        head = container.MARKER + struct.pack("<I", len(content))
        start += head + struct.pack("<I", zlib.crc32(head + content)) + content
        index += container.varint(container.count_images(content) or 1) + container.varint(len(content))
        at += 12 + length
    length = struct.pack("<I", len(index))
    return start + index + length + struct.pack("<I", zlib.crc32(start[:16] + index + length)) + container.END_MAGIC


KINDS = {"vq": Kind(good=_good, read=_read, name="x.vq")}
