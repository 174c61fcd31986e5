"""Parquet and Hugging Face: images in the rows of a table."""

import errno
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import both, chw, encoded, noise, save, write_parquet
from PIL import Image

from vqvae.data import load_images

pyarrow = pytest.importorskip("pyarrow")
OUTSIDE = "it names a file outside the folder of its data set, which is not read"


def row(name: object, pixels: np.ndarray | None = None) -> dict:
    """A row that names a file, with an image or without."""
    return {"bytes": None if pixels is None else encoded(pixels), "path": name}


def write_rows(path: Path, rows: list[dict], group: int = 2) -> Path:
    return write_parquet(path, image=rows, options={"row_group_size": group})


def write_named(path: Path, names: list[str | None]) -> Path:
    """Rows that name files, after one that holds an image."""
    return write_rows(path, [row("0.png", noise(4, 4)), *map(row, names)])


@pytest.fixture
def no_progress(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tables are read group by group; the groups that were read."""
    from vqvae.data import table

    read: list[int] = []
    once = table.RowGroups._read

    def noted(self: object, group: int) -> object:
        read.append(group)
        return once(self, group)

    monkeypatch.setattr(table, "HELD_BYTES", 0)
    monkeypatch.setattr(table.RowGroups, "_read", noted)
    return read


@pytest.fixture(params=["held", "in row groups"])
def held(request: pytest.FixtureRequest) -> None:
    """Both ways of reading a file."""
    if request.param == "in row groups":
        request.getfixturevalue("lazy")


@pytest.mark.usefixtures("no_progress")
@pytest.mark.parametrize("source", ["{}", "hf:{}"])
def test_parquet_as_hugging_face_writes_it(tmp_path: Path, source: str):
    datasets = pytest.importorskip("datasets")
    kinds = datasets.ClassLabel(names=["ant", "bee", "cow"])
    features = datasets.Features({"picture": datasets.Image(), "kind": kinds})
    pixels, labels = [noise(6, 9, 3) for _ in range(7)], [0, 2, 1, 1, 0, 0, 1]
    (tmp_path / "set").mkdir()
    for name, some in (("train-0-of-2", slice(3)), ("train-1-of-2", slice(3, 5)), ("test-0-of-1", slice(5, 7))):
        rows = {"picture": [Image.fromarray(each) for each in pixels[some]], "kind": labels[some]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / f"{name}.parquet")
    source = source.format(tmp_path / "set")
    train, test = both(source)
    assert train.shape == test.shape == (3, 6, 9)
    assert train.class_names == test.class_names == ("ant", "bee", "cow")
    batch = train.__getitems__([4, 0, 1])
    assert batch.images.equal(torch.stack([chw(pixels[i]) for i in (4, 0, 1)]))
    assert batch.labels.tolist() == [0, 0, 2]
    assert test[1][0].equal(chw(pixels[6]))
    assert load_images(source, size=4, channels=1)[0][0].shape == (1, 4, 4)
    assert pickle.loads(pickle.dumps(train))[3][0].equal(train[3][0])


@pytest.mark.usefixtures("no_progress")
def test_hugging_face_reads_a_folder_of_image_files_or_says_that_there_is_none(tmp_path: Path):
    pixels = {name: noise(4, 4, 3) for name in ("train/ant/0", "train/bee/1", "test/ant/2")}
    for name, each in pixels.items():
        save(tmp_path / "set" / f"{name}.png", each)
    images = load_images(f"hf:{tmp_path / 'set'}")
    assert (len(images), images.class_names) == (2, ("ant", "bee"))
    wanted = torch.stack([chw(pixels[name]) for name in ("train/ant/0", "train/bee/1")])
    assert images[:].images[images.labels.argsort()].equal(wanted)
    with pytest.raises(ValueError, match="can't be had from Hugging Face") as caught:
        load_images(f"hf:{tmp_path / 'nowhere'}")
    assert "\n" not in str(caught.value)


def test_parquet_of_plain_bytes_is_split_by_row(tmp_path: Path):
    pixels = [noise(4, 4) for _ in range(40)]
    path = write_parquet(tmp_path / "a.parquet", photo=[encoded(each) for each in pixels], label=[*range(4)] * 10)
    train, test = both(path)
    assert (train.shape, train.num_classes, train.class_names) == ((1, 4, 4), 4, None)
    assert 1 <= len(test) < 12
    found = {int(images.key(i)[4:]): images[i] for images in (train, test) for i in range(len(images))}
    assert len(train) + len(test) == len(found) == 40
    for number, (image, label) in found.items():
        assert image.equal(chw(pixels[number]))
        assert label == number % 4


def test_broken_rows_are_named_and_skipped(tmp_path: Path):
    pixels = noise(4, 4, 3)
    cut = {"bytes": encoded(noise(64, 64, 3))[:2000], "path": "cut.png"}
    rows = [row("good.png", pixels), cut, row(None), row("gone.png"), {"bytes": b"", "path": None}]
    write_parquet(tmp_path / "train.parquet", image=rows, label=[0, 1, 2, 3, -1])
    write_parquet(tmp_path / "validation.parquet", image=rows[:1], label=[0])
    loaded = load_images(tmp_path)
    assert loaded.num_classes is None
    assert loaded.label_note == "1 of 6 images has no label, so none are used"
    batch = loaded.__getitems__(range(5))
    assert batch.images.equal(chw(pixels)[None])
    assert [name for name, _ in batch.skipped] == ["row 1 (cut.png)", "row 2", "row 3 (gone.png)", "row 4"]
    with pytest.raises(ValueError, match=r"row 1 \(cut.png\) can't be read"):
        loaded[1]


IMAGE = encoded(noise(4, 4))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([{"text": ["x"], "number": [1]}], r"columns: text \(string\), number \(int64\); expected"),
        ([{"image": [{"bytes": {"bytes": b"x"}}] * 3}], "has no column of encoded images"),
        ([{"image": [b"broken"]}], "no readable image among"),
        ([{"image": [IMAGE]}], "none of them for split='test'"),
        ([{"image": [IMAGE]}, {"picture": [IMAGE]}], "encoded images in some files and not in all of them"),
        ([{"image": [IMAGE]}, {"image": ["text"]}], "encoded images in some files and not in all of them"),
    ],
)
def test_parquet_without_images_is_refused(tmp_path: Path, files: list[dict], message: str):
    for number, columns in enumerate(files):
        write_parquet(tmp_path / f"{number}.parquet", **columns)
    with pytest.raises(ValueError, match=message) as caught:
        load_images(tmp_path, "test")
    assert "\n" not in str(caught.value)


def test_a_damaged_parquet_file_is_refused(tmp_path: Path):
    path = write_parquet(tmp_path / "a.parquet", image=[IMAGE] * 9)
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


# Row groups


def grouped(path: Path, pixels: list[np.ndarray], group: int) -> Path:
    return write_rows(path, [row(f"{i}.png", each) for i, each in enumerate(pixels)], group)


def test_a_large_table_is_read_group_by_group(tmp_path: Path, lazy: list[int], monkeypatch: pytest.MonkeyPatch):
    pixels = [noise(5, 5, 3) for _ in range(23)]
    grouped(tmp_path / "train-0.parquet", pixels[:11], 4)
    grouped(tmp_path / "train-1.parquet", pixels[11:], 5)
    grouped(tmp_path / "test.parquet", pixels[:1], 4)
    images = load_images(tmp_path)
    lazy.clear()
    found = torch.cat([images.__getitems__([i]).images for i in range(23)])
    assert found.equal(torch.stack([chw(each) for each in pixels]))
    assert lazy == [1, 2, 3, 4, 5]  # the first was looked at when it was loaded
    assert images.__getitems__([22, 12, 21, 13]).images.equal(torch.stack([chw(pixels[i]) for i in (22, 12, 21, 13)]))
    assert lazy == [1, 2, 3, 4, 5, 3]  # two are held
    assert [images.key(i) for i in (0, 11)] == ["row 0 (0.png)", "row 11 (0.png)"]
    assert pickle.loads(pickle.dumps(images))[17][0].equal(images[17][0])
    lazy.clear()
    monkeypatch.setattr("vqvae.data.table.HELD_BYTES", 1 << 30)
    whole = load_images(tmp_path)
    assert lazy == []
    assert whole[17][0].equal(images[17][0])
    assert whole.shape == images.shape


def test_a_row_group_that_can_not_be_read(tmp_path: Path, lazy: list[int], monkeypatch: pytest.MonkeyPatch):
    from pyarrow import parquet

    def fails(*args: object, **options: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    pixels = [noise(5, 5, 3) for _ in range(12)]
    path = grouped(tmp_path / "train.parquet", pixels, 4)
    grouped(tmp_path / "test.parquet", pixels[:1], 4)
    images = load_images(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(parquet.ParquetFile, "read_row_group", fails)
        with pytest.raises(OSError, match="Input/output error") as caught:
            images.read([8])
        assert caught.value.filename == "row 8"
        assert [reason for _, reason in images.__getitems__([8]).skipped] == ["Input/output error"]
    assert len(images.read([8]).images) == 1  # a disk that failed is tried again
    chunk = parquet.read_metadata(path).row_group(1).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data = path.read_bytes()
    path.write_bytes(data[:start] + bytes(40) + data[start + 40 :])
    lazy.clear()
    batch = images.__getitems__(range(12))
    assert [name for name, _ in batch.skipped] == ["row 4", "row 5", "row 6", "row 7"]
    assert all("row group 1 of" in reason and "\n" not in reason for _, reason in batch.skipped)
    assert batch.images.equal(torch.stack([chw(pixels[i]) for i in (0, 1, 2, 3, 8, 9, 10, 11)]))
    assert lazy == [1, 2]  # each once


# Files that rows name


@pytest.mark.usefixtures("held")
def test_only_files_inside_the_folder_of_the_parquet_file_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, secret = tmp_path / "set", save(tmp_path / "secret.png", noise(4, 4))
    pixels = {name: noise(4, 4) for name in ("one.png", "in/two.png", "in/three.png")}
    for name, each in pixels.items():
        save(folder / name, each)
    (folder / "link.png").symlink_to(secret)
    (folder / "out").symlink_to(tmp_path)
    (folder / "inside.png").symlink_to(folder / "in" / "two.png")
    (folder / "text.png").write_text("password: swordfish")
    os.mkfifo(folder / "pipe.png")
    save(tmp_path / "set2" / "x.png", noise(4, 4))
    good = ["one.png", "in/two.png", str(folder / "in" / "three.png"), "in/../one.png", "./one.png", "inside.png"]
    outside = [str(secret), "../secret.png", "link.png", "out/secret.png", "/dev/zero", "../set2/x.png"]
    outside += ["in/../../secret.png", "/etc/passwd"]
    bad = {
        "in": "it is a folder and no regular file",
        "pipe.png": "it is a named pipe and no regular file",
        "gone.png": "No such file or directory",
    }
    others = [".", "..", "text.png", "a\0b", "x" * 5000, "https://example.org/x.png"]
    write_named(folder / "train.parquet", [*good, *outside, *bad, *others])
    write_named(folder / "test.parquet", [])
    monkeypatch.chdir(tmp_path)  # relative paths go out from the file, not from here
    for source in ("set", folder):
        images = load_images(source, size=4)
        batch = images[:]
        one, two, three = (chw(pixels[name]) for name in pixels)
        assert batch.images[1:].equal(torch.stack([one, two, three, one, one, two]))
        reasons = {name.partition("(")[2][:-1]: reason for name, reason in batch.skipped}
        assert list(reasons) == [*outside, *bad, *others]
        assert {name: reasons[name] for name in (*outside, *bad)} == {**dict.fromkeys(outside, OUTSIDE), **bad}
        assert not any("swordfish" in reason for reason in reasons.values())
        assert pickle.loads(pickle.dumps(images))[1][0].equal(images[1][0])


@pytest.mark.usefixtures("held")
def test_each_file_has_its_own_folder(tmp_path: Path):
    pixels = {part: noise(4, 4) for part in ("train", "test")}
    for part, other in (("train", "test"), ("test", "train")):
        save(tmp_path / part / "0.png", pixels[part])
        write_named(tmp_path / part / "a.parquet", [f"../{other}/0.png", "0.png"])
        write_named(tmp_path / part / "b.parquet", ["0.png", str(tmp_path / other / "0.png")])
    for part, each in pixels.items():
        batch = load_images(tmp_path, part)[:]
        assert [reason for _, reason in batch.skipped] == [OUTSIDE] * 2
        assert [name.split(" (")[0] for name, _ in batch.skipped] == ["row 1", "row 5"]
        assert batch.images[[1, 3]].equal(torch.stack([chw(each)] * 2))


def test_images_beside_parquet_files_are_those_that_rows_name(tmp_path: Path):
    for number in range(4):
        save(tmp_path / "images" / f"{number}.png", np.full((4, 4), number, np.uint8))
    write_rows(tmp_path / "train.parquet", [row(f"images/{i}.png") for i in range(3)])
    write_rows(tmp_path / "val.parquet", [row("images/3.png")])
    assert [images[:].images[:, 0, 0, 0].tolist() for images in both(tmp_path)] == [[0, 1, 2], [3]]
    write_named(tmp_path / "train.parquet", [])
    with pytest.raises(ValueError, match=r"holds parquet files \(train\.parquet\) and images \(images/0\.png\)"):
        load_images(tmp_path)


def test_rows_that_name_no_file_are_named(tmp_path: Path):
    write_named(tmp_path / "test.parquet", [])
    write_named(tmp_path / "train.parquet", ["", None])
    assert [reason for _, reason in load_images(tmp_path)[:].skipped] == ["the row holds no image"] * 2
    for path in (5, b"0.png"):
        write_rows(tmp_path / "train.parquet", [row(path, noise(4, 4)), row(path)])
        ((_, reason),) = load_images(tmp_path)[:].skipped
        assert reason.startswith("it holds no bytes, and names no file (")


def test_a_digest_tells_files_that_rows_name_from_others(tmp_path: Path):
    save(tmp_path / "0.png", noise(4, 4))
    images = load_images(write_rows(tmp_path / "a.parquet", [row("0.png")] * 3))
    timed, bare = images.digest(range(2)), images.digest(range(2), times=False)
    os.utime(tmp_path / "0.png", ns=(0, 1))
    assert images.digest(range(2)) != timed
    assert images.digest(range(2), times=False) == bare
    save(tmp_path / "0.png", noise(9, 9))
    assert images.digest(range(2), times=False) != bare
    (tmp_path / "0.png").unlink()
    assert images.digest(range(2), times=False) not in (timed, bare)


@pytest.mark.usefixtures("no_progress")
def test_hugging_face_sets_read_files_in_their_folder_alone(tmp_path: Path):
    secret, inside = save(tmp_path / "secret.png", noise(4, 4)), tmp_path / "set" / "in.png"
    write_named(tmp_path / "set" / "train.parquet", [str(secret), str(inside), "in.png", "../secret.png"])
    write_named(tmp_path / "set" / "test.parquet", [])
    found = load_images(f"hf:{tmp_path / 'set'}")
    save(inside, np.full((4, 4), 9, np.uint8))  # now, or the folder is one of images to `datasets`
    batch = found[:]
    assert len(batch) == 3
    assert (batch.images[1:] == 9).all()
    assert [reason for _, reason in batch.skipped] == [OUTSIDE] * 2
