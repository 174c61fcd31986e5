"""A folder of images: how files are decoded, what happens to broken ones, and which are held out."""

import errno
import io
import os
from pathlib import Path

import numpy as np
import pytest
from image_files import both, chw, encoded, noise, save
from PIL import Image

from vqvae.data import load_images
from vqvae.data.decoding import read
from vqvae.data.folder import held_out

RED, WHITE = (255, 0, 0), (255, 255, 255)


def test_folder_keeps_the_levels_of_images_of_the_right_size(tmp_path: Path):
    pixels = {name: noise(8, 8, 3) for name in ("ant/0.png", "ant/deep/1.PNG", "bee/2.webp", "bee/3.bmp")}
    for name, each in pixels.items():
        save(tmp_path / name, each, **({"lossless": True} if name.endswith("webp") else {}))
    (tmp_path / "ant" / ".hidden.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("not named like an image")
    found = {}
    for images in both(tmp_path, size=8):
        assert (images.shape, images.num_classes, images.class_names) == ((3, 8, 8), 2, ("ant", "bee"))
        assert len(images) >= 1
        found |= {images[i][0].numpy().tobytes(): images[i][1] for i in range(len(images))}
    assert found == {chw(each).numpy().tobytes(): int("bee" in name) for name, each in pixels.items()}


def transparent(mode: str) -> Image.Image:
    image = Image.new("RGBA", (3, 3), (*RED, 0))
    image.putpixel((1, 1), (*RED, 255))
    image.putpixel((2, 1), (*RED, 128))
    return image.convert(mode)


def palette(transparency: bytes | int | None) -> Image.Image:
    image = Image.new("P", (3, 3), 0)
    image.putpalette([*RED, 0, 0, 255])
    image.putpixel((1, 1), 1)
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


LEVELS_16 = np.array([[0, 257, 65535], [128, 129, 32896], [1000, 50000, 65407]], np.uint16)
ROUNDED_16 = [[0, 1, 255], [0, 1, 128], [4, 195, 255]]
RED_WITH_BLUE = [[RED] * 3, [RED, (0, 0, 255), RED], [RED] * 3]
ON_WHITE = [[WHITE] * 3, [WHITE, RED, (255, 127, 127)], [WHITE] * 3]
GREY_ON_WHITE = [[255] * 3, [255, 76, 165], [255] * 3]


@pytest.mark.parametrize(
    ("suffix", "image", "expected"),
    [
        (".png", Image.fromarray(np.diag([1, 2, 3]).astype(np.uint8)), np.diag([1, 2, 3])),
        (".png", Image.fromarray(np.eye(3, dtype=bool)), 255 * np.eye(3)),
        (".png", Image.fromarray(LEVELS_16), ROUNDED_16),
        (".tif", Image.fromarray(LEVELS_16.astype(np.int32)), ROUNDED_16),
        (".png", transparent("RGBA"), ON_WHITE),
        (".webp", transparent("RGBA"), ON_WHITE),
        (".png", transparent("LA"), GREY_ON_WHITE),
        (".png", palette(None), RED_WITH_BLUE),
        (".png", palette(0), [[WHITE] * 3, [WHITE, (0, 0, 255), WHITE], [WHITE] * 3]),
        (".png", palette(b"\xff\x00"), [[RED] * 3, [RED, WHITE, RED], [RED] * 3]),
        (".gif", palette(None), RED_WITH_BLUE),
        (".tif", Image.new("CMYK", (3, 3), (0, 255, 255, 0)), [[RED] * 3] * 3),
    ],
)
def test_every_pixel_becomes_eight_bit_grey_or_rgb(tmp_path: Path, suffix: str, image: Image.Image, expected: list):
    image.save(tmp_path / f"0{suffix}", **({"lossless": True, "exact": True} if suffix == ".webp" else {}))
    pixels = np.array(expected, np.uint8)
    images = load_images(tmp_path, size=3)
    assert images.num_classes is None
    assert images.shape == (1 if pixels.ndim == 2 else 3, 3, 3)
    assert images[0][0].equal(chw(pixels))
    assert len(images[0]) == 1


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_are_converted_as_asked(tmp_path: Path, channels: int):
    colour, grey = noise(4, 4, 3), noise(4, 4)
    save(tmp_path / "train" / "0.png", colour)
    save(tmp_path / "train" / "1.png", grey)
    save(tmp_path / "test" / "0.png", grey)
    images = load_images(tmp_path, size=4, channels=channels)[:].images
    as_grey = np.round(colour @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)
    wanted = [colour, np.stack([grey] * 3, -1)] if channels == 3 else [as_grey, grey]
    assert images.shape == (2, channels, 4, 4)
    for image, want in zip(images, wanted, strict=True):
        assert (image.int() - chw(want).int()).abs().max() <= (channels == 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path: Path, orientation: int):
    upright = np.zeros((16, 16), np.uint8)
    upright[:8, :8], upright[:8, 8:], upright[8:, :8] = 250, 160, 80
    # What the tag says: where the picture's row 0 and column 0 lie.
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T,
        6: np.rot90(upright), 7: upright[::-1, ::-1].T, 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / "a.jpg", np.ascontiguousarray(stored), exif=exif, quality=95)
    image = load_images(tmp_path, size=16)[0][0][0].numpy().astype(int)
    assert np.abs(image - upright).max() <= 8


def test_damaged_exif_does_not_spoil_sound_pixels(tmp_path: Path):
    pixels = noise(4, 4, 3)
    save(tmp_path / "a.png", pixels, exif=b"Exif\0\0no such thing")
    assert load_images(tmp_path, size=4)[0][0].equal(chw(pixels))


