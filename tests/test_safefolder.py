"""Folders of config and weights: whole or not at all, one clear line for what cannot be read, others' things kept."""

import errno
import json
import os
import resource
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
from safefolder.files import replacing_folder

CONFIG = {"class": "Thing", "size": 3}
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7)}
SHARDED = {f"layer.{i}": torch.arange(10.0) + i for i in range(7)} | {"flags": torch.tensor([True, False])}


@pytest.fixture
def thing(tmp_path):
    """A saved folder, beside which nothing else is."""
    safefolder.save(tmp_path / "thing", CONFIG, TENSORS)
    return tmp_path / "thing"


def save_larger(folder, tensors=TENSORS, **options):
    safefolder.save(folder, {**CONFIG, "size": 4}, tensors, **options)


def check_untouched(thing, tensors=TENSORS):
    """It is as it was saved, and nothing was left beside it."""
    config, found = safefolder.load(thing)
    assert config == {"format": 1, **CONFIG}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype
    assert os.listdir(thing.parent) == [thing.name]


def test_round_trip_and_what_is_saved_again_replaces(tmp_path):
    folder = tmp_path / "deep" / "thing"
    save_larger(folder, {"c": torch.zeros(1)})
    safefolder.save(folder, CONFIG, TENSORS)
    check_untouched(folder)
    safefolder.save(folder, CONFIG, {}, max_shard_size=1)
    check_untouched(folder, {})
    with pytest.raises(ValueError, match="max_shard_size=0"):
        safefolder.save(folder, CONFIG, SHARDED, max_shard_size=0)


def test_a_full_disk_among_the_shards_leaves_what_was_there(tmp_path, monkeypatch):
    safefolder.save(tmp_path / "thing", CONFIG, SHARDED, max_shard_size=100)
    whole, synced = os.fsync, []

    def full_at_the_third(handle):
        synced.append(handle)
        if len(synced) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_at_the_third)
        with pytest.raises(ValueError, match=r"no space is left.*untouched"):
            save_larger(tmp_path / "thing", SHARDED, max_shard_size=100)
    check_untouched(tmp_path / "thing", SHARDED)


def test_a_file_that_may_not_grow_leaves_what_was_there(thing):
    """A real failure inside the safetensors writer: the kernel's limit on the size of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(ValueError, match=r"could not write.*untouched"):
            save_larger(thing, {"a": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    check_untouched(thing)


ENDLESS = """
import sys, safefolder, torch
count = 0
while True:
    tensors = {name: torch.full((12_500,), float(count)) for name in "abcd"}
    safefolder.save(sys.argv[1], {"class": "Thing", "count": count}, tensors, max_shard_size=int(sys.argv[2]))
    count += 1
    print(count, flush=True)
