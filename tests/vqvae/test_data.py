"""Images in: what each source gives, what happens to broken files, and the order of batches."""

import gzip
import hashlib
import io
import multiprocessing
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from vqvae.data import Batch, Images, ImageTensors, batches, image_folder, index_batches, load_images, num_batches
from vqvae.data.decode import read
from vqvae.data.folder import held_out

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
RNG = np.random.default_rng(0)
RED, WHITE = (255, 0, 0), (255, 255, 255)

# Workers may be more than the cores of a small machine, and are forked from a process with threads.
pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, np.uint8)


def save(path: Path, pixels: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def chw(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1).copy())


def counted(num: int) -> ImageTensors:
    """Images that can be told apart: image i is filled with i, and so labelled."""
    levels = torch.arange(num)
    return ImageTensors(levels.byte().reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2), levels)


def seen(stream: list[Batch]) -> list[list[int]]:
    return [batch.images[:, 0, 0, 0].tolist() for batch in stream]


def flat(lists: list[list[int]]) -> list[int]:
    return [each for some in lists for each in some]


def take(stream, num: int) -> list[Batch]:
    taken = [next(stream) for _ in range(num)]
    stream.close()
    return taken


# The embedded set


# SHA-256 of the first images and labels in the published files.
PUBLISHED = {
    "train": (
        20_000,
        "58e4771950337033c6f5665c995cab5743ed89bf7399fd5c583cf4de053257d1",
        "9096aaf5e84faa7a18c04a6f597e5adc34d95d60b46296a4a1bb09c2e49d9d15",
    ),
    "test": (
        2_000,
        "09bbac78738f0229a68f7ca74e62665d7fb34f45ea7a3509ab5c4a202c1370de",
        "a86243d2b2400909bc0a82f5fd5c9df83bf827852a1543e3dc70af890035a9d4",
    ),
}


@pytest.mark.parametrize("split", PUBLISHED)
def test_embedded_images_are_the_first_of_fashion_mnist(split: str):
    num, images_hash, labels_hash = PUBLISHED[split]
    images = load_images("fashion-mini", split)
    assert isinstance(images, ImageTensors)
    assert (len(images), images.shape, images.num_classes) == (num, (1, 28, 28), 10)
    assert images.images.dtype == torch.uint8
    assert images.labels is not None
    assert images.class_names is not None
    assert images.class_names[images.labels[0]] == "Ankle boot"
    assert hashlib.sha256(images.images.numpy().tobytes()).hexdigest() == images_hash
    assert hashlib.sha256(images.labels.byte().numpy().tobytes()).hexdigest() == labels_hash


@pytest.mark.skipif(not DEBIAN.exists(), reason="needs Debian's dataset-fashion-mnist")
def test_embedded_images_equal_the_original_files():
    mini, whole = load_images("fashion-mini", "test"), load_images("fashion-mnist", "test", root=DEBIAN)
    assert len(whole) == 10_000
    first = whole.__getitems__(range(2_000))
    assert mini.images.equal(first.images)
    assert mini.labels.equal(first.labels)


def test_embedded_files_are_small_and_licensed():
    folder = Path(str(files("vqvae") / "assets"))
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 8_000_000
    assert "Zalando" in (folder / "LICENSE-fashion-mnist").read_text()


# A folder of images


