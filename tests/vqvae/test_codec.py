"""The codec: what goes in comes out, in as many bits as the integer tables say, on every machine."""

import dataclasses
import math
import sys

import pytest
import torch
from codec_worlds import (
    LIKELIHOODS,
    POSTERIORS,
    QUANTIZERS,
    VQ,
    contents_of,
    images_of,
    model_of,
    model_with_posterior,
    rescued,
    transformer_of,
    uniform_of,
    unigram_of,
)
from lanes import some

from priors import TransformerPrior
from vqvae import VQVAE, GaussianVAE
from vqvae.bound import elbo, sampled_elbo
from vqvae.codec import Archive, Codec, Compression, DamagedFile, Mode, integer_tables
from vqvae.codec.bits_back import BitsBack
from vqvae.codec.block import STORED, BlockContent
from vqvae.quantizers import GumbelQuantizer


@pytest.fixture(scope="module")
def plain():
    """A codec and six images for it."""
    model = model_of()
    return Codec(model, transformer_of(model, num_classes=3)), images_of(model, 6)


@pytest.fixture(scope="module")
def gumbel():
    model = model_with_posterior("gumbel")
    return Codec(model, transformer_of(model, num_classes=3)), images_of(model, 9)


def flipped(data, offset):
    return data[:offset] + bytes([data[offset] ^ 4]) + data[offset + 1 :]


def noise_of(*shape):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def images_in(blocks):
    return torch.stack([image for block in blocks for image in block.images])


WORLDS = [
    *((likelihood, VQ, transformer_of) for likelihood in LIKELIHOODS),
    *(("mixture", quantizer, transformer_of) for name, quantizer in QUANTIZERS.items() if name != "vq"),
    *(("mixture", VQ, prior_of) for prior_of in (uniform_of, unigram_of)),
]


@pytest.mark.parametrize(("likelihood", "quantizer", "prior_of"), WORLDS)
def test_pixels_come_back_for_the_negative_elbo(likelihood, quantizer, prior_of):
    model = model_of(likelihood, quantizer)
    prior, y = prior_of(model), images_of(model, 8)
    codec = Codec(model, prior)
    data = codec.compress(y[:3], options=Compression(verify=False))
    assert torch.equal(codec.decompress(data), y[:3])
    assert STORED not in contents_of(codec, data)[0].kinds  # they were coded, not kept
    cost = codec.measure(y)
    with torch.no_grad():
        terms = elbo(model.double(), prior.double(), y)
    # A grid's rounding and the least widths: what they cost is far below a bit an image of this size.
    torch.testing.assert_close(cost.rate, terms.rate / math.log(2), rtol=1e-4, atol=0.01)
    torch.testing.assert_close(cost.distortion, terms.distortion / math.log(2), rtol=1e-3, atol=0.1)
    assert not cost.stored.any()


def test_a_stream_is_as_long_as_its_tables_say(plain):
    codec, y = plain
    for images in (y[:4], y, *y.split(1)):
        file = codec.compress(images)
        [content] = contents_of(codec, file)
        extra = 8 * len(content.stream) - float(codec.measure(images).total.sum())
        assert -16 <= extra <= 16  # a message that ends in zeros needs no bytes for them
        # 41 or 42 of the container, 14 or 15 of the content: counts, flags, shape, kinds, check, length.
        assert len(file) - len(content.stream) <= 57


WIDE = {"mixture with zero": -11, "colour mixture with zero": -13, "categorical": -17, "local context": -13}


