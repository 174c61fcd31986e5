"""A tokenized set is whole or says so: writers at once, what killed ones left, bits that flipped, and who reads it."""

import dataclasses
import errno
import hashlib
import importlib.util
import json
import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
import tyro
from token_worlds import contents, photos, plan, tokenize, tokenizer

from priors import UniformPrior
from vqvae import fingerprint
from vqvae.cli.tokenizing import tokenize as command
from vqvae.codec.model_fingerprint import fingerprint as of_codec
from vqvae.data import load_images
from vqvae.likelihoods import Categorical
from vqvae.tokens import CodeDataset, write_parquet
from vqvae.tokens.pipeline import encode_batch, read_batch
from vqvae.tokens.shards import finish, is_done, missing, write_shard

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
SIZES = {"batch_size": 4, "shard_size": 9}
SHARD = "codes-00001.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return photos(tmp_path_factory.mktemp("source") / "photos", num=20)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("codes") / "train"
    tokenize(tokenizer(), load_images(source, size=8), folder, **SIZES)
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    """A copy of the whole set."""
    folder = tmp_path / "codes" / "train"
    folder.mkdir(parents=True)
    for name, data in contents(whole).items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def todo(source, folder):
    return plan(tokenizer(), load_images(source, size=8), folder, **SIZES)


@pytest.fixture
def parts(source, todo):
    """What shard 1 is made of."""
    images, model = load_images(source, size=8), tokenizer()
    return [encode_batch(model, read_batch(images, part, 4)) for part in todo.slices(1)]


# Writers at once, and what they leave


def test_two_processes_write_one_shard_at_one_moment(todo, parts, folder, whole, monkeypatch):
    save, together = safetensors.numpy.save, threading.Barrier(2, timeout=60)

    def slowly(*args: object) -> bytes:
        together.wait()  # each has a place to write to
        data = save(*args)
        together.wait()  # both are about to write
        return data

    monkeypatch.setattr(safetensors.numpy, "save", slowly)
    (folder / SHARD).unlink()
    errors: list[Exception] = []

    def write() -> None:
        try:
            write_shard(todo, 1, parts)
        except Exception as error:
            errors.append(error)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for each in writers:
        each.start()
    for each in writers:
        each.join()
    assert errors == []
    assert contents(folder) == contents(whole)


def test_who_is_at_work_while_another_sweeps_up_is_left_alone(todo, parts, folder, whole, monkeypatch):
    save, calls = safetensors.numpy.save, []

    def overtaken(*args: object) -> bytes:
        calls.append(finish(todo))  # by another, who has made the shard too
        assert list((folder / f".{SHARD}.writing").iterdir())
        return save(*args)

    monkeypatch.setattr(safetensors.numpy, "save", overtaken)
    write_shard(todo, 1, parts)
    assert calls[0] is not None
    assert contents(folder) == contents(whole)


def test_what_killed_processes_left_is_swept_up_once_all_is_there(source, folder, whole, todo):
    left = [f".{SHARD}.writing", f".{SHARD}.mode", f".{SHARD}.0a1b2c3d", f"..{SHARD}.0a1b2c3d.writing"]
    left += [f"..{SHARD}.0a1b2c3d.mode", ".index.json.3", "..index.json.0a1b2c3d.writing", "..index.json.3.writing"]
    others = [f".{SHARD}.swp", ".index.json", ".keep", f"my.{SHARD}.writing", "index.json.3"]
    for name in (*left, *others):
        (folder / name).write_text("")
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).unlink()
    assert finish(todo) is None
    assert set(left) < set(contents(folder))  # somebody may be at work on them
    for name in (SHARD.replace("1", "0"), "index.json"):
        (place := folder / f".{name}.writing" / "0a1b2c3d").mkdir(parents=True)
        (place / name).write_bytes(data[:100])
        (place / ".lock").touch()
    (folder / SHARD).write_bytes(data)
    assert finish(todo) is not None
    assert set(contents(folder)) == {*contents(whole), *others}