"""


@pytest.mark.parametrize(("max_shard_size", "pauses"), some([(10**9, (0.003,)), (60_000, (0.007, 0.017))]))
def test_kill_at_any_moment_leaves_a_whole_folder(tmp_path, max_shard_size, pauses):
    for pause in pauses:
        with subprocess.Popen(
            [sys.executable, "-c", ENDLESS, tmp_path / "thing", str(max_shard_size)], stdout=subprocess.PIPE, text=True
        ) as process:
            process.stdout.readline()
            process.stdout.readline()
            time.sleep(pause)
            process.send_signal(signal.SIGKILL)
        config, tensors = safefolder.load(tmp_path / "thing")
        assert config["count"] >= 1
        assert tensors.keys() == set("abcd")
        assert all((tensor == config["count"]).all() for tensor in tensors.values())


def test_what_cannot_be_read_is_named(tmp_path):
    whole = {"config.json": b'{"format": 1, "class": "Thing"}', "model.safetensors": b""}
    with pytest.raises(ValueError, match="no model folder"):
        safefolder.load(tmp_path / "missing")
    for changes, message in (
        ({"config.json": None}, "no config.json"),
        ({"model.safetensors": None}, "no model.safetensors"),
        ({"config.json": b"{"}, "cannot be read as JSON"),
        ({"config.json": b'{"model_type": "llama"}'}, "not of this library"),
        ({"config.json": b'{"format": 2, "class": "Thing"}'}, "format 2, this version reads format 1; upgrade"),
        ({"config.json": b'{"format": "1", "class": "Thing"}'}, "not of this library"),
        ({"config.json": b'{"format": 0, "class": "Thing"}'}, "not of this library"),
        ({"model.safetensors": b"\x80\x02}q\x00."}, "corrupt or no safetensors"),
    ):
        for path in tmp_path.iterdir():
            path.unlink()
        for name, data in {**whole, **changes}.items():
            if data is not None:
                (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message):
            safefolder.load(tmp_path)


def test_everything_that_does_not_fit_stands_in_one_error():
    module = nn.Sequential(*(nn.Linear(2, 2) for _ in range(6)))
    tensors = {name: torch.zeros(3) for name in module.state_dict()}
    del tensors["0.weight"]
    tensors |= {"more": torch.zeros(1), "5.bias": torch.zeros(2, dtype=torch.bool)}
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(ValueError, match="do not fit") as told:
        safefolder.folder.load_weights(module, tensors, "here")
    for part in (
        "missing 0.weight; unknown more",
        "0.bias is (3,), expected (2,); ",
        "and 7 more",
        "5.bias is torch.bool",
    ):
        assert part in str(told.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


STRIDED = {"turned": torch.arange(12.0).reshape(3, 4).T, "same": SHARDED["layer.0"], "large": torch.zeros(100)}
SIZE = sum(tensor.nbytes for tensor in {**SHARDED, **STRIDED}.values())


@pytest.mark.parametrize(("max_shard_size", "most_shards"), [(100, 10), (SIZE - 1, 2), (SIZE, 0)])
def test_shared_and_strided_tensors_are_read_back_bit_for_bit(tmp_path, max_shard_size, most_shards):
    tensors = {**SHARDED, **STRIDED}
    safefolder.save(tmp_path / "thing", CONFIG, tensors, max_shard_size=max_shard_size)
    check_untouched(tmp_path / "thing", tensors)
    names = sorted(os.listdir(tmp_path / "thing"))
    assert set(safefolder.folder.members(tmp_path / "thing")) == set(names)
    shards = [name for name in names if name.startswith("model-")]
    assert min(2, most_shards) <= len(shards) <= most_shards
    weights = "model.safetensors.index.json" if shards else "model.safetensors"
    assert names == ["config.json", *shards, weights]
    assert shards == [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name in shards:
        held = safetensors.torch.load_file(tmp_path / "thing" / name)
        assert sum(tensor.nbytes for tensor in held.values()) <= max_shard_size or held.keys() == {"large"}


def test_the_hubs_own_loader_reads_the_shards(tmp_path):
    """huggingface_hub, and with it the libraries that build on it, take the folder as one of theirs."""
    module = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    for size in (70, 10**9):
        safefolder.save(tmp_path / "thing", CONFIG, module.state_dict(), max_shard_size=size)
        other = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
        huggingface_hub.load_torch_model(other, tmp_path / "thing")
        assert all(torch.equal(own, module.state_dict()[name]) for name, own in other.state_dict().items())


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
    with pytest.raises(ValueError, match=r"^[^\n]*does not fit its shards[^\n]*$") as told:
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


def test_an_index_that_is_none(tmp_path):
    folder = tmp_path / "thing"
    safefolder.save(folder, CONFIG, SHARDED, max_shard_size=100)
    for index, message in (("[]", "holds a list, expected an object"), ('{"weight_map": {"a": 1}}', "no 'weight_map'")):
        (folder / "model.safetensors.index.json").write_text(index)
        with pytest.raises(ValueError, match=message):
            safefolder.load(folder)
    safetensors.torch.save_file(TENSORS, folder / "model.safetensors")
    with pytest.raises(ValueError, match="has both"):
        safefolder.load(folder)


def test_a_subfolder_of_a_folder_which_has_no_revision(tmp_path):
    run = tmp_path / "run"
    safefolder.save(run / "codebook", CONFIG, TENSORS)
    assert safefolder.load(run, subfolder="codebook")[0]["size"] == 3
    assert safefolder.load(tmp_path, subfolder="run/codebook", local_files_only=True)[0]["size"] == 3
    assert safefolder.folder.has_part(run, "codebook")
    assert not safefolder.folder.has_part(run, "prior")
    os.replace(run / "codebook", run / ".codebook.previous")
    assert safefolder.load(run, subfolder="codebook")[0]["size"] == 3
    with pytest.raises(ValueError, match=r"no model folder at .*prior"):
        safefolder.load(run, subfolder="prior")
    for outside in ("../run", "/", "", "a/../../b", "a\\b"):
        with pytest.raises(ValueError, match=r"subfolder=.*inside"):
            safefolder.load(run, subfolder=outside)
    with pytest.raises(ValueError, match="has no revision"):
        safefolder.load(run / "codebook", revision="main")
    with pytest.raises(ValueError, match="has no token and no cache_dir"):
        safefolder.load(run / "codebook", token="x", cache_dir=tmp_path)


def test_what_is_written_can_be_read_as_the_umask_says(tmp_path):
    """safetensors' own files are for their owner alone."""
    for mask in (0o022, 0o077, 0o002):
        before = os.umask(mask)
        try:
            safefolder.save(tmp_path / f"{mask}", CONFIG, TENSORS)
            with safefolder.files.replacing(tmp_path / f"{mask}.safetensors") as scratch:
                safetensors.torch.save_file(TENSORS, scratch)
        finally:
            os.umask(before)
        files = [*(tmp_path / f"{mask}").iterdir(), tmp_path / f"{mask}.safetensors"]
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o666 & ~mask}


