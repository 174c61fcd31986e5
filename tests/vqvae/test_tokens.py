"""Tokenized sets: what is written is what the model gives, once each, whoever writes it and however often it stops."""

import errno
import json
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from token_worlds import (
    OTHER,
    QUANTIZERS,
    SHARD,
    as_before,
    changed_index,
    contents,
    copied,
    loaded,
    photos,
    plan,
    process,
    refused,
    tokenize,
    tokenizer,
)
from torch.utils.data import DataLoader

from vqvae import GaussianVAE
from vqvae.data import ImageTensors, load_images
from vqvae.tokens import CodeDataset
from vqvae.tokens.jobs import one_job
from vqvae.tokens.pipeline import Timings, encode_batch, read_batch
from vqvae.tokens.shards import finish, missing, write_shard

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
REFUSED = "is being written by another job; wait until that has ended, or name another folder"
BROKEN = (3, *range(18, 27), 31)  # one of the first shard, all of the third, the very last


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return photos(tmp_path_factory.mktemp("source") / "photos", num=32, broken=BROKEN)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> Path:
    """The codes of an undisturbed run."""
    folder = tmp_path_factory.mktemp("codes") / "train"
    tokenize(source, folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return copied(whole, tmp_path / "codes")


@pytest.fixture
def todo(source, folder):
    return plan(source, folder)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_codes_are_those_of_the_model_however_they_are_read(source, tmp_path, kind):
    model, timings, shapes = tokenizer(kind), Timings(), []
    encode = model.encode

    def noted(images: torch.Tensor) -> torch.Tensor:
        shapes.append(images.shape)
        return encode(images)

    model.encode = noted
    made = tokenize(source, tmp_path / "codes", model, timings=timings)
    assert (made.whole, made.num_rows, made.num_shards, made.num_images) == (True, 21, 4, 32)
    assert [key for key, _ in made.unreadable] == [f"{'ab'[i >= 16]}/{i:03}.png" for i in BROKEN]
    assert set(shapes) == {(4, 3, 8, 8)}  # always, as other shapes round differently
    assert min(timings.wait, timings.network, timings.search, timings.write) > 0
    assert timings.network + timings.search < timings.total

    images = load_images(source, size=8)
    batch, codes = images.__getitems__(range(32)), CodeDataset(tmp_path / "codes")
    expected = encode(batch.images)
    for found in (
        codes[:].codes,
        torch.stack([codes[row][0] for row in range(21)]),
        torch.cat([batch.codes for batch in codes.batches(5)]),
        torch.cat([batch[0] for batch in DataLoader(codes, 5)]),
        torch.from_numpy(np.concatenate([codes.shard(shard)[0] for shard in range(4)]).astype(np.int64)),
    ):
        assert found.dtype == torch.int64
        assert torch.equal(found, expected)
    assert torch.equal(model.decode(found), model.decode(expected))
    assert torch.equal(codes[:].labels, batch.labels)
    assert [codes.key(row) for row in range(21)] == [images.key(i) for i in range(32) if i not in BROKEN]
    assert (codes.grid, codes.num_codes) == (model.grid, model.num_codes)
    assert codes.dtype == (np.uint32 if kind == "many" else np.uint16)
    assert codes.unreadable == made.unreadable == batch.skipped


def test_others_can_read_the_shards(whole, source):
    index = json.loads((whole / "index.json").read_text())
    assert [shard["rows"] for shard in index["shards"]] == [8, 9, 0, 4]
    assert (index["num_rows"], index["grid"], index["dtype"]) == (21, [2, 2], "uint16")
    assert index["class_names"] == ["a", "b"]
    assert index["tokenizer"]["config"]["quantizer"]["num_codes"] == 16
    tensors = safetensors.numpy.load((whole / OTHER).read_bytes())
    assert tensors["codes"].shape == (8, 2, 2)
    assert tensors["labels"].tolist() == [0] * 8
    assert tensors["key_bytes"].tobytes().decode() == "".join(f"a/{i:03}.png" for i in range(9) if i != 3)
    assert tensors["key_ends"].tolist() == list(range(9, 81, 9))


def test_a_set_without_one_readable_image_is_empty(tmp_path):
    source = photos(tmp_path / "photos", num=6)
    images = loaded(source)
    for path in (source / "train").rglob("*.png"):
        path.write_bytes(b"broken")
    made = tokenize(images, tmp_path / "codes")
    assert (made.num_rows, len(made.unreadable)) == (0, 6)
    codes = CodeDataset(tmp_path / "codes")
    assert len(codes) == 0
    assert codes[:].codes.shape == (0, 2, 2)


# Who writes


def test_workers_and_ranks_write_the_same_bytes(source, whole, tmp_path):
    few = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    tokenize(source, tmp_path / "workers", num_workers=few + 1)  # for which torch would warn
    assert contents(tmp_path / "workers") == contents(whole)
    seen = []
    first = tokenize(source, tmp_path / "ranks", rank=1, world_size=2, progress=lambda *done: seen.append(done))
    assert (first.whole, first.num_shards, first.num_images) == (False, 2, 14)
    assert seen[-1] == (14, 14)
    with refused(r"has no index\.json .* to finish it"):
        CodeDataset(tmp_path / "ranks")
    assert tokenize(source, tmp_path / "ranks", rank=0, world_size=2).whole
    assert contents(tmp_path / "ranks") == contents(whole)


def test_the_steps_of_another_engine_write_the_same_bytes(source, whole, tmp_path):
    model, images = tokenizer(), loaded(source)
    todo = plan(images, tmp_path / "codes", model)
    slices = [(shard, part) for shard in missing(todo) for part in todo.slices(shard)]
    random.Random(0).shuffle(slices)
    made: dict[int, list] = {}
    for shard, part in slices:
        assert finish(todo) is None
        made.setdefault(shard, []).append(encode_batch(model, read_batch(images, part, todo.batch_size)))
        if len(made[shard]) == len(list(todo.slices(shard))):
            write_shard(todo, shard, made[shard])
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(finish, [todo] * 4))
    assert contents(tmp_path / "codes") == contents(whole)


