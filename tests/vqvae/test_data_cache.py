"""Shrunk copies of large images: they change no bit, are bounded, and nothing that befalls them stops training."""

import errno
import itertools
import multiprocessing
import os
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import noise, save, write_parquet, write_tar
from PIL import Image

from vqvae.data import Images, ImageTensors, batches, load_images
from vqvae.data import cache as caches
from vqvae.data.augmentation import Augment, Variation
from vqvae.data.cache import Cache

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

CROP = Augment(crop=0.5, flip=True)
LARGE_FILES = 4


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    """However full the disk of a test's machine is."""
    monkeypatch.setattr(caches, "RESERVE", 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four large pictures, and two that are as small as they are needed."""
    for number in range(LARGE_FILES):
        save(tmp_path / "photos" / "train" / f"{number}.jpg", noise(100, 150, 3))
    save(tmp_path / "photos" / "train" / "small.png", noise(8, 8, 3))
    save(tmp_path / "photos" / "train" / "wide.png", noise(10, 300, 3))
    save(tmp_path / "photos" / "test" / "0.png", noise(8, 8, 3))
    return tmp_path / "photos"


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def cache(tmp_path: Path, told: list[str]) -> Cache:
    return Cache(tmp_path / "cache", 10**9, told.append)


def shown(images: Images, augment: Augment = CROP, num: int = 6, num_workers: int = 0) -> list[torch.Tensor]:
    stream = batches(images, 3, seed=2, augment=augment, num_workers=num_workers)
    found = [batch.images for batch in itertools.islice(stream, num)]
    stream.close()
    return found


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(a.equal(b) for a, b in zip(one, other, strict=True))


def entries(cache: Cache) -> list[Path]:
    return sorted(path for path in cache.folder.glob("*/*/*") if path.is_file())


@pytest.mark.parametrize("augment", [Augment(), Augment(flip=True), CROP, Augment(rotate=5.0)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_it_changes_no_bit_empty_filled_or_filled_by_workers(folder, cache, told, augment, channels):
    images = load_images(folder, size=8, channels=channels)
    with_cache = images.cached(cache)
    expected = shown(images, augment)
    assert equal(shown(with_cache, augment), expected), "while it is filled"
    assert len(entries(cache)) == LARGE_FILES
    assert equal(shown(with_cache, augment), expected), "out of it"
    assert equal(shown(images.cached(Cache(cache.folder, 10**9)), augment, num_workers=2), expected)
    shutil.rmtree(cache.folder)
    assert equal(shown(with_cache, augment, num_workers=2), expected), "while workers fill it"
    assert len(entries(cache)) == LARGE_FILES
    assert images[:].images.equal(with_cache[:].images)
    assert not told


def test_large_files_are_decoded_once(folder, cache, monkeypatch):
    images = load_images(folder, size=8).cached(cache)
    opened = []
    encoded = type(images)._encoded
    monkeypatch.setattr(type(images), "_encoded", lambda self, index: opened.append(index) or encoded(self, index))
    for augment in (Augment(), CROP):
        first = shown(images, augment, num=8)
        opened.clear()
        assert equal(shown(images, augment, num=8), first)
        assert {images.key(index) for index in opened} == {"small.png", "wide.png"}


def test_every_source_of_files_has_one(tmp_path, cache):
    pixels = [noise(60, 90, 3) for _ in range(3)]
    files = {f"train/{number}.png": each for number, each in enumerate(pixels)}
    data = {name: save(tmp_path / name, each).read_bytes() for name, each in files.items()}
    for split in ("train", "test"):
        write_tar(tmp_path / "tars" / f"{split}.tar", data.items())
        write_parquet(tmp_path / "parquet" / f"{split}.parquet", image=[{"bytes": each} for each in data.values()])
    for number, source in enumerate((tmp_path / "tars", tmp_path / "parquet")):
        images = load_images(source, size=8)
        with_cache = images.cached(Cache(tmp_path / f"cache{number}", 10**9))
        for _ in range(2):
            assert with_cache[:].images.equal(images[:].images)
        assert len(entries(with_cache._cache)) == 3
    memory = ImageTensors(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    assert memory.cached(cache) is memory
    assert not cache.folder.exists()


def test_a_file_that_was_written_again_is_decoded_again(folder, cache):
    images = load_images(folder, size=8).cached(cache)
    images[:]
    path = folder / "train" / "0.jpg"
    before = path.stat()
    Image.fromarray(noise(100, 150, 3)).save(path)
    os.truncate(path, before.st_size) if path.stat().st_size > before.st_size else path.open("ab").write(
        bytes(before.st_size - path.stat().st_size)
    )
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    fresh = load_images(folder, size=8)
    assert images[[1]].images.equal(fresh[[1]].images)
    for _ in range(2):
        assert [len(images[[0]].images), *images[[0]].images.flatten().tolist()] == [
            len(fresh[[0]].images),
            *fresh[[0]].images.flatten().tolist(),
        ]
    path.unlink()
    assert images[[0]].skipped[0][0] == "0.jpg", "what is gone is not shown out of the cache"


def test_another_size_or_crop_takes_the_place_of_the_one_before(folder, cache):
    for size, augment in ((8, CROP), (16, CROP), (16, Augment(crop=0.7)), (8, CROP)):
        images = load_images(folder, size=size)
        assert equal(shown(images.cached(cache), augment), shown(images, augment))
        assert len(entries(cache)) == LARGE_FILES
    assert cache._total() == sum(path.stat().st_size for path in entries(cache))


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "text", "folder"])
def test_a_damaged_entry_is_made_again(folder, cache, damage):
    images = load_images(folder, size=8)
    with_cache = images.cached(cache)
    with_cache[:]
    for path in entries(cache):
        data = path.read_bytes()
        path.unlink()
        if damage == "folder":
            path.mkdir()
        elif damage == "bit":
            place = len(data) // 2
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        else:
            path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "text": b"no entry"}[damage])
    assert with_cache[:].images.equal(images[:].images)
    assert len(entries(cache)) == (0 if damage == "folder" else LARGE_FILES)


def test_it_takes_no_more_than_it_may(folder, tmp_path, told):
    images = load_images(folder, size=8)
    whole = Cache(tmp_path / "whole", 10**9, told.append)
    expected = shown(images.cached(whole))
    sizes = [path.stat().st_size for path in entries(whole)]
    small = Cache(tmp_path / "small", sum(sizes) // 2, told.append)
    for num_workers in (0, 2):
        assert equal(shown(images.cached(small), num_workers=num_workers), expected)
    taken = sum(path.stat().st_size for path in entries(small))
    assert 0 < taken < sum(sizes) // 2 + max(sizes)
    # A program that is started anew knows what is there.
    assert equal(shown(images.cached(Cache(small.folder, small.most_bytes))), expected)
    assert sum(path.stat().st_size for path in entries(small)) == taken
    assert not told


@pytest.mark.parametrize(
    ("left", "swept"), [(8 * LARGE_FILES - 3, True), (8 * LARGE_FILES - 3, False), (5, False), (0, True), (None, True)]
)
def test_a_count_that_is_cut_is_made_anew_of_the_entries(folder, tmp_path, told, left, swept):
    """Or gone; and nothing that was kept is lost. What is gone is counted by what a run begins with alone."""
    images = load_images(folder, size=8)
    cache = Cache(tmp_path / "cache", 10**9, told.append)
    expected = images.cached(cache)[:].images
    before = {path: path.read_bytes() for path in entries(cache)}
    if left is None:
        (cache.folder / "bytes").unlink()
    else:
        os.truncate(cache.folder / "bytes", left)
    again = Cache(cache.folder, 10**9, told.append)
    if swept:
        again.sweep()
    for each in (again, cache):  # the second has counted before
        assert each._total() == sum(map(len, before.values()))
    shown(images.cached(again))
    assert images.cached(again)[:].images.equal(expected)
    assert before.items() <= {path: path.read_bytes() for path in entries(cache)}.items()
    for each in (again, cache, Cache(cache.folder, 1)):
        assert each._total() == sum(path.stat().st_size for path in entries(cache)) > sum(map(len, before.values()))
    assert (cache.folder / "bytes").stat().st_size % 8 == 0
    assert not told


def full_disk(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be written in folders of this name."""

    def refuse(path: object) -> None:
        if where in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    write, make = Path.write_bytes, Path.mkdir
    monkeypatch.setattr(Path, "write_bytes", lambda self, data: refuse(self) or write(self, data))
    if where == "cache":
        monkeypatch.setattr(Path, "mkdir", lambda self, *args, **how: refuse(self) or make(self, *args, **how))


@pytest.mark.parametrize("where", ["cache", ".writing"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_full_disk_is_told_once_and_training_goes_on(folder, tmp_path, monkeypatch, where, num_workers):
    images = load_images(folder, size=8)
    expected = shown(images)
    log = tmp_path / "log"
    cache = Cache(tmp_path / "cache", 10**9, Telling(log))
    if where == ".writing":
        cache.folder.mkdir()
    with monkeypatch.context() as patch:
        full_disk(where, patch)
        assert equal(shown(images.cached(cache), num_workers=num_workers), expected)
        assert equal(shown(images.cached(cache), num_workers=num_workers), expected)
    assert not entries(cache)
    lines = log.read_text().splitlines()
    assert all("is not filled further, and images are decoded as without it: No space left" in each for each in lines)
    if where == ".writing" or not num_workers:
        assert len(lines) == 1
    cache.sweep()
    assert not list(cache.folder.glob(".writing/*"))
    assert equal(shown(images.cached(Cache(cache.folder, 10**9))), expected)
    assert len(entries(cache)) == LARGE_FILES, "once there is room again"


class Telling:
    """Notes that any process tells, in a file."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, note: str) -> None:
        with self.path.open("a") as file:
            file.write(f"{note}\n")


def test_a_disk_is_never_filled(folder, cache, told, monkeypatch):
    monkeypatch.setattr(caches, "RESERVE", shutil.disk_usage(folder).total)
    images = load_images(folder, size=8)
    assert equal(shown(images.cached(cache)), shown(images))
    assert not entries(cache)
    assert len(told) == 1
    assert "GB left, of which" in told[0]


def test_a_cache_that_is_removed_while_it_is_used_does_no_harm(folder, cache, told):
    images = load_images(folder, size=8)
    expected = shown(images, num=40)
    gone = threading.Event()

    def remove() -> None:
        while not gone.is_set():
            shutil.rmtree(cache.folder, ignore_errors=True)

    thread = threading.Thread(target=remove)
    thread.start()
    try:
        assert equal(shown(images.cached(cache), num=40), expected)
    finally:
        gone.set()
        thread.join()
    assert not told


def fill(folder: Path, where: Path) -> None:
    images = load_images(folder, size=8)
    assert equal(shown(images.cached(Cache(where, 10**9))), shown(images))


def test_several_processes_fill_it_at_once(folder, cache):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fill, args=(folder, cache.folder)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(entries(cache)) == LARGE_FILES
    assert not list(cache.folder.glob(".writing/*"))


def test_pixels_come_back_as_they_were(cache):
    for number, shape in enumerate([(5, 7), (5, 7, 3), (1, 1), (1, 300, 3)]):
        pixels = noise(*shape)
        cache.put("fitted", number, b"it", pixels)
        found = cache.get("fitted", number, b"it")
        assert found is not None
        assert found.dtype == np.uint8
        assert np.array_equal(found, pixels)
        assert cache.get("fitted", number, b"other") is None
        assert cache.get("pictures", number, b"it") is None
        assert cache.get("fitted", number + 10, b"it") is None
    assert pickle.loads(pickle.dumps(Cache(cache.folder, 1))).get("fitted", 0, b"it") is not None
    cache.put("fitted", 9, b"it", np.zeros((1, 20_000), np.uint8))
    assert cache.get("fitted", 9, b"it") is None, "longer than WebP takes"


def test_a_variation_has_entries_of_its_own_and_the_image_itself_too(folder, cache):
    images = load_images(folder, size=8).cached(cache)
    images.varied([0], Variation(augment=CROP, seed=0, epoch=0))
    images[[0]]
    assert [path.parts[-3] for path in entries(cache)] == ["fitted", "pictures"]


def test_a_count_that_a_kill_cut_short_is_mended(folder: Path, tmp_path: Path, told: list[str]) -> None:
    """What is added behind it counts as what it is."""
    images = load_images(folder, "train", size=16)
    first = Cache(tmp_path / "cut", 10**9, told.append)
    images.cached(first)[:2]
    with (tmp_path / "cut" / "bytes").open("ab") as file:
        file.write(b"\x01\x02\x03")
    again = Cache(tmp_path / "cut", 10**9, told.append)
    again.sweep()
    images.cached(again)[:4]
    entries = [path for path in (tmp_path / "cut").rglob("*") if path.is_file() and path.name.isdigit()]
    assert len(entries) == 4
    assert again._total() == sum(path.stat().st_size for path in entries)
    assert not told
