"""Integers of any type and in any container become one int64 tensor, or a sentence."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safefolder.arrays import integers, labels_for, mask_of, vectors

TYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(TYPES), kind=st.sampled_from(("tensor", "array", "swapped")), data=st.data())
def test_case_25_every_number_of_every_type_is_itself_or_refused(name, kind, data):
    info = np.iinfo(name)
    values = data.draw(st.lists(st.integers(int(info.min), int(info.max)), max_size=6))
    array = np.array(values, name)
    made = {
        "tensor": torch.from_numpy(array),
        "array": array,
        "swapped": array.astype(array.dtype.newbyteorder()),
    }[kind]
    too_large = [value for value in values if value >= 2**63]
    if too_large:
        with pytest.raises(ValueError, match=f"got codes up to {max(too_large)}, expected integers of 63 bits"):
            integers(made, "codes")
        return
    for each in (made, values, tuple(values)):
        got = integers(each, "codes")
        assert got.dtype == torch.int64
        assert got.tolist() == values


def test_what_is_int64_is_not_copied():
    codes = torch.arange(6).reshape(2, 3)
    assert integers(codes, "codes") is codes
    array = np.arange(6)
    assert integers(array, "codes").data_ptr() == array.ctypes.data


def test_arrays_of_any_layout():
    array = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)
    read_only = array.copy()
    read_only.flags.writeable = False
    packed = np.frombuffer(b"\0" + array.tobytes(), np.uint8)[1:].view(np.uint16)
    for each in (array[::-1, :, ::-2], array.transpose(2, 0, 1), np.asfortranarray(array), read_only, packed):
        assert integers(each, "codes").tolist() == each.tolist()
    mixed = [torch.tensor([0, 1]), torch.tensor([2, 3], dtype=torch.uint8)]
    assert integers(mixed, "codes").tolist() == [[0, 1], [2, 3]]
    assert integers(range(3), "codes").tolist() == [0, 1, 2]
    assert integers(np.ulonglong(3), "codes").item() == 3


@pytest.mark.parametrize(
    ("values", "got"),
    [
        (torch.zeros(2), "of torch.float32, expected integers"),
        (np.zeros(2), "of torch.float64, expected integers"),
        ([True, False], "of torch.bool, expected integers"),
        (["cat"], "of <U3, expected integers as a tensor, an array or lists"),
        ({0: 1}, "of dict, expected integers as a tensor, an array or lists"),
        ([[0], [0, 1]], "in lists of unequal length, expected those of an array"),
        (np.array([1, 2**64 - 1], np.uint64), f"up to {2**64 - 1}, expected integers of 63 bits"),
        ([2**64], f"up to {2**64}, expected integers of 63 bits"),
        ([None], "of object, expected integers as a tensor, an array or lists"),
        (torch.zeros(2, dtype=torch.complex64), "of torch.complex64, expected integers"),
    ],
    ids=str,
)
def test_case_25_what_is_no_integers_is_a_sentence(values, got):
    with pytest.raises(ValueError, match=f"^got codes {re.escape(got)}$"):
        integers(values, "codes")


def test_case_28_labels_for_each_or_one_for_all():
    for labels in ([1, 2, 0], np.array([1, 2, 0], np.uint8), torch.tensor([1, 2, 0], dtype=torch.int16)):
        assert labels_for(labels, 3).tolist() == [1, 2, 0]
    for label in (2, np.array(2), torch.tensor(2, dtype=torch.uint8)):
        assert labels_for(label, 3).tolist() == [2, 2, 2]
    assert labels_for([], 0).tolist() == labels_for(3, 0).tolist() == []
    for labels, message in (
        ([1, 2], r"torch.int64 \(2,\), expected integers of shape \(3,\), or one for all"),
        (torch.zeros(3), r"torch.float32 \(3,\), expected integers of shape \(3,\)"),
        ("cat", "got labels of str, expected integers of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            labels_for(labels, 3)


def test_vectors_and_masks():
    array = np.random.default_rng(0).normal(size=(2, 3))
    for each in (array, array.astype(np.longdouble), array.tolist()):
        assert vectors(each, "latents").tolist() == array.tolist()
    with pytest.raises(ValueError, match=r"got latents of torch\.int64, expected floating point"):
        vectors([[1, 2]], "latents")
    mask = torch.tensor([True, False])
    assert mask_of(mask, "a mask") is mask
    assert mask_of(mask.numpy(), "a mask").tolist() == mask_of([True, False], "a mask").tolist() == [True, False]
