"""Linear maps of a walk, x -> x W^T, with weights laid out for few rows.

A walk multiplies few rows by every weight, again and again, so that on a CPU the layout and the size of a weight in
memory count for more than the arithmetic. What is made of a weight for a walk is kept until the weight changes, goes,
or is wanted in another precision: a model that has been sampled from holds its weights twice.

- float32 and bfloat16 on a CPU: oneDNN's own blocked layout, as torch.compile's frozen graphs have it, which is faster
  where float32 products go to a library for another vendor's processor.
- 8 bits: W_oi ~ scale_o * q_oi with scale_o = max_i |W_oi| / 127, q_oi rounded to the nearest of -127 .. 127
  ("absmax"), activations in bfloat16.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from priors.precision import Arithmetic

LinearMap = Callable[[Tensor], Tensor]
# A weight "out in", or one of 8 bits with its scales.
Weight = Tensor | tuple[Tensor, Tensor]

_prepared: WeakIdKeyDictionary = WeakIdKeyDictionary()


def prepare(
    weight: Tensor,
    arithmetic: Arithmetic,
    rows: int = 1,
    change: Callable[[Tensor], Tensor] | None = None,
    packed: bool = True,
) -> LinearMap:
    """The map of a weight "out in" for a walk: from "rows in" to "rows out", both of `arithmetic.dtype`.

    Args:
        rows: how many rows will come at once, for which the layout is chosen; others are right too.
        change: what becomes of the weight before; always the same for a weight.
        packed: on a CPU, keep it in oneDNN's layout if `arithmetic` says so. Otherwise it is that of `plain`, and
            shared with it.
    """
    packed = packed and arithmetic.packed

    def make() -> LinearMap:
        if change is not None:
            rounded = _rounded(change(weight.detach()), arithmetic)
        else:
            rounded = _rounded(weight.detach(), arithmetic) if packed else plain(weight, arithmetic)
        on_cpu = packed and weight.device.type == "cpu" and isinstance(rounded, Tensor)
        return (_packed(rounded, rows) if on_cpu else None) or (lambda x: multiply(x, rounded))

    return _once(weight, arithmetic, "packed" if packed else "map", make)


def plain(weight: Tensor, arithmetic: Arithmetic) -> Weight:
    """The weight for `multiply`, in torch's own layout."""
    return _once(weight, arithmetic, "plain", lambda: _rounded(weight.detach(), arithmetic))


def multiply(x: Tensor, weight: Weight) -> Tensor:
    """x W^T."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight)
    rounded, scale = weight
    if spare := rounded.shape[1] - x.shape[1]:
        x = F.pad(x, (0, spare))
    return torch._weight_int8pack_mm(x, rounded, scale)


def _once(weight: Tensor, arithmetic: Arithmetic, kind: str, make: Callable[[], Any]) -> Any:
    """What was made of a weight for these arithmetic, the last there were, while the weight is what it was."""
    state = (arithmetic.dtype, arithmetic.int8, weight.data_ptr(), weight.dtype, weight.device, *_fingerprint(weight))
    if _prepared.get(weight, (None, None))[0] != state:
        _prepared[weight] = (state, {})
    made = _prepared[weight][1]
    if kind not in made:
        made[kind] = make()
    return made[kind]


def _fingerprint(weight: Tensor) -> tuple[int, ...]:
    """Numbers that a change of the weight changes. torch's count of versions does not see them all: neither fused
    optimizers nor changes of `weight.data` raise it.

    The sum of the bits sees a change of one element however small, a bilinear form those that leave the sum alone
    (another order, another sign, powers of two).
    """
    weight = weight.detach()
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.itemsize]
    total = weight.view(bits).sum()
    left, right = (torch.arange(size, device=weight.device) for size in weight.shape)
    form = (weight @ right.mul(1.7).cos().to(weight.dtype)).double() @ left.mul(0.9).add(1).cos().double()
    return tuple(torch.stack((total, form.view(torch.int64))).tolist())


def _rounded(weight: Tensor, arithmetic: Arithmetic) -> Weight:
    if not arithmetic.int8:
        return weight.to(arithmetic.dtype)
    scale = weight.float().abs().amax(1).clamp(min=1e-30) / 127
    rounded = (weight / scale[:, None]).round().to(torch.int8)
    # torch's product reads 16 inputs at a time, also past the end of a row.
    return F.pad(rounded, (0, -rounded.shape[1] % 16)), scale.to(torch.bfloat16)


def _packed(weight: Tensor, rows: int) -> LinearMap | None:
    """The map in oneDNN's layout, or None where this torch has none for it."""
    if weight.dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return None
    library: Any = torch.ops.mkldnn
    try:
        packed = library._reorder_linear_weight(weight, rows)
        product = library._linear_pointwise.default
        product(weight.new_zeros(1, weight.shape[1]), packed, None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return None
    return lambda x: product(x, packed, None, "none", [], "")
