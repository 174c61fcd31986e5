"""Only regular files are opened; folders of any depth; and what tells a set's files from others."""

import os
import shutil
import socket
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from image_files import chw, encoded, noise, save, write_parquet, write_tar

from vqvae.cli.reading import image_files, read_exactly
from vqvae.data import Images, load_images
from vqvae.data.decoding import read
from vqvae.data.files import names_of

# What is no regular file

REASONS = {
    "pipe.png": "it is a named pipe and no regular file",
    "linked.png": "it is a named pipe and no regular file",
    "device.png": "it is a device and no regular file",
    "socket.png": "it is a socket and no regular file",
    "itself.png": "Too many levels of symbolic links",
}


def test_what_is_no_regular_file_is_named_and_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pixels, folder = noise(4, 4), tmp_path / "train"
    save(folder / "good.png", pixels)
    save(tmp_path / "test" / "0.png", pixels)
    os.mkfifo(folder / "pipe.png")
    for name, target in (("device", "/dev/zero"), ("linked", "pipe.png"), ("itself", "itself.png")):
        (folder / f"{name}.png").symlink_to(target)
    monkeypatch.chdir(folder)  # the names of sockets are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        batch = load_images(tmp_path, size=4)[:]
        assert batch.images.equal(chw(pixels)[None])
        assert dict(batch.skipped) == REASONS
        assert {name for _, name in image_files([folder])} == {"good.png", *REASONS}
        for name, reason in REASONS.items():
            for reader in (read, read_exactly):
                with pytest.raises((ValueError, OSError), match=reason):
                    reader(folder / name)


@pytest.mark.parametrize("ending", ["tar", "parquet", "png", ""])
def test_a_source_that_is_a_pipe_is_refused(tmp_path: Path, ending: str):
    path = tmp_path / f"x.{ending}"
    os.mkfifo(path)
    for source in (path, tmp_path) if ending in ("tar", "parquet") else (path, "/dev/zero"):
        with pytest.raises(ValueError, match=r"it is a (named pipe|device) and no regular file"):
            load_images(source)


# Folders of any depth


@pytest.fixture
def nested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, int], Path]]:
    """Makes folders inside each other, with images at the bottom."""
    monkeypatch.chdir(tmp_path)

    def make(name: str, depth: int) -> Path:
        for each in ("set", *[name] * depth):
            os.mkdir(each)
            os.chdir(each)
        for each in ("0.png", "1.png"):
            save(Path(each), np.full((4, 4), 7, np.uint8))
        return tmp_path / "set"

    yield make
    # Step by step from the bottom: pytest has no way to remove what lies so deep.
    for name in os.listdir():
        os.unlink(name)
    while not os.path.samefile(".", tmp_path):
        os.chdir("..")
        for name in os.listdir():
            os.rmdir(name)


def test_folders_inside_each_other_are_no_recursion(nested: Callable[[str, int], Path]):
    deep = nested("d", 1001)
    images = load_images(deep, size=4)
    assert (len(images), images.class_names) == (1, ("d",))
    assert images.key(0).count("d/") == 1001
    assert (images[0][0] == 7).all()
    found = image_files([deep])
    assert [name for _, name in found] == ["d/" * 1001 + "0.png", "d/" * 1001 + "1.png"]
    assert (read_exactly(found[0][0]) == 7).all()


def test_a_path_that_is_too_long_is_a_sentence(nested: Callable[[str, int], Path]):
    deep = nested("x" * 200, 25)
    with pytest.raises(ValueError, match=r"a longer path than the system takes; expected folders that lie less"):
        load_images(deep)
    ((path, name),) = image_files([deep])
    assert len(name) > 3000
    with pytest.raises(OSError, match="File name too long"):
        read_exactly(path)


@pytest.mark.parametrize("source", ["x" * 5000, "x" * 5000 + ".tar", "x" * 5000 + ".parquet", "a\0b", "~nobody-at-all"])
def test_names_that_can_be_none_are_a_sentence(source: str):
    with pytest.raises(ValueError, match=r"does not exist|can't be read") as caught:
        load_images(source)
    assert len(str(caught.value)) < 600


