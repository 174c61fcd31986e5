"""Tokenized sets: what is written is what the model gives, once each, whoever writes it and however often it stops."""

import copy
import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from token_worlds import contents, photos, plan, tokenize, tokenizer

from vqvae import GaussianVAE
from vqvae.data import ImageTensors, load_images
from vqvae.tokens import CodeDataset
from vqvae.tokens.pipeline import Timings, encode_batch, read_batch
from vqvae.tokens.shards import finish, is_done, missing, write_shard

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]
SIZES = {"batch_size": 4, "shard_size": 9}
BROKEN = (3, 18, 19, 20, 21, 22, 23, 24, 25, 26, 49)  # one of the first shard, all of the third, the very last


def run(model, source, folder, **options):
    return tokenize(model, load_images(source, size=8), folder, **{**SIZES, **options})


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return photos(tmp_path_factory.mktemp("source") / "photos", broken=BROKEN)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> Path:
    """The codes of an undisturbed run."""
    folder = tmp_path_factory.mktemp("codes") / "train"
    run(tokenizer(), source, folder)
    return folder


@pytest.mark.parametrize("kind", ["plain", "residual", "many"])
def test_codes_are_those_of_the_model(source, tmp_path, kind):
    model = tokenizer(kind)
    timings = Timings()
    made = run(model, source, tmp_path / "codes", timings=timings)
    assert (made.whole, made.num_rows, made.num_shards, made.num_images) == (True, 39, 6, 50)
    assert [key for key, _ in made.unreadable] == [f"{'ab'[i >= 25]}/{i:03}.png" for i in BROKEN]
    images = load_images(source, size=8)
    batch = images.__getitems__(range(50))
    codes = CodeDataset(tmp_path / "codes")
    found = codes.__getitems__(range(39))
    assert found.codes.dtype == torch.int64
    assert torch.equal(found.codes, model.encode(batch.images))
    assert torch.equal(found.labels, batch.labels)
    assert [codes.key(row) for row in range(39)] == [images.key(i) for i in range(50) if i not in BROKEN]
    assert (codes.grid, codes.num_codes) == (model.grid, model.num_codes)
    assert codes.dtype == (np.uint32 if kind == "many" else np.uint16)
    assert codes.unreadable == made.unreadable == batch.skipped
    assert min(timings.wait, timings.network, timings.search, timings.write) > 0
    assert timings.network + timings.search < timings.total


def test_the_model_always_sees_batches_of_one_shape(source, tmp_path, monkeypatch):
    model = tokenizer()
    shapes = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda images: (shapes.append(images.shape), encode(images))[1])
    run(model, source, tmp_path / "codes")
    assert len(shapes) == 5 * 3 + 2
    assert set(shapes) == {(4, 3, 8, 8)}


