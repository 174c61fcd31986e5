"""What a folder holds, and which of it is to train on."""

import io
import itertools
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import noise
from PIL import Image

from vqvae.data import load_images
from vqvae.data.folder import image_folder
from vqvae.data.splits import TEST, TRAIN, VALIDATION, layout
from vqvae.data.tars import image_archives

pyarrow = pytest.importorskip("pyarrow")
ENDINGS = {"images": "png", "parquet files": "parquet", "archives": "tar"}
NUM = 10


def png() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(noise(4, 4)).save(stream, "PNG")
    return stream.getvalue()


def make(folder: Path, *names: str) -> Path:
    """Files by their endings: images, or archives and parquet files of ten; and folders, which end in "/"."""
    from pyarrow import parquet

    for name in names:
        path = folder / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if name.lower().endswith(".tar"):
            with tarfile.open(path, "w") as archive:
                for number in range(NUM):
                    member = tarfile.TarInfo(f"{path.stem}-{number}.png")
                    data = png()
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        elif name.lower().endswith(".parquet"):
            parquet.write_table(pyarrow.table({"image": [png() for _ in range(NUM)]}), path)
        elif name.lower().endswith(".png"):
            path.write_bytes(png())
        elif not name.endswith("/"):
            path.write_text("something else")
    return folder


def classes(*parts: str) -> list[str]:
    return [f"{part}/{name}/{number}.png" for part in parts for name in ("cat", "dog") for number in range(3)]


def lengths(folder: Path) -> tuple[int, int]:
    train, test = (len(load_images(folder, split, size=4)) for split in ("train", "test"))
    return train, test


# Case 2: folders of the parts, by any of their names


@pytest.mark.parametrize("names", ["train valid", "Train TEST", "training testing", "train2017 val2017"])
def test_case_02_split_folders_are_the_splits_and_no_classes(tmp_path: Path, names: str):
    make(tmp_path, *classes(*names.split()))
    (tmp_path / names.split()[1] / "cat" / "0.png").unlink()
    train, test = (load_images(tmp_path, split, size=4) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("cat", "dog")
    assert [train.key(i) for i in range(len(train))] == [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(3)]
    assert len(test) == 5
    assert image_folder(tmp_path, "test", size=4).class_names == ("cat", "dog")


@pytest.mark.parametrize("inside", ["cat/{}.png", "{}.png"])
@pytest.mark.parametrize("name", ["train", "Training"])
def test_case_02_a_training_folder_alone_is_the_set_and_no_class(tmp_path: Path, name: str, inside: str):
    make(
        tmp_path,
        *(f"{name}/{inside.format(number)}" for number in range(30)),
        f"{name}/dog/0.png" if "/" in inside else "notes.txt",
    )
    train, test = (load_images(tmp_path, split, size=4) for split in ("train", "test"))
    assert train.class_names == (("cat", "dog") if "/" in inside else None)
    assert len(train) + len(test) == (31 if "/" in inside else 30)
    assert 1 <= len(test) <= 9
    alone = load_images(tmp_path / name, "test", size=4)
    assert [alone.key(i) for i in range(len(alone))] == [test.key(i) for i in range(len(test))]


CASINGS = (str, str.upper, str.capitalize)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(TRAIN),
    st.sampled_from((*TEST, *VALIDATION)),
    st.sampled_from(CASINGS),
    st.sampled_from(CASINGS),
    st.sampled_from(list(ENDINGS)),
    st.sampled_from(["{}/a.{}", "{}/inside/a.{}", "data/{}/a.{}", "{}-0.{}", "data/{}-00000-of-00001.{}"]),
    st.sampled_from(["", "README.md", ".hidden/test/x.png", "logs/0.txt"]),
)
def test_any_names_of_parts_make_the_same_set(
    tmp_path: Path, train: str, test: str, one: object, other: object, kind: str, pattern: str, beside: str
):
    if kind == "images" and not pattern.endswith("a.{}"):
        return  # images are split by folders alone
    folder = tmp_path / str(len(os.listdir(tmp_path)))
    names = [pattern.format(casing(word), ENDINGS[kind]) for casing, word in ((one, train), (other, test))]
    for name in (*names, beside):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch() if name else None
    found = layout(folder)
    assert found.kinds == [kind]
    parts = found.parts(kind, "test")
    assert [[path.relative_to(folder).as_posix() for path in parts[part].paths] for part in ("train", "test")] == [
        [name] for name in names
    ]


