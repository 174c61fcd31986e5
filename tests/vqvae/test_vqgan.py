"""VQGAN: networks, training from imported weights, saving, export to diffusers, and the fitted scale."""

import copy
import dataclasses
import json
import math
import pickle

import pytest
import torch

from priors import TransformerPrior
from vqvae import VQVAE, Autoencoder
from vqvae.interop.code_agreement import compare_codes
from vqvae.interop.diffusers import export_diffusers, import_diffusers
from vqvae.interop.scale import fit_scale
from vqvae.likelihoods import Categorical, LogisticMixture, Normal
from vqvae.quantizers import EMAVectorQuantizer, GumbelQuantizer, ResidualQuantizer, VectorQuantizer
from vqvae.vqgan import VQGAN, DiffusersConfig

SMALL = VQGAN.Config(
    image_size=8,
    channels=(32, 32),
    num_blocks=1,
    down_attention=(1,),
    up_attention=(1,),
    latent_channels=4,
    quantizer=VectorQuantizer.Config(num_codes=16, dim=4),
)


def small(**changes):
    torch.manual_seed(0)
    return dataclasses.replace(SMALL, **changes).build()


def images(num, size=8, channels=3, seed=0):
    return torch.randint(
        0, 256, (num, channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def optimise(model, y, steps, lr=1e-3):
    """Distortions in nats per dimension, before each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    distortions = []
    for _ in range(steps):
        out = model(y)
        distortions.append(out.distortion.mean().item() / model.num_dims)
        (out.distortion.mean() / model.num_dims + sum(out.auxiliary.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update()
    return distortions


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mid_attention": False, "down_attention": (), "up_attention": ()},
        {"spatial_norm": True, "quantizer": EMAVectorQuantizer.Config(num_codes=16, dim=4)},
        {"channels": (32, 64, 64), "down_attention": (0, 2), "up_attention": (1,), "num_blocks": 2},
        {"channels": (16,), "num_groups": 8, "down_attention": (0,), "up_attention": (), "num_channels": 1},
        {"likelihood": LogisticMixture.Config(), "quantizer": GumbelQuantizer.Config(num_codes=16, dim=4)},
        {
            "latent_channels": 8,
            "quantizer": ResidualQuantizer.Config(quantizer=VectorQuantizer.Config(num_codes=16, dim=4), depth=2),
        },
    ],
)
def test_every_option(changes, tmp_path):
    """Shapes, gradients to all networks, bf16, and a saved twin by the library's names."""
    model = small(**changes)
    side = 8 // 2 ** (len(model.config.channels) - 1)
    y = images(3, channels=model.config.num_channels)
    out = model.train()(y)
    assert out.latents.shape[1:3] == (side, side)
    (out.distortion.mean() + sum(out.auxiliary.values())).backward()
    assert all(p.grad is not None for part in (model.encoder, model.decoder) for p in part.parameters())
    assert model.encoder.conv_in.weight.grad.abs().sum() > 0
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        coarse = model(y)
    assert coarse.distortion.dtype == torch.float32
    torch.testing.assert_close(coarse.distortion, model(y).distortion.detach(), rtol=0.05, atol=0)
    codes = model.encode(y)
    picture = model.decode(codes)
    assert picture.shape == y.shape
    assert torch.equal(picture, model.reconstruct(model(y)))
    model.save_pretrained(tmp_path / "model")
    for read in (VQGAN, VQVAE, Autoencoder):
        twin = read.from_pretrained(tmp_path / "model")
        assert type(twin) is VQGAN
        assert twin.config == model.config
        assert torch.equal(twin.encode(y), codes)
        assert torch.equal(twin.decode(codes), picture)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.encode(y), codes)
    assert VQGAN.Config.from_plain(json.loads(json.dumps(model.config.to_plain()))) == model.config


def test_it_learns():
    y = images(1).repeat(4, 1, 1, 1)
    y[2:] = images(1, seed=1)
    distortions = optimise(small(), y, 20, lr=1e-2)
    assert distortions[-1] < 0.95 * distortions[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": ()}, "expected one level and one of each at least"),
        ({"num_blocks": 0}, "num_blocks=0"),
        ({"channels": (32, 40)}, "multiples of num_groups, 32"),
        ({"channels": (32, 40), "num_groups": 8, "spatial_norm": True}, "multiples of the groups of spatial norms, 32"),
        ({"down_attention": (2,)}, r"got down_attention=\(2,\), expected levels from 0 .finest. to 1, ascending"),
        ({"up_attention": (1, 0)}, "got up_attention"),
        ({"image_size": 9}, "image_size 9 is not a multiple of 2, by which the networks reduce it, having 2 levels"),
        ({"channels": (32.0, 32)}, r"got channels=\(32.0, 32\) for VQGAN, expected a tuple of integers"),
        ({"up_attention": 1}, "got up_attention=1 for VQGAN, expected a tuple"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


@pytest.fixture
def imported(tmp_path):
    """A small model of diffusers' with random weights, imported."""
    import diffusers

    torch.manual_seed(0)
    peer = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        latent_channels=4,
        num_vq_embeddings=64,
    )
    torch.nn.init.normal_(peer.quantize.embedding.weight)
    peer.save_pretrained(tmp_path / "theirs")
    return import_diffusers(tmp_path / "theirs", image_size=8)


def test_training_goes_on_from_imported_weights(imported):
    """No k-means start and no revival moves the codebook; gradients do, a little, and the distortion falls."""
    y = images(8)
    before = imported.quantizer.codebook.detach().clone()
    model = copy.deepcopy(imported).train()
    with torch.no_grad():
        model(y)
    for _ in range(3):
        model(y)
        model.update()  # statistics alone
    assert torch.equal(model.quantizer.codebook, before)
    distortions = optimise(imported, y, 20)
    assert distortions[-1] < distortions[0] - 0.01
    moved = (imported.quantizer.codebook - before).abs()
    assert 0 < moved.max() < 0.1


def test_a_prior_on_imported_codes(imported):
    y = images(8)
    codes = imported.encode(y)
    torch.manual_seed(0)
    prior = TransformerPrior(num_codes=imported.num_codes, grid=imported.grid, width=48, depth=1, num_heads=2)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        losses.append(-prior(codes).mean())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    assert imported.decode(prior.eval().sample(2)).shape == (2, 3, 8, 8)


def test_a_trained_codebook_of_averages_is_exported(tmp_path):
    import diffusers

    model = small(quantizer=EMAVectorQuantizer.Config(num_codes=16, dim=4))
    y = images(8)
    start = model.quantizer.codebook.clone()
    optimise(model, y, 3)
    assert not torch.equal(model.quantizer.codebook, start)
    model.eval()
    export_diffusers(model, tmp_path / "out")
    peer = diffusers.VQModel.from_pretrained(tmp_path / "out")
    assert torch.equal(peer.quantize.embedding.weight, model.quantizer.codebook)
    with torch.no_grad():
        h = peer.encode(y / 127.5 - 1).latents
        assert torch.equal(peer.quantize(h)[2][2].reshape(8, 4, 4), model.encode(y))
        theirs = peer.decode(h).sample
    torch.testing.assert_close(theirs, model(y).features.detach(), rtol=0, atol=1e-4)
    assert peer.config.sample_size == 8
    assert torch.equal(import_diffusers(tmp_path / "out", image_size=8).encode(y), model.encode(y))


def test_unit_codes_are_exported_as_they_are(tmp_path):
    """The nearest of unit vectors is nearest to the direction too, however long the feature is."""
    import diffusers

    model = small(quantizer=VectorQuantizer.Config(num_codes=16, dim=4, normalize=True)).eval()
    y = images(16)
    export_diffusers(model, tmp_path / "out")
    peer = diffusers.VQModel.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(peer.quantize.embedding.weight.norm(dim=1), torch.ones(16))
    with torch.no_grad():
        h = peer.encode(y / 127.5 - 1).latents
        codes = peer.quantize(h)[2][2].reshape(16, 4, 4)
        theirs = peer.decode(h).sample
    assert (h.norm(dim=1) - 1).abs().max() > 0.3
    found = compare_codes(model, y, codes)
    assert found.num_wrong == 0
    assert found.num_ties <= 1
    assert len(codes.unique()) > 4
    torch.testing.assert_close(theirs[:2], model(y[:2]).features.detach(), rtol=0, atol=1e-4)
    again = import_diffusers(tmp_path / "out", image_size=8)
    assert compare_codes(again, y, model.encode(y)).num_wrong == 0


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("thesis.tex",), "holds other things, thesis.tex"),
        (("model_index.json", "unet/weights.bin"), "holds other things, model_index.json, unet"),
        (("config.json",), "holds something else under the same names"),
    ],
)
def test_an_export_removes_nothing_else(files, message, tmp_path):
    for name in files:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("{}")
    with pytest.raises(ValueError, match=message):
        export_diffusers(small(), tmp_path / "out")
    assert all((tmp_path / "out" / name).read_text() == "{}" for name in files)


