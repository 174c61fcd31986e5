"""In which arithmetic a walk is computed, as it is asked for, or by rule where nothing is measured.

Scoring is in float32 or better. A walk that only samples can do with less: its conditionals are then those of a model
whose weights are rounded, which is far below what samples differ by. A step reads every weight once, so few rows are
bound by memory and many by arithmetic: on a CPU with instructions for it bfloat16 wins from about 16 rows on, and for
fewer where the weights are too many to stay near a core; 8-bit weights win for one or a few rows. What wins on the
machine at hand is measured by `priors.numerics`; the rule here is for what is too small to measure, and for GPUs.
"""

from dataclasses import dataclass

import torch

from priors.grid import GridModel
from priors.sampling import Precision

# Rows of a walk (grids, twice as many with guidance) from which on bfloat16 is faster on a CPU.
_ROWS_FOR_BF16 = 16
# Weights from which on fewer rows gain too.
_WEIGHTS_FOR_BF16 = 2**20


@dataclass(frozen=True)
class Arithmetic:
    """How a walk computes.

    Attributes:
        dtype: of activations and of the cache of keys and values, and of the weights unless `int8`.
        int8: weights are rounded to 8 bits, with a scale for each output channel.
        compiled: steps go through `torch.compile`.
        packed: on a CPU weights are kept in oneDNN's layout, where it has one for them.
    """

    dtype: torch.dtype
    int8: bool = False
    compiled: bool = False
    packed: bool = True


def choose(precision: Precision, rows: int, model: GridModel, compiled: bool) -> Arithmetic:
    """The arithmetic of a walk over `rows` rows, by rule.

    "auto" is bfloat16 where the device has instructions for it and, on a CPU, there are 16 rows or a million weights;
    else float32. A model in float64 stays in it. Raises ValueError for "int8" elsewhere than on a CPU.
    """
    if precision == "int8":
        if model.device.type != "cpu":
            raise ValueError(f"got precision='int8' on {model.device.type}, expected a prior on the CPU, or 'bfloat16'")
        return Arithmetic(torch.bfloat16, int8=True, compiled=compiled)
    if precision == "auto":
        if model.dtype == torch.float64:
            return Arithmetic(model.dtype, compiled=compiled)
        many = rows >= _ROWS_FOR_BF16 or sum(weight.numel() for weight in model.parameters()) >= _WEIGHTS_FOR_BF16
        enough = many or model.device.type == "cuda"
        precision = "bfloat16" if enough and has_bf16(model.device) else "float32"
    return Arithmetic(getattr(torch, precision), compiled=compiled)


def has_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
