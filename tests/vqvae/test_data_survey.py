"""What is said of a set at a glance, and which pictures are found in both splits."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import both, noise, save
from PIL import Image
from torchvision.transforms import v2

from vqvae.data import ImageTensors, load_images
from vqvae.data import survey as surveys
from vqvae.data.survey import same_pictures, survey


def scene() -> np.ndarray:
    """A picture of blotches."""
    return np.asarray(Image.fromarray(noise(9, 12, 3)).resize((240, 180), Image.Resampling.BICUBIC))


def test_sizes_and_what_is_no_image_are_told(tmp_path):
    for name, size in (("a", (30, 20)), ("b", (9, 90)), ("c", (40, 50))):
        save(tmp_path / "train" / f"{name}.png", noise(*size, 3))
    (tmp_path / "train" / "broken.png").write_bytes(b"broken")
    (tmp_path / "train" / "gone.png").symlink_to("nowhere")
    save(tmp_path / "test" / "0.png", noise(4, 4, 3))
    found = survey(load_images(tmp_path, size=8))
    assert (found.looked_at, found.smallest, found.largest) == (5, (30, 20), (40, 50))
    assert dict(found.unusable) == {
        "broken.png": "not an image in a known format",
        "gone.png": "No such file or directory",
    }
    images = load_images(tmp_path, size=8)
    assert survey(images, most=2).looked_at == 2
    assert survey(images, seconds=-1.0).looked_at == 1
    memory = survey(ImageTensors(torch.zeros(400, 3, 5, 6, dtype=torch.uint8)))
    assert (memory.looked_at, memory.smallest, memory.largest) == (surveys.MOST, (5, 6), (5, 6))


def test_pixels_are_not_decoded_for_sizes(tmp_path, monkeypatch):
    for split in ("train", "test"):
        save(tmp_path / split / "0.jpg", noise(30, 20, 3))
    images = load_images(tmp_path, size=8)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    assert survey(images).largest == (30, 20)


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Eight pictures to train on, four others to test on, and copies of two training pictures to test on."""
    for number in range(8):
        save(tmp_path / "train" / f"{number}.png", scene())
    for number in range(4):
        save(tmp_path / "test" / f"other{number}.png", scene())
    with Image.open(tmp_path / "train" / "2.png") as two, Image.open(tmp_path / "train" / "5.png") as five:
        two.resize((97, 71), Image.Resampling.LANCZOS).save(tmp_path / "test" / "smaller.png")
        five.save(tmp_path / "test" / "worse.jpg", quality=40)
    return tmp_path


def test_the_same_picture_in_another_size_and_quality_is_found(scenes):
    train, test = both(scenes, size=16)
    assert sorted(same_pictures(train, test)) == [("smaller.png", "2.png"), ("worse.jpg", "5.png")]
    wrapped = (load_images(scenes, split, size=16, transform=v2.Identity()) for split in ("train", "test"))
    assert len(same_pictures(*wrapped)) == 2


def test_flat_and_broken_pictures_are_no_copies_of_each_other(tmp_path):
    for split, level in (("train", 100), ("test", 101)):
        save(tmp_path / split / "flat.png", np.full((50, 50), level, np.uint8))
        save(tmp_path / split / "scene.png", scene())
        (tmp_path / split / "broken.png").write_bytes(b"broken")
    assert same_pictures(*both(tmp_path, size=16)) == []


def test_a_darker_picture_of_the_same_outline_is_another(tmp_path):
    pixels = scene()
    save(tmp_path / "train" / "0.png", pixels)
    save(tmp_path / "test" / "0.png", (0.6 * pixels).astype(np.uint8))
    assert same_pictures(*both(tmp_path, size=16)) == []


def test_sets_in_memory_are_not_looked_at_and_without_the_package_nothing_is_said(scenes, monkeypatch):
    memory = ImageTensors(torch.from_numpy(noise(4, 3, 8, 8)))
    train, test = both(scenes, size=16)
    monkeypatch.setitem(sys.modules, "imagehash", None)
    assert same_pictures(memory, test) == []
    assert same_pictures(train, test) is None


def test_a_glance_is_bounded(scenes):
    train, test = both(scenes, size=16)
    assert len(same_pictures(train, test, seconds=-1.0)) <= 1
    assert same_pictures(train, test, most=0) == []
