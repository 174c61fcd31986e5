"""From a run's options to Lightning Fabric, which carries one process to many."""

import gc
import logging
from typing import Any

import torch
import torch.distributed.nn.functional  # before there is a process group, which its default arguments would keep
from lightning_fabric import Fabric
from lightning_fabric.strategies import ModelParallelStrategy
from torch import distributed

from training.options import Run
from training.sharding import shard


def make_fabric(run: Run) -> Fabric:
    """Fabric for the devices asked for; `auto` is CUDA where there is a GPU, else one process on the CPU.

    Apple's MPS is not chosen by itself: nearest-code search decides near ties in float64, which it lacks.
    """
    has_cuda = torch.cuda.is_available()
    accelerator = ("cuda" if has_cuda else "cpu") if run.accelerator == "auto" else run.accelerator
    devices: Any = int(run.devices) if run.devices.isdecimal() else run.devices
    if devices == "auto" and accelerator == "cpu":
        devices = 1  # one process uses all cores
    precision: Any = run.precision
    if precision == "auto":
        # Where a CPU has no bfloat16 instructions, emulating them is slower than float32.
        cpu_has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        has_bf16 = torch.cuda.is_bf16_supported() if accelerator == "cuda" else cpu_has_bf16()
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


def leave_processes() -> None:
    """End the process group and its threads, once nothing uses it; every process must get here.

    A thread of gloo's that still lets go of a tensor when Python shuts down would abort a process whose work is done
    (github.com/pytorch/pytorch/issues/190489). After `--strategy fsdp` caches of DTensor's still keep the threads.
    """
    if distributed.is_available() and distributed.is_initialized():
        gc.collect()  # modules wrapped for several processes hold the group, and themselves
        distributed.destroy_process_group()
