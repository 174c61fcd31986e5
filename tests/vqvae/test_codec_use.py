"""A compressed file as a dataset, and bits as images."""

import os
import pickle
import random

import numpy as np
import pytest
import torch
from codec_worlds import images_of, model_of, transformer_of, uniform_of
from torch.utils.data import ConcatDataset, DataLoader, Subset

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


def file_of(codec, path, images, labels=None, **options):
    write(path, codec.header(Mode.LOSSLESS), codec.blocks(images, labels, Compression(verify=False, **options)))
    return path


# ---- the dataset


@pytest.mark.parametrize("images_per_block", [1, 3, 100])
def test_items_are_the_images(codec, images, tmp_path, images_per_block):
    path = file_of(codec, tmp_path / "images.vqz", images, images_per_block=images_per_block)
    dataset = CompressedImages(path, codec)
    assert len(dataset) == 10
    for i in (7, 0, 9, -1, 3):
        assert torch.equal(dataset[i], images[i])
    assert torch.equal(torch.stack(dataset.__getitems__([5, 1, 5, 8])), images[[5, 1, 5, 8]])
    for i in (10, -11):
        with pytest.raises(IndexError, match="of a file of 10"):
            dataset[i]


def test_what_a_reader_does_to_an_item_stays_with_him(codec, images, tmp_path):
    dataset = CompressedImages(file_of(codec, tmp_path / "images.vqz", images), codec)
    dataset[0].fill_(7)
    assert torch.equal(dataset[0], images[0])


def test_labels_come_with_the_images(codec, images, tmp_path):
    labels = torch.arange(10) % 3
    dataset = CompressedImages(file_of(codec, tmp_path / "images.vqz", images, labels, images_per_block=4), codec)
    image, label = dataset[8]
    assert torch.equal(image, images[8])
    assert label == 2


def test_a_block_is_decoded_once(codec, images, tmp_path, monkeypatch):
    dataset = CompressedImages(file_of(codec, tmp_path / "images.vqz", images, images_per_block=2), codec)
    decoded = []
    original = codec.decode

    def counted(archive, blocks):
        decoded.append(list(blocks))
        return original(archive, decoded[-1])

    monkeypatch.setattr(codec, "decode", counted)
    for i in (0, 1, 2, 3, 0):
        dataset[i]
    assert decoded == [[0], [], [1], [], []]
    dataset.__getitems__([9, 4, 5, 8])
    assert decoded[-1] == [2, 4]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a single core
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_loader_goes_through_it(codec, images, tmp_path, num_workers):
    dataset = CompressedImages(file_of(codec, tmp_path / "images.vqz", images, images_per_block=2), codec)
    options = {"multiprocessing_context": "spawn"} if num_workers else {}
    loader = DataLoader(dataset, batch_size=4, num_workers=num_workers, **options)
    assert torch.equal(torch.cat(list(loader)), images)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("images_per_block", [1, 4])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("labelled", [False, True])
def test_case_27_a_plain_loader_of_torch(codec, images, tmp_path, images_per_block, num_workers, labelled):
    """With torch's own way to make batches, in any order, in workers that were forked, and again."""
    labels = torch.arange(10) % 3 if labelled else None
    path = file_of(codec, tmp_path / "images.vq", images, labels, images_per_block=images_per_block)
    dataset = CompressedImages(path, codec)
    dataset[0]
    loader = DataLoader(dataset, batch_size=4, shuffle=True, num_workers=num_workers)
    order = {tuple(image.flatten().tolist()): i for i, image in enumerate(images)}
    for _ in range(2):
        batches = list(loader)
        assert [len(batch) for batch in batches] == [2, 2, 2] if labelled else [4, 4, 2]
        pixels = torch.cat([batch[0] for batch in batches] if labelled else batches)
        assert (pixels.dtype, pixels.shape) == (torch.uint8, (10, 1, 8, 8))
        found = [order[tuple(image.flatten().tolist())] for image in pixels]
        assert sorted(found) == list(range(10))
        if labelled:
            known = torch.cat([batch[1] for batch in batches])
            assert known.dtype == torch.int64
            assert torch.equal(known, labels[found])


def test_case_27_parts_of_a_dataset(codec, images, tmp_path):
    dataset = CompressedImages(file_of(codec, tmp_path / "images.vq", images, images_per_block=3), codec)
    part = Subset(dataset, [8, 2, 5])
    assert torch.equal(next(iter(DataLoader(part, batch_size=3))), images[[8, 2, 5]])
    both = ConcatDataset([part, dataset])
    assert torch.equal(next(iter(DataLoader(both, batch_size=13))), images[[8, 2, 5, *range(10)]])
    assert [image.shape for image in dataset] == [(1, 8, 8)] * 10


def test_case_27_images_of_several_shapes_are_torchs_to_refuse(codec, images, tmp_path):
    path = file_of(codec, tmp_path / "images.vq", [images[0], images[1][:, :5]])
    dataset = CompressedImages(path, codec)
    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
        next(iter(DataLoader(dataset, batch_size=2)))
    [found] = DataLoader(dataset, batch_size=2, collate_fn=list)
    assert torch.equal(found[1], images[1][:, :5])


