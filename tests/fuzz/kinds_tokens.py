"""Tokenized sets: an index beside good shards, and a shard beside a good index.

Of what is read all rows and keys must be those that were written; anything else is a RuntimeError, a fault.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from fuzz_files import Kind
from torch import Tensor

from vqvae import VQVAE
from vqvae.data import ImageTensors
from vqvae.quantizers import VectorQuantizer
from vqvae.tokens import CodeDataset, Tokenizing, tokenize
from vqvae.tokens.index import checksum
from vqvae.tokens.layout import Plan, plan
from vqvae.tokens.shards import is_done

SHARD = "codes-00001.safetensors"
OPTIONS = Tokenizing(tokenizer_source="runs/x", batch_size=4, shard_size=9)
NUM = 24


class _World:
    """A set, what it holds, and the plan that it was made by."""

    def __init__(self, place: Path):
        torch.manual_seed(0)
        quantizer = VectorQuantizer.Config(num_codes=16, dim=4)
        self.model = VQVAE(image_size=8, num_channels=1, width=8, num_blocks=1, quantizer=quantizer).eval()
        self.images = _images(0)
        self.folder = place / "codes"
        tokenize(self.model, self.images, self.folder, OPTIONS)
        self.files = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        codes = CodeDataset(self.folder)
        self.rows, self.keys = codes[:], [codes.key(row) for row in range(NUM)]
        self.indices = [self.files["index.json"], _as_before(self.files["index.json"])]
        # Of other images, of another tokenizer, and without labels: shards that the index does not pin.
        pixels, labels = _images(1).images, _images(1).labels
        self.others = []
        for name, images in (("other", ImageTensors(pixels, labels)), ("bare", ImageTensors(self.images.images))):
            tokenize(self.model, images, place / name, replace(OPTIONS, tokenizer_source=None))
            self.others.append((place / name / SHARD).read_bytes())

    def put(self, path: Path) -> Path:
        """The good files beside a damaged one."""
        for name, data in self.files.items():
            if name != path.name:
                (path.parent / name).write_bytes(data)
        return path.parent

    def plan(self, folder: Path) -> Plan:
        return plan(self.model, self.images, folder, OPTIONS)

    def check(self, folder: Path, rows: Sequence[int]) -> None:
        """RuntimeError where rows are read that are others than what was written."""
        codes = CodeDataset(folder)
        found = codes[rows]
        chosen = list(rows)
        _same(found.codes, self.rows.codes[chosen])
        assert self.rows.labels is not None
        if found.labels is None:
            raise RuntimeError("labels are gone")
        _same(found.labels, self.rows.labels[chosen])
        if [codes.key(row) for row in rows] != [self.keys[row] for row in rows]:
            raise RuntimeError("other keys")
        for shard in range(codes.num_shards):
            codes.shard(shard)


def _images(seed: int) -> ImageTensors:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (NUM, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageTensors(pixels, torch.arange(NUM) % 3, ("a", "b", "é"), name="photos")


def _as_before(text: bytes) -> bytes:
    """An index as versions before wrote it, without checksums."""
    index = json.loads(text)
    index.pop("crc32")
    for shard in index["shards"]:
        shard.pop("crc32")
    index["source"] = index["tokenizer"]["source"] = "/somewhere/photos"
    return json.dumps(index, indent=1, sort_keys=True).encode()


def _same(found: Tensor, expected: Tensor) -> None:
    if not torch.equal(found, expected):
        raise RuntimeError(f"other rows: {np.flatnonzero((found != expected).flatten().numpy())[:5]}")


_WORLDS: list[_World] = []


def _world() -> _World:
    return _WORLDS[-1]


def _good_index(place: Path) -> list[bytes]:
    _WORLDS.append(_World(place))
    return _world().indices


def _good_shard(place: Path) -> list[bytes]:
    _WORLDS.append(_World(place))
    return [_world().files[SHARD]] * 4 + [_world().files["codes-00000.safetensors"], *_world().others]


def _read_index(path: Path) -> None:
    folder = _world().put(path)
    refused = None
    for data in (path.read_bytes(), _signed(path.read_bytes())):
        path.write_bytes(data)
        try:
            _world().check(folder, range(NUM))
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
    world, folder = _world(), _world().put(path)
    # What a run that goes on finds, and then both kinds of index.
    refused = None
    try:
        if is_done(world.plan(folder), 1) and path.read_bytes()[-100:] != world.files[SHARD][-100:]:
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
