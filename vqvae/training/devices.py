"""From a run's options to Lightning Fabric, which carries one process to many."""

import contextlib
import gc
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed.nn.functional  # before there is a process group, which its default arguments would keep
from lightning_fabric import Fabric
from lightning_fabric.strategies import ModelParallelStrategy
from lightning_fabric.strategies.launchers import subprocess_script
from torch import distributed

from vqvae import exits
from vqvae.training.options import Run
from vqvae.training.sharding import shard

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 3.0
# How gloo says that the other end of a connection is gone; it has no type of error for it.
_LOST = re.compile(r"gloo|[Cc]onnection (closed|reset|refused)|Broken pipe|[Ss]ocket", re.ASCII)
_PARENT = os.getppid()
# Processes on a CPU; each takes the memory of the whole.
_MOST_PROCESSES = 64


def make_fabric(run: Run) -> Fabric:
    """Fabric for the devices asked for; `auto` is CUDA where there is a GPU, else one process on the CPU.

    Apple's MPS is not chosen by itself: nearest-code search decides near ties in float64, which it lacks.
    """
    has_cuda = torch.cuda.is_available()
    accelerator = ("cuda" if has_cuda else "cpu") if run.accelerator == "auto" else run.accelerator
    devices: Any = int(run.devices) if run.devices.isdecimal() else run.devices
    if devices == "auto" and accelerator == "cpu":
        devices = 1  # one process uses all cores
    if accelerator == "cpu" and isinstance(devices, int) and devices > _MOST_PROCESSES:
        raise ValueError(f"got --devices {devices} on a CPU, expected at most {_MOST_PROCESSES} processes")
    precision: Any = run.precision
    if precision == "auto":
        # Where a processor or a GPU has no bfloat16 instructions, emulating them is slower than float32.
        cpu_has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        on_gpu = accelerator in ("cuda", "gpu") and has_cuda
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else cpu_has_bf16()
        precision = "bf16-mixed" if has_bf16 else "32-true"
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # train() says what is used
    try:
        return Fabric(
            accelerator=accelerator,
            devices=devices,
            # Fabric's own "fsdp" is the older kind, for GPUs only and with checkpoints that another number cannot read.
            strategy=ModelParallelStrategy(shard, save_distributed_checkpoint=False)
            if run.strategy == "fsdp"
            else run.strategy,
            num_nodes=run.num_nodes,
            precision=precision,
            loggers=[],
        )
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        raise ValueError(f"Fabric refuses these devices, strategy or precision: {error}") from error


def launch(fabric: Fabric, go_on: str) -> None:
    """Start the other processes of this machine, where it is for this one to start them, and watch them.

    Args:
        go_on: the command that goes on with the run, for the line that says that one of them ended.
    """
    with _unobserved():
        fabric.launch()
    if _started(fabric):
        watch = threading.Thread(target=_watch, args=(fabric, go_on), name="watch-ranks", daemon=True)
        watch.start()


@contextlib.contextmanager
def _unobserved() -> Iterator[None]:
    """Fabric's own watch kills this process where another ended, so that nobody would ever say why."""
    name = "_launch_process_observer"
    before = getattr(subprocess_script, name, None)
    setattr(subprocess_script, name, lambda processes: None)
    try:
        yield
    finally:
        setattr(subprocess_script, name, before)


def _started(fabric: Fabric) -> list[subprocess.Popen]:
    """The processes that this one started; those of ranks 1, 2, ..."""
    return getattr(fabric.strategy.launcher, "procs", [])


def _watch(fabric: Fabric, go_on: str) -> None:
    while any(process.poll() is None for process in _started(fabric)):
        time.sleep(_POLL_SECONDS)
        if any(process.poll() for process in _started(fabric)):
            # The main thread mostly finds out by itself, and ends as it should.
            time.sleep(_GRACE_SECONDS)
            exits.fail(_lost(fabric, go_on))
            for process in _started(fabric):
                process.kill()
            os._exit(2)


def _lost(fabric: Fabric, go_on: str) -> str:
    """Which processes ended, and what to do."""
    ends = {rank: process.poll() for rank, process in enumerate(_started(fabric), 1)}
    killed = {rank: f"by signal {-code}" for rank, code in ends.items() if code is not None and code < 0}
    # The others ended because of these.
    failed = {rank: f"with status {code}, see its line" for rank, code in ends.items() if code}
    told = ", ".join(f"rank {rank} ended {how}" for rank, how in (killed or failed).items())
    return f"{told or 'another rank ended'}: go on from the last checkpoint with `{go_on}` and the same devices"


@contextlib.contextmanager
def lost_ranks_told(fabric: Fabric, go_on: str) -> Iterator[None]:
    """Where another rank is not there any more, a ValueError says which; at any error those started here are ended."""
    try:
        yield
    except Exception as error:
        try:
            _raise_lost_rank(fabric, error, go_on)
        finally:
            for process in _started(fabric):  # they would wait for this one
                process.kill()
        raise


def _raise_lost_rank(fabric: Fabric, error: Exception, go_on: str) -> None:
    is_lost = isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and _LOST.search(str(error)))
    if not is_lost or not distributed.is_initialized():
        return
    if started := _started(fabric):
        deadline = time.monotonic() + _GRACE_SECONDS
        while not any(process.poll() for process in started) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        raise ValueError(_lost(fabric, go_on)) from error
    which = "another rank"
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # started by rank 0, which says what ended, and ends this one
        deadline = time.monotonic() + 2 * _GRACE_SECONDS
        while os.getppid() == _PARENT:
            if time.monotonic() > deadline:
                sys.exit(2)
            time.sleep(_POLL_SECONDS)
        which = "rank 0"
    raise ValueError(
        f"rank {fabric.global_rank}: {which} ended: go on from the last checkpoint with `{go_on}` and the same devices"
    ) from error


@contextlib.contextmanager
def leaving_processes() -> Iterator[None]:
    """End the process group after what is inside, but for errors, of which other processes may know nothing."""
    try:
        yield
    except SystemExit:  # saved as asked; what was under way is let go of here
        leave_processes()
        raise
    leave_processes()


def leave_processes() -> None:
    """End the process group and its threads, once nothing uses it; every process must get here.

    A thread of gloo's that still lets go of a tensor when Python shuts down would abort a process whose work is done
    (github.com/pytorch/pytorch/issues/190489). After `--strategy fsdp` caches of DTensor's still keep the threads.
    """
    if distributed.is_available() and distributed.is_initialized():
        gc.collect()  # modules wrapped for several processes hold the group, and themselves
        distributed.destroy_process_group()
