"""Sets by any index, batches as sequences of their items, and their order, ranks and workers that read ahead."""

import contextlib
import dataclasses
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
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

from vqvae.data import Batch, Images, ImageTensors, batches, load_images
from vqvae.data.batching import index_batches, num_batches

# Workers are forked from a process with threads.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

NUM = 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Image i is filled with i, and of class a or b."""
    for number in range(NUM):
        save(tmp_path / "train" / "ab"[number % 2] / f"{number:02}.png", np.full((4, 4), number, np.uint8))
    save(tmp_path / "test" / "a" / "0.png", noise(4, 4))
    return tmp_path


def counted(num: int = NUM, *, labelled: bool = True) -> ImageTensors:
    """Image i is filled with i, and so labelled."""
    levels = torch.arange(num)
    return ImageTensors(levels.byte().reshape(-1, 1, 1, 1).repeat(1, 1, 2, 2), levels if labelled else None)


def broken(folder: Path, *names: str) -> Images:
    """The set of a folder of which some are no images."""
    for name in names:
        (folder / "train" / f"{name}.png").write_bytes(b"broken")
    return load_images(folder, size=4)


def numbers(images: torch.Tensor) -> list[int]:
    return images[:, 0, 0, 0].tolist()


def seen(stream: list[Batch]) -> list[list[int]]:
    return [numbers(batch.images) for batch in stream]


def flat(lists: list[list[int]]) -> list[int]:
    return [each for some in lists for each in some]


def take(stream, num: int) -> list[Batch]:
    taken = [next(stream) for _ in range(num)]
    stream.close()
    return taken


# Sets and their indices


def test_tensors_are_checked(untyped: None):
    images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    assert ImageTensors(images).num_classes is None
    counted = ImageTensors(images, torch.arange(3))
    assert list(counted)[2][1] == 2
    assert [counted.key(i) for i in (0, 2, -1)] == ["0", "2", "2"]
    for wrong, message in (
        ((images.float(),), "expected at least one, as uint8"),
        ((images[:0],), "expected at least one"),
        ((images, torch.zeros(2).long()), "labels for 3 images"),
        ((images, torch.arange(3), ("a", "b")), "got labels from 0 to 2; expected 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageTensors(*wrong)


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
    images = counted(labelled=labelled)
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


OTHERS: list[object] = [True, 1.0, "0", None, ..., [0.5], ["0"], [[0]], [[0], [0, 1]], 10**30, {0: 1}, (0, 1)]
OTHERS += [np.ones(NUM, bool), torch.ones(NUM, dtype=torch.bool), torch.zeros(1, 1).long(), slice(0, 1.5)]


@pytest.mark.parametrize("index", OTHERS, ids=repr)
def test_other_indices_are_refused_in_a_sentence(folder: Path, index: object):
    for images in (counted(), load_images(folder, size=4)):
        with pytest.raises(ValueError, match=r"^got .*; expected ") as caught:
            images[index]
        assert "\n" not in str(caught.value)


def test_places_beyond_the_set_are_an_index_error_and_none_are_no_image(folder: Path):
    for images in (counted(), load_images(folder, size=4)):
        for index in (NUM, -NUM - 1, [0, NUM], np.array([2**63], np.uint64), torch.tensor([-NUM - 1])):
            with pytest.raises(IndexError, match=r"^got image -?[0-9]+ of a set of 12"):
                images[index]
        assert len(list(images)) == NUM
        assert len(images[[]]) == len(images[np.array([])]) == len(images[20:]) == 0
        assert images[[5, -1]].images.equal(torch.stack([images[5][0], images[torch.tensor(NUM - 1)][0]]))


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
    images = counted(labelled=False)
    (item,) = images[3]
    assert numbers(item[None]) == [3]
    assert [numbers(pixels) for (pixels,) in DataLoader(images, batch_size=8)] == [[*range(8)], [8, 9, 10, 11]]
    both = ConcatDataset([Subset(images, [5, 1]), images])
    assert next(numbers(pixels) for (pixels,) in DataLoader(both, batch_size=3)) == [5, 1, 0]


def test_what_can_not_be_read_is_warned_of_once_and_named_where_nothing_is_left(folder: Path):
    names = ("a/00", "a/02", "a/04", "a/06", "b/01")
    images = broken(folder, *names)
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()  # as outside of tests
        parts = list(DataLoader(images, batch_size=6))
    assert [numbers(pixels) for pixels, _ in parts] == [[8, 10], [3, 5, 7, 9, 11]]
    reason = "is left out, as it can't be read as an image: not an image in a known format"
    assert [str(each.message) for each in caught] == [f"{name}.png {reason}" for name in names]
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
    copy = pickle.loads(pickle.dumps(dataclasses.replace(batch, labels=None, skipped=(("a", "b"),))))
    assert copy.images.equal(batch.images)
    assert copy[:2].skipped == (("a", "b"),)
    assert len(copy[0]) == 1
    nothing = Batch(batch.images[:0], None)
    assert list(nothing) == []
    with pytest.raises(IndexError):
        nothing[0]


# Batches


def test_without_a_seed_one_pass_in_order():
    stream = list(batches(counted(10), 4))
    assert seen(stream) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert stream[2].labels.tolist() == [8, 9]
    assert seen(list(batches(counted(10), 4, drop_last=True))) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(list(batches(counted(10), 4, epochs=2))) == 6


def test_with_a_seed_every_epoch_is_another_shuffle():
    epochs = [flat(seen(take(batches(counted(100), 10, seed=5, start=10 * e), 10))) for e in range(3)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != flat(seen(take(batches(counted(100), 10, seed=6), 10)))
    assert len(list(batches(counted(100), 30, seed=5, epochs=2))) == 6
    assert len(list(batches(counted(100), 30, seed=5, epochs=2, drop_last=False))) == 8


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("num", [3, 23])
def test_a_later_start_is_the_tail_of_an_earlier_one(num: int, drop_last: bool):
    def stream(start: int):
        return batches(counted(num), 5, seed=1, start=start, drop_last=drop_last, rank=1, world_size=2)

    whole = seen(take(stream(0), 20))
    for start in (1, 2, 3, 7, 19):
        assert seen(take(stream(start), 20 - start)) == whole[start:]


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize(("num", "batch_size", "world_size"), [(24, 4, 2), (23, 4, 2), (25, 4, 3), (5, 8, 2)])
def test_ranks_share_each_epoch(num: int, batch_size: int, world_size: int, drop_last: bool, seed: int | None):
    options = {"seed": seed, "epochs": 2, "world_size": world_size, "drop_last": drop_last}
    ranks = [seen(list(batches(counted(num), batch_size, rank=rank, **options))) for rank in range(world_size)]
    steps = num_batches(num, batch_size, world_size=world_size, drop_last=drop_last)
    assert {len(rank) for rank in ranks} == {2 * steps}
    for epoch in (0, 1):
        shares = [batch for rank in ranks for batch in rank[epoch * steps : (epoch + 1) * steps]]
        indices = flat(shares)
        assert len(set(indices)) == len(indices)
        assert len(indices) == (steps * batch_size * world_size if drop_last and num > batch_size * world_size else num)
        assert all(share and len(share) <= batch_size + 1 for share in shares)


def test_the_order_alone_is_that_of_the_batches():
    options = {"seed": 4, "start": 3, "rank": 1, "world_size": 2}
    order = index_batches(23, 4, **options)
    assert [next(order).tolist() for _ in range(9)] == seen(take(batches(counted(23), 4, **options), 9))
    assert [each.tolist() for each in index_batches(5, 2)] == [[0, 1], [2, 3], [4]]
    with pytest.raises(ValueError, match="got batch_size=0; expected at least 1"):
        index_batches(5, 0, seed=0)


@pytest.mark.parametrize("drop_last", [True, False])
def test_long_epochs_are_ordered_piece_by_piece(monkeypatch: pytest.MonkeyPatch, drop_last: bool):
    whole = {}
    for places in (4096, 7, 1):
        monkeypatch.setattr(sys.modules["vqvae.data.batching"], "_PLACES", places)  # a function has that name too
        for start in (0, 5, 13):
            some = index_batches(101, 6, seed=2, start=start, epochs=3, rank=1, world_size=2, drop_last=drop_last)
            lists = [each.tolist() for each in some]
            assert whole.setdefault(start, lists) == lists


# Workers, and what can not be read


def test_workers_give_what_no_workers_give_and_leave_nothing_behind(folder: Path):
    images, before = broken(folder, "a/04"), torch.get_rng_state()
    for options in ({}, {"seed": 2, "start": 3, "epochs": 4}):
        here, ahead = (list(batches(images, 5, num_workers=num, **options)) for num in (0, 2))
        assert seen(here) == seen(ahead)
        assert [batch.skipped for batch in here] == [batch.skipped for batch in ahead]
        assert any(batch.skipped == (("a/04.png", "not an image in a known format"),) for batch in ahead)
    stream = batches(images, 5, seed=2, num_workers=2)
    next(stream)
    assert len(multiprocessing.active_children()) == 2
    stream.close()
    assert multiprocessing.active_children() == []
    assert torch.get_rng_state().equal(before)


def test_an_error_in_a_worker_ends_all_of_them_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(self: Images, indices: list[int]) -> Batch:
        raise RuntimeError("no such luck")

    images = load_images(folder, size=4)
    monkeypatch.setattr(type(images), "__getitems__", fails)
    with pytest.raises(RuntimeError, match="no such luck") as caught:
        next(batches(images, 4, seed=0, num_workers=2))
    assert multiprocessing.active_children() == []
    del caught  # until here its traceback holds whatever the loop held


def test_batches_without_a_readable_image_are_stood_in_for(folder: Path):
    images = broken(folder, "a/02", "a/04", "b/05")
    assert seen(list(batches(images, 1)))[:3] == [[0], [6], [8]]
    whole = take(batches(images, 1, seed=0), 48)
    assert {name for batch in whole for name, _ in batch.skipped} == {"a/02.png", "a/04.png", "b/05.png"}
    assert sum(one == other for one, other in zip(seen(whole), seen(whole)[1:], strict=False)) >= 8
    for start in range(1, 36, 4):
        assert seen(take(batches(images, 1, seed=0, start=start), 10)) == seen(whole)[start : start + 10]


@pytest.mark.parametrize(("num_workers", "seed"), [(0, None), (0, 0), (1, 0)])
def test_an_epoch_without_a_readable_image_is_an_error(folder: Path, seed: int | None, num_workers: int):
    images = load_images(folder, size=4)
    for path in (folder / "train").rglob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match=r"no image in an entire epoch of .* could be read: 12 tried, the first is"):
        list(batches(images, 4, seed=seed, num_workers=num_workers))
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "got batch_size=0; expected at least 1"),
        ({"seed": -1}, "got seed=-1; expected at least 0"),
        ({"start": -1}, "got start=-1"),
        ({"epochs": 0}, "got epochs=0"),
        ({"rank": 2, "world_size": 2}, r"got rank=2; expected 0 to 1"),
        ({"num_workers": -1}, "got num_workers=-1"),
        ({"seed": 0, "world_size": 4}, "got 3 images of images for 4 ranks"),
    ],
)
def test_numbers_out_of_range_are_refused_at_once(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        batches(counted(3), **{"batch_size": 2, **options})


INTERRUPTED = """
import multiprocessing, sys, time
from vqvae.data import batches, load_images
if __name__ == "__mp_main__":  # a spawned worker that is starting
    print("ready", flush=True)
    time.sleep(1)
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[2])
    for step, _ in enumerate(batches(load_images(sys.argv[1], size=4), 2, seed=0, num_workers=2)):
        if step == 4:
            print("ready", flush=True)
"""


@pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_ctrl_c_ends_every_process_with_one_traceback(folder: Path, start_method: str):
    (folder / "script.py").write_text(INTERRUPTED)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "script.py", str(folder), start_method],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Tests in the background of a script inherit that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert errors.count("Traceback") == 1
        assert errors.rstrip().endswith("KeyboardInterrupt")
        for _ in range(100):
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                break
            time.sleep(0.1)
        else:
            pytest.fail("processes are left after Ctrl-C")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
