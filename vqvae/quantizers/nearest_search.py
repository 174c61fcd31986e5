"""Nearest-code search: exact, in bounded memory, and the same for a vector in any batch.

The code of `z` is the one of least score, and the lowest index of several:

    nearest code         argmin_k ‖z − e_k‖²  =  argmin_k s_k,   s_k = ‖e_k‖²/2 − z·e_k
    affine score         argmin_k s_k,                           s_k = o_k − z·e_k

Three steps, each for the vectors that the one before left open:

1. Scores in float32, one matrix product for a chunk of vectors (on CUDA one fused kernel). Rounding in that product
   depends on the shape of the batch, so a vector is decided only if its best score leads the second best by more than
   rounding can explain.
2. The same in float64. Here come near ties, and vectors whose scores overflow float32. Copies of a code are dropped
   first, so a collapsed codebook is as fast as any.
3. Float64 differences of the vector to each code that step 2 cannot tell from its best.

The answer is that of a float64 brute force, alone or in a batch of any size, and no N x K matrix is ever held.
`torch.compile` and `torch.export` see one operator, so the data-dependent part does not break a graph.
"""

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

# Scores held at once: 4 MiB of float32. Fewer and the calls of a chunk show beside its product; more leave the cache,
# and from 32 MiB on malloc takes new pages for every chunk.
CHUNK_ELEMENTS = 2**20
# Codes searched at once: their part of the codebook stays in cache too, with rows enough for an efficient product.
SECTION = 4096
# Float64 scores, listed pairs, and rows gathered at once: these take several times the bytes, and are few.
SLOW_ELEMENTS = 2**19
# With fewer codes a row is searched whole; from here on by columns, see `_scan_chunk`.
MIN_BLOCKED = 64
# Over the middle axis of narrower blocks `amin` leaves its vectorised loop.
MIN_COLUMNS = 32

_PRECISION = threading.RLock()


def nearest(
    vectors: Float[Tensor, "n d"], codebook: Float[Tensor, "k d"], offsets: Float[Tensor, " k"] | None = None
) -> Int[Tensor, " n"]:
    """The index of the code nearest to each vector in Euclidean distance; the lowest index wins ties.

    With `offsets` the code of `z` is `argmin_k offsets_k − z·e_k` instead: zero offsets give the largest inner product,
    `−bias` the largest logit of a linear layer, `‖e_k‖²/2 + λ·rate_k` the entropy-constrained choice. An offset of
    +inf forbids its code.

    Args:
        vectors: any floating dtype.
        codebook: any floating dtype; at least one code. Vectors and codes are compared in their promoted dtype, float32
            at least, whatever the autocast.
        offsets: any floating dtype; rounded to that of the comparison.

    Raises:
        ValueError: a vector or a code is NaN or infinite, an offset is NaN or −inf, or all offsets are +inf.
    """
    dtype = torch.promote_types(torch.promote_types(vectors.dtype, codebook.dtype), torch.float32)
    return torch.ops.vqvae.nearest(
        vectors.detach().to(dtype), codebook.detach().to(dtype), None if offsets is None else offsets.detach().to(dtype)
    )


