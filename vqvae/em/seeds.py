"""Where a fit starts: images far from each other (k-means++, Arthur and Vassilvitskii 2007).

Departure: the seeds come from some random images, so that the time does not grow with the images.
"""

import math

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

# Images that seeds are chosen among, for each component and at least.
CANDIDATES, MIN_CANDIDATES = 4, 1024


def choose_seeds(levels: UInt8[Tensor, "n d"], num: int, generator: torch.Generator | None) -> Float[Tensor, "s d"]:
    """Up to `num` images, far from each other, by k-means++ among some of them; fewer where there are no more.

    The next seed is drawn with a probability in proportion to the squared distance from the nearest one so far.
    """
    chosen = torch.randperm(len(levels), generator=generator, device="cpu")[: max(CANDIDATES * num, MIN_CANDIDATES)]
    candidates = levels[chosen.to(levels.device)].cpu().float()
    squares = candidates.square().sum(1)
    distances = torch.full_like(squares, math.inf)
    seeds = [0]  # the candidates come in random order
    while True:
        seed = candidates[seeds[-1]]
        gaps = torch.addmv(squares + seed.square().sum(), candidates, seed, alpha=-2).clamp_(min=0)
        distances = torch.minimum(distances, gaps)
        distances[seeds[-1]] = 0
        if len(seeds) == num or not distances.any():
            return candidates[seeds]
        seeds.append(int(torch.multinomial(distances, 1, generator=generator)))