def test_who_is_at_work_while_another_sweeps_up_is_left_alone(source, todo, folder, whole, monkeypatch):
    save, calls, images, model = safetensors.numpy.save, [], loaded(source), tokenizer()

    def overtaken(*args: object) -> bytes:
        calls.append(finish(todo))  # by another, who has made the shard too
        assert list((folder / f".{SHARD}.writing").iterdir())
        return save(*args)

    monkeypatch.setattr(safetensors.numpy, "save", overtaken)
    write_shard(todo, 1, [encode_batch(model, read_batch(images, part, 4)) for part in todo.slices(1)])
    assert calls[0] is not None
    assert contents(folder) == contents(whole)


def test_what_killed_processes_left_is_swept_up_once_all_is_there(folder, whole, todo):
    left = [f".{SHARD}.writing", f".{SHARD}.mode", f".{SHARD}.0a1b2c3d", f"..{SHARD}.0a1b2c3d.writing"]
    left += [f"..{SHARD}.0a1b2c3d.mode", ".index.json.3", "..index.json.0a1b2c3d.writing", "..index.json.3.writing"]
    others = [f".{SHARD}.swp", ".index.json", ".keep", f"my.{SHARD}.writing", "index.json.3"]
    for name in (*left, *others):
        (folder / name).write_text("")
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).unlink()
    assert finish(todo) is None
    assert set(left) < set(contents(folder))  # somebody may be at work on them
    for name in (OTHER, "index.json"):
        (place := folder / f".{name}.writing" / "0a1b2c3d").mkdir(parents=True)
        (place / name).write_bytes(data[:100])
        (place / ".lock").touch()
    (folder / SHARD).write_bytes(data)
    assert len(CodeDataset(folder)[:]) == 21  # none of it disturbs a reader
    assert finish(todo) is not None
    assert set(contents(folder)) == {*contents(whole), *others}


# One job at a time


@pytest.mark.parametrize(
    ("first", "second"),
    [((0, 1), (0, 1)), ((1, 2), (1, 2)), ((0, 1), (1, 2)), ((1, 2), (0, 1)), ((3, 4), (1, 2))],
)
def test_case_06_the_second_job_is_refused_before_it_does_anything(source, whole, tmp_path, first, second, monkeypatch):
    monkeypatch.setattr("vqvae.tokens.jobs._TRYING_SECONDS", 0.0)
    todo, model = plan(source, tmp_path / "codes"), tokenizer()
    model.encode = lambda images: pytest.fail("it encoded")
    with one_job(todo, *first) as shards:
        assert shards == list(range(first[0], 4, first[1]))
        before = sorted(os.listdir(todo.folder))
        with refused(REFUSED):
            tokenize(source, todo.folder, model, rank=second[0], world_size=second[1])
        assert sorted(os.listdir(todo.folder)) == before
    assert not todo.folder.exists()  # it is as empty as it was, and the lock's file is gone
    tokenize(source, todo.folder)
    assert contents(todo.folder) == contents(whole)


