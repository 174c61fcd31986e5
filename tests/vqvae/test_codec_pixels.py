"""What is compressed besides tensors: arrays, lists, pictures of Pillow; and what is refused."""

import re

import numpy as np
import pytest
import torch
from codec_worlds import images_of, model_of, transformer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from vqvae.codec import Archive, Codec, Compression, Mode
from vqvae.codec.container import pack
from vqvae.codec.pixels import as_image, as_images


@pytest.fixture(scope="module")
def grey():
    model = model_of()
    return Codec(model, transformer_of(model, num_classes=3)), images_of(model, 5)


@pytest.fixture(scope="module")
def colour():
    model = model_of("colour mixture")
    return Codec(model, transformer_of(model)), images_of(model, 5)


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def pictures(images):
    return [Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()) for image in images]


FORMS = {
    "array": lambda y: y.numpy(),
    "read-only array": lambda y: read_only(y.numpy()),
    "array in another order": lambda y: np.asfortranarray(y.numpy()),
    "array backwards": lambda y: y.flip(3).contiguous().numpy()[..., ::-1],
    "list of arrays": lambda y: list(y.numpy()),
    "tuple of tensors": lambda y: tuple(y),
    "pictures": pictures,
    "all sorts": lambda y: [y[0], y[1].numpy(), *pictures(y[2:])],
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("kind", "form"), [*(("grey", form) for form in FORMS), ("colour", "pictures"), ("colour", "list of arrays")]
)
def test_case_33_images_in_any_form(request, kind, form):
    codec, y = request.getfixturevalue(kind)
    given = FORMS[form](y)
    expected = codec.compress(y, options=Compression(verify=False))
    assert codec.compress(given, options=Compression(verify=False)) == expected
    assert pack(codec.header(Mode.LOSSLESS), codec.blocks(iter(given), options=Compression(verify=False))) == expected
    assert torch.equal(codec.measure(given).total, codec.measure(y).total)


@pytest.mark.parametrize("labels", [[2, 0, 1, 1, 2], (2, 0, 1, 1, 2), range(3), np.array([2, 0, 1, 1, 2])])
def test_case_33_labels_in_any_form(grey, labels):
    codec, y = grey
    y = y[: len(labels)]
    data = codec.compress(y, labels)
    assert data == codec.compress(y, torch.tensor(list(labels)))
    with Archive.from_bytes(data) as archive:
        [block] = codec.decode(archive)
    assert block.labels.tolist() == list(labels)
    if isinstance(labels, np.ndarray):
        for dtype in (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.uint64):
            assert codec.compress(y, labels.astype(dtype), Compression(verify=False)) == data


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.5] * 5, "got labels of torch.float32 (5,), expected integers of shape (b,)"),
        (np.zeros(5), "got labels of torch.float64 (5,), expected integers"),
        (["cat"] * 5, "got labels that are no numbers ("),
        ([None] * 5, "got labels that are no numbers ("),
        (3, "got labels of torch.int64 (), expected integers of shape (b,), one for each image"),
        ([[0]] * 5, "got labels of torch.int64 (5, 1), expected"),
        ([True] * 5, "got labels of torch.bool (5,), expected"),
        ([2**70] * 5, "got labels that are no numbers ("),
        ([0, 3, 0, 0, 0], "got labels from 0 to 3, expected 0 to 2"),
        ([-1] * 5, "got labels from -1 to -1, expected 0 to 2"),
        ([0] * 4, "got 4 labels for 5 images or more, expected one for each"),
        ([0] * 6, "got 6 labels for 5 images, expected one for each"),
        ([], "got 0 labels for 5 images"),
    ],
)
def test_case_33_labels_that_are_none(grey, labels, message):
    codec, y = grey
    with pytest.raises(ValueError, match=re.escape(message)):
        codec.compress(y, labels)


def tensor(*shape, dtype=torch.uint8):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 1, 8, 8)), "got an image of float64 (1, 8, 8), expected uint8"),
        (np.zeros((2, 1, 8, 8), np.float32), "(image * 255).round() makes levels of floats in [0, 1]"),
        (tensor(2, 1, 8, 8, dtype=torch.float32), "got an image of torch.float32 (1, 8, 8)"),
        (tensor(2, 1, 8, 8, dtype=torch.int64), "got an image of torch.int64 (1, 8, 8)"),
        (np.zeros((2, 8, 8, 3), np.uint8), "got an image of 8 channels, (8, 8, 3), expected uint8"),
        (np.zeros((2, 8, 8, 1), np.uint8), "it has its channels last"),
        (tensor(2, 8, 8, 3), "it has its channels last"),
        (np.zeros((2, 8, 8), np.uint8), "image[None] gives a grey one its channel"),
        (tensor(1, 8, 8), "got an image of torch.uint8 (8, 8)"),
        (np.array([b"a"]), "got bytes_ for an image"),
        ([None], "got NoneType for an image, expected uint8"),
        (["a.png"], "got str for an image"),
        ([[[0, 1]]], "got list for an image"),
        ("a.png", "got str, expected a list of images, or an array of them"),
        (7, "got int, expected a list of images"),
        (Image.new("L", (8, 8)), "got Image, expected a list of images"),
        ([Image.new("RGBA", (8, 8))], "got a picture of mode RGBA"),
        ([Image.new("1", (8, 8))], "got a picture of mode 1"),
        ([Image.new("P", (8, 8))], 'image.convert("RGB") or "L" makes one'),
        ([Image.new("I;16", (8, 8))], "got a picture of mode I;16"),
        ([tensor(5, 8, 8)], "got an image of 5 channels and 8 x 8 pixels"),
        ([tensor(1, 0, 8)], "sides from 1 to"),
        (tensor(), "expected a list of images, or an array of them"),
        (np.uint8(3), "expected a list of images, or an array of them"),
        (np.array(3), "expected a list of images, or an array of them"),
    ],
)
def test_case_33_images_that_are_none(grey, images, message):
    codec, _ = grey
    for act in (codec.compress, codec.measure):
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            act(images)
        assert "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    arrays.arrays(
        st.sampled_from([np.uint8, np.int16, np.float32, np.bool_]),
        arrays.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=9),
    )
)
def test_case_33_an_array_is_an_image_or_refused(array):
    ok = array.dtype == np.uint8 and array.ndim == 3 and not (array.shape[0] > 4 and array.shape[2] <= 4)
    for given_as in (array, torch.from_numpy(array)):
        if ok:
            assert torch.equal(as_image(given_as), torch.from_numpy(array))
            assert as_image(array).data_ptr() != array.ctypes.data
        else:
            with pytest.raises(ValueError, match="expected uint8"):
                list(as_images([given_as]))
