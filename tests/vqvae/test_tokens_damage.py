"""What is read of a tokenized set is what was written, or an error: bits that flipped, files of others, forged ones."""

import contextlib
import copy
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from token_worlds import contents, copied, equal, photos, tokenize, tokenizer

from vqvae.data import load_images
from vqvae.tokens import CodeDataset, headers, write_parquet
from vqvae.tokens.index import checksum

SIZES = {"batch_size": 4, "shard_size": 9}
SHARD, OTHER = "codes-00001.safetensors", "codes-00000.safetensors"
ROWS = range(9, 18)  # of that shard
# What a field of JSON may hold that nobody who wrote the reader had in mind.
NASTY = (
    None,
    True,
    -1,
    0,
    1,
    10**18,
    10**30,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../x",
    [],
    [[]],
    {},
    ["x", None],
)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return photos(tmp_path_factory.mktemp("source") / "photos", num=20)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "codes" / "train"
    tokenize(tokenizer(), load_images(source, size=8), folder, tokenizer_source=str(source), **SIZES)
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return copied(whole, tmp_path / "codes" / "train")


def mended(folder: Path, source: Path, whole: Path) -> None:
    """What the errors say: `vqvae tokenize` again."""
    tokenize(tokenizer(), load_images(source, size=8), folder, tokenizer_source=str(source), **SIZES)
    # What was lying about outside the set's names is nobody's business.
    assert {name: data for name, data in contents(folder).items() if name in contents(whole)} == contents(whole)


def changed_index(folder: Path, change: Callable[[dict[str, Any]], Any], *, signed: bool = True) -> None:
    """Another index, whose own checksum fits."""
    index = json.loads((folder / "index.json").read_text())
    change(index)
    if signed and "crc32" in index:
        index["crc32"] = checksum(index)
    (folder / "index.json").write_text(json.dumps(index))


def as_before(index: dict[str, Any]) -> None:
    """An index as versions before wrote it: with absolute paths, and without checksums."""
    index.pop("crc32")
    for shard in index["shards"]:
        shard.pop("crc32")
    index["source"] = index["tokenizer"]["source"] = "/home/somebody/photos"


