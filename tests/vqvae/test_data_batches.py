"""Tensors of images, and batches: their order, ranks, and the workers that read ahead."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import noise, save

from vqvae.data import Batch, Images, ImageTensors, batches, load_images
from vqvae.data.batching import index_batches, num_batches

# Workers are forked from a process with threads.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def counted(num: int) -> ImageTensors:
    """Images that can be told apart: image i is filled with i, and so labelled."""
    levels = torch.arange(num)
    return ImageTensors(levels.byte().reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2), levels)


def seen(stream: list[Batch]) -> list[list[int]]:
    return [batch.images[:, 0, 0, 0].tolist() for batch in stream]


def flat(lists: list[list[int]]) -> list[int]:
    return [each for some in lists for each in some]


def take(stream, num: int) -> list[Batch]:
    taken = [next(stream) for _ in range(num)]
    stream.close()
    return taken


# Tensors


def test_tensors_are_checked(untyped: None):
    images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    assert ImageTensors(images).num_classes is None
    assert list(ImageTensors(images, torch.arange(3)))[2][1] == 2
    for wrong, message in (
        ((images.float(),), "expected at least one, as uint8"),
        ((images[:0],), "expected at least one, as uint8"),
        ((images, torch.zeros(2).long()), "labels for 3 images"),
        ((images, torch.arange(3), ("a", "b")), "got labels from 0 to 2; expected 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageTensors(*wrong)


def test_a_set_in_memory_calls_an_image_by_its_number():
    assert [counted(3).key(i) for i in (0, 2, -1)] == ["0", "2", "2"]
    with pytest.raises(IndexError):
        counted(3).key(3)


# Batches


def test_without_a_seed_one_pass_in_order():
    stream = list(batches(counted(10), 4))
    assert seen(stream) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert stream[2].labels.tolist() == [8, 9]
    assert stream[2].labels.dtype == torch.int64
    assert stream[0].images.dtype == torch.uint8
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


def test_a_set_smaller_than_a_batch_is_one():
    assert [sorted(batch) for batch in seen(take(batches(counted(5), 64, seed=0), 3))] == [list(range(5))] * 3


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        a.images.equal(b.images) and a.skipped == b.skipped for a, b in zip(left, right, strict=True)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Images:
    for number in range(24):
        save(tmp_path / "train" / f"{number:02}.png", np.full((4, 4), number, np.uint8))
    (tmp_path / "train" / "07.png").write_bytes(b"broken")
    save(tmp_path / "test" / "0.png", noise(4, 4))
    return load_images(tmp_path, size=4)


def test_workers_give_what_no_workers_give_and_leave_nothing_behind(folder: Images):
    before = torch.get_rng_state()
    for options in ({}, {"seed": 2, "start": 3, "epochs": 4}):
        here, ahead = (list(batches(folder, 5, num_workers=num, **options)) for num in (0, 2))
        assert same(here, ahead)
        assert any(batch.skipped == (("07.png", "not an image in a known format"),) for batch in ahead)
    stream = batches(folder, 5, seed=2, num_workers=2)
    assert same(take(batches(folder, 5, seed=2), 3), [next(stream) for _ in range(3)])
    assert len(multiprocessing.active_children()) == 2
    stream.close()
    assert multiprocessing.active_children() == []
    assert torch.get_rng_state().equal(before)


def test_an_error_in_a_worker_ends_all_of_them_at_once(folder: Images, monkeypatch: pytest.MonkeyPatch):
    def fails(self: Images, indices: list[int]) -> Batch:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(type(folder), "__getitems__", fails)
    with pytest.raises(RuntimeError, match="no such luck") as caught:
        next(batches(folder, 4, seed=0, num_workers=2))
    assert multiprocessing.active_children() == []
    del caught  # until here its traceback holds whatever the loop held


def test_batches_without_a_readable_image_are_stood_in_for(folder: Images):
    for number in (3, 4, 5, 6):
        (folder.folder / f"{number:02}.png").write_bytes(b"")
    assert seen(list(batches(folder, 1)))[:4] == [[0], [1], [2], [8]]
    whole = take(batches(folder, 1, seed=0), 72)
    broken = {name for batch in whole for name, _ in batch.skipped}
    assert broken == {"03.png", "04.png", "05.png", "06.png", "07.png"}
    repeats = sum(seen(whole)[i] == seen(whole)[i + 1] for i in range(71))
    assert repeats >= 10
    for start in range(1, 40, 4):
        assert seen(take(batches(folder, 1, seed=0, start=start), 10)) == seen(whole)[start : start + 10]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("seed", [None, 0])
def test_an_epoch_without_a_readable_image_is_an_error(folder: Images, seed: int | None, num_workers: int):
    for path in folder.folder.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"no image in an entire epoch of .* could be read: 24 tried, the first is"):
        list(batches(folder, 4, seed=seed, num_workers=num_workers))
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


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
@pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_ctrl_c_ends_every_process_with_one_traceback(folder: Images, start_method: str):
    place = folder.folder.parent
    (place / "script.py").write_text(INTERRUPTED)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "script.py", str(place), start_method],
        cwd=place,
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