@pytest.mark.parametrize("likelihood", some(WIDE))
def test_a_machine_that_computes_slightly_differently_decodes(likelihood, monkeypatch):
    """All numbers are off by nearly the guard, which is wide here: without it some would be rounded otherwise."""
    model = model_of(likelihood)
    codec, y = Codec(model, transformer_of(model)), images_of(model, 200)
    cdf, steps = codec.coder.likelihood.cdf, []
    wide = {"GUARD": 2.0 ** WIDE[likelihood], "CDF_GUARD": 2.0**-13}

    class Moved(integer_tables.OnGrid):
        def __init__(self, values, step, offsets):
            steps.append(step)
            moved = values + (torch.rand_like(values) * 2 - 1) * (0.9 * wide["GUARD"] * step)
            # What is cut off to one value is that value on every machine.
            super().__init__(torch.where(values == integer_tables.LEAST_LOG_PROB, values, moved), step, offsets)

    def other_cdf(parameters, levels):
        found = cdf(parameters, levels)
        moved = found + (torch.rand_like(found) * 2 - 1) * (0.9 * wide["CDF_GUARD"] / integer_tables.TOTAL)
        return torch.where((levels < 0) | (levels == 255), found, moved.clamp(0, 1))

    def compress_with(guards):
        with monkeypatch.context() as patch:
            for name, value in guards.items():
                patch.setattr(integer_tables, name, value)
            return codec.compress(y, options=Compression(images_per_block=200, verify=False))

    guarded, unguarded = compress_with(wide), compress_with(dict.fromkeys(wide, 0.0))
    [content] = contents_of(codec, guarded)
    assert STORED not in content.kinds
    assert len(set(content.kinds)) > 1  # some images are on shifted grids
    monkeypatch.setattr(integer_tables, "OnGrid", Moved)
    monkeypatch.setattr(codec.coder.likelihood, "cdf", other_cdf)
    assert torch.equal(codec.decompress(guarded), y)
    assert set(steps) == {integer_tables.LOG_PROB_STEP, integer_tables.PARAMETER_STEP}
    # Without the guard the same disturbance changes what comes out.
    with pytest.raises(DamagedFile):
        codec.decompress(unguarded)


def test_any_batch_and_any_number_of_threads(plain):
    codec, y = plain
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        together = codec.compress(y)
        alone = [codec.compress(image[None]) for image in y]
        torch.set_num_threads(2)
        assert codec.compress(y) == together
        assert torch.equal(codec.decompress(together), y)
        for image, file in zip(y, alone, strict=True):
            assert torch.equal(codec.decompress(file)[0], image)
    finally:
        torch.set_num_threads(threads)
    single = codec.compress(y, options=Compression(images_per_block=1))
    streams = [contents_of(codec, file)[0].stream for file in alone]
    assert [content.stream for content in contents_of(codec, single)] == streams
    with Archive.from_bytes(single) as archive:
        [third] = codec.decode(archive, [2])
    assert torch.equal(third.images[0], y[2])
    assert torch.equal(codec.decompress(single), y)


def test_after_saving_and_loading(tmp_path):
    model = model_of("local context")
    prior, y = transformer_of(model, num_classes=3), images_of(model, 4)
    model.train()
    data = Codec(model, prior).compress(y)
    # The models given are left as they were.
    assert next(model.parameters()).dtype == next(prior.parameters()).dtype == torch.float32
    assert model.training
    model.save_pretrained(tmp_path / "model")
    prior.save_pretrained(tmp_path / "prior")
    again = Codec(VQVAE.from_pretrained(tmp_path / "model"), TransformerPrior.from_pretrained(tmp_path / "prior"))
    assert torch.equal(again.decompress(data), y)
    assert again.compress(y) == data


def test_lossy_gives_the_decoders_mean(plain):
    codec, y = plain
    data = codec.compress(y, options=Compression(mode=Mode.LOSSY))
    model = codec.coder.model
    assert torch.equal(codec.decompress(data), model.decode(model.encode(y)))
    [content] = contents_of(codec, data)
    assert abs(8 * len(content.stream) - codec.measure(y).rate.sum()) <= 16


@pytest.mark.parametrize("kind", POSTERIORS)
def test_bits_back(kind):
    model = model_with_posterior(kind)
    prior, y = transformer_of(model), images_of(model, 120)
    codec = Codec(model, prior)
    data = codec.compress(y, options=Compression(mode=Mode.BITS_BACK))
    assert torch.equal(codec.decompress(data), y)
    [content] = contents_of(codec, data)
    assert STORED not in content.kinds
    net = 8 * len(content.stream) - BitsBack(codec.coder).initial_bits(content.stream)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        terms = sampled_elbo(model.through(prior), prior, y, num_samples=32, generator=generator)
    assert float(terms.entropy.mean()) > 0.1  # there is something to get back
    assert net == pytest.approx(float(terms.negative.sum()) / math.log(2), rel=0.01)
    assert net < float(codec.measure(y).total.sum()) * 1.05


