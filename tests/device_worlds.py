"""What is computed on the CPU, and again on a GPU: one that is there, or one that is pretended.

A member that gives on a device what it gives on the CPU keeps all that the contract suites hold of it there. So each
world is a function of a device, `run(device)`, that moves its parts there and gives tensors: integers are equal, the
rest is so to rounding (a pretended GPU too takes other ways, as through attention). Random numbers are those of the CPU
in either, as a GPU has others for the same seed.
"""

import contextlib
from collections.abc import Callable, Iterator

import pretended_cuda
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
PRETENDED = "pretended"
# `pytest -m cuda` runs the second, see conftest.py.
DEVICES = [PRETENDED, pytest.param("cuda", marks=pytest.mark.cuda)]

_MADE = (torch.rand, torch.randn, torch.randint)
_LIKE = (torch.rand_like, torch.randn_like, torch.randint_like, torch.multinomial, torch.bernoulli)
_FILLED = (Tensor.uniform_, Tensor.normal_, Tensor.exponential_, Tensor.bernoulli_)


class DrawnOnTheCpu(TorchFunctionMode):
    """Random numbers come from generators of the CPU, wherever they are wanted."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in _MADE and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": CPU}).to(kwargs["device"])
        if func in _FILLED:
            return args[0].copy_(func(args[0].cpu(), *args[1:], **kwargs))
        if func in _LIKE:
            return func(args[0].cpu(), *args[1:], **kwargs).to(args[0].device)
        return func(*args, **kwargs)


@contextlib.contextmanager
def ieee() -> Iterator[None]:
    """Convolutions in float32, which a GPU otherwise computes in TF32."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


@contextlib.contextmanager
def there(device: str) -> Iterator[None]:
    """Inside, "cuda" is what `DEVICES` calls so."""
    with pytest.MonkeyPatch.context() as patch:
        if device == PRETENDED:
            # It has no streams either: the step that a graph would hold is called instead.
            patch.setattr("priors.kv_cache.Graph", lambda step: step)
            patch.setattr("priors.precision.has_bf16", lambda device: False)
            # Its kernel is not torch's; what stands in for it where there is no Triton is looked at.
            patch.setattr("vqvae.quantizers.nearest_search._fused_scan", lambda: None)
            from vqvae.quantizers.nearest_search import _nearest

            with pretended_cuda.pretended_cuda({torch.ops.vqvae.nearest.default: _nearest}):
                yield
            return
        patch.setattr(torch, "Generator", pretended_cuda.CudaGenerator)
        with ieee(), DrawnOnTheCpu():
            yield


def check_same_there(run: Callable[[torch.device], list[Tensor]], device: str, *, here: frozenset[int] = frozenset()):
    """The world's tensors are on the device, but for those at `here`, and what they are on the CPU."""
    want = run(CPU)
    with there(device):
        found = run(CUDA)
        places = [each.device for each in found]
        got = [each.detach().cpu() for each in found]
    assert places == [CPU if at in here else CUDA for at in range(len(want))]
    near = {"rtol": 1e-3, "atol": 1e-4}  # integers are equal
    for at, (one, other) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(one, other.detach(), **near, equal_nan=True, msg=lambda m, at=at: f"{at}: {m}")
