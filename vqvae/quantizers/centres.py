"""k-means (Lloyd's algorithm), as the start of a codebook."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from vqvae.quantizers.nearest_search import nearest
from vqvae.quantizers.positionwise import code_counts

NUM_STEPS = 10


def kmeans(
    vectors: Float[Tensor, "n d"], centres: Float[Tensor, "k d"], normalize: bool = False
) -> Float[Tensor, "k d"]:
    """Centres after ten steps from these; a centre that no vector chooses stays. No randomness but that of repetitions.

    Args:
        vectors: at least one.
        centres: vectors to start from, distinct ones first, as `Pool.draw` gives them.
        normalize: keep the centres on the unit sphere.
    """
    # Copies of one vector would never part: shake all but the first of each by a thousandth of the spread.
    num_distinct = len(torch.unique(centres, dim=0))
    if num_distinct < len(centres):
        options = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float32, "device": "cpu"}
        noise = torch.randn(centres.shape, **options).to(centres)
        noise[:num_distinct] = 0
        centres = centres + 1e-3 * vectors.std().nan_to_num(0.0).clamp_min(1e-6) * noise
    for _ in range(NUM_STEPS):
        codes = nearest(vectors, centres)
        counts = code_counts(codes, len(centres))[:, None]
        sums = torch.zeros_like(centres).index_add_(0, codes, vectors)
        centres = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
        if normalize:
            centres = F.normalize(centres, dim=-1)
    return centres