def test_a_whole_set_that_cannot_be_written_to_is_as_good(source, folder, monkeypatch):
    (folder / f".{SHARD}.writing").write_text("")

    def read_only(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        for name in ("unlink", "replace", "rename", "mkdir"):
            patch.setattr(os, name, read_only)
        patch.setattr(Path, "write_text", read_only)
        made = tokenize(tokenizer(), load_images(source, size=8), folder, tokenizer_source="elsewhere", **SIZES)
        assert (made.whole, made.num_images) == (True, 0)
        (index := folder / "index.json").chmod(0o644)
        index.write_bytes(b"{")
        with pytest.raises(ValueError, match=r"could not write .*index\.json: .*Read-only file system"):
            tokenize(tokenizer(), load_images(source, size=8), folder, **SIZES)


# Bits that flipped


def test_a_flipped_bit_of_any_tensor_is_noticed_and_the_shard_made_again(source, folder, whole, todo):
    path = folder / SHARD
    data = path.read_bytes()
    for at in range(8 + int.from_bytes(data[:8], "little"), len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        assert not is_done(todo, 1)
    assert missing(todo) == [1]
    with pytest.raises(ValueError, match=r"codes-00001\.safetensors is damaged, its checksums differ; run"):
        CodeDataset(folder).shard(1)
    pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match="its checksums differ"):
        write_parquet(CodeDataset(folder), folder.parent / "codes.parquet")
    assert tokenize(tokenizer(), load_images(source, size=8), folder, **SIZES).num_images == 9
    assert contents(folder) == contents(whole)


# Which tokenizer


def test_a_decoder_or_likelihood_changes_no_code_and_an_encoder_or_codebook_does(folder):
    model, codes = tokenizer(), CodeDataset(folder)
    again = dataclasses.replace(model.config, likelihood=Categorical.Config()).build()
    again.encoder.load_state_dict(model.encoder.state_dict())
    again.quantizer.load_state_dict(model.quantizer.state_dict())
    codes.check_tokenizer(again)
    with torch.no_grad():
        next(model.decoder.parameters()).add_(1)
    codes.check_tokenizer(model)
    for part in (model.encoder, model.quantizer):
        with torch.no_grad():
            next(part.parameters()).add_(1)
        with pytest.raises(ValueError, match="of another tokenizer"):
            codes.check_tokenizer(model)
        with torch.no_grad():
            next(part.parameters()).sub_(1)


def test_the_fingerprints_of_codecs_stay_what_they_were():
    """As they have always been made: of everything."""
    model = tokenizer()
    prior = UniformPrior(num_codes=model.num_codes, grid=model.grid)
    digest = hashlib.sha256()
    for module, config in ((model, model.config.to_plain()), (prior, prior.config.to_plain())):
        digest.update(json.dumps([type(module).__name__, config], sort_keys=True).encode())
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    assert of_codec(model, prior) == digest.digest()[:8]
    assert fingerprint.of_tokenizer(model) != fingerprint.of_tokenizer(tokenizer(seed=1))


# Keys


def test_a_key_is_read_alone_and_may_be_no_utf8(tmp_path, monkeypatch, capsys):
    source = photos(tmp_path / "photos", num=6)
    strange = os.fsdecode(b"\xff\xfe.png")
    (source / "train" / "a" / "000.png").rename(source / "train" / "a" / strange)
    images = load_images(source, size=8)
    tokenize(tokenizer(), images, tmp_path / "codes", **SIZES)
    codes = CodeDataset(tmp_path / "codes")
    keys = [key.decode("utf-8", "surrogateescape") for key in codes.keys(0)]
    monkeypatch.setattr(CodeDataset, "keys", None)
    assert [codes.key(row) for row in range(6)] == [images.key(row) for row in range(6)] == keys
    assert keys[2] == f"a/{strange}"
    assert codes.key(-1) == keys[-1]

    # An example that knows nothing of this library; the strange key is to be the first.
    path = Path(__file__).parents[2] / "examples" / "read_codes_without_us.py"
    spec = importlib.util.spec_from_file_location("example", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    for name in ("001.png", "002.png"):
        (source / "train" / "a" / name).unlink()
    tokenize(tokenizer(), load_images(source, size=8), tmp_path / "first", **SIZES)
    example.read_shards(tmp_path / "first")
    assert r"first key 'a/\\xff\\xfe.png', label 0" in capsys.readouterr().out


# The options and the command


def test_the_option_that_differs_is_named(source, folder):
    images = load_images(source, size=8)
    for has_index in (True, False):
        for name, given in (("shard_size", 8), ("shard_size", 20), ("batch_size", 3)):
            had = SIZES[name]
            with pytest.raises(ValueError, match=f"with {name} {had}, expected {given}; to go on, give {name}={had};"):
                tokenize(tokenizer(), images, folder, **{**SIZES, name: given})
        (folder / "index.json").unlink(missing_ok=not has_index)


@pytest.fixture
def model(tmp_path) -> Path:
    tokenizer().save_pretrained(tmp_path / "run" / "codebook")
    return tmp_path / "run"


def call(*args: object) -> int:
    return tyro.cli(command, args=[str(each) for each in args])


def test_a_file_where_the_folder_is_to_be(model, source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file is a file; expected a folder, or a name that is free"):
        call(model, source, "-o", tmp_path / "file")


def test_nobody_reads_the_line(model, source, tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as broken:
        monkeypatch.setattr("sys.stdout", broken)
        assert call(model, source, "-o", tmp_path / "codes") == 0
        monkeypatch.undo()
    assert len(CodeDataset(tmp_path / "codes" / "test")) == 1


def test_a_test_split_without_one_good_image_is_named(model, tmp_path):
    source = photos(tmp_path / "photos", num=6)
    (source / "test" / "a" / "0.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"the test split: none of the 1 images .*; .* pass --split train"):
        call(model, source, "-o", tmp_path / "codes")
    assert call(model, source, "-o", tmp_path / "codes", "--split", "train") == 0


def test_labels_that_are_left_out_are_spoken_of(model, tmp_path, capsys):
    source = photos(tmp_path / "photos", num=6)
    assert call(model, source, "-o", tmp_path / "labels") == 0
    assert "no labels" not in capsys.readouterr().out
    (source / "train" / "a" / "000.png").rename(source / "train" / "000.png")
    assert call(model, source, "-o", tmp_path / "codes") == 0
    assert len(re.findall(r"; 1 of \d+ images has no label, so none are used", capsys.readouterr().out)) == 2
    assert CodeDataset(tmp_path / "codes" / "train").num_classes is None


def test_more_workers_than_cores_are_no_warning(source, tmp_path):
    """Warnings are errors here."""
    images = load_images(source, size=8)
    few = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    tokenize(tokenizer(), images, tmp_path / "codes", num_workers=few + 1, **SIZES)
    assert np.array_equal(CodeDataset(tmp_path / "codes").shard(0)[0].shape, (9, 2, 2))
