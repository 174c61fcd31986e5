"""What a folder holds, and which of it is to train on."""

import itertools
from pathlib import Path

import pytest
from image_files import both, encoded, noise, write_parquet, write_tar

from vqvae.data import load_images
from vqvae.data.splits import TEST, TRAIN, VALIDATION, layout

pytest.importorskip("pyarrow")
ENDINGS = {"images": "png", "parquet files": "parquet", "archives": "tar"}
NUM = 10
IMAGE = encoded(noise(4, 4))


def make(folder: Path, *names: str) -> Path:
    """Files by their endings: images, or archives and parquet files of ten; and folders, which end in "/"."""
    for name in names:
        path = folder / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if name.lower().endswith(".tar"):
            write_tar(path, [(f"{path.stem}-{number}.png", IMAGE) for number in range(NUM)])
        elif name.lower().endswith(".parquet"):
            write_parquet(path, image=[IMAGE] * NUM)
        elif not name.endswith("/"):
            path.write_bytes(IMAGE)
    return folder


def classes(*parts: str) -> list[str]:
    return [f"{part}/{name}/{number}.png" for part in parts for name in ("cat", "dog") for number in range(3)]


def lengths(folder: Path) -> tuple[int, int]:
    train, test = both(folder, size=4)
    return len(train), len(test)


# Folders of the parts, by any of their names


@pytest.mark.parametrize("names", ["train valid", "Train TEST", "training testing", "train2017 val2017"])
def test_split_folders_are_the_splits_and_no_classes(tmp_path: Path, names: str):
    make(tmp_path, *classes(*names.split()))
    (tmp_path / names.split()[1] / "cat" / "0.png").unlink()
    train, test = both(tmp_path, size=4)
    assert train.class_names == test.class_names == ("cat", "dog")
    assert [train.key(i) for i in range(len(train))] == [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(3)]
    assert len(test) == 5


@pytest.mark.parametrize("inside", ["cat/{}.png", "{}.png"])
@pytest.mark.parametrize("name", ["train", "Training"])
def test_a_training_folder_alone_is_the_set_and_no_class(tmp_path: Path, name: str, inside: str):
    make(tmp_path, *(f"{name}/{inside.format(number)}" for number in range(30)), "notes.txt")
    train, test = both(tmp_path, size=4)
    assert train.class_names == (("cat",) if "/" in inside else None)
    assert len(train) + len(test) == 30
    assert 1 <= len(test) <= 9
    alone = load_images(tmp_path / name, "test", size=4)
    assert [alone.key(i) for i in range(len(alone))] == [test.key(i) for i in range(len(test))]


@pytest.mark.parametrize(
    "pattern", ["{}/a.{}", "{}/inside/a.{}", "data/{}/a.{}", "{}-0.{}", "data/{}-00000-of-00001.{}"]
)
@pytest.mark.parametrize("beside", ["README.md", ".hidden/test/x.png", "logs/0.txt"])
def test_any_names_of_parts_make_the_same_set(tmp_path: Path, pattern: str, beside: str):
    casings = itertools.cycle((str, str.upper, str.capitalize))
    for (kind, ending), train, test in itertools.product(ENDINGS.items(), TRAIN, (*TEST, *VALIDATION)):
        if kind == "images" and not pattern.endswith("a.{}"):
            continue  # images are split by folders alone
        folder = tmp_path / f"{ending} {train} {test}"
        paths = [folder / pattern.format(next(casings)(word), ending) for word in (train, test)]
        for path in (*paths, folder / beside):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        found = layout(folder)
        assert found.kinds == [kind]
        assert [found.parts(kind, "test")[part].paths for part in ("train", "test")] == [[path] for path in paths]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        # A part inside a folder of its own name is no class.
        (["train/train/cat/0.png", "train/train/dog/0.png", "test/Test/cat/1.png"], ("cat", "dog")),
        ([f"train/train/{number}.png" for number in range(9)], None),
        # A class called train is one inside a training folder.
        ([f"train/{name}/{number}.png" for name in ("boat", "train") for number in range(5)], ("boat", "train")),
        # Nor are names parts that only begin so.
        ([f"{name}/0.png" for name in ("train_station", "train set", "zoo")], ("train set", "train_station", "zoo")),
        # Folders without data are neither classes nor parts.
        (["some/0.png", "train/", "test/", "logs/0.txt", "empty/", ".more/1.png"], ("some",)),
    ],
    ids=range(5),
)
def test_folders_that_are_classes(tmp_path: Path, names: list[str], expected: tuple[str, ...] | None):
    assert load_images(make(tmp_path, *names), size=4).class_names == expected


def test_validation_stands_for_test_and_is_left_aside_beside_it(tmp_path: Path):
    make(tmp_path, *classes("train", "valid"), "valid/cat/9.png")
    assert lengths(tmp_path) == (6, 7)
    make(tmp_path, "Test/1.png", "val/1.png")
    assert lengths(tmp_path) == (6, 1)
    for ending in ("tar", "parquet"):
        folder = make(tmp_path / ending, f"train.{ending}", f"val-1.{ending}", f"val-2.{ending}")
        assert lengths(folder) == (10, 20)
        make(folder, f"test.{ending}")
        assert lengths(folder) == (10, 10)


