"""`vqvae tokenize`: what it makes and says; what nobody can mean is one line, before anything is read or written."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from token_worlds import call, contents, photos, plan, refused, tokenize, tokenizer

import safefolder
from vqvae.cli.common import device_of
from vqvae.tokens import CodeDataset, write_parquet
from vqvae.tokens.jobs import one_job

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return photos(tmp_path_factory.mktemp("source") / "photos", num=12)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "run"
    tokenizer().save_pretrained(folder / "codebook")
    return folder


def test_it_writes_both_parts_and_parquet(model, source, tmp_path, capsys):
    pytest.importorskip("pyarrow")
    out = tmp_path / "codes"
    args = (model, source, "-o", out, "--shard-size", 10**9, "--device", "cpu", "--parquet", tmp_path / "all.parquet")
    assert call(*args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match(rf"{out / 'train'}: 12 rows in 1 shards, 0 unreadable; .*img/s", lines[0])
    assert lines[1] == f"{tmp_path / 'all-train.parquet'}: 12 rows"
    assert len(CodeDataset(out / "test")) == 1
    assert CodeDataset(out / "train").tokenizer["source"] == str(model)
    CodeDataset(out / "train").check_tokenizer(tokenizer())
    before = contents(tmp_path / "codes" / "train"), (tmp_path / "all-train.parquet").read_bytes()
    (tmp_path / "all-test.parquet").write_bytes(b"")
    assert call(*args) == 0
    assert "all was there already" in capsys.readouterr().out
    assert before == (contents(tmp_path / "codes" / "train"), (tmp_path / "all-train.parquet").read_bytes())
    with refused("is a folder; expected the name of a file"):
        write_parquet(CodeDataset(out / "train"), out)
    with refused("is a folder, and what was to be written there is a file"):
        safefolder.files.write_text(out, "text")


def test_the_unreadable_are_named(model, tmp_path, capsys):
    spoiled = photos(tmp_path / "photos", num=28, broken=range(14))
    for _ in range(2):
        assert call(model, spoiled, "-o", tmp_path / "codes", "--split", "train", "--num-workers", 0) == 1
        out, errors = capsys.readouterr()
        assert "14 rows in 1 shards, 14 unreadable" in out
        assert errors.count("skipped a/0") == 10
        assert f"and 4 more, all named in {tmp_path / 'codes' / 'train' / 'index.json'}" in errors


def test_labels_that_are_left_out_are_spoken_of(model, tmp_path, capsys):
    source = photos(tmp_path / "photos", num=6)
    (source / "train" / "a" / "000.png").rename(source / "train" / "000.png")
    assert call(model, source, "-o", tmp_path / "codes") == 0
    assert len(re.findall(r"; 1 of \d+ images has no label, so none are used", capsys.readouterr().out)) == 2
    assert CodeDataset(tmp_path / "codes" / "train").num_classes is None


def test_nobody_reads_the_line(model, source, tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as broken:
        monkeypatch.setattr("sys.stdout", broken)
        assert call(model, source, "-o", tmp_path / "codes") == 0
        monkeypatch.undo()
    assert len(CodeDataset(tmp_path / "codes" / "test")) == 1


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch-size", 10**9), "got batch_size=1,000,000,000, but memory .* 192.0 GB; expected at most 5,592,405"),
        (("--batch-size", 0), "got batch_size=0; expected a whole number from 1"),
        (("--batch-size", 10**30), "expected a whole number from 1 to 9,007,199,254,740,992"),
        (("--shard-size", -1), "got shard_size=-1; expected a whole number from 1"),
        (("--num-workers", -1), "got num_workers=-1; expected 0 to 1,024"),
        (("--num-workers", 10**6), "got num_workers=1000000; expected 0 to 1,024"),
        *(
            (("--device", name), f"got --device {name}; this machine has")
            for name in ("meta", "cpu:7", "cuda:99", "xla")
        ),
        *((("--device", name), f"cuda:NUMBER, got '{name}'; this machine has") for name in ("abacus", "")),
        (("--address", "10.0.0.1:6379"), "without --engine ray"),
        (("--engine", "ray", "--num-workers", 2), "got --num-workers 2 with --engine ray"),
    ],
)
def test_case_22_options_that_nobody_can_mean(model, source, tmp_path, options, message):
    with refused(message):
        call(model, source, "-o", tmp_path / "codes", *options)
    assert not (tmp_path / "codes").exists()


def test_the_device_is_tried(monkeypatch):
    assert device_of("cpu") == torch.device("cpu")
    assert device_of("auto").type in ("cpu", "cuda")
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: gpu)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    made, arange = [], torch.arange

    def fake(num: int, device: torch.device) -> torch.Tensor:
        made.append(str(device))
        if device.index == 1:
            raise RuntimeError("CUDA error: no kernel image is available\nand many lines more")
        return arange(num)

    monkeypatch.setattr(torch, "arange", fake)
    assert [str(device_of(name)) for name in ("auto", "cuda", "cuda:0", "cpu")] == ["cuda:0", "cuda", "cuda:0", "cpu"]
    assert made == ["cuda:0", "cuda", "cuda:0", "cpu"]
    with refused(r"got --device cuda:1; this machine has 2 .* cpu, cuda:1, cuda:0 \(CUDA error: no k"):
        device_of("cuda:1")


def test_under_torchrun(model, source, tmp_path, capsys, monkeypatch):
    options = (model, source, "--shard-size", 4, "--split", "train", "--num-workers", 0)
    for rank in (1, 0):
        for name, value in (("RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_RANK", rank), ("LOCAL_WORLD_SIZE", 2)):
            monkeypatch.setenv(name, str(value))
        assert call(*options, "-o", tmp_path / "two") == 0
        assert ("rank 1 of 2 made 4 rows in 1 shards" in capsys.readouterr().out) == (rank == 1)
    with refused("--parquet is for one process"):
        call(*options, "-o", tmp_path / "two", "--parquet", tmp_path / "x.parquet")
    with refused("is for one process"):
        call(model, source, "-o", tmp_path / "two", "--engine", "ray")
    for rank, message in (("3", "got RANK=3 and WORLD_SIZE=2"), ("x", "got RANK='x' in the environment")):
        monkeypatch.setenv("RANK", rank)
        with refused(message):
            call(*options, "-o", tmp_path / "two")
    tokenize(source, tmp_path / "one", tokenizer_source=str(model), batch_size=64, shard_size=4)
    shards = [name for name in contents(tmp_path / "one") if name != "index.json"]
    assert [(tmp_path / "one" / name).read_bytes() for name in shards] == [
        (tmp_path / "two" / "train" / name).read_bytes() for name in shards
    ]


def test_case_06_another_job_is_at_work(model, source, tmp_path):
    with one_job(plan(source, tmp_path / "codes" / "train")), refused("is being written by another job"):
        call(model, source, "-o", tmp_path / "codes", "--device", "cpu")
    assert not (tmp_path / "codes").exists()


# Places to read from and to write to


def test_case_22_places_that_will_not_do(model, source, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    images = shutil.copytree(source, tmp_path / "photos")
    for place, message in (
        ("loop", r"loop.*: (Too many levels|File exists)"),
        ("file", "file is a file; expected a folder"),
        ("photos/../photos", "for the images and for the codes; name another folder with -o"),
        ("codes/../photos", "for the images and for the codes"),  # of which the first is not there
    ):
        with refused(message):
            call(model, images, "-o", tmp_path / place, "--device", "cpu")
    for change in (lambda path: path.write_bytes(b"broken"), Path.unlink):
        change(images / "test" / "a" / "0.png")
        with refused("the test split: .* pass --split train"):
            call(model, images, "-o", tmp_path / "codes")
    assert not (tmp_path / "codes").exists()
    assert call(model, images, "-o", tmp_path / "codes", "--split", "train") == 0


def test_case_22_a_bad_place_for_parquet_is_refused_before_any_work(model, source, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "photos.parquet").write_bytes(b"PAR1 of somebody else")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.setattr("vqvae.Autoencoder.from_pretrained", lambda *args: pytest.fail("it loaded the model"))
    for place, message in {
        "folder": "is a folder; expected the name of a file",
        "/": "is a folder; expected the name of a file",
        "file/x.parquet": "could not write .*x.parquet",
        "file": "is there, and is no parquet file of codes; name another, or remove it",
        "photos.parquet": "is there, and is no parquet file of codes",
        f"{'x' * 300}.parquet": "could not write .*name too long",
        "loop/x.parquet": "could not write",
        "codes/train/x.parquet": "is among the files of the set itself",
        "/dev/null": "is no regular file",
    }.items():
        with refused(message):
            call(model, source, "-o", tmp_path / "codes", "--split", "train", "--parquet", tmp_path / place)
    with safefolder.locks.one_writer(tmp_path / "x-test.parquet"), refused("being written by another"):
        call(model, source, "-o", tmp_path / "codes", "--parquet", tmp_path / "x.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with refused(r"pip install 'vqvae-priors\[parquet\]'"):
        call(model, source, "-o", tmp_path / "codes", "--parquet", tmp_path / "x.parquet")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "loop", "photos.parquet"]
    assert (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "photos.parquet").read_bytes() == b"PAR1 of somebody else"
