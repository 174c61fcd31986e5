"""A PNG is held against its own checksums."""

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import chw, noise, save
from PIL import Image

from vqvae.cli.reading import read_exactly
from vqvae.data import load_images
from vqvae.data.decoding import read
from vqvae.data.png import damage


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def stored(pixels: np.ndarray) -> bytes:
    """A PNG whose pixels lie there as they are, so that any change of them can be read."""
    return encoded(pixels, compress_level=0)


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)


def spoiled(pixels: np.ndarray) -> bytes:
    """A PNG with a bit of its pixels flipped, which Pillow reads with other pixels."""
    good = encoded(pixels)
    for at in range(good.index(b"IDAT") + 10, len(good) - 20):
        data = bytearray(good)
        data[at] ^= 1
        try:
            with Image.open(io.BytesIO(data)) as image:
                if not np.array_equal(np.asarray(image), pixels):
                    return bytes(data)
        except OSError:
            continue
    pytest.fail("Pillow reads no damaged PNG any more")


def test_case_09_a_damaged_idat_is_no_image(tmp_path: Path):
    pixels = noise(32, 32) % 4  # so that it is packed, not stored
    data = spoiled(pixels)
    for name in ("bad", "good"):
        save(tmp_path / "train" / f"{name}.png", pixels)
    (tmp_path / "train" / "bad.png").write_bytes(data)
    save(tmp_path / "test" / "0.png", pixels)
    batch = load_images(tmp_path, size=32).__getitems__([0, 1])
    assert batch.images.equal(chw(pixels)[None])
    ((name, reason),) = batch.skipped
    assert name == "bad.png"
    assert reason == "the PNG is damaged: the checksum of its chunk at byte 33 does not fit"
    with pytest.raises(ValueError, match="the PNG is damaged"):
        read_exactly(tmp_path / "train" / "bad.png")


def test_every_bit_of_a_png_counts(tmp_path: Path):
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    good = stored(pixels)
    for at in range(8, len(good)):
        for bit in range(8):
            data = bytearray(good)
            data[at] ^= 1 << bit
            with pytest.raises(ValueError, match=r"."):
                read(io.BytesIO(bytes(data)))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_damage_never_reads_as_another_picture(data: st.DataObject):
    """Several bytes of a PNG, also of one with more chunks: read as it was, or refused."""
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    options = data.draw(st.sampled_from([{"compress_level": 0}, {}, {"exif": b"Exif\0\0x"}]))
    good = encoded(pixels, **options)
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = np.asarray(read(io.BytesIO(bytes(damaged))))
    except ValueError:
        return
    assert np.array_equal(found, pixels)


def test_an_animation_is_checked_in_all_its_frames(tmp_path: Path):
    frames = [Image.fromarray(noise(4, 4)) for _ in range(3)]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    data = bytearray((tmp_path / "a.png").read_bytes())
    assert np.array_equal(np.asarray(read(tmp_path / "a.png")), np.asarray(frames[0]))
    data[data.rindex(b"fdAT") + 10] ^= 1
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match="the PNG is damaged"):
        read(tmp_path / "a.png")


@pytest.mark.parametrize("after", [b"", b"\0" * 20, b"junk", b"IDAT" * 9, chunk(b"tEXt", b"a\0b")[:-1] + b"!"])
def test_what_follows_the_end_is_no_part_of_it(tmp_path: Path, after: bytes):
    pixels = noise(5, 6, 3)
    path = tmp_path / "a.png"
    path.write_bytes(encoded(pixels) + after)
    assert torch.equal(read_exactly(path), chw(pixels))
    assert np.array_equal(np.asarray(read(path)), pixels)


def test_a_png_is_read_without_its_end_and_refused_without_its_pixels():
    pixels = noise(5, 6, 3)
    data = encoded(pixels)
    end = data.index(b"IEND") - 4
    for cut in range(end, len(data)):
        assert np.array_equal(np.asarray(read(io.BytesIO(data[:cut]))), pixels)
    for cut in range(9, end):
        with pytest.raises(ValueError, match=r"."):
            read(io.BytesIO(data[:cut]))


def test_damage_is_told_of_the_bytes_alone():
    data = encoded(noise(3, 3))
    assert damage(data) == ""
    assert damage(data[:-13]) == "the PNG is truncated: its chunk at byte 33 lacks 1 bytes"
    large = data[:33] + (2**32 - 1).to_bytes(4) + data[37:]
    assert "the PNG is truncated: its chunk at byte 33 lacks 4,294," in damage(large)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
def test_other_formats_are_read_as_they_were(kind: str):
    data = encoded(noise(16, 16, 3), kind)
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(np.asarray(read(io.BytesIO(data))), np.asarray(image.convert("RGB")))
