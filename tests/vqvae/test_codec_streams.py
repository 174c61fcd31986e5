"""Streams that end before their images do: refused soon, and every stream that a writer makes is read."""

import dataclasses
import hashlib
import math

import numpy as np
import pytest
import torch
from codec_worlds import POSTERIORS, claiming, images_of, model_of, rescued, transformer_of, uniform_of
from hypothesis import given, settings
from hypothesis import strategies as st

from priors import UnigramPrior
from vqvae.codec import Archive, Codec, CompressedImages, Compression, DamagedFile, Mode
from vqvae.codec.bits_back import BitsBack
from vqvae.codec.block import STORED, BlockContent
from vqvae.codec.coder import SLACK, BadStream, RangeReader, RangeWriter, Stack
from vqvae.codec.container import MAX_IMAGES, pack
from vqvae.codec.integer_tables import TOTAL, Intervals

# Of the message below, by the writer before the rule: its length, and the beginning of its SHA-256.
FIXED = (119, "32cbe4b1f1652887")
ENDED = "the stream has ended before its images have"


@pytest.fixture(scope="module")
def codec():
    quantizer, _ = POSTERIORS["stochastic"]
    model = model_of(quantizer=quantizer)
    return Codec(model, transformer_of(model, num_classes=3))


@pytest.fixture
def coded(codec, monkeypatch):
    """How many tiles' codes are decoded, and how many of their pixels."""
    counts = {"codes": 0, "tiles": 0}
    decode_codes, decode_tiles = codec.coder.decode_codes, codec.coder.decode_tiles

    def codes(sources, labels, offsets):
        counts["codes"] += len(offsets)
        return decode_codes(sources, labels, offsets)

    def tiles(sources, codes, offsets):
        counts["tiles"] += len(offsets)
        return decode_tiles(sources, codes, offsets)

    monkeypatch.setattr(codec.coder, "decode_codes", codes)
    monkeypatch.setattr(codec.coder, "decode_tiles", tiles)
    return counts


@pytest.fixture
def stripped(monkeypatch):
    """A writer as it was before the rule: it leaves out all zeros at the end."""
    finish = RangeWriter.finish
    monkeypatch.setattr(RangeWriter, "finish", lambda self: finish(self).rstrip(b"\0"))


def contents_of(codec, data):
    channels = codec.coder.num_channels
    with Archive.from_bytes(data) as archive:
        return [BlockContent.unpack(archive.content(i), channels, codec.coder.size) for i in range(len(archive.blocks))]


# ---- hostile streams


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("has_labels", [False, True])
@pytest.mark.parametrize("stream", [b"", b"\x80" + bytes(11), bytes(range(1, 40))])
def test_case_16_few_bytes_that_claim_many_images(codec, coded, mode, has_labels, stream):
    data = claiming(codec, MAX_IMAGES, stream=stream, mode=mode, has_labels=has_labels)
    assert len(data) < 110
    with pytest.raises(DamagedFile, match=r"block 0: (the stream|got 80 00)"):
        codec.decompress(data)
    # One group, and what 256 bytes and the stream pay for: not 65,535.
    assert coded["codes"] <= 5 * codec.coder.group_size
    blocks, damage = rescued(codec, data)
    assert (blocks, len(damage)) == ([], 1)


@pytest.mark.parametrize("shape", [(1, 8, 65_535), (4, 1000, 1000)])
def test_case_16_one_image_that_claims_many_tiles(codec, coded, shape):
    with pytest.raises(DamagedFile, match=ENDED):
        codec.decompress(claiming(codec, 1, shape=shape))
    assert coded["tiles"] <= 2 * codec.coder.group_size


def test_case_16_a_dataset_of_claims(codec, coded, tmp_path):
    (tmp_path / "x.vq").write_bytes(claiming(codec, MAX_IMAGES, num_blocks=3))
    dataset = CompressedImages(tmp_path / "x.vq", codec)
    assert len(dataset) == 3 * MAX_IMAGES
    with pytest.raises(DamagedFile, match=f"block 2: {ENDED}"):
        dataset[-1]
    assert coded["tiles"] <= 2 * codec.coder.group_size


def test_case_16_a_lost_mode_is_looked_for_no_longer(codec, coded):
    data = claiming(codec, MAX_IMAGES)
    blocks, damage = rescued(codec, b"?" * 16 + data[16:])
    assert blocks == []
    assert len(damage) == 2
    assert coded["codes"] <= 10 * codec.coder.group_size


def test_case_16_labels_that_claim_more_than_there_is():
    """A table of a label is wide where there are many classes: they are read in parts, which begin as groups do."""
    model = model_of()
    prior = transformer_of(model, num_classes=3)
    codec = Codec(model, prior)
    codec.coder.prior.num_classes = 100_000
    assert codec.coder.labels_per_part == 10
    reader = RangeReader(bytes(range(1, 30)))
    asked = []
    get = reader.get
    reader.get = lambda widths: (asked.append(len(widths)), get(widths))[1]
    with pytest.raises(BadStream, match=ENDED):
        codec.coder.decode_labels(reader, MAX_IMAGES)
    assert max(asked) == 10
    assert sum(asked) * math.log2(100_000) <= 8 * (29 + SLACK) + 200
    labels = torch.arange(0, 100_000, 1000)
    writer = codec._writer(codec.coder.labels_as_intervals(labels))
    assert torch.equal(codec.coder.decode_labels(RangeReader(writer.finish()), 100), labels)