def forged(folder: Path, tensors: dict[str, np.ndarray], change: Callable[[dict[str, Any]], Any] = lambda header: None):
    """A shard with other tensors or another header, whose checksums fit, and an index that pins it."""
    data = (folder / SHARD).read_bytes()
    length = int.from_bytes(data[:8], "little")
    about = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["about"])
    about["crc32"] = {name: zlib.crc32(np.ascontiguousarray(each).data) for name, each in tensors.items()}
    about["crc32"]["about"] = headers.checksum(about)
    made = safetensors.numpy.save(tensors, {"about": json.dumps(about)})
    length = int.from_bytes(made[:8], "little")
    header = json.loads(made[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    start = len(text).to_bytes(8, "little")
    (folder / SHARD).write_bytes(start + text + made[8 + length :])
    crc32 = zlib.crc32(text, zlib.crc32(start))
    changed_index(folder, lambda index: index["shards"][1].update(crc32=crc32))


def check_others(codes: CodeDataset, whole: Path) -> None:
    rows = [*range(9), 18, 19]
    assert equal(codes[rows], CodeDataset(whole)[rows])


# Bits that flipped


def test_case_07_a_bit_flipped_in_a_shard_is_an_error_at_its_first_row(folder, source, whole, tmp_path):
    path = folder / SHARD
    data, codes = path.read_bytes(), CodeDataset(folder)
    for at in range(8 + int.from_bytes(data[:8], "little"), len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        with pytest.raises(
            ValueError, match=r"codes-00001.* its checksums differ; run `vqvae tokenize` again to mend it"
        ):
            copy.copy(codes)[9]  # a copy has opened nothing
    check_others(codes, whole)
    for read in (lambda: codes.key(17), lambda: codes.keys(1), lambda: codes.shard(1), lambda: codes[[0, 17]]):
        with pytest.raises(ValueError, match="its checksums differ"):
            read()
    pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match="its checksums differ"):
        write_parquet(codes, tmp_path / "codes.parquet")
    assert not (tmp_path / "codes.parquet").exists()
    mended(folder, source, whole)
    assert equal(codes[ROWS], CodeDataset(whole)[ROWS])


def test_case_07_checksums_are_compared_once_in_a_process(folder, monkeypatch):
    codes, read = CodeDataset(folder), []
    checked = headers.read_checked
    monkeypatch.setattr(headers, "read_checked", lambda path: (read.append(path.name), checked(path))[1])
    monkeypatch.setattr("vqvae.tokens.dataset._MAX_OPEN", 1)
    for rows in (range(20), [3, 15, 4], range(20)):
        codes[rows]
    assert read == [f"codes-0000{shard}.safetensors" for shard in range(3)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    at=st.integers(0, 2**20), length=st.integers(0, 9), new=st.binary(max_size=9), name=st.sampled_from([SHARD, OTHER])
)
def test_whatever_is_written_over_a_shard_no_other_row_is_read(folder, whole, at, length, new, name):
    data = (whole / name).read_bytes()
    at %= len(data)
    (folder / name).write_bytes(spoiled := data[:at] + new + data[at + length :])
    rows, before = range(9) if name == OTHER else ROWS, CodeDataset(whole)
    if spoiled == data:
        codes = CodeDataset(folder)
        assert equal(codes[rows], before[rows])
        assert [codes.key(row) for row in rows] == [before.key(row) for row in rows]
    else:
        with pytest.raises(ValueError, match=name) as caught:
            CodeDataset(folder)[rows]
        assert "\n" not in str(caught.value)
    (folder / name).write_bytes(data)


def test_a_bit_flipped_in_what_the_index_says_is_noticed(folder, source, whole):
    text = (folder / "index.json").read_text()
    for was, now in (
        ('"num_codes": 16,\n "num_im', '"num_codes": 17,\n "num_im'),
        ('"b"', '"c"'),
        ('"width": 8', '"width": 9'),
    ):
        assert was in text
        (folder / "index.json").write_text(text.replace(was, now))
        with pytest.raises(ValueError, match=r"is damaged \(its checksum differs\); remove it and run"):
            CodeDataset(folder)
    (folder / "index.json").unlink()
    mended(folder, source, whole)


# Shards of something else


@pytest.mark.parametrize("pinned", [True, False])
def test_case_07_two_shards_that_were_swapped(folder, source, whole, pinned):
    if not pinned:
        changed_index(folder, as_before)
    first = (folder / OTHER).read_bytes()
    (folder / OTHER).write_bytes((folder / SHARD).read_bytes())
    (folder / SHARD).write_bytes(first)
    codes = CodeDataset(folder)
    for row in (0, 9):
        with pytest.raises(ValueError, match=r"is not the shard that the index of .* says; run `vqvae tokenize` again"):
            codes[row]
    assert equal(codes[18:], CodeDataset(whole)[18:])
    mended(folder, source, whole)
    CodeDataset(folder)[range(20)]


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("of", ["other images", "another tokenizer", "another batch size"])
def test_case_07_a_shard_of_another_set_in_the_same_place(folder, source, whole, tmp_path, of, pinned):
    if of == "other images":
        shutil.copytree(source, tmp_path / "photos")
        image = sorted((tmp_path / "photos" / "train").rglob("*.png"))[9]
        image.write_bytes((source / "test" / "a" / "0.png").read_bytes())
    images = load_images(tmp_path / "photos" if of == "other images" else source, size=8)
    sizes = {**SIZES, "batch_size": 5} if of == "another batch size" else SIZES
    tokenize(tokenizer(seed=int(of == "another tokenizer")), images, tmp_path / "other", **sizes)
    if not pinned:
        changed_index(folder, as_before)
    (folder / SHARD).write_bytes((tmp_path / "other" / SHARD).read_bytes())
    codes = CodeDataset(folder)
    if pinned or of != "other images":
        with pytest.raises(ValueError, match="is not the shard that the index"):
            codes[9]
        check_others(codes, whole)
    if pinned:
        mended(folder, source, whole)
    else:
        # Nothing vouches for either: it may be somebody's.
        with pytest.raises(ValueError, match="holds codes-00001"):
            mended(folder, source, whole)


def test_an_index_of_a_version_before_is_read_and_renewed(folder, source, whole):
    changed_index(folder, as_before)
    codes = CodeDataset(folder)
    assert equal(codes[range(20)], CodeDataset(whole)[range(20)])
    assert (codes.source, codes.source_name) == ("/home/somebody/photos", "photos")
    assert codes.tokenizer["source"] == "/home/somebody/photos"
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match="its checksums differ"):
        CodeDataset(folder)[9]
    mended(folder, source, whole)


def test_an_index_of_a_version_before_will_do_where_nothing_can_be_written(folder, source, monkeypatch):
    changed_index(folder, as_before)
    before = contents(folder)

    def refused(*args: object, **options: object) -> None:
        raise ValueError("could not write") from PermissionError()

    monkeypatch.setattr("safefolder.locks.one_writer", refused)
    monkeypatch.setattr("safefolder.files.write_text", refused)
    images = load_images(source, size=8)
    made = tokenize(tokenizer(), images, folder, **SIZES)
    assert (made.whole, made.num_images) == (True, 0)
    assert contents(folder) == before
    changed_index(folder, lambda index: index.update(num_rows=19))
    with pytest.raises(ValueError, match="could not write"):
        tokenize(tokenizer(), images, folder, **SIZES)


def test_numbers_of_an_old_index_are_held_against_the_tokenizer(folder):
    def change(index: dict[str, Any]) -> None:
        as_before(index)
        index["num_codes"] = 17

    changed_index(folder, change)
    codes = CodeDataset(folder)
    with pytest.raises(ValueError, match=r"says 17 codes in a grid \(2, 2\), and its tokenizer has 16 in"):
        codes.check_tokenizer(tokenizer())
    assert np.array_equal(codes.shard(-1)[0], codes.shard(2)[0])
    with pytest.raises(IndexError):
        codes.keys(3)


# Files outside the folder


@pytest.mark.parametrize(
    "names",
    [
        ["../x.safetensors", SHARD, "codes-00002.safetensors"],
        ["/etc/hostname", SHARD, "codes-00002.safetensors"],
        [SHARD, SHARD, "codes-00002.safetensors"],
        [SHARD, OTHER, "codes-00002.safetensors"],
        ["codes-0.safetensors", SHARD, "codes-00002.safetensors"],
        [f"./{OTHER}", SHARD, "codes-00002.safetensors"],
        [f"{OTHER}\0", SHARD, "codes-00002.safetensors"],
        [OTHER, SHARD],
        [OTHER, SHARD, "codes-00002.safetensors", "codes-00003.safetensors"],
        [OTHER, SHARD, 3],
    ],
)
def test_case_07_the_index_names_its_own_shards_in_order_and_no_others(folder, names):
    def change(index: dict[str, Any]) -> None:
        rows = [9, 9, 2, 0]
        index["shards"] = [{**index["shards"][0], "file": name, "rows": rows[at]} for at, name in enumerate(names)]

    shutil.copy(folder / OTHER, folder.parent / "x.safetensors")
    changed_index(folder, change)
    with pytest.raises(ValueError, match=r"the index of .* is damaged") as caught:
        CodeDataset(folder)
    assert "\n" not in str(caught.value)


def test_case_07_links_that_lead_out_are_refused_and_those_within_are_not(folder, source, whole, tmp_path):
    (folder / SHARD).rename(tmp_path / SHARD)
    (folder / SHARD).symlink_to(tmp_path / SHARD)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"codes-00001.* is a link to a file outside its folder; run"):
            CodeDataset(folder)
    mended(folder, source, whole)
    assert not (folder / SHARD).is_symlink()
    assert (tmp_path / SHARD).exists()

    (folder / SHARD).rename(folder / "kept")
    (folder / SHARD).symlink_to("kept")
    assert equal(CodeDataset(folder)[ROWS], CodeDataset(whole)[ROWS])
    # As the cache of the hub has them.
    snapshot = tmp_path / "models--somebody--codes" / "snapshots" / "0123" / "train"
    blobs = tmp_path / "models--somebody--codes" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name, data in contents(whole).items():
        (blobs / f"blob-{name}").write_bytes(data)
        (snapshot / name).symlink_to(f"../../../blobs/blob-{name}")
    assert equal(CodeDataset(snapshot)[ROWS], CodeDataset(whole)[ROWS])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("name", [SHARD, "index.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link to nothing", "link to itself"])
