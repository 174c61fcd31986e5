"""Images and grids of any height and width, through models of every kind and what is built on them."""

import json
import math

import pytest
import torch
from codec_worlds import LIKELIHOODS, model_of
from export_worlds import shaken
from torch.nn import functional as F

from priors import TransformerPrior, UniformPrior
from vqvae import VQGAN, VQVAE, Autoencoder, GaussianVAE
from vqvae.codec import Codec
from vqvae.data import ImageTensors, batches, load_images
from vqvae.evaluation import evaluate, images_at_once
from vqvae.fingerprint import of_tokenizer
from vqvae.interop import export_program
from vqvae.levels import padded
from vqvae.quantizers import FSQ, EMAVectorQuantizer, MultiScaleQuantizer, ResidualQuantizer, VectorQuantizer
from vqvae.tokens import CodeDataset, tokenize

VQ = VectorQuantizer.Config(num_codes=8, dim=4)
WIDE = {"image_size": (8, 12), "num_channels": 3, "width": 8, "num_blocks": 1}
KINDS = {
    "plain": VQVAE.Config(**WIDE, quantizer=VQ),
    "smooth": VQVAE.Config(**WIDE, quantizer=FSQ.Config(levels=(3, 3)), smooth=True),
    "attention": VQVAE.Config(**(WIDE | {"width": 32}), quantizer=VQ, attention=True),
    "residual": VQVAE.Config(**WIDE, quantizer=ResidualQuantizer.Config(quantizer=VQ, depth=2)),
    "context": VQVAE.Config(**WIDE, quantizer=VQ, likelihood=LIKELIHOODS["colour local context"][1]),
    "gaussian": GaussianVAE.Config(**WIDE, dim=3),
    "vqgan": VQGAN.Config(
        image_size=(8, 12), channels=(8, 8, 8), num_blocks=1, latent_channels=4, num_groups=4, quantizer=VQ
    ),
}


def built(config: Autoencoder.Config) -> Autoencoder:
    torch.manual_seed(0)
    return shaken(config.build()).eval()


