"""A tokenized set says what it was made of, and not where on a machine that was."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import noise
from PIL import Image
from token_worlds import contents, photos, tokenize, tokenizer

from vqvae import Autoencoder
from vqvae.cli.tokenizing import tokenize as command
from vqvae.data import ImageTensors, load_images
from vqvae.tokens import CodeDataset, check_same_origin, origins
from vqvae.tokens.origins import Origin, key_without_places, note, origin, same, without_places

SIZES = {"batch_size": 4, "shard_size": 9}


def call(*args: object) -> int:
    return tyro.cli(command, args=[str(each) for each in args])


def encoded() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(noise(8, 8, 3)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with a run, and another beside it that shows in nothing that is made."""
    tokenizer().save_pretrained(tmp_path / "secret" / "run" / "codebook")
    return tmp_path / "secret"


def make_source(kind: str, place: Path) -> Path:
    if kind == "files":
        return photos(place / "photos", num=12, broken=(0, 3))
    if kind == "archive":
        with tarfile.open(place / "photos.tar", "w") as file:
            for number in range(20):
                data = encoded() if number else b"broken"
                member = tarfile.TarInfo(f"{number:03}.png")
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
        return place / "photos.tar"
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"bytes": encoded(), "path": str(place / "My photos" / f"{number}.png")} for number in range(20)]
    rows[0]["bytes"] = rows[1]["bytes"] = b"broken"
    parquet.write_table(pyarrow.table({"image": rows}), place / "photos.parquet")
    return place / "photos.parquet"


@pytest.mark.parametrize(
    ("kind", "spelling"), [("files", "absolute"), ("files", "relative"), ("archive", "relative"), ("table", "absolute")]
)
def test_case_17_no_file_of_a_set_says_where_it_was_made(place, kind, spelling, monkeypatch):
    source = make_source(kind, place)
    model, images, out = place / "run", source, place / "sets" / "codes"
    if spelling == "relative":
        (place / "here").mkdir()
        monkeypatch.chdir(place / "here")
        model, images, out = (Path(os.path.relpath(each)) for each in (model, images, out))
    pytest.importorskip("pyarrow")
    assert call(model, images, "-o", out, "--device", "cpu", "--parquet", place / "all.parquet") == (
        kind != "table" or 1
    )
    from pyarrow import parquet

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
        table = parquet.read_table(place / f"all-{part}.parquet")
        assert b"secret" not in b"".join([*table.schema.metadata.values(), *map(str.encode, table["key"].to_pylist())])
        if kind == "table":
            images = load_images(source, part, size=8)
            numbers = [int(images.rows[at]) for at in range(len(images))]
            assert table["key"].to_pylist() == [f"row {row} ({row}.png)" for row in numbers if row > 1]
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
    images = load_images(source, size=8)
    read = images.read

    def telling(indices):
        batch = read(indices)
        skipped = tuple((key, f"cannot identify <file name='{source}/train/{key}'>") for key, _ in batch.skipped)
        return type(batch)(batch.images, batch.labels, skipped)

    monkeypatch.setattr(images, "read", telling)
    made = tokenize(tokenizer(), images, tmp_path / "codes", **SIZES)
    assert made.unreadable == (("a/002.png", "cannot identify <file name='002.png'>"),)
    assert CodeDataset(tmp_path / "codes").unreadable == made.unreadable
    # As a version before wrote it: renewed by the next call, which encodes nothing.
    before = contents(tmp_path / "codes")
    index = json.loads(before["index.json"])
    index.pop("crc32")
    index["source"], index["unreadable"][0]["reason"] = str(source), f"cannot identify {source}/train/a/002.png"
    for shard in index["shards"]:
        shard.pop("crc32")
    (tmp_path / "codes" / "index.json").write_text(json.dumps(index))
    assert CodeDataset(tmp_path / "codes").source == str(source)
    assert tokenize(tokenizer(), images, tmp_path / "codes", **SIZES).num_images == 0
    assert contents(tmp_path / "codes") == before


