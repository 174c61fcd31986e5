"""Streams that end before their images do: refused soon, and every stream that a writer makes is read."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from codec_worlds import (
    claiming,
    contents_of,
    images_of,
    model_of,
    model_with_posterior,
    rescued,
    transformer_of,
    uniform_of,
)

from priors import UnigramPrior
from vqvae.codec import Codec, Compression, DamagedFile, Mode
from vqvae.codec.bits_back import BitsBack
from vqvae.codec.block import STORED
from vqvae.codec.coder import SLACK, BadStream, RangeReader, RangeWriter, Stack
from vqvae.codec.container import MAX_IMAGES, pack
from vqvae.codec.integer_tables import TOTAL, Intervals

ENDED = "the stream has ended before its images have"


@pytest.fixture(scope="module")
def codec():
    model = model_with_posterior("stochastic")
    return Codec(model, transformer_of(model, num_classes=3))


@pytest.fixture
def coded(codec, monkeypatch):
    """How many tiles' codes are decoded, and how many of their pixels."""
    counts = Counter()
    for name in ("decode_codes", "decode_tiles"):

        def counted(*args, name=name, original=getattr(codec.coder, name)):
            counts[name] += len(args[2])
            return original(*args)

        monkeypatch.setattr(codec.coder, name, counted)
    return counts


def noise_of(*shape):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("has_labels", [False, True])
@pytest.mark.parametrize("stream", [b"", b"\x80" + bytes(11)])
def test_few_bytes_that_claim_many_images(codec, coded, mode, has_labels, stream):
    data = claiming(codec, MAX_IMAGES, stream=stream, mode=mode, has_labels=has_labels)
    assert len(data) < 110
    with pytest.raises(DamagedFile, match=r"block 0: (the stream|got 80 00)"):
        codec.decompress(data)
    # One group, and what 256 bytes and the stream pay for: not 65,535.
    assert coded["decode_codes"] <= 5 * codec.coder.group_size
    blocks, damage = rescued(codec, data)
    assert (blocks, len(damage)) == ([], 1)


@pytest.mark.parametrize("shape", [(1, 8, 65_535), (4, 1000, 1000)])
def test_one_image_that_claims_many_tiles(codec, coded, shape):
    with pytest.raises(DamagedFile, match=ENDED):
        codec.decompress(claiming(codec, 1, shape=shape))
    assert coded["decode_tiles"] <= 2 * codec.coder.group_size


def test_labels_that_claim_more_than_there_is():
    """A table of a label is wide where there are many classes: they are read in parts, which begin as groups do."""
    model = model_of()
    coder = Codec(model, transformer_of(model, num_classes=3)).coder
    coder.prior.num_classes = 100_000
    assert coder.labels_per_part == 10
    with pytest.raises(BadStream, match=ENDED):
        coder.decode_labels(RangeReader(bytes(range(1, 30))), MAX_IMAGES)
    labels = torch.arange(0, 100_000, 1000)
    writer = RangeWriter()
    writer.put(coder.labels_as_intervals(labels))
    assert torch.equal(coder.decode_labels(RangeReader(writer.finish()), 100), labels)


