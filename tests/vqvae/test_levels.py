"""What people pass where images are expected: taken if it is one thing, else refused with what to write."""

import functools
import re

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from priors import UnigramPrior
from vqvae import VQVAE, GaussianVAE
from vqvae.bound import elbo
from vqvae.data.images import ImageTensors
from vqvae.levels import to_levels
from vqvae.metrics import psnr, ssim
from vqvae.quantizers import EMAVectorQuantizer

SIZES = {"image_size": 8, "width": 8, "num_blocks": 0, "downsampling": 4}


@functools.cache
def small(num_channels: int = 1, **options) -> VQVAE:
    torch.manual_seed(0)
    quantizer = EMAVectorQuantizer.Config(num_codes=8, dim=4)
    model = VQVAE(**SIZES, num_channels=num_channels, quantizer=quantizer, **options)
    model(images(num_channels, 8))
    model.update()  # k-means, so that images have codes of their own
    return model.eval()


def images(num_channels: int = 1, num: int = 3) -> torch.Tensor:
    shape = (num, num_channels, 8, 8)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def pictures(y: torch.Tensor) -> list[PIL.Image.Image]:
    return [PIL.Image.fromarray(each.movedim(0, -1).squeeze(-1).numpy()) for each in y]


def forms(y: torch.Tensor) -> dict[str, object]:
    """The same images as people have them."""
    array = y.numpy()
    read_only = array.copy()
    read_only.flags.writeable = False
    return {
        "array": array,
        "read-only array": read_only,
        "array of another order": np.asfortranarray(array),
        "array of floats": (array / 255).astype(np.float32),
        "array of halves": (array / 255).astype(np.float16),
        "array of the other byte order": (array / 255).astype(">f4"),
        "floats": y.float() / 255,
        "PIL images": pictures(y),
        "list of tensors": list(y),
        "list of tensors and PIL images": [y[0], *pictures(y[1:])],
    }


@pytest.mark.parametrize("num_channels", [1, 3])
def test_case_33_images_as_people_have_them(num_channels):
    model, y = small(num_channels), images(num_channels)
    want = model.encode(y)
    assert want.unique().numel() > 1
    for name, form in forms(y).items():
        assert torch.equal(model.encode(form), want), name
    picture = pictures(y)[0]
    assert torch.equal(model.encode(picture), want[:1])
    assert model.encode([]).shape == (0, *model.grid)


def test_case_33_every_way_in_takes_them():
    model, y = small(), images()
    codes, picture = model.encode(y), model.reconstruct(model(y))
    distortion = model(y).distortion
    prior = UnigramPrior(num_codes=8, grid=model.grid).fit(codes)
    for form in (y.numpy(), pictures(y), list(y)):
        assert torch.equal(model(form).distortion, distortion)
        assert torch.equal(model.draw(form).latents, codes)
        assert torch.equal(model.reconstruct(form), picture)
        assert torch.equal(elbo(model, prior, form).distortion, distortion)
    gaussian = GaussianVAE(**SIZES, dim=3).eval()
    means = gaussian.encode(pictures(y))
    assert torch.equal(gaussian.decode(means.numpy().astype(np.float64)), gaussian.decode(means))
    assert torch.equal(gaussian.reconstruct(y.numpy()), gaussian.decode(means))
    looping = small(beta=1.0)
    through = looping.through(prior)
    for form in (y.numpy(), pictures(y), list(y)):
        assert torch.equal(through.encode(form), through.encode(y))
        assert torch.equal(through(form).distortion, through(y).distortion)
        assert through.draw(form).latents.shape == codes.shape


