"""A compressed file as a dataset, and bits as images."""

import os
import pickle
import random

import numpy as np
import pytest
import torch
from codec_worlds import images_of, model_of, transformer_of, uniform_of
from torch.utils.data import DataLoader

from vqvae.codec import Codec, CompressedImages, Compression, DamagedFile, dream, write
from vqvae.codec.container import Mode
from vqvae.codec.dreaming import undream


@pytest.fixture(scope="module")
def codec():
    model = model_of()
    return Codec(model, transformer_of(model, num_classes=3))


@pytest.fixture(scope="module")
def images(codec):
    return images_of(model_of(), 10)


@pytest.fixture
def dataset_of(codec, images, tmp_path):
    """The images as a dataset, with these options of `Compression`."""

    def make(labels=None, images=images, **options):
        blocks = codec.blocks(images, labels, Compression(verify=False, **options))
        write(tmp_path / "images.vq", codec.header(Mode.LOSSLESS), blocks)
        return CompressedImages(tmp_path / "images.vq", codec)

    return make


@pytest.mark.parametrize("images_per_block", [1, 3, 100])
def test_items_are_the_images(images, dataset_of, images_per_block):
    dataset = dataset_of(images_per_block=images_per_block)
    assert len(dataset) == 10
    for i in (7, 0, 9, -1, 3):
        assert torch.equal(dataset[i], images[i])
    assert torch.equal(torch.stack(dataset.__getitems__([5, 1, 5, 8])), images[[5, 1, 5, 8]])
    dataset[0].fill_(7)  # what a reader does to an item stays with him
    assert torch.equal(dataset[0], images[0])
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(torch.stack(list(copy)), images)


@pytest.mark.usefixtures("untyped")
def test_what_numbers_an_image(images, dataset_of):
    dataset = dataset_of()
    for index in (np.int64(3), np.uint8(3), torch.tensor(3)):
        assert torch.equal(dataset[index], images[3])
    for i in (10, -11):
        with pytest.raises(IndexError, match="of a file of 10"):
            dataset[i]
    for index in (slice(2), "3", 3.0, [3]):
        with pytest.raises(TypeError, match="for an image, expected its number"):
            dataset[index]


def test_a_block_is_decoded_once(codec, dataset_of, monkeypatch):
    dataset = dataset_of(images_per_block=2)
    decoded, original = [], codec.decode

    def counted(archive, blocks):
        decoded.append(list(blocks))
        return original(archive, decoded[-1])

    monkeypatch.setattr(codec, "decode", counted)
    for i in (0, 1, 2, 3, 0):
        dataset[i]
    dataset.__getitems__([9, 4, 5, 8])
    assert decoded == [[0], [], [1], [], [], [2, 4]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a single core
def test_workers_that_are_spawned(images, dataset_of):
    loader = DataLoader(dataset_of(images_per_block=2), batch_size=4, num_workers=2, multiprocessing_context="spawn")
    assert torch.equal(torch.cat(list(loader)), images)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("images_per_block", "num_workers", "labelled"), [(1, 2, True), (4, 0, True), (4, 2, False)])
def test_a_plain_loader_of_torch(images, dataset_of, images_per_block, num_workers, labelled):
    """With torch's own way to make batches, in any order, in workers that were forked, and again."""
    labels = torch.arange(10) % 3 if labelled else None
    dataset = dataset_of(labels, images_per_block=images_per_block)
    dataset[0]
    loader = DataLoader(dataset, batch_size=4, shuffle=True, num_workers=num_workers)
    order = {tuple(image.flatten().tolist()): i for i, image in enumerate(images)}
    for _ in range(2):
        batches = list(loader)
        pixels = torch.cat([batch[0] for batch in batches] if labelled else batches)
        assert (pixels.dtype, pixels.shape) == (torch.uint8, (10, 1, 8, 8))
        found = [order[tuple(image.flatten().tolist())] for image in pixels]
        assert sorted(found) == list(range(10))
        if labelled:
            known = torch.cat([batch[1] for batch in batches])
            assert known.dtype == torch.int64
            assert torch.equal(known, labels[found])


def test_a_forked_worker_has_a_lock_of_its_own(images, dataset_of, monkeypatch):
    """It has the parent's as it was at the fork, and whoever held it is not there to let it go."""
    dataset = dataset_of()
    dataset._lock.acquire()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert torch.equal(dataset[4], images[4])


def test_files_that_are_none_of_this_codec(codec, dataset_of, tmp_path):
    dataset_of()
    path, other = tmp_path / "images.vq", model_of(seed=4)
    with pytest.raises(ValueError, match="written with the model"):
        CompressedImages(path, Codec(other, uniform_of(other)))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DamagedFile):
        CompressedImages(path, codec)


@pytest.mark.parametrize(
    "likelihood", ["mixture", "colour mixture with zero", "local context", "categorical", "normal"]
)
def test_bytes_come_back(likelihood):
    model = model_of(likelihood)
    codec = Codec(model, transformer_of(model))
    chance = random.Random(0)
    for data in (chance.randbytes(1501), b"\0" * 1200, b"\xff" * 1203, b"", b"\0", chance.randbytes(3)):
        dreamt = dream(codec, data, most=3)  # bytes that are all alike may be hundreds of images
        assert undream(codec, dreamt) == data
        assert len(dreamt.images) == len(dreamt.codes) <= 3
        assert dreamt.images.shape[1:] == images_of(model, 1).shape[1:]


def test_images_take_as_many_bits_as_they_cost(codec):
    data = random.Random(1).randbytes(4000)
    dreamt = dream(codec, data)
    assert len(dreamt.images) > 20
    intervals, _ = codec.coder.settle(dreamt.images, dreamt.codes, None)
    bits = float((intervals.rate() + intervals.distortion()).sum())
    assert abs(8 * (len(data) - len(dreamt.left)) - bits) < 100


@pytest.mark.parametrize("mode", [Mode.LOSSLESS, Mode.LOSSY])
def test_bytes_are_the_same_under_any_default_type_and_device(images, mode):
    model = model_of()
    prior = transformer_of(model, num_classes=3)
    codec, labels = Codec(model, prior), [index % 3 for index in range(len(images))]
    want, cost = codec.compress(images, labels, Compression(mode=mode)), codec.measure(images).total
    back, bits = codec.decompress(want), random.Random(0).randbytes(4000)
    dreamt = dream(codec, bits, most=1)
    for dtype, device in (("bfloat16", "cpu"), ("float64", "cpu"), ("float32", "meta")):
        try:
            torch.set_default_dtype(getattr(torch, dtype))
            torch.set_default_device(device)
            assert codec.compress(images, labels, Compression(mode=mode)) == want
            assert Codec(model, prior).compress(images, labels, Compression(mode=mode)) == want
            assert codec.decompress(want).equal(back)
            assert codec.measure(images).total.equal(cost)
            assert dream(codec, bits, most=1).images.equal(dreamt.images)
            assert undream(codec, dreamt) == bits
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)


def test_what_a_caller_draws_between_blocks_is_his_own(codec):
    """Images that come out of torch's random generator, block by block, as augmented ones do."""
    options = Compression(images_per_block=1, verify=False)

    def drawn():
        torch.manual_seed(3)
        for _ in range(4):
            yield torch.randint(0, 255, (1, 8, 8), dtype=torch.uint8)

    contents = [content for _, content in codec.blocks(drawn(), options=options)]
    assert contents == [content for _, content in codec.blocks(list(drawn()), options=options)]
    assert len(set(contents)) == 4
