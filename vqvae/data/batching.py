"""Batches of a set, in an order that is a function of (seed, step) alone.

An epoch of n images, B a rank on each of W ranks, has

    S = max(1, floor(n / (B W)))     steps, and one more for the rest where nothing is dropped

Step s lies in epoch e = floor(s / S). With p_e the permutation that (seed, e) gives (`Permutation`,
which takes no memory to speak of, however large the set), the step takes the slice
p_e[(s mod S) B W : (s mod S + 1) B W], and rank r every W-th image of it from the r-th. Nothing is
carried from one step to the next, so a run that stopped after k steps goes on with `start=k` as if
it had not stopped. How images are varied is a function of (seed, e, image) (`vqvae.data.augmentation`).
torch's DataLoader does the reading ahead; its own samplers would lose that, since
they know an epoch only from its beginning, and hold it.
"""

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vqvae.data.augmentation import Augment, Variation
from vqvae.data.batch import Batch
from vqvae.data.images import Images
from vqvae.data.permutation import Permutation
from vqvae.data.transformed import TransformedImages

# Places whose order is worked out at once: one call costs as much as some thousands of them.
_PLACES = 4096
# Processes that decode; more is a slip.
MAX_WORKERS = 1024


@dataclass(frozen=True, kw_only=True)
class _Schedule:
    """Which images make up each step of one rank."""

    num_images: int
    batch_size: int
    rank: int
    world_size: int
    seed: int | None
    drop_last: bool

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return num_batches(self.num_images, self.batch_size, world_size=self.world_size, drop_last=self.drop_last)

    def indices(self, start: int, stop: int | None) -> Iterator[np.ndarray]:
        """The images of steps `start` to `stop` (or without end)."""
        ahead = max(1, _PLACES // self.batch_size)
        order, begin = np.empty(0, np.int64), 0
        for step in count(start) if stop is None else range(start, stop):
            epoch, place = divmod(step, self.steps)
            if step == start or place == 0 or place == begin + ahead:
                begin = place
                order = self._places(epoch, begin, min(begin + ahead, self.steps))
            # Also where the rest is too small to be a step of its own, see `num_batches`.
            rest = place == self.steps - 1 and not self.drop_last
            first = (place - begin) * self.batch_size
            yield order[first:] if rest else order[first : first + self.batch_size]

    def _places(self, epoch: int, begin: int, end: int) -> np.ndarray:
        """The images of one epoch's steps `begin` to `end`."""
        whole = self.batch_size * self.world_size
        rest = end == self.steps and not self.drop_last
        last = self.num_images if rest else min(end * whole, self.num_images)
        places = np.arange(begin * whole + self.rank, last, self.world_size)
        return places if self.seed is None else Permutation(self.num_images, (self.seed, epoch))(places)


def num_batches(num_images: int, batch_size: int, *, world_size: int = 1, drop_last: bool = True) -> int:
    """How many batches one rank takes in an epoch: at least one, and the same on each.

    What is left over at the end is dropped, or makes one batch more; where it is less than an
    image a rank it goes into the batch before.

        num_batches(100, 32), num_batches(100, 32, drop_last=False), num_batches(5, 32)   # 3, 4, 1
    """
    whole, rest = divmod(num_images, batch_size * world_size)
    return max(1, whole + (not drop_last and rest >= world_size))


def check_workers(num_workers: int) -> None:
    """Raise ValueError for a number of processes that nobody means."""
    if not 0 <= num_workers <= MAX_WORKERS:
        raise ValueError(f"got num_workers={num_workers}; expected 0 to {MAX_WORKERS:,}")


def batches(
    images: Images,
    batch_size: int,
    *,
    seed: int | None = None,
    start: int = 0,
    epochs: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    drop_last: bool | None = None,
    augment: Augment | None = None,
) -> Generator[Batch, None, None]:
    """Batches of `images`, `batch_size` of them on each of `world_size` ranks.

    Without a seed: one pass (or `epochs`) in order, for evaluation. With a seed: shuffled epochs,
    without end unless `epochs` says so; `start=k` goes on exactly where an uninterrupted run is
    after k batches, whatever `num_workers` is. In an epoch each image comes once, on one rank, save
    for those that `drop_last` leaves out at its end (default: with a seed yes, without no). A set
    smaller than a batch makes one batch an epoch. Each rank gets the same number of batches.

    Images that can't be read are missing from their batch and named in its `skipped`. A batch with
    none left is passed over; with a seed the next one stands in for it, so that every step has a
    batch and ranks keep in step.

    num_workers: processes that read and decode ahead, two batches each; 0 does it here. A set in
    memory needs none and uses none, unless it is cropped or transformed. They end when the
    generator is closed or dropped.

    augment: how images are varied, anew in each epoch: for training alone, and so with a seed. What
    it shows of an image depends on the seed, the epoch and the image, on nothing else. The random
    numbers of a set's own transform come from the same three.

    Raises ValueError for numbers out of range, for fewer images than ranks with a seed, for
    `augment` without a seed, and where an entire epoch has no readable image.
    """
    check_workers(num_workers)
    augment = Augment() if augment is None else augment
    if augment.is_on and seed is None:
        raise ValueError("got augment without a seed; expected one, as what is varied is drawn from it")
    schedule, stop = _scheduled(
        len(images), f"images of {images.name}", batch_size, seed, start, epochs, rank, world_size, drop_last
    )
    num_workers = num_workers if images.uses_workers or augment.moves else 0
    return _readable(images, schedule, start, stop, num_workers, augment)


def index_batches(
    num_items: int,
    batch_size: int,
    *,
    seed: int | None = None,
    start: int = 0,
    epochs: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    drop_last: bool | None = None,
) -> Iterator[np.ndarray]:
    """The order of `batches` alone, for things other than images: int64 indices. Arguments and errors as there."""
    schedule, stop = _scheduled(num_items, "items", batch_size, seed, start, epochs, rank, world_size, drop_last)
    return schedule.indices(start, stop)


def _scheduled(
    num_items: int,
    name: str,
    batch_size: int,
    seed: int | None,
    start: int,
    epochs: int | None,
    rank: int,
    world_size: int,
    drop_last: bool | None,
) -> tuple[_Schedule, int | None]:
    """The checked schedule, and the step before which it stops."""
    for what, got, least in (
        ("batch_size", batch_size, 1),
        ("seed", 0 if seed is None else seed, 0),
        ("start", start, 0),
        ("epochs", 1 if epochs is None else epochs, 1),
        ("world_size", world_size, 1),
    ):
        if got < least:
            raise ValueError(f"got {what}={got}; expected at least {least}")
    if not 0 <= rank < world_size:
        raise ValueError(f"got rank={rank}; expected 0 to {world_size - 1} (world_size - 1)")
    if seed is not None and num_items < world_size:
        raise ValueError(f"got {num_items} {name} for {world_size} ranks; expected at least one a rank")
    schedule = _Schedule(
        num_images=num_items,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        seed=seed,
        drop_last=seed is not None if drop_last is None else drop_last,
    )
    if epochs is None and seed is None:
        epochs = 1
    return schedule, None if epochs is None else epochs * schedule.steps


def _readable(
    images: Images, schedule: _Schedule, start: int, stop: int | None, num_workers: int, augment: Augment
) -> Generator[Batch, None, None]:
    """The batches with at least one image."""
    steps = schedule.steps
    order, dataset = schedule.indices(start, stop), images
    if augment.is_on or isinstance(images, TransformedImages):
        dataset = _Epochs(images, augment, schedule.seed or 0)
        order = (chosen + step // steps * len(images) for step, chosen in enumerate(order, start))
    # What went wrong since the last batch that was yielded, and how many steps it cost.
    skipped: tuple[tuple[str, str], ...] = ()
    owed = 0
    barren, any_read, from_first = 0, False, False
    with closing(read_ahead(dataset, order, num_workers, _arrays)) as loaded:
        for step, (pixels, labels, unread) in enumerate(loaded, start):
            if step % steps == 0:
                any_read, from_first = False, True
            skipped += unread
            any_read = any_read or len(pixels) > 0
            if len(pixels):
                labels = None if labels is None else torch.from_numpy(labels)
                batch = Batch(torch.from_numpy(pixels), labels, skipped)
                yield batch
                for _ in range(owed if schedule.seed is not None else 0):
                    yield replace(batch, skipped=())
                skipped, owed, barren = (), 0, 0
            else:
                owed += 1
            if step % steps == steps - 1 and not any_read and from_first and skipped:
                # A rank whose share of one epoch is all broken may fare better in the next.
                barren += 1
                if barren >= schedule.world_size or schedule.seed is None:
                    name, reason = skipped[0]
                    raise ValueError(
                        f"no image in an entire epoch of {images.name} could be read: "
                        f"{len(skipped)} tried, the first is {name} ({reason})"
                    )


class _Epochs(Dataset):
    """A set over all epochs: item e n + i is image i of n as epoch e shows it. A batch is of one epoch."""

    def __init__(self, images: Images, augment: Augment, seed: int):
        self.images, self.augment, self.seed = images, augment, seed

    def __getitems__(self, items: Any) -> Batch:
        epochs, indices = np.divmod(np.asarray(items), len(self.images))
        return self.images.varied(indices, Variation(augment=self.augment, seed=self.seed, epoch=int(epochs[0])))


def read_ahead(
    dataset: Dataset, indices: Iterator[np.ndarray], num_workers: int, pack: Callable[[Any], Any] | None = None
) -> Generator[Any, None, None]:
    """`dataset.__getitems__` of each array of indices, in order; `num_workers` processes ahead, or here where it is 0.

    pack: makes of what the set gives what goes from a worker to this process: best of numpy arrays, not tensors.

    A ValueError of the set is raised here as it is, also by workers, of which torch would make many lines.
    """
    pack = _as_it_is if pack is None else pack
    if num_workers == 0:
        # Not every Dataset has it; torch's loader too asks for it by name.
        getitems: Any = dataset.__getitems__  # pyrefly: ignore
        for chosen in indices:
            yield pack(getitems(chosen))
        return
    with warnings.catch_warnings(), _interrupt_ignored():
        # Of more workers than cores: who asks for them may know that they wait for a disk.
        warnings.filterwarnings("ignore", "This DataLoader will create")
        loader = DataLoader(
            _Caught(dataset, pack),
            batch_sampler=(chosen.tolist() for chosen in indices),
            num_workers=num_workers,
            collate_fn=_as_it_is,
            worker_init_fn=_hear_the_parent_alone,
            # Its own, or starting the workers would draw from the generator that training uses.
            generator=torch.Generator(),
        )
        reader: Any = iter(loader)
    try:
        for found in reader:
            if isinstance(found, ValueError):
                raise found
            yield found
    finally:
        # Dropping the reader would do, were it not for tracebacks: one that is on its way up, as of
        # Ctrl-C, keeps the reader and so its workers, whose end then looks to torch like a crash.
        reader._shutdown_workers()


def _as_it_is(batch: Any) -> Any:
    return batch


class _Caught(Dataset):
    """A set in a worker, packed, which gives a ValueError instead of raising it."""

    def __init__(self, dataset: Any, pack: Callable[[Any], Any]):
        self.dataset, self.pack = dataset, pack

    def __getitems__(self, indices: list[int]) -> Any:
        try:
            return self.pack(self.dataset.__getitems__(indices))
        except ValueError as error:
            return ValueError(str(error))


def _arrays(batch: Any) -> tuple[np.ndarray, np.ndarray | None, tuple[tuple[str, str], ...]]:
    """A `Batch` as it goes from a worker to the main process.

    Arrays go through a pipe. Tensors would go through shared memory, which containers have little
    of, and by a handshake that, when Ctrl-C breaks it off, shows a traceback of the worker.
    """
    return batch.images.numpy(), None if batch.labels is None else batch.labels.numpy(), batch.skipped


def _hear_the_parent_alone(_: int) -> None:
    """In a worker: SIGTERM counts only where the main process sends it.

    Batch systems and `timeout` send it to all processes of a group. The main process answers, by saving what it has,
    for which it may need its workers, and then ends them.
    """
    parent = multiprocessing.parent_process()
    if parent is None or not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
            pass
        os._exit(0)

    threading.Thread(target=wait, name="parent-alone", daemon=True).start()


@contextmanager
def _interrupt_ignored() -> Iterator[None]:
    """Processes started in the block never hear Ctrl-C, which goes to every one of a terminal.

    They inherit that it is ignored, so none shows a traceback of its own, even while it is
    starting; the main process hears it again once the block is left, and ends its workers.
    """
    if threading.current_thread() is not threading.main_thread():
        # Python lets only the main thread set handlers.
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
