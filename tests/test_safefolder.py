"""Folders of config and weights: whole or not at all, and one clear line for what cannot be read."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time

import huggingface_hub
import pytest
import safetensors.torch
import torch
from lanes import some
from torch import nn

import safefolder

CONFIG = {"class": "Thing", "size": 3}
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7)}


def test_round_trip(tmp_path):
    safefolder.save(tmp_path / "deep" / "thing", CONFIG, TENSORS)
    config, tensors = safefolder.load(tmp_path / "deep" / "thing")
    assert config == {"format": 1, **CONFIG}
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert sorted(os.listdir(tmp_path / "deep")) == ["thing"]


def test_shared_and_strided_tensors_are_saved_plain(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    safefolder.save(tmp_path / "thing", CONFIG, {"whole": base, "same": base, "turned": base.T})
    tensors = safefolder.load(tmp_path / "thing")[1]
    assert torch.equal(tensors["turned"], base.T)
    assert torch.equal(tensors["same"], base)


def test_saving_again_replaces(tmp_path):
    safefolder.save(tmp_path / "thing", CONFIG, TENSORS)
    safefolder.save(tmp_path / "thing", {**CONFIG, "size": 4}, {"c": torch.zeros(1)})
    config, tensors = safefolder.load(tmp_path / "thing")
    assert config["size"] == 4
    assert tensors.keys() == {"c"}
    assert os.listdir(tmp_path) == ["thing"]


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    safefolder.save(tmp_path / "thing", CONFIG, TENSORS)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(ValueError, match=r"no space is left on the disk.*untouched"):
            safefolder.save(tmp_path / "thing", {**CONFIG, "size": 4}, TENSORS)
    assert safefolder.load(tmp_path / "thing")[0]["size"] == 3
    assert os.listdir(tmp_path) == ["thing"]


LIMITED = """
import resource, sys, safefolder, torch
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    safefolder.save(sys.argv[1], {"class": "Thing"}, {"a": torch.zeros(1_000_000)})
except ValueError as error:
    print(error)
"""


def test_a_file_that_may_not_grow_is_one_line(tmp_path):
    """A real failure inside the safetensors writer: the kernel's limit on the size of a file."""
    safefolder.save(tmp_path / "thing", CONFIG, TENSORS)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path / "thing"], capture_output=True, text=True, check=True
    )
    assert "could not write" in done.stdout
    assert "untouched" in done.stdout
    assert safefolder.load(tmp_path / "thing")[0]["size"] == 3
    assert os.listdir(tmp_path) == ["thing"]


ENDLESS = """
import sys, safefolder, torch
count = 0
while True:
    tensors = {name: torch.full((12_500,), float(count)) for name in "abcd"}
    safefolder.save(sys.argv[1], {"class": "Thing", "count": count}, tensors, max_shard_size=int(sys.argv[2]))
    count += 1
    print(count, flush=True)
"""


@pytest.mark.parametrize(
    ("max_shard_size", "pauses"),
    some([(10**9, (0.003,)), (10**9, (0.0, 0.011)), (60_000, (0.007, 0.017))]),
)
def test_kill_at_any_moment_leaves_a_whole_folder(tmp_path, max_shard_size, pauses):
    counts = []
    for pause in pauses:
        with subprocess.Popen(
            [sys.executable, "-c", ENDLESS, tmp_path / "thing", str(max_shard_size)], stdout=subprocess.PIPE, text=True
        ) as process:
            process.stdout.readline()
            process.stdout.readline()
            time.sleep(pause)
            process.send_signal(signal.SIGKILL)
        config, tensors = safefolder.load(tmp_path / "thing")
        assert tensors.keys() == set("abcd")
        assert all((tensor == config["count"]).all() for tensor in tensors.values())
        counts.append(config["count"])
    assert all(count >= 1 for count in counts)


def test_a_kill_between_the_two_renames_is_mended(tmp_path):
    safefolder.save(tmp_path / "thing", CONFIG, TENSORS)
    os.replace(tmp_path / "thing", tmp_path / ".thing.previous")
    assert safefolder.load(tmp_path / "thing")[0]["size"] == 3