AMBIGUOUS = {
    "two for training": (classes("Train", "train"), r"Train/ and train/, which both are named as the part train"),
    "two for test": (classes("train", "test", "testing"), "test/ and testing/, which both are named as the part test"),
    "two for validation": (classes("train", "valid", "val"), "val/ and valid/, which both are named as the part valid"),
    "a class called train": (classes("train", "boat"), "holds train/, .* beside boat/; .* into a folder .*train"),
    "images beside": ([*classes("train"), "0.png"], r"holds train/, .* beside 0\.png; "),
    "archives beside": (["train/0.tar", "1.tar"], r"holds train/, .* beside 1\.tar; "),
    "nothing to train on": (classes("test", "valid"), "holds test/, .* nothing to train on; expected train beside it"),
    "two domains": (["trainA/0.png", "trainB/0.png", "testA/0.png"], "trainA/ and trainB/, which both"),
    "parts in classes": (["a/train/0.png", "a/test/0.png", "b/train/0.png"], r"a holds parts of a set \(test, tra"),
    "years and a class": (["train2017/0.png", "val2017/0.png", "more/0.png"], "holds train2017/, .* beside m"),
    "archives and images": (
        ["a.tar", "b/0.png"],
        r"holds archives \(a\.tar\) and images \(b/0\.png\); .*/a\.tar itself",
    ),
    "parquet and images": (["a.parquet", "0.png"], r"holds parquet files \(a\.parquet\) and images \(0\.png\)"),
    "parquet and archives": (["a.parquet", "x.tar"], r"holds archives \(x\.tar\) and parquet files \(a\.parquet\)"),
    "kinds in parts": (["train/a.tar", "test/0.png"], r"archives \(train/a\.tar\) and images \(test/0\.png\)"),
    "files that are no parts": (["train-0.tar", "more.tar"], r"train-0\.tar, .* beside more\.tar; expected names"),
    "files of two words": (["train-0.parquet", "training-1.parquet"], "which both are named as the part train"),
    "files of no training": (["test-0.parquet", "test-1.parquet"], r"holds test-0\.parquet, .* nothing to train on"),
    "sets side by side": (["a/train-0.tar", "b/train-0.tar"], "a and .*b both hold archives that are named as parts"),
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


def test_empty_parts_are_named(tmp_path: Path):
    make(tmp_path / "png", *classes("train"), ".test/0.png", "train/.cache/0.png")
    assert sum(lengths(tmp_path / "png")) == 6
    for ending, num in (("png", 6), ("tar", NUM), ("parquet", NUM)):
        folder = make(tmp_path / ending, "test/notes.txt", *([f"train/0.{ending}"] if ending != "png" else []))
        assert len(load_images(folder, size=4)) == num
        with pytest.raises(ValueError, match=r"test holds no .*, and is named as a part of a set"):
            load_images(folder, "test", size=4)


def test_links_are_parts_too_but_not_to_each_other(tmp_path: Path):
    make(tmp_path, *classes("elsewhere/some", "elsewhere/others", "gone/train"), "set/")
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


# Folders of parquet files and of archives


@pytest.mark.parametrize("ending", ["tar", "parquet"])
@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("data/train-00000-of-00002 data/train-00001-of-00002 data/test-00000-of-00001", (20, 10)),
        ("train/b train/a valid/c", (20, 10)),
        ("train/x/0000 test/x/0000", (10, 10)),
        ("TRAIN Testing", (10, 10)),
        ("trainset-1 trainset-2 valset", (20, 10)),
        ("part-0 part-1", None),
        ("x/0 y/0", None),
        ("train/0 train/1", None),
    ],
)
def test_folders_of_parquet_files_and_archives_are_sets(tmp_path: Path, ending: str, names: str, expected: tuple):
    train, test = lengths(make(tmp_path, *(f"{name}.{ending}" for name in names.split()), "README.md"))
    if expected is None:  # a tenth of all is held out
        assert train + test == 20
        assert 1 <= test <= 10
    else:
        assert (train, test) == expected


def test_keys_say_which_archive_where_several_have_its_name(tmp_path: Path):
    sets = both(make(tmp_path, "x/0.tar", "y/0.tar"))
    keys = {images.key(i) for images in sets for i in range(len(images))}
    assert keys == {f"{part}/0.tar/0-{number}.png" for part, number in itertools.product("xy", range(NUM))}


def test_folders_may_be_named_like_files(tmp_path: Path):
    make(tmp_path / "set.parquet", "part-00000.parquet", "part-00001.parquet", "_SUCCESS", ".part-00000.parquet.crc")
    assert sum(lengths(tmp_path / "set.parquet")) == 20
    make(tmp_path / "set.tar", *classes("some"))
    assert sum(lengths(tmp_path / "set.tar")) == 6
