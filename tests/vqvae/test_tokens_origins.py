"""A tokenized set says what it was made of, and not where that was; what was changed since or is gone is noticed."""

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_worlds import (
    OTHER,
    SHARD,
    archive,
    as_before,
    call,
    changed_index,
    contents,
    encoded,
    loaded,
    photos,
    refused,
    table,
    tokenize,
    tokenizer,
)

from vqvae import Autoencoder
from vqvae.data import ImageTensors, load_images
from vqvae.tokens import CodeDataset, check_same_origin, origins
from vqvae.tokens.origins import Origin, key_without_places, note, origin, same, without_places

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
CHANGED = r"holds codes-0000\d.safetensors of other images than .* has now, .*have the source as it was"


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with a run, whose name shows in nothing that is made."""
    tokenizer().save_pretrained(tmp_path / "secret" / "run" / "codebook")
    return tmp_path / "secret"


def make_source(kind: str, place: Path) -> Path:
    images = [b"broken", b"broken", *map(encoded, range(18))]
    if kind == "files":
        return photos(place / "photos", num=12, broken=(0, 3))
    if kind == "archive":
        return archive(place / "photos.tar", images[1:])
    rows = [{"bytes": data, "path": str(place / "My photos" / f"{at}.png")} for at, data in enumerate(images)]
    return table(place / "photos.parquet", rows)


@pytest.mark.parametrize(("kind", "is_relative"), [("files", False), ("archive", True), ("table", False)])
def test_case_17_no_file_of_a_set_says_where_it_was_made(place, kind, is_relative, monkeypatch):
    pytest.importorskip("pyarrow")
    from pyarrow import parquet

    source = make_source(kind, place)
    model, images, out = place / "run", source, place / "sets" / "codes"
    if is_relative:
        (place / "here").mkdir()
        monkeypatch.chdir(place / "here")
        model, images, out = (Path(os.path.relpath(each)) for each in (model, images, out))
    assert call(model, images, "-o", out, "--device", "cpu", "--parquet", place / "all.parquet") == (
        kind != "table" or 1
    )
    for part in ("train", "test"):
        folder = place / "sets" / "codes" / part
        for name, data in contents(folder).items():
            assert b"secret" not in data, name
        index = json.loads((folder / "index.json").read_text())
        assert index["source"] == {"name": source.name, "path": f"../../../{source.name}"}
        assert index["tokenizer"]["source"] == {"name": "run", "path": "../../../run"}
        codes = CodeDataset(folder)
        assert (codes.source, codes.tokenizer["source"]) == (str(source), str(place / "run"))
        assert codes.source_name == source.name
        made = parquet.read_table(place / f"all-{part}.parquet")
        assert b"secret" not in b"".join([*made.schema.metadata.values(), *map(str.encode, made["key"].to_pylist())])
        if kind == "table":
            images = load_images(source, part, size=8)
            numbers = [int(images.rows[at]) for at in range(len(images))]
            assert made["key"].to_pylist() == [f"row {row} ({row}.png)" for row in numbers if row > 1]
            assert [key for key, _ in codes.unreadable] == [f"row {row} ({row}.png)" for row in numbers if row <= 1]


def test_case_17_a_set_that_is_moved_with_what_it_was_made_of_finds_it(place, tmp_path, monkeypatch):
    source = photos(place / "data" / "photos", num=12)
    assert call(place / "run", source, "-o", place / "codes", "--device", "cpu") == 0
    place.rename(tmp_path / "moved")
    monkeypatch.chdir("/")
    codes = CodeDataset(tmp_path / "moved" / "codes" / "train")
    assert codes.source == str(tmp_path / "moved" / "data" / "photos")
    codes.check_tokenizer(Autoencoder.from_pretrained(codes.tokenizer["source"]))
    assert len(load_images(codes.source, size=8)) == 12
    # By a link too, from wherever that is.
    (tmp_path / "link").symlink_to(tmp_path / "moved" / "codes" / "train")
    assert CodeDataset(tmp_path / "link").source == codes.source


def test_case_17_reasons_of_what_could_not_be_read_name_no_place(tmp_path, monkeypatch):
    source = photos(tmp_path / "photos", num=12, broken=(2,))
    images = loaded(source)
    read = images.read

    def telling(indices):
        batch = read(indices)
        skipped = tuple((key, f"cannot identify <file name='{source}/train/{key}'>") for key, _ in batch.skipped)
        return dataclasses.replace(batch, skipped=skipped)

    monkeypatch.setattr(images, "read", telling)
    made = tokenize(images, tmp_path / "codes", tokenizer_source=str(source))
    assert made.unreadable == (("a/002.png", "cannot identify <file name='002.png'>"),)
    assert CodeDataset(tmp_path / "codes").unreadable == made.unreadable
    # As a version before wrote it: renewed by the next call, which encodes nothing.
    before = contents(tmp_path / "codes")
    changed_index(tmp_path / "codes", as_before)
    changed_index(
        tmp_path / "codes", lambda index: index["unreadable"][0].update(reason=f"no {source}/train/a/002.png")
    )
    assert CodeDataset(tmp_path / "codes").source == "/home/somebody/photos"
    assert tokenize(images, tmp_path / "codes", tokenizer_source=str(source)).num_images == 0
    assert contents(tmp_path / "codes") == before


@pytest.mark.parametrize(
    ("source", "noted"),
    [
        ("/data/photos/", {"name": "photos", "path": None}),
        ("/", {"name": "the root folder", "path": None}),
        ("/sets/photos", {"name": "photos", "path": "../../photos"}),
        ("/sets/codes", {"name": "codes", "path": ".."}),
        ("/sets/../data/photos-{0..9}.tar", {"name": "photos-{0..9}.tar", "path": None}),
        ("hf:/sets/photos", {"name": "hf:photos", "path": "../../photos"}),
        ("hf:owner/name", "hf:owner/name"),
        ("fashion-mini", "fashion-mini"),
        ("no/such/folder", "no/such/folder"),
    ],
)
def test_case_17_what_is_noted_of_a_source(source, noted):
    assert note(source, Path("/sets/codes/train")) == noted
    found = origin(noted, Path("/sets/codes/train"))
    if isinstance(noted, str):
        assert found == Origin(source, source)
    else:
        assert found == Origin(noted["name"], None if noted["path"] is None else source)


def test_a_name_that_somebody_gave_is_no_folder_that_is_called_so(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    pixels = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    for name, noted in (("images", "images"), (str(tmp_path / "images"), {"name": "images", "path": "../images"})):
        folder = tmp_path / f"codes-{len(name)}"
        tokenize(ImageTensors(pixels, name=name), folder, tokenizer_source="images")
        index = json.loads((folder / "index.json").read_text())
        assert index["source"] == noted
        assert index["tokenizer"]["source"] == {"name": "images", "path": "../images"}


NAME = st.text("ab .é\n'(", min_size=1, max_size=3).filter(lambda each: each.strip(".") != "")
NAMES = st.lists(NAME, min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(shared=NAMES, source=NAMES, folder=NAMES)
def test_a_path_that_shares_a_folder_is_found_again_wherever_both_are(shared, source, folder):
    for root in ("/nowhere", "/elsewhere/deeper"):
        noted = note(os.path.join("/nowhere", *shared, *source), Path("/nowhere", *shared, *folder))
        assert isinstance(noted, dict)
        assert origins.is_note(json.loads(json.dumps(noted)))
        assert "nowhere" not in str(noted)
        found = origin(noted, Path(root, *shared, *folder))
        assert found == (source[-1], os.path.normpath(os.path.join(root, *shared, *source)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cannot identify image file '/home/me/My photos/x.png'", "cannot identify image file 'x.png'"),
        ("[Errno 5] /home/me/x.png: Input/output error", "[Errno 5] x.png: Input/output error"),
        ("<_io.BufferedReader name='/home/me/x.png'>", "<_io.BufferedReader name='x.png'>"),
        ("file:///home/me/x.png is cut", "x.png is cut"),
        (r"C:\\Users\\me\\x.png is cut", "x.png is cut"),
        ("3/4 of 12 img/s, and/or 24 / 7", "3/4 of 12 img/s, and/or 24 / 7"),
        ("a relative/path.png, ../x.png and ~/x.png", "a relative/path.png, ../x.png and ~/x.png"),
        ("see https://example.org/x/y", "see https://example.org/x/y"),
    ],
)
def test_absolute_paths_in_texts_become_their_last_parts(text, expected):
    assert without_places(text) == expected


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("a b/(c) /d.png", "a b/(c) /d.png"),
        ("x.tar//odd/member.png", "x.tar//odd/member.png"),
        ("/home/me/x.png", "x.png"),
        ("row 5 (/home/me/a (b)/x.png)", "row 5 (x.png)"),
        ("row 5 (data/x.png)", "row 5 (data/x.png)"),
    ],
)
def test_keys_are_left_alone_unless_they_are_absolute_paths(key, expected):
    assert key_without_places(key) == expected


# Parts of one set


def test_sources_are_the_same_as_far_as_they_tell():
    here, there = Origin("photos", "/a/photos"), Origin("photos", "/b/photos")
    unknown, typed = Origin("photos", None), Origin("data/photos", "data/photos")
    for one, other, expected in (
        *((each, each, True) for each in (here, there, unknown, typed)),
        *((here, there, False), (here, unknown, True), (here, typed, True), (unknown, Origin("other", None), False)),
        *((here, Origin("other", None), False), (Origin("o/n", "o/n"), Origin("p/n", "p/n"), False)),
    ):
        assert same(one, other) is same(other, one) is expected, (one, other)


def test_case_31_parts_of_different_sources_tokenizers_or_classes_are_told_apart(tmp_path):
    photos(tmp_path / "photos", num=12)
    for name in ("train", "test", "elsewhere/deeper/test"):
        split = name.rpartition("/")[2]
        tokenize(load_images(tmp_path / "photos", split, size=8), tmp_path / name, split=split)
    train, folder = CodeDataset(tmp_path / "train"), tmp_path / "test"
    check_same_origin(train, CodeDataset(folder))
    check_same_origin(train, CodeDataset(tmp_path / "elsewhere" / "deeper" / "test"))
    whole = (folder / "index.json").read_text()
    other = {**json.loads(whole)["tokenizer"], "fingerprint": "0" * 64}
    for what, changed in (
        ("tokenizers", {"tokenizer": other}),
        ("sources", {"source": {"name": "copy", "path": "../copy"}}),
        ("sources", {"source": {"name": "photos", "path": "../deeper/photos"}}),
        ("numbers of classes", {"num_classes": 3, "class_names": ["a", "b", "c"]}),
        ("classes", {"class_names": ["a", "c"]}),
    ):
        (folder / "index.json").write_text(whole)
        changed_index(folder, lambda index, changed=changed: index.update(changed))
        with refused(rf"train and .* are of different {what} \(.* and .*\); expected two parts"):
            check_same_origin(train, CodeDataset(folder))


# What was changed since, and what cannot be read now


def changing(kind: str, folder: Path, seeds: Sequence[int]) -> Path:
    """A source of that kind; made again, only what is to be another image changes."""
    folder.mkdir(exist_ok=True)
    for part, images in (("train", seeds), ("test", [0])):
        data = [encoded(seed) for seed in images]
        if kind == "archive":
            archive(folder / f"{part}.tar", data)
        elif kind == "files":
            (folder / part).mkdir(exist_ok=True)
            for number, each in enumerate(data):
                path = folder / part / f"{number:03}.bmp"
                if not path.exists() or path.read_bytes() != each:
                    path.write_bytes(each)
        else:
            table(folder / f"{part}.parquet", data)
    return folder


@pytest.mark.parametrize("kind", ["files", "archive", "table", "lazy table"])
def test_other_images_of_equal_size_are_refused_and_moved_ones_are_not(kind, tmp_path, monkeypatch):
    if kind == "lazy table":
        monkeypatch.setattr("vqvae.data.table.HELD_BYTES", 0)
    source = changing(kind, tmp_path / "source", range(20))
    tokenize(source, tmp_path / "codes")
    (tmp_path / "codes" / SHARD).unlink()

    # The same set elsewhere, by another spelling: what is missing is made, and all is as it was.
    before = contents(tmp_path / "codes")
    source = source.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert tokenize(Path("moved"), tmp_path / "codes").num_images == 9
    after = contents(tmp_path / "codes")
    assert {name: after[name] for name in before} == before

    (tmp_path / "codes" / SHARD).unlink()
    (tmp_path / "codes" / "index.json").unlink()
    before = contents(tmp_path / "codes")
    changing(kind, source, [0, 1, 2, 99, *range(4, 20)])
    with refused(CHANGED):
        tokenize(source, tmp_path / "codes")
    assert contents(tmp_path / "codes") == before


@pytest.mark.parametrize("has_index", [True, False])
def test_a_file_that_was_renamed_or_took_anothers_place_is_noticed(tmp_path, has_index):
    source = photos(tmp_path / "photos")
    tokenize(source, tmp_path / "codes")
    if not has_index:
        (tmp_path / "codes" / "index.json").unlink()
    renamed, moved, touched = (shutil.copytree(source, tmp_path / name) for name in ("renamed", "moved", "touched"))
    # One removed and one added: as many as there were, and all between them one place on.
    (renamed / "train" / "a" / "000.png").rename(renamed / "train" / "b" / "999.png")
    (moved / "train" / "a" / "009.png").rename(moved / "train" / "b" / "009.png")  # the order stays, the label changes
    os.utime(touched / "train" / "b" / "015.png", ns=(0, 0))
    for changed in (renamed, moved, touched):
        with refused(CHANGED):
            tokenize(changed, tmp_path / "codes")
    assert tokenize(shutil.copytree(source, tmp_path / "copied"), tmp_path / "codes").num_images == 0


def test_tensors_are_told_apart_by_pixels_labels_and_classes(tmp_path):
    pixels = torch.randint(0, 256, (20, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    labels = torch.arange(20) % 2
    tokenize(ImageTensors(pixels, labels, ("a", "b")), tmp_path / "codes")
    other = pixels.clone()
    other[13, 0, 0, 0] ^= 1
    assert tokenize(ImageTensors(pixels.clone(), labels, ("a", "b"), name="new"), tmp_path / "codes").num_images == 0
    (tmp_path / "codes" / "index.json").unlink()
    for changed, message in (
        (ImageTensors(other, labels, ("a", "b")), CHANGED),
        (ImageTensors(pixels, 1 - labels, ("a", "b")), CHANGED),
        (ImageTensors(pixels, labels, ("a", "c")), CHANGED),
        (ImageTensors(pixels, labels, ("a", "b", "c")), "num_classes 2, expected 3"),
    ):
        with refused(message):
            tokenize(changed, tmp_path / "codes")


@pytest.mark.parametrize(("number", "num_workers"), [(errno.EIO, 0), (errno.EIO, 2), (errno.ENOENT, 0)])
def test_an_image_that_cannot_be_had_ends_the_run_and_is_no_unreadable_row(number, num_workers, tmp_path, monkeypatch):
    images = loaded(photos(tmp_path / "photos", num=30, broken=(2,)))
    opened = Path.open

    def fails(self: Path, *args, **options):
        if self.name == "025.png":
            raise OSError(number, os.strerror(number), str(self))
        return opened(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fails)
        with refused(rf"b/025\.png of .* cannot be read: {os.strerror(number)}; "):
            tokenize(images, tmp_path / "codes", num_workers=num_workers)
        # For training it is an image that is not there today.
        assert [key for key, _ in images.__getitems__(range(30)).skipped] == ["a/002.png", "b/025.png"]
    assert set(contents(tmp_path / "codes")) == {OTHER, SHARD}
    assert tokenize(images, tmp_path / "codes").num_images == 12
    tokenize(images, tmp_path / "undisturbed")
    assert contents(tmp_path / "codes") == contents(tmp_path / "undisturbed")
    assert [key for key, _ in CodeDataset(tmp_path / "codes").unreadable] == ["a/002.png"]


def test_an_archive_that_shrinks_ends_the_run(tmp_path):
    source = changing("archive", tmp_path / "set", range(20))
    with refused(r"train\.tar/\d+\.bmp of .* cannot be read: the archive has become shorter"):
        tokenize(source, tmp_path / "codes", progress=lambda *_: os.truncate(source / "train.tar", 600))


def test_a_link_to_nothing_is_named_before_any_work(tmp_path):
    source = photos(tmp_path / "photos")
    (source / "train" / "b" / "030.png").symlink_to(tmp_path / "nowhere.png")
    with refused(r"b/030\.png of .* cannot be read: No such file.*take it out of the source"):
        tokenize(source, tmp_path / "codes")
    assert not (tmp_path / "codes").exists()


def test_a_row_that_names_a_file_which_is_not_there_ends_the_run(tmp_path):
    rows = [{"bytes": encoded(0), "path": None}, {"bytes": b"broken", "path": "a"}, {"bytes": None, "path": "gone.png"}]
    table(tmp_path / "train.parquet", rows[:2])
    table(tmp_path / "test.parquet", rows)
    assert len(tokenize(tmp_path, tmp_path / "codes").unreadable) == 1
    with refused(r"row 2 \(gone\.png\) of .* cannot be read: No such file"):
        tokenize(load_images(tmp_path, "test", size=8), tmp_path / "others")