def write(folder, config='{"format": 1, "class": "Thing"}', weights=None):
    folder.mkdir(exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(config)
    if weights is not None:
        (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_what_cannot_be_read_is_named(tmp_path):
    cases = {
        "no model folder": tmp_path / "missing",
        "no config.json": write(tmp_path / "a", config=None),
        "no model.safetensors": write(tmp_path / "b"),
        "cannot be read as JSON": write(tmp_path / "c", config="{", weights=b""),
        "not of this library": write(tmp_path / "d", config=json.dumps({"model_type": "llama"}), weights=b""),
        "of format 9": write(tmp_path / "e", config=json.dumps({"format": 9, "class": "Thing"}), weights=b""),
        "corrupt or no safetensors": write(tmp_path / "f", weights=b"\x80\x02}q\x00."),
    }
    for message, folder in cases.items():
        with pytest.raises(ValueError, match=message):
            safefolder.load(folder)


def test_truncated_weights_are_corrupt(tmp_path):
    safefolder.save(tmp_path / "thing", CONFIG, TENSORS)
    path = tmp_path / "thing" / "model.safetensors"
    for size in range(0, path.stat().st_size, 7):
        path.write_bytes(path.read_bytes()[:size] if size else b"")
        with pytest.raises(ValueError, match="corrupt or no safetensors"):
            safefolder.load(tmp_path / "thing")
        safefolder.save(tmp_path / "thing", CONFIG, TENSORS)


def test_weights_that_do_not_fit_are_named():
    module = nn.Linear(3, 2)
    good = dict(module.state_dict())
    for tensors, message in (
        ({"weight": good["weight"]}, "missing bias"),
        ({**good, "more": good["bias"]}, "unknown more"),
        ({**good, "bias": torch.zeros(5)}, r"bias is \(5,\), expected \(2,\)"),
        ({**good, "bias": torch.zeros(2, dtype=torch.int64)}, r"bias is torch.int64, expected floating point"),
    ):
        with pytest.raises(ValueError, match=message):
            safefolder.folder.load_weights(module, tensors, "here")


def test_everything_that_does_not_fit_stands_in_one_error():
    module = nn.Sequential(*(nn.Linear(2, 2) for _ in range(6)))
    tensors = {name: torch.zeros(3) for name in module.state_dict()}
    del tensors["0.weight"]
    tensors |= {"more": torch.zeros(1), "5.bias": torch.zeros(2, dtype=torch.bool)}
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(ValueError, match="do not fit") as told:
        safefolder.folder.load_weights(module, tensors, "here")
    message = str(told.value)
    assert "missing 0.weight; unknown more" in message
    assert (
        "0.bias is (3,), expected (2,); 1.bias is (3,), expected (2,); 1.weight is (3,), expected (2, 2) and 7 more"
        in message
    )
    assert "5.bias is torch.bool, expected floating point" in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_other_widths_of_the_same_kind_fit():
    module = nn.BatchNorm1d(2)
    tensors = {
        name: tensor.double() if tensor.is_floating_point() else tensor.int()
        for name, tensor in module.state_dict().items()
    }
    safefolder.folder.load_weights(module, tensors, "here")
    assert module.weight.dtype == torch.float32


def test_formats_are_told_apart(tmp_path):
    for written, message in (
        (2, "format 2, this version reads format 1; upgrade"),
        ("1", "not of this library"),
        (True, "not of this library"),
        (0, "not of this library"),
    ):
        folder = write(tmp_path / "a", config=json.dumps({"format": written, "class": "Thing"}), weights=b"")
        with pytest.raises(ValueError, match=message):
            safefolder.load(folder)


SHARDED = {f"layer.{i}": torch.arange(10.0) + i for i in range(7)} | {"flags": torch.tensor([True, False])}


def test_shards_are_read_back_bit_for_bit(tmp_path):
    tensors = {**SHARDED, "turned": torch.arange(12.0).reshape(3, 4).T, "same": SHARDED["layer.0"]}
    safefolder.save(tmp_path / "thing", CONFIG, tensors, max_shard_size=100)
    names = sorted(os.listdir(tmp_path / "thing"))
    shards = [name for name in names if name.startswith("model-")]
    assert names == ["config.json", *shards, "model.safetensors.index.json"]
    assert shards == [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    assert len(shards) >= 4
    config, back = safefolder.load(tmp_path / "thing")
    assert config == {"format": 1, **CONFIG}
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) and back[name].dtype == tensors[name].dtype for name in tensors)
    assert set(safefolder.folder.members(tmp_path / "thing")) == set(names)


def test_no_shard_is_larger_than_asked_unless_a_tensor_is(tmp_path):
    safefolder.save(tmp_path / "thing", CONFIG, {**SHARDED, "large": torch.zeros(100)}, max_shard_size=100)
    for path in (tmp_path / "thing").glob("model-*"):
        held = safetensors.torch.load_file(path)
        assert sum(tensor.nbytes for tensor in held.values()) <= 100 or held.keys() == {"large"}


def test_the_hubs_own_loader_reads_the_shards(tmp_path):
    """huggingface_hub, and with it the libraries that build on it, take the folder as one of theirs."""
    module = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    for size in (70, 10**9):
        safefolder.save(tmp_path / "thing", CONFIG, module.state_dict(), max_shard_size=size)
        other = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
        huggingface_hub.load_torch_model(other, tmp_path / "thing")
        assert all(torch.equal(own, module.state_dict()[name]) for name, own in other.state_dict().items())


def test_what_fits_is_one_file(tmp_path):
    size = sum(tensor.nbytes for tensor in SHARDED.values())
    for limit, count in ((size, 1), (size - 1, 2)):
        safefolder.save(tmp_path / "thing", CONFIG, SHARDED, max_shard_size=limit)
        assert len(list((tmp_path / "thing").glob("model*.safetensors"))) == count
        assert (tmp_path / "thing" / "model.safetensors").exists() == (count == 1)
    safefolder.save(tmp_path / "thing", CONFIG, {}, max_shard_size=1)
    assert safefolder.load(tmp_path / "thing")[1] == {}
    with pytest.raises(ValueError, match="max_shard_size=0, expected"):
        safefolder.save(tmp_path / "thing", CONFIG, SHARDED, max_shard_size=0)


def test_shards_that_do_not_fit_their_index_are_named_in_one_error(tmp_path):
    folder = tmp_path / "thing"
    safefolder.save(folder, CONFIG, SHARDED, max_shard_size=100)
    secret = tmp_path / "secret.safetensors"
    safetensors.torch.save_file({"key": torch.zeros(1)}, secret)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    first, second, third, *_ = sorted(set(index["weight_map"].values()))
    index["weight_map"] |= {"ghost": second, "up": "../secret.safetensors", "root": str(secret), "pickled": "model.bin"}
    (folder / first).unlink()
    (folder / third).write_bytes((folder / third).read_bytes()[:-1])
    held = safetensors.torch.load_file(folder / second)
    safetensors.torch.save_file({**held, "stowaway": torch.zeros(1)}, folder / second)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="does not fit its shards") as told:
        safefolder.load(folder)
    for part in (
        "'../secret.safetensors'",
        repr(str(secret)),
        "'model.bin'",
        f"missing {first}",
        f"{third} is corrupt",
        f"promised and not there: ghost in {second}",
        f"there and not promised: stowaway in {second}",
    ):
        assert part in str(told.value)
    assert "\n" not in str(told.value)