def test_the_short_side_is_scaled_and_the_centre_cropped(tmp_path: Path):
    pixels = noise(20, 44, 3)
    save(tmp_path / "wide.png", pixels)
    expected = Image.fromarray(pixels).resize((22, 10), Image.Resampling.BICUBIC).crop((6, 0, 16, 10))
    assert load_images(tmp_path, size=10)[0][0].equal(chw(np.asarray(expected)))
    assert load_images(tmp_path)[0][0].shape == (3, 64, 64)


def test_a_large_jpeg_is_read_reduced_and_looks_the_same(tmp_path: Path):
    smooth = Image.fromarray(noise(6, 8, 3)).resize((800, 600), Image.Resampling.BICUBIC)
    path = save(tmp_path / "a.jpg", np.asarray(smooth), quality=95)
    assert read(path).size == (800, 600)
    assert read(path, cover=60).size == (200, 150)
    assert read(path, cover=300).size == (800, 600)
    expected = smooth.resize((32, 32), Image.Resampling.BICUBIC, box=(100, 0, 700, 600))
    image = load_images(tmp_path, size=32)[0][0]
    assert (image.int() - chw(np.asarray(expected)).int()).abs().float().mean() < 1.5


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n"
BROKEN: dict[str, tuple[bytes | None, str]] = {
    "truncated": (encoded(noise(64, 64, 3))[:6000], "truncated"),
    "empty": (b"", "the file is empty"),
    "text": (b"no image", "not an image in a known format"),
    "postscript": (EPS, "not an image in a known format"),  # which Pillow would hand to an outside program
    "dangling": (None, "No such file or directory"),
    "floats": (encoded(np.ones((4, 4), np.float32), "TIFF"), "floats"),
    "wide": (encoded(np.full((4, 4), 70_000, np.int32), "TIFF"), "32 bits"),
    "huge": (encoded(noise(80, 80)), "decompression bomb"),
}


def test_broken_files_are_named_and_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)
    for number in range(6):
        save(tmp_path / "train" / f"good{number}.png", noise(8, 8, 3))
    for name, (data, _) in BROKEN.items():
        path = tmp_path / "train" / f"{name}.png"
        path.symlink_to("nowhere.png") if data is None else path.write_bytes(data)
    save(tmp_path / "test" / "good.png", noise(8, 8, 3))
    images = load_images(tmp_path, size=8)
    batch = images.__getitems__(range(6 + len(BROKEN)))
    assert batch.images.shape == (6, 3, 8, 8)
    reasons = dict(batch.skipped)
    assert set(reasons) == {f"{name}.png" for name in BROKEN}
    for name, (_, reason) in BROKEN.items():
        assert reason in reasons[f"{name}.png"]
        assert "\n" not in reasons[f"{name}.png"]
    assert images.key(0) == "dangling.png"
    with pytest.raises(ValueError, match=r"dangling.png can't be read as an image: No such file"):
        images[0]
    with pytest.raises(IndexError):
        images[len(images)]


@pytest.mark.parametrize("suffix", ["png", "jpeg", "webp", "gif", "bmp", "tiff", "ppm", "avif"])
def test_a_disk_that_fails_is_no_fault_of_the_image(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = save(tmp_path / f"image.{suffix}", noise(64, 64, 3))
    data = path.read_bytes()
    assert read(path).size == (64, 64)
    whole, half = os.stat(path), data[: len(data) // 2]
    path.write_bytes(half)
    with pytest.raises(ValueError, match=r"."):
        read(path)
    # The file only seems to end there, as on a disk that fails silently.
    monkeypatch.setattr("vqvae.data.files.check_regular", lambda path: whole)
    with pytest.raises(OSError, match="could be read") as caught:
        read(path)
    assert caught.value.errno == errno.EIO


def test_a_disk_that_says_so_is_an_error_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    path = save(tmp_path / "0.png", noise(4, 4))
    monkeypatch.setattr(Path, "open", lambda self, *args, **options: Failing())
    with pytest.raises(OSError, match="Input/output error"):
        read(path)


def test_labels_stay_with_their_images_where_one_is_skipped(tmp_path: Path):
    for name in ("train/cat/0", "train/cat/1", "train/dog/2", "val/dog/3", "val/emu/4"):
        save(tmp_path / f"{name}.png", noise(4, 4))
    (tmp_path / "train" / "cat" / "1.png").write_bytes(b"")
    train, test = both(tmp_path, size=4)
    assert train.class_names == test.class_names == ("cat", "dog", "emu")
    assert test[:].labels.tolist() == [1, 2]
    batch = train.__getitems__([2, 1, 0])
    assert batch.labels.tolist() == [1, 0]
    assert batch.skipped == (("cat/1.png", "the file is empty"),)


def test_the_training_images_decide_on_the_channels_of_both_splits(tmp_path: Path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "0.png").write_bytes(b"")
    save(tmp_path / "train" / "1.png", noise(4, 4))
    save(tmp_path / "test" / "0.png", noise(4, 4, 3))
    assert [images.shape for images in both(tmp_path, size=4)] == [(1, 4, 4)] * 2


def test_about_one_in_ten_is_held_out_by_its_name_alone():
    keys = [f"{number}.png".encode() for number in range(5000)]
    held = held_out(keys)
    assert 430 < held.sum() < 570
    assert (held_out(keys[::2]) == held[::2]).all()
    assert all(0 < held_out(keys[at : at + num]).sum() < num for num in range(2, 12) for at in range(0, 100, 10))
    assert not any(held_out([key]).any() for key in keys[:50])
