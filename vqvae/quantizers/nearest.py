"""Nearest-code search: exact, in bounded memory, and the same for a vector in any batch.

For unit-free squared distances the code of `z` is `argmin_k ‖z - e_k‖² = argmin_k ‖e_k‖²/2 - z·e_k`. The scores of a
chunk of vectors are one float32 matrix product, whatever the autocast. Rounding in that product depends on the shape
of the batch, so a score within rounding of the best is a candidate, not a winner: rows with several candidates are
decided by their distances in float64, the lowest index winning ties. The answer is then that of a float64 brute force,
alone or in a batch of any size, and no N x K matrix is ever held.

`torch.compile` and `torch.export` see one operator, so the data-dependent part does not break a graph.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Scores held at once: 2^21 floats are 8 MiB, which stays near the cache and bounds memory for every N and K.
CHUNK_ELEMENTS = 2**21
# Pairs compared at once in float64; only a collapsed codebook has this many within rounding of each other.
CANDIDATES = 2**16


def nearest(vectors: Float[Tensor, "n d"], codebook: Float[Tensor, "k d"]) -> Int[Tensor, " n"]:
    """The index of the code nearest to each vector in Euclidean distance; the lowest index wins ties.

    Args:
        vectors: any floating dtype; compared as float32.
        codebook: any floating dtype; compared as float32.

    Raises:
        ValueError: a vector is NaN or infinite, which no code is near to.
    """
    return _nearest(vectors.detach().float(), codebook.detach().float())


@torch.library.custom_op("vqvae::nearest", mutates_args=())
def _nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    with torch.autocast(vectors.device.type, enabled=False):
        if not torch.isfinite(vectors).all():
            raise ValueError("the vectors to quantize hold NaN or infinity; look for a diverged or broken encoder")
        half_norms = codebook.square().sum(1) / 2
        num_rows = max(1, CHUNK_ELEMENTS // len(codebook))
        codes = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
        for start in range(0, len(vectors), num_rows):
            codes[start : start + num_rows] = _nearest_chunk(vectors[start : start + num_rows], codebook, half_norms)
        return codes


@_nearest.register_fake
def _(vectors: Tensor, codebook: Tensor) -> Tensor:
    return vectors.new_empty(len(vectors), dtype=torch.int64)


def _nearest_chunk(vectors: Tensor, codebook: Tensor, half_norms: Tensor) -> Tensor:
    scores = torch.addmm(half_norms, vectors, codebook.T, alpha=-1)
    best, codes = scores.min(1)
    # A float32 product of width d is off by at most about d·eps·‖z‖‖e‖; each of two compared scores may be.
    scale = vectors.norm(dim=1) * codebook.norm(dim=1).max() + half_norms.max()
    tolerance = 2 * (vectors.shape[1] + 2) * torch.finfo(torch.float32).eps * scale
    rows, candidates = (scores <= (best + tolerance)[:, None]).nonzero(as_tuple=True)
    if len(rows) > len(vectors):  # some row has more than its own winner
        gaps = torch.cat(
            [
                (vectors[i].double() - codebook[k].double()).square().sum(1)
                for i, k in zip(rows.split(CANDIDATES), candidates.split(CANDIDATES), strict=True)
            ]
        )
        least = torch.full_like(best, torch.inf, dtype=torch.float64).scatter_reduce(0, rows, gaps, "amin")
        tied = torch.where(gaps == least[rows], candidates, len(codebook))
        codes = torch.full_like(codes, len(codebook)).scatter_reduce(0, rows, tied, "amin")
    return codes