def test_bits_that_do_not_come_back_are_found_out(gumbel, plain):
    codec, y = gumbel
    [content] = contents_of(codec, codec.compress(y[:3], options=Compression(mode=Mode.BITS_BACK)))
    back = BitsBack(codec.coder)
    for at in range(2, len(content.stream), 7):
        with pytest.raises(ValueError, match=r"did not come back|stream|word"):
            back.decode(back.open(flipped(content.stream, at)), content.kinds, None)
    codec, y = plain
    with pytest.raises(ValueError, match="no posterior"):
        codec.compress(y, options=Compression(mode=Mode.BITS_BACK))


@pytest.mark.parametrize("mode", Mode)
def test_labels(gumbel, mode):
    codec, y = gumbel
    labels = torch.tensor([2, 0, 1, 1, 2, 0, 0, 2, 1])
    images = [noise_of(1, 8, 8), *y[1:]]  # a stored image keeps its label
    data = codec.compress(images, labels, Compression(mode=mode, images_per_block=4))
    with Archive.from_bytes(data) as archive:
        decoded = list(codec.decode(archive))
    assert torch.equal(torch.cat([block.labels for block in decoded]), labels)
    assert mode == Mode.LOSSY or torch.equal(images_in(decoded), torch.stack(images))
    assert float(codec.measure(y, labels).rate.min()) > math.log2(3)


def nearly_incompressible(model, num):
    """A wide image, of which every second tile is noise and the others are worth coding."""
    image = noise_of(1, 8, num * 8)
    for i in range(0, num, 2):
        image[..., i * 8 : (i + 1) * 8] = images_of(model, 1, seed=i)[0]
    return image


def test_no_file_of_one_image_is_much_longer_than_its_pixels():
    """Whatever is coded and what is not: the shorter of both is taken."""
    model = model_of("normal", quantizer=GumbelQuantizer.Config(num_codes=64, dim=4))
    codec = Codec(model, uniform_of(model))
    images = [nearly_incompressible(model, 16), nearly_incompressible(model, 5)[:, :3], images_of(model, 1)[0][:, :5]]
    images += [noise_of(1, 1, 1), noise_of(3, 50, 37), nearly_incompressible(model, 2)]
    for image in images:
        for mode in (Mode.LOSSLESS, Mode.BITS_BACK):
            data = codec.compress([image], options=Compression(mode=mode))
            assert len(data) <= 1.002 * image.numel() + 64
            assert torch.equal(codec.decompress(data)[0], image)


def test_images_of_any_size_and_number_of_channels(plain):
    codec, y = plain
    images = [y[0], torch.cat([y[1], y[2]], 1), torch.cat([y[3], y[4][:, :, :3]], 2), y[0][:, :5, :2].repeat(3, 1, 1)]
    back = codec.decompress(codec.compress(images))
    assert isinstance(back, list)
    assert all(torch.equal(*pair) for pair in zip(back, images, strict=True))
    assert codec.decompress(codec.compress([])) == []
    colour = model_of("colour mixture")
    codec, grey = Codec(colour, uniform_of(colour)), images_of(colour, 1)[0, :1]
    assert torch.equal(codec.decompress(codec.compress([grey]))[0], grey)


def test_a_tile_that_is_clear_on_no_grid_is_stored(plain, monkeypatch):
    codec, y = plain
    intervals = codec.coder.intervals

    def never_clear(*args, **options):
        found = intervals(*args, **options)
        found.clear[:1] = False
        return found

    monkeypatch.setattr(codec.coder, "intervals", never_clear)
    data = codec.compress(y)
    assert contents_of(codec, data)[0].kinds[0] == STORED
    assert torch.equal(codec.decompress(data), y)
    with pytest.raises(ValueError, match="every machine"):
        codec.compress(y, options=Compression(mode=Mode.LOSSY))


def test_a_block_that_does_not_verify_is_stored(plain, monkeypatch):
    codec, y = plain
    original = codec.coder.decode_tiles

    def wrong(*args):
        tiles = original(*args)
        if len(tiles):
            tiles[0, 0, 0, 0] ^= 1
        return tiles

    with monkeypatch.context() as patch:
        patch.setattr(codec.coder, "decode_tiles", wrong)
        with pytest.warns(UserWarning, match="stored as they are"):
            data = codec.compress(y)
        codec.compress(y, options=Compression(verify=False))
    assert contents_of(codec, data)[0].kinds == [STORED] * 6
    assert torch.equal(codec.decompress(data), y)