@pytest.mark.parametrize(
    ("source", "noted"),
    [
        ("/data/photos", {"name": "photos", "path": None}),
        ("/data/photos/", {"name": "photos", "path": None}),
        ("/", {"name": "the root folder", "path": None}),
        ("/sets/photos", {"name": "photos", "path": "../../photos"}),
        ("/sets/codes", {"name": "codes", "path": ".."}),
        ("/sets/../data/photos-{0..9}.tar", {"name": "photos-{0..9}.tar", "path": None}),
        ("hf:/sets/photos", {"name": "hf:photos", "path": "../../photos"}),
        ("hf:owner/name", "hf:owner/name"),
        ("owner/name", "owner/name"),
        ("fashion-mini", "fashion-mini"),
        ("no/such/folder", "no/such/folder"),
    ],
)
def test_case_17_what_is_noted_of_a_source(source, noted):
    assert note(source, Path("/sets/codes/train")) == noted
    found = origin(noted, Path("/sets/codes/train"))
    assert found is not None
    if isinstance(noted, str):
        assert found == Origin(source, source)
    elif noted["path"] is None:
        assert found == Origin(noted["name"], None)
    else:
        assert found == Origin(noted["name"], source)


def test_a_name_that_somebody_gave_is_no_folder_that_is_called_so(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    pixels = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    for name, noted in (("images", "images"), (str(tmp_path / "images"), {"name": "images", "path": "../images"})):
        folder = tmp_path / f"codes-{len(name)}"
        tokenize(tokenizer(), ImageTensors(pixels, name=name), folder, tokenizer_source="images", **SIZES)
        index = json.loads((folder / "index.json").read_text())
        assert index["source"] == noted
        assert index["tokenizer"]["source"] == {"name": "images", "path": "../images"}


NAMES = st.lists(
    st.text("ab .é\n'(", min_size=1, max_size=3).filter(lambda each: each.strip(".") != ""), min_size=1, max_size=4
)


@settings(max_examples=100, deadline=None)
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
        ("row 5", "row 5"),
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
    def made(name: str, split: str = "train", source: Path | None = None, seed: int = 0) -> CodeDataset:
        images = load_images(source or tmp_path / "photos", split, size=8)
        tokenize(tokenizer(seed=seed), images, tmp_path / name, split=split, **SIZES)
        return CodeDataset(tmp_path / name)

    photos(tmp_path / "photos", num=12)
    shutil.copytree(tmp_path / "photos", tmp_path / "copy")
    more = Path(shutil.copytree(tmp_path / "photos", tmp_path / "deeper" / "photos"))
    train, test = made("train"), made("test", "test")
    check_same_origin(train, test)
    check_same_origin(train, made("elsewhere/deeper/test", "test"))
    for what, other in (
        ("tokenizers", made("other-tokenizer", "test", seed=1)),
        ("sources", made("other-source", "test", tmp_path / "copy")),
        ("sources", made("namesake", "test", more)),
    ):
        with pytest.raises(
            ValueError, match=rf"train and .* are of different {what} \(.* and .*\); expected two parts"
        ):
            check_same_origin(train, other)
    (more / "train" / "c").mkdir()
    (more / "train" / "a" / "000.png").rename(more / "train" / "c" / "000.png")
    shutil.rmtree(tmp_path / "photos")
    more.rename(tmp_path / "photos")
    with pytest.raises(ValueError, match=r"different numbers of classes \(2 and 3\)"):
        check_same_origin(train, made("more-classes"))
    (tmp_path / "photos" / "train" / "b").rename(tmp_path / "photos" / "train" / "d")
    (tmp_path / "photos" / "train" / "c" / "000.png").rename(tmp_path / "photos" / "train" / "a" / "000.png")
    (tmp_path / "photos" / "train" / "c").rmdir()
    with pytest.raises(ValueError, match=r"different classes \(\('a', 'b'\) and \('a', 'd'\)\)"):
        check_same_origin(train, made("other-classes"))
    assert np.array_equal(train.shard(0)[0], CodeDataset(tmp_path / "train").shard(0)[0])
