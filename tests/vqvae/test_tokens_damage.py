"""What is read of a tokenized set is what was written, or an error: bits that flipped, files of others, forged ones.

Whatever else may come is in `tests/fuzz/kinds_tokens.py`.
"""

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
from token_worlds import (
    OTHER,
    SHARD,
    as_before,
    changed_index,
    contents,
    copied,
    equal,
    photos,
    plan,
    refused,
    tokenize,
    tokenizer,
)

from vqvae.tokens import CodeDataset, headers, write_parquet
from vqvae.tokens.shards import is_done, missing

ROWS = range(9, 18)  # of that shard


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return photos(tmp_path_factory.mktemp("source") / "photos")


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "codes" / "train"
    tokenize(source, folder, tokenizer_source=str(source))
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return copied(whole, tmp_path / "codes" / "train")


@pytest.fixture
def mended(folder, source, whole) -> Callable[[], None]:
    """What the errors say: `vqvae tokenize` again."""

    def again() -> None:
        tokenize(source, folder, tokenizer_source=str(source))
        # What was lying about outside the set's names is nobody's business.
        assert {name: data for name, data in contents(folder).items() if name in contents(whole)} == contents(whole)

    return again


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load((folder / SHARD).read_bytes())


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


def no_way_to_read(codes: CodeDataset, message: str) -> None:
    """Neither rows, keys nor the shard come out of the damaged one, nor a parquet file."""
    for read in (lambda: codes[[0, 9]], lambda: codes.key(17), lambda: codes.keys(1), lambda: codes.shard(1)):
        with refused(rf"{SHARD} .*{message}; run `vqvae tokenize` again"):
            read()
    pytest.importorskip("pyarrow")
    with refused(message):
        write_parquet(codes, codes.folder.parent / "codes.parquet")
    assert not (codes.folder.parent / "codes.parquet").exists()


# Bits that flipped


def test_case_07_a_bit_flipped_anywhere_in_a_shard_is_noticed(folder, source, whole, mended):
    path, codes, todo = folder / SHARD, CodeDataset(folder), plan(source, folder)
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        with refused(rf"{SHARD} .*; run `vqvae tokenize` again to mend it"):
            copy.copy(codes)[9]  # a copy has opened nothing
        with contextlib.suppress(ValueError):  # that it is of somebody else, where a bit of what it says it is flipped
            assert not is_done(todo, 1)
    assert missing(todo) == [1]
    check_others(codes, whole)
    no_way_to_read(codes, "its checksums differ")
    mended()
    assert equal(codes[ROWS], CodeDataset(whole)[ROWS])


def test_a_bit_flipped_in_what_the_index_says_is_noticed(folder, mended):
    text = (folder / "index.json").read_text()
    for was, now in (('"num_codes": 16,\n "num_im', '"num_codes": 17,\n "num_im'), ('"b"', '"c"'), (": 8,", ": 9,")):
        assert was in text
        (folder / "index.json").write_text(text.replace(was, now))
        with refused("is damaged .*; remove it and run"):
            CodeDataset(folder)
    (folder / "index.json").unlink()
    mended()


# Shards of something else


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("of", ["another place", "other images", "another tokenizer"])
def test_case_07_a_shard_of_something_else(folder, source, whole, mended, tmp_path, of, pinned):
    if of == "other images":
        source = shutil.copytree(source, tmp_path / "photos")
        (source / "train" / "a" / "009.png").write_bytes((source / "test" / "a" / "0.png").read_bytes())
    tokenize(source, tmp_path / "other", tokenizer(seed=int(of == "another tokenizer")))
    if not pinned:
        changed_index(folder, as_before)
    if of == "another place":
        shutil.copyfile(whole / SHARD, folder / OTHER)
        shutil.copyfile(whole / OTHER, folder / SHARD)
    else:
        shutil.copyfile(tmp_path / "other" / SHARD, folder / SHARD)
    codes = CodeDataset(folder)
    if pinned or of != "other images":  # which only a pin tells
        for row in (0, 9) if of == "another place" else (9,):
            with refused(r"is not the shard that the index of .* says; run `vqvae tokenize` again"):
                codes[row]
    assert equal(codes[18:], CodeDataset(whole)[18:])
    if pinned or of == "another place":
        mended()
    else:
        # Nothing vouches for either: it may be somebody's.
        with refused(f"holds {SHARD}"):
            mended()


