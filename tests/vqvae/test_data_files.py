"""Only regular files are opened; folders of any depth; and what tells a set's files from others."""

import io
import os
import shutil
import socket
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import chw, noise, save
from PIL import Image

from vqvae.cli.reading import image_files, read_exactly
from vqvae.data import Images, load_images
from vqvae.data.decoding import read
from vqvae.data.files import names_of
from vqvae.data.folder import image_folder

posix = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")


# Case 20: what is no regular file


@pytest.fixture
def strange(tmp_path: Path) -> Iterator[Path]:
    """A folder with a pipe, a socket and a device that are named like images, and links to such and to nothing."""
    folder = tmp_path / "set" / "train"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "pipe.png")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "linked.png").symlink_to("pipe.png")
    (folder / "itself.png").symlink_to("itself.png")
    here = os.getcwd()
    os.chdir(folder)  # the names of sockets are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        os.chdir(here)
        yield folder


REASONS = {
    "pipe": "it is a named pipe and no regular file",
    "linked": "it is a named pipe and no regular file",
    "device": "it is a device and no regular file",
    "socket": "it is a socket and no regular file",
    "itself": "Too many levels of symbolic links",
}


@posix
def test_case_20_what_is_no_regular_file_is_named_and_not_opened(strange: Path):
    pixels = noise(4, 4)
    save(strange / "good.png", pixels)
    save(strange.parent / "test" / "0.png", pixels)
    images = load_images(strange.parent, size=4)
    batch = images.__getitems__(range(len(images)))
    assert batch.images.equal(chw(pixels)[None])
    assert dict(batch.skipped) == {f"{name}.png": reason for name, reason in REASONS.items()}


@posix
@pytest.mark.parametrize("name", list(REASONS))
def test_case_20_nor_by_those_who_read_one_file(strange: Path, name: str):
    path = strange / f"{name}.png"
    for reader in (read, read_exactly):
        with pytest.raises((ValueError, OSError)) as caught:
            reader(path)
        assert REASONS[name] in str(caught.value)
    assert (path, f"{name}.png") in image_files([strange])


@posix
@pytest.mark.parametrize("ending", ["tar", "parquet", "png", ""])
def test_case_20_a_source_that_is_a_pipe_is_refused(tmp_path: Path, ending: str):
    path = tmp_path / "set" / f"x.{ending}"
    path.parent.mkdir()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="it is a named pipe and no regular file"):
        load_images(path)
    if ending in ("tar", "parquet"):
        with pytest.raises(ValueError, match=r"x\..*it is a named pipe and no regular file"):
            load_images(path.parent)
    with pytest.raises(ValueError, match="it is a device and no regular file"):
        load_images("/dev/zero")


# Case 22: folders of any depth


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[Path]:
    """1,200 folders inside each other, with an image at the bottom."""
    here = os.getcwd()
    top = tmp_path / "set"
    top.mkdir()
    try:
        os.chdir(top)
        for _ in range(1200):
            os.mkdir("d")
            os.chdir("d")
        save(Path("0.png"), np.full((4, 4), 7, np.uint8))
        save(Path("1.png"), np.full((4, 4), 7, np.uint8))
        yield top
        os.chdir(top)
        for _ in range(1200):
            os.chdir("d")
        for name in os.listdir():
            os.unlink(name)
        for _ in range(1200):
            os.chdir("..")
            os.rmdir("d")
    finally:
        os.chdir(here)


def test_case_22_folders_inside_each_other_are_no_recursion(deep: Path):
    images = load_images(deep, size=4)
    assert (len(images), images.class_names) == (1, ("d",))
    assert images.key(0).count("d/") == 1200
    assert (images[0][0] == 7).all()
    found = image_files([deep])
    assert [name for _, name in found] == ["d/" * 1200 + "0.png", "d/" * 1200 + "1.png"]
    assert (read_exactly(found[0][0]) == 7).all()


def test_case_22_a_path_that_is_too_long_is_a_sentence(deep: Path):
    (deep / "d").rename(deep / ("x" * 200))
    long = deep / ("x" * 200)
    for number in range(13):  # each of 200 letters
        (deep / f"{number}").mkdir()
        long.rename(deep / f"{number}" / ("x" * 200))
        (deep / f"{number}").rename(deep / ("y" * 200))
        long = deep / ("y" * 200)
    try:
        with pytest.raises(ValueError, match=r"a longer path than the system takes; expected folders that lie less"):
            load_images(deep)
        ((path, name),) = image_files([deep])
        assert len(name) > 3000
        with pytest.raises(OSError, match="File name too long"):
            read_exactly(path)
    finally:
        for _ in range(13):
            inner = long / ("y" * 200) if (long / ("y" * 200)).exists() else long / ("x" * 200)
            inner.rename(deep / "next")
            os.rmdir(long)
            (deep / "next").rename(long)
        long.rename(deep / "d")


@pytest.mark.parametrize(
    "source", ["x" * 5000, "x" * 5000 + ".tar", "x" * 5000 + ".parquet", "a\0b", "~nobody-at-all/x"]
)
def test_names_that_can_be_none_are_a_sentence(source: str):
    with pytest.raises(ValueError, match=r"does not exist|can't be read") as caught:
        load_images(source)
    assert len(str(caught.value)) < 600


# Links