def test_what_is_no_regular_file_is_one_line_and_no_wait(folder, source, name, kind):
    (folder / name).unlink()
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to("nothing" if kind == "link to nothing" else name)
    with pytest.raises(ValueError, match=name) as caught:
        CodeDataset(folder)
    assert "\n" not in str(caught.value)
    images, before = load_images(source, size=8), sorted(os.listdir(folder))
    if kind in ("pipe", "folder") or (kind, name) == ("link to itself", SHARD):
        with pytest.raises(ValueError, match=name):
            tokenize(tokenizer(), images, folder, **SIZES)
        assert sorted(os.listdir(folder)) == before
    else:
        tokenize(tokenizer(), images, folder, **SIZES)
        CodeDataset(folder)[range(20)]


# Forged shards: whoever made them made the checksums fit


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load((folder / SHARD).read_bytes())


def test_a_forged_shard_that_is_whole_is_read(folder, whole):
    forged(folder, tensors_of(folder))
    assert equal(CodeDataset(folder)[ROWS], CodeDataset(whole)[ROWS])


@pytest.mark.parametrize(
    ("name", "at", "value", "message"),
    [
        ("codes", (3, 0, 0), 16, "holds the code 16, expected 0 to 15"),
        ("labels", 4, -1, "holds the label -1, expected 0 to 1"),
        ("labels", 4, 2, "holds the label 2, expected 0 to 1"),
        ("key_ends", 4, 0, "has keys that do not follow one another"),
        ("key_ends", 0, -3, "has keys that do not follow one another"),
        ("key_ends", 8, 2**62, "has keys that do not follow one another"),
        ("key_ends", 8, 50, "has keys that do not follow one another"),
        ("key_ends", 4, -(2**63), "has keys that do not follow one another"),
    ],
)
def test_values_that_no_writer_wrote_are_refused(folder, whole, source, name, at, value, message):
    tensors = tensors_of(folder)
    tensors[name][at] = value
    forged(folder, tensors)
    codes = CodeDataset(folder)
    for read in (lambda: codes[9], lambda: codes.key(9), lambda: codes.shard(1)):
        with pytest.raises(ValueError, match=rf"codes-00001.* {message}; run"):
            read()
    check_others(codes, whole)
    pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match=message):
        write_parquet(codes, folder / "codes.parquet")
    (folder / SHARD).unlink()
    mended(folder, source, whole)


