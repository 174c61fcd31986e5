"""Images in tiles: equal to the whole where the networks' reach is bounded, without seams where it is not."""

import itertools
import json

import pytest
import torch
from export_worlds import shaken
from test_any_size import KINDS, built, noise

from vqvae import VQGAN, VQVAE, Autoencoder, GaussianVAE, Tiled
from vqvae.data import ImageTensors
from vqvae.likelihoods import Normal
from vqvae.quantizers import FSQ, MultiScaleQuantizer, VectorQuantizer
from vqvae.tokens import CodeDataset, Tokenizing, tokenize

VQ = VectorQuantizer.Config(num_codes=64, dim=4)
NORMAL = Normal.Config()
NETWORKS = [
    pytest.param(
        VQVAE, {"downsampling": factor, "num_blocks": blocks, "smooth": smooth}, id=f"{factor}-{blocks}-{smooth}"
    )
    for factor, blocks, smooth in itertools.product((1, 2, 4, 8), (0, 2), (False, True))
]
BOUNDED = [*NETWORKS, pytest.param(GaussianVAE, {"num_blocks": 1}, id="gaussian")]
UNBOUNDED = {
    "attention": VQVAE.Config(image_size=16, width=32, num_blocks=1, attention=True, quantizer=VQ, likelihood=NORMAL),
    "vqgan": VQGAN.Config(
        image_size=16, num_channels=1, channels=(8, 8), num_blocks=1, latent_channels=4, num_groups=4, quantizer=VQ
    ),
}


def model_of(kind: type[Autoencoder], options: dict) -> Autoencoder:
    torch.manual_seed(0)
    common = {"image_size": 16, "width": 8, "likelihood": NORMAL}
    if kind is VQVAE:
        common["quantizer"] = VQ
    return shaken(kind(**common, **options)).double().eval()


