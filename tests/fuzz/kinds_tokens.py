"""Tokenized sets: an index beside good shards, and a shard beside a good index.

Of what is read all rows and keys must be those that were written; anything else is a RuntimeError, a fault.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from fuzz_files import Kind

from vqvae import VQVAE
from vqvae.data import ImageTensors
from vqvae.quantizers import VectorQuantizer
from vqvae.tokens import CodeDataset, Tokenizing, tokenize
from vqvae.tokens.index import checksum
from vqvae.tokens.layout import plan
from vqvae.tokens.shards import is_done

SHARD = "codes-00001.safetensors"
OPTIONS = Tokenizing(tokenizer_source="runs/x", batch_size=4, shard_size=9)
NUM = 24


class _World:
    """A set, what it holds, and what it was made of."""

    def __init__(self, place: Path):
        torch.manual_seed(0)
        quantizer = VectorQuantizer.Config(num_codes=16, dim=4)
        self.model = VQVAE(image_size=8, num_channels=1, width=8, num_blocks=1, quantizer=quantizer).eval()
        pixels = torch.randint(0, 256, (2, NUM, 1, 8, 8), dtype=torch.uint8)
        labels, names = torch.arange(NUM) % 3, ("a", "b", "é")
        self.images = ImageTensors(pixels[0], labels, names)
        tokenize(self.model, self.images, place / "codes", OPTIONS)
        self.files = {path.name: path.read_bytes() for path in (place / "codes").iterdir()}
        self.rows = _rows(CodeDataset(place / "codes"), range(NUM))
        self.indices = [self.files["index.json"], _as_before(self.files["index.json"])]
        # Of other images, and without labels: shards that the index does not pin.
        self.others = []
        for name, images in (("other", ImageTensors(pixels[1], labels)), ("bare", ImageTensors(pixels[0]))):
            tokenize(self.model, images, place / name, OPTIONS)
            self.others.append((place / name / SHARD).read_bytes())

    def put(self, path: Path) -> Path:
        """The good files beside a damaged one."""
        for name, data in self.files.items():
            if name != path.name:
                (path.parent / name).write_bytes(data)
        return path.parent

    def check(self, folder: Path, rows: Sequence[int]) -> None:
        """RuntimeError where rows are read that are others than what was written."""
        codes = CodeDataset(folder)
        found = _rows(codes, rows)
        if wrong := [row for row, each in zip(rows, found, strict=True) if each != self.rows[row]]:
            raise RuntimeError(f"other rows, labels or keys: {wrong[:5]}")
        for shard in range(codes.num_shards):
            codes.shard(shard)


def _rows(codes: CodeDataset, rows: Sequence[int]) -> list[tuple[list, int | None, str]]:
    """Codes, label and key of each."""
    found = codes[rows]
    labels = [None] * len(rows) if found.labels is None else found.labels.tolist()
    return list(zip(found.codes.tolist(), labels, map(codes.key, rows), strict=True))


def _as_before(text: bytes) -> bytes:
    """An index as versions before wrote it, without checksums."""
    index = json.loads(text)
    index.pop("crc32")
    for shard in index["shards"]:
        shard.pop("crc32")
    index["source"] = index["tokenizer"]["source"] = "/somewhere/photos"
    return json.dumps(index, indent=1, sort_keys=True).encode()


_WORLDS: list[_World] = []


def _good_index(place: Path) -> list[bytes]:
    _WORLDS.append(_World(place))
    return _WORLDS[-1].indices


def _good_shard(place: Path) -> list[bytes]:
    _WORLDS.append(_World(place))
    files, others = _WORLDS[-1].files, _WORLDS[-1].others
    return [files[SHARD]] * 4 + [files["codes-00000.safetensors"], *others]


def _read_index(path: Path) -> None:
    folder = _WORLDS[-1].put(path)
    refused = None
    for data in (path.read_bytes(), _signed(path.read_bytes())):
        path.write_bytes(data)
        try:
            _WORLDS[-1].check(folder, range(NUM))
        except ValueError as error:
            refused = error
    if refused is not None:
        raise refused


def _signed(data: bytes) -> bytes:
    """The same with a checksum that fits, so that what is behind it is reached."""
    try:
        index = json.loads(data)
        return json.dumps({**index, "crc32": checksum(index)}).encode()
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return data


def _read_shard(path: Path) -> None:
    world, folder = _WORLDS[-1], _WORLDS[-1].put(path)
    # What a run that goes on finds, and then both kinds of index.
    refused = None
    try:
        is_kept = is_done(plan(world.model, world.images, folder, OPTIONS), 1)
        if is_kept and path.read_bytes()[-100:] != world.files[SHARD][-100:]:
            raise RuntimeError("it goes on from another shard")
    except ValueError as error:
        refused = error
    for index in world.indices:
        if index is not world.indices[0] and path.read_bytes() in world.others:
            continue  # only the pins tell that it is none of the set's
        (folder / "index.json").write_bytes(index)
        world.check(folder, [*range(9), *range(18, NUM)])
        try:
            world.check(folder, range(NUM))
        except ValueError as error:
            refused = error
    if refused is not None:
        raise refused


KINDS = {
    "index": Kind(good=_good_index, read=_read_index, name="codes/index.json", is_json=True),
    "shard": Kind(good=_good_shard, read=_read_shard, name=f"codes/{SHARD}"),
}