def test_a_folder_that_is_there_twice_is_read_once_by_its_own_name(tmp_path: Path):
    save(tmp_path / "zoo" / "0.png", noise(4, 4))
    save(tmp_path / "zoo" / "in" / "1.png", noise(4, 4))
    (tmp_path / "ant").symlink_to(tmp_path / "zoo")
    (tmp_path / "zoo" / "back").symlink_to(tmp_path)
    save(tmp_path / "elsewhere" / "2.png", noise(4, 4))
    for name in ("c", "b"):
        (tmp_path / "zoo" / name).symlink_to(tmp_path / "elsewhere")
    shutil.move(tmp_path / "elsewhere", tmp_path / ".hidden")
    (tmp_path / "elsewhere").symlink_to(tmp_path / ".hidden")
    assert sorted(names_of(tmp_path)) == ["elsewhere/2.png", "zoo/0.png", "zoo/in/1.png"]
    assert sorted(names_of(tmp_path, follow=False)) == ["zoo/0.png", "zoo/in/1.png"]


# Case 8: what tells files from others


def encoded(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "BMP")
    return stream.getvalue()


BLACK = encoded(np.zeros((4, 4), np.uint8))


def make(kind: str, folder: Path, levels: list[int]) -> Path:
    """A set of images of one level each, as files of the same sizes whatever the levels are."""
    folder.mkdir(exist_ok=True, parents=True)
    images = {f"{place:02}.bmp": encoded(np.full((4, 4), level, np.uint8)) for place, level in enumerate(levels)}
    if kind == "folder":
        for name, data in images.items():
            (folder / name).write_bytes(data)
        return folder
    if kind == "archive":
        with tarfile.open(folder / "a.tar", "w") as archive:
            for name, data in images.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        return folder / "a.tar"
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = pyarrow.table({"image": list(images.values())})
    parquet.write_table(rows, folder / "a.parquet", compression="none", use_dictionary=False, write_statistics=False)
    return folder / "a.parquet"


def digests(images: Images) -> tuple[str, str]:
    return images.digest(range(len(images))), images.digest(range(len(images)), times=False)


@pytest.mark.parametrize("kind", ["folder", "archive", "row groups"])
def test_case_08_a_digest_without_times_tells_a_copy_from_other_images(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    if kind == "row groups":
        monkeypatch.setattr(pytest.importorskip("vqvae.data.table"), "HELD_BYTES", 0)
    source = make(kind, tmp_path / "one", list(range(30)))
    whole = digests(load_images(source))
    assert digests(load_images(source)) == whole
    assert whole[0] != whole[1]
    copy = tmp_path / "two"
    shutil.copytree(tmp_path / "one", copy)
    for path in (*copy.rglob("*.*"), *([copy] if kind == "folder" else [])):
        os.utime(path, ns=(1, 10**18))
    copied = load_images(copy if kind == "folder" else copy / source.name)
    timed, bare = digests(copied)
    assert timed != whole[0]
    assert bare == whole[1]
    some = range(3, len(copied), 2)
    assert copied.digest(some, times=False) == load_images(source).digest(some, times=False) != bare
    # One image fewer, or another name, is told without the times too.
    fewer = load_images(make(kind, tmp_path / "three", list(range(29))))
    assert digests(fewer)[1] != whole[1]


def test_case_08_a_digest_without_times_tells_sizes_and_names(tmp_path: Path):
    for number in range(4):
        save(tmp_path / "train" / "a" / f"{number}.png", noise(6, 6))
    save(tmp_path / "test" / "a" / "0.png", noise(6, 6))
    images = image_folder(tmp_path, size=4)
    before = digests(images)[1]
    path = tmp_path / "train" / "a" / "2.png"
    data = path.read_bytes()
    path.write_bytes(data + b"\0")
    assert digests(images)[1] != before
    path.write_bytes(data)
    assert digests(images)[1] == before
    path.rename(path.with_stem("5"))
    assert digests(image_folder(tmp_path, size=4))[1] != before


def test_digests_with_times_are_those_that_files_hold_already(tmp_path: Path):
    """Shards of codes keep them."""
    for part in ("train", "test"):
        make("folder", tmp_path / "images" / part, [0])
        (tmp_path / "archives").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "archives" / f"{part}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for name, data in (("0.bmp", BLACK), ("0.cls", b"dog"), ("1.bmp", BLACK), ("1.cls", b"cat")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    for path in tmp_path.rglob("*.*"):
        os.utime(path, ns=(0, 1_700_000_000_000_000_000))
    assert load_images(tmp_path / "images").digest(range(1)) == "c16dce889adfffb9dd926bf3367a0c8f"
    assert load_images(tmp_path / "archives").digest(range(2)) == "7d9a1639f110fdb28a3b2d74367d9a97"


@settings(max_examples=40, deadline=None)
@given(st.sets(st.lists(st.sampled_from(["a", "b", ".c", "d.png", "ä"]), min_size=1, max_size=4).map(tuple)))
def test_names_are_all_that_is_there_and_not_hidden(
    tmp_path_factory: pytest.TempPathFactory, paths: set[tuple[str, ...]]
):
    folder = tmp_path_factory.mktemp("names")
    files = {"/".join((*path, "f")) for path in paths}
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    assert sorted(names_of(folder)) == sorted(name for name in files if ".c" not in name.split("/"))