def test_others_can_read_the_shards(whole, source):
    index = json.loads((whole / "index.json").read_text())
    assert [shard["rows"] for shard in index["shards"]] == [8, 9, 0, 9, 9, 4]
    assert index["num_rows"] == 39
    assert (index["grid"], index["dtype"], index["class_names"]) == ([2, 2], "uint16", ["a", "b"])
    assert index["source"]["name"] == source.name
    assert index["tokenizer"]["config"]["quantizer"]["num_codes"] == 16
    with (whole / "codes-00000.safetensors").open("rb") as file:
        tensors = safetensors.numpy.load(file.read())
    ends = tensors["key_ends"].tolist()
    text = tensors["key_bytes"].tobytes().decode()
    keys = [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    assert keys == [f"a/{i:03}.png" for i in range(9) if i != 3]
    assert tensors["codes"].shape == (8, 2, 2)
    assert tensors["labels"].tolist() == [0] * 8


def test_workers_and_ranks_write_the_same_bytes(source, whole, tmp_path):
    model = tokenizer()
    run(model, source, tmp_path / "workers", num_workers=2)
    assert contents(tmp_path / "workers") == contents(whole)
    seen = []
    first = run(model, source, tmp_path / "ranks", rank=1, world_size=2, progress=lambda *done: seen.append(done))
    assert (first.whole, first.num_shards, first.num_images) == (False, 3, 23)
    assert seen[-1] == (23, 23)
    assert not (tmp_path / "ranks" / "index.json").exists()
    with pytest.raises(ValueError, match=r"has no index\.json .* run `vqvae tokenize` again to finish it"):
        CodeDataset(tmp_path / "ranks")
    assert run(model, source, tmp_path / "ranks", rank=0, world_size=2).whole
    assert contents(tmp_path / "ranks") == contents(whole)


def test_the_steps_of_another_engine_write_the_same_bytes(source, whole, tmp_path):
    model, images = tokenizer(), load_images(source, size=8)
    todo = plan(model, images, tmp_path / "codes", **SIZES)
    slices = [(shard, part) for shard in missing(todo) for part in todo.slices(shard)]
    random.Random(0).shuffle(slices)
    made: dict[int, list] = {}
    for shard, part in slices:
        assert finish(todo) is None
        made.setdefault(shard, []).append(encode_batch(model, read_batch(images, part, todo.batch_size)))
        if len(made[shard]) == len(list(todo.slices(shard))):
            write_shard(todo, shard, made[shard])
    ends = [threading.Thread(target=finish, args=(todo,)) for _ in range(4)]
    for each in ends:
        each.start()
    for each in ends:
        each.join()
    assert contents(tmp_path / "codes") == contents(whole)


def test_what_is_there_is_kept_and_what_is_damaged_made_again(source, whole, tmp_path):
    model, folder = tokenizer(), tmp_path / "codes"
    run(model, source, folder)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert run(model, source, folder).num_images == 0
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    data = (folder / "codes-00003.safetensors").read_bytes()
    for spoiled in (data[:5], data[:200], data[:-1], data + b"x", b"", bytes(8) + data[8:], b"\xff" * len(data)):
        (folder / "codes-00003.safetensors").write_bytes(spoiled)
        with pytest.raises(ValueError, match=r"(is cut|no whole shard of codes).*; run `vqvae tokenize` again"):
            CodeDataset(folder)[25]
        assert run(model, source, folder).num_images == 9
        assert contents(folder) == contents(whole)
    (folder / "codes-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"codes-00001\.safetensors is missing; run"):
        CodeDataset(folder)
    (folder / "index.json").write_text("{")
    run(model, source, folder)
    assert contents(folder) == contents(whole)


def test_no_flipped_byte_of_a_header_is_worse_than_a_damaged_shard(source, whole, tmp_path):
    folder = tmp_path / "codes"
    folder.mkdir()
    for name, data in contents(whole).items():
        (folder / name).write_bytes(data)
    todo = plan(tokenizer(), load_images(source, size=8), folder, **SIZES)
    path = todo.path(1)
    data = path.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    seen = set()
    codes = CodeDataset(folder)
    for at in range(length):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at * 3 % 8]) + data[at + 1 :])
        try:
            seen.add(is_done(todo, 1))
        except ValueError as error:
            seen.add(str(error).split(" ")[2].rstrip(","))
        with pytest.raises(ValueError, match=r"codes-00001\.safetensors .*; run `vqvae tokenize` again to mend it"):
            copy.copy(codes).__getitems__([8])  # a copy has opened nothing
    assert False in seen
    assert seen <= {True, False, "codes-00001.safetensors"}  # white space may change, and the name of the class


def test_other_tokenizers_sources_and_layouts_are_refused(source, whole, tmp_path):
    model = tokenizer()
    images = load_images(source, size=8)
    some = ImageTensors(torch.zeros(50, 3, 8, 8, dtype=torch.uint8), name=str(source))
    other = photos(tmp_path / "other")
    before = contents(whole)
    cases = [
        ("tokenizer", lambda folder: run(tokenizer(seed=1), source, folder)),
        ("batch_size", lambda folder: run(model, source, folder, batch_size=5)),
        ("first|stop|shard_size|makes 5", lambda folder: run(model, source, folder, shard_size=10)),
        ("split", lambda folder: run(model, source, folder, split="test")),
        ("of other images than", lambda folder: run(model, other, folder)),
        ("num_images|makes 1", lambda folder: tokenize(model, load_images(source, "test", size=8), folder, **SIZES)),
        ("num_classes|without labels|with labels", lambda folder: tokenize(model, some, folder, **SIZES)),
    ]
    for has_index in (True, False):
        folder = tmp_path / f"copy{has_index}"
        folder.mkdir()
        for name, data in before.items():
            if has_index or name != "index.json":
                (folder / name).write_bytes(data)
        held = contents(folder)
        for what, attempt in cases:
            with pytest.raises(ValueError, match=rf"holds .*({what}).*; name another folder, or remove this one"):
                attempt(folder)
        assert contents(folder) == held
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ValueError, match="holds codes with format None, expected 1"):
        tokenize(model, images, foreign, **SIZES)
    safetensors.numpy.save_file({"a": np.zeros(3)}, tmp_path / "codes-00000.safetensors")
    with pytest.raises(ValueError, match=r"holds codes-00000\.safetensors, but it holds something else"):
        tokenize(model, images, tmp_path, **SIZES)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; expected a folder"):
        tokenize(model, images, tmp_path / "file", **SIZES)


