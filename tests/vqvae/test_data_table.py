"""Parquet and Hugging Face: images in the rows of a table."""

import errno
import io
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import chw, noise, save
from PIL import Image

from vqvae.data import load_images


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
    assert loaded.num_classes is None
    assert loaded.label_note == "1 of 6 images has no label, so none are used"
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


def test_labels_are_counted_where_some_lack(tmp_path: Path):
    image = [encoded(noise(4, 4))] * 9
    for label, lacking in (([0, None] * 4 + [1], 4), ([-1] * 9, 0), ([None] * 8 + [3], 8), ([None] * 9, 0)):
        loaded = load_images(write_parquet(tmp_path / "a.parquet", image=image, label=label))
        assert loaded.num_classes is None
        assert loaded.label_note == (f"{lacking} of 9 images have no label, so none are used" if lacking else "")


def test_a_disk_that_fails_under_a_row_group_is_tried_again(
    tmp_path: Path, lazy: list[int], monkeypatch: pytest.MonkeyPatch
):
    from pyarrow import parquet

    images = load_images(grouped(tmp_path / "a.parquet", [noise(5, 5, 3) for _ in range(12)], 4))

    def fails(*args: object, **options: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    images.column._held.clear()
    with monkeypatch.context() as patch:
        patch.setattr(parquet.ParquetFile, "read_row_group", fails)
        with pytest.raises(OSError, match="Input/output error") as caught:
            images.read([0])
        assert caught.value.filename == "row 0"
        assert [reason for _, reason in images.__getitems__([0]).skipped] == ["Input/output error"]
    assert len(images.read([0]).images) == 1


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


def grouped(path: Path, pixels: list[np.ndarray], group: int) -> Path:
    """A file of row groups of so many images each."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"bytes": encoded(each), "path": f"{i}.png"} for i, each in enumerate(pixels)]
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.table({"image": rows, "label": [0] * len(rows)}), path, row_group_size=group)
    return path


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


def test_a_large_table_is_read_group_by_group(tmp_path: Path, lazy: list[int], monkeypatch: pytest.MonkeyPatch):
    pixels = [noise(5, 5, 3) for _ in range(23)]
    grouped(tmp_path / "set" / "train-0.parquet", pixels[:11], 4)
    grouped(tmp_path / "set" / "train-1.parquet", pixels[11:], 5)
    grouped(tmp_path / "set" / "test.parquet", pixels[:1], 4)
    images = load_images(tmp_path / "set")
    lazy.clear()
    found = torch.cat([images.__getitems__([i]).images for i in range(23)])
    assert found.equal(torch.stack([chw(each) for each in pixels]))
    assert lazy == [1, 2, 3, 4, 5]  # the first was looked at when it was loaded
    assert images.__getitems__([22, 12, 21, 13]).images.equal(torch.stack([chw(pixels[i]) for i in (22, 12, 21, 13)]))
    assert lazy == [1, 2, 3, 4, 5, 3]
    assert [images.key(i) for i in (0, 11)] == ["row 0 (0.png)", "row 11 (0.png)"]
    assert len(images.column._held) == 2
    assert pickle.loads(pickle.dumps(images))[17][0].equal(images[17][0])
    lazy.clear()
    monkeypatch.setattr("vqvae.data.table.HELD_BYTES", 1 << 30)
    whole = load_images(tmp_path / "set")
    assert lazy == []
    assert whole[17][0].equal(images[17][0])
    assert whole.shape == images.shape


def test_a_damaged_row_group_is_skipped_and_read_once(tmp_path: Path, lazy: list[int]):
    pixels = [noise(5, 5, 3) for _ in range(12)]
    path = grouped(tmp_path / "set" / "train.parquet", pixels, 4)
    grouped(tmp_path / "set" / "test.parquet", pixels[:1], 4)
    images = load_images(tmp_path / "set")
    from pyarrow import parquet

    chunk = parquet.read_metadata(path).row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + 40] = bytes(40)
    path.write_bytes(data)
    lazy.clear()
    batch = images.__getitems__(range(12))
    assert [name for name, _ in batch.skipped] == ["row 4", "row 5", "row 6", "row 7"]
    assert all("row group 1 of" in reason and "\n" not in reason for _, reason in batch.skipped)
    assert batch.images.equal(torch.stack([chw(pixels[i]) for i in (0, 1, 2, 3, 8, 9, 10, 11)]))
    assert lazy == [1, 2]
