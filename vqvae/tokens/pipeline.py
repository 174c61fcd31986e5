"""Images to shards on one machine.

    worker processes          the caller                          a thread
    read, decode, pad   ──>   to the device, encode, back   ──>   write, sync

The caller queues the next slice on the device before it takes the codes of the last, so a GPU waits for neither the
images nor the disk as long as workers decode as fast as it encodes. `read_batch`, `encode_batch`, `write_shard` and
`finish` are the same steps for an engine that brings processes of its own.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vqvae.data import Images, ImageTensors
from vqvae.data.batching import check_workers, read_ahead
from vqvae.tiling import Tiled
from vqvae.tokens import origins
from vqvae.tokens.jobs import one_job
from vqvae.tokens.layout import Plan, Tokenizer, Tokenizing, not_there, plan
from vqvae.tokens.shards import Encoded, Slice, Summary, finish, write_shard

# Shards that may wait for the disk; more would only fill memory when it is slower than the encoder.
_WAITING_SHARDS = 2


@dataclass(frozen=True, kw_only=True)
class Decoded(Slice):
    """A slice ready for the encoder: plain arrays, which go to any process.

    Attributes:
        images: uint8 `"b c h w"`, always the batch size; those that could be read in order, then zeros.
    """

    images: np.ndarray


@dataclass
class Timings:
    """Where the seconds of a run went; filled in while it runs.

    `wait` (for decoded images) and `blocked` (for the disk, which should be none) are of the calling thread; `transfer`
    (to the device), `network` and `search` (the quantizer) of the device; `write` of the writing thread. `total` is the
    whole call.
    """

    wait: float = 0.0
    transfer: float = 0.0
    network: float = 0.0
    search: float = 0.0
    write: float = 0.0
    blocked: float = 0.0
    total: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Tokenized:
    """What a call of `tokenize` did.

    Attributes:
        whole: the set is whole and its index is written; else other ranks are still at work.
        num_rows, num_shards, unreadable: of the whole set if it is whole, else of the shards that this call made.
        num_images: images that this call took from the source, readable or not; none where all was there already.
        seconds: that it took.
    """

    whole: bool
    num_rows: int
    num_shards: int
    unreadable: tuple[tuple[str, str], ...]
    num_images: int
    seconds: float


def tokenize(
    model: Tokenizer,
    images: Images,
    folder: str | Path,
    options: Tokenizing = Tokenizing(),
    *,
    progress: Callable[[int, int], None] | None = None,
    timings: Timings | None = None,
) -> Tokenized:
    """Encode images to shards of codes in `folder`, with the model on the device that it is on.

    Shards that are there and whole are kept, so the same call goes on where one before was stopped. What is no image
    is left out and listed; an image that cannot be had, as its disk fails or it is gone, ends the call. The codes are
    those of `model.encode`: the likeliest, where the encoder is stochastic, and those of the encoder alone, where a
    prior was in its loop.

    Args:
        progress: called with the images that are done, and those that this call has to do, after each slice.
        timings: filled with where the time goes.

    Raises:
        ValueError: as `plan`; a folder that holds something else, also shards of other images or of the images as they
            were; an image that cannot be had, or a full disk, with every shard kept that was written; another job that
            writes there, with nothing changed.
    """
    start = time.perf_counter()
    check_workers(options.num_workers)
    todo = plan(model, images, folder, options)
    spent = Timings() if timings is None else timings
    num_rows = num_images = 0
    unreadable: list[tuple[str, str]] = []
    with one_job(todo, options.rank, options.world_size) as shards:
        total = sum(len(todo.images(shard)) for shard in shards)
        with (
            _Writer(todo, spent) as writer,
            closing(_decoded(todo, images, shards, options.num_workers)) as decoded,
            closing(_encoded(model, todo.tile, decoded, spent, timings is not None)) as encoded,
        ):
            for shard in shards:
                parts = []
                for part in islice(encoded, len(list(todo.slices(shard)))):
                    writer.check()
                    parts.append(part)
                    num_rows += len(part.codes)
                    num_images += len(part.codes) + len(part.skipped)
                    unreadable += part.skipped
                    if progress is not None:
                        progress(num_images, total)
                writer.put(shard, parts)
        summary = finish(todo)
    whole = summary is not None
    if summary is None:
        summary = Summary(num_rows=num_rows, num_shards=len(shards), unreadable=tuple(unreadable))
    spent.total += time.perf_counter() - start
    return Tokenized(**vars(summary), whole=whole, num_images=num_images, seconds=time.perf_counter() - start)


def read_batch(images: Images, indices: Sequence[int], batch_size: int) -> Decoded:
    """Read and decode one slice (`Plan.slices`) of a source, and pad it to `batch_size`.

    Raises:
        ValueError: an image that cannot be had, and may be one.
    """
    padded = np.zeros((batch_size, *images.shape), np.uint8)
    labels: list[Tensor | None] = []
    keys: list[str] = []
    skipped: list[tuple[str, str]] = []
    if isinstance(images, ImageTensors):
        batch = images.__getitems__(indices)
        padded[: len(indices)] = batch.images.numpy()
        labels, keys = [batch.labels], [images.key(index) for index in indices]
    else:
        # One by one, as a batch does not say which of its images could not be read, only their names.
        for index in indices:
            try:
                batch = images.read([index])
            except OSError as error:
                raise not_there(images, error) from error
            skipped += batch.skipped
            if len(batch.images):
                padded[len(keys)] = batch.images[0].numpy()
                labels.append(batch.labels)
                keys.append(images.key(index))
    known = [each.numpy() for each in labels if each is not None]
    return Decoded(
        first=indices[0],
        images=padded,
        labels=None if images.num_classes is None else np.concatenate([np.empty(0, np.int64), *known]),
        keys=tuple(map(origins.key_without_places, keys)),
        skipped=tuple((origins.key_without_places(key), origins.without_places(reason)) for key, reason in skipped),
    )


def encode_batch(model: Tokenizer, decoded: Decoded, tile: int | None = None) -> Encoded:
    """The codes of one slice, from the device that the model is on, encoded in tiles or whole."""
    encoder = _Encoder(model, tile)
    return encoder.take(encoder.put(decoded))


class _Slices(Dataset):
    """A source as a DataLoader's workers see it: lists of indices to slices."""

    def __init__(self, images: Images, batch_size: int):
        self.images, self.batch_size = images, batch_size

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> Decoded:
        return read_batch(self.images, [int(index) for index in indices], self.batch_size)