def test_folder_keeps_the_levels_of_images_of_the_right_size(tmp_path: Path):
    pixels = {name: noise(8, 8, 3) for name in ("ant/0.png", "ant/deep/1.PNG", "bee/2.webp", "bee/3.bmp")}
    for name, each in pixels.items():
        save(tmp_path / name, each, **({"lossless": True} if name.endswith("webp") else {}))
    (tmp_path / "ant" / ".hidden.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("not named like an image")
    found = {}
    for split in ("train", "test"):
        images = load_images(tmp_path, split, size=8)
        assert (images.shape, images.num_classes, images.class_names) == ((3, 8, 8), 2, ("ant", "bee"))
        assert len(images) >= 1
        for image, label in (images[i] for i in range(len(images))):
            found[image.numpy().tobytes()] = label
    assert found == {chw(each).numpy().tobytes(): int("bee" in name) for name, each in pixels.items()}


def grey16(mode: str) -> Image.Image:
    levels = np.array([[0, 257, 65535], [128, 129, 32896], [1000, 50000, 65407]], np.uint16)
    return Image.fromarray(levels if mode == "I;16" else levels.astype(np.int32))


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


ROUNDED_16 = [[0, 1, 255], [0, 1, 128], [4, 195, 255]]
RED_WITH_BLUE = [[RED] * 3, [RED, (0, 0, 255), RED], [RED] * 3]
ON_WHITE = [[WHITE] * 3, [WHITE, RED, (255, 127, 127)], [WHITE] * 3]
GREY_ON_WHITE = [[255] * 3, [255, 76, 165], [255] * 3]


@pytest.mark.parametrize(
    ("suffix", "image", "expected"),
    [
        (".png", Image.fromarray(np.diag([1, 2, 3]).astype(np.uint8)), np.diag([1, 2, 3])),
        (".png", Image.fromarray(np.eye(3, dtype=bool)), 255 * np.eye(3)),
        (".png", grey16("I;16"), ROUNDED_16),
        (".tif", grey16("I"), ROUNDED_16),
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
def test_every_kind_of_pixel_becomes_eight_bit_grey_or_rgb(
    tmp_path: Path, suffix: str, image: Image.Image, expected: list
):
    image.save(tmp_path / f"0{suffix}", **({"lossless": True, "exact": True} if suffix == ".webp" else {}))
    pixels = np.array(expected, np.uint8)
    images = load_images(tmp_path, size=3)
    assert images.num_classes is None
    assert images.shape == (1 if pixels.ndim == 2 else 3, 3, 3)
    assert images[0][0].equal(chw(pixels))
    assert images[0][1] is None


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_are_converted_as_asked(tmp_path: Path, channels: int):
    colour, grey = noise(4, 4, 3), noise(4, 4)
    save(tmp_path / "0.png", colour)
    save(tmp_path / "1.png", grey)
    names = {"train": [], "test": []}
    for split in names:
        images = image_folder(tmp_path, split, size=4, channels=channels)
        names[split] = [image for image, _ in (images[i] for i in range(len(images)))]
    as_grey = np.round(colour @ np.array([0.299, 0.587, 0.114]))
    wanted = [colour, np.stack([grey] * 3, -1)] if channels == 3 else [as_grey, grey]
    images = [*names["train"], *names["test"]]
    for want in wanted:
        differences = [(chw(want.astype(np.int64)) - image.long()).abs().max() for image in images]
        assert min(differences) <= (1 if channels == 1 else 0)


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


def test_the_first_frame_of_an_animation(tmp_path: Path):
    frames = [Image.fromarray(np.full((4, 4), level, np.uint8)) for level in (10, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (load_images(tmp_path, size=4, channels=1)[0][0] == 10).all()


def break_truncated(path: Path) -> None:
    path.write_bytes(save(path, noise(64, 64, 3)).read_bytes()[:6000])


def break_dangling(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere.png")


def break_floats(path: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.float32)).save(path, "TIFF")


def break_wide(path: Path) -> None:
    Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(path, "TIFF")


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (break_truncated, "truncated"),
    "empty": (lambda path: path.write_bytes(b""), "the file is empty"),
    "text": (lambda path: path.write_text("no image"), "not an image in a known format"),
    # Pillow would hand this to an outside program.
    "postscript": (
        lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n"),
        "not an image in a known format",
    ),
    "dangling": (break_dangling, "No such file or directory"),
    "floats": (break_floats, "floats"),
    "wide": (break_wide, "32 bits"),
    "huge": (lambda path: save(path, noise(80, 80)), "decompression bomb"),
}


@pytest.fixture
def with_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)
    for number in range(6):
        save(tmp_path / "train" / f"good{number}.png", noise(8, 8, 3))
    for name, (breaks, _) in BROKEN.items():
        breaks(tmp_path / "train" / f"{name}.png")
    save(tmp_path / "test" / "good.png", noise(8, 8, 3))
    return tmp_path


def test_broken_files_are_named_and_skipped(with_broken: Path):
    images = load_images(with_broken, size=8)
    assert len(images) == 6 + len(BROKEN)
    batch = images.__getitems__(range(len(images)))
    assert batch.images.shape == (6, 3, 8, 8)
    reasons = dict(batch.skipped)
    assert set(reasons) == {f"{name}.png" for name in BROKEN}
    for name, (_, reason) in BROKEN.items():
        assert reason in reasons[f"{name}.png"]
        assert "\n" not in reasons[f"{name}.png"]
    index = next(i for i in range(len(images)) if len(images.__getitems__([i]).skipped))
    with pytest.raises(ValueError, match=r"dangling.png can't be read as an image: No such file"):
        images[index]
    with pytest.raises(IndexError):
        images[len(images)]


def test_labels_stay_with_their_images_where_one_is_skipped(tmp_path: Path):
    for split in ("train", "test"):
        for label in "abc":
            save(tmp_path / split / label / "0.png", noise(4, 4))
    (tmp_path / "train" / "b" / "0.png").write_bytes(b"")
    batch = load_images(tmp_path, size=4).__getitems__([2, 1, 0])
    assert batch.labels is not None
    assert batch.labels.tolist() == [2, 0]
    assert batch.skipped == (("b/0.png", "the file is empty"),)


def test_the_training_images_decide_on_the_channels_of_both_splits(tmp_path: Path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "0.png").write_bytes(b"")
    save(tmp_path / "train" / "1.png", noise(4, 4))
    save(tmp_path / "test" / "0.png", noise(4, 4, 3))
    assert [load_images(tmp_path, split, size=4).shape for split in ("train", "test")] == [(1, 4, 4)] * 2


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".bmp", ".tif", ".ppm", ".avif"])
def test_a_truncated_file_of_any_format_is_skipped(tmp_path: Path, suffix: str):
    save(tmp_path / "train" / "good.png", noise(64, 64, 3))
    save(tmp_path / "test" / "good.png", noise(64, 64, 3))
    path = save(tmp_path / "train" / f"cut{suffix}", noise(64, 64, 3))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    batch = load_images(tmp_path).__getitems__([0, 1])
    assert len(batch.images) == 1
    assert [name for name, _ in batch.skipped] == [path.name]


def test_folders_named_for_splits_are_the_splits(tmp_path: Path):
    for name in ("train/cat/0", "train/cat/1", "train/dog/2", "val/dog/3", "val/emu/4"):
        save(tmp_path / f"{name}.png", noise(4, 4))
    train, test = (load_images(tmp_path, split, size=4) for split in ("train", "test"))
    assert (len(train), len(test)) == (3, 2)
    assert train.class_names == test.class_names == ("cat", "dog", "emu")
    assert train.__getitems__(range(3)).labels.tolist() == [0, 0, 1]
    assert test.__getitems__(range(2)).labels.tolist() == [1, 2]
    save(tmp_path / "test" / "5.png", noise(4, 4))
    assert len(load_images(tmp_path, "test", size=4)) == 1


def test_about_one_in_ten_is_held_out_by_its_name_alone():
    keys = [f"{number}.png".encode() for number in range(5000)]
    held = held_out(keys)
    assert 430 < held.sum() < 570
    assert (held_out(keys[::2]) == held[::2]).all()
    for num in range(2, 12):
        for first in range(0, 100, 10):
            assert 0 < held_out(keys[first : first + num]).sum() < num
    assert not held_out(keys[:1]).any()


def test_linked_folders_are_followed_and_circles_end(tmp_path: Path):
    save(tmp_path / "elsewhere" / "a" / "0.png", noise(4, 4))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "set")
    assert len(load_images(tmp_path / "set", size=4)) == 1


