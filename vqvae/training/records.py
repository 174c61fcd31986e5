"""What a run keeps while it trains: checkpoints, metrics, pictures, and the wish to stop."""

import contextlib
import csv
import functools
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

import safefolder
from vqvae.interop.pickles import refusal
from vqvae.training.events import Events
from vqvae.training.wandb_events import WandbEvents


def save_state(fabric: Fabric, path: Path, state: dict[str, Any]) -> None:
    """Write what resuming needs, whole or not at all; every process takes part."""
    if not fabric.is_global_zero:
        fabric.save(path, state)  # takes part, and writes nothing
        fabric.barrier()
        return
    with safefolder.files.replacing(path) as scratch:
        fabric.save(scratch, state)
        fabric.barrier()


def load_state(fabric: Fabric, path: Path, state: dict[str, Any]) -> None:
    """Put a checkpoint, which was looked at before, into what is to go on from it."""
    try:
        fabric.load(path, state, weights_only=True)
    except Exception as error:  # torch.load and load_state_dict have many types for a file that does not fit
        raise ValueError(f"{path} is corrupt, or of a run with other options: {refusal(error)}") from None


# The folder of a stage's pictures, one a validation.
FOLDERS = {"codebook": "reconstructions", "prior": "samples"}


class Metrics:
    """What can be watched of a run: figures by stage, step and split, and pictures by stage and step.

    metrics.csv                     one figure a line
    reconstructions/ samples/       STEP.png, of either stage
    tensorboard/STAGE/              all of it as events; with --logger wandb it goes there, too

    A resumed stage takes back what was written after its checkpoint, so that no step is there twice. It does so, and
    writes, once `begin` is called: before, what is added waits in memory, as the stage may still be refused.

    Args:
        also: what else figures and pictures go to is opened by it, once something is written.
    """

    COLUMNS = ("stage", "step", "split", "name", "value")

    def __init__(self, folder: Path, fabric: Fabric, also: Callable[[], WandbEvents] | None = None):
        self.fabric = fabric
        self.folder = folder
        self.path = folder / "metrics.csv"
        self.skipped: dict[str, str] = {}
        self.at = ("", 0)
        self.waiting: list[Callable[[], None]] = []
        self.events: Events | None = None
        self.also = also
        self.online: WandbEvents | None = None

    def stage(self, name: str, step: int) -> None:
        """From here on figures are of this stage, after `step`."""
        self._close_events()
        self.at, self.waiting = (name, step), []

    def close(self) -> None:
        """All that was added is on the disk, and sent; what waited for `begin` is not."""
        self._close_events()
        if self.online is not None:
            self.online.close()
        self.online = None

    def _close_events(self) -> None:
        if self.events is not None:
            self.events.close()
        self.events = None

    def begin(self) -> None:
        """Keep the figures of other stages, and of this one up to where it goes on; then those that waited."""
        if not self.fabric.is_global_zero or self.events is not None:
            return
        name, step = self.at
        if self.also is not None and self.online is None:
            self.online = self.also()  # first, as it may be refused
        rows = self._rows()
        kept = [row for row in rows if row[0] != name or int(row[1]) <= step]
        # Of the pictures that lie there those of validations that are taken back; others may be anybody's.
        validated = {int(row[1]) for row in rows if (row[0], row[2]) == (name, "test") and int(row[1]) > step}
        with (
            safefolder.files.replacing(self.path) as scratch,
            scratch.open("w", newline="", encoding="utf-8") as file,
        ):
            csv.writer(file).writerows([self.COLUMNS, *kept])
        for number in validated:
            if name in FOLDERS:
                (self.folder / FOLDERS[name] / f"{number:06}.png").unlink(missing_ok=True)
        self.events = Events(self.folder / "tensorboard" / name, step)
        for write in self.waiting:
            write()
        self.waiting = []

    def add(self, step: int, split: str, figures: Mapping[str, float]) -> None:
        if self.fabric.is_global_zero:
            self._now_or_later(functools.partial(self._write, step, split, figures))

    def picture(self, step: int, png: bytes) -> None:
        """A picture of the stage after a step, as the bytes of a PNG file."""
        if self.fabric.is_global_zero:
            self._now_or_later(functools.partial(self._write_picture, step, png))

    def _now_or_later(self, write: Callable[[], None]) -> None:
        if self.events is None:
            self.waiting.append(write)
        else:
            write()

    def _write(self, step: int, split: str, figures: Mapping[str, float]) -> None:
        assert self.events is not None
        name, _ = self.at
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([name, step, split, key, f"{value:.7g}"] for key, value in figures.items())
        for key, value in figures.items():
            self.events.add(step, f"{split}/{key}", value)
        if self.online is not None:
            self.online.add(name, step, {f"{split}/{key}": value for key, value in figures.items()})

    def _write_picture(self, step: int, png: bytes) -> None:
        assert self.events is not None
        stage, _ = self.at
        folder = FOLDERS[stage]
        with safefolder.files.replacing(self.folder / folder / f"{step:06}.png") as scratch:
            scratch.write_bytes(png)
        self.events.picture(step, folder, png)
        if self.online is not None:
            self.online.picture(stage, step, folder, png)

    def seconds(self) -> float:
        """What all stages took to train, over all the times that the run was resumed."""
        took = {stage: float(value) for stage, _, _, name, value in self._rows() if name == "seconds"}
        return sum(took.values())

    def last(self, stage: str, split: str) -> dict[str, float]:
        """The last figures of a stage that were written."""
        found: dict[str, tuple[int, float]] = {}
        for at, step, part, name, value in self._rows():
            if (at, part) == (stage, split):
                found[name] = (int(step), float(value))
        newest = max((step for step, _ in found.values()), default=0)
        return {name: value for name, (step, value) in found.items() if step == newest}

    def _rows(self) -> list[list[str]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            # A line that a kill cut short is no figure.
            return [row for row in csv.reader(file) if len(row) == len(self.COLUMNS)][1:]

    def skip(self, skipped: Iterable[tuple[str, str]]) -> None:
        """Name each image that cannot be read, once, with the count so far."""
        for name, reason in skipped:
            if name not in self.skipped:
                self.skipped[name] = reason
                print(f"skipped {name}: {reason} ({len(self.skipped)} so far)", file=sys.stderr)


class Stop:
    """Ctrl-C and SIGTERM ask a loop to stop; it answers after its step, when it can save.

    Outside a loop, and at the second signal, they interrupt at once.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.in_loop = False

    def __enter__(self) -> "Stop":
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        again, self.signal = self.signal, number
        if again or not self.in_loop:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def catching(self) -> Iterator[None]:
        """While inside, a signal only asks."""
        self.in_loop = True
        try:
            yield
        finally:
            self.in_loop = False

    def requested(self, fabric: Fabric, step: int) -> int:
        """The signal that asks to stop after this step, else 0; all processes get the same answer."""
        if fabric.world_size == 1:
            return self.signal
        if step % 10:  # asking the others costs a reduction
            return 0
        number = fabric.all_reduce(torch.tensor(self.signal, device=fabric.device), reduce_op="max")
        assert isinstance(number, torch.Tensor)
        return int(number)