@pytest.mark.usefixtures("untyped")
def test_what_numbers_an_image(codec, images, tmp_path):
    dataset = CompressedImages(file_of(codec, tmp_path / "images.vq", images), codec)
    for index in (np.int64(3), np.uint8(3), torch.tensor(3)):
        assert torch.equal(dataset[index], images[3])
    for index in (slice(2), "3", 3.0, None, [3]):
        with pytest.raises(TypeError, match="for an image, expected its number"):
            dataset[index]


def test_a_forked_worker_has_a_lock_of_its_own(codec, images, tmp_path, monkeypatch):
    """It has the parent's as it was at the fork, and whoever held it is not there to let it go."""
    dataset = CompressedImages(file_of(codec, tmp_path / "images.vq", images), codec)
    dataset._lock.acquire()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert torch.equal(dataset[4], images[4])


def test_a_copy_in_another_process_reads_for_itself(codec, images, tmp_path):
    dataset = CompressedImages(file_of(codec, tmp_path / "images.vqz", images), codec)
    first = dataset[0]
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[0], first)
    assert len(copy) == 10


def test_files_that_are_none_of_this_codec(codec, images, tmp_path):
    path = file_of(codec, tmp_path / "images.vqz", images)
    other = model_of(seed=4)
    with pytest.raises(ValueError, match="written with the model"):
        CompressedImages(path, Codec(other, uniform_of(other)))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DamagedFile):
        CompressedImages(path, codec)


# ---- dreams


@pytest.mark.parametrize(
    "likelihood", ["mixture", "colour mixture with zero", "local context", "categorical", "normal"]
)
def test_bytes_come_back(likelihood):
    model = model_of(likelihood)
    codec = Codec(model, transformer_of(model))
    chance = random.Random(0)
    for data in (chance.randbytes(1501), b"\0" * 1200, b"\xff" * 1203, b"", b"\0", chance.randbytes(3)):
        dreamt = dream(codec, data, most=6)  # bytes that are all alike may be hundreds of images
        assert undream(codec, dreamt) == data
        assert len(dreamt.images) == len(dreamt.codes)
        assert dreamt.images.shape[1:] == images_of(model, 1).shape[1:]


def test_images_take_as_many_bits_as_they_cost(codec):
    data = random.Random(1).randbytes(4000)
    dreamt = dream(codec, data)
    assert len(dreamt.images) > 20
    intervals, _ = codec.coder.settle(dreamt.images, dreamt.codes, None)
    bits = float((intervals.rate() + intervals.distortion()).sum())
    assert abs(8 * (len(data) - len(dreamt.left)) - bits) < 100


@pytest.mark.slow
def test_random_bits_are_samples():
    """Pixels of dreams are as often at each level as the models say: by their mean and spread."""
    model = model_of()
    codec = Codec(model, uniform_of(model))
    dreamt = dream(codec, random.Random(2).randbytes(25_000))
    drawn = images_of(model, len(dreamt.images), seed=5).double()
    found = dreamt.images.double()
    error = (found.std() ** 2 + drawn.std() ** 2) ** 0.5 / len(found) ** 0.5
    assert (found.mean(0) - drawn.mean(0)).abs().max() < 6 * error
    assert abs(found.std() / drawn.std() - 1) < 0.1


def test_no_more_than_asked_for(codec):
    data = random.Random(3).randbytes(3000)
    dreamt = dream(codec, data, most=2)
    assert len(dreamt.images) == 2
    assert undream(codec, dreamt) == data


# ---- whatever the caller's global state is


@pytest.mark.parametrize("mode", [Mode.LOSSLESS, Mode.LOSSY])
def test_case_11_bytes_are_the_same_under_any_default_type_and_device(images, mode):
    model = model_of()
    prior = transformer_of(model, num_classes=3)
    codec, labels = Codec(model, prior), [index % 3 for index in range(len(images))]
    want, cost = codec.compress(images, labels, Compression(mode=mode)), codec.measure(images).total
    back, bits = codec.decompress(want), random.Random(0).randbytes(4000)
    dreamt = dream(codec, bits, most=1)
    for dtype, device in (("bfloat16", "cpu"), ("float16", "cpu"), ("float64", "cpu"), ("float32", "meta")):
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

    def drawn():
        for _ in range(4):
            yield torch.randint(0, 255, (codec.coder.num_channels, 8, 8), dtype=torch.uint8)

    torch.manual_seed(3)
    blocks = list(codec.blocks(drawn(), options=Compression(images_per_block=1, verify=False)))
    torch.manual_seed(3)
    assert [content for _, content in blocks] == [
        content for _, content in codec.blocks(list(drawn()), options=Compression(images_per_block=1, verify=False))
    ]
    assert len({content for _, content in blocks}) == 4