def noise(height: int, width: int, num: int = 2, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randint(0, 256, (num, channels, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("name", KINDS)
def test_a_model_of_what_is_not_square_is_saved_and_read(name, tmp_path):
    model = built(KINDS[name])
    assert (model.size, model.feature_grid, model.num_dims) == ((8, 12), (2, 3), 288)
    assert model.grid[:2] == (2, 3)
    assert model(noise(8, 12)).features.shape[2:] == (8, 12)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["image_size"] == [8, 12]
    again = type(model).from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again.encode(noise(8, 12)), model.encode(noise(8, 12)))
    assert model.card_facts()["images"] == "8 × 12, 3 channels"
    assert "torch.zeros(1, 3, 8, 12, dtype" in model.usage_lines()[0]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [(8, 12), (12, 8), (4, 20)])
def test_any_size_is_what_the_networks_make_of_it(name, size):
    model, images = built(KINDS[name]), noise(*size)
    with torch.no_grad():
        z_e = model.encoder(images)
        out = model(images)
    assert z_e.shape[1:3] == (size[0] // 4, size[1] // 4)
    latents = model.encode(images)
    assert latents.shape[1:3] == z_e.shape[1:3]
    if isinstance(model, VQVAE):
        assert torch.equal(latents, model.quantizer(z_e).codes)
    assert torch.equal(model.decode(latents), model.reconstruct(images))
    assert model.decode(latents).shape == images.shape
    with torch.no_grad():
        alone = model.likelihood.log_prob(images, model.decoder(model.vectors(out.latents)))
    torch.testing.assert_close(out.distortion, -alone)
    usage = model.usage()
    usage.add(out.counted)
    assert 0 <= usage.usage <= 1


def test_codes_of_patches_do_not_depend_on_where_they_lie():
    """An encoder that looks at a code's own pixels alone: any image has the codes of its patches, side by side."""
    model = built(VQVAE.Config(**(WIDE | {"num_blocks": 0}), quantizer=VQ))
    images = noise(8, 16)
    codes = model.encode(images)
    for row in range(2):
        for column in range(4):
            patch = images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            assert torch.equal(model.encode(patch)[:, 0, 0], codes[:, row, column])


@pytest.mark.parametrize("name", ["plain", "gaussian", "vqgan"])
def test_padding_is_the_border_repeated_and_cropped_again(name):
    model, images = built(KINDS[name]), noise(7, 13)
    by_hand = F.pad(images.float(), (0, 3, 0, 1), mode="replicate").to(torch.uint8)
    latents = model.encode(images, pad=True)
    assert torch.equal(latents, model.encode(by_hand))
    expected = model.decode(latents)[..., :7, :13]
    assert torch.equal(model.reconstruct(images, pad=True), expected)
    assert torch.equal(model.decode(latents, size=(7, 13)), expected)
    assert torch.equal(model.reconstruct(noise(8, 12), pad=True), model.reconstruct(noise(8, 12)))
    assert torch.equal(padded(noise(8, 12), 4), noise(8, 12))
    for size in ((4, 13), (9, 13), (7, 12), (7, 17)):
        with pytest.raises(ValueError, match=r"latents of 2x4 positions, expected sides of at most 8x16 and less than"):
            model.decode(latents, size=size)
    with pytest.raises(ValueError, match="multiples of 4, such as 8x12, got 7x13: scale or crop them, or give pad"):
        model.encode(images)


def test_one_row_of_pixels_is_an_image_too():
    model = built(KINDS["plain"])
    assert model.encode(noise(1, 50), pad=True).shape == (2, 1, 13)
    assert model.reconstruct(noise(1, 50), pad=True).shape == (2, 3, 1, 50)


def test_scales_are_for_their_own_size():
    quantizer = MultiScaleQuantizer.Config(quantizer=VQ, scales=(1, 2))
    model = built(VQVAE.Config(**(WIDE | {"image_size": 8}), quantizer=quantizer))
    with pytest.raises(ValueError, match="features must be 2x2, got"):
        model.encode(noise(8, 12))
    with pytest.raises(ValueError, match="features must be 2x2, got"):
        VQVAE(**WIDE, quantizer=quantizer)


def test_a_prior_is_for_its_own_grid():
    model = built(KINDS["plain"])
    prior = TransformerPrior(num_codes=8, grid=model.grid, width=16, depth=1, num_heads=2).eval()
    with pytest.raises(ValueError, match=r"got .*\(2, 3, 2\)|expected .*\(2, 2, 3\)|b, 2, 3"):
        prior.log_prob(model.encode(noise(12, 8)))
    looped = built(VQVAE.Config(**WIDE, quantizer=VQ, beta=1.0))
    looped.quantizer.error.fill_(1.0)
    guided = looped.through(prior)
    assert guided.encode(noise(8, 12)).shape == (2, 2, 3)
    for call in (guided, guided.draw, guided.encode):
        with pytest.raises(ValueError, match="got images of 12x8, expected 8x12: the prior in the loop is for their"):
            call(noise(12, 8))


def test_bits_are_of_the_images_that_were_given():
    model = built(KINDS["plain"])
    for height, width in ((8, 12), (8, 8)):
        images = noise(height, width, num=5)
        prior = UniformPrior(num_codes=8, grid=(height // 4, width // 4))
        if (height, width) != model.size:
            with pytest.raises(ValueError, match="grid"):
                evaluate(model, {"uniform": prior}, batches(ImageTensors(images), 3))
            continue
        result = evaluate(model, {"uniform": prior}, batches(ImageTensors(images), 3))
        with torch.no_grad():
            distortion = model(images).distortion.double().mean().item()
        assert result.bits(result.bound.distortion) == pytest.approx(distortion / (math.log(2) * 288))


@pytest.mark.parametrize("likelihood", ["mixture", "colour mixture", "local context"])
def test_archives_of_a_model_that_is_not_square(likelihood):
    model = model_of(likelihood, size=(8, 16))
    prior = UniformPrior(num_codes=8, grid=model.grid)
    codec = Codec(model, prior)
    channels = LIKELIHOODS[likelihood][0]
    images = [noise(*size, num=1, channels=channels)[0] for size in ((8, 16), (16, 8), (5, 33), (1, 1))]
    data = codec.compress(images)
    for one, other in zip(codec.decompress(data), images, strict=True):
        assert torch.equal(one, other)
    square = Codec(model_of(likelihood, size=8), UniformPrior(num_codes=8, grid=(2, 2)))
    with pytest.raises(ValueError, match="model"):
        square.decompress(data)


def test_sets_and_programs_of_a_model_that_is_not_square(tmp_path):
    model = built(KINDS["plain"])
    images = ImageTensors(noise(8, 12, num=7), name="noise")
    tokenize(model, images, tmp_path / "codes")
    codes = CodeDataset(tmp_path / "codes")
    assert codes.grid == (2, 3)
    assert torch.equal(codes[:7].codes.long(), model.encode(images.images))
    with pytest.raises(ValueError, match=r"\(3, 8, 12\), got \(3, 8, 8\) of noise; load them with size=\(8, 12\)"):
        tokenize(model, ImageTensors(noise(8, 8), name="noise"), tmp_path / "others")
    export_program(model, tmp_path / "program")
    info = json.loads((tmp_path / "program" / "tokenizer.json").read_text())
    assert info["image_size"] == [8, 12]
    assert info["encoder"]["input"]["shape"] == ["batch", 3, 8, 12]


def test_the_loader_gives_any_height_and_width(tmp_path):
    images = load_images("fashion-mini", "test", size=(14, 28), channels=3)
    assert images.shape == (3, 14, 28)
    assert load_images("fashion-mini", "test", size=(14, 14)).shape == (1, 14, 14)
    # The middle rows of the whole: scaled by the larger ratio, 1, and cropped.
    assert torch.equal(images[:3].images[:, :1], load_images("fashion-mini", "test")[:3].images[:, :, 7:21])


def test_turned_sides_are_another_tokenizer():
    tall = VQVAE.Config(**(WIDE | {"image_size": (12, 8)}), quantizer=EMAVectorQuantizer.Config(num_codes=8, dim=4))
    model, other = (built(config) for config in (tall, VQVAE.Config(**WIDE, quantizer=tall.quantizer)))
    assert of_tokenizer(model) != of_tokenizer(other)


@pytest.mark.parametrize("name", KINDS)
def test_a_model_of_another_size_has_the_same_weights(name, tmp_path):
    model = built(KINDS[name])
    other = model.resized((12, 8))
    assert (other.size, other.grid[:2], other.training) == ((12, 8), (3, 2), False)
    assert model.size == (8, 12)
    assert torch.equal(other.encode(noise(12, 8)), model.encode(noise(12, 8)))
    assert other.resized((8, 12)).config == model.config
    other.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.size == (12, 8)
    assert torch.equal(again.encode(noise(12, 8)), model.encode(noise(12, 8)))
    prior = UniformPrior(num_codes=8, grid=other.grid) if isinstance(model, VQVAE) and name != "smooth" else None
    if prior is not None:
        assert prior.log_prob(model.encode(noise(12, 8))).shape == (2,)
    next(other.encoder.parameters()).data.zero_()
    assert next(model.encoder.parameters()).abs().sum() > 0
    with pytest.raises(ValueError, match=r"image_size \(12, 9\) is not a multiple of 4,"):
        model.resized((12, 9))


def test_scales_have_no_other_size():
    model = built(
        VQVAE.Config(**(WIDE | {"image_size": 8}), quantizer=MultiScaleQuantizer.Config(quantizer=VQ, scales=(1, 2)))
    )
    with pytest.raises(ValueError, match="features must be 2x2"):
        model.resized((12, 8))


def test_large_images_go_through_a_few_at_a_time():
    assert images_at_once(28, 28) == images_at_once(64, 64) == 100
    assert images_at_once(64, 128) == 50
    assert images_at_once(256, 256) == 6
    assert images_at_once(4000, 3000) == 1