# Links


def test_a_folder_that_is_there_twice_is_read_once_by_its_own_name(tmp_path: Path):
    save(tmp_path / "zoo" / "0.png", noise(4, 4))
    save(tmp_path / "zoo" / "in" / "1.png", noise(4, 4))
    save(tmp_path / ".hidden" / "2.png", noise(4, 4))
    for name, target in (("ant", "zoo"), ("zoo/back", ""), ("zoo/c", ".hidden"), ("elsewhere", ".hidden")):
        (tmp_path / name).symlink_to(tmp_path / target)
    assert sorted(names_of(tmp_path)) == ["elsewhere/2.png", "zoo/0.png", "zoo/in/1.png"]
    assert sorted(names_of(tmp_path, follow=False)) == ["zoo/0.png", "zoo/in/1.png"]


# What tells files from others


def make(kind: str, folder: Path, levels: range) -> Path:
    """A set of images of one level each, as files of the same sizes whatever the levels are."""
    images = {f"{place:02}.bmp": encoded(np.full((4, 4), level, np.uint8), "BMP") for place, level in enumerate(levels)}
    if kind == "archive":
        return write_tar(folder / "a.tar", images.items())
    if kind == "row groups":
        options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        return write_parquet(folder / "a.parquet", image=list(images.values()), options=options)
    folder.mkdir()
    for name, data in images.items():
        (folder / name).write_bytes(data)
    return folder


def digests(images: Images) -> tuple[str, str]:
    return images.digest(range(len(images))), images.digest(range(len(images)), times=False)


@pytest.mark.parametrize("kind", ["folder", "archive", "row groups"])
def test_a_digest_tells_a_copy_from_other_images(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    if kind == "row groups":
        monkeypatch.setattr(pytest.importorskip("vqvae.data.table"), "HELD_BYTES", 0)
    source = make(kind, tmp_path / "one", range(30))
    whole = digests(load_images(source))
    assert digests(load_images(source)) == whole
    assert whole[0] != whole[1]
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for path in (tmp_path / "two").iterdir():
        os.utime(path, ns=(1, 10**18))
    copied = load_images(tmp_path / "two" / source.relative_to(tmp_path / "one"))
    assert digests(copied)[0] != whole[0]
    assert digests(copied)[1] == whole[1]
    some = range(3, len(copied), 2)
    assert copied.digest(some, times=False) == load_images(source).digest(some, times=False) != whole[1]
    # One image fewer is told without the times too.
    assert digests(load_images(make(kind, tmp_path / "three", range(29))))[1] != whole[1]


def test_a_digest_without_times_tells_sizes_and_names(tmp_path: Path):
    for number in range(4):
        path = save(tmp_path / "train" / "a" / f"{number}.png", noise(6, 6))
    save(tmp_path / "test" / "a" / "0.png", noise(6, 6))
    images = load_images(tmp_path, size=4)
    before, data = digests(images)[1], path.read_bytes()
    path.write_bytes(data + b"\0")
    assert digests(images)[1] != before
    path.write_bytes(data)
    assert digests(images)[1] == before
    path.rename(path.with_stem("5"))
    assert digests(load_images(tmp_path, size=4))[1] != before


def test_digests_with_times_are_those_that_files_hold_already(tmp_path: Path):
    """Shards of codes keep them."""
    black = encoded(np.zeros((4, 4), np.uint8), "BMP")
    members = [("0.bmp", black), ("0.cls", b"dog"), ("1.bmp", black), ("1.cls", b"cat")]
    for part in ("train", "test"):
        write_tar(tmp_path / "archives" / f"{part}.tar", members, format=tarfile.USTAR_FORMAT)
        save(tmp_path / "images" / part / "00.bmp", np.zeros((4, 4), np.uint8))
    for path in tmp_path.rglob("*.*"):
        os.utime(path, ns=(0, 1_700_000_000_000_000_000))
    assert load_images(tmp_path / "images").digest(range(1)) == "c16dce889adfffb9dd926bf3367a0c8f"
    assert load_images(tmp_path / "archives").digest(range(2)) == "7d9a1639f110fdb28a3b2d74367d9a97"