GREY, COLOUR = images(1), images(3)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("num_channels", "given_images", "message"),
    [
        (1, GREY[0], "got (1, 8, 8); one image needs an axis of the batch: images[None]"),
        (1, GREY[0, 0], "one image needs axes of the batch and of the channel: images[None, None]"),
        (1, GREY[:, 0], "got (3, 8, 8); greys have an axis of one channel too: images[:, None]"),
        (3, COLOUR.movedim(1, -1), "channels come before rows and columns: images.permute(0, 3, 1, 2)"),
        (3, COLOUR.movedim(1, -1).numpy(), "images.transpose(0, 3, 1, 2)"),
        (1, GREY.movedim(1, -1), "images.permute(0, 3, 1, 2)"),
        (3, COLOUR[0].movedim(0, -1), "channels come first: images.permute(2, 0, 1)[None]"),
        (3, COLOUR[0].movedim(0, -1).numpy(), "images.transpose(2, 0, 1)[None]"),
        (3, list(COLOUR.movedim(1, -1)), "images.permute(0, 3, 1, 2)"),
        (3, GREY, "expected images of shape (b, 3, h, w), such as (b, 3, 8, 8), got (3, 1, 8, 8)"),
        (
            1,
            GREY[..., :6],
            "height and width are multiples of 4, such as 8x8, got 8x6: scale or crop them, or give pad",
        ),
        (1, GREY[..., :0], "height and width are multiples of 4, such as 8x8, got 8x0"),
        (1, GREY.long(), "expected images as uint8, or as floats in [0, 1], got torch.int64"),
        (1, GREY.numpy().astype(str), "got <U3"),
        (1, GREY.numpy().astype(np.float32), "float images must lie in [0, 1], got"),
        (1, GREY.numpy() / 255 * np.nan, "got nan to nan"),
        (1, [GREY[0], GREY[0].float()], "got images of torch.uint8 (1, 8, 8) and torch.float32 (1, 8, 8) in one list"),
        (1, [GREY[0], GREY[0, :, :4]], "expected all of one type"),
        (1, "picture.png", "got images as str, expected a tensor, an array, or PIL images"),
        (1, [[0.5] * 8] * 8, "got images as a list with list, expected tensors"),
        (1, pictures(COLOUR), "mode 'RGB', expected 'L' for a model of 1 channel: image.convert('L')"),
        (3, pictures(COLOUR)[0].convert("RGBA"), "mode 'RGBA', expected 'RGB' for a model of 3 channels"),
        (1, pictures(GREY)[0].resize((8, 6)), "are multiples of 4, such as 8x8, got 6x8"),
        (1, ImageTensors(GREY, None, name="mine"), "PIL images: pass its images"),
        (1, ImageTensors(GREY, None, name="mine")[:2], "got images as Batch"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_case_33_images_that_are_not_meant_are_told_how(num_channels, given_images, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        small(num_channels).encode(given_images)


@settings(max_examples=60, deadline=None)
@given(
    num_channels=st.sampled_from([1, 3]),
    shape=st.lists(st.sampled_from([0, 1, 3, 4, 8]), max_size=5),
    dtype=st.sampled_from([np.uint8, np.float32, np.float64, np.int64, np.bool_, np.uint16, np.complex64]),
    as_tensor=st.booleans(),
)
def test_any_array_is_levels_or_a_sentence(num_channels, shape, dtype, as_tensor):
    """What is taken has the shape and the type that it says; nothing is guessed."""
    array = np.zeros(shape, dtype)
    given_images = torch.from_numpy(array) if as_tensor else array
    fits = len(shape) == 4 and shape[1] == num_channels and shape[2] % 4 == shape[3] % 4 == 0 not in shape[2:]
    fits = fits and dtype in (np.uint8, np.float32, np.float64)
    if fits:
        levels = to_levels.__wrapped__(given_images, num_channels=num_channels, size=(8, 8), factor=4)
        assert levels.dtype == torch.uint8
        assert list(levels.shape) == shape
        return
    with pytest.raises(ValueError, match=r"^expected images|^float images"):
        to_levels.__wrapped__(given_images, num_channels=num_channels, size=(8, 8), factor=4)


@pytest.mark.usefixtures("untyped")
def test_figures_compare_levels_of_one_shape():
    """Floats in [0, 1] would differ by next to nothing of 255 levels, and greys would be compared with each colour."""
    y = COLOUR.repeat(1, 1, 2, 2)
    for figure in (psnr, ssim):
        for one, other, message in (
            (y.float() / 255, y, "got images as torch.float32"),
            (y, y.numpy(), "got images as ndarray, expected a uint8 tensor"),
            (y[0], y[0], r"of shape \(b, c, h, w\)"),
            (y, y[:, :1], r"\(3, 3, 16, 16\) and \(3, 1, 16, 16\), expected equal ones"),
        ):
            with pytest.raises(ValueError, match=message):
                figure(one, other)
