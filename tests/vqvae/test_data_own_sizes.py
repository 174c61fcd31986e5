"""Images as large as they are, those of equal size together."""

import numpy as np
import pytest
import torch
from image_files import noise, save
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from vqvae.data import ImageTensors, load_images
from vqvae.data.decoding import read, size_of
from vqvae.data.own_sizes import by_size

SIZES = [(9, 12), (9, 12), (12, 9), (16, 16), (10, 11), (1, 40)]


@pytest.fixture
def folder(tmp_path):
    for number, size in enumerate(SIZES):
        kind = ("cat", "dog")[number % 2]
        save(tmp_path / "train" / kind / f"{number}.png", noise(*size))
        save(tmp_path / "test" / kind / f"{number}.png", noise(8, 8))
    return tmp_path


def test_images_of_one_padded_size_are_a_set(folder):
    images = load_images(folder, "train", channels=3)
    watched = []
    found = by_size(images, multiple=4, watch=lambda: watched.append(1))
    assert len(watched) == len(images) == 6
    assert {size: len(some) for size, some in found.sets.items()} == {(4, 40): 1, (12, 12): 4, (16, 16): 1}
    some = found.sets[12, 12]
    assert (some.shape, some.split, some.class_names) == ((3, 12, 12), "train", ("cat", "dog"))
    names = [some.key(index).rpartition("/")[2] for index in range(4)]
    assert sorted(names) == ["0.png", "1.png", "2.png", "4.png"]
    for index, name in enumerate(names):
        height, width = SIZES[int(name[0])]
        image, label = some[index]
        assert label == int(name[0]) % 2
        path = next(folder.glob(f"train/*/{name}"))
        pixels = np.asarray(Image.open(path).convert("RGB"))
        expected = np.pad(pixels, ((0, 12 - height), (0, 12 - width), (0, 0)), mode="edge")
        assert torch.equal(image, torch.from_numpy(expected).permute(2, 0, 1))
    assert some.digest(range(4)) != some.digest(range(3))


def test_greys_and_sets_in_memory():
    grey = ImageTensors(torch.arange(60, dtype=torch.uint8).view(2, 1, 5, 6), torch.tensor([0, 1]), name="grey")
    found = by_size(grey, multiple=4)
    assert list(found.sets) == [(8, 8)]
    some = found.sets[8, 8]
    assert torch.equal(some[:].images[..., :5, :6], grey.images)
    assert torch.equal(some[:].images[..., 5:, :6], grey.images[..., 4:, :].expand(-1, -1, 3, -1))
    assert torch.equal(some.labels, grey.labels)


def test_what_is_no_image_is_named_and_what_changed_is_skipped(folder):
    (folder / "train" / "cat" / "broken.png").write_bytes(b"no image")
    found = by_size(load_images(folder, "train", channels=1), multiple=4)
    assert [key.rpartition("/")[2] for key, _ in found.unusable] == ["broken.png"]
    some = found.sets[12, 12]
    first = next(folder.glob(f"train/*/{some.key(0).rpartition('/')[2]}"))
    save(first, noise(20, 20))
    assert [why for _, why in some[:].skipped] == ["it has 20x20 pixels now, and had others when it was looked at"]
    first.unlink()
    with pytest.raises(OSError, match="No such file") as caught:
        some.read(range(4))
    assert caught.value.filename == some.key(0)


def test_a_turned_photograph_has_its_upright_size(tmp_path):
    image = Image.fromarray(np.zeros((8, 20, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6
    (tmp_path / "train").mkdir()
    image.save(tmp_path / "train" / "turned.jpg", exif=exif)
    found = by_size(load_images(tmp_path, "train"))
    assert list(found.sets) == [(20, 8)]
    assert found.sets[20, 8][0][0].shape == (3, 20, 8)


@pytest.mark.parametrize("kind", ["TIFF", "PNG", "WEBP", "JPEG"])
def test_the_size_by_the_header_is_that_of_the_upright_picture(tmp_path, kind):
    image = Image.fromarray(noise(8, 20, 3))
    exif = image.getexif()
    exif[0x0112] = 6
    path = tmp_path / f"turned.{kind.lower()}"
    image.save(path, kind, exif=exif)
    picture = read(path)
    assert (picture.height, picture.width) == (20, 8)
    assert size_of(path) == (20, 8)


def test_the_size_of_a_png_that_says_so_in_xmp(tmp_path):
    info = PngInfo()
    info.add_itxt(
        "XML:com.adobe.xmp", '<x:xmpmeta xmlns:x="adobe:ns:meta/"><tiff:Orientation>6</tiff:Orientation></x:xmpmeta>'
    )
    path = tmp_path / "turned.png"
    Image.fromarray(noise(8, 20, 3)).save(path, pnginfo=info)
    picture = read(path)
    assert size_of(path) == (picture.height, picture.width)


@pytest.mark.parametrize("late", [False, True])
def test_a_png_is_upright_wherever_it_says_so(tmp_path, late):
    """Its Exif may lie before its pixels or after them, where Pillow's header does not see it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((8, 12, 3), np.uint8)).save(tmp_path / "a.png", exif=exif)
    data = (tmp_path / "a.png").read_bytes()
    at = data.index(b"eXIf") - 4
    size = 12 + int.from_bytes(data[at : at + 4])
    end = data.index(b"IEND") - 4
    moved = data[:at] + data[at + size : end] + data[at : at + size] + data[end:]
    (tmp_path / "a.png").write_bytes(moved if late else data)
    assert size_of(tmp_path / "a.png") == (12, 8)
    found = by_size(load_images(tmp_path, size=8, channels=3))
    assert list(found.sets) == [(12, 8)]
    assert found.sets[12, 8][:1].images.shape == (1, 3, 12, 8)