def test_an_index_that_is_none(tmp_path):
    folder = tmp_path / "thing"
    for index, message in (
        ("{", "cannot be read as JSON"),
        ("[]", "holds a list, expected an object"),
        ('{"weight_map": {"a": 1}}', "no 'weight_map'"),
    ):
        safefolder.save(folder, CONFIG, SHARDED, max_shard_size=100)
        (folder / "model.safetensors.index.json").write_text(index)
        with pytest.raises(ValueError, match=message):
            safefolder.load(folder)
    safefolder.save(folder, CONFIG, SHARDED, max_shard_size=100)
    safetensors.torch.save_file(TENSORS, folder / "model.safetensors")
    with pytest.raises(ValueError, match="has both"):
        safefolder.load(folder)


def test_a_full_disk_among_the_shards_leaves_what_was_there(tmp_path, monkeypatch):
    safefolder.save(tmp_path / "thing", CONFIG, SHARDED, max_shard_size=100)
    whole, written = safetensors.torch.save_file, []

    def some(tensors, path, metadata):
        if len(written) == 2:
            full_disk()
        written.append(path)
        whole(tensors, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", some)
    with pytest.raises(ValueError, match=r"no space is left on the disk.*untouched"):
        safefolder.save(tmp_path / "thing", {**CONFIG, "size": 4}, SHARDED, max_shard_size=100)
    monkeypatch.undo()
    config, tensors = safefolder.load(tmp_path / "thing")
    assert config["size"] == 3
    assert all(torch.equal(tensors[name], SHARDED[name]) for name in SHARDED)
    assert os.listdir(tmp_path) == ["thing"]


def test_a_subfolder_of_a_folder(tmp_path):
    safefolder.save(tmp_path / "run" / "codebook", CONFIG, TENSORS)
    assert safefolder.load(tmp_path / "run", subfolder="codebook")[0]["size"] == 3
    assert safefolder.load(tmp_path, subfolder="run/codebook", local_files_only=True)[0]["size"] == 3
    assert safefolder.folder.has_part(tmp_path / "run", "codebook")
    assert not safefolder.folder.has_part(tmp_path / "run", "prior")
    os.replace(tmp_path / "run" / "codebook", tmp_path / "run" / ".codebook.previous")
    assert safefolder.load(tmp_path / "run", subfolder="codebook")[0]["size"] == 3
    with pytest.raises(ValueError, match=r"no model folder at .*prior"):
        safefolder.load(tmp_path / "run", subfolder="prior")
    for outside in ("../run", "/", "", "a/../../b", "a\\b"):
        with pytest.raises(ValueError, match=r"subfolder=.*inside the source"):
            safefolder.load(tmp_path / "run", subfolder=outside)


def test_a_folder_takes_no_revision(tmp_path):
    safefolder.save(tmp_path / "thing", CONFIG, TENSORS)
    with pytest.raises(ValueError, match="has no revision; leave that out"):
        safefolder.load(tmp_path / "thing", revision="main")
    with pytest.raises(ValueError, match="has no token and no cache_dir"):
        safefolder.load(tmp_path / "thing", token="x", cache_dir=tmp_path)


def test_what_is_written_can_be_read_as_the_umask_says(tmp_path):
    """safetensors' own files are for their owner alone."""
    for mask in (0o022, 0o077, 0o002):
        before = os.umask(mask)
        try:
            safefolder.save(tmp_path / f"{mask}", {"class": "A"}, {"a": torch.zeros(2)})
            with safefolder.files.replacing(tmp_path / f"{mask}.safetensors") as scratch:
                safetensors.torch.save_file({"a": torch.zeros(2)}, scratch)
        finally:
            os.umask(before)
        files = [*(tmp_path / f"{mask}").iterdir(), tmp_path / f"{mask}.safetensors"]
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o666 & ~mask}
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