def test_a_part_inside_a_folder_of_its_own_name_is_no_class(tmp_path: Path):
    make(
        tmp_path,
        *(f"train/train/{name}/0.png" for name in ("cat", "dog")),
        "test/Test/cat/1.png",
        "test/Test/dog/1.png",
    )
    assert lengths(tmp_path) == (2, 2)
    assert load_images(tmp_path, size=4).class_names == ("cat", "dog")
    make(tmp_path / "alone", *(f"train/train/{number}.png" for number in range(9)))
    assert sum(lengths(tmp_path / "alone")) == 9
    assert load_images(tmp_path / "alone", size=4).class_names is None


def test_validation_stands_for_test_and_is_left_aside_beside_it(tmp_path: Path):
    make(tmp_path, *classes("train", "valid"), "valid/cat/9.png")
    assert lengths(tmp_path) == (6, 7)
    make(tmp_path, "Test/1.png", "val/1.png")
    assert lengths(tmp_path) == (6, 1)
    for ending in ("tar", "parquet"):
        make(tmp_path / ending, f"train.{ending}", f"dev.{ending}")
        assert lengths(tmp_path / ending) == (10, 10)
        (tmp_path / ending / f"dev.{ending}").rename(tmp_path / ending / f"val-1.{ending}")
        make(tmp_path / ending, f"val-2.{ending}")
        assert lengths(tmp_path / ending) == (10, 20)
        make(tmp_path / ending, f"test.{ending}")
        assert lengths(tmp_path / ending) == (10, 10)


AMBIGUOUS = {
    "two for training": (classes("Train", "train"), r"Train/ and train/, which both are named as the part train"),
    "two for test": (classes("train", "test", "testing"), r"test/ and testing/, which both are named as the part test"),
    "two for validation": (
        classes("train", "valid", "val"),
        r"val/ and valid/, which both are named as the part valid",
    ),
    "a class called train": (classes("train", "boat"), r"holds train/, .* beside boat/; .* into a folder .*train"),
    "images beside": ([*classes("train"), "0.png"], r"holds train/, .* beside 0\.png; "),
    "archives beside": (["train/0.tar", "1.tar"], r"holds train/, .* beside 1\.tar; "),
    "nothing to train on": (classes("test", "valid"), r"holds test/, .* nothing to train on; expected train beside it"),
    "only a test part": (classes("Test"), r"holds Test/, .* nothing to train on"),
    "two domains": (["trainA/0.png", "trainB/0.png", "testA/0.png"], r"trainA/ and trainB/, which both"),
    "parts inside classes": (
        ["a/train/0.png", "a/test/0.png", "b/train/0.png"],
        r"a holds parts of a set \(test, tra",
    ),
    "years and a class": (
        [f"{name}/0.png" for name in ("train2017", "val2017", "more")],
        r"holds train2017/, .* beside m",
    ),
    "archives and images": (["a.tar", "b/0.png"], r"holds archives \(a\.tar\) and images \(b/0\.png\); expected one"),
    "parquet and images": (["a.parquet", "0.png"], r"holds parquet files \(a\.parquet\) and images \(0\.png\)"),
    "parquet and archives": (["a.parquet", "x.tar"], r"holds archives \(x\.tar\) and parquet files \(a\.parquet\)"),
    "other kinds in parts": (
        ["train/a.tar", "test/0.png"],
        r"holds archives \(train/a\.tar\) and images \(test/0\.png\)",
    ),
    "files that are no parts": (
        ["train-0.tar", "more.tar"],
        r"holds train-0\.tar, .* beside more\.tar; expected names",
    ),
    "files of two words": (["train-0.parquet", "training-1.parquet"], r"which both are named as the part train"),
    "files in two cases": (["train-0.tar", "Train-1.tar"], r"Train-1\.tar and train-0\.tar, which both"),
    "files of no training": (["test-0.parquet", "test-1.parquet"], r"holds test-0\.parquet, .* nothing to train on"),
    "sets side by side": (["a/train-0.tar", "b/train-0.tar"], r"a and .*b both hold archives that are named as parts"),
    "archives at two depths": (["0.tar", "old/1.tar"], r"holds 0\.tar and, in a folder inside, old/1\.tar; expected"),
}


@pytest.mark.parametrize("name", list(AMBIGUOUS))
def test_what_can_be_read_in_two_ways_is_refused(tmp_path: Path, name: str):
    names, message = AMBIGUOUS[name]
    make(tmp_path, *names)
    for split in ("train", "test"):
        with pytest.raises(ValueError, match=message) as caught:
            load_images(tmp_path, split, size=4)
        assert "\n" not in str(caught.value)


def test_a_class_called_train_is_one_inside_a_training_folder(tmp_path: Path):
    make(tmp_path, *(f"train/{name}/{number}.png" for name in ("boat", "train") for number in range(5)))
    assert load_images(tmp_path, size=4).class_names == ("boat", "train")