def test_an_export_replaces_a_folder_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "out"
    model = small(diffusers=DiffusersConfig(lookup_from_codebook=True, scaling_factor=0.5))
    export_diffusers(model, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(before) == ["config.json", "diffusion_pytorch_model.safetensors"]
    said = json.loads(before["config.json"])
    assert (said["lookup_from_codebook"], said["scaling_factor"], said["sample_size"]) == (True, 0.5, 8)
    with pytest.raises(ValueError, match="train with Normal"):
        export_diffusers(small(likelihood=Categorical.Config()), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    export_diffusers(small(num_blocks=2), folder)
    assert json.loads((folder / "config.json").read_text())["layers_per_block"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantizer": GumbelQuantizer.Config(num_codes=16, dim=4)}, "GumbelQuantizer finds codes otherwise"),
        ({"likelihood": LogisticMixture.Config()}, "train with Normal.Config"),
        ({"spatial_norm": True, "latent_channels": 8}, "need them equal"),
    ],
)
def test_what_has_no_form_in_diffusers(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_diffusers(small(**changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_our_own_networks_have_no_form_in_diffusers(tmp_path):
    with pytest.raises(ValueError, match="a VQVAE has other networks than a VQModel"):
        export_diffusers(VQVAE(image_size=8, width=8, likelihood=Normal.Config()), tmp_path / "out")


def test_the_fitted_scale_is_that_of_most_likelihood():
    """Against a search by thirds over the same likelihood in float64, for errors small and large, and at the ends."""
    model = small().eval()
    spread = torch.tensor([0.6, 12.0, 90.0])[:, None, None]
    noise = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y = (127.5 + spread * noise).round().clamp(0, 255).to(torch.uint8)
    with torch.no_grad():
        features = model(y).features.double()
    fitted = fit_scale(model, y)
    torch.testing.assert_close(model.likelihood.log_scale.exp().detach(), fitted)
    twin = copy.deepcopy(model.likelihood).double()

    def nats(channel, log_scale):
        with torch.no_grad():
            twin.log_scale[channel] = log_scale
            return -twin.log_prob(y, features).sum().item()

    for channel in range(3):
        low, high = math.log(0.1), math.log(128)
        for _ in range(40):
            left, right = low + (high - low) / 3, high - (high - low) / 3
            low, high = (low, right) if nats(channel, left) < nats(channel, right) else (left, high)
        assert fitted[channel].item() == pytest.approx(math.exp(low), rel=1e-3)
    assert fitted[1] == pytest.approx(12, rel=0.1)


def test_a_fitted_scale_stays_within_its_bounds():
    model = small().eval()
    with torch.no_grad():
        model.decoder.conv_out.weight.zero_()
        model.decoder.conv_out.bias.copy_(torch.tensor([128 / 127.5 - 1, 9.0, 0.0]))
    fitted = fit_scale(model, torch.full((2, 3, 8, 8), 128, dtype=torch.uint8))
    assert fitted[0] == pytest.approx(0.1, rel=1e-4)
    assert fitted[1] == pytest.approx(128, rel=1e-4)
    assert 0.1 < fitted[2] < 1


@pytest.mark.parametrize(
    ("likelihood", "num", "message"),
    [
        (Categorical.Config(), 2, "got a model with a Categorical, expected Normal.Config"),
        (Normal.Config(scale=3.0), 2, "a Normal with a fixed scale"),
        (Normal.Config(), 0, "got no images"),
    ],
)
def test_a_scale_that_cannot_be_fitted(likelihood, num, message):
    with pytest.raises(ValueError, match=message):
        fit_scale(small(likelihood=likelihood), images(num))


def test_a_scale_is_fitted_in_inference_mode():
    model = small().eval()
    y = images(4)
    expected = fit_scale(copy.deepcopy(model), y)
    with torch.inference_mode():
        assert torch.equal(fit_scale(model, y.clone()), expected)
    assert torch.equal(model.likelihood.log_scale.exp(), expected)


@pytest.mark.parametrize("convert", [torch.nn.Module.half, torch.nn.Module.bfloat16])
def test_a_coarse_model_s_scale_is_not_fitted(convert):
    with pytest.raises(ValueError, match=r"float16, expected float32: fit the scale of model.float\(\)"):
        fit_scale(convert(small()), images(2))