def test_models_and_numbers_that_do_not_fit_are_refused(source, tmp_path, untyped):
    model = tokenizer()
    images = load_images(source, size=8)
    for changed, message in (
        ({"batch_size": 0}, "got batch_size=0"),
        ({"shard_size": 0}, "got shard_size=0"),
        ({"num_workers": -1}, "got num_workers=-1"),
        ({"rank": 2, "world_size": 2}, "got rank=2; expected 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenize(model, images, tmp_path / "codes", **{**SIZES, **changed})
    with pytest.raises(ValueError, match=r"is for images of shape \(3, 8, 8\), got \(3, 12, 12\).* size=8"):
        tokenize(model, load_images(source, size=12), tmp_path / "codes")
    gaussian = GaussianVAE(image_size=8, num_channels=3, width=8, num_blocks=1, dim=3)
    with pytest.raises(ValueError, match="GaussianVAE has no codes"):
        tokenize(gaussian, images, tmp_path / "codes")
    model.quantizer.num_codes = 1 << 36
    with pytest.raises(ValueError, match="have at most 32 bits"):
        tokenize(model, images, tmp_path / "codes")
    assert not (tmp_path / "codes").exists()


def test_without_labels_and_in_memory(tmp_path):
    model = tokenizer()
    pixels = torch.randint(0, 256, (11, 3, 8, 8), dtype=torch.uint8)
    tokenize(model, ImageTensors(pixels), tmp_path / "codes", batch_size=3, shard_size=5, num_workers=2)
    codes = CodeDataset(tmp_path / "codes")
    assert codes.__getitems__([4, 5]).labels is None
    assert len(codes[10]) == 1
    assert codes.key(7) == "7"
    assert torch.equal(codes.__getitems__(range(11)).codes, model.encode(pixels))


def test_a_set_without_one_readable_image_is_an_error_or_empty(tmp_path):
    source = photos(tmp_path / "photos", num=6)
    images = load_images(source, size=8)
    for path in (source / "train").rglob("*.png"):
        path.write_bytes(b"broken")
    made = tokenize(tokenizer(), images, tmp_path / "codes", **SIZES)
    assert (made.num_rows, len(made.unreadable)) == (0, 6)
    codes = CodeDataset(tmp_path / "codes")
    assert len(codes) == 0
    assert codes.__getitems__([]).codes.shape == (0, 2, 2)


def test_a_full_disk_is_one_error_and_nothing_is_lost(source, whole, tmp_path, monkeypatch):
    synced = os.fsync
    calls = 0

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        synced(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ValueError, match="no space is left on the disk"):
            run(tokenizer(), source, tmp_path / "codes")
    assert sorted(os.listdir(tmp_path / "codes")) == ["codes-00000.safetensors", "codes-00001.safetensors"]
    assert run(tokenizer(), source, tmp_path / "codes").num_images == 32
    assert contents(tmp_path / "codes") == contents(whole)


KILLED = """
import sys
from token_worlds import tokenize, tokenizer
from vqvae.data import load_images
images = load_images(sys.argv[1], size=8)
tokenize(tokenizer(), images, sys.argv[2], batch_size=4, shard_size=9, num_workers=int(sys.argv[3]),
         progress=lambda done, total: print(done, flush=True))
"""


def killed(source: Path, folder: Path, num_slices: int, pause: float, num_workers: int) -> None:
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])])}
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(source), str(folder), str(num_workers)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        for _ in range(num_slices):
            process.stdout.readline()
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)


def kills(source: Path, folder: Path, whole: Path, num: int, seed: int) -> None:
    chance = random.Random(seed)
    for number in range(num):
        killed(source, folder, chance.randrange(1, 6), chance.uniform(0, 0.01), number % 2)
        for path in folder.glob("codes-*"):
            assert path.read_bytes() == (whole / path.name).read_bytes()
    run(tokenizer(), source, folder)
    assert contents(folder) == contents(whole)


@pytest.mark.slow
def test_kill_at_any_moment_changes_no_byte(source, whole, tmp_path):
    kills(source, tmp_path / "codes", whole, num=2, seed=0)


@pytest.mark.slow
def test_ten_kills_at_any_moments_change_no_byte(source, whole, tmp_path):
    kills(source, tmp_path / "codes", whole, num=10, seed=1)
