"""VQGAN: networks, training from imported weights, saving, export to diffusers, and the fitted scale."""

import copy
import dataclasses
import json
import pickle

import pytest
import torch
from vqgan_references import vq_model

from priors import TransformerPrior
from vqvae import VQVAE, Autoencoder
from vqvae.interop.code_agreement import compare_codes
from vqvae.interop.diffusers import export_diffusers, import_diffusers
from vqvae.interop.scale import fit_scale
from vqvae.likelihoods import Categorical, LogisticMixture, Normal
from vqvae.quantizers import EMAVectorQuantizer, GumbelQuantizer, ResidualQuantizer, VectorQuantizer
from vqvae.vqgan import VQGAN, DiffusersConfig

CODES = VectorQuantizer.Config(num_codes=16, dim=4)
SMALL = VQGAN.Config(
    image_size=8,
    channels=(32, 32),
    num_blocks=1,
    down_attention=(1,),
    up_attention=(1,),
    latent_channels=4,
    quantizer=CODES,
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
        {"spatial_norm": True, "quantizer": EMAVectorQuantizer.Config(num_codes=16, dim=4)},
        {"channels": (32, 64, 64), "down_attention": (0, 2), "up_attention": (1,), "num_blocks": 2},
        {
            "channels": (16,),
            "num_groups": 8,
            "down_attention": (),
            "mid_attention": False,
            "up_attention": (),
            "num_channels": 1,
        },
        {"likelihood": LogisticMixture.Config(), "quantizer": ResidualQuantizer.Config(quantizer=CODES, depth=2)},
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
    read = [kind.from_pretrained(tmp_path / "model") for kind in (VQVAE, Autoencoder)]
    for twin in (*read, pickle.loads(pickle.dumps(model))):
        assert type(twin) is VQGAN
        assert twin.config == model.config
        assert torch.equal(twin.encode(y), codes)
        assert torch.equal(twin.decode(codes), picture)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": ()}, "expected one level and one of each at least"),
        ({"num_blocks": 0}, "num_blocks=0"),
        ({"channels": (32, 40)}, "multiples of num_groups, 32"),
        ({"channels": (32, 40), "num_groups": 8, "spatial_norm": True}, "multiples of the groups of spatial norms, 32"),
        ({"down_attention": (2,)}, r"got down_attention=\(2,\), expected levels from 0 .finest. to 1"),
        ({"up_attention": (1, 0)}, "got up_attention"),
        ({"image_size": 9}, "image_size 9 is not a multiple of 2"),
        ({"channels": (32.0, 32)}, r"channels=\(32.0, 32\) for VQGAN, expected a tuple of integers"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_training_goes_on_from_imported_weights(tmp_path):
    """No k-means start and no revival moves the codebook; gradients do, a little, and the distortion falls."""
    vq_model("ldm-celebahq", shrink=8).save_pretrained(tmp_path / "theirs")
    imported = import_diffusers(tmp_path / "theirs", image_size=8)
    y = images(8)
    prior = TransformerPrior(num_codes=imported.num_codes, grid=imported.grid, width=48, depth=1, num_heads=2)
    assert imported.decode(prior.eval().sample(2)).shape == (2, 3, 8, 8)
    before = imported.quantizer.codebook.detach().clone()
    model = copy.deepcopy(imported).train()
    with torch.no_grad():
        model(y)
    for _ in range(3):
        model(y)
        model.update()  # statistics alone
    assert torch.equal(model.quantizer.codebook, before)
    distortions = optimise(imported, y, 10)
    assert distortions[-1] < distortions[0]
    moved = (imported.quantizer.codebook - before).abs()
    assert 0 < moved.max() < 0.1


@pytest.mark.parametrize(
    "quantizer",
    [EMAVectorQuantizer.Config(num_codes=16, dim=4), VectorQuantizer.Config(num_codes=16, dim=4, normalize=True)],
)
def test_what_was_trained_is_exported(quantizer, tmp_path):
    """The nearest of unit vectors is nearest to the direction too, however long the feature is."""
    import diffusers

    model = small(quantizer=quantizer)
    y = images(16)
    optimise(model, y, 3)
    model.eval()
    export_diffusers(model, tmp_path / "out")
    peer = diffusers.VQModel.from_pretrained(tmp_path / "out")
    assert torch.equal(peer.quantize.embedding.weight, model.quantizer.table)
    assert peer.config.sample_size == 8
    with torch.no_grad():
        h = peer.encode(y / 127.5 - 1).latents
        codes = peer.quantize(h)[2][2].reshape(16, 4, 4)
        theirs = peer.decode(peer.quantize.embedding(model.encode(y)).movedim(-1, 1), force_not_quantize=True).sample
    found = compare_codes(model, y, codes)
    assert found.num_wrong == 0
    assert found.num_ties <= 1
    assert len(codes.unique()) > 4
    torch.testing.assert_close(theirs, model(y).features.detach(), rtol=0, atol=1e-4)
    again = import_diffusers(tmp_path / "out", image_size=8)
    assert compare_codes(again, y, model.encode(y)).num_wrong == 0


@pytest.mark.parametrize(("name", "message"), [("thesis.tex", "holds other things"), ("config.json", "something else")])
def test_an_export_removes_nothing_else(name, message, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("{}")
    with pytest.raises(ValueError, match=message):
        export_diffusers(small(), tmp_path / "out")
    assert (tmp_path / "out" / name).read_text() == "{}"


def test_an_export_replaces_a_folder_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "out"
    model = small(diffusers=DiffusersConfig(lookup_from_codebook=True, scaling_factor=0.5))
    export_diffusers(model, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    said = json.loads(before["config.json"])
    assert (said["lookup_from_codebook"], said["scaling_factor"], said["sample_size"]) == (True, 0.5, 8)
    with pytest.raises(ValueError, match="train with Normal"):
        export_diffusers(small(likelihood=Categorical.Config()), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    export_diffusers(small(num_blocks=2), folder)
    assert json.loads((folder / "config.json").read_text())["layers_per_block"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_has_no_form_in_diffusers(tmp_path):
    for model, message in (
        (small(quantizer=GumbelQuantizer.Config(num_codes=16, dim=4)), "GumbelQuantizer finds codes otherwise"),
        (small(likelihood=LogisticMixture.Config()), "train with Normal.Config"),
        (small(spatial_norm=True, latent_channels=8), "need them equal"),
        (VQVAE(image_size=8, width=8, likelihood=Normal.Config()), "a VQVAE has other networks"),
    ):
        with pytest.raises(ValueError, match=message):
            export_diffusers(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_fitted_scale_is_that_of_most_likelihood():
    """In float64 no scale nearby is likelier, for errors small and large."""
    model = small().eval()
    spread = torch.tensor([0.6, 12.0, 90.0])[:, None, None]
    noise = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y = (127.5 + spread * noise).round().clamp(0, 255).to(torch.uint8)
    fitted = fit_scale(model, y)
    torch.testing.assert_close(model.likelihood.log_scale.exp().detach(), fitted)
    twin = copy.deepcopy(model.likelihood).double()

    @torch.no_grad()
    def nats(factor):
        twin.log_scale.copy_((fitted * factor).log())
        return -twin.log_prob(y, model(y).features.double()).sum()

    for channel in range(3):
        for factor in (0.99, 1.01):
            assert nats(torch.ones(3)) < nats(torch.ones(3).index_fill(0, torch.tensor(channel), factor))
    assert fitted[1] == pytest.approx(12, rel=0.1)
    with torch.inference_mode():
        assert torch.equal(fit_scale(model, y.clone()), fitted)


def test_a_fitted_scale_stays_within_its_bounds():
    model = small().eval()
    with torch.no_grad():
        model.decoder.conv_out.weight.zero_()
        model.decoder.conv_out.bias.copy_(torch.tensor([128 / 127.5 - 1, 9.0, 0.0]))
    fitted = fit_scale(model, torch.full((2, 3, 8, 8), 128, dtype=torch.uint8))
    assert fitted[0] == pytest.approx(0.1, rel=1e-4)
    assert fitted[1] == pytest.approx(128, rel=1e-4)
    assert 0.1 < fitted[2] < 1


def test_a_scale_that_cannot_be_fitted():
    for model, num, message in (
        (small(likelihood=Categorical.Config()), 2, "got a model with a Categorical, expected Normal.Config"),
        (small(likelihood=Normal.Config(scale=3.0)), 2, "a Normal with a fixed scale"),
        (small(), 0, "got no images"),
        (small().bfloat16(), 2, r"float16, expected float32: fit the scale of model.float\(\)"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_scale(model, images(num))