def test_ranks_of_one_job_work_at_the_same_time(source, tmp_path):
    todo = plan(source, tmp_path / "codes")
    with one_job(todo, 2, 3), one_job(todo, 0, 3) as shards, one_job(todo, 1, 3):
        assert shards == [0, 3]


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_locks_that_killed_jobs_left_are_no_obstacle(source, whole, folder, rank, world_size):
    (folder / SHARD).unlink()
    for name in (".lock", ".rank-0-of-1.lock", ".rank-1-of-2.lock", ".rank-3-of-4.lock"):
        (folder / name).touch()
    tokenize(source, folder, rank=rank, world_size=world_size)
    # Those that nobody waits for go with the next job of their own ranks.
    assert set(contents(folder)) - set(contents(whole)) <= {".lock", ".rank-1-of-2.lock"}
    assert {name: contents(folder)[name] for name in contents(whole)} == contents(whole)


@pytest.mark.slow
def test_case_06_two_jobs_at_random_moments_make_what_one_makes(source, whole, tmp_path):
    chance, num_refused = random.Random(0), 0
    with process(source) as one, process(source) as other:
        for number in range(30):
            folder = tmp_path / f"codes-{number}"
            if number % 3:  # some of it is there already, whole or not
                copied(whole, folder)
                for name in chance.sample(sorted(contents(whole)), chance.randint(1, 4)):
                    (folder / name).unlink()
                path = chance.choice(sorted(folder.iterdir()))
                path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])
            for each in (one, other):
                each.stdin.write(f"{chance.uniform(0, 0.04):.4f} {folder}\n")
                each.stdin.flush()
            answers = [each.stdout.readline().strip() for each in (one, other)]
            assert "done" in answers
            assert all(answer == "done" or REFUSED in answer for answer in answers), answers
            num_refused += answers.count("done") == 1
            assert contents(folder) == contents(whole), answers
    assert num_refused


# What is there already


def test_what_is_there_is_kept_and_what_is_damaged_made_again(source, whole, folder):
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert tokenize(source, folder).num_images == 0
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    data = (folder / SHARD).read_bytes()
    headers = (b"[" * 100_000, b'{"a": 1, "a": 1}', b"\xff\xfe", b"{}")
    for spoiled in (
        *(data[:5], data[:200], data[:-1], data + b"x", b"", bytes(8) + data[8:], b"\xff" * len(data)),
        *(len(text).to_bytes(8, "little") + text + data for text in headers),
    ):
        (folder / SHARD).write_bytes(spoiled)
        with refused(r"(is cut|no whole shard of codes).*; run `vqvae tokenize` again"):
            CodeDataset(folder)[8]
        assert tokenize(source, folder).num_images == 9
        assert contents(folder) == contents(whole)
    (folder / SHARD).unlink()
    with refused(f"{SHARD} is missing; run"):
        CodeDataset(folder)
    (folder / "index.json").write_text("{")
    tokenize(source, folder)
    assert contents(folder) == contents(whole)