def make_empty(folder: Path) -> None:
    (folder / "notes.txt").write_text("nothing here")


def make_unreadable(folder: Path) -> None:
    for number in range(20):
        (folder / f"{number}.png").write_bytes(b"broken")


def make_one(folder: Path) -> None:
    save(folder / "0.png", noise(4, 4))


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (None, {"source": "fashion-mimi"}, '"fashion-mini", "fashion-mnist", "cifar10", "hf:OWNER/NAME"'),
        (None, {"source": "missing"}, "does not exist"),
        (None, {"source": "fashion-mini", "split": "valid"}, "got split='valid'; expected one of 'train', 'test'"),
        (None, {"source": "fashion-mini", "channels": 2}, r"got channels=2; expected 1 \(grey\) or 3"),
        (None, {"source": "fashion-mini", "size": 0}, "got size=0; expected at least 1"),
        (None, {"source": "fashion-mini", "root": "data"}, 'only for "fashion-mnist" and "cifar10"'),
        (make_empty, {}, "holds no images; expected files that end in"),
        (make_empty, {"source": "notes.txt"}, "is a file, but not a .parquet one"),
        (make_unreadable, {}, r"none of the \d+ images of .* can be read \(\d+.png: not an image"),
        (make_one, {"split": "test"}, "no image for split='test'"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable | None, arguments: dict, message: str
):
    monkeypatch.chdir(tmp_path)
    if make is not None:
        make(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_images(**{"source": tmp_path, **arguments})
    assert "\n" not in str(caught.value)


# Sets known by name


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("place", ["", "FashionMNIST/raw"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fashion_mnist_from_a_folder_that_holds_it(tmp_path: Path, place: str, suffix: str):
    pixels = {"train": noise(5, 28, 28), "t10k": noise(3, 28, 28)}
    for part, each in pixels.items():
        write_idx(tmp_path / place / f"{part}-images-idx3-ubyte{suffix}", each)
        write_idx(tmp_path / place / f"{part}-labels-idx1-ubyte{suffix}", np.arange(len(each), dtype=np.uint8))
    for split, part in (("train", "train"), ("test", "t10k")):
        images = load_images("fashion-mnist", split, root=tmp_path)
        assert images.shape == (1, 28, 28)
        assert images.num_classes == 10
        batch = images.__getitems__(range(len(images)))
        assert (batch.images[:, 0].numpy() == pixels[part]).all()
        assert batch.labels.tolist() == list(range(len(images)))
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
    """CIFAR-10's python files as Python 2 pickled them, of three images each."""

    def text(word: bytes) -> bytes:  # a Python 2 str
        return b"U" + bytes([len(word)]) + word

    def array(data: np.ndarray) -> bytes:
        state = b"(K\3" + text(b"|") + b"NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\0tb"
        kind = b"cnumpy\ndtype\n" + text(b"u1") + b"K\0K\1\x87R" + state
        made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85" + text(b"b") + b"\x87R"
        shape = b"M" + struct.pack("<H", data.shape[0]) + b"M" + struct.pack("<H", data.shape[1]) + b"\x86"
        return made + b"(K\1" + shape + kind + b"\x89T" + struct.pack("<i", data.nbytes) + data.tobytes() + b"tb"

    folder.mkdir(parents=True, exist_ok=True)
    pixels = {}
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        pixels[name] = noise(3, 3072)
        labels = b"](K\0K\1K\2e"
        content = text(b"data") + array(pixels[name]) + text(b"labels") + labels
        (folder / name).write_bytes(b"\x80\2}(" + content + b"u.")
    names = b"](" + b"".join(text(b"class%d" % number) for number in range(10)) + b"e"
    (folder / "batches.meta").write_bytes(b"\x80\2}" + text(b"label_names") + names + b"s.")
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


@pytest.mark.parametrize(
    ("source", "module", "message"),
    [
        ("fashion-mnist", "mnist", "could not be downloaded .*no network.*pass as root a folder that holds"),
        ("cifar10", "cifar", "could not be downloaded .*no network.*pass as root a folder that holds"),
    ],
)
def test_without_a_network_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, module: str, message: str
):
    monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", no_network)
    with pytest.raises(ValueError, match=message) as caught:
        load_images(source, root=tmp_path / "new")
    assert "\n" not in str(caught.value)


# Parquet and Hugging Face


def encoded(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_hugging_face(path: Path, pixels: list[np.ndarray], labels: list[int]) -> None:
    """A parquet file as `datasets` itself writes it."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["ant", "bee", "cow"])}
    )
    rows = {"picture": [Image.fromarray(each) for each in pixels], "kind": labels}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


def write_parquet(path: Path, **columns: list) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.fixture
def no_progress(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.mark.usefixtures("no_progress")
@pytest.mark.parametrize("source", ["{}", "hf:{}"])
def test_parquet_as_hugging_face_writes_it(tmp_path: Path, source: str):
    pixels = [noise(6, 9, 3) for _ in range(7)]
    folder = tmp_path / "set"
    folder.mkdir()
    write_hugging_face(folder / "train-00000-of-00002.parquet", pixels[:3], [0, 2, 1])
    write_hugging_face(folder / "train-00001-of-00002.parquet", pixels[3:5], [1, 0])
    write_hugging_face(folder / "test-00000-of-00001.parquet", pixels[5:], [0, 1])
    train, test = (load_images(source.format(folder), split) for split in ("train", "test"))
    assert train.shape == test.shape == (3, 6, 9)
    assert train.class_names == test.class_names == ("ant", "bee", "cow")
    batch = train.__getitems__([4, 0, 1])
    assert batch.images.equal(torch.stack([chw(pixels[i]) for i in (4, 0, 1)]))
    assert batch.labels.tolist() == [0, 0, 2]
    assert test[1][0].equal(chw(pixels[6]))
    square = load_images(source.format(folder), size=4, channels=1)
    assert square[0][0].shape == (1, 4, 4)
    copy = pickle.loads(pickle.dumps(train))
    assert copy[3][0].equal(train[3][0])


@pytest.mark.usefixtures("no_progress")
def test_hugging_face_reads_a_folder_of_image_files(tmp_path: Path):
    pixels = {name: noise(4, 4, 3) for name in ("train/ant/0", "train/bee/1", "test/ant/2")}
    for name, each in pixels.items():
        save(tmp_path / "set" / f"{name}.png", each)
    images = load_images(f"hf:{tmp_path / 'set'}")
    assert (len(images), images.class_names) == (2, ("ant", "bee"))
    assert {images[i][0].numpy().tobytes() for i in range(2)} == {
        chw(pixels[name]).numpy().tobytes() for name in ("train/ant/0", "train/bee/1")
    }


@pytest.mark.usefixtures("no_progress")
def test_hugging_face_without_the_set_says_so(tmp_path: Path):
    with pytest.raises(ValueError, match="can't be had from Hugging Face") as caught:
        load_images(f"hf:{tmp_path / 'nowhere'}")
    assert "\n" not in str(caught.value)


def test_parquet_of_plain_bytes_is_split_by_row(tmp_path: Path):
    pixels = [noise(4, 4) for _ in range(40)]
    path = write_parquet(tmp_path / "a.parquet", photo=[encoded(each) for each in pixels], label=[*range(4)] * 10)
    train, test = (load_images(path, split) for split in ("train", "test"))
    assert train.shape == (1, 4, 4)
    assert train.num_classes == test.num_classes == 4
    assert train.class_names is None
    assert 1 <= len(test) < 12
    parts = [images.__getitems__(range(len(images))) for images in (train, test)]
    together = {image.numpy().tobytes() for part in parts for image in part.images}
    assert len(train) + len(test) == 40
    assert together == {chw(each).numpy().tobytes() for each in pixels}
    row = next(i for i, each in enumerate(pixels) if chw(each).equal(test[0][0]))
    assert test[0][1] == row % 4


def test_broken_rows_are_named_and_skipped(tmp_path: Path):
    pixels = noise(4, 4, 3)
    images = [
        {"bytes": encoded(pixels), "path": "good.png"},
        {"bytes": encoded(noise(64, 64, 3))[:2000], "path": "cut.png"},
        {"bytes": None, "path": None},
        {"bytes": None, "path": "gone.png"},
        {"bytes": b"", "path": None},
    ]
    write_parquet(tmp_path / "train.parquet", image=images, label=[0, 1, 2, 3, -1])
    write_parquet(tmp_path / "validation.parquet", image=images[:1], label=[0])
    loaded = load_images(tmp_path)
    assert loaded.num_classes is None  # since one label is not known
    batch = loaded.__getitems__(range(5))
    assert batch.images.equal(chw(pixels)[None])
    assert [name for name, _ in batch.skipped] == ["row 1 (cut.png)", "row 2", "row 3 (gone.png)", "row 4"]
    with pytest.raises(ValueError, match=r"row 1 \(cut.png\) can't be read"):
        loaded[1]


@pytest.mark.parametrize(
    ("name", "columns", "message"),
    [
        ("a.parquet", {"text": ["x"], "number": [1]}, r"columns: text \(string\), number \(int64\); expected"),
        ("a.parquet", {"image": [b"broken"]}, "no readable image in its first"),
        ("a.parquet", {"image": [encoded(noise(4, 4))]}, "none of them for split='test'"),
    ],
)
def test_parquet_without_images_is_refused(tmp_path: Path, name: str, columns: dict, message: str):
    path = write_parquet(tmp_path / name, **columns)
    with pytest.raises(ValueError, match=message) as caught:
        load_images(path, "test")
    assert "\n" not in str(caught.value)


def test_a_damaged_parquet_file_is_refused(tmp_path: Path):
    path = write_parquet(tmp_path / "a.parquet", image=[encoded(noise(4, 4))] * 9)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="can't be read as parquet") as caught:
        load_images(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["hf:owner/name", "a.parquet"])
def test_without_the_extra_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "vqvae.data.table", raising=False)
    monkeypatch.delattr("vqvae.data.table", raising=False)
    with pytest.raises(ValueError, match=r"pip install 'vqvae-priors\[parquet\]'"):
        load_images(source)


# Tensors


def test_tensors_are_checked(untyped: None):
    images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    assert ImageTensors(images).num_classes is None
    with pytest.raises(ValueError, match="expected at least one, as uint8"):
        ImageTensors(images.float())
    with pytest.raises(ValueError, match="expected at least one, as uint8"):
        ImageTensors(images[:0])
    with pytest.raises(ValueError, match="labels for 3 images"):
        ImageTensors(images, torch.zeros(2).long())
    with pytest.raises(ValueError, match="got labels from 0 to 2; expected 0 to 1"):
        ImageTensors(images, torch.arange(3), ("a", "b"))
    assert list(ImageTensors(images, torch.arange(3)))[2][1] == 2


# Batches


def test_without_a_seed_one_pass_in_order():
    stream = list(batches(counted(10), 4))
    assert seen(stream) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert stream[2].labels.tolist() == [8, 9]
    assert stream[2].labels.dtype == torch.int64
    assert stream[0].images.dtype == torch.uint8
    assert seen(list(batches(counted(10), 4, drop_last=True))) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(list(batches(counted(10), 4, epochs=2))) == 6


def test_with_a_seed_every_epoch_is_another_shuffle():
    epochs = [flat(seen(take(batches(counted(100), 10, seed=5, start=10 * e), 10))) for e in range(3)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != flat(seen(take(batches(counted(100), 10, seed=6), 10)))
    assert len(list(batches(counted(100), 30, seed=5, epochs=2))) == 6
    assert len(list(batches(counted(100), 30, seed=5, epochs=2, drop_last=False))) == 8


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("num", [3, 23])
def test_a_later_start_is_the_tail_of_an_earlier_one(num: int, drop_last: bool):
    def stream(start: int):
        return batches(counted(num), 5, seed=1, start=start, drop_last=drop_last, rank=1, world_size=2)

    whole = seen(take(stream(0), 20))
    for start in (1, 2, 3, 7, 19):
        assert seen(take(stream(start), 20 - start)) == whole[start:]


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize(
    ("num", "batch_size", "world_size"), [(24, 4, 2), (23, 4, 2), (25, 4, 3), (5, 8, 2), (9, 1, 4)]
)
def test_ranks_share_each_epoch(num: int, batch_size: int, world_size: int, drop_last: bool, seed: int | None):
    options = {"seed": seed, "epochs": 2, "world_size": world_size, "drop_last": drop_last}
    ranks = [seen(list(batches(counted(num), batch_size, rank=rank, **options))) for rank in range(world_size)]
    steps = num_batches(num, batch_size, world_size=world_size, drop_last=drop_last)
    assert {len(rank) for rank in ranks} == {2 * steps}
    for epoch in (0, 1):
        shares = [batch for rank in ranks for batch in rank[epoch * steps : (epoch + 1) * steps]]
        indices = flat(shares)
        assert len(set(indices)) == len(indices)
        assert len(indices) == (steps * batch_size * world_size if drop_last and num > batch_size * world_size else num)
        assert all(share and len(share) <= batch_size + 1 for share in shares)


def test_the_order_alone_is_that_of_the_batches():
    options = {"seed": 4, "start": 3, "rank": 1, "world_size": 2}
    order = index_batches(23, 4, **options)
    assert [next(order).tolist() for _ in range(9)] == seen(take(batches(counted(23), 4, **options), 9))


def test_a_set_smaller_than_a_batch_is_one():
    assert [sorted(batch) for batch in seen(take(batches(counted(5), 64, seed=0), 3))] == [list(range(5))] * 3


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        a.images.equal(b.images) and a.skipped == b.skipped for a, b in zip(left, right, strict=True)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Images:
    for number in range(24):
        save(tmp_path / "train" / f"{number:02}.png", np.full((4, 4), number, np.uint8))
    (tmp_path / "train" / "07.png").write_bytes(b"broken")
    save(tmp_path / "test" / "0.png", noise(4, 4))
    return load_images(tmp_path, size=4)


def test_workers_give_what_no_workers_give_and_leave_nothing_behind(folder: Images):
    before = torch.get_rng_state()
    for options in ({}, {"seed": 2, "start": 3, "epochs": 4}):
        here, ahead = (list(batches(folder, 5, num_workers=num, **options)) for num in (0, 2))
        assert same(here, ahead)
        assert any(batch.skipped == (("07.png", "not an image in a known format"),) for batch in ahead)
    stream = batches(folder, 5, seed=2, num_workers=2)
    assert same(take(batches(folder, 5, seed=2), 3), [next(stream) for _ in range(3)])
    assert len(multiprocessing.active_children()) == 2
    stream.close()
    assert multiprocessing.active_children() == []
    assert torch.get_rng_state().equal(before)


def test_an_error_in_a_worker_ends_all_of_them_at_once(folder: Images, monkeypatch: pytest.MonkeyPatch):
    def fails(self: Images, indices: list[int]) -> Batch:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(type(folder), "__getitems__", fails)
    with pytest.raises(RuntimeError, match="no such luck") as caught:
        next(batches(folder, 4, seed=0, num_workers=2))
    assert multiprocessing.active_children() == []
    del caught  # until here its traceback holds whatever the loop held


def test_batches_without_a_readable_image_are_stood_in_for(folder: Images):
    for number in (3, 4, 5, 6):
        (folder.folder / f"{number:02}.png").write_bytes(b"")
    assert seen(list(batches(folder, 1)))[:4] == [[0], [1], [2], [8]]
    whole = take(batches(folder, 1, seed=0), 72)
    broken = {name for batch in whole for name, _ in batch.skipped}
    assert broken == {"03.png", "04.png", "05.png", "06.png", "07.png"}
    repeats = sum(seen(whole)[i] == seen(whole)[i + 1] for i in range(71))
    assert repeats >= 10
    for start in range(1, 40):
        assert seen(take(batches(folder, 1, seed=0, start=start), 10)) == seen(whole)[start : start + 10]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("seed", [None, 0])
def test_an_epoch_without_a_readable_image_is_an_error(folder: Images, seed: int | None, num_workers: int):
    for path in folder.folder.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"no image in an entire epoch of .* could be read: 24 tried, the first is"):
        list(batches(folder, 4, seed=seed, num_workers=num_workers))
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "got batch_size=0; expected at least 1"),
        ({"seed": -1}, "got seed=-1; expected at least 0"),
        ({"start": -1}, "got start=-1"),
        ({"epochs": 0}, "got epochs=0"),
        ({"rank": 2, "world_size": 2}, r"got rank=2; expected 0 to 1"),
        ({"num_workers": -1}, "got num_workers=-1"),
        ({"seed": 0, "world_size": 4}, "got 3 images of images for 4 ranks"),
    ],
)
def test_numbers_out_of_range_are_refused_at_once(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        batches(counted(3), **{"batch_size": 2, **options})


INTERRUPTED = """
import multiprocessing, sys, time
from vqvae.data import batches, load_images
if __name__ == "__mp_main__":  # a spawned worker that is starting
    print("ready", flush=True)
    time.sleep(1)
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[2])
    for step, _ in enumerate(batches(load_images(sys.argv[1], size=4), 2, seed=0, num_workers=2)):
        if step == 4:
            print("ready", flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
@pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_ctrl_c_ends_every_process_with_one_traceback(folder: Images, start_method: str):
    (folder.folder.parent / "script.py").write_text(INTERRUPTED)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "script.py", str(folder.folder.parent), start_method],
        cwd=folder.folder.parent,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert errors.count("Traceback") == 1
    assert errors.rstrip().endswith("KeyboardInterrupt")
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("processes are left after Ctrl-C")
