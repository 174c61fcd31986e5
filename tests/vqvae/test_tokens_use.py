"""Tokenized sets in use: read at random, in order and by workers, written as parquet, made by the command."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from token_worlds import contents, equal, joined, photos, tokenize, tokenizer
from torch.utils.data import DataLoader

from vqvae.cli.tokenizing import tokenize as command
from vqvae.data import batches, load_images
from vqvae.tokens import CodeBatch, CodeDataset, write_parquet

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]
SIZES = {"batch_size": 4, "shard_size": 7}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return photos(tmp_path_factory.mktemp("source") / "photos")


@pytest.fixture(scope="module", params=["plain", "residual"])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(source, kind, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("codes") / "train"
    tokenize(tokenizer(kind), load_images(source, size=8), folder, tokenizer_source="runs/small", **SIZES)
    return folder


@pytest.fixture(scope="module")
def expected(source, kind) -> CodeBatch:
    batch = load_images(source, size=8).__getitems__(range(50))
    return CodeBatch(tokenizer(kind).encode(batch.images), batch.labels)


def test_rows_at_random(folder, expected):
    codes = CodeDataset(folder)
    assert len(codes) == 50
    order = torch.randint(0, 50, (200,)).numpy()
    assert equal(codes.__getitems__(order), CodeBatch(expected.codes[order], expected.labels[order]))
    row, label = codes[-1]
    assert torch.equal(row, expected.codes[49])
    assert label == 1
    assert len(codes.__getitems__([]).codes) == 0
    for outside in ([50], [-1], [0, 51]):
        with pytest.raises(IndexError, match="expected 0 to 49"):
            codes.__getitems__(outside)
    with pytest.raises(IndexError):
        codes[50]
    assert (codes.num_classes, codes.class_names, codes.split) == (2, ("a", "b"), "train")


def test_shards_are_opened_when_asked_for(folder, monkeypatch):
    codes = CodeDataset(folder)
    assert len(codes._open) == 0
    codes[8]
    assert set(codes._open) == {1}
    copy = pickle.loads(pickle.dumps(codes))
    assert (len(copy._open), len(codes._open)) == (0, 1)
    assert torch.equal(copy[8][0], codes[8][0])
    monkeypatch.setattr("vqvae.tokens.dataset._MAX_OPEN", 2)
    rows = codes.__getitems__(range(50)).codes
    assert len(codes._open) <= 2
    assert torch.equal(rows, copy.__getitems__(range(50)).codes)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as Linux lists them")
def test_open_shards_hold_no_files_open(folder):
    before = len(os.listdir("/proc/self/fd"))
    codes = CodeDataset(folder)
    codes.__getitems__(range(50))
    assert len(codes._open) == 8
    assert len(os.listdir("/proc/self/fd")) == before


def test_batches_come_in_the_order_of_images(folder, source, expected):
    codes, images = CodeDataset(folder), load_images(source, size=8)
    for order in ({}, {"seed": 3, "start": 2, "rank": 1, "world_size": 2, "epochs": 2}):
        labels = [batch.labels.tolist() for batch in batches(images, 8, **order)]
        assert [batch.labels.tolist() for batch in codes.batches(8, **order)] == labels
    once = list(codes.batches(8))
    assert equal(joined(once), expected)
    shuffled = [next(stream) for stream in [codes.batches(16, seed=1)] for _ in range(3)]
    assert sorted(map(str, torch.cat([each.codes for each in shuffled]).tolist())) != sorted(
        map(str, expected.codes[:48].tolist())
    )
    with pytest.raises(ValueError, match="got batch_size=0"):
        codes.batches(0)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # one of torch itself, which tells of few cores
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_of_torch_reads_them(folder, expected, num_workers):
    codes = CodeDataset(folder)
    codes[0]
    loader = DataLoader(codes, 8, num_workers=num_workers, collate_fn=codes.collate)
    found = list(loader)
    assert equal(joined(found), expected)


def test_codes_know_their_tokenizer(folder, kind):
    codes = CodeDataset(folder)
    codes.check_tokenizer(tokenizer(kind))
    assert codes.tokenizer["source"] == "runs/small"
    with pytest.raises(ValueError, match=r"of another tokenizer \(runs/small, \w{12}\), this one is \w{12};"):
        codes.check_tokenizer(tokenizer(kind, seed=1))


def test_folders_that_are_none_are_one_line(folder, tmp_path):
    index = json.loads((folder / "index.json").read_text())
    cases = {
        "has no index.json of `vqvae tokenize`; expected": None,
        "cannot be read as JSON": "{",
        "is of something else": '{"class": "Prior"}',
        "is of format 9, this version reads format 1": json.dumps({**index, "format": 9}),
        "the index of .* is damaged .*contradict": json.dumps({**index, "num_rows": 3}),
        "the index of .* is damaged .*grid is None": json.dumps({**index, "grid": None}),
        "the index of .* is damaged .*shards": json.dumps({name: index[name] for name in index if name != "shards"}),
        "is missing; run": json.dumps(index),
    }
    for message, text in cases.items():
        if text is not None:
            (tmp_path / "index.json").write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            CodeDataset(tmp_path)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"holds train; name one of them, as .*train"):
        CodeDataset(folder.parent)
    spoiled = tmp_path / "spoiled"
    spoiled.mkdir()
    for name, data in contents(folder).items():
        (spoiled / name).write_bytes(data.replace(b"I64", b"I32") if name.startswith("codes-00002") else data)
    with pytest.raises(ValueError, match=r"codes-00002.* is no whole shard of codes"):
        CodeDataset(spoiled)[20]
    (spoiled / "codes-00002.safetensors").write_bytes((folder / "codes-00007.safetensors").read_bytes() + bytes(999))
    with pytest.raises(ValueError, match="codes-00002"):
        CodeDataset(spoiled)[20]


def test_parquet_as_others_read_it(folder, expected, tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow import parquet

    codes = CodeDataset(folder)
    write_parquet(codes, tmp_path / "codes.parquet")
    table = parquet.read_table(tmp_path / "codes.parquet")
    assert str(table.schema.field("codes").type) == f"fixed_size_list<element: uint16>[{np.prod(codes.grid)}]"
    notes = {name.decode(): text.decode() for name, text in table.schema.metadata.items()}
    assert json.loads(notes["grid"]) == list(codes.grid)
    assert json.loads(notes["class_names"]) == ["a", "b"]
    assert notes["tokenizer"] == codes.tokenizer["fingerprint"]
    flat = table["codes"].combine_chunks().flatten().to_numpy()
    assert np.array_equal(flat.reshape(-1, *codes.grid), expected.codes.numpy())
    assert table["label"].to_pylist() == expected.labels.tolist()
    assert table["key"].to_pylist() == [codes.key(row) for row in range(50)]


def test_parquet_without_the_extra_says_so(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install 'vqvae-priors\[parquet\]'"):
        write_parquet(CodeDataset(folder), tmp_path / "codes.parquet")


@pytest.fixture
def model(tmp_path) -> Path:
    tokenizer().save_pretrained(tmp_path / "run" / "codebook")
    return tmp_path / "run"


def call(*args: object) -> int:
    return tyro.cli(command, args=[str(each) for each in args])


def test_the_command_writes_both_parts_and_parquet(model, source, tmp_path, capsys):
    pytest.importorskip("pyarrow")
    out = tmp_path / "codes"
    args = (model, source, "-o", out, "--shard-size", 20, "--device", "cpu", "--parquet", tmp_path / "all.parquet")
    assert call(*args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{out / 'train'}: 50 rows in 3 shards, 0 unreadable; ")
    assert "img/s" in lines[0]
    assert lines[1] == f"{tmp_path / 'all-train.parquet'}: 50 rows"
    assert len(CodeDataset(out / "test")) == 1
    assert CodeDataset(out / "train").tokenizer["source"] == str(model)
    CodeDataset(out / "train").check_tokenizer(tokenizer())
    assert call(*args) == 0
    assert "all was there already" in capsys.readouterr().out


def test_the_command_names_the_unreadable_and_says_so(model, tmp_path, capsys):
    spoiled = photos(tmp_path / "photos", broken=tuple(range(14)))
    for _ in range(2):
        assert call(model, spoiled, "-o", tmp_path / "codes", "--split", "train", "--num-workers", 0) == 1
        out, errors = capsys.readouterr()
        assert "36 rows in 1 shards, 14 unreadable" in out
        assert errors.count("skipped a/0") == 10
        assert f"and 4 more, all named in {tmp_path / 'codes' / 'train' / 'index.json'}" in errors


def test_the_command_under_torchrun(model, source, tmp_path, capsys, monkeypatch):
    options = (model, source, "--shard-size", 8, "--split", "train", "--num-workers", 0)
    for rank in (1, 0):
        for name, value in (("RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_RANK", rank), ("LOCAL_WORLD_SIZE", 2)):
            monkeypatch.setenv(name, str(value))
        assert call(*options, "-o", tmp_path / "two") == 0
        assert ("rank 1 of 2 made 24 rows in 3 shards" in capsys.readouterr().out) == (rank == 1)
    with pytest.raises(ValueError, match="--parquet is for one process"):
        call(*options, "-o", tmp_path / "two", "--parquet", tmp_path / "x.parquet")
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ValueError, match="got RANK=3 and WORLD_SIZE=2"):
        call(*options, "-o", tmp_path / "two")
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(ValueError, match="got RANK='x' in the environment"):
        call(*options, "-o", tmp_path / "two")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name)
    assert call(*options, "-o", tmp_path / "one") == 0
    assert contents(tmp_path / "one" / "train") == contents(tmp_path / "two" / "train")


def test_the_command_refuses_what_it_cannot_do(model, source, tmp_path):
    single = photos(tmp_path / "single", num=2)
    (single / "test" / "a" / "0.png").unlink()
    with pytest.raises(ValueError, match="for the rest alone, pass --split train"):
        call(model, single, "-o", tmp_path / "codes")
    with pytest.raises(ValueError, match="--device must be auto, cpu, cuda or cuda:NUMBER, got 'abacus'"):
        call(model, source, "-o", tmp_path / "codes", "--device", "abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"got --device cuda:3; this machine has 0 GPU\(s\)"):
            call(model, source, "-o", tmp_path / "codes", "--device", "cuda:3")
    assert not (tmp_path / "codes").exists()


TORCHRUN = """
import sys
import tyro
from vqvae.cli.tokenizing import tokenize
sys.exit(tyro.cli(tokenize))
"""


@pytest.mark.slow
def test_torchrun_itself(model, source, tmp_path):
    (tmp_path / "script.py").write_text(TORCHRUN)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["script.py", str(model), str(source), "-o", "codes", "--shard-size", "8", "--split", "train"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    alone = tokenize(
        tokenizer(),
        load_images(source, size=8),
        tmp_path / "alone" / "train",
        tokenizer_source=str(model),
        shard_size=8,
    )
    assert alone.whole
    assert contents(tmp_path / "codes" / "train") == contents(tmp_path / "alone" / "train")


def test_options_of_the_other_engine_are_refused(monkeypatch):
    paths = ("no-model", "no-images", "-o", "codes")
    with pytest.raises(ValueError, match="without --engine ray"):
        call(*paths, "--address", "10.0.0.1:6379")
    with pytest.raises(ValueError, match="got --num-workers 2 with --engine ray"):
        call(*paths, "--engine", "ray", "--num-workers", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="is for one process"):
        call(*paths, "--engine", "ray")
