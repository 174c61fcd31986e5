"""Float32 as it is: what exporters, comparisons and fits ask of a model, and of the machine meanwhile."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_LOCK = threading.RLock()


def check_float32(model: nn.Module, what: str, *, or_wider: bool = False) -> None:
    """Raise ValueError for a model with parameters of another type; `what` is what to do with `model.float()`."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if not dtypes <= ({torch.float32, torch.float64} if or_wider else {torch.float32}):
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ValueError(f"got a model in {found}, expected float32: {what} model.float()")


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """No autocast, on any device."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextlib.contextmanager
def in_full_float32() -> Iterator[None]:
    """Float32 products and convolutions round as float32 does: no autocast, no TF32, no bfloat16 within oneDNN.

    The settings are the process's: they come back, and meanwhile hold for other threads too. Only for calls of a
    model: torch's exporters ask for these settings by older names, which torch refuses to tell meanwhile.
    """
    backends: Any = torch.backends
    places = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_LOCK)  # two must not restore each other's settings
        stack.enter_context(without_autocast())
        for place in places:
            before = place.fp32_precision
            if before in ("tf32", "bf16"):
                stack.callback(setattr, place, "fp32_precision", before)
                place.fp32_precision = "ieee"
        yield
