"""Sets known by name: the embedded one, those that are downloaded, and what is said of what can't be loaded."""

import gzip
import hashlib
import os
import pickle
import struct
from importlib.resources import files
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from image_files import chw, noise, save
from PIL import Image

from vqvae.data import ImageTensors, load_images
from vqvae.data.folder import image_folder

# Beginnings of the SHA-256 of the first images and labels in the published files.
PUBLISHED = {
    "train": (20_000, "58e4771950337033c6f5665c995cab57", "9096aaf5e84faa7a18c04a6f597e5adc"),
    "test": (2_000, "09bbac78738f0229a68f7ca74e62665d", "a86243d2b2400909bc0a82f5fd5c9df8"),
}


@pytest.mark.parametrize("split", PUBLISHED)
def test_embedded_images_are_the_first_of_fashion_mnist(split: str):
    num, images_hash, labels_hash = PUBLISHED[split]
    images = load_images("fashion-mini", split)
    assert isinstance(images, ImageTensors)
    assert (len(images), images.shape, images.num_classes) == (num, (1, 28, 28), 10)
    assert images.class_names[images.labels[0]] == "Ankle boot"
    assert hashlib.sha256(images.images.numpy()).hexdigest().startswith(images_hash)
    assert hashlib.sha256(images.labels.byte().numpy()).hexdigest().startswith(labels_hash)


def test_embedded_files_are_small_and_licensed():
    folder = Path(str(files("vqvae") / "assets"))
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 8_000_000
    assert "Zalando" in (folder / "LICENSE-fashion-mnist").read_text()


# Sets known by name


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize(("place", "suffix"), [("", ".gz"), ("FashionMNIST/raw", "")])
def test_fashion_mnist_from_a_folder_that_holds_it(tmp_path: Path, place: str, suffix: str):
    pixels = {"train": noise(5, 28, 28), "t10k": noise(3, 28, 28)}
    for part, each in pixels.items():
        write_idx(tmp_path / place / f"{part}-images-idx3-ubyte{suffix}", each)
        write_idx(tmp_path / place / f"{part}-labels-idx1-ubyte{suffix}", np.arange(len(each), dtype=np.uint8))
    for split, part in (("train", "train"), ("test", "t10k")):
        images = load_images("fashion-mnist", split, root=tmp_path)
        assert (images.shape, images.num_classes) == ((1, 28, 28), 10)
        assert (images[:].images[:, 0].numpy() == pixels[part]).all()
        assert images.labels.tolist() == list(range(len(pixels[part])))
    larger = load_images("fashion-mnist", "train", size=32, channels=3, root=tmp_path)
    expected = Image.fromarray(pixels["train"][4]).resize((32, 32), Image.Resampling.BICUBIC)
    assert larger[4][0].equal(chw(np.stack([np.asarray(expected)] * 3, -1)))
    assert larger[4][1] == 4


def test_a_damaged_idx_file_is_refused(tmp_path: Path):
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", noise(3, 28, 28))
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", noise(3))
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte.gz can't be read"):
        load_images("fashion-mnist", "test", root=tmp_path)
    path.write_bytes(gzip.compress(b"\0\0\x08\x03" + bytes(40)))
    with pytest.raises(ValueError, match="that are no idx file"):
        load_images("fashion-mnist", "test", root=tmp_path)


