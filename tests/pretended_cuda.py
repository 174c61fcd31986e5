"""A GPU that is not there: tensors that say they are on `cuda`, and are computed on the CPU.

Under `pretended_cuda` a tensor that is made on "cuda" or moved there has real numbers, says that it is on `cuda:0`, and
refuses what a GPU refuses: to meet a tensor of the CPU that has axes, a generator of the CPU, or NumPy. So code that
runs here, with the results that it has on the CPU, makes no tensor on the wrong device, and goes the ways for a GPU.
What this cannot tell: kernels, rounding, streams, graphs, mixed precision, memory, and what waits for the device.

To autograd such a tensor is one on "meta", as those of torch's FakeTensorMode are, which have no numbers: with those
nothing runs that looks at a value, as the search for the nearest code and every walk do.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

CUDA, META = torch.device("cuda", 0), torch.device("meta")
_aten = torch.ops.aten
# A GPU lets these meet the CPU: copies, and indices that lie there.
_MIXED = {
    _aten.copy_.default,
    _aten._to_copy.default,
    _aten.index.Tensor,
    _aten.index_put_.default,
    _aten.index_put.default,
    _aten._index_put_impl_.default,
}
_NEW = (torch.tensor, torch.as_tensor, torch.asarray)
_CpuGenerator = torch.Generator


class OnCuda(Tensor):
    """A tensor on the GPU that is not there; `values` on the CPU are its numbers."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "OnCuda":
        sizes = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        made = Tensor._make_wrapper_subclass(cls, values.shape, **sizes, device=META)
        made.values = values
        return made

    def __repr__(self, **_: Any) -> str:
        return f"OnCuda({self.values!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class CudaGenerator(_CpuGenerator):
    """In place of torch's: one of the GPU gives the numbers that one of the CPU would."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls) if _is_there(device) else _CpuGenerator(device)

    def __init__(self, device: Any = "cpu"):
        super().__init__()

    @property
    def device(self) -> torch.device:
        return CUDA


class _Moment(torch.cuda.Event):
    """In place of an event or a stream, where nothing is ever under way."""

    def __new__(cls, **_: Any) -> "_Moment":
        return super().__new__(cls)

    def record(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: "_Moment") -> float:
        return 1.0


def _is_there(device: Any) -> bool:
    return isinstance(device, torch.device | str) and torch.device(device).type == "cuda"


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator on the numbers of its tensors, which must all be there, or all here."""
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    there = [each for each in tensors if isinstance(each, OnCuda)]
    here = [each for each in tensors if not isinstance(each, OnCuda)]
    assert not any(each.is_meta for each in here), f"{func}: a tensor slipped through the pretence"
    if there and any(each.ndim for each in here) and func not in _MIXED:
        raise RuntimeError(f"{func}: expected all tensors on one device, found {CUDA} and cpu")
    asked = kwargs.get("device")
    makes_there = bool(there) if asked is None else torch.device(asked) == META
    if func is _aten.copy_.default:
        makes_there = isinstance(args[0], OnCuda)
    known = {id(each.values): each for each in there}

    def close(each: Any) -> Any:
        if not isinstance(each, Tensor) or not makes_there:
            return each
        return known[id(each)] if id(each) in known else OnCuda(each.resolve_conj().resolve_neg())

    given = (args, kwargs)
    args, kwargs = tree_map(lambda each: each.values if isinstance(each, OnCuda) else each, given)
    if asked is not None:
        kwargs["device"] = torch.device("cpu")
    if "pin_memory" in kwargs:
        kwargs["pin_memory"] = False
    found = func(*args, **kwargs)
    if func is _aten._to_copy.default and found is args[0]:
        found = found.clone()
    # Views share their storage as autograd sees it too: it adds up gradients in place where nobody else has them.
    return return_and_correct_aliasing(func, *given, tree_map(close, found)) if there else tree_map(close, found)


class _Operators(TorchDispatchMode):
    """Every operator, also one that makes a tensor of nothing."""

    def __init__(self, opened: dict[Any, Callable[..., Any]], calls: TorchFunctionMode):
        super().__init__()
        self.opened, self.calls = opened, calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.opened:
            with self, self.calls:
                return self.opened[func](*args, **(kwargs or {}))
        return _run(func, args, kwargs or {})


def _property(name: str) -> Any:
    return getattr(Tensor, name).__get__


class _Calls(TorchFunctionMode):
    """Calls from Python, where devices are named and generators are told apart."""

    answers: ClassVar = {
        _property("device"): CUDA,
        _property("is_cuda"): True,
        _property("is_meta"): False,
        _property("is_cpu"): False,
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **kwargs)
        own = args[0] if args and isinstance(args[0], OnCuda) else None
        if own is not None:
            if func in self.answers:
                return self.answers[func]
            if func in (Tensor.numpy, Tensor.__array__):
                raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
            if func in (Tensor.tolist, Tensor.data_ptr):
                return func(own.values, *args[1:])
            if func == Tensor.data.__set__:  # as `module.double()` does
                own.values = args[1].values
            if func is Tensor.new_tensor:
                return torch.tensor(*args[1:], **{"dtype": own.dtype, **kwargs}).to(META)
        if isinstance(generator := kwargs.get("generator"), torch._C.Generator):
            _check(func, generator, own, kwargs)
        if func in _NEW and _is_there(kwargs.get("device")):
            made = func(*args, **{**kwargs, "device": None})
            return made if isinstance(made, OnCuda) else made.to(META)
        args = tuple(META if isinstance(each, torch.device | str) and _named(each) else each for each in args)
        if _is_there(kwargs.get("device")):
            kwargs["device"] = META
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is Tensor.pin_memory:
            assert own is None, "memory of a GPU cannot be pinned"
            return args[0].clone()
        if func is Tensor.cuda:
            return args[0].to(META)
        return func(*args, **kwargs)


def _named(each: torch.device | str) -> bool:
    return _is_there(each) if isinstance(each, torch.device) else each.split(":")[0] == "cuda"


def _check(func: Any, generator: torch.Generator, own: Tensor | None, kwargs: dict[str, Any]) -> None:
    wanted = own is not None if kwargs.get("device") is None else _is_there(kwargs["device"])
    if isinstance(generator, CudaGenerator) != wanted:
        raise RuntimeError(f"{func}: got a generator of {generator.device} for a tensor of the other device")


@contextlib.contextmanager
def pretended_cuda(opened: dict[Any, Callable[..., Any]] | None = None) -> Iterator[None]:
    """A GPU inside.

    Args:
        opened: operators of our own, by what they are made of, so that this is looked at too.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "Generator", CudaGenerator)
        patch.setattr(torch.cuda, "Event", _Moment)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: _Moment())
        # Views of tensors of a kind of one's own cannot be made in inference mode.
        patch.setattr(torch, "inference_mode", lambda mode=True: torch.no_grad() if mode else contextlib.nullcontext())
        calls = _Calls()
        with _Operators(opened or {}, calls), calls:
            yield