def test_tiles_stored_and_coded_in_one_image():
    model = model_of("colour mixture")
    codec = Codec(model, uniform_of(model))
    image = torch.zeros(3, 20, 27, dtype=torch.uint8)
    parts = images_of(model, 12)
    noise = noise_of(*image.shape)
    for i in range(12):
        place = np.s_[:, i // 4 * 8 : i // 4 * 8 + 8, i % 4 * 8 : i % 4 * 8 + 8]
        part = parts[i].expand(3, -1, -1)[:, : image[place].shape[1], : image[place].shape[2]]
        image[place] = noise[place] if i % 3 == 1 else part
    images = [image, image[:1], noise[:, :9, :9]]
    data = codec.compress(images, options=Compression(verify=False))
    assert {STORED, 0} <= set(contents_of(codec, data)[0].kinds)
    assert all(torch.equal(*pair) for pair in zip(codec.decompress(data), images, strict=True))


def black_codec(certain):
    """Of black images whose codes are 0: the first symbols only, of few bits or of next to none."""
    model = model_of("normal")
    prior = UnigramPrior(num_codes=8, grid=model.grid)
    if certain:
        prior.fit(torch.zeros(1 << 20, *model.grid, dtype=torch.int64))
    with torch.no_grad():
        model.decoder.layers[-1].weight.zero_()
        model.decoder.layers[-1].bias.fill_(-8 if certain else -0.8)
    codec = Codec(model, prior)
    codec.coder.encode = lambda tiles, labels: torch.zeros(len(tiles), *model.grid, dtype=torch.int64)
    return codec


@pytest.mark.parametrize(("mode", "num"), [(Mode.LOSSLESS, 500), (Mode.LOSSY, 2000)])
def test_thousands_of_black_images(mode, num):
    """All their bits are at the lower end. The writer keeps zeros that the message does not need."""
    codec = black_codec(certain=False)
    black = torch.zeros(num, 1, 8, 8, dtype=torch.uint8)
    cost = codec.measure(black[:1])
    bits = float(cost.rate[0] if mode == Mode.LOSSY else cost.total[0])
    assert bits > 10
    data = codec.compress(black, options=Compression(mode=mode, images_per_block=num, verify=False))
    [content] = contents_of(codec, data)
    assert STORED not in content.kinds
    assert content.stream == bytes(len(content.stream))
    # What the rule asks for when the last group begins, and no more.
    paid = (num - 1) // 128 * 128 * bits / 8 - SLACK
    assert paid <= len(content.stream) <= paid * 1.001 + 2
    decoded = codec.decompress(data)
    assert len(decoded) == num
    assert mode == Mode.LOSSY or not decoded.any()
    for length in (0, int(paid) - 8):
        short = dataclasses.replace(content, stream=bytes(length)).pack()
        with pytest.raises(DamagedFile, match=ENDED):
            codec.decompress(pack(codec.header(mode), [(num, short)]))


def test_thousands_of_images_that_are_certain():
    """They cost nothing, so that no zeros are kept and none is missed."""
    codec, black = black_codec(certain=True), torch.zeros(500, 1, 8, 8, dtype=torch.uint8)
    data = codec.compress(black, options=Compression(images_per_block=500, verify=False))
    assert len(data) < 70
    assert len(codec.decompress(data)) == 500


def test_what_the_version_before_wrote_is_read(codec, monkeypatch):
    """Streams without a zero at their end: any block of one group, and ordinary ones of several."""
    y = images_of(model_with_posterior("stochastic"), 40)
    labels = torch.arange(40) % 3
    monkeypatch.setattr(codec.coder, "group_size", 8)
    new = codec.compress(y)
    finish = RangeWriter.finish
    monkeypatch.setattr(RangeWriter, "finish", lambda self: finish(self).rstrip(b"\0"))
    # No zero is added to a message that does not end in thousands of bits of first symbols.
    assert codec.compress(y) == new
    for images, known in ((y, labels), (y * 0, labels * 0), (noise_of(60, 1, 8, 8), torch.zeros(60).long())):
        data = codec.compress(images, known, Compression(verify=False))
        assert torch.equal(codec.decompress(data), images)
    black, dark = torch.zeros(128, 1, 8, 8, dtype=torch.uint8), black_codec(certain=False)
    data = dark.compress(black)
    assert len(data) < 70
    assert torch.equal(dark.decompress(data), black)


@pytest.mark.parametrize(("kind", "num"), [("gumbel", 1), ("stochastic", 8), ("prior in the loop", 30)])
def test_the_bottom_of_a_stack_is_exact(kind, num):
    """A decoder goes down to the words that the encoder did not reach, and no further."""
    model = model_with_posterior(kind)
    codec = Codec(model, transformer_of(model, num_classes=3))
    y, labels = images_of(model, num), torch.arange(num) % 3
    [content] = contents_of(codec, codec.compress(y, labels, Compression(mode=Mode.BITS_BACK)))
    assert STORED not in content.kinds
    back = BitsBack(codec.coder)

    def decode(raised):
        stack = back.open(content.stream)
        stack._bottom += raised
        known = codec.coder.decode_labels(stack, num)
        return back.decode(stack, content.kinds, known)[0]

    assert torch.equal(decode(0), y)
    with pytest.raises(BadStream, match="popped below its bottom"):
        decode(1)


def test_a_stack_is_full_down_to_its_bottom():
    """Where no word is left, the state itself is popped, and then first symbols for ever."""
    widths = torch.full((500, 4), TOTAL // 4)
    words = np.arange(1, 20, dtype=np.uint32)
    stack, plain = Stack(words, bottom=0), Stack(words)
    assert stack.get(widths[: 16 * 17]).tolist() == plain.get(widths[: 16 * 17]).tolist()
    assert plain.get(widths).tolist()[-100:] == [0] * 100
    with pytest.raises(BadStream, match="popped below its bottom"):
        stack.get(widths)
    assert stack.clone()._bottom == 0


def test_an_empty_stream_has_no_bits_for_an_image(codec):
    back = BitsBack(codec.coder)
    assert back.decode(back.open(b""), [STORED], None)[0].shape == (0, 1, 8, 8)
    with pytest.raises(BadStream, match="popped below its bottom"):
        back.decode(back.open(b""), [0], None)


def test_a_stream_that_feeds_itself(codec, coded, monkeypatch):
    """Codes that the posterior finds unlikely give back more bits than they took; that could go on without end."""
    posterior = BitsBack._posterior

    def unlikely(self, *args):
        found, clear = posterior(self, *args)
        return Intervals(torch.zeros_like(found.left), torch.full_like(found.width, 2)), clear

    y = images_of(model_with_posterior("stochastic"), 60)
    data = codec.compress(y, options=Compression(mode=Mode.BITS_BACK, images_per_block=60))
    monkeypatch.setattr(BitsBack, "_posterior", unlikely)
    black = torch.zeros(8, 1, 8, 8, dtype=torch.uint8)
    monkeypatch.setattr(codec.coder, "decode_tiles", lambda sources, codes, offsets: black[: len(codes)])
    coded.clear()
    with pytest.raises(DamagedFile, match="gives back more bits"):
        codec.decompress(data)
    assert coded["decode_codes"] <= 8
