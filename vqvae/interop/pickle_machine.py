"""What a pickle says, worked out without calling anything that it names.

A pickle is a program for a stack machine. Python's machine calls whatever the program names; torch's, with
`weights_only`, calls fewer things, among them some that take all memory (`bytearray(4 << 30)`). This one calls nothing:
a name is a value, and what a program makes with it is looked up here. Tensors, numbers, texts and plain containers
become what they are. Of the rest (callbacks, schedulers, devices) it is known that it is harmless where it is read, and
a `StandIn` takes its place; a name that is not known here ends the reading.

    opcodes     those of pickle protocol 2, in which torch writes; a million, which is thirty thousand tensors
    tensors     lie within the storage that the file has for them, whose size the caller checks
    keys        texts and single numbers: others can be made to collide, which takes as long as the file's author likes
"""

import argparse
import io
import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safefolder.messages import shown
from safefolder.tensors import NUMBERS

MOST_OPCODES = 1_000_000
MOST_AXES = 64
# Larger keys could be made to have one hash.
MOST_KEY = 2**63


class RefusedError(ValueError):
    """A pickle that is not read, and why; `name` is what it names, where that is the reason."""

    def __init__(self, reason: str, name: str | None = None):
        super().__init__(reason)
        self.name = name


@dataclass(frozen=True)
class Name:
    """What a pickle names, as `module.name`; a class among keys stays one."""

    name: str


class StandIn:
    """What is known and not needed."""


@dataclass
class NumpyType:
    """A dtype of numpy's: its kind and bytes, as "f8", and the order of the bytes."""

    kind: str
    order: str = "="


@dataclass(frozen=True)
class Text:
    """A text that stands for bytes, a character each; copies of it are not made before they are known to be short."""

    text: str


@dataclass(frozen=True)
class Storage:
    """A storage of the file; `dtype` is None for one that has none of its own."""

    held: torch.UntypedStorage
    dtype: torch.dtype | None


# What torch calls a storage that has no type of its own: its numbers are bytes.
UNTYPED = "torch.storage.UntypedStorage"
DTYPES = {f"torch.{name}": dtype for name, dtype in NUMBERS.items()}
STORAGES: dict[str, torch.dtype] = {
    f"torch.{place}{name}Storage": dtype
    for place in ("", "cuda.")
    for name, dtype in {
        "Float": torch.float32,
        "Double": torch.float64,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Byte": torch.uint8,
        "Char": torch.int8,
        "Short": torch.int16,
        "Int": torch.int32,
        "Long": torch.int64,
        "Bool": torch.bool,
        "ComplexFloat": torch.complex64,
        "ComplexDouble": torch.complex128,
    }.items()
}
CALLBACKS = frozenset(
    f"{package}.{name}"
    for package in ("pytorch_lightning", "lightning.pytorch")
    for name in (
        "callbacks.model_checkpoint.ModelCheckpoint",
        "callbacks.early_stopping.EarlyStopping",
        "callbacks.lr_monitor.LearningRateMonitor",
    )
)
# Known, and not needed: schedulers' counts of steps, where a tensor was, how a sparse one was laid out.
ASIDE = CALLBACKS | {
    "collections.Counter",
    "builtins.set",
    "builtins.complex",
    "torch.device",
    "torch.serialization._get_layout",
}
NAMESPACE = "argparse.Namespace"