def _decoded(todo: Plan, images: Images, shards: Sequence[int], num_workers: int) -> Generator[Decoded, None, None]:
    order = (np.arange(part.start, part.stop) for shard in shards for part in todo.slices(shard))
    if isinstance(images, ImageTensors):
        num_workers = 0
    return read_ahead(_Slices(images, todo.batch_size), order, num_workers)


def _encoded(
    model: Tokenizer, tile: int | None, stream: Iterator[Decoded], spent: Timings, timed: bool
) -> Generator[Encoded, None, None]:
    """The slices in order, each taken from the device when the next is queued there."""
    encoder = _Encoder(model, tile, spent if timed else None)
    queued: _Queued | None = None
    with ExitStack() as stack:
        encoder.watch(stack)
        while True:
            start = time.perf_counter()
            decoded = next(stream, None)
            spent.wait += time.perf_counter() - start
            following = None if decoded is None else encoder.put(decoded)
            if queued is not None:
                yield encoder.take(queued)
            if following is None:
                return
            queued = following


@dataclass
class _Queued:
    """A slice on the device."""

    decoded: Decoded
    codes: Tensor
    ready: torch.cuda.Event | None
    marks: list[Any]


class _Encoder:
    """A model and the device that it is on. With `spent`, the moments between its parts are marked there."""

    def __init__(self, model: Tokenizer, tile: int | None, spent: Timings | None = None):
        model = self.model = cast(Any, model)
        self.encode = model.encode if tile is None else Tiled(model, tile=tile).encode
        self.device = next(model.parameters()).device
        self.spent = spent
        self.marks: list[Any] = []

    def watch(self, stack: ExitStack) -> None:
        """Mark where the quantizer starts and ends, until the stack is left."""
        quantizer = getattr(self.model, "quantizer", None)
        if self.spent is not None and quantizer is not None:
            stack.callback(quantizer.register_forward_pre_hook(lambda *_: self._mark()).remove)
            stack.callback(quantizer.register_forward_hook(lambda *_: self._mark()).remove)

    def put(self, decoded: Decoded) -> _Queued:
        self.marks = []
        self._mark()
        images = torch.from_numpy(decoded.images)
        if self.device.type == "cuda":
            images = images.pin_memory()
        images = images.to(self.device, non_blocking=True)
        self._mark()
        codes = self.encode(images)
        self._mark()
        ready = None
        if self.device.type == "cuda":
            # Queued now: a copy that is asked for later would wait behind the next slice.
            there, codes = codes, torch.empty(codes.shape, dtype=codes.dtype, pin_memory=True)
            codes.copy_(there, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self.device))
        return _Queued(decoded, codes, ready, self.marks)

    def take(self, queued: _Queued) -> Encoded:
        if queued.ready is not None:
            queued.ready.synchronize()
        if self.spent is not None:
            self._count(queued.marks)
        decoded = queued.decoded
        return Encoded(
            first=decoded.first,
            codes=queued.codes.cpu().numpy()[: len(decoded.keys)].copy(),
            labels=decoded.labels,
            keys=decoded.keys,
            skipped=decoded.skipped,
        )

    def _mark(self) -> None:
        if self.spent is None:
            return
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def _count(self, marks: list[Any]) -> None:
        assert self.spent is not None
        seconds = [
            later - mark if isinstance(mark, float) else mark.elapsed_time(later) / 1000
            for mark, later in pairwise(marks)
        ]
        self.spent.transfer += seconds[0]
        self.spent.network += seconds[1] + sum(seconds[3:])
        self.spent.search += sum(seconds[2:3])


class _Writer:
    """A thread that writes shards, a few of which may wait for it."""

    def __init__(self, todo: Plan, spent: Timings):
        self.todo, self.spent = todo, spent
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write")
        self.waiting: deque[Future[None]] = deque()

    def put(self, shard: int, parts: Sequence[Encoded]) -> None:
        self._wait(_WAITING_SHARDS - 1)
        self.waiting.append(self.thread.submit(self._write, shard, list(parts)))

    def check(self) -> None:
        """Raise what went wrong in the thread, as soon as it did."""
        while self.waiting and self.waiting[0].done():
            self.waiting.popleft().result()

    def _wait(self, most: int) -> None:
        """Until no more than that many are left."""
        start = time.perf_counter()
        while len(self.waiting) > most:
            self.waiting.popleft().result()
        self.spent.blocked += time.perf_counter() - start

    def _write(self, shard: int, parts: Sequence[Encoded]) -> None:
        start = time.perf_counter()
        write_shard(self.todo, shard, parts)
        self.spent.write += time.perf_counter() - start

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with self.thread:
            if error is None:
                self._wait(0)
