"""Tensors of what people have in place of them: numpy's arrays, lists, and integers of any type.

Codes and labels come as torch's int64, in the small unsigned types of a tokenized set, as arrays, or as lists. At each
boundary they are made int64 once, here, so that nothing behind it has to know of other types: in uint8 a -1 is 255, and
of uint16 torch can neither take the least nor look anything up. An int64 tensor is handed on as it is.

What a number means, and whether it is in range, is the boundary's affair. A uint64 above 2^63 − 1 is none of int64 and
refused: it would come out negative.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer, Shaped
from torch import Tensor

from safefolder.messages import shown

Codes = Integer[Tensor, "b *grid"] | Integer[np.ndarray, "b *grid"] | Sequence[Any]
"""Codes of any integer type; a list stands for the array of its lists."""

Labels = (
    Integer[Tensor, " b"] | Integer[np.ndarray, " b"] | Integer[Tensor, ""] | Integer[np.ndarray, ""]
    | Sequence[Any] | int | np.integer
)  # fmt: skip
"""A label for each of b, of any integer type; or one for all of them."""

Mask = Bool[Tensor, "*some_grid"] | Bool[np.ndarray, "*some_grid"] | Sequence[Any]
Latents = Shaped[Tensor, "b *places"] | Shaped[np.ndarray, "b *places"] | Sequence[Any]
Vectors = Float[Tensor, "b *grid d"] | Float[np.ndarray, "b *grid d"] | Sequence[Any]


def integers(
    values: Any, name: str, device: torch.device | None = None, expected: str = "integers"
) -> Integer[Tensor, "..."]:
    """An int64 tensor of integers of any type.

    Args:
        values: a tensor, which stays where it is; an array or lists, which go to `device`; or one integer.
        name, expected: what the message calls them.

    Raises:
        ValueError: no integers (booleans are none), lists of unequal length, or a number above 2^63 − 1.
    """
    if not isinstance(values, Tensor):
        values = _tensor(values, name, device, expected)
    if values.dtype == torch.int64:
        return values
    if not is_integer(values):
        raise ValueError(f"got {_told(values, name, expected)}, expected {expected}")
    if values.dtype == torch.uint64 and not torch.compiler.is_compiling():
        bits = values.view(torch.int64)
        if bool((bits < 0).any()):
            most = int(bits[bits < 0].max()) + 2**64
            raise ValueError(f"got {name} up to {most}, expected {expected} of 63 bits")
    return values.to(torch.int64)


def labels_for(labels: Any, num: int, device: torch.device | None = None) -> Integer[Tensor, " num"]:
    """An int64 tensor of `num` labels, of a label for each or of one for all. Their range is not looked at.

    Raises:
        ValueError: no integers, or another number of them.
    """
    expected = f"integers of shape ({num},), or one for all"
    found = integers(labels, "labels", device, expected)
    if found.ndim == 0:
        return found.expand(num)
    if tuple(found.shape) != (num,):
        raise ValueError(f"got {_told(found, 'labels', expected)}, expected {expected}")
    return found


def vectors(values: Any, name: str) -> Float[Tensor, "..."]:
    """A tensor of floating-point numbers, in the type that they have; of an array or lists it is on the CPU.

    Raises:
        ValueError: other numbers, or lists of unequal length.
    """
    if not isinstance(values, Tensor):
        values = _tensor(values, name, None, "floating point")
    if not values.is_floating_point():
        raise ValueError(f"got {name} of {values.dtype}, expected floating point")
    return values


def mask_of(values: Any, name: str, device: torch.device | None = None) -> Tensor:
    """A tensor of a mask, whose type and shape are not looked at. Arguments as for `integers`."""
    return values if isinstance(values, Tensor) else _tensor(values, name, device, "booleans")


def is_integer(tensor: Tensor) -> bool:
    """Whether it can hold codes or labels: of an integer type, and not of booleans."""
    dtype = tensor.dtype
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def from_numpy(array: np.ndarray) -> Tensor:
    """The tensor of an array of any layout and byte order, without a copy where torch can do without."""
    kind, size = array.dtype.kind, array.dtype.itemsize
    native = np.dtype(f"{kind}{min(size, 8)}")  # torch knows one type of each size, and none above 8 bytes
    return torch.from_numpy(np.require(array, native, ["C_CONTIGUOUS", "ALIGNED", "WRITEABLE"]))


def _tensor(values: Any, name: str, device: torch.device | None, expected: str) -> Tensor:
    if isinstance(values, np.ndarray | np.generic | bool | int | list | tuple | range):
        array = _array(values, name)
        if array.dtype.kind in "biuf":
            tensor = from_numpy(array)
            return tensor if device is None else tensor.to(device)
        if array.dtype.kind == "O" and all(type(each) is int for each in array.flat):
            raise ValueError(f"got {name} up to {shown(max(array.flat, key=abs))}, expected {expected} of 63 bits")
        found = str(array.dtype)
    else:
        found = type(values).__name__
    raise ValueError(f"got {name} of {found}, expected {expected} as a tensor, an array or lists")


def _array(values: Any, name: str) -> np.ndarray:
    if isinstance(values, list | tuple) and any(isinstance(each, Tensor) for each in values):
        values = [each.numpy(force=True) if isinstance(each, Tensor) else each for each in values]
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"got {name} in lists of unequal length, expected those of an array") from error
    # An empty list says nothing of what it would hold.
    return array.astype(np.int64) if array.size == 0 and isinstance(values, list | tuple) else array


def _told(tensor: Tensor, name: str, expected: str) -> str:
    return f"{name} of {tensor.dtype}" + ("" if expected == "integers" else f" {tuple(tensor.shape)}")
