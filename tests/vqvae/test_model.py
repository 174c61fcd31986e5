"""VQVAE: shapes, gradients, saving, and what it refuses."""

import dataclasses
import json

import pytest
import torch
from torch.nn import functional as F

from vqvae import VQVAE
from vqvae.likelihoods import Categorical, LogisticMixture, Normal
from vqvae.networks.blocks import interpolated
from vqvae.quantizers import EMAVectorQuantizer, VectorQuantizer

SMALL = VQVAE.Config(
    image_size=8, width=8, num_blocks=1, downsampling=4, quantizer=EMAVectorQuantizer.Config(num_codes=8, dim=4)
)


def small(**changes):
    torch.manual_seed(0)
    return dataclasses.replace(SMALL, **changes).build()


def images(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("downsampling", "num_channels", "attention", "quantizer", "likelihood"),
    [
        (1, 1, False, EMAVectorQuantizer.Config(num_codes=8, dim=4), LogisticMixture.Config()),
        (2, 3, False, VectorQuantizer.Config(num_codes=8, dim=4), LogisticMixture.Config()),
        (4, 1, False, VectorQuantizer.Config(num_codes=8, dim=4, normalize=True), Categorical.Config()),
        (8, 3, True, EMAVectorQuantizer.Config(num_codes=8, dim=4), Normal.Config()),
        (16, 3, False, EMAVectorQuantizer.Config(num_codes=8, dim=4), LogisticMixture.Config(zero_component=True)),
    ],
)
def test_every_size_and_part(downsampling, num_channels, attention, quantizer, likelihood, tmp_path):
    sizes = {"downsampling": downsampling, "num_channels": num_channels, "width": 32 if attention else 8}
    sizes |= {"attention": attention, "smooth": downsampling in (2, 8)}
    model = small(image_size=16, **sizes, quantizer=quantizer, likelihood=likelihood)
    y = images(3, num_channels, 16, 16)
    out = model(y)
    side = 16 // downsampling
    assert model.grid == (side, side)
    assert model.num_dims == num_channels * 256
    assert out.distortion.shape == (3,)
    assert out.quantized.codes.shape == (3, side, side)
    (out.distortion.mean() + sum(out.quantized.auxiliary.values())).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any(name.startswith("encoder.") for name in trained)
    assert any(name.startswith("decoder.") for name in trained)
    model.eval()
    codes = model.encode(y)
    image = model.decode(codes)
    assert image.dtype == torch.uint8
    assert torch.equal(image, model.reconstruct(model(y)))
    model.save_pretrained(tmp_path / "model")
    twin = VQVAE.from_pretrained(tmp_path / "model")
    assert twin.config == model.config
    assert not twin.training
    assert torch.equal(twin.encode(y), codes)
    assert torch.equal(twin.decode(codes), image)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 1, 1), (1, 2, 1, 6)])
def test_interpolated_is_bilinear(shape):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(interpolated(x), F.interpolate(x, scale_factor=2, mode="bilinear"))


def test_a_smooth_decoder_starts_without_a_lattice_and_reads_as_it_was_saved(tmp_path):
    """Neighbours differ as much across the borders of 2x2 pixels as within them, where codes hold a slope."""
    ratios = {}
    for smooth in (False, True):
        model = small(image_size=64, downsampling=4, num_channels=3, smooth=smooth, likelihood=Normal.Config())
        slope = torch.arange(16.0)[None, None, :, None] * torch.linspace(-1, 1, 4)
        features = model.decoder(slope.expand(1, 16, 16, 4))[..., 16:-16]  # away from the padding of convolutions
        steps = features.diff(dim=-1).abs().mean((0, 1, 2))
        ratios[smooth] = (steps[1::2].mean() / steps[::2].mean()).item()
    assert abs(ratios[True] - 1) < 0.05 < abs(ratios[False] - 1)
    model.save_pretrained(tmp_path / "smooth")
    again = VQVAE.from_pretrained(tmp_path / "smooth")
    assert again.config.smooth
    y = images(2, 3, 64, 64)
    assert torch.equal(again.reconstruct(y), model.eval().reconstruct(y))


def test_images_of_any_type_are_encoded_alike_and_training_stays_as_it_was():
    model = small().train()
    model.encoder.eval()
    modes = [part.training for part in model.modules()]
    before = {name: value.clone() for name, value in model.named_buffers()}
    y = images(16, 1, 8, 8)
    codes = model.encode(y)
    assert torch.equal(model.encode(y.float() / 255), codes)
    assert torch.equal(model.encode(y.half() / 255), codes)
    assert torch.equal(torch.cat([model.encode(each[None]) for each in y]), codes)
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.named_buffers())
    draws = [model.decode(codes, sample=True, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_learning_lowers_the_distortion():
    model = small(quantizer=EMAVectorQuantizer.Config(num_codes=16, dim=8), width=16)
    y = images(1, 1, 8, 8).repeat(8, 1, 1, 1)
    y[4:] = images(1, 1, 8, 8, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = None
    for _ in range(60):
        out = model(y)
        (out.distortion.mean() / model.num_dims + sum(out.quantized.auxiliary.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.quantizer.update()
        first = first or out.distortion.mean().item()
    assert out.distortion.mean().item() < 0.6 * first


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (images(2, 3, 8, 8), r"expected images of shape \(b, 1, h, w\), such as \(b, 1, 8, 8\), got \(2, 3, 8, 8\)"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.int64), "as uint8, or as floats"),
        (torch.full((2, 1, 8, 8), 1.5), r"lie in \[0, 1\], got 1.5"),
        (torch.full((2, 1, 8, 8), torch.nan), r"lie in \[0, 1\]"),
    ],
)
def test_bad_images_are_a_sentence(value, message):
    with pytest.raises(ValueError, match=message):
        small()(value)


def test_bad_codes_are_a_sentence():
    for shape in ((1, 4), (1, 2, 2, 1), (1, 0, 2)):
        with pytest.raises(ValueError, match=r"expected codes on a grid, such as \(b, 2, 2\), got"):
            small().decode(torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match="must lie in"):
        small().decode(torch.full((1, 2, 2), 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 10}, "not a multiple of downsampling"),
        ({"downsampling": 3, "image_size": 9}, "power of two"),
        ({"num_channels": 2}, "1 .grey. or 3"),
        ({"width": 0}, "width >= 1"),
        ({"attention": True, "width": 8}, "divisible by 32"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_foreign_configs_are_refused(tmp_path):
    small().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    good = json.loads(path.read_text())
    for change, message in (
        ({"class": "TransformerPrior"}, "holds a TransformerPrior, expected a .*VQVAE"),
        ({"quantizer": {"class": "Magic"}}, "unknown quantizer 'Magic'"),
        ({"colour": 1}, "does not fit VQVAE"),
        ({"image_size": 10}, "not a multiple"),
        ({"width": 16}, "do not fit its config"),
        ({"quantizer": {"class": "FSQ"}}, "unknown quantizer"),
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(ValueError, match=message):
            VQVAE.from_pretrained(tmp_path / "model")