@pytest.mark.parametrize("name", ["README.md", "unet/weights.bin", ".hidden"])
def test_what_is_not_a_model_s_is_not_removed(name, thing):
    """A card or a figure tells of the model that is there, so it is neither lost nor put beside another."""
    path = thing / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(ValueError, match=rf"holds other things, {name.split('/')[0]}, .* another folder"):
        save_larger(thing)
    assert path.read_text() == "mine"
    check_untouched(thing)


def test_what_comes_while_a_folder_is_written_stays(thing):
    with pytest.raises(ValueError, match=r"notes\.txt"), replacing_folder(thing, ("config.json", "model.safetensors")):
        (thing / "notes.txt").write_text("mine")
    assert (thing / "notes.txt").read_text() == "mine"
    check_untouched(thing)


def test_our_own_leavings_are_replaced(tmp_path):
    """Shards of an earlier model, and a file that was being written when the process died."""
    safefolder.save(tmp_path / "thing", CONFIG, TENSORS, max_shard_size=10)
    (tmp_path / "thing" / ".config.json.writing").write_text("{")
    safefolder.save(tmp_path / "thing", CONFIG, TENSORS)
    assert sorted(os.listdir(tmp_path / "thing")) == ["config.json", "model.safetensors"]


def test_others_files_of_the_same_names_are_not_replaced(tmp_path, monkeypatch):
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "model.safetensors").write_bytes(b"theirs")
    with pytest.raises(ValueError, match="something else under the same names"):
        safefolder.save(folder, CONFIG, TENSORS)
    assert (folder / "model.safetensors").read_bytes() == b"theirs"
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        safefolder.save(folder / "config.json", CONFIG, TENSORS)
    assert (folder / "config.json").read_text() == '{"model_type": "bert"}'
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="the folder that this program runs in"):
        safefolder.save(".", CONFIG, TENSORS)


def test_a_link_to_a_folder_is_followed_and_one_to_a_file_is_not(tmp_path):
    disk = tmp_path / "disk"
    safefolder.save(disk / "thing", CONFIG, TENSORS)
    (tmp_path / "link").symlink_to(disk / "thing")
    save_larger(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert safefolder.load(disk / "thing")[0]["size"] == 4
    os.replace(disk / "thing", disk / ".thing.previous")
    assert safefolder.load(tmp_path / "link")[0]["size"] == 4  # killed between the renames
    (disk / "text").write_text("theirs")
    (tmp_path / "text").symlink_to(disk / "text")
    safefolder.files.write_text(tmp_path / "text", "new")
    assert not (tmp_path / "text").is_symlink()
    assert (disk / "text").read_text() == "theirs"
    assert sorted(os.listdir(tmp_path)) == ["disk", "link", "text"]