def write_cifar(folder: Path) -> dict[str, np.ndarray]:
    """CIFAR-10's python files, of three images each."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = {name: noise(3, 3072) for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]}
    contents = {name: {"data": each, "labels": [0, 1, 2]} for name, each in pixels.items()}
    contents["batches.meta"] = {"label_names": [f"class{number}" for number in range(10)]}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return pixels


@pytest.mark.parametrize("place", ["", "cifar-10-batches-py"])
def test_cifar10_from_a_folder_that_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str):
    # The published files have checksums, which these can't have.
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: Path(path).is_file())
    pixels = write_cifar(tmp_path / place)
    train = load_images("cifar10", "train", root=tmp_path)
    assert (len(train), train.shape, train.num_classes) == (15, (3, 32, 32), 10)
    assert train.class_names == tuple(f"class{number}" for number in range(10))
    assert (train[4][0].numpy().reshape(-1) == pixels["data_batch_2"][1]).all()
    assert train[4][1] == 1
    test = load_images("cifar10", "test", root=tmp_path, size=16, channels=1)
    assert (len(test), test.shape) == (3, (1, 16, 16))


class Danger:
    def __reduce__(self):
        return os.mkdir, ("danger",)


def no_network(*arguments: object, **options: object) -> None:
    raise URLError("no network")


@pytest.mark.parametrize("place", ["", "cifar-10-batches-py"])
def test_pickles_that_are_not_the_published_ones_stay_shut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str):
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    monkeypatch.chdir(tmp_path)
    write_cifar(tmp_path / place)
    (tmp_path / place / "test_batch").write_bytes(pickle.dumps(Danger()))
    with pytest.raises(ValueError, match="CIFAR-10 is not whole in"):
        load_images("cifar10", "test", root=tmp_path)
    assert not (tmp_path / "danger").exists()


@pytest.mark.parametrize(("source", "module"), [("fashion-mnist", "mnist"), ("cifar10", "cifar")])
def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, module: str):
    monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", no_network)
    with pytest.raises(ValueError, match=r"could not be downloaded .*no network.*pass as root a folder") as caught:
        load_images(source, root=tmp_path / "new")
    assert "\n" not in str(caught.value)


# What cannot be loaded


@pytest.mark.parametrize(
    ("files", "arguments", "message"),
    [
        ([], {"source": "missing"}, 'not exist; expected "fashion-mini", "fashion-mnist", "cifar10", "hf:OWNER/NAME"'),
        ([], {"source": "fashion-mini", "split": "valid"}, "got split='valid'; expected one of 'train', 'test'"),
        ([], {"source": "fashion-mini", "root": "data"}, 'only for "fashion-mnist" and "cifar10"'),
        (["notes.txt"], {}, "holds no images; expected files that end in"),
        (["notes.txt"], {"source": "{}/notes.txt"}, "is a file, but not a .parquet one"),
        ([f"{i}.png" for i in range(20)], {}, r"none of the \d+ images of .* can be read \(\d+.png: not an image"),
        (["0.png"], {"split": "test"}, "no image for split='test'"),
    ],
    ids=range(7),
)
def test_what_cannot_be_loaded_is_said_in_one_line(tmp_path: Path, files: list[str], arguments: dict, message: str):
    for name in files:
        (tmp_path / name).write_bytes(b"broken")
    options = {"source": "{}", **arguments}
    with pytest.raises(ValueError, match=message) as caught:
        load_images(**{**options, "source": options["source"].format(tmp_path)})
    assert "\n" not in str(caught.value)


# Sizes and channels


def test_a_square_pair_is_taken_for_its_side(tmp_path: Path, untyped: None):
    save(tmp_path / "0.png", noise(9, 9))
    for size in ((6, 6), torch.Size([6, 6]), np.array([6, 6]), np.int64(6), torch.tensor(6)):
        assert load_images(tmp_path, size=size, channels=np.int64(3)).shape == (3, 6, 6)
        assert image_folder(tmp_path, size=size).shape == (1, 6, 6)
    assert load_images("fashion-mini", "test", size=[6, 6]).shape == (1, 6, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (64, 64, 3)}, r"got size=\(64, 64, 3\); expected the side of the images in pixels, or their height"),
        ({"size": (64, 0)}, r"got size=\(64, 0\); expected at least 1 pixel"),
        ({"size": (64, 48.5)}, r"got size=\(64, 48.5\); expected the side"),
        ({"size": ""}, "got size=''; expected the side"),
        ({"size": True}, "got size=True; expected the side"),
        ({"size": -3}, "got size=-3; expected at least 1 pixel"),
        ({"size": (0, 0)}, r"got size=\(0, 0\); expected at least 1 pixel"),
        ({"size": 10**9}, "got size=1000000000; expected at most 16,384 pixels"),
        ({"size": 10**30}, "expected the side"),
        ({"channels": "3"}, r"got channels='3'; expected 1 \(grey\) or 3"),
        ({"channels": 2}, "got channels=2; expected 1"),
    ],
)
def test_other_sizes_and_channels_are_refused_in_a_sentence(tmp_path: Path, untyped: None, options: dict, message: str):
    save(tmp_path / "set" / "0.png", noise(4, 4))
    missing = [tmp_path / "missing.tar", tmp_path / "missing.parquet", "hf:no/where"]
    for source in ("fashion-mini", tmp_path / "set", *missing):
        with pytest.raises(ValueError, match=message) as caught:
            load_images(source, **options)
        assert "\n" not in str(caught.value)
