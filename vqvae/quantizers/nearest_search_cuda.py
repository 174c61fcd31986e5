"""The scan of `vqvae.quantizers.nearest_search` on CUDA, as one Triton kernel that holds scores in registers only.

A program takes a tile of vectors and walks over the codes, tile by tile; of each vector it keeps the best score, its
code and the second best score:

    best', second'  =  min(best, low),  min(max(best, low), second, low₂)

with low and low₂ the least two scores of the tile. Products are float32 throughout ("ieee": TF32 would leave most
vectors undecided) and fused multiply-adds, which the tolerance allows for. Imported for CUDA tensors only, since torch
for CPUs brings no Triton.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

# Vectors, codes and dimensions of a tile: 32 scores a thread, and tiles of 8 and 16 KiB. Chosen for H100-class cards by
# their registers (198 a thread, none spilled) and shared memory; NOT tuned on a GPU.
ROWS, CODES, DIMS, NUM_WARPS = 64, 128, 32, 8


def scan(vectors: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each float32 vector z: argmin, least and second least of bias_k + z·weight_k; the lowest index wins ties."""
    vectors, weight = vectors.contiguous(), weight.contiguous()
    num_rows, dim = vectors.shape
    codes = torch.zeros(num_rows, dtype=torch.int64, device=vectors.device)
    best, second = torch.empty_like(codes, dtype=torch.float32), torch.empty_like(codes, dtype=torch.float32)
    if num_rows:
        with torch.cuda.device_of(vectors):  # Triton launches on the current device
            # A jitted function's launch options are no parameters of the function.
            launch: Any = _scan[(triton.cdiv(num_rows, ROWS),)]
            tile = {"tile_rows": ROWS, "tile_codes": CODES, "tile_dims": DIMS}
            options = {"num_warps": NUM_WARPS, "enable_fp_fusion": True}
            launch(vectors, weight, bias, codes, best, second, num_rows, len(weight), dim, **tile, **options)
    return codes, best, second


@triton.jit
@no_type_check  # a checker's wrapper hides the source from Triton
def _scan(
    vectors,
    weight,
    bias,
    codes,
    best,
    second,
    num_rows,
    num_codes,
    dim,
    tile_rows: tl.constexpr,
    tile_codes: tl.constexpr,
    tile_dims: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * tile_rows + tl.arange(0, tile_rows)
    column = tl.arange(0, tile_codes)
    low_code = tl.zeros((tile_rows,), tl.int64)
    low = tl.full((tile_rows,), float("inf"), tl.float32)
    next_low = tl.full((tile_rows,), float("inf"), tl.float32)
    for start in range(0, num_codes, tile_codes):
        code = start + column
        scores = tl.zeros((tile_rows, tile_codes), tl.float32)
        for first in range(0, dim, tile_dims):
            place = first + tl.arange(0, tile_dims)
            z = tl.load(
                vectors + row[:, None] * dim + place[None, :],
                mask=(row[:, None] < num_rows) & (place[None, :] < dim),
                other=0.0,
            )
            w = tl.load(
                weight + code[None, :].to(tl.int64) * dim + place[:, None],
                mask=(code[None, :] < num_codes) & (place[:, None] < dim),
                other=0.0,
            )
            scores = tl.dot(z, w, scores, input_precision="ieee")
        scores += tl.load(bias + code, mask=code < num_codes, other=float("inf"))[None, :]
        # NaN is what overflow leaves, and such a vector stays undecided; reductions need not agree about NaN.
        scores = tl.where(scores == scores, scores, float("inf"))
        winner = tl.argmin(scores, 1, tie_break_left=True)
        tile_low = tl.min(scores, 1)
        others = tl.where(column[None, :] == winner[:, None], float("inf"), scores)
        next_low = tl.minimum(tl.maximum(low, tile_low), tl.minimum(next_low, tl.min(others, 1)))
        low_code = tl.where(tile_low < low, start + winner, low_code)
        low = tl.minimum(low, tile_low)
    tl.store(codes + row, low_code, mask=row < num_rows)
    tl.store(best + row, low, mask=row < num_rows)
    tl.store(second + row, next_low, mask=row < num_rows)
