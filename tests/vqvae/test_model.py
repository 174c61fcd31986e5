"""VQVAE: shapes, gradients, saving, and what it refuses."""

import dataclasses
import itertools
import json

import pytest
import torch

import safefolder
from vqvae import VQVAE
from vqvae.likelihoods import Categorical, LogisticMixture, Normal
from vqvae.networks.blocks import level_widths, num_levels
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
    model = small(
        image_size=16,
        width=32 if attention else 8,
        downsampling=downsampling,
        num_channels=num_channels,
        attention=attention,
        quantizer=quantizer,
        likelihood=likelihood,
    )
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
    assert image.shape == y.shape
    assert torch.equal(image, model.reconstruct(model(y)))
    model.save_pretrained(tmp_path / "model")
    twin = VQVAE.from_pretrained(tmp_path / "model")
    assert twin.config == model.config
    assert not twin.training
    assert torch.equal(twin.encode(y), codes)
    assert torch.equal(twin.decode(codes), image)


def test_distortion_is_the_cross_entropy_of_the_pixels():
    """Against the 256-level table that a coder would use."""
    model = small(likelihood=LogisticMixture.Config(zero_component=True)).eval()
    y = images(2, 1, 8, 8)
    with torch.no_grad():
        out = model(y)
        parameters = model.likelihood.symbol_parameters(y, out.features.double())
        table = model.likelihood.cdf(parameters, torch.arange(256).expand(*y.shape, 256))
    pmf = torch.diff(table, dim=-1, prepend=torch.zeros_like(table[..., :1]))
    nats = -pmf.gather(-1, y[..., None].long()).log().sum((1, 2, 3, 4))
    torch.testing.assert_close(out.distortion.double(), nats, rtol=1e-4, atol=0)


def test_float_images_are_their_levels():
    model = small().eval()
    y = images(2, 1, 8, 8)
    assert torch.equal(model.encode(y.float() / 255), model.encode(y))
    assert torch.equal(model.encode(y.half() / 255), model.encode(y))


def test_one_image_or_a_batch():
    model = small().eval()
    y = images(64, 1, 8, 8)
    together = model.encode(y)
    assert torch.equal(torch.cat([model.encode(each[None]) for each in y]), together)


def test_decode_can_sample_pixels():
    model = small().eval()
    codes = model.encode(images(2, 1, 8, 8))
    draws = [model.decode(codes, sample=True, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_encode_leaves_training_as_it_was():
    model = small().train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.encode(images(2, 1, 8, 8))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.named_buffers())


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
        (images(2, 3, 8, 8), r"expected images of shape \(b, 1, 8, 8\), got \(2, 3, 8, 8\)"),
        (images(1, 8, 8), "expected images of shape"),
        (images(2, 1, 9, 8), "expected images of shape"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.int64), "as uint8, or as floats"),
        (torch.full((2, 1, 8, 8), 1.5), r"lie in \[0, 1\], got 1.5"),
        (torch.full((2, 1, 8, 8), -0.1), r"lie in \[0, 1\]"),
        (torch.full((2, 1, 8, 8), torch.nan), r"lie in \[0, 1\]"),
    ],
)
def test_bad_images_are_a_sentence(value, message):
    with pytest.raises(ValueError, match=message):
        small()(value)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(1, 3, 3, dtype=torch.int64), r"expected codes of shape \(b, 2, 2\)"),
        (torch.full((1, 2, 2), 8), "must lie in"),
    ],
)
def test_bad_codes_are_a_sentence(codes, message):
    with pytest.raises(ValueError, match=message):
        small().decode(codes)


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
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(ValueError, match=message):
            VQVAE.from_pretrained(tmp_path / "model")


def test_missing_weights_are_named(tmp_path):
    model = small()
    weights = model.state_dict()
    weights.pop("quantizer.codebook")
    safefolder.save(tmp_path / "model", {"class": "VQVAE", **model.config.to_plain()}, weights)
    with pytest.raises(ValueError, match=r"missing quantizer\.codebook"):
        VQVAE.from_pretrained(tmp_path / "model")


def test_levels():
    assert [num_levels(2**n) for n in range(5)] == list(range(5))
    assert level_widths(8, 1) == [8]
    assert level_widths(8, 16) == [8, 16, 32, 32]
    for bad in (0, 3, 6, -2):
        with pytest.raises(ValueError, match="power of two"):
            num_levels(bad)


def test_configs_survive_json():
    for quantizer, likelihood in itertools.product(
        (EMAVectorQuantizer.Config(), VectorQuantizer.Config(normalize=True)),
        (LogisticMixture.Config(), Categorical.Config(), Normal.Config(scale=3.0)),
    ):
        config = VQVAE.Config(quantizer=quantizer, likelihood=likelihood)
        assert VQVAE.Config.from_plain(json.loads(json.dumps(config.to_plain()))) == config