# Not by `torch.library.custom_op`: the first call of such an operator loads torch's compiler, a second of CPU time.
torch.library.define(
    "vqvae::nearest", "(Tensor vectors, Tensor codebook, Tensor? offsets) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)


def _nearest(vectors: Tensor, codebook: Tensor, offsets: Tensor | None) -> Tensor:
    with torch.autocast(vectors.device.type, enabled=False), _full_precision(vectors.device.type):
        norms = torch.linalg.vector_norm(vectors, dim=1)
        # A finite norm proves its vector finite; the norm of a finite vector may still overflow.
        if not norms.sum().isfinite() and not torch.isfinite(vectors).all():
            raise ValueError("the vectors to quantize hold NaN or infinity; look for a diverged or broken encoder")
        return _search(vectors, norms, _Table(codebook, offsets))


torch.library.impl("vqvae::nearest", "default")(_nearest)


@torch.library.register_fake("vqvae::nearest")
def _(vectors: Tensor, codebook: Tensor, offsets: Tensor | None) -> Tensor:
    return vectors.new_empty(len(vectors), dtype=torch.int64)


class _Table:
    """The codebook as a search in its dtype needs it; `weight` and `bias` are padded to whole columns."""

    def __init__(self, codebook: Tensor, offsets: Tensor | None):
        self.codebook, self.offsets = codebook, offsets
        num_codes, dim = codebook.shape
        # In parts, since a float64 copy is twice the codebook.
        self.squares = torch.cat([part.double().square().sum(1) for part in codebook.split(_num_rows(dim))])
        bias = self.squares / 2 if offsets is None else offsets.double()
        self.radius = self.squares.max().sqrt()  # largest ‖e_k‖
        self.height = torch.where(bias == math.inf, 0.0, bias.abs()).max()  # largest |bias| of a code that may win
        if not torch.isfinite(codebook).all():
            raise ValueError("the codebook holds NaN or infinity; look for a diverged codebook")
        if offsets is not None and (not torch.isfinite(self.height) or bool((offsets == math.inf).all())):
            raise ValueError("the offsets hold NaN or −inf, or forbid every code; expected one finite offset at least")
        self.num_columns = num_codes
        if num_codes >= MIN_BLOCKED:
            # About √K columns of √K codes: both few. Powers of two divide a section.
            self.num_columns = max(MIN_COLUMNS, 2 ** round(math.log2(min(num_codes, SECTION)) / 2))
        missing = -num_codes % self.num_columns
        self.weight = F.pad(-codebook, (0, 0, 0, missing))
        self.bias = F.pad(bias.to(codebook.dtype), (0, missing), value=math.inf)

    def tolerance(self, norms: Tensor) -> Tensor:
        """How far apart two computed scores may be although the float64 brute force has them the other way round.

        With u = eps/2 the unit roundoff and S = ‖z‖·max‖e‖ + max|bias|, which bounds every partial sum of a score: a
        sum of d products and a bias, in any order, fused or not, is off by at most (d+1)·u·S; the rounded bias adds
        u·S. Two scores, and the rounding of the comparison: (d+3)·eps·S. In float64 ‖e‖²/2 has its own sum,
        d·u·S more: the second term. The brute force rounds too: its halved distances are at most R = (‖z‖+max‖e‖)²/2
        and off by (d+2)·u·R, its affine scores by (d+1)·u·S: the third term. The hundredth covers second orders and
        the rounding of norms while d < 2^16; `tiny` covers what underflows or is flushed to zero.
        """
        dim, info = self.codebook.shape[1], torch.finfo(norms.dtype)
        norms = norms + math.sqrt(dim * info.tiny)
        radius, height = self.radius.to(norms.dtype), self.height.to(norms.dtype)
        scale = norms * radius + height
        reach = scale if self.offsets is not None else (norms + radius).square() / 2
        eps64 = torch.finfo(torch.float64).eps
        tolerance = 1.01 * (dim + 3) * (info.eps * scale + eps64 * (scale + reach)) + 4 * (dim + 3) * info.tiny
        # Where a partial sum may overflow nothing is decided: every comparison with NaN is false.
        return torch.where(scale < info.max / 4, tolerance, torch.nan)


def _num_rows(width: int) -> int:
    return max(1, SLOW_ELEMENTS // width)


def _search(vectors: Tensor, norms: Tensor, table: _Table) -> Tensor:
    codes, best, second = _scan(vectors, table)
    undecided = (~(second > best + table.tolerance(norms))).nonzero().squeeze(1)
    if not len(undecided):
        return codes
    if vectors.dtype == torch.float64:
        for rows in undecided.split(_num_rows(len(table.weight))):
            codes[rows] = _by_differences(vectors[rows], norms[rows], table)
        return codes
    distinct, precise = _without_copies(table)
    for rows in undecided.split(_num_rows(vectors.shape[1])):
        part = vectors[rows].double()
        codes[rows] = distinct[_search(part, torch.linalg.vector_norm(part, dim=1), precise)]
    return codes


def _without_copies(table: _Table) -> tuple[Tensor, _Table]:
    """The indices of the distinct codes, ascending, and a float64 table of these codes."""
    distinct = torch.arange(len(table.codebook), device=table.codebook.device)
    # Copies have the same norm: a sort of numbers mostly spares the sort of rows.
    if len(table.squares.unique()) < len(distinct):
        rows = table.codebook if table.offsets is None else torch.cat([table.codebook, table.offsets[:, None]], 1)
        unique, inverse = rows.unique(dim=0, return_inverse=True)
        distinct = torch.full((len(unique),), len(distinct), device=distinct.device).scatter_reduce(
            0, inverse, distinct, "amin"
        )
        distinct = distinct.sort().values
    offsets = None if table.offsets is None else table.offsets[distinct].double()
    return distinct, _Table(table.codebook[distinct].double(), offsets)


def _scan(vectors: Tensor, table: _Table) -> tuple[Tensor, Tensor, Tensor]:
    """Of each vector, in the table's dtype: the code of the best score, that score, and the second best."""
    fused = _fused_scan() if vectors.is_cuda and vectors.dtype == torch.float32 else None
    if fused is not None:
        return fused(vectors, table.weight, table.bias)
    sections = zip(table.weight.split(SECTION), table.bias.split(SECTION), strict=True)
    codes, best, second = _scan_section(vectors, *next(sections), table.num_columns)
    for number, section in enumerate(sections, 1):
        new_codes, new_best, new_second = _scan_section(vectors, *section, table.num_columns)
        codes = torch.where(new_best < best, new_codes + number * SECTION, codes)
        second = torch.minimum(torch.maximum(best, new_best), torch.minimum(second, new_second))
        best = torch.minimum(best, new_best)
    return codes, best, second


def _fused_scan() -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None:
    try:
        from vqvae.quantizers.nearest_search_cuda import scan
    except ModuleNotFoundError:  # torch for CUDA brings Triton, though not on every system
        return None
    return scan


def _scan_section(vectors: Tensor, weight: Tensor, bias: Tensor, num_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    product = _onednn_product if _has_onednn(vectors) else _product
    num_rows = max(1, (CHUNK_ELEMENTS if vectors.dtype == torch.float32 else SLOW_ELEMENTS) // len(weight))
    codes = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    best, second = torch.empty_like(vectors[:, 0]), torch.empty_like(vectors[:, 0])
    for start in range(0, len(vectors), num_rows):
        rows = slice(start, start + num_rows)
        codes[rows], best[rows], second[rows] = _scan_chunk(product(vectors[rows], weight, bias), num_columns)
    return codes, best, second


def _scan_chunk(scores: Tensor, num_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Code k stands in column k mod `num_columns`, so that the minima of all columns are one vectorised pass.

    `min(1)`, with its indices, takes longer than that pass; here it sees √K columns and √K codes of one
    column. The second best score is the best other one of that column, or the best of the other columns.
    """
    blocks = scores.unflatten(1, (-1, num_columns))
    minima = blocks.amin(1)
    best, column = minima.min(1)
    members = blocks[torch.arange(len(blocks), device=blocks.device), :, column]
    block = members.min(1).indices
    members.scatter_(1, block[:, None], torch.inf)
    minima.scatter_(1, column[:, None], torch.inf)
    return block * num_columns + column, best, torch.minimum(members.amin(1), minima.amin(1))


def _product(vectors: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, vectors, weight.T)


def _onednn_product(vectors: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(vectors, weight, bias, "none", [], "")


def _has_onednn(vectors: Tensor) -> bool:
    """Whether to take oneDNN's product: on an AMD processor with AVX-512 it takes half the time of MKL's, `addmm`.

    It is the operator that torch's compiler puts in place of `linear`; torch has no public name for it.
    """
    return (
        vectors.device.type == "cpu"
        and vectors.dtype == torch.float32
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        # Either variable can make oneDNN round float32 to bfloat16.
        and not {"ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"} & os.environ.keys()
    )


@contextlib.contextmanager
def _full_precision(device: str) -> Iterator[None]:
    """Float32 products in float32, though `torch.set_float32_matmul_precision` may allow TF32 or bfloat16 elsewhere."""
    matmul = getattr(torch.backends, "cuda" if device == "cuda" else "mkldnn").matmul
    if matmul.fp32_precision not in ("tf32", "bf16"):
        yield
        return
    with _PRECISION:  # two searches must not restore each other's setting
        before = matmul.fp32_precision
        matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = before


def _by_differences(vectors: Tensor, norms: Tensor, table: _Table) -> Tensor:
    """The codes of a few float64 vectors, by the scores of single pairs: alike in every batch."""
    num_codes, dim = table.codebook.shape
    scores = _product(vectors, table.weight, table.bias)[:, :num_codes]
    limit = scores.amin(1) + table.tolerance(norms)
    rows, candidates = (~(scores > limit[:, None])).nonzero(as_tuple=True)
    pairs = zip(rows.split(_num_rows(dim)), candidates.split(_num_rows(dim)), strict=True)
    gaps = torch.cat([_pair_scores(vectors[i], table, k) for i, k in pairs]).nan_to_num(torch.inf)
    least = torch.full_like(norms, torch.inf).scatter_reduce(0, rows, gaps, "amin")
    tied = torch.where(gaps == least[rows], candidates, num_codes)
    return torch.full_like(rows[: len(vectors)], num_codes).scatter_reduce(0, rows, tied, "amin")


def _pair_scores(vectors: Tensor, table: _Table, codes: Tensor) -> Tensor:
    if table.offsets is None:
        return (vectors - table.codebook[codes]).square().sum(1)
    return table.offsets[codes] - (vectors * table.codebook[codes]).sum(1)
