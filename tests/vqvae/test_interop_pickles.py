"""Pickled files of weights: what is read, that nothing in them runs, and one clear line for each that is refused."""

import argparse
import os
import pickle

import numpy as np
import pytest
import torch

from vqvae.interop.pickles import read_pickle


class Calls:
    """Pickled, it calls a function when read."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def lightning_checkpoint(path):
    """A file with Lightning's class names in it, as releases of 2020 have them, where no such package is."""
    import sys
    import types

    names = ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint")
    modules = {name: types.ModuleType(name) for name in names}
    kind = type("ModelCheckpoint", (), {"__module__": names[-1]})
    modules[names[-1]].ModelCheckpoint = kind
    sys.modules.update(modules)
    try:
        state = {
            "monitor": "val/rec_loss",
            "best_model_score": torch.tensor(0.5),
            "best": np.float64(0.25),
            "step": np.int64(3),
            "flag": np.bool_(True),
        }
        torch.save({"state_dict": {"x": torch.ones(2)}, "callbacks": {kind: state}, "hparams": kind()}, path)
    finally:
        for name in names:
            del sys.modules[name]


def test_pickles_are_read(tmp_path):
    path = tmp_path / "file.ckpt"
    held = {"x": torch.arange(5), "args": argparse.Namespace(lr=1e-3, names=["a"])}
    for zipped in (True, False):
        torch.save(held, path, _use_new_zipfile_serialization=zipped)
        read = read_pickle(path)
        assert torch.equal(read["x"], held["x"])
        assert read["args"] == held["args"]
    allowed = set(torch.serialization.get_safe_globals())
    lightning_checkpoint(path)
    (state,) = read_pickle(path)["callbacks"].values()
    assert (state["best"], state["step"], state["flag"]) == (0.25, 3, True)
    assert set(torch.serialization.get_safe_globals()) == allowed  # what else may be read ends with the reading


def test_pickles_that_would_run_something_do_not(tmp_path):
    path, trace = tmp_path / "file.ckpt", tmp_path / "trace"
    calls = {
        "posix.mkdir": Calls(os.mkdir, str(trace)),
        "posix.system": Calls(os.system, f"touch {trace}"),
        "builtins.exec": Calls(exec, f"open({str(trace)!r}, 'w')"),
        "builtins.eval": Calls(eval, f"open({str(trace)!r}, 'w')"),
    }
    for name, call in calls.items():
        for zipped in (True, False):
            torch.save({"state_dict": {"x": call}}, path, _use_new_zipfile_serialization=zipped)
            with pytest.raises(
                ValueError, match=rf"holds {name.removeprefix('builtins.')}, which is not among the names"
            ) as caught:
                read_pickle(path)
            assert "\n" not in str(caught.value)
            assert not trace.exists()
        path.write_bytes(pickle.dumps(call))
        with pytest.raises(ValueError, match=r"is corrupt|is not among"):
            read_pickle(path)
        assert not trace.exists()
    # That the files are dangerous at all:
    torch.save({"x": calls["posix.mkdir"]}, path)
    torch.load(path, weights_only=False)
    assert trace.is_dir()


def test_files_that_are_no_pickles(tmp_path):
    path = tmp_path / "file.ckpt"
    torch.save({"x": torch.randn(5000)}, path)
    whole = path.read_bytes()
    torch.save({"x": torch.randn(5000)}, path, _use_new_zipfile_serialization=False)
    old = path.read_bytes()
    cases = {
        "is empty": b"",
        "pointer of Git LFS, not the file itself; fetch that with: git lfs pull": b"version https://git-lfs.github.com/",
        "is corrupt, or no file that torch.save wrote": b"<!doctype html><title>404</title>",
    }
    for message, data in cases.items():
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_pickle(path)
    for data in (whole[:9000], whole[:100], old[:9000], old[:50], whole[: len(whole) // 2] + bytes(len(whole) // 2)):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"no file that torch\.save wrote") as caught:
            read_pickle(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no file at"):
        read_pickle(tmp_path / "absent")
