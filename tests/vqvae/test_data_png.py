"""A PNG is held against its own checksums."""

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import chw, encoded, noise, save
from PIL import Image

from vqvae.cli.reading import read_exactly
from vqvae.data import load_images
from vqvae.data.decoding import read
from vqvae.data.png import damage


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(read(io.BytesIO(data)))


def test_a_damaged_png_is_named_and_skipped(tmp_path: Path):
    pixels = noise(32, 32)
    good = encoded(pixels, compress_level=0)
    assert damage(good) == ""
    assert damage(good[:-13]) == "the PNG is truncated: its chunk at byte 33 lacks 1 bytes"
    assert "lacks 4,294," in damage(good[:33] + (2**32 - 1).to_bytes(4) + good[37:])
    for name in ("train/bad", "train/good", "test/0"):
        save(tmp_path / f"{name}.png", pixels)
    # A pixel that is stored as it is: without its checksum the file would be another picture.
    (tmp_path / "train" / "bad.png").write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    batch = load_images(tmp_path, size=32)[:]
    assert batch.images.equal(chw(pixels)[None])
    assert batch.skipped == (("bad.png", "the PNG is damaged: the checksum of its chunk at byte 33 does not fit"),)
    with pytest.raises(ValueError, match="the PNG is damaged"):
        read_exactly(tmp_path / "train" / "bad.png")


@pytest.mark.parametrize("options", [{"compress_level": 0}, {}, {"exif": b"Exif\0\0x"}])
def test_every_bit_of_a_png_counts(options: dict):
    good = encoded(np.arange(6, dtype=np.uint8).reshape(2, 3), **options)
    for at in range(8, len(good)):
        for bit in range(8):
            with pytest.raises(ValueError, match=r"."):
                pixels_of(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])


def test_an_animation_is_checked_in_all_its_frames(tmp_path: Path):
    path = tmp_path / "a.png"
    frames = [Image.fromarray(noise(4, 4)) for _ in range(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert np.array_equal(np.asarray(read(path)), np.asarray(frames[0]))
    data = bytearray(path.read_bytes())
    data[data.rindex(b"fdAT") + 10] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="the PNG is damaged"):
        read(path)


def test_what_follows_the_end_is_no_part_of_it(tmp_path: Path):
    pixels, path = noise(5, 6, 3), tmp_path / "a.png"
    chunk = (3).to_bytes(4) + b"tEXt" + b"a\0b" + (zlib.crc32(b"tEXta\0b") ^ 1).to_bytes(4)
    for after in (b"", b"\0" * 20, b"junk", chunk):
        path.write_bytes(encoded(pixels) + after)
        assert torch.equal(read_exactly(path), chw(pixels))
        assert np.array_equal(np.asarray(read(path)), pixels)


def test_a_png_is_read_without_its_end_and_refused_without_its_pixels():
    pixels = noise(5, 6, 3)
    data = encoded(pixels)
    end = data.index(b"IEND") - 4
    for cut in range(end, len(data)):
        assert np.array_equal(pixels_of(data[:cut]), pixels)
    for cut in range(9, end):
        with pytest.raises(ValueError, match=r"."):
            pixels_of(data[:cut])


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
def test_other_formats_are_read_as_they_were(kind: str):
    data = encoded(noise(16, 16, 3), kind)
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(pixels_of(data), np.asarray(image.convert("RGB")))