@pytest.mark.parametrize(("kind", "options"), BOUNDED)
def test_the_reach_is_how_far_a_change_is_seen(kind, options):
    """In float64: a change of one position changes features that far, and no further."""
    model = model_of(kind, options)
    factor, side = model.factor, 8 * 24
    images = noise(side, side, num=1, channels=1)
    changed = images.clone()
    changed[..., side // 2, side // 2] ^= 128
    seen = (model.encoder(changed) != model.encoder(images)).any(3)[0]
    rows = seen.any(1).nonzero()[:, 0]
    at = side // 2
    # In pixels: from the first and of the last position that saw it to the pixel itself.
    assert max(at - (rows.max() * factor + factor - 1), rows.min() * factor - at, 0) == 0
    assert max(rows.max() * factor - at, at - (rows.min() * factor + factor - 1), 0) <= model.encoder.reach
    vectors = torch.randn(1, side // factor, side // factor, model.decoder.layers[0].in_channels).double()
    others = vectors.clone()
    here = side // factor // 2
    others[:, here, here] += 1
    touched = (model.decoder(vectors) != model.decoder(others)).any(1)[0].any(1).nonzero()[:, 0]
    first, last = here * factor, here * factor + factor - 1
    assert first - touched.min() <= model.decoder.reach
    assert touched.max() - last <= model.decoder.reach
    assert max(first - touched.min(), touched.max() - last) > model.decoder.reach - factor  # and not much less


@pytest.mark.parametrize(("kind", "options"), BOUNDED)
@pytest.mark.parametrize("size", [(72, 136), (64, 8), (120, 120)])
def test_tiles_are_the_whole(kind, options, size):
    """In float64, where no rounding decides between two codes."""
    model, images = model_of(kind, options), noise(*size, num=2, channels=1)
    tiled = Tiled(model, tile=56)
    assert tiled.exact
    latents = tiled.encode(images)
    if kind is VQVAE:
        assert torch.equal(latents, model.encode(images))
        assert len(latents.unique()) > 4
    torch.testing.assert_close(latents, model.encode(images), rtol=0, atol=1e-9)
    assert torch.equal(tiled.decode(model.encode(images)), model.reconstruct(images))
    assert model.reconstruct(images).float().std() > 1


@pytest.mark.parametrize("name", KINDS)
def test_one_tile_is_the_model(name):
    model, images = built(KINDS[name]), noise(10, 14)
    tiled = Tiled(model, tile=64)
    assert torch.equal(tiled.encode(images, pad=True), model.encode(images, pad=True))
    assert torch.equal(tiled.reconstruct(images, pad=True), model.reconstruct(images, pad=True))
    with pytest.raises(ValueError, match="give pad=True"):
        tiled.reconstruct(images)


@pytest.mark.parametrize("pad", [(64, 80), (61, 79)])
def test_padding_and_cropping_are_of_the_whole(pad):
    model = model_of(VQVAE, {})
    images = noise(*pad, num=1, channels=1)
    tiled = Tiled(model, tile=24)
    assert torch.equal(tiled.reconstruct(images, pad=True), model.reconstruct(images, pad=True))
    with pytest.raises(ValueError, match="expected sides of at most 64x80"):
        tiled.decode(tiled.encode(images, pad=True), size=(60, 80))


@pytest.mark.parametrize("name", UNBOUNDED)
def test_tiles_of_networks_without_bound_blend(name):
    """What differs from the whole goes over from tile to tile without a step."""
    model = built(UNBOUNDED[name])
    tiled = Tiled(model, tile=32)
    assert not tiled.exact
    images = noise(96, 96, num=1, channels=1).float()
    images = torch.nn.functional.avg_pool2d(images, 9, 1, 4).round().to(torch.uint8)  # what a photograph is: smooth
    codes = model.encode(images)
    joined = []
    model.likelihood.point_estimate = lambda features: features * 127.5 + 127.5  # before it is rounded
    with torch.no_grad():
        whole = model.likelihood.point_estimate(model.decoder(model.vectors(codes)))
    tiled.model.likelihood.point_estimate = lambda features: joined.append(features) or features * 127.5 + 127.5
    apart = tiled.decode(codes).float() - whole
    assert len(joined) == 9
    assert apart.abs().max() > 1  # it does differ
    steps = (apart[..., 1:] - apart[..., :-1]).abs().mean((0, 1, 2))
    borders = torch.tensor([31, 63])
    others = torch.ones(95, dtype=torch.bool).index_fill(0, borders, False)
    assert steps[borders].max() <= steps[others].max() * 1.05 + 0.5  # rounding


def test_weights_of_neighbours_are_one_together():
    from vqvae.tiling import _parts, _ramp

    for num, size in ((96, 32), (97, 32), (8, 8), (33, 32), (1000, 64)):
        parts = _parts(num, size, size // 8)
        assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
        assert parts[-1].stop == num
        assert max(part.stop - part.start for part in parts) <= size
        total = torch.zeros(3 * num)
        for part in parts:
            total[3 * part.low : 3 * part.high] += _ramp(part, parts, 3, total)
        torch.testing.assert_close(total, torch.ones(3 * num))


def test_each_tile_is_told():
    told = []
    tiled = Tiled(model_of(VQVAE, {}), tile=24, watch=lambda done, total: told.append((done, total)))
    tiled.encode(noise(48, 72, num=1, channels=1))
    assert told == [(number, 6) for number in range(1, 7)]


def test_a_set_of_codes_is_made_in_tiles(tmp_path):
    model, images = model_of(VQVAE, {}), ImageTensors(noise(48, 72, num=5, channels=1), name="noise")
    resized = model.resized((48, 72))
    for folder, tile in (("whole", None), ("tiles", 24)):
        tokenize(resized, images, tmp_path / folder, Tokenizing(batch_size=2, tile=tile))
    whole, tiles = (CodeDataset(tmp_path / folder) for folder in ("whole", "tiles"))
    assert torch.equal(whole[:].codes, tiles[:].codes)
    assert torch.equal(whole[:].codes, model.encode(images.images))
    index = json.loads((tmp_path / "tiles" / "index.json").read_text())
    assert index["tile"] == 24
    assert "tile" not in json.loads((tmp_path / "whole" / "index.json").read_text())
    with pytest.raises(ValueError, match="with tile None, expected 24"):
        tokenize(resized, images, tmp_path / "whole", Tokenizing(batch_size=2, tile=24))
    with pytest.raises(ValueError, match="got tiles of 4 pixels, expected at least"):
        tokenize(resized, images, tmp_path / "small", Tokenizing(batch_size=2, tile=4))


def test_tiles_that_are_too_small_and_codes_without_tiles_are_refused():
    model = model_of(VQVAE, {"num_blocks": 2})
    least = 4 * -(-max(model.encoder.reach, model.decoder.reach) // 4)
    Tiled(model, tile=least)
    with pytest.raises(ValueError, match=f"got tiles of {least - 1} pixels, expected at least {least}, how far"):
        Tiled(model, tile=least - 1)
    with pytest.raises(ValueError, match="expected at least 32, an eighth of which overlaps"):
        Tiled(built(UNBOUNDED["attention"]), tile=16)
    scales = MultiScaleQuantizer.Config(quantizer=VQ, scales=(1, 4))
    with pytest.raises(ValueError, match="codes of several scales"):
        Tiled(VQVAE(image_size=16, width=8, num_blocks=0, quantizer=scales))
    with pytest.raises(ValueError, match="expected codes on a grid"):
        Tiled(VQVAE(image_size=16, width=8, num_blocks=0, quantizer=FSQ.Config())).decode(torch.zeros(1, 4).long())


@pytest.mark.parametrize("tile", ["a", 64.0, None, (64, 64)])
def test_tiles_that_are_no_number_are_refused(tile, untyped):
    with pytest.raises(ValueError, match=r"got tile=.*, expected the side of a tile in pixels"):
        Tiled(built(KINDS["plain"]), tile=tile)


@pytest.mark.parametrize("size", [30, "30x30", (30,), (30, 30, 3), (30.0, 30.0), (None, 30)])
def test_a_crop_that_is_no_height_and_width_is_refused(size, untyped):
    model = built(KINDS["plain"])
    codes = model.encode(noise(30, 30, num=1), pad=True)
    for each in (model, Tiled(model, tile=64)):
        with pytest.raises(ValueError, match=r"got size=.*, expected height and width, such as \(192, 256\)"):
            each.decode(codes, size=size)
        assert each.decode(codes, size=torch.Size((30, 31))).shape[2:] == (30, 31)