class Machine:
    """Runs pickles of one file, one after another.

    Args:
        storage_of: gives the storage that a persistent id names. Raises `RefusedError` where the file has none.
    """

    def __init__(self, storage_of: Callable[[Any], Storage]):
        self.storage_of = storage_of
        self.most = self.left = MOST_OPCODES
        self.made: dict[str, Callable[..., Any]] = {
            "collections.OrderedDict": self._ordered,
            "torch.Size": self._size,
            "torch.nn.parameter.Parameter": lambda tensor, *_: self._tensor(tensor),
            "torch._utils._rebuild_parameter": lambda tensor, *_: self._tensor(tensor),
            "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: self._tensor(tensor),
            "torch._utils._rebuild_tensor": rebuilt,
            "torch._utils._rebuild_tensor_v2": lambda storage, at, size, stride, *_: rebuilt(storage, at, size, stride),
            "torch._utils._rebuild_tensor_v3": lambda storage, at, size, stride, grad, hooks, dtype, *_: rebuilt(
                storage, at, size, stride, dtype_of(dtype)
            ),
            "torch._tensor._rebuild_from_type_v2": self._subclass,
            "numpy.dtype": lambda kind, *_: numpy_type(kind),
            "numpy.core.multiarray.scalar": scalar,
            "numpy._core.multiarray.scalar": scalar,  # as numpy calls it since its version 2
            "_codecs.encode": lambda text, *_: Text(text),
            NAMESPACE: argparse.Namespace,
            **dict.fromkeys(ASIDE, lambda *_: StandIn()),
        }
        # Names that are values and not called.
        self.known = {*self.made, *DTYPES, *STORAGES, UNTYPED, "torch.Tensor"}

    def run(self, file: io.BytesIO) -> Any:
        """What the pickle at the file's position holds; the file is then behind it.

        Raises:
            RefusedError: an opcode, a name, a call or a number of them that is not allowed.
            ValueError, TypeError and others: what is no pickle.
        """
        try:
            return self._run(file)
        except LookupError:
            raise RefusedError("it takes from the stack or the memo what it has not put there") from None

    def _run(self, file: io.BytesIO) -> Any:
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        memo: dict[Any, Any] = {}
        for opcode, arg, _ in pickletools.genops(file):
            self.left -= 1
            if self.left < 0:
                self.spend(0)
            name = opcode.name
            stack = self.stack
            if name in VALUES:
                stack.append(arg)
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[arg] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[arg])
            elif name in CONSTANTS:
                stack.append(CONSTANTS[name])
            elif name == "STOP":
                return stack.pop()
            elif name not in STEPS:
                raise RefusedError(f"it has the opcode {name}, expected those of pickle protocol 2")
            else:
                STEPS[name](self, arg)
        raise RefusedError("it ends before its STOP")

    def spend(self, num: int) -> None:
        self.left -= num
        if self.left < 0:
            raise RefusedError(f"its pickle has over {self.most:,} steps and entries")

    # ---- what opcodes do

    def _mark(self, _: Any) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def _since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def _tuple(self, num: int | None) -> None:
        if num is None:
            items = self._since_mark()
            self.stack.append(tuple(items))
        else:
            if len(self.stack) < num:
                raise RefusedError("it takes more from the stack than there is")
            self.stack[-num:] = [tuple(self.stack[-num:])]

    def _append(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise RefusedError(f"it appends to {_kind(self.stack[-1])}")
        self.stack[-1].extend(items)

    def _set(self, items: list[Any]) -> None:
        held = self.stack[-1]
        if type(held) is not dict or len(items) % 2:
            raise RefusedError(f"it sets entries of {_kind(held)}")
        for i in range(0, len(items), 2):
            held[key(items[i])] = items[i + 1]

    def _set_one(self) -> None:
        value, name = self.stack.pop(), self.stack.pop()
        self._set([name, value])

    def _global(self, arg: str) -> None:
        module, _, name = arg.partition(" ")
        full = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if full not in self.known:
            raise RefusedError(f"it holds {shown(full)[1:-1]}", shown(full)[1:-1])
        self.stack.append(Name(full))

    def _call(self, _: Any) -> None:
        args, name = self.stack.pop(), self.stack.pop()
        if type(name) is not Name or type(args) is not tuple or name.name not in self.made:
            raise RefusedError(f"it calls {name.name if type(name) is Name else _kind(name)}")
        try:
            self.stack.append(self.made[name.name](*args))
        except TypeError:
            raise RefusedError(f"it calls {name.name} with what that does not take") from None

    def _build(self, _: Any) -> None:
        state, held = self.stack.pop(), self.stack[-1]
        if type(held) is argparse.Namespace:
            if type(state) is not dict or not all(type(name) is str for name in state):
                raise RefusedError(f"it gives a Namespace {_kind(state)}")
            self.spend(len(state))
            vars(held).update(state)
        elif type(held) is NumpyType:
            held.order = state[1]
        elif type(held) not in (StandIn, dict):  # of a dict only what is no entry: `_metadata` of state dicts
            raise RefusedError(f"it gives a state to {_kind(held)}")

    def _persistent(self, _: Any) -> None:
        self.stack.append(self.storage_of(self.stack.pop()))

    # ---- what is made of names

    def _ordered(self, pairs: Any = ()) -> dict[Any, Any]:
        """With entries in the call, as Python 2 wrote it."""
        if type(pairs) not in (list, tuple) or any(type(pair) not in (list, tuple) or len(pair) != 2 for pair in pairs):
            raise RefusedError(f"it makes an OrderedDict of {_kind(pairs)}")
        self.spend(len(pairs))
        return {key(name): value for name, value in pairs}

    @staticmethod
    def _size(axes: Any = ()) -> tuple[Any, ...]:
        if type(axes) is not tuple:
            raise RefusedError(f"it makes a size of {_kind(axes)}")
        return axes

    def _subclass(self, name: Any, kind: Any, args: Any, _: Any) -> Tensor:
        """A tensor with attributes of its own, which are left out."""
        if type(name) is not Name or not name.name.startswith("torch._utils._rebuild_") or type(args) is not tuple:
            raise RefusedError(f"it makes a tensor by {_kind(name)}")
        return self._tensor(self.made[name.name](*args))

    @staticmethod
    def _tensor(tensor: Any) -> Tensor:
        if not isinstance(tensor, Tensor):
            raise RefusedError(f"it makes a parameter of {_kind(tensor)}")
        return tensor


VALUES = frozenset(("BINUNICODE", "SHORT_BINSTRING", "BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1"))
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
STEPS: dict[str, Callable[[Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "MARK": Machine._mark,
    "TUPLE": lambda machine, _: machine._tuple(None),
    "TUPLE1": lambda machine, _: machine._tuple(1),
    "TUPLE2": lambda machine, _: machine._tuple(2),
    "TUPLE3": lambda machine, _: machine._tuple(3),
    "APPEND": lambda machine, _: machine._append([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine._append(machine._since_mark()),
    "SETITEM": lambda machine, _: machine._set_one(),
    "SETITEMS": lambda machine, _: machine._set(machine._since_mark()),
    "GLOBAL": Machine._global,
    "REDUCE": Machine._call,
    "NEWOBJ": Machine._call,
    "BUILD": Machine._build,
    "BINPERSID": Machine._persistent,
}


def key(value: Any) -> Any:
    """A key of a dict as it is. Raises `RefusedError` for one whose hash others could have chosen, or that has none."""
    if type(value) in (str, bool, float, Name, type(None)) or (type(value) is int and abs(value) < MOST_KEY):
        return value
    raise RefusedError(f"it has {_kind(value)} for a key")


def rebuilt(storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor in a storage. Raises `RefusedError` unless it lies within."""
    if not isinstance(storage, Storage) or (dtype := dtype or storage.dtype) is None:
        raise RefusedError(f"it has a tensor in {_kind(storage)}")
    for numbers in (size, stride):
        if not isinstance(numbers, tuple) or not all(type(each) is int and 0 <= each < MOST_KEY for each in numbers):
            raise RefusedError("it has a tensor whose sizes are no numbers")
    if len(size) != len(stride) or len(size) > MOST_AXES or type(offset) is not int or offset < 0:
        raise RefusedError(f"it has a tensor of {len(size)} axes and {len(stride)} strides")
    held = storage.held
    last = offset + sum((axis - 1) * step for axis, step in zip(size, stride, strict=True))
    num = math.prod(size)
    if num >= MOST_KEY or (num and (last + 1) * dtype.itemsize > held.nbytes()):
        raise RefusedError(f"it has a tensor of shape {shown(size)} in a storage of {held.nbytes():,} bytes")
    if not num:
        return torch.empty(size, dtype=dtype)
    return torch.empty(0, dtype=dtype).set_(held, offset, size, stride)  # pyrefly: ignore


def dtype_of(name: Any) -> torch.dtype:
    if type(name) is not Name or name.name not in DTYPES:
        raise RefusedError(f"it has a tensor of type {_kind(name)}")
    return DTYPES[name.name]


def numpy_type(kind: Any) -> NumpyType:
    if kind not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"):
        raise RefusedError(f"it has numpy's type {shown(kind)}, expected numbers")
    return NumpyType(kind)


def scalar(kind: Any, data: Any = Text("")) -> Any:
    """A number of numpy's."""
    text = data.text if type(data) is Text else data
    if type(kind) is not NumpyType or type(text) is not str or len(text) > 8 or kind.order not in ("<", ">", "=", "|"):
        raise RefusedError(f"it has a number of {_kind(kind)}")
    return np.frombuffer(text.encode("latin-1"), kind.order + kind.kind)[0]


def _kind(value: Any) -> str:
    return value.name if type(value) is Name else f"a {type(value).__name__}"