def test_another_model_or_prior_is_named(plain):
    codec, y = plain
    other = Codec(model_of(seed=9), transformer_of(model_of(), num_classes=3))
    with pytest.raises(ValueError, match=f"{codec.fingerprint.hex()}.*{other.fingerprint.hex()}"):
        other.decompress(codec.compress(y))
    assert Codec(model_of(), transformer_of(model_of(), num_classes=3, seed=5)).fingerprint != codec.fingerprint
    assert Codec(model_of(), transformer_of(model_of(), num_classes=3)).fingerprint == codec.fingerprint


def test_one_bad_block_does_not_blame_its_neighbours(plain):
    codec, y = plain
    with Archive.from_bytes(codec.compress(y, options=Compression(images_per_block=1))) as archive:
        contents = [archive.content(i) for i in range(6)]
    for at in range(17, len(contents[3]), 11):  # the container's check is none of it, so only the pixels' is left
        broken = [*contents[:3], flipped(contents[3], at), *contents[4:]]
        decoded = codec.decoder.decode(enumerate(broken), Mode.LOSSLESS)
        assert torch.equal(images_in(next(decoded) for _ in range(3)), y[:3])
        with pytest.raises(DamagedFile, match="block 3: "):
            next(decoded)


def test_the_check_covers_shapes_labels_and_modes(plain):
    codec, _ = plain
    with Archive.from_bytes(codec.compress([noise_of(1, 8, 4)], torch.tensor([2]))) as archive:
        content = archive.content(0)
    right = BlockContent.unpack(content, 1, (8, 8))
    turned = dataclasses.replace(right, tilings=[dataclasses.replace(right.tilings[0], shape=(1, 4, 8))])
    relabelled = dataclasses.replace(right, stream=b"")
    for wrong in (turned, relabelled):
        with pytest.raises(DamagedFile, match="other pixels come out"):
            list(codec.decoder.decode([(0, wrong.pack())], Mode.LOSSLESS))
    with pytest.raises(DamagedFile, match="lossy"):
        list(codec.decoder.decode([(0, content)], Mode.LOSSY))


def test_a_flipped_byte_is_found_and_the_rest_is_rescued(plain):
    codec, y = plain
    data = codec.compress(y, options=Compression(images_per_block=2))
    with Archive.from_bytes(data) as archive:
        second = archive.blocks[1]
    broken = flipped(data, second.offset + second.length // 2)
    with pytest.raises(DamagedFile, match="block 1"):
        codec.decompress(broken)
    blocks, damage = rescued(codec, broken)
    assert torch.equal(images_in(blocks), torch.cat([y[:2], y[4:]]))
    assert len(damage) == 1


@pytest.mark.parametrize("mode", Mode)
def test_a_mode_that_is_lost_is_found(gumbel, mode):
    codec, y = gumbel
    data = codec.compress(y, options=Compression(mode=mode, images_per_block=5))
    blocks, damage = rescued(codec, b"?" * 16 + data[16:])
    assert torch.equal(images_in(blocks), codec.decompress(data))
    assert damage


def test_models_that_cannot_code(monkeypatch):
    model = model_of()
    with pytest.raises(ValueError, match="expected both equal"):
        Codec(model, uniform_of(model_of(quantizer=QUANTIZERS["two codes"])))
    with pytest.raises(ValueError, match="real vectors"):
        Codec(GaussianVAE(image_size=8, width=8), uniform_of(model))
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ValueError, match=r"vqvae-priors\[codec\]"):
        Codec(model, uniform_of(model))


def test_what_makes_no_block(plain):
    codec, y = plain
    with pytest.raises(ValueError, match="images_per_block=0"):
        Compression(images_per_block=0)
    for given in ({"labels": torch.zeros(7).long()}, {"labels": torch.zeros(5).long()}, {"names": ["a"] * 7}):
        with pytest.raises(ValueError, match=r"for 6 images"):
            list(codec.blocks(y, options=Compression(images_per_block=2), **given))
    with pytest.raises(ValueError, match="tiles"):  # that no reader would take
        codec.compress([torch.zeros(1, 1, 1, dtype=torch.uint8).expand(1, 9000, 9000)])