def _set(name: str, field: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header[name].update({field: value})


def _overlap(header: dict[str, Any]) -> None:
    start, stop = header["key_ends"]["data_offsets"]
    header["labels"]["data_offsets"] = [start, stop]


@pytest.mark.parametrize(
    "change",
    [
        *(
            _set("codes", "shape", shape)
            for shape in ([9, -2, -2], [9, 4], [2**70, 2, 2], [9, 2.0, 2], [True, 2, 2], "9", None)
        ),
        *(_set("codes", "shape", shape) for shape in ([9, 2, 2, *[1] * 100], [[9], 2, 2], {}, [], [9, 2, 10**400])),
        *(
            _set("codes", "data_offsets", at)
            for at in ([0], [72, 0], [-8, 64], [0, 2**64], [0.0, 72], [], None, [0, 72, 144])
        ),
        *(_set("codes", "dtype", kind) for kind in ("F16", "I16", 16, None, ["U16"], {}, "U32", "U8")),
        _set("key_bytes", "shape", [7, 9]),
        _overlap,
        lambda header: header.update(more={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}),
        lambda header: header.pop("key_ends"),
        lambda header: header.pop("labels"),
        lambda header: header.update(codes=[]),
        lambda header: header.update(__metadata__=[]),
        lambda header: header.update(__metadata__={"about": 3}),
        lambda header: header.update(__metadata__={"about": "[" * 100_000}),
        lambda header: header.update(__metadata__={"about": '{"class": "CodeDataset", "crc32": {"about": Infinity}}'}),
    ],
)
def test_headers_that_no_writer_wrote_are_refused(folder, whole, change):
    forged(folder, tensors_of(folder), change)
    codes = CodeDataset(folder)
    with pytest.raises(ValueError, match=r"codes-00001.* (is no whole shard of codes|is not the shard)") as caught:
        codes[9]
    assert len(str(caught.value)) < 800
    assert "\n" not in str(caught.value)
    check_others(codes, whole)


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b'{"a": 1, "a": 1}', b"\xff\xfe", b"{}", b"null", '{"é": 1}'.encode("utf-16")]
)
def test_headers_that_are_no_json_are_refused(folder, text):
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(len(text).to_bytes(8, "little") + text + data)
    with pytest.raises(ValueError, match=r"codes-00001.* is no whole shard of codes") as caught:
        CodeDataset(folder)[9]
    assert len(str(caught.value)) < 800


# An index of anybody


