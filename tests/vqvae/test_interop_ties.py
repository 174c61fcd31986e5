"""Codes and pictures of two programs compared: what ties, what is wrong, and in which arithmetic it is judged."""

import copy

import pytest
import torch
from export_worlds import drawn_codes, make, noise, shaken
from quantizer_worlds import KINDS
from torch import Tensor, nn

from vqvae import VQVAE
from vqvae.interop import code_agreement, compare_codes
from vqvae.interop.code_agreement import Agreement, count_wrong_pixels
from vqvae.interop.precision import in_full_float32
from vqvae.quantizers import ResidualQuantizer, VectorQuantizer


def midway(depth: int = 1) -> tuple[VQVAE, Tensor, Tensor]:
    """A model of 2 codes whose feature at the first place of an image is midway between them but for rounding."""
    torch.manual_seed(0)
    quantizer = ResidualQuantizer.Config(depth=depth, quantizer=VectorQuantizer.Config(num_codes=2, dim=6))
    model = shaken(VQVAE(image_size=10, width=4, downsampling=2, num_blocks=1, quantizer=quantizer).eval())
    images = noise(model, 1)
    feature = model.encoder(images)[0, 0, 0].detach()
    codebook(model, 0).data.copy_(feature + torch.linspace(-1, 1, 6) * torch.tensor([[1.0], [-1.0]]))
    return model, images, feature


def codebook(model: VQVAE, step: int) -> nn.Parameter:
    quantizer = model.quantizer.steps[step]
    assert isinstance(quantizer, VectorQuantizer)
    return quantizer.codebook


def found(model: VQVAE, images: Tensor, codes: Tensor) -> tuple[int, int, int]:
    """Equal, tied, wrong."""
    agreement = compare_codes(model, images, codes)
    assert agreement.num_codes_compared == codes.numel()
    return agreement.num_equal, agreement.num_ties, agreement.num_wrong


def test_either_of_two_codes_is_right_where_they_tie():
    model, images, feature = midway()
    codes = model.encode(images)
    other = codes.clone()
    other[0, 0, 0] = 1 - codes[0, 0, 0]
    assert found(model, images, codes) == (25, 0, 0)
    assert found(model, images, other) == (24, 1, 0)
    # A ten thousandth of the distance further it is none.
    vectors = codebook(model, 0)
    with torch.no_grad():
        vectors[other[0, 0, 0]] += 2e-4 * (vectors[other[0, 0, 0]] - feature)
    assert found(model, images, other) == (24, 0, 1)


def test_a_code_after_a_tie_is_judged_on_its_own_path():
    model, images, feature = midway(depth=2)
    # What either code leaves is the opposite of what the other leaves; the second step's codes are those.
    with torch.no_grad():
        codebook(model, 1).copy_(feature - codebook(model, 0))
    codes = model.encode(images)
    assert codes[0, 0, 0, 0] == codes[0, 0, 0, 1]
    other = codes.clone()
    other[0, 0, 0] = 1 - other[0, 0, 0]
    assert found(model, images, other) == (48, 2, 0)
    other[0, 0, 0, 1] = codes[0, 0, 0, 1]  # the model's own code, which is wrong after the other first one
    assert found(model, images, other) == (48, 1, 1)


def test_copies_of_a_code_tie():
    model = make("learned")
    images = noise(model, 4)
    with torch.no_grad():
        model.quantizer.codebook[8:] = model.quantizer.codebook[:8]
    assert found(model, images, model.encode(images) + 8) == (0, 100, 0)


@pytest.mark.parametrize("name", KINDS)
def test_another_rounding_ties_and_another_model_is_wrong(name: str):
    model = make(name)
    images = noise(model, 64)

    def moved(scale: float) -> Agreement:
        """Of codes of the same model, with weights that are off by this much."""
        other = copy.deepcopy(model)
        torch.manual_seed(1)
        with torch.no_grad():
            for weight in other.encoder.parameters():
                weight *= 1 + scale * torch.randn_like(weight)
        return compare_codes(model, images, other.encode(images))

    assert moved(3e-8).num_wrong == 0
    assert moved(1e-2).num_wrong >= 5
    wrong = model.encode(images)
    wrong[:, ..., 0] = (wrong[:, ..., 0] + 1) % model.num_codes
    assert compare_codes(model, images, wrong).num_wrong > wrong[..., 0].numel() * 0.9


def test_a_search_in_slices_finds_the_same(monkeypatch: pytest.MonkeyPatch):
    model = make("residual ema")
    images = noise(model, 12)
    other = model.encode(images)
    other[3, 1, 2, 0] = (other[3, 1, 2, 0] + 1) % 16
    other[5, :, :, 1] = (other[5, :, :, 1] + 1) % 16
    expected = compare_codes(model, images, other)
    assert expected.num_wrong >= 20
    monkeypatch.setattr(code_agreement, "SEARCH_BYTES", 7 * 16 * 16)
    assert compare_codes(model, images, other) == expected


def test_comparisons_are_in_full_float32():
    """Autocast would move features so far that nearly any code is a tie; models in less are refused."""
    model = make("learned")
    images = noise(model, 64)
    codes = model.encode(images)
    moved = codes.clone()
    moved[:, 0] = (moved[:, 0] + 1) % 16
    plain, pictures = compare_codes(model, images, moved), model.decode(codes)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(model.encode(images), codes)  # it would matter
        assert compare_codes(model, images, moved) == plain
        assert count_wrong_pixels(model, codes, pictures) == (0, 0)
    coarse = copy.deepcopy(model).half()
    with pytest.raises(ValueError, match=r"float16, expected float32: compare the codes of model.float\(\)"):
        compare_codes(coarse, images, codes)
    with pytest.raises(ValueError, match=r"float16, expected float32: compare the pictures of model.float\(\)"):
        count_wrong_pixels(coarse, codes, pictures)
    assert compare_codes(copy.deepcopy(model).double(), images, codes).num_wrong == 0


def test_settings_of_float32_come_back():
    places = torch.backends.cudnn.conv, torch.backends.mkldnn.matmul
    before = [place.fp32_precision for place in places]
    try:
        places[0].fp32_precision, places[1].fp32_precision = "tf32", "bf16"
        with in_full_float32():
            assert [place.fp32_precision for place in places] == ["ieee", "ieee"]
        assert [place.fp32_precision for place in places] == ["tf32", "bf16"]
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


@pytest.mark.usefixtures("untyped")
def test_codes_that_no_model_gives_are_refused():
    model = make()
    images = noise(model, 2)
    codes = model.encode(images)
    with pytest.raises(ValueError, match=r"shape \(2, 5, 5\), got .* \(1, 5, 5\)"):
        compare_codes(model, images, codes[:1])
    with pytest.raises(ValueError, match=r"codes must lie in \[0, 16\)"):
        compare_codes(model, images, torch.full_like(codes, 16))


def test_another_level_is_right_at_the_edge_alone():
    model = make(large=True)
    codes = drawn_codes(model, 4)
    estimate = model.likelihood.point_estimate(model.decoder(model.vectors(codes)))
    images = model.decode(codes)
    assert count_wrong_pixels(model, codes, images) == (0, 0)
    inside = (estimate > 1) & (estimate < 254)
    other = torch.where(inside, images.int() + 1, images.int()).to(torch.uint8)
    num_other, num_wrong = count_wrong_pixels(model, codes, other)
    assert num_other == inside.sum()
    edge = (estimate - images.float()) > 0.5 - 1 / 64
    assert num_wrong == (inside & ~edge).sum()
    assert (inside & edge).sum() > 0
