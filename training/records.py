"""What a run keeps while it trains: checkpoints, metrics, and the wish to stop."""

import contextlib
import csv
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers import TensorBoardLogger

import safefolder


def save_state(fabric: Fabric, path: Path, state: dict[str, Any]) -> None:
    """Write what resuming needs, whole or not at all; every process takes part."""
    if not fabric.is_global_zero:
        fabric.save(path, state)  # takes part, and writes nothing
        fabric.barrier()
        return
    with safefolder.replacing(path) as scratch:
        fabric.save(scratch, state)
        fabric.barrier()


def load_state(fabric: Fabric, path: Path, state: dict[str, Any]) -> None:
    try:
        fabric.load(path, state, weights_only=True)
    except Exception as error:  # torch.load and load_state_dict have many types for a file that does not fit
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} is corrupt, or of a run with other options: {reason}") from error


class Metrics:
    """Named figures by stage, step and split: `metrics.csv` (one figure a line) and TensorBoard events.

    A resumed stage takes back what was written after its checkpoint, so that no step is there twice.
    """

    COLUMNS = ("stage", "step", "split", "name", "value")

    def __init__(self, folder: Path, fabric: Fabric):
        self.fabric = fabric
        self.folder = folder
        self.path = folder / "metrics.csv"
        self.skipped: dict[str, str] = {}
        self.events: TensorBoardLogger | None = None

    def rewind(self, stage: str, step: int) -> None:
        """Keep the figures of other stages, and of this one up to `step`."""
        if not self.fabric.is_global_zero:
            return
        kept = [row for row in self._rows() if row[0] != stage or int(row[1]) <= step]
        with (
            safefolder.replacing(self.path) as scratch,
            scratch.open("w", newline="", encoding="utf-8") as file,
        ):
            csv.writer(file).writerows([self.COLUMNS, *kept])
        # TensorBoard drops the events from `purge_step` on when it reads the newer file.
        self.events = TensorBoardLogger(self.folder, name="tensorboard", version=stage, purge_step=step + 1)

    def add(self, stage: str, step: int, split: str, figures: Mapping[str, float]) -> None:
        if not self.fabric.is_global_zero:
            return
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([stage, step, split, name, f"{value:.7g}"] for name, value in figures.items())
        assert self.events is not None, "rewind comes first"
        self.events.log_metrics({f"{split}/{name}": value for name, value in figures.items()}, step)

    def seconds(self) -> float:
        """What all stages took to train, over all the times that the run was resumed."""
        took = {stage: float(value) for stage, _, _, name, value in self._rows() if name == "seconds"}
        return sum(took.values())

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