def test_classes_whose_names_begin_so_are_classes(tmp_path: Path):
    make(tmp_path, *(f"{name}/{number}.png" for name in ("train_station", "train set", "zoo") for number in range(4)))
    assert load_images(tmp_path, size=4).class_names == ("train set", "train_station", "zoo")


def test_folders_without_data_are_no_classes_and_empty_parts_are_named(tmp_path: Path):
    make(tmp_path, *classes("train"), "logs/0.txt", "empty/", "0.txt", ".test/0.png", "train/.cache/0.png")
    assert sum(lengths(tmp_path)) == 6
    make(tmp_path, "test/notes.txt")
    assert len(load_images(tmp_path, size=4)) == 6
    with pytest.raises(ValueError, match=r"test holds no images, and is named as a part of a set; expected"):
        load_images(tmp_path, "test", size=4)
    make(tmp_path / "other", "train/", "test/", *classes("some"))
    assert load_images(tmp_path / "other", size=4).class_names == ("some",)
    for ending in ("tar", "parquet"):
        make(tmp_path / ending, f"train/0.{ending}", "test/")
        assert len(load_images(tmp_path / ending)) == NUM
        with pytest.raises(ValueError, match=r"test holds no .*, and is named as a part"):
            load_images(tmp_path / ending, "test")


def test_links_are_parts_too_but_not_to_each_other(tmp_path: Path):
    make(tmp_path, *classes("elsewhere/some", "elsewhere/others"), "set/", "twice/", *classes("gone/train"))
    (tmp_path / "set" / "train").symlink_to(tmp_path / "elsewhere" / "some")
    (tmp_path / "set" / "val").symlink_to(tmp_path / "elsewhere" / "others")
    assert lengths(tmp_path / "set") == (6, 6)
    (tmp_path / "set" / "test").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"test/some/\w+ and .*train/\w+ lead to the same files; expected others"):
        load_images(tmp_path / "set", size=4)
    (tmp_path / "gone" / "test").symlink_to(tmp_path / "nowhere")
    assert len(load_images(tmp_path / "gone", size=4)) == 6
    with pytest.raises(ValueError, match="test holds no images"):
        load_images(tmp_path / "gone", "test", size=4)
    for ending in ("tar", "parquet"):
        make(tmp_path / ending, f"train-0.{ending}")
        (tmp_path / ending / f"test-0.{ending}").symlink_to(tmp_path / ending / f"train-0.{ending}")
        with pytest.raises(ValueError, match="lead to the same files; expected others to test on"):
            load_images(tmp_path / ending)


# Case 26: folders of parquet files and of archives


@pytest.mark.parametrize("ending", ["tar", "parquet"])
def test_case_26_folders_of_parquet_files_and_archives_are_sets(tmp_path: Path, ending: str):
    for number, (names, expected) in enumerate(
        (
            (["data/train-00000-of-00002.{}", "data/train-00001-of-00002.{}", "data/test-00000-of-00001.{}"], (20, 10)),
            (["train/b.{}", "train/a.{}", "valid/c.{}"], (20, 10)),
            (["train/x/0000.{}", "test/x/0000.{}", "README.md"], (10, 10)),
            (["TRAIN.{}", "Testing.{}"], (10, 10)),
            (["trainset-1.{}", "trainset-2.{}", "valset.{}"], (20, 10)),
        )
    ):
        folder = make(tmp_path / str(number), *(name.format(ending) for name in names))
        assert lengths(folder) == expected
    for name, names in (("parts", ["part-0", "part-1"]), ("deep", ["x/0", "y/0"]), ("alone", ["train/0", "train/1"])):
        train, test = lengths(make(tmp_path / name, *(f"{each}.{ending}" for each in names)))
        assert train + test == 20
        assert 1 <= test <= 10


def test_keys_say_which_archive_where_several_have_its_name(tmp_path: Path):
    make(tmp_path, "x/0.tar", "y/0.tar")
    sets = [image_archives(tmp_path, split) for split in ("train", "test")]
    keys = {images.key(i) for images in sets for i in range(len(images))}
    assert keys == {f"{part}/0.tar/0-{number}.png" for part, number in itertools.product("xy", range(NUM))}


def test_a_folder_that_ends_in_parquet_is_one_of_such_files(tmp_path: Path):
    make(tmp_path / "set.parquet", "part-00000.parquet", "part-00001.parquet", "_SUCCESS", ".part-00000.parquet.crc")
    assert sum(lengths(tmp_path / "set.parquet")) == 20
