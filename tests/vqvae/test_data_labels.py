"""Labels: numbers or names, of all kinds of sources; and what is said of those that cannot be used."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import both, encoded, noise, save, write_parquet, write_tar

from vqvae.data import ImageTensors, load_images
from vqvae.data.labels import MAX_LABEL, UNUSABLE, Classes, Given

pyarrow = pytest.importorskip("pyarrow")
IMAGE = encoded(noise(4, 4))


def labelled(path: Path, labels: object, name: str = "label", note: str | None = None) -> Path:
    return write_parquet(path, note=note, image=[IMAGE] * len(labels), **{name: labels})


# Labels that are there

WORDS = ["dog", "cat", " cat \n", "Zoo", "ant", "dog", "ä", "cat", "ant", "dog"]
CLASSES = ("Zoo", "ant", "cat", "dog", "ä")
TEXTS = {
    "string": pyarrow.array(WORDS),
    "large strings": pyarrow.array(WORDS, pyarrow.large_string()),
    "string views": pyarrow.array(WORDS).cast(pyarrow.string_view()),
    "dictionary": pyarrow.array(WORDS).dictionary_encode(),
    "dictionary of large strings": pyarrow.array(WORDS, pyarrow.large_string()).dictionary_encode(),
    "two chunks": pyarrow.chunked_array([pyarrow.array(each).dictionary_encode() for each in (WORDS[:3], WORDS[3:])]),
}


@pytest.mark.parametrize(
    ("kind", "name"), [("string", "labels"), ("string", "Label"), *((kind, "label") for kind in TEXTS)]
)
def test_a_column_of_text_holds_names_of_classes(tmp_path: Path, kind: str, name: str):
    sets = both(labelled(tmp_path / "a.parquet", TEXTS[kind], name))
    told = {int(images.key(i)[4:]): images[i][1] for images in sets for i in range(len(images))}
    assert told == {row: CLASSES.index(word.strip()) for row, word in enumerate(WORDS)}
    for images in sets:
        assert (images.num_classes, images.class_names, images.label_note) == (5, CLASSES, "")


@pytest.mark.parametrize("ending", ["parquet", "tar"])
def test_names_are_numbered_by_their_letters_over_all_parts(tmp_path: Path, ending: str):
    for name, words in (("train-0", ["cat", " dog \n"]), ("train-1", ["emu"]), ("test", ["Ääl", "emu"])):
        path = tmp_path / f"{name}.{ending}"
        if ending == "parquet":
            labelled(path, words)
        else:
            images = [(f"{i}.png", IMAGE) for i in range(len(words))]
            write_tar(path, [*images, *((f"{i}.cls", word.encode()) for i, word in enumerate(words))])
    train, test = both(tmp_path)
    assert train.class_names == test.class_names == ("cat", "dog", "emu", "Ääl")
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1, 2], [3, 2])


def test_the_largest_number_of_classes_is_used(tmp_path: Path, untyped: None):
    assert load_images(labelled(tmp_path / "a.parquet", [MAX_LABEL, 0])).num_classes == 1 << 20
    images = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    assert ImageTensors(images, torch.tensor([0, MAX_LABEL])).num_classes == 1 << 20
    with pytest.raises(ValueError, match="got labels from 0 to 2000000000; expected 0 to 1048575"):
        ImageTensors(images, torch.tensor([0, 2_000_000_000]))


def test_a_column_that_can_be_used_goes_before_one_that_cannot(tmp_path: Path):
    path = write_parquet(tmp_path / "a.parquet", image=[IMAGE] * 4, label=[0.5] * 4, labels=[0, 1, 2, 3])
    assert load_images(path).num_classes == 4


# What cannot be used is said

ABOVE = "labels go up to {:,} (5 of 10 are above 1,048,575"
COLUMN = "10 of 10 labels can't be used (the column label is of "
TEXT = "1 of 10 labels can't be used (in the column label are texts that can be no names)"
COLUMNS = {
    "floats": (np.arange(10) / 1, f"{COLUMN}double, expected whole numbers"),
    "nested": ([[1]] * 10, f"{COLUMN}list<"),
    "booleans": ([True] * 10, f"{COLUMN}bool"),
    "bytes": ([b"a"] * 10, f"{COLUMN}binary"),
    "lacking": ([1, None] * 5, "5 of 10 images have no label"),
    "nothing": ([None] * 10, ""),
    "unknown": ([1] * 9 + [-1], "1 of 10 images has no label"),
    "all unknown": ([-1] * 10, ""),
    "below zero": ([1] * 9 + [-3], "1 of 10 labels can't be used"),
    "empty names": (["a"] * 7 + ["", " ", None], "3 of 10 images have no label"),
    "no text": (["a"] * 9 + ["a\0b"], TEXT),
    "long text": (["a"] * 9 + ["x" * 1024], TEXT),
    "identifiers": ([1_900_000_000, 3] * 5, ABOVE.format(1_900_000_000)),
    "unsigned": (np.array([2**63 + 5, 3] * 5, np.uint64), ABOVE.format(2**63 - 1)),
    "one more": ([MAX_LABEL + 1, 0] * 5, ABOVE.format(1 << 20)),
    "int32": (np.array([2**31 - 1, 3] * 5, np.int32), ABOVE.format(2**31 - 1)),
}


@pytest.mark.parametrize("name", list(COLUMNS))
def test_a_column_that_holds_no_labels_is_named(tmp_path: Path, name: str):
    labels, note = COLUMNS[name]
    for images in both(labelled(tmp_path / "a.parquet", labels)):
        assert (images.labels, images.num_classes, images.class_names) == (None, None, None)
        assert images.label_note.startswith(note)
        assert (", so none are used" in images.label_note) == bool(note)
        assert images.label_note.endswith("; number them from 0") == ("above" in note)
        assert len(images[0]) == 1


@pytest.mark.parametrize(
    ("parts", "note"),
    [
        ([("label", [0, 1]), ("label", ["a", "b", "c"])], "3 of 6 labels are names and 3 are numbers"),
        ([("label", [0, 1]), ("other", [0, 1])], "2 of 5 images have no label"),
        ([("other", [0, 1]), ("other", [0, 1])], "4 of 5 images have no label"),
    ],
)
def test_parts_that_differ_in_labels_are_named(tmp_path: Path, parts: list[tuple[str, list]], note: str):
    for number, (name, labels) in enumerate(parts):
        labelled(tmp_path / f"train-{number}.parquet", labels, name)
    labelled(tmp_path / "test.parquet", [1])
    for images in both(tmp_path):
        assert images.labels is None
        assert images.label_note == f"{note}, so none are used"


def noted(names: object) -> str:
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    return json.dumps({"info": {"features": features}})


@pytest.mark.parametrize(
    ("note", "names", "said"),
    [
        (noted(["a", "b"]), None, "labels go up to 2, and the column label has names for 2 classes: no names are used"),
        (noted(["a", "b", "c", "d"]), ("a", "b", "c", "d"), ""),
        (noted("abc"), None, ""),
        (noted([1, 2, 3]), None, "the names of classes in the column label are no text: no names are used"),
        ('{"info": {"features": {"image": 5, "label": {"_type": []}}}}', None, ""),
        ("[" * 100_000, None, ""),
        ("9", None, ""),
    ],
    ids=range(7),
)
def test_names_that_hugging_face_notes(tmp_path: Path, note: str, names: tuple[str, ...] | None, said: str):
    images = load_images(labelled(tmp_path / "a.parquet", [0, 1, 2, 1], note=note))
    assert images.class_names == names
    assert images.num_classes == (3 if names is None else 4)
    assert images.label_note == said


def test_images_outside_of_class_folders_are_counted(tmp_path: Path):
    for name in ("cat/0", "dog/1", "dog/2", "3", "4"):
        save(tmp_path / f"{name}.png", noise(4, 4))
    for images in both(tmp_path):
        assert images.labels is None
        assert images.label_note == "2 of 5 images have no label, so none are used"


NAMES = st.sampled_from(["a", "b", "cat", "ä"])
ANY = st.one_of(st.none(), st.just(UNUSABLE), st.integers(0, MAX_LABEL + 5), NAMES, st.just(10**30))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([ANY, NAMES, st.integers(0, 4)]).flatmap(lambda some: st.lists(st.lists(some, max_size=5))))
def test_labels_are_used_whole_or_not_at_all(parts: list[list]):
    given_parts = [Given.of(part) for part in parts]
    classes = Classes.of(Given.joined(given_parts))
    labels = [classes.labels(part) for part in given_parts]
    values = [value for part in parts for value in part]
    if all(value is None for value in values):
        assert classes == Classes()
    elif all(isinstance(value, str) for value in values):
        assert classes.class_names == tuple(sorted(set(values)))
        assert [classes.class_names[each] for part in labels for each in part.tolist()] == values
    elif all(isinstance(each, int) and 0 <= each <= MAX_LABEL for each in values):
        assert classes == Classes(num_classes=max(values) + 1)
        assert [each for part in labels for each in part.tolist()] == values
    else:
        assert classes.num_classes is classes.class_names is None
        assert ", so none are used" in classes.note
        assert labels == [None] * len(parts)
