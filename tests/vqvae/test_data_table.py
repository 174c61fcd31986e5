"""Parquet and Hugging Face: images in the rows of a table."""

import errno
import io
import os
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


# Cases 14 and 30: files that rows name


def rows_of(names: list[str | None]) -> list[dict]:
    """Rows that name files instead of bytes, after one that holds an image."""
    return [
        {"bytes": encoded(noise(4, 4)), "path": "0.png"},
        *({"bytes": None, "path": name} for name in names),
    ]


def write_rows(path: Path, rows: list[dict]) -> Path:
    """In groups of two."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({"image": rows}), path, row_group_size=2)
    return path


@pytest.fixture(params=["held", "in row groups"])
def held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of reading a file."""
    if request.param == "in row groups":
        monkeypatch.setattr(pytest.importorskip("vqvae.data.table"), "HELD_BYTES", 0)


OUTSIDE = "it names a file outside the folder of its data set, which is not read"


@pytest.mark.usefixtures("held")
def test_case_14_only_files_inside_the_folder_of_the_parquet_file_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, secret = tmp_path / "set", tmp_path / "secret.png"
    save(secret, noise(4, 4))
    pixels = {name: noise(4, 4) for name in ("one.png", "in/two.png", "in/three.png")}
    for name, each in pixels.items():
        save(folder / name, each)
    (folder / "link.png").symlink_to(secret)
    (folder / "out").symlink_to(tmp_path)
    (folder / "inside.png").symlink_to(folder / "in" / "two.png")
    (folder / "text.png").write_text("password: swordfish")
    save(tmp_path / "set2" / "x.png", noise(4, 4))
    good = ["one.png", "in/two.png", str(folder / "in" / "three.png"), "in/../one.png", "./one.png", "inside.png"]
    bad = [str(secret), "../secret.png", "link.png", "out/secret.png", "/dev/zero", "../set2/x.png"]
    bad += [
        "in/../../secret.png",
        ".",
        "..",
        "in",
        "gone.png",
        "text.png",
        "a\0b",
        "x" * 5000,
        "https://example.org/x.png",
        "/etc/passwd",
    ]
    write_rows(folder / "train.parquet", rows_of([*good, *bad]))
    write_rows(folder / "test.parquet", rows_of([]))
    monkeypatch.chdir(tmp_path)  # relative paths go out from the file, not from here
    for source in ("set", folder):
        images = load_images(source, size=4)
        batch = images[:]
        one, two, three = (chw(pixels[name]) for name in ("one.png", "in/two.png", "in/three.png"))
        assert batch.images[1:].equal(torch.stack([one, two, three, one, one, two]))
        reasons = {name.partition("(")[2][:-1]: reason for name, reason in batch.skipped}
        assert list(reasons) == bad
        for name in bad[:7]:
            assert reasons[name] == OUTSIDE
        assert reasons["/etc/passwd"] == OUTSIDE
        assert reasons["in"] == "it is a folder and no regular file"
        assert reasons["gone.png"] == "No such file or directory"
        assert not any("swordfish" in reason for reason in reasons.values())
        assert pickle.loads(pickle.dumps(images))[1][0].equal(images[1][0])


@pytest.mark.usefixtures("held")
def test_case_14_each_file_has_its_own_folder(tmp_path: Path):
    pixels = {part: noise(4, 4) for part in ("train", "test")}
    for part, each in pixels.items():
        save(tmp_path / part / "0.png", each)
        other = "test" if part == "train" else "train"
        write_rows(tmp_path / part / "a.parquet", rows_of([f"../{other}/0.png", "0.png"]))
        write_rows(tmp_path / part / "b.parquet", rows_of(["0.png", str(tmp_path / other / "0.png")]))
    for part, each in pixels.items():
        batch = load_images(tmp_path, part)[:]
        assert [reason for _, reason in batch.skipped] == [OUTSIDE] * 2
        assert [name.split(" (")[0] for name, _ in batch.skipped] == ["row 1", "row 5"]
        assert batch.images[1].equal(chw(each))
        assert batch.images[3].equal(chw(each))


def test_case_30_relative_paths_go_out_from_the_parquet_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for place, level in (("set/images", 7), ("images", 200)):
        save(tmp_path / place / "0.png", np.full((4, 4), level, np.uint8))
    write_rows(tmp_path / "set" / "a.parquet", [{"bytes": None, "path": "images/0.png"}] * 2)
    for here in (tmp_path, tmp_path / "set"):
        monkeypatch.chdir(here)
        assert (load_images(tmp_path / "set" / "a.parquet")[0][0] == 7).all()


