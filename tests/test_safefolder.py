"""Folders of config and weights: whole or not at all, and one clear line for what cannot be read."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
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
    safefolder.save(sys.argv[1], {"class": "Thing", "count": count}, {"a": torch.full((50_000,), float(count))})
    count += 1
    print(count, flush=True)
"""


def test_kill_at_any_moment_leaves_a_whole_folder(tmp_path):
    counts = []
    for pause in (0.0, 0.003, 0.011, 0.017):
        with subprocess.Popen(
            [sys.executable, "-c", ENDLESS, tmp_path / "thing"], stdout=subprocess.PIPE, text=True
        ) as process:
            process.stdout.readline()
            process.stdout.readline()
            time.sleep(pause)
            process.send_signal(signal.SIGKILL)
        config, tensors = safefolder.load(tmp_path / "thing")
        assert (tensors["a"] == config["count"]).all()
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


def test_a_hub_id_that_cannot_be_reached_is_one_line(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def offline(*_, **__):
        raise huggingface_hub.errors.OfflineModeIsEnabled("the hub cannot be reached\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match=r"the hub cannot be reached$"):
        safefolder.load("owner/name")


def test_a_hub_id_is_downloaded(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    safefolder.save(tmp_path / "cached", CONFIG, TENSORS)
    asked = {}

    def download(hub_id, allow_patterns):
        asked.update(hub_id=hub_id, allow_patterns=allow_patterns)
        return str(tmp_path / "cached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert safefolder.load("owner/name")[0]["size"] == 3
    assert asked == {"hub_id": "owner/name", "allow_patterns": ["config.json", "model.safetensors"]}


def test_without_the_hub_extra_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'vqvae-priors\[hub\]'"):
        safefolder.load("owner/name")


def test_weights_that_do_not_fit_are_named():
    module = nn.Linear(3, 2)
    good = dict(module.state_dict())
    for tensors, message in (
        ({"weight": good["weight"]}, "missing bias"),
        ({**good, "more": good["bias"]}, "unknown more"),
        ({**good, "bias": torch.zeros(5)}, r"bias is \(5,\), expected \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            safefolder.load_weights(module, tensors, "here")
