"""A module out of a config and tensors that somebody else may have written: checked before memory is taken.

A config of a few bytes can ask for a model of any size. So the model is first made on the device "meta", where tensors
have a shape and no memory, and every parameter is held against the tensors that are there at the moment it is made;
only what fits is made in earnest.

What comes of it depends on config and tensors alone: not on the caller's default dtype, default device, random
generator, autocast or inference mode.
"""

import contextlib
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration
from torch.overrides import TorchFunctionMode

from safefolder.folder import check_weights, load_weights
from safefolder.tensors import few

Built = TypeVar("Built", bound=nn.Module)
P = ParamSpec("P")
Result = TypeVar("Result")
# A module may have buffers that are not saved, some for each tensor that is; more are those of another model.
_BUFFERS_TO_A_TENSOR = 64
# Those that can be computed with; types of 8 bits and fewer are for storing.
_FLOATING = {"torch.float16", "torch.bfloat16", "torch.float32", "torch.float64"}
# Devices that have an autocast of their own.
_AUTOCASTING = ("cpu", "cuda", "mps", "xpu")


@contextlib.contextmanager
def neutral() -> Iterator[None]:
    """Float32, the CPU, no autocast and no inference mode inside; random numbers drawn there change none outside."""
    dtype = torch.get_default_dtype()
    with (
        contextlib.ExitStack() as stack,
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.inference_mode(mode=False),
    ):
        for device in _AUTOCASTING:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def neutrally(function: Callable[P, Result]) -> Callable[P, Result]:
    """The function, `neutral` inside; of a generator each of its steps, and nothing between them."""

    @functools.wraps(function)
    def whole(*args: P.args, **options: P.kwargs) -> Result:
        with neutral():
            result: Any = function(*args, **options)
        return _neutral_steps(result) if inspect.isgenerator(result) else result

    return whole


def _neutral_steps(every: Any) -> Any:
    with contextlib.closing(every):
        while True:
            with neutral():
                try:
                    step = next(every)
                except StopIteration:
                    return
            yield step


def build(
    make: Callable[[], Built], kind: str, tensors: Mapping[str, Tensor], source: str | Path, *, keep_type: bool = True
) -> Built:
    """The module that `make` makes, with the weights `tensors`, in evaluation mode, on the CPU.

    Args:
        make: called twice; what it raises is told as a fault of the config.
        kind: what it makes.
        source: what errors call the folder.
        keep_type: parameters keep the type that they were saved in. Otherwise those in half precision come as float32.

    Raises:
        ValueError: a config that makes no module, or one that the tensors do not fit.
    """
    floating = next((each.dtype for each in tensors.values() if each.dtype.is_floating_point), torch.float32)
    if others := sorted({str(each.dtype) for each in tensors.values() if each.dtype.is_floating_point} - _FLOATING):
        raise ValueError(f"the weights in {source} are {few(others)}, expected {', '.join(sorted(_FLOATING))}")
    with neutral():
        with _config_errors(source, kind), shapes_alone(), _fitting(tensors):
            shapes = make().state_dict()
        check_weights(shapes, tensors, source)
        with _config_errors(source, kind):
            module = make()
        module.to(floating if keep_type else torch.promote_types(floating, torch.float32))
        load_weights(module, tensors, source)
    return module.eval()


@contextlib.contextmanager
def _config_errors(source: str | Path, kind: str) -> Iterator[None]:
    try:
        yield
    except _NoWeightsError as error:
        raise ValueError(f"the weights in {source} do not fit its config: {error}") from error
    except Exception as error:  # constructors have no one type for values that nobody foresaw
        text = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{source}: config.json does not fit {kind}: {text}") from error


@contextlib.contextmanager
def shapes_alone() -> Iterator[None]:
    """Tensors on the device "meta" inside, and nothing drawn for them."""
    with torch.device("meta"), _NothingDrawn():
        yield


class _NothingDrawn(TorchFunctionMode):
    """Random numbers for tensors without memory are left out: torch would load its compiler to do nothing."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.normal_ or getattr(func, "__module__", None) == "torch.nn.init":
            filled = args[0] if args else kwargs["tensor"]
            if filled.is_meta:
                return filled
        return func(*args, **kwargs)


class _NoWeightsError(Exception):
    """A config asks for what there are no weights for."""


@contextlib.contextmanager
def at_most(num_tensors: int) -> Iterator[None]:
    """ValueError inside where modules have more parameters or buffers than so many."""
    left = num_tensors

    def count(module: nn.Module, name: str, made: Tensor | None) -> None:
        nonlocal left
        left -= made is not None
        if left < 0:
            raise ValueError(f"got sizes of a model of over {num_tensors:,} tensors, expected fewer layers")

    with _hooked(count, count):
        yield


@contextlib.contextmanager
def _hooked(parameter: Callable[..., None], buffer: Callable[..., None]) -> Iterator[None]:
    """Have these called with each module, name and tensor that is registered meanwhile."""
    hooks = [
        registration.register_module_parameter_registration_hook(parameter),
        registration.register_module_buffer_registration_hook(buffer),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _fitting(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """An error inside where a parameter is made that no tensor fits, or more of them than there are tensors."""
    left = Counter(tuple(tensor.shape) for tensor in tensors.values())
    most = _BUFFERS_TO_A_TENSOR * (len(tensors) + 1)
    num_buffers = 0

    def parameter(module: nn.Module, name: str, made: nn.Parameter | None) -> None:
        if made is None:
            return
        left[tuple(made.shape)] -= 1
        if left[tuple(made.shape)] < 0:
            raise _NoWeightsError(
                f"it asks for more parameters of shape {tuple(made.shape)}, as {name} of a {type(module).__name__}, "
                "than there are weights"
            )

    def buffer(module: nn.Module, name: str, made: Tensor | None) -> None:
        nonlocal num_buffers
        num_buffers += made is not None
        if num_buffers > most:
            raise _NoWeightsError(f"it asks for over {most:,} buffers, as {name} of a {type(module).__name__}")

    with _hooked(parameter, buffer):
        yield
