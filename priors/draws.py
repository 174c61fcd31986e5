"""Many grids to be sampled: what is asked for, checked, and how many grids are sampled at once."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Integer
from torch import Tensor

from priors.grid import GridModel
from priors.sampling import Sampling, Seeds, check_range, check_seeds
from safefolder import arrays
from safefolder.arrays import Codes, Mask

Prefix = Integer[Tensor, "b n"] | Integer[np.ndarray, "b n"] | Sequence[Any]

# Bytes that caches and conditionals of one block of grids may take, and the most grids in it: more make nothing faster.
CACHE_BYTES = 2**30
MOST_GRIDS = 256
# Grids with seeds of their own are always computed by so many, filled up if need be: matrix products of another shape
# are rounded otherwise, and a grid must not depend on how many others were asked for.
SEEDED_GRIDS = 16


def check_room(num: int, row_bytes: int, device: torch.device, instead: str) -> None:
    """ValueError for more grids in one tensor than all memory of their device holds, before the first is sampled.

    What others take of it is not looked at: less room may be left.
    """
    if device.type == "cuda" and torch.cuda.is_initialized():  # as it is where a prior lies there
        memory = torch.cuda.get_device_properties(device).total_memory
    elif device.type == "cpu" and hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return
    if num * row_bytes > memory:
        raise ValueError(
            f"got num={num:,}, but all grids in one tensor take {num * row_bytes / 1e9:,.0f} GB, and the memory of "
            f"{device} is {memory / 1e9:,.0f} GB: {instead}"
        )


def block_grids(num: int, size: int, full: bool) -> Iterator[tuple[list[int], int]]:
    """Of each block its grids, in a full one the last again until there are `size`, and how many were asked for."""
    for begin in range(0, num, size):
        stop = min(num, begin + size)
        yield [min(i, num - 1) for i in range(begin, begin + size if full else stop)], stop - begin


def seeds_for(num: int, seeds: Seeds | None, sampling: Sampling) -> list[int] | None:
    """A seed for each grid; None where there are none. ValueError for others, or a batch size beside them."""
    if seeds is None:
        return None
    listed = check_seeds(seeds)
    if len(listed) != num:
        raise ValueError(f"got {len(listed)} seeds for {num} grids, expected one each")
    if sampling.batch_size is not None:
        raise ValueError(
            f"got batch_size={sampling.batch_size} beside seeds, which are sampled {SEEDED_GRIDS} at a time"
        )
    return listed


def check_codes(model: GridModel, num_codes: int, codes: Codes, name: str, shape: tuple[int, ...]) -> Tensor:
    """Codes "b *shape" of any integer type as int64, on the model's device. ValueError for others."""
    codes = arrays.integers(codes, name, model.device)
    if tuple(codes.shape[1:]) != shape or codes.ndim < 1:
        expected = ", ".join(map(str, ("b", *shape)))
        raise ValueError(f"got {name} of shape {tuple(codes.shape)}, expected ({expected})")
    codes = codes.to(model.device)
    check_range(codes, num_codes, name)
    return codes


def check_given(
    model: GridModel, num_codes: int, num: int, prefix: Prefix | None, given: Codes | None, mask: Mask | None
) -> tuple[Tensor, Tensor]:
    """Given codes "b n" (zero where to sample), and where they are kept; one row for all if nothing is given.

    Raises ValueError for what is none of a prefix, or codes with a mask, of `num` grids.
    """
    rows = 1 if prefix is None and given is None else num
    codes = torch.zeros(rows, model.num_positions, dtype=torch.int64, device=model.device)
    kept = torch.zeros_like(codes, dtype=torch.bool)
    if (given is None) != (mask is None) or (given is not None and prefix is not None):
        raise ValueError("expected given codes and a mask together, or a prefix, or neither")
    if prefix is not None:
        prefix = arrays.integers(prefix, "prefix", model.device)
        if prefix.ndim != 2 or prefix.shape[0] != num or prefix.shape[1] > model.num_positions:
            raise ValueError(
                f"got prefix of shape {tuple(prefix.shape)}, expected ({num}, n) with n from 0 to "
                f"{model.num_positions}, the first positions in raster order"
            )
        codes[:, : prefix.shape[1]] = check_codes(model, num_codes, prefix, "prefix", (prefix.shape[1],))
        kept[:, : prefix.shape[1]] = True
    if given is not None and mask is not None:
        given, mask = arrays.integers(given, "given codes", model.device), arrays.mask_of(mask, "a mask", model.device)
        if mask.dtype != torch.bool or tuple(mask.shape) not in (model.grid, (num, *model.grid)):
            expected = ", ".join(map(str, model.grid))
            raise ValueError(
                f"got a mask of {mask.dtype} {tuple(mask.shape)}, expected booleans of shape ({expected}) or "
                f"({num}, {expected}), True where to sample"
            )
        if tuple(given.shape) != (num, *model.grid):
            expected = ", ".join(map(str, (num, *model.grid)))
            raise ValueError(f"got given codes of shape {tuple(given.shape)}, expected ({expected})")
        kept = ~mask.to(model.device).expand(num, *model.grid).reshape(num, model.num_positions)
        # What stands where codes are to be sampled is nobody's business, such as a -1 for "unknown".
        given = given.to(model.device).where(kept.reshape(given.shape), 0)
        codes = check_codes(model, num_codes, given, "given codes", model.grid).reshape(num, model.num_positions)
    return codes, kept


def strengths_of(model: GridModel, guidance: float | Sequence[float] | None, labels: Tensor | None) -> Tensor | None:
    """Guidance "n" at each position of the walk; None where it is 1 everywhere.

    Raises ValueError for another number of positions, and where there is nothing to guide to.
    """
    if guidance is None or guidance == 1:
        return None
    if model.num_classes is None:
        raise ValueError(f"got guidance={guidance}, expected None: this prior was made without num_classes")
    if labels is None or bool((labels == model.num_classes).any()):
        raise ValueError(f"got guidance={guidance} without labels, expected labels to guide to")
    strengths = list(guidance) if isinstance(guidance, Sequence) else [guidance] * model.num_positions
    if len(strengths) != model.num_positions:
        raise ValueError(
            f"got guidance of {len(strengths)} numbers, expected one for each of {model.num_positions} positions"
        )
    if all(strength == 1 for strength in strengths):
        return None
    return torch.tensor(strengths, dtype=model.dtype, device=model.device)