@pytest.mark.parametrize("is_old", [False, True])
def test_a_whole_set_that_cannot_be_written_to_is_as_good(source, folder, is_old, monkeypatch):
    if is_old:
        changed_index(folder, as_before)
    (folder / f".{SHARD}.writing").write_text("")

    def read_only(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    def no_lock(*args: object, **options: object) -> None:
        raise ValueError("no lock") from PermissionError()

    for name in ("unlink", "replace", "rename", "mkdir"):
        monkeypatch.setattr(os, name, read_only)
    monkeypatch.setattr(Path, "write_text", read_only)
    monkeypatch.setattr("safefolder.locks.one_writer", no_lock)
    before = contents(folder)
    made = tokenize(source, folder, tokenizer_source="elsewhere")
    assert (made.whole, made.num_images) == (True, 0)
    assert contents(folder) == before
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_bytes(json.dumps({**index, "num_rows": 20}).encode())
    with refused(r"could not write .*index\.json: .*Read-only file system"):
        tokenize(source, folder)
    (folder / SHARD).write_bytes(b"")
    with refused("no lock"):
        tokenize(source, folder)


@pytest.mark.parametrize("has_index", [True, False])
def test_other_tokenizers_sources_and_layouts_are_refused(source, folder, tmp_path, has_index):
    if not has_index:
        (folder / "index.json").unlink()
    before = contents(folder)
    some = ImageTensors(torch.zeros(32, 3, 8, 8, dtype=torch.uint8), name=str(source))
    for what, images, model, options in (
        ("tokenizer", source, tokenizer(seed=1), {}),
        ("batch_size 4, expected 3; to go on, give batch_size=4", source, None, {"batch_size": 3}),
        ("shard_size 9, expected 8; to go on, give shard_size=9", source, None, {"shard_size": 8}),
        ("shard_size 9, expected 20; to go on, give shard_size=9", source, None, {"shard_size": 20}),
        ("split", source, None, {"split": "test"}),
        ("of other images than", photos(tmp_path / "other", num=32), None, {}),
        ("num_images|makes 1", load_images(source, "test", size=8), None, {}),
        ("num_classes|without labels|with labels", some, None, {}),
    ):
        with refused(rf"holds .*({what}).*; name another folder, or remove this one"):
            tokenize(images, folder, model, **options)
    assert contents(folder) == before


def test_a_folder_of_something_else_is_refused(source, tmp_path):
    (tmp_path / "index.json").write_text('{"weight_map": {}}')
    with refused("holds codes with format None, expected 1"):
        tokenize(source, tmp_path)
    (tmp_path / "index.json").unlink()
    safetensors.numpy.save_file({"a": np.zeros(3)}, tmp_path / OTHER)
    with refused(f"holds {OTHER}, but it holds something else"):
        tokenize(source, tmp_path)
    with refused(f"{OTHER} is a file; expected a folder"):
        tokenize(source, tmp_path / OTHER)


# What does not fit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 4.0}, r"got batch_size=4\.0; expected a whole number"),
        ({"shard_size": True}, "got shard_size=True; expected a whole number"),
        ({"num_workers": -1}, "got num_workers=-1"),
        ({"rank": 2, "world_size": 2}, "got rank=2; expected 0 to 1"),
    ],
)
def test_numbers_that_are_none_are_refused(source, tmp_path, untyped, options, message):
    with refused(message):
        tokenize(source, tmp_path / "codes", **options)
    assert not (tmp_path / "codes").exists()


def test_models_that_do_not_fit_are_refused(source, tmp_path, untyped):
    gaussian = GaussianVAE(image_size=8, num_channels=3, width=8, num_blocks=1, dim=3)
    many, large = tokenizer(), tokenizer()
    many.quantizer.num_codes = 1 << 36
    large.grid = (1 << 16, 1 << 14)
    for model, message in (
        (gaussian, "GaussianVAE has no codes"),
        (many, "at most 32 bits"),
        (large, r"got shard_size=9, but memory has to hold .*, 19\.3 GB; .* at most 2"),
        (tokenizer().to("meta"), r"encoder\..* of VQVAE is on the device meta"),
    ):
        with refused(message):
            tokenize(source, tmp_path / "codes", model)
    plan(source, tmp_path / "codes", large, shard_size=2)
    with refused(r"is for images of shape \(3, 8, 8\), got \(3, 12, 12\).* size=8"):
        tokenize(load_images(source, size=12), tmp_path / "codes")
    assert not (tmp_path / "codes").exists()


# Disks and kills


def test_a_full_disk_is_one_error_and_nothing_is_lost(source, whole, tmp_path, monkeypatch):
    synced = os.fsync
    calls = 0

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        synced(handle)

    with monkeypatch.context() as patch, refused("no space is left on the disk"):
        patch.setattr(os, "fsync", full)
        tokenize(source, tmp_path / "codes")
    assert sorted(os.listdir(tmp_path / "codes")) == [OTHER, SHARD]
    assert tokenize(source, tmp_path / "codes").num_images == 14
    assert contents(tmp_path / "codes") == contents(whole)


@pytest.mark.slow
def test_kills_at_any_moments_change_no_byte(source, whole, tmp_path):
    chance, folder = random.Random(1), tmp_path / "codes"
    for _ in range(4):
        with process(source) as other:
            other.stdin.write(f"0 {folder}\n")
            other.stdin.flush()
            time.sleep(chance.uniform(0.01, 0.15))
        for path in folder.glob("codes-*"):
            assert path.read_bytes() == (whole / path.name).read_bytes()
    tokenize(source, folder)
    assert contents(folder) == contents(whole)
