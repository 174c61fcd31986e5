"""Labels: numbers or names, of all kinds of sources; and what is said of those that cannot be used."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import noise, save
from PIL import Image

from vqvae.data import Images, ImageTensors, load_images
from vqvae.data.labels import MAX_LABEL, UNUSABLE, Classes, Given

pyarrow = pytest.importorskip("pyarrow")


def encoded() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(noise(4, 4)).save(stream, "PNG")
    return stream.getvalue()


def write_parquet(path: Path, labels: object, name: str = "label") -> Path:
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({"image": [encoded()] * len(labels), name: labels}), path)
    return path


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def both(source: Path) -> tuple[Images, Images]:
    return load_images(source), load_images(source, "test")


def told(source: Path) -> dict[int, int]:
    """Of each row of a single file its label."""
    found = {int(images.key(i)[4:]): images[i][1] for images in both(source) for i in range(len(images))}
    return dict(sorted(found.items()))


# Case 4: labels that are there


WORDS = ["dog", "cat", " cat \n", "Zoo", "ant", "dog", "ä", "cat", "ant", "dog"]
CLASSES = ("Zoo", "ant", "cat", "dog", "ä")


@pytest.mark.parametrize(
    "kind", ["string", "large_string", "string_view", "dictionary", "dictionary of large strings", "two chunks"]
)
@pytest.mark.parametrize("name", ["label", "labels", "Label"])
def test_case_04_a_column_of_text_holds_names_of_classes(tmp_path: Path, kind: str, name: str):
    labels = pyarrow.array(WORDS)
    if kind == "dictionary of large strings":
        labels = labels.cast(pyarrow.large_string()).dictionary_encode()
    elif kind == "dictionary":
        labels = labels.dictionary_encode()
    elif kind == "two chunks":
        labels = pyarrow.chunked_array([labels[:3].dictionary_encode(), labels[3:].dictionary_encode()])
    else:
        labels = labels.cast(getattr(pyarrow, kind)())
    path = write_parquet(tmp_path / "a.parquet", labels, name)
    assert told(path) == {row: CLASSES.index(word.strip()) for row, word in enumerate(WORDS)}
    for images in both(path):
        assert (images.num_classes, images.class_names, images.label_note) == (5, CLASSES, "")


def test_case_04_names_are_numbered_over_all_parts(tmp_path: Path):
    write_parquet(tmp_path / "train-0.parquet", ["cat", "dog"])
    write_parquet(tmp_path / "train-1.parquet", ["emu"])
    write_parquet(tmp_path / "test.parquet", ["ant", "emu"])
    train, test = both(tmp_path)
    assert train.class_names == test.class_names == ("ant", "cat", "dog", "emu")
    assert (train.labels.tolist(), test.labels.tolist()) == ([1, 2, 3], [0, 3])


def test_case_04_text_in_the_json_of_an_archive_names_a_class(tmp_path: Path):
    members = {}
    for i, word in enumerate(["dog", "cat", "dog", " cat"]):
        members |= {f"{i}.png": encoded(), f"{i}.json": json.dumps({"label": word, "caption": "x"}).encode()}
    images = load_images(write_tar(tmp_path / "train.tar", members).parent)
    assert images.class_names == ("cat", "dog")
    assert {images.key(i)[10]: images[i][1] for i in range(len(images))} == {
        str(i): label for i, label in enumerate([1, 0, 1, 0]) if any(images.key(j)[10] == str(i) for j in range(3))
    }


@pytest.mark.parametrize("ending", ["CLS", "Cls", "JSON"])
def test_case_04_endings_of_labels_may_be_in_capitals(tmp_path: Path, ending: str):
    members = {}
    for i in range(3):
        text = str(i) if ending != "JSON" else json.dumps({"label": i})
        members |= {f"{i}.PNG": encoded(), f"{i}.{ending}": text.encode()}
    write_tar(tmp_path / "train.tar", members)
    write_tar(tmp_path / "test.tar", {"0.png": encoded(), "0.cls": b"0"})
    assert load_images(tmp_path).labels.tolist() == [0, 1, 2]


# What cannot be used is said


COLUMNS = {
    "floats": (
        np.arange(10) / 1,
        "10 of 10 labels can't be used (the column label is of double, expected whole numbers",
    ),
    "nested": ([[1]] * 10, "10 of 10 labels can't be used (the column label is of list<"),
    "structs": ([{"a": 1}] * 10, "10 of 10 labels can't be used (the column label is of struct<"),
    "booleans": ([True] * 10, "10 of 10 labels can't be used (the column label is of bool"),
    "bytes": ([b"a"] * 10, "10 of 10 labels can't be used (the column label is of binary"),
    "times": (
        pyarrow.array([0] * 10, pyarrow.timestamp("s")),
        "10 of 10 labels can't be used (the column label is of time",
    ),
    "lacking": ([1, None] * 5, "5 of 10 images have no label, so none are used"),
    "unknown": ([1] * 9 + [-1], "1 of 10 images has no label, so none are used"),
    "empty names": (["a"] * 7 + ["", " ", None], "3 of 10 images have no label, so none are used"),
    "no text": (
        ["a"] * 9 + ["a\0b"],
        "1 of 10 labels can't be used (in the column label are texts that can be no names)",
    ),
    "long text": (["a"] * 9 + ["x" * 1024], "1 of 10 labels can't be used (in the column label are texts"),
}


@pytest.mark.parametrize("name", list(COLUMNS))
def test_case_04_a_column_that_holds_no_labels_is_named(tmp_path: Path, name: str):
    labels, note = COLUMNS[name]
    for images in both(write_parquet(tmp_path / "a.parquet", labels)):
        assert (images.labels, images.num_classes, images.class_names) == (None, None, None)
        assert images.label_note.startswith(note)
        assert images.label_note.endswith("so none are used")
        assert len(images[0]) == 1


@pytest.mark.parametrize(
    "ids",
    [
        [1_900_000_000, 3],
        np.array([2**63 + 5, 3], np.uint64),
        [MAX_LABEL + 1, 0],
        np.array([2**31 - 1, 3], np.int32),
    ],
    ids=["large", "unsigned", "one more", "int32"],
)
def test_case_21_labels_that_are_identifiers_are_not_used_and_named(tmp_path: Path, ids: object):
    path = write_parquet(tmp_path / "a.parquet", pyarrow.array(list(ids) * 5, pyarrow.array(ids).type))
    for images in both(path):
        assert images.num_classes is None
        assert f"labels go up to {min(int(max(ids)), 2**63 - 1):,} (5 of 10 are above 1,048,575" in images.label_note
        assert images.label_note.endswith(", so none are used; number them from 0")
    members = {}
    for i, each in enumerate(ids):
        members |= {f"{i}.png": encoded(), f"{i}.cls": str(each).encode()}
    archive = load_images(write_tar(tmp_path / "a.tar", members))
    assert archive.num_classes is None
    assert "(1 of 2 are above 1,048,575" in archive.label_note


def test_case_21_the_largest_number_of_classes_is_used(tmp_path: Path, untyped: None):
    path = write_parquet(tmp_path / "a.parquet", [MAX_LABEL, 0])
    assert load_images(path).num_classes == 1 << 20
    images = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    assert ImageTensors(images, torch.tensor([0, MAX_LABEL])).num_classes == 1 << 20
    with pytest.raises(ValueError, match="got labels from 0 to 2000000000; expected 0 to 1048575"):
        ImageTensors(images, torch.tensor([0, 2_000_000_000]))


def test_labels_of_two_kinds_are_named(tmp_path: Path):
    write_parquet(tmp_path / "train-0.parquet", [0, 1])
    write_parquet(tmp_path / "train-1.parquet", ["a", "b", "c"])
    write_parquet(tmp_path / "test.parquet", [1])
    for images in both(tmp_path):
        assert images.labels is None
        assert images.label_note == "3 of 6 labels are names and 3 are numbers, so none are used"
    members = {"a.png": encoded(), "a.cls": b"7", "b.png": encoded(), "b.json": b'{"label": "cat"}'}
    assert "1 of 2 labels are names and 1 are" in load_images(write_tar(tmp_path / "a.tar", members)).label_note


def test_a_part_without_the_column_lacks_labels(tmp_path: Path):
    write_parquet(tmp_path / "train-0.parquet", [0, 1])
    write_parquet(tmp_path / "train-1.parquet", [0, 1], "other")
    write_parquet(tmp_path / "test.parquet", [0])
    assert load_images(tmp_path).label_note == "2 of 5 images have no label, so none are used"
    write_parquet(tmp_path / "train-0.parquet", [0, 1], "other")
    assert load_images(tmp_path, "test").label_note == "4 of 5 images have no label, so none are used"


def test_a_column_that_can_be_used_goes_before_one_that_cannot(tmp_path: Path):
    from pyarrow import parquet

    table = pyarrow.table({"image": [encoded()] * 4, "label": [0.5] * 4, "labels": [0, 1, 2, 3]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert load_images(tmp_path / "a.parquet").num_classes == 4


def test_names_for_too_few_numbers_are_named(tmp_path: Path):
    from pyarrow import parquet

    noted = {"info": {"features": {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["a", "b"]}}}}
    table = pyarrow.table({"image": [encoded()] * 4, "label": [0, 1, 2, 1]})
    for names, expected in ((["a", "b"], None), (["a", "b", "c", "d"], ("a", "b", "c", "d")), ("abc", None)):
        noted["info"]["features"]["label"]["names"] = names
        parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(noted)}), tmp_path / "a.parquet")
        images = load_images(tmp_path / "a.parquet")
        assert images.class_names == expected
        assert images.num_classes == (3 if expected is None else 4)
        assert images.label_note == (
            "labels go up to 2, and the column label has names for 2 classes: no names are used"
            if names == ["a", "b"]
            else ""
        )


def test_images_outside_of_class_folders_are_counted(tmp_path: Path):
    for name in ("cat/0", "dog/1", "dog/2", "3", "4"):
        save(tmp_path / f"{name}.png", noise(4, 4))
    for images in both(tmp_path):
        assert images.labels is None
        assert images.label_note == "2 of 5 images have no label, so none are used"


def test_labels_of_no_image_are_named(tmp_path: Path):
    members = {"a.png": encoded(), "a.label.cls": b"1", "b.png": encoded(), "c.cls": b"1"}
    images = load_images(write_tar(tmp_path / "a.tar", members))
    assert images.label_note == "2 labels belong to no image by their names, as a.label.cls, so none are used"
    members = {"a.png": encoded(), "a.cls": b"1", "a.CLS": b"2", "b.png": encoded(), "b.cls": b"0"}
    images = load_images(write_tar(tmp_path / "a.tar", members))
    assert images.label_note == "1 of 2 labels can't be used (the first is that of a.cls in a.tar), so none are used"


NAMES = st.sampled_from(["a", "b", "cat", "ä"])
ANY = st.one_of(st.none(), st.just(UNUSABLE), st.integers(0, MAX_LABEL + 5), NAMES, st.just(10**30))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([ANY, NAMES, st.integers(0, 4)]).flatmap(lambda some: st.lists(st.lists(some, max_size=5))))
def test_labels_are_used_whole_or_not_at_all(parts: list[list]):
    together = [value for part in parts for value in part]
    given_parts = [Given.of(part) for part in parts]
    classes = Classes.of(Given.joined(given_parts))
    labels = [classes.labels(part) for part in given_parts]
    known = [value for value in together if value is not None]
    if not known:
        assert classes == Classes()
    elif len(known) == len(together) and all(isinstance(value, str) for value in known):
        assert classes.class_names == tuple(sorted(set(known)))
        assert [classes.class_names[each] for part in labels for each in part.tolist()] == known
    elif len(known) == len(together) and all(isinstance(each, int) and 0 <= each <= MAX_LABEL for each in known):
        assert classes == Classes(num_classes=max(known) + 1)
        assert [each for part in labels for each in part.tolist()] == known
    else:
        assert classes.num_classes is classes.class_names is None
        assert ", so none are used" in classes.note
        assert labels == [None] * len(parts)


@pytest.mark.parametrize("kind", ["parquet", "cls", "json"])
def test_case_04_numbers_below_zero_are_no_labels_and_are_said(tmp_path: Path, kind: str):
    """But -1, by which Hugging Face's sets say that there is none."""
    for lowest, said in ((-3, "can't be used"), (-1, "no label")):
        numbers = [lowest, *range(9)] * 3
        if kind == "parquet":
            path = write_parquet(tmp_path / f"{lowest}.parquet", numbers)
        else:
            members = {}
            for index, number in enumerate(numbers):
                members[f"{index}.png"] = encoded()
                members[f"{index}.{kind}"] = (str(number) if kind == "cls" else json.dumps({"label": number})).encode()
            path = write_tar(tmp_path / f"{lowest}.tar", members)
        images = load_images(path)
        assert images.num_classes is None
        assert said in images.label_note