def test_stored_pixels_take_no_more_than_their_own_memory(codec, coded, monkeypatch):
    """A pixel that is stored is not padded to a tile; and nothing walks where all is stored."""
    noise = torch.randint(0, 256, (1, 1, 60), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images = [noise[..., i : i + 1] for i in range(60)] + [noise, noise.view(1, 60, 1)]
    labels = torch.arange(62) % 3
    data = codec.compress(images, labels, Compression(images_per_block=400, verify=False))
    [content] = contents_of(codec, data)
    assert set(content.kinds) == {STORED}
    coded.update(codes=0)
    sizes, zeros = [], torch.zeros

    def noted(*args, **options):
        sizes.append(zeros(*args, **options).numel())
        return zeros(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", noted)
        [decoded] = codec.decode(Archive.from_bytes(data))
    assert coded["codes"] == 0
    assert max(sizes) <= 62
    assert all(torch.equal(*pair) for pair in zip(decoded.images, images, strict=True))
    assert torch.equal(decoded.labels, labels)


@pytest.mark.parametrize("channels", [1, 3])
def test_tiles_stored_and_coded_in_one_image(channels):
    model = model_of("mixture" if channels == 1 else "colour mixture")
    codec = Codec(model, uniform_of(model))
    image = torch.zeros(3, 20, 27, dtype=torch.uint8)
    parts = images_of(model, 12)
    noise = torch.randint(0, 256, image.shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for i in range(12):
        place = np.s_[:, i // 4 * 8 : i // 4 * 8 + 8, i % 4 * 8 : i % 4 * 8 + 8]
        part = parts[i].expand(3, -1, -1)[:, : image[place].shape[1], : image[place].shape[2]]
        image[place] = noise[place] if i % 3 == 1 else part
    images = [image, image[:1], noise[:, :9, :9]]
    data = codec.compress(images, options=Compression(verify=False))
    kinds = contents_of(codec, data)[0].kinds
    assert STORED in kinds
    assert 0 in kinds
    assert all(torch.equal(*pair) for pair in zip(codec.decompress(data), images, strict=True))


# ---- every stream of a writer is read


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


def with_stream(codec, mode, content, stream):
    content = dataclasses.replace(content, stream=stream)
    return pack(codec.header(mode), [(len(content.tilings), content.pack())])


THOUSANDS = [(Mode.LOSSLESS, 500), (Mode.LOSSY, 2000), pytest.param(Mode.LOSSLESS, 9000, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("mode", "num"), THOUSANDS)
def test_case_16_thousands_of_black_images(mode, num):
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
    [decoded] = codec.decode(Archive.from_bytes(data))
    assert len(decoded.images) == num
    assert mode == Mode.LOSSY or not torch.stack(decoded.images).any()
    for length in (0, int(paid) - 8):
        with pytest.raises(DamagedFile, match=ENDED):
            codec.decompress(with_stream(codec, mode, content, bytes(length)))


@pytest.mark.parametrize(("mode", "num"), THOUSANDS)
def test_case_16_thousands_of_images_that_are_certain(mode, num):
    """They cost nothing, so that no zeros are kept and none is missed."""
    codec = black_codec(certain=True)
    black = torch.zeros(num, 1, 8, 8, dtype=torch.uint8)
    data = codec.compress(black, options=Compression(mode=mode, images_per_block=num, verify=False))
    assert len(data) < 70
    [decoded] = codec.decode(Archive.from_bytes(data))
    assert len(decoded.images) == num


@pytest.mark.usefixtures("stripped")
def test_case_16_what_the_version_before_wrote_is_read(codec, monkeypatch):
    """Streams without a zero at their end: any block of one group, and ordinary ones of several."""
    y = images_of(model_of(quantizer=POSTERIORS["stochastic"][0]), 40)
    labels = torch.arange(40) % 3
    black, dark = torch.zeros(128, 1, 8, 8, dtype=torch.uint8), black_codec(certain=False)
    assert len(dark.compress(black, options=Compression(images_per_block=128))) < 70
    assert not torch.equal(dark.decompress(dark.compress(black, options=Compression(images_per_block=128))), black + 1)
    monkeypatch.setattr(codec.coder, "group_size", 8)
    noise = torch.randint(0, 256, (60, 1, 8, 8), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    for images, known in ((y, None), (y, labels), (y * 0, labels * 0), (noise, torch.zeros(60).long())):
        data = codec.compress(images, known, Compression(verify=False))
        assert torch.equal(codec.decompress(data), images)


def test_case_16_ordinary_files_are_what_they_were(codec, monkeypatch):
    """No zero is added to a message that does not end in thousands of bits of first symbols."""
    y, finish = images_of(model_of(quantizer=POSTERIORS["stochastic"][0]), 40), RangeWriter.finish
    monkeypatch.setattr(codec.coder, "group_size", 8)
    new = [codec.compress(y, options=Compression(mode=mode)) for mode in (Mode.LOSSLESS, Mode.LOSSY)]
    monkeypatch.setattr(RangeWriter, "finish", lambda self: finish(self).rstrip(b"\0"))
    assert [codec.compress(y, options=Compression(mode=mode)) for mode in (Mode.LOSSLESS, Mode.LOSSY)] == new


def fixed_message():
    """Parts of 50 symbols each, by integers that are the same everywhere."""
    parts = []
    for part in range(6):
        weights = torch.arange(1, 8)[None] * (torch.arange(50)[:, None] * 7 + part + 1) % 97 + 1
        widths = weights * (TOTAL // weights.sum(1, keepdim=True))
        widths[:, 0] += TOTAL - widths.sum(1)
        parts.append((widths, (torch.arange(50) * 31 + part * 5) % 7))
    return parts


def written(parts):
    writer = RangeWriter()
    for widths, symbols in parts:
        width = widths.gather(1, symbols[:, None])[:, 0]
        writer.put(Intervals(widths.cumsum(1).gather(1, symbols[:, None])[:, 0] - width, width))
    return writer.finish()


def read(data, parts):
    reader, found = RangeReader(data), []
    for widths, _ in parts:
        reader.begin()
        found.append(reader.get(widths).tolist())
    return found


def test_case_16_the_bytes_of_a_message_are_those_of_the_version_before():
    data = written(fixed_message())
    assert (len(data), hashlib.sha256(data).hexdigest()[:16]) == FIXED
    assert read(data, fixed_message()) == [symbols.tolist() for _, symbols in fixed_message()]


def a_part(num, num_symbols, likely, which):
    """Symbols of which each is the first, the middle or the last, at odds of `likely` of the total in 2^24."""
    symbol = {"first": 0, "middle": num_symbols // 2, "last": num_symbols - 1}[which]
    widths = torch.full((num, num_symbols), (TOTAL - likely) // (num_symbols - 1), dtype=torch.int64)
    widths[:, symbol] += TOTAL - widths.sum(1)
    return widths, torch.full((num,), symbol)


some_parts = st.lists(
    st.tuples(
        st.integers(1, 400),
        st.sampled_from([3, 5, 16]),
        st.sampled_from([1, 1 << 12, 1 << 22, 1 << 23, TOTAL - (1 << 16), TOTAL - 64]),
        st.sampled_from(["first", "first", "middle", "last"]),
    ),
    max_size=12,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(some_parts)
def test_case_16_whatever_is_written_is_read(some):
    """At the ends of all intervals, and in their middles, where a short number can lie as well."""
    parts = [a_part(*each) for each in some]
    data = written(parts)
    assert read(data, parts) == [symbols.tolist() for _, symbols in parts]
    bits = [float(-(widths.gather(1, symbols[:, None]) / TOTAL).log2().sum()) for widths, symbols in parts]
    stripped = data.rstrip(b"\0")
    if len(data) > len(stripped):
        assert len(data) <= sum(bits[:-1]) / 8 - SLACK + 2 + 1e-3 * sum(num for num, *_ in some)
    if sum(bits[:-1]) > 8 * (len(stripped) + SLACK) + 8:
        with pytest.raises(BadStream, match=ENDED):
            read(stripped, parts)


# ---- bits back


@pytest.mark.parametrize("kind", POSTERIORS)
@pytest.mark.parametrize("num", [1, 8, 30])
def test_case_16_the_bottom_of_a_stack_is_exact(kind, num):
    """A decoder goes down to the words that the encoder did not reach, and no further."""
    quantizer, beta = POSTERIORS[kind]
    model = model_of(quantizer=quantizer, beta=beta)
    if beta is not None:
        model.quantizer.error.fill_(1.0)
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


def test_case_16_a_stream_that_feeds_itself(codec, coded, monkeypatch):
    """Codes that the posterior finds unlikely give back more bits than they took; that could go on without end."""
    posterior = BitsBack._posterior

    def unlikely(self, *args):
        found, clear = posterior(self, *args)
        return Intervals(torch.zeros_like(found.left), torch.full_like(found.width, 2)), clear

    y = images_of(model_of(quantizer=POSTERIORS["stochastic"][0]), 60)
    [content] = contents_of(codec, codec.compress(y, options=Compression(mode=Mode.BITS_BACK, images_per_block=60)))
    data = with_stream(codec, Mode.BITS_BACK, content, content.stream)
    monkeypatch.setattr(BitsBack, "_posterior", unlikely)
    black = torch.zeros(8, 1, 8, 8, dtype=torch.uint8)
    monkeypatch.setattr(codec.coder, "decode_tiles", lambda sources, codes, offsets: black[: len(codes)])
    coded.update(codes=0)
    with pytest.raises(DamagedFile, match="gives back more bits"):
        codec.decompress(data)
    assert coded["codes"] <= 8