@pytest.mark.parametrize(
    "text",
    [
        *(
            "[" * 100_000,
            "{" * 5000,
            '{"x": ' * 200 + "1" + "}" * 200,
            '{"class": "CodeDataset", "num_rows": Infinity}',
        ),
        *('{"a": 1, "a": 1}', '"x"', "", "9" * 5000, "\0", "null", "[]", '{"class": "CodeDataset", "num_rows": 20}'),
    ],
)
def test_case_22_an_index_that_is_no_json_is_one_line_and_mended(folder, source, whole, text):
    (folder / "index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json|the index of") as caught:
        CodeDataset(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    if text.endswith("20}"):  # it may be of something else, and somebody's
        with pytest.raises(ValueError, match="holds codes with format None, expected 1; name another folder"):
            mended(folder, source, whole)
    else:
        mended(folder, source, whole)


FIELDS: dict[str, tuple[Any, ...]] = {
    "format": (None, True, 0, -1, 1.0, "1", [1] * 1000, 10**30),
    "grid": (
        None,
        [],
        [0],
        [-1],
        [2, 2.0],
        [2, True],
        [1 << 20, 1 << 20],
        [10**18],
        "22",
        [[2, 2]],
        {},
        [2] * 100,
        [1] * 100,
    ),
    "num_codes": (None, 0, -1, 1.0, True, (1 << 32) + 1, 10**30, "16", [16]),
    "dtype": (
        None,
        "uint8",
        "uint32",
        "float16",
        "O",
        "V1000000000000",
        "uint16" * 1000,
        ["uint16"],
        "(1000000,1000000)u2",
    ),
    "num_classes": (0, -1, 1.0, True, 10**10, "2", None, 3),
    "class_names": ([], ["a"], ["a", 1], "ab", {"a": 1, "b": 2}, ["a", "b", "c"], [None, None]),
    "batch_size": (None, 0, -4, 4.0, 10**30),
    "shard_size": (None, 0, -9, 9.0, 10**30, 1, 8, 10, 10**15),
    "num_images": (None, -1, 20.0, 10**30, 21, 19, 0),
    "num_rows": (None, -1, 20.0, 21, 10**18, float("inf"), float("nan")),
    "image_shape": (None, [], [3, 8], [3, 8, 0], [3, 8, 8.0], [3, 8, 10**30], "388", [3, 8, 8, 8]),
    "split": (None, 1, [], {}),
    "source": (
        None,
        1,
        [],
        {},
        {"name": "x"},
        {"name": "x", "path": "/x"},
        {"name": 1, "path": None},
        {"name": "x", "path": 1},
    ),
    "tokenizer": (None, 1, [], {}, {"fingerprint": "x"}),
    "shards": (None, {}, [], "x", [None] * 3, [{}] * 3, 10**18),
    "unreadable": (
        None,
        {},
        [None],
        [{}],
        [{"key": "x"}],
        [{"key": 1, "reason": "x"}],
        [{"key": "x", "reason": "x"}],
        "x",
    ),
    "crc32": (None, -1, 0, "x", [], 1.5),
}


@pytest.mark.parametrize("name", FIELDS)
def test_case_22_no_field_of_an_index_is_trusted(folder, whole, name):
    for value in FIELDS[name]:
        (folder / "index.json").write_bytes((whole / "index.json").read_bytes())
        changed_index(
            folder, lambda index, value=value: index.update({name: value}), signed=name not in ("crc32", "tokenizer")
        )
        with pytest.raises(ValueError, match=r"the index of|is of format|index\.json cannot be read") as caught:
            CodeDataset(folder)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600
    (folder / "index.json").write_bytes((whole / "index.json").read_bytes())
    changed_index(folder, lambda index: index.pop(name), signed=name != "tokenizer")
    if name == "crc32":
        CodeDataset(folder)  # as versions before wrote it
    else:
        with pytest.raises(ValueError, match="index"):
            CodeDataset(folder)


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, each in items for place in _places(each, (*at, key)))]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), signed=st.booleans(), old=st.booleans())
def test_whatever_an_index_says_its_rows_are_those_that_were_written(folder, whole, data, signed, old):
    (folder / "index.json").write_bytes((whole / "index.json").read_bytes())
    if old:
        changed_index(folder, as_before)
    index = json.loads((folder / "index.json").read_text())
    *way, last = data.draw(st.sampled_from([place for place in _places(index) if place]))

    def change(index: dict[str, Any]) -> None:
        value: Any = index
        for key in way:
            value = value[key]
        value[last] = data.draw(st.sampled_from(NASTY))

    try:
        changed_index(folder, change, signed=signed)
    except (AttributeError, TypeError):
        return  # of what has no tokenizer there is no checksum
    found = None
    with contextlib.suppress(ValueError):
        found = CodeDataset(folder)[range(20)]
    assert found is None or equal(found, CodeDataset(whole)[range(20)])


def test_names_of_files_that_are_no_utf8_are_in_the_index_as_they_are(tmp_path):
    source = photos(tmp_path / "photos", num=6)
    name = os.fsdecode(b"\xff\xfe.png")
    (source / "train" / "a" / name).write_bytes(b"broken")
    tokenize(tokenizer(), load_images(source, size=8), tmp_path / "codes", **SIZES)
    assert [key for key, _ in CodeDataset(tmp_path / "codes").unreadable] == [f"a/{name}"]


def test_a_huge_index_is_not_read(folder):
    with (folder / "index.json").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"index\.json .* it has 1,099,511,627,776 bytes, expected at most"):
        CodeDataset(folder)