def test_case_08_a_digest_tells_files_that_rows_name_from_others(tmp_path: Path):
    save(tmp_path / "0.png", noise(4, 4))
    path = write_rows(tmp_path / "a.parquet", [{"bytes": None, "path": "0.png"}] * 3)
    images = load_images(path)
    timed, bare = images.digest(range(2)), images.digest(range(2), times=False)
    os.utime(tmp_path / "0.png", ns=(0, 1))
    assert images.digest(range(2)) != timed
    assert images.digest(range(2), times=False) == bare
    save(tmp_path / "0.png", noise(9, 9))
    assert images.digest(range(2), times=False) != bare
    (tmp_path / "0.png").unlink()
    gone = images.digest(range(2), times=False)
    assert gone not in (timed, bare)


def test_images_beside_parquet_files_are_those_that_rows_name(tmp_path: Path):
    for number in range(4):
        save(tmp_path / "images" / f"{number}.png", np.full((4, 4), number, np.uint8))
    write_rows(tmp_path / "train.parquet", [{"bytes": None, "path": f"images/{i}.png"} for i in range(3)])
    write_rows(tmp_path / "val.parquet", [{"bytes": None, "path": "images/3.png"}])
    assert load_images(tmp_path)[:].images[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert load_images(tmp_path, "test")[:].images[:, 0, 0, 0].tolist() == [3]
    write_rows(tmp_path / "train.parquet", rows_of([]))
    with pytest.raises(ValueError, match=r"holds parquet files \(train\.parquet\) and images \(images/0\.png\)"):
        load_images(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_case_14_rows_that_name_no_file_are_named(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    os.mkfifo(tmp_path / "pipe.png")
    write_rows(tmp_path / "train.parquet", rows_of(["pipe.png", "", None]))
    write_rows(tmp_path / "test.parquet", rows_of([]))
    reasons = [reason for _, reason in load_images(tmp_path)[:].skipped]
    assert reasons == ["it is a named pipe and no regular file", *["the row holds no image"] * 2]
    for path in (5, b"0.png"):
        rows = [{"bytes": encoded(noise(4, 4)), "path": path}, {"bytes": None, "path": path}]
        parquet.write_table(pyarrow.table({"image": rows}), tmp_path / "train.parquet")
        ((_, reason),) = load_images(tmp_path)[:].skipped
        assert reason.startswith("it holds no bytes, and names no file (")


@pytest.mark.usefixtures("no_progress")
def test_case_14_hugging_face_sets_read_files_in_their_folder_alone(tmp_path: Path):
    save(tmp_path / "secret.png", noise(4, 4))
    save(tmp_path / "set" / "in.png", np.full((4, 4), 9, np.uint8))
    inside, outside = str(tmp_path / "set" / "in.png"), str(tmp_path / "secret.png")
    write_rows(tmp_path / "set" / "train.parquet", rows_of([outside, inside, "in.png", "../secret.png"]))
    write_rows(tmp_path / "set" / "test.parquet", rows_of([]))
    (tmp_path / "set" / "in.png").rename(tmp_path / "in.png")  # or the folder is one of images to `datasets`
    found = load_images(f"hf:{tmp_path / 'set'}")
    (tmp_path / "in.png").rename(tmp_path / "set" / "in.png")
    batch = found[:]
    assert len(batch) == 3
    assert (batch.images[1:] == 9).all()
    assert [reason for _, reason in batch.skipped] == [OUTSIDE] * 2


# What files claim


def test_files_of_other_columns_are_refused(tmp_path: Path):
    write_parquet(tmp_path / "train-0.parquet", image=[encoded(noise(4, 4))] * 3)
    write_parquet(tmp_path / "train-1.parquet", picture=[encoded(noise(4, 4))] * 3)
    with pytest.raises(ValueError, match="has a column image of encoded images in some files and not in all of them"):
        load_images(tmp_path)
    write_parquet(tmp_path / "train-1.parquet", image=["text"] * 3)
    with pytest.raises(ValueError, match="in some files and not in all of them"):
        load_images(tmp_path)


def test_a_struct_in_the_place_of_bytes_is_no_image(tmp_path: Path):
    write_parquet(tmp_path / "a.parquet", image=[{"bytes": {"bytes": b"x"}}] * 3)
    with pytest.raises(ValueError, match="has no column of encoded images"):
        load_images(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "note", ["[" * 100_000, '{"info": {"features": {"image": 5, "label": {"_type": []}}}}', "{}", "9"]
)
def test_any_note_of_hugging_face_is_read_or_passed_over(tmp_path: Path, note: str):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"image": [encoded(noise(4, 4))] * 3, "label": [0, 1, 2]})
    parquet.write_table(table.replace_schema_metadata({"huggingface": note}), tmp_path / "a.parquet")
    assert load_images(tmp_path / "a.parquet").num_classes == 3
