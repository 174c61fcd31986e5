"""What is compressed besides tensors: arrays, lists, pictures of Pillow; and what is refused."""

import re

import numpy as np
import pytest
import torch
from codec_worlds import images_of, model_of, transformer_of, uniform_of
from PIL import Image

from vqvae.codec import Archive, Codec, Compression


@pytest.fixture(scope="module")
def grey():
    model = model_of()
    return Codec(model, transformer_of(model, num_classes=3)), images_of(model, 5)


def pictures(images):
    return [Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()) for image in images]


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


FORMS = {
    "read-only array": lambda y: read_only(y.numpy()),
    "array in another order": lambda y: np.asfortranarray(y.numpy()),
    "array backwards": lambda y: y.flip(3).contiguous().numpy()[..., ::-1],
    "list of arrays": lambda y: list(y.numpy()),
    "all sorts": lambda y: [y[0], y[1].numpy(), *pictures(y[2:])],
}


@pytest.mark.parametrize("form", FORMS)
def test_images_in_any_form(grey, form):
    codec, y = grey
    assert codec.compress(FORMS[form](y), options=Compression(verify=False)) == codec.compress(y)
    assert torch.equal(codec.measure(FORMS[form](y)).total, codec.measure(y).total)


def test_pictures_of_colour():
    model = model_of("colour mixture")
    codec, y = Codec(model, transformer_of(model)), images_of(model, 2)
    assert torch.equal(codec.decompress(codec.compress(pictures(y))), y)


def test_labels_in_any_form(grey):
    codec, y = grey
    labels = torch.tensor([2, 0, 1, 1, 2])
    data = codec.compress(y, labels)
    with Archive.from_bytes(data) as archive:
        [block] = codec.decode(archive)
    assert torch.equal(block.labels, labels)
    numpy_types = (np.int8, np.uint8, np.uint16, np.uint32, np.uint64)
    for each in (labels.tolist(), tuple(labels.tolist()), labels.int(), *map(labels.numpy().astype, numpy_types)):
        assert codec.compress(y, each, Compression(verify=False)) == data


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(5), "labels of torch.float64 (5,), expected integers"),
        (["cat"] * 5, "labels that are no numbers ("),
        (3, "labels of torch.int64 (), expected integers of shape (b,)"),
        ([[0]] * 5, "labels of torch.int64 (5, 1), expected"),
        ([True] * 5, "labels of torch.bool (5,), expected"),
        ([2**70] * 5, "labels that are no numbers ("),
        ([0, 3, 0, 0, 0], "got labels from 0 to 3, expected 0 to 2"),
        ([-1] * 5, "got labels from -1 to -1, expected 0 to 2"),
        ([0] * 4, "got 4 labels for 5 images or more, expected one for each"),
        ([0] * 6, "got 6 labels for 5 images, expected one for each"),
        ([], "got 0 labels for 5 images"),
    ],
)
def test_labels_that_are_none(grey, labels, message):
    codec, y = grey
    with pytest.raises(ValueError, match=re.escape(message)):
        codec.compress(y, labels)
    unlabelled = Codec(model_of(), uniform_of(model_of()))
    with pytest.raises(ValueError, match="without num_classes"):
        unlabelled.compress(y, [0] * 5)


def tensor(*shape, dtype=torch.uint8):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 1, 8, 8)), "an image of float64 (1, 8, 8), expected uint8"),
        (tensor(2, 1, 8, 8, dtype=torch.float32), "(image * 255).round() makes levels of floats in [0, 1]"),
        (tensor(2, 1, 8, 8, dtype=torch.int64), "an image of torch.int64 (1, 8, 8)"),
        (np.zeros((2, 8, 8, 3), np.uint8), "it has its channels last"),
        (np.zeros((2, 8, 8), np.uint8), "image[None] gives a grey one its channel"),
        ([None], "got NoneType for an image, expected uint8"),
        ("a.png", "got str, expected a list of images"),
        (7, "got int, expected a list of images"),
        (np.uint8(3), "expected a list of images, or an array of them"),
        (Image.new("L", (8, 8)), "got Image, expected a list of images"),
        ([Image.new("RGBA", (8, 8))], "got a picture of mode RGBA"),
        ([Image.new("P", (8, 8))], 'image.convert("RGB") or "L" makes one'),
        ([tensor(5, 8, 8)], "an image of 5 channels and 8 x 8 pixels"),
        ([tensor(1, 0, 8)], "sides from 1 to"),
    ],
)
def test_images_that_are_none(grey, images, message):
    codec, _ = grey
    for act in (codec.compress, codec.measure):
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            act(images)
        assert "\n" not in str(caught.value)
