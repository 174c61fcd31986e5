"""What `vqvae tokenize` is told that nobody can mean is one line, before anything is read or written."""

import functools
import os
import shutil
from pathlib import Path

import pytest
import torch
import tyro
from token_worlds import contents, photos, plan, tokenize, tokenizer

import safefolder
from vqvae import exits
from vqvae.cli.common import device_of
from vqvae.cli.tokenizing import tokenize as command
from vqvae.data import ImageTensors
from vqvae.tokens import CodeDataset, write_parquet


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return photos(tmp_path_factory.mktemp("source") / "photos", num=12)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "run"
    tokenizer().save_pretrained(folder / "codebook")
    return folder


def call(*args: object) -> int:
    later = functools.wraps(command)(lambda *told, **options: functools.partial(command, *told, **options))
    return exits.parsed(lambda: tyro.cli(later, args=[str(each) for each in args]))()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--batch-size", 10**9),
            r"got batch_size=1,000,000,000, but memory has to hold .* 192.0 GB; expected at most 5,592,405",
        ),
        (("--batch-size", 0), "got batch_size=0; expected a whole number from 1"),
        (("--batch-size", 10**30), "expected a whole number from 1 to 9,007,199,254,740,992"),
        (("--shard-size", -1), "got shard_size=-1; expected a whole number from 1"),
        (("--shard-size", 10**30), "expected a whole number from 1 to"),
        (("--num-workers", -1), "got num_workers=-1; expected 0 to 1,024"),
        (("--num-workers", 10**6), "got num_workers=1000000; expected 0 to 1,024"),
        *(
            (("--device", name), rf"got --device {name}; this machine has")
            for name in ("meta", "mkldnn", "xla", "cpu:7")
        ),
        *(
            (("--device", name), rf"got --device {name}; this machine has")
            for name in ("mps", "cuda:99", "vulkan", "lazy")
        ),
        (("--device", "abacus"), "--device must be auto, cpu, cuda or cuda:NUMBER, got 'abacus'; this machine has"),
        (("--device", ""), "--device must be auto, cpu, cuda or cuda:NUMBER, got ''; this machine has"),
    ],
)
def test_case_22_options_that_nobody_can_mean(model, source, tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(model, source, "-o", tmp_path / "codes", *options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "codes").exists()


def test_case_22_a_shard_larger_than_the_set_is_the_set(model, source, tmp_path):
    assert call(model, source, "-o", tmp_path / "codes", "--shard-size", 10**9, "--device", "cpu") == 0
    assert CodeDataset(tmp_path / "codes" / "train").num_shards == 1
    assert len(CodeDataset(tmp_path / "codes" / "train")[:]) == 12


def test_a_shard_of_more_codes_than_memory_has_to_hold(tmp_path):
    model = tokenizer()
    model.grid = (1 << 16, 1 << 14)
    images = ImageTensors(torch.zeros(3, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(
        ValueError, match=r"got shard_size=3, but memory has to hold the codes of a shard, 6\.4 GB; .* at most 2"
    ):
        plan(model, images, tmp_path / "codes", shard_size=8192)
    plan(model, images, tmp_path / "codes", shard_size=2)


@pytest.mark.parametrize("options", [{"batch_size": 4.0}, {"batch_size": True}, {"shard_size": "9"}])
def test_numbers_of_another_type_are_refused_before_anything_is_encoded(options, tmp_path, untyped):
    images = ImageTensors(torch.zeros(3, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"got \w+=.*; expected a whole number"):
        tokenize(tokenizer(), images, tmp_path / "codes", **options)


def test_weights_without_numbers_have_no_fingerprint(tmp_path):
    images = ImageTensors(torch.zeros(3, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"encoder\..* of VQVAE is on the device meta, which holds no numbers"):
        tokenize(tokenizer().to("meta"), images, tmp_path / "codes")


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
    with pytest.raises(
        ValueError, match=r"got --device cuda:1; this machine has 2 .* cpu, cuda:1, cuda:0 \(CUDA error: no k"
    ) as e:
        device_of("cuda:1")
    assert "\n" not in str(e.value)


# Places to write to


def test_case_22_a_link_to_itself_for_a_folder(model, source, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ValueError, match=r"loop.*: (Too many levels|File exists)") as caught:
        call(model, source, "-o", tmp_path / "loop", "--device", "cpu")
    assert "\n" not in str(caught.value)


def test_the_images_are_no_place_for_the_codes(model, source, tmp_path):
    shutil.copytree(source, tmp_path / "photos")
    with pytest.raises(ValueError, match="for the images and for the codes; name another folder with -o"):
        call(model, tmp_path / "photos", "-o", tmp_path / "photos" / ".." / "photos")


def bad_places(folder: Path) -> dict[str, tuple[Path, str]]:
    (folder / "file").write_text("mine")
    (folder / "folder").mkdir()
    (folder / "folder" / "thesis.txt").write_text("mine")
    (folder / "photos.parquet").write_bytes(b"PAR1 of somebody else")
    (folder / "loop").symlink_to(folder / "loop")
    return {
        "a folder": (folder / "folder", "is a folder; expected the name of a file"),
        "the root": (Path("/"), "is a folder; expected the name of a file"),
        "here": (Path("."), "is a folder; expected the name of a file"),
        "under a file": (folder / "file" / "x.parquet", "could not write .*x.parquet"),
        "another file": (folder / "file", "is there, and is no parquet file of codes; name another, or remove it"),
        "another parquet": (folder / "photos.parquet", "is there, and is no parquet file of codes"),
        "too long a name": (folder / f"{'x' * 300}.parquet", "could not write .*name too long"),
        "in a link to itself": (folder / "loop" / "x.parquet", "could not write"),
        "among the shards": (folder / "codes" / "train" / "x.parquet", "is among the files of the set itself"),
        "the index": (folder / "codes" / "train" / "index.json", "is among the files of the set itself"),
        "a device": (Path("/dev/null"), "is no regular file"),
    }


def test_case_22_a_bad_place_for_parquet_is_refused_before_any_work(model, source, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    monkeypatch.setattr("vqvae.Autoencoder.from_pretrained", lambda *args: pytest.fail("it loaded the model"))
    for place, message in bad_places(tmp_path).values():
        with pytest.raises(ValueError, match=message) as caught:
            call(model, source, "-o", tmp_path / "codes", "--split", "train", "--parquet", place)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "codes").exists()
    assert (tmp_path / "folder" / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "photos.parquet").read_bytes() == b"PAR1 of somebody else"
    with (
        safefolder.locks.one_writer(tmp_path / "x-test.parquet"),
        pytest.raises(ValueError, match="being written by another"),
    ):
        call(model, source, "-o", tmp_path / "codes", "--parquet", tmp_path / "x.parquet")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "loop", "photos.parquet"]


def test_without_the_extra_parquet_is_refused_before_any_work(model, source, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install 'vqvae-priors\[parquet\]'"):
        call(model, source, "-o", tmp_path / "codes", "--parquet", tmp_path / "x.parquet")
    assert not (tmp_path / "codes").exists()


def test_a_parquet_file_of_codes_is_replaced_by_the_next(model, source, tmp_path):
    pytest.importorskip("pyarrow")
    args = (model, source, "-o", tmp_path / "codes", "--device", "cpu", "--split", "train", "--parquet")
    (tmp_path / "empty.parquet").touch()
    for path in (tmp_path / "deep" / "x.parquet", tmp_path / "empty.parquet"):
        assert call(*args, path) == 0
        before = path.read_bytes()
        assert call(*args, path) == 0
        assert path.read_bytes() == before


def test_a_file_never_takes_the_place_of_a_folder(model, source, tmp_path):
    pytest.importorskip("pyarrow")
    assert call(model, source, "-o", tmp_path / "codes", "--device", "cpu", "--split", "train") == 0
    before = contents(tmp_path / "codes" / "train")
    with pytest.raises(ValueError, match="is a folder; expected the name of a file"):
        write_parquet(CodeDataset(tmp_path / "codes" / "train"), tmp_path / "codes")
    with pytest.raises(ValueError, match="is a folder, and what was to be written there is a file"):
        safefolder.files.write_text(tmp_path / "codes", "text")
    assert contents(tmp_path / "codes" / "train") == before