def test_an_index_of_a_version_before_is_read_and_renewed(folder, whole, mended):
    changed_index(folder, as_before)
    codes = CodeDataset(folder)
    assert equal(codes[range(20)], CodeDataset(whole)[range(20)])
    assert (codes.source, codes.source_name) == ("/home/somebody/photos", "photos")
    assert codes.tokenizer["source"] == "/home/somebody/photos"
    assert codes.digest() is None
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with refused("its checksums differ"):
        CodeDataset(folder)[9]
    mended()
    assert CodeDataset(folder).digest() == CodeDataset(whole).digest()
    # Without a checksum its numbers are held against the tokenizer.
    changed_index(folder, lambda index: (as_before(index), index.update(num_codes=17)))
    with refused(r"says 17 codes in a grid \(2, 2\), and its tokenizer has 16 in"):
        CodeDataset(folder).check_tokenizer(tokenizer())


# Files outside the folder


@pytest.mark.parametrize(
    "names",
    [
        ["../x.safetensors", SHARD, "codes-00002.safetensors"],
        [SHARD, OTHER, "codes-00002.safetensors"],
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
    with refused(r"the index of .* is damaged"):
        CodeDataset(folder)


def test_case_07_links_that_lead_out_are_refused_and_those_within_are_not(folder, whole, mended, tmp_path):
    (folder / SHARD).rename(tmp_path / SHARD)
    (folder / SHARD).symlink_to(tmp_path / SHARD)
    with refused(f"{SHARD} is a link to a file outside its folder; run"):
        CodeDataset(folder)
    mended()
    assert not (folder / SHARD).is_symlink()
    assert (tmp_path / SHARD).exists()

    (folder / SHARD).rename(folder / "kept")
    (folder / SHARD).symlink_to("kept")
    assert equal(CodeDataset(folder)[ROWS], CodeDataset(whole)[ROWS])
    # As the cache of the hub has them.
    snapshot = tmp_path / "models--somebody--codes" / "snapshots" / "0123" / "train"
    blobs = tmp_path / "models--somebody--codes" / "blobs"
    snapshot.mkdir(parents=True)
    copied(whole, blobs)
    for name in contents(whole):
        (snapshot / name).symlink_to(f"../../../blobs/{name}")
    assert equal(CodeDataset(snapshot)[ROWS], CodeDataset(whole)[ROWS])


@pytest.mark.parametrize("name", [SHARD, "index.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "nothing", "itself"])
def test_what_is_no_regular_file_is_one_line_and_no_wait(folder, source, name, kind):
    path = folder / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(name if kind == "itself" else "nothing")
    with refused(name):
        CodeDataset(folder)
    before = sorted(os.listdir(folder))
    if kind in ("pipe", "folder") or (kind, name) == ("itself", SHARD):
        with refused(name):
            tokenize(source, folder)
        assert sorted(os.listdir(folder)) == before
    else:
        tokenize(source, folder)
        CodeDataset(folder)[range(20)]


# Forged shards: whoever made them made the checksums fit


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
    ],
)
def test_values_that_no_writer_wrote_are_refused(folder, whole, mended, name, at, value, message):
    tensors = tensors_of(folder)
    forged(folder, tensors)
    assert equal(CodeDataset(folder)[ROWS], CodeDataset(whole)[ROWS])
    tensors[name][at] = value
    forged(folder, tensors)
    no_way_to_read(CodeDataset(folder), message)
    check_others(CodeDataset(folder), whole)
    (folder / SHARD).unlink()
    mended()


def _set(name: str, field: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header[name].update({field: value})


@pytest.mark.parametrize(
    "change",
    [
        *(_set("codes", "shape", shape) for shape in ([9, -2, -2], [9, 4], [2**70, 2, 2], [9, 2.0, 2], [], None)),
        *(_set("codes", "data_offsets", at) for at in ([0], [72, 0], [-8, 64], [0, 2**64], None)),
        *(_set("codes", "dtype", kind) for kind in ("F16", "I16", 16, "U32")),
        _set("key_bytes", "shape", [7, 9]),
        lambda header: header["labels"].update(data_offsets=header["key_ends"]["data_offsets"]),
        lambda header: header.update(more={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}),
        lambda header: header.pop("key_ends"),
        lambda header: header.update(codes=[]),
        lambda header: header.update(__metadata__={"about": 3}),
        lambda header: header.update(__metadata__={"about": "[" * 100_000}),
        lambda header: header.update(__metadata__={"about": '{"class": "CodeDataset", "crc32": {"about": Infinity}}'}),
    ],
)
def test_headers_that_no_writer_wrote_are_refused(folder, whole, change):
    forged(folder, tensors_of(folder), change)
    codes = CodeDataset(folder)
    with refused(rf"{SHARD} (is no whole shard of codes|is not the shard)"):
        codes[9]
    check_others(codes, whole)


# An index of anybody


@pytest.mark.parametrize(
    "text",
    [
        *("[" * 100_000, "{" * 5000, '{"x": ' * 200 + "1" + "}" * 200, '{"class": "CodeDataset", "rows": Infinity}'),
        *('{"a": 1, "a": 1}', '"x"', "", "9" * 5000, "\0", "null", '{"class": "CodeDataset", "num_rows": 20}'),
    ],
)
def test_case_22_an_index_that_is_no_json_is_one_line_and_mended(folder, mended, text):
    (folder / "index.json").write_text(text)
    with refused(r"index\.json|the index of"):
        CodeDataset(folder)
    if text.endswith("20}"):  # it may be of something else, and somebody's
        with refused("holds codes with format None, expected 1; name another folder"):
            mended()
    else:
        mended()


FIELDS: dict[str, tuple[Any, ...]] = {
    "format": (None, True, 0, 1.0, "1", [1] * 1000, 9, 10**30),
    "grid": (None, [], [0], [2, 2.0], [2, True], [1 << 20, 1 << 20], "22", [[2, 2]], [1] * 100),
    "num_codes": (None, 0, 1.0, True, (1 << 32) + 1, 10**30, "16"),
    "dtype": (None, "uint8", "uint32", "O", "V1000000000000", "uint16" * 1000, ["uint16"]),
    "num_classes": (0, 1.0, True, 10**10, "2", None, 3),
    "class_names": ([], ["a"], ["a", 1], "ab", {"a": 1, "b": 2}),
    "batch_size": (None, 0, 4.0, 10**30),
    "shard_size": (None, 0, 9.0, 10**30, 1, 8, 10, 10**15),
    "num_images": (None, -1, 20.0, 10**30, 21, 19, 0),
    "num_rows": (None, -1, 20.0, 21, 10**18, float("inf"), float("nan")),
    "image_shape": (None, [], [3, 8], [3, 8, 0], [3, 8, 8.0], [3, 8, 10**30], "388"),
    "split": (None, 1, []),
    "source": (None, {"name": "x"}, {"name": "x", "path": "/x"}, {"name": 1, "path": None}),
    "tokenizer": (None, 1, [], {}, {"fingerprint": "x"}),
    "shards": (None, {}, "x", 10**18, [], [None] * 3, [{}] * 3),
    "unreadable": (None, {}, "x", [None], [{"key": "x"}], [{"key": 1, "reason": "x"}], [{"key": "x", "reason": "x"}]),
    "crc32": (None, -1, 0, "x", [], 1.5),
}


@pytest.mark.parametrize("name", FIELDS)
def test_case_22_no_field_of_an_index_is_trusted(folder, whole, name):
    signed = name not in ("crc32", "tokenizer")
    for value in FIELDS[name]:
        shutil.copyfile(whole / "index.json", folder / "index.json")
        changed_index(folder, lambda index, value=value: index.update({name: value}), signed=signed)
        with refused(r"the index of|is of format|index\.json cannot be read"):
            CodeDataset(folder)
    shutil.copyfile(whole / "index.json", folder / "index.json")
    changed_index(folder, lambda index: index.pop(name), signed=name != "tokenizer")
    if name == "crc32":
        CodeDataset(folder)  # as versions before wrote it
    else:
        with refused("index"):
            CodeDataset(folder)


def test_folders_that_are_none_are_one_line(folder, tmp_path):
    with refused("has no index.json of `vqvae tokenize`; expected"):
        CodeDataset(tmp_path)
    with refused("holds train; name one of them, as .*train"):
        CodeDataset(folder.parent)
    changed_index(folder, lambda index: index.update({"class": "Prior"}))
    with refused("is of something else"):
        CodeDataset(folder)
    with (folder / "index.json").open("r+b") as file:
        file.truncate(1 << 40)
    with refused(r"index\.json .* it has 1,099,511,627,776 bytes, expected at most"):
        CodeDataset(folder)
