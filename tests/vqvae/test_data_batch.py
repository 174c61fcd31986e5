"""A batch is a sequence of its items, and a set gives them by any index that others take."""

import dataclasses
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import noise, save
from torch.utils.data import ConcatDataset, DataLoader, Subset

from vqvae.data import Batch, ImageTensors, load_images

# Workers are forked from a process with threads.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

NUM = 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Image i is filled with i; those to train on have labels."""
    for number in range(NUM):
        save(tmp_path / "train" / "ab"[number % 2] / f"{number:02}.png", np.full((4, 4), number, np.uint8))
    save(tmp_path / "test" / "a" / "0.png", noise(4, 4))
    return tmp_path


def counted(labelled: bool = True) -> ImageTensors:
    levels = torch.arange(NUM)
    return ImageTensors(levels.byte().reshape(-1, 1, 1, 1).repeat(1, 1, 2, 2), levels if labelled else None)


def numbers(images: torch.Tensor) -> list[int]:
    return images[:, 0, 0, 0].tolist()


# Torch's own loader


@pytest.mark.parametrize("num_workers", [0, 2])
def test_torchs_loader_takes_a_set_as_it_is(folder: Path, num_workers: int):
    images = load_images(folder, size=4)
    order = {int(images[i][0][0, 0, 0]): int(images.labels[i]) for i in range(NUM)}
    for shuffle in (False, True):
        parts = list(DataLoader(images, batch_size=5, shuffle=shuffle, num_workers=num_workers))
        assert [pixels.shape for pixels, _ in parts] == [(5, 1, 4, 4), (5, 1, 4, 4), (2, 1, 4, 4)]
        assert all(pixels.dtype == torch.uint8 and labels.dtype == torch.int64 for pixels, labels in parts)
        pixels, labels = (torch.cat(each) for each in zip(*parts, strict=True))
        assert dict(zip(numbers(pixels), labels.tolist(), strict=True)) == order


def test_a_set_without_labels_gives_images_alone():
    images = counted(False)
    (item,) = images[3]
    assert numbers(item[None]) == [3]
    assert [numbers(pixels) for (pixels,) in DataLoader(images, batch_size=8)] == [[*range(8)], [8, 9, 10, 11]]
    both = ConcatDataset([Subset(images, [5, 1]), images])
    assert next(numbers(pixels) for (pixels,) in DataLoader(both, batch_size=3)) == [5, 1, 0]


def test_what_can_not_be_read_is_warned_of_once_and_named_where_nothing_is_left(folder: Path):
    broken = ("a/00", "a/02", "a/04", "a/06", "b/01")
    for name in broken:
        (folder / "train" / f"{name}.png").write_bytes(b"broken")
    images = load_images(folder, size=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()  # as outside of tests
        parts = list(DataLoader(images, batch_size=6))
    assert [numbers(pixels) for pixels, _ in parts] == [[8, 10], [3, 5, 7, 9, 11]]
    reason = "is left out, as it can't be read as an image: not an image in a known format"
    assert [str(each.message) for each in caught] == [f"{name}.png {reason}" for name in broken]
    with pytest.raises(ValueError, match=r"none of the 4 images .*\(a/00.png: not an image .*; and 1 more\)"):
        list(DataLoader(images, batch_size=4))
    with pytest.raises(ValueError, match=r"^a/00\.png can't be read as an image: not an image"):
        images[0]


def test_a_batch_is_a_frozen_sequence_of_items():
    batch = Batch(torch.arange(3).byte().reshape(3, 1, 1, 1), torch.tensor([5, 6, 7]))
    assert (len(batch), batch.skipped) == (3, ())
    assert [(int(image), label) for image, label in batch] == [(0, 5), (1, 6), (2, 7)]
    assert batch[-1][1] == 7
    assert type(batch[0][1]) is int
    assert numbers(batch[::-2].images) == [2, 0]
    assert batch[1:].labels.tolist() == [6, 7]
    with pytest.raises(IndexError):
        batch[3]
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.labels = None
    copy = pickle.loads(pickle.dumps(dataclasses.replace(batch, labels=None, skipped=(("a", "b"),))))
    assert copy.images.equal(batch.images)
    assert copy[:2].skipped == (("a", "b"),)
    assert len(copy[0]) == 1
    nothing = Batch(batch.images[:0], None)
    assert list(nothing) == []
    with pytest.raises(IndexError):
        nothing[0]


# Indices

CONTAINERS: list[Callable[[list[int]], object]] = [
    list,
    np.array,
    torch.tensor,
    lambda some: np.array(some, np.int8),
    lambda some: [torch.tensor(each) for each in some],
]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-NUM, NUM - 1), max_size=6), st.sampled_from(CONTAINERS), st.booleans())
def test_any_numbers_in_any_container_give_those_images(chosen: list[int], contain: Callable, labelled: bool):
    images = counted(labelled)
    batch = images[contain(chosen)]
    assert isinstance(batch, Batch)
    assert numbers(batch.images) == [each % NUM for each in chosen]
    assert (batch.labels is None) == (not labelled)
    assert labelled is False or batch.labels.tolist() == [each % NUM for each in chosen]
    assert [numbers(images[each][0][None]) for each in chosen] == [[each % NUM] for each in chosen]


@settings(max_examples=40, deadline=None)
@given(st.slices(NUM))
def test_a_slice_is_that_of_a_list(chosen: slice):
    assert numbers(counted()[chosen].images) == list(range(NUM))[chosen]


def test_a_folder_of_images_takes_the_same_indices(folder: Path):
    images = load_images(folder, size=4)
    assert numbers(images[:3].images) == [0, 2, 4]
    assert numbers(images[[5, -1]].images) == [10, 11]
    assert images[torch.tensor(1)][0].equal(images[1][0])
    assert len(images[[]]) == len(images[np.array([])]) == 0
    assert len(images[20:]) == 0


OTHERS: list[object] = [True, 1.0, "0", None, ..., [0.5], ["0"], [[0]], [[0], [0, 1]], 10**30, {0: 1}, (0, 1)]
OTHERS += [np.ones(NUM, bool), torch.ones(NUM, dtype=torch.bool), torch.zeros(1, 1).long(), slice(0, 1.5)]


@pytest.mark.parametrize("index", OTHERS, ids=repr)
def test_other_indices_are_refused_in_a_sentence(folder: Path, index: object):
    for images in (counted(), load_images(folder, size=4)):
        with pytest.raises(ValueError, match=r"^got .*; expected ") as caught:
            images[index]
        assert "\n" not in str(caught.value)


def test_places_beyond_the_set_are_an_index_error(folder: Path):
    for images in (counted(), load_images(folder, size=4)):
        for index in (NUM, -NUM - 1, [0, NUM], np.array([2**63], np.uint64), torch.tensor([-NUM - 1])):
            with pytest.raises(IndexError, match=r"^got image -?[0-9]+ of a set of 12"):
                images[index]
        assert len(list(images)) == NUM
