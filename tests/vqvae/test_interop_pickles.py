"""Pickled files of weights: what is read, that nothing in them runs, and one clear line for each that is refused."""

import argparse
import collections
import io
import os
import pickle
import struct
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vqvae import VQVAE
from vqvae.interop.pickles import read_pickle, refusal


def refused(path, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_pickle(path)
    error = caught.value
    assert "\n" not in str(error)
    assert len(str(error).replace(str(path), "")) < 400
    while error is not None:  # nor is torch's advice among what led to it
        assert "weights_only" not in str(error)
        error = error.__cause__ or error.__context__


def save(held, path, is_zip):
    """In either format; the zip without checksums, so that damage is not just found by these."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(held, path, _use_new_zipfile_serialization=is_zip)
    finally:
        torch.serialization.set_crc32_options(True)


class Calls:
    """Pickled, it calls a function when read."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_callbacks_of_lightning_are_read_where_no_such_package_is(tmp_path, monkeypatch):
    path = tmp_path / "file.ckpt"
    state = {"best_model_score": torch.tensor(0.5), "best": np.float64(0.25), "step": np.int64(3), "flag": np.True_}
    with monkeypatch.context() as patch:
        package = "pytorch_lightning.callbacks.model_checkpoint"
        kind = type("ModelCheckpoint", (), {"__module__": package})
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", package):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules[package].ModelCheckpoint = kind
        torch.save({"callbacks": {kind: state}, "hparams": kind()}, path)
    (found,) = read_pickle(path)["callbacks"].values()
    assert (found["best"], found["step"], found["flag"]) == (0.25, 3, True)


def test_pickles_that_would_run_something_do_not(tmp_path):
    path, trace = tmp_path / "file.ckpt", tmp_path / "trace"
    calls = {
        "posix.mkdir": Calls(os.mkdir, str(trace)),
        "posix.system": Calls(os.system, f"touch {trace}"),
        "eval": Calls(eval, f"open({str(trace)!r}, 'w')"),
    }
    for name, call in calls.items():
        for zipped in (True, False):
            torch.save({"state_dict": {"x": call}}, path, _use_new_zipfile_serialization=zipped)
            refused(path, rf"holds {name}, which is not among the names")
        path.write_bytes(pickle.dumps(call))
        refused(path, r"is corrupt|is not among")
        assert not trace.exists()
    # That the files are dangerous at all:
    torch.save({"x": calls["posix.mkdir"]}, path)
    torch.load(path, weights_only=False)
    assert trace.is_dir()


def test_files_that_are_no_pickles(tmp_path):
    path = tmp_path / "file.ckpt"
    for is_zip in (True, False):
        save({"x": torch.randn(5000)}, path, is_zip)
        whole = path.read_bytes()
        for data in (whole[:9000], whole[:50], whole[: len(whole) // 2] + bytes(len(whole) // 2) * is_zip):
            path.write_bytes(data)
            refused(path, r"no file that torch\.save wrote")
    with pytest.raises(ValueError, match="no file at"):
        read_pickle(tmp_path / "absent")


# ---- what a file claims

REBUILD = "torch._utils._rebuild_tensor_v2"


def zipped(program, method=zipfile.ZIP_STORED, **members):
    """A file of torch's form with this pickle in it."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", method) as archive:
        archive.writestr("a/data.pkl", program)
        for name, data in members.items():
            archive.writestr(name if "/" in name else f"a/data/{name.lstrip('_')}", data)
    return made.getvalue()


def legacy(program, keys=b"\x80\x02].", rest=b""):
    start = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    return b"".join(pickle.dumps(each, 2) for each in start) + program + keys + rest


def says(*parts):
    return b"\x80\x02" + b"".join(parts) + b"."


def named(name):
    return b"c" + "\n".join(name.rsplit(".", 1)).encode() + b"\n"


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value):
    return b"\x8a\x08" + struct.pack("<q", value)


def tensor(stored, size, stride=1, offset=0):
    """One axis of `size` numbers in the storage 0, which is said to have `stored`."""
    storage = b"(" + text("storage") + named("torch.FloatStorage") + text("0") + text("cpu") + number(stored) + b"tQ"
    axes = number(size) + b"\x85" + number(stride) + b"\x85"
    return named(REBUILD) + b"(" + storage + number(offset) + axes + b"\x89}tR"


STORAGE = says(b"]", text("0"), b"a"), struct.pack("<q", 1 << 30) + bytes(4)
PAIRS = b"](" + b"NN\x86" * 3_000 + b"eq\x00"
MANY = 20_000
REFUSED = {
    "nothing": (b"", "is empty"),
    "a pointer": (b"version https://git-lfs.github.com/", "git lfs pull"),
    "a page": (b"<!doctype html><title>404</title>", "is corrupt, or no file that torch.save wrote"),
    "no stack": (zipped(says(b"\x85")), "takes more from the stack than there is"),
    "no dict": (zipped(says(b"]NNs")), "it sets entries of a list"),
    "TorchScript": (zipped(says(b"N"), **{"a/constants.pkl": b""}), "it is a program of TorchScript"),
    "two pickles": (zipped(says(b"N"), **{"b/data.pkl": b""}), "a zip with 2 files called data.pkl"),
    "another order": (zipped(says(b"N"), **{"a/byteorder": b"big"}), "those of a big-endian machine"),
    "bytearray": (zipped(says(named("builtins.bytearray"), number(4 << 30), b"\x85R")), "bytearray"),
    "bytearray, legacy": (legacy(says(named("__builtin__.bytearray"), number(4 << 30), b"\x85R")), "bytearray"),
    "a tensor's class": (zipped(says(named("torch.Tensor"), number(1 << 30), b"\x85R")), "it calls torch.Tensor"),
    "a storage": (zipped(says(tensor(1 << 30, 1)), _0=bytes(4)), "claims 4,294,967,296 bytes .* and has 4"),
    "a view": (zipped(says(tensor(1, 1 << 30)), _0=bytes(4)), "in a storage of 4 bytes"),
    "an offset": (zipped(says(tensor(2, 1, offset=2)), _0=bytes(8)), "in a storage of 8 bytes"),
    "a negative stride": (zipped(says(tensor(2, 2, stride=-1)), _0=bytes(8)), "whose sizes are no numbers"),
    "no member": (zipped(says(tensor(1, 1))), "it has no a/data/0"),
    "a legacy storage": (legacy(says(tensor(1 << 30, 1)), *STORAGE), "claims 4,294,967,296 bytes .* and has fewer"),
    "a legacy storage of another size": (legacy(says(tensor(1, 1)), *STORAGE), "claims 4 bytes .* and has others"),
    "a packed pickle": (zipped(says(b"N" * (30 << 20)), zipfile.ZIP_DEFLATED), "data.pkl is compressed or encrypted"),
    "a large pickle": (zipped(says(b"N" * (40 << 20))), "its pickle is over 33,554,432 bytes"),
    "a text": (zipped(says(b"X" + struct.pack("<I", 2**32 - 1) + b"a")), "expected 4294967295 bytes"),
    "a long number": (zipped(says(b"\x8b" + struct.pack("<i", 2**31 - 1) + b"a")), "not enough data"),
    "digits": (zipped(says(b"L" + b"9" * 5_000 + b"L\n")), "(?i)digits"),
    "dicts": (zipped(says(b"}" * (MANY + 1))), "over 20,000 steps"),
    "copies": (zipped(says(PAIRS + (named("collections.OrderedDict") + b"h\x00\x85R") * 10)), "over 20,000 steps"),
    "keys of one hash": (zipped(says(b"}\x8a\x0c", (2**64).to_bytes(12, "little"), b"Ns")), "a int for a key"),
    "axes": (zipped(says(named(REBUILD), b"(N", number(0), b")" * 2, b"\x89}tR")), "a tensor in a NoneType"),
    "a list of members": (
        zipped(says(b"N"), **{f"{k:06}{'x' * 2000}": b"" for k in range(9_000)}),
        "its list of members is over 16,777,216 bytes",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_case_18_a_file_that_claims_more_than_it_has_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setattr("vqvae.interop.pickle_machine.MOST_OPCODES", MANY)
    path = tmp_path / "model.ckpt"
    data, message = REFUSED[name]
    path.write_bytes(data)
    refused(path, message)


@pytest.mark.slow
def test_case_18_a_claim_of_gigabytes_costs_no_memory(tmp_path):
    for index, (data, _) in enumerate(REFUSED.values()):
        (tmp_path / f"{index}.ckpt").write_bytes(data)
    script = """
import contextlib, pathlib, resource, sys
from vqvae.interop.pickles import read_pickle
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    with contextlib.suppress(ValueError):
        read_pickle(path)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 200  # MiB; the largest of the files has 43


STRUCTURES = {
    "a list in itself": b"]q\x00h\x00a",
    "a dict in itself": b"}q\x00" + text("a") + b"h\x00s",
    "deep lists": b"]" * 9_000 + b"a" * 8_999,
    "deep tuples": b")" + b"\x85" * 9_000,
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_case_18_structures_that_hold_themselves_are_harmless(name, tmp_path):
    (tmp_path / "model.ckpt").write_bytes(zipped(says(STRUCTURES[name])))
    read_pickle(tmp_path / "model.ckpt")


def test_case_18_torch_s_advice_is_not_passed_on(tmp_path):
    """Of a run's own checkpoints too, which torch reads."""
    path = tmp_path / "state.ckpt"

    def said():
        with pytest.raises(pickle.UnpicklingError, match="weights_only") as caught:
            torch.load(path, weights_only=True)
        return refusal(caught.value)

    for held, part in ((Calls(os.system, "true"), "system"), (Calls(eval, "1"), "eval"), (range(3), "range")):
        torch.save({"x": held}, path)
        assert f"{part}, which is neither weights nor plain values" in said()
    path.write_bytes(b"\x80\x02\x8b.")
    assert said() == "it holds what is neither weights nor plain values"
    assert refusal(RuntimeError("size mismatch:\n\tmore")) == "size mismatch: more"


def test_a_whole_model_of_this_library_is_told_to_be_one(tmp_path):
    torch.save(VQVAE.Config(width=8, num_blocks=0).build(), tmp_path / "model.pt")
    refused(tmp_path / "model.pt", r"a whole VQVAE of this library, pickled: save it by save_pretrained")


# ---- what is read, and what is damaged

BASE = torch.arange(120.0).view(10, 12)
NUMBERS = (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int16, torch.int32, torch.uint8)
HELD = {
    "base": BASE,
    "view": BASE[2:, ::3],
    "transposed": BASE.T,
    "expanded": BASE[:1].expand(3, 12),
    "empty": torch.empty(0, 5),
    "scalar": torch.tensor(3.5),
    **{str(dtype): torch.tensor([1, 0, 1]).to(dtype) for dtype in NUMBERS},
    "complex": torch.tensor([1 + 2j]),
    "bool": torch.tensor([True, False]),
    "parameter": nn.Parameter(torch.ones(2, 2)),
}


@pytest.mark.parametrize("is_zip", [True, False])
def test_tensors_are_those_that_torch_reads(is_zip, tmp_path):
    path = tmp_path / "model.pt"
    newer = {str(dtype): torch.ones(1, dtype=dtype) for dtype in (torch.uint16, torch.float8_e4m3fn) if is_zip}
    torch.save({**HELD, **newer}, path, _use_new_zipfile_serialization=is_zip)
    ours, theirs = read_pickle(path), torch.load(path, weights_only=True)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        own = ours[name]
        assert (own.dtype, own.shape, own.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
        assert own.tolist() == tensor.tolist()
    assert ours["view"].untyped_storage().data_ptr() == ours["base"].untyped_storage().data_ptr()
    # Nothing that is done to them reaches the file.
    ours["base"].zero_()
    assert torch.equal(read_pickle(path)["base"], BASE)


@pytest.mark.parametrize("is_zip", [True, False])
def test_plain_values_of_trainers_are_read(is_zip, tmp_path):
    path = tmp_path / "model.ckpt"
    layer = nn.Linear(2, 3)
    layer.weight.mark = "mine"
    odd = {"milestones": collections.Counter({1: 2}), "seen": {1}, "device": torch.device("cpu"), "dtype": torch.half}
    plain = {"n": None, "big": 2**100, "l": [1, 2.5, "x", (True, -7)], "args": argparse.Namespace(lr=1e-3, names=["a"])}
    held = {**plain, **odd, "size": BASE.shape, "layer": layer.state_dict(), "w": layer.weight}
    save(held, path, is_zip)
    found = read_pickle(path)
    assert found.keys() == held.keys()
    assert {name: found[name] for name in plain} == plain
    assert found["size"] == (10, 12)
    assert torch.equal(found["layer"]["weight"], layer.weight)
    assert torch.equal(found["w"], layer.weight)


def test_case_22_a_flipped_bit_is_found_by_the_checksum(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"x": torch.zeros(100)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(bytes(400)) + 200] ^= 1
    path.write_bytes(data)
    refused(path, r"data/0 is not what its checksum says")


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """Bytes of whole files of both formats."""
    path = tmp_path_factory.mktemp("whole") / "model.pt"
    found = []
    for is_zip in (True, False):
        save({**HELD, "args": argparse.Namespace(a=1), "n": np.float64(2)}, path, is_zip)
        found.append(path.read_bytes())
    return found


@given(which=st.integers(0, 1), at=st.integers(0, 10**6), put=st.binary(max_size=8), off=st.integers(0, 12))
@settings(max_examples=150, deadline=None)
def test_case_22_damaged_checkpoints_are_read_or_refused(wholes, tmp_path_factory, which, at, put, off):
    path = tmp_path_factory.getbasetemp() / "damaged.ckpt"
    data = wholes[which]
    at %= len(data)
    path.write_bytes(data[:at] + put + data[at + off :])
    try:
        read_pickle(path)
    except ValueError:
        refused(path, "damaged.ckpt")
