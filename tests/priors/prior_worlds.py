"""Small priors over worlds that can be enumerated, one of each kind."""

import itertools
import math

import torch
from torch import Tensor

from priors import Prior, TransformerPrior, TransformerPriorConfig, UniformPrior, UnigramPrior


def make_transformer(
    *, num_codes: int, grid: tuple[int, ...], num_classes: int | None = None, **sizes: float
) -> TransformerPrior:
    """A transformer whose weights are large enough that its probabilities are far from uniform."""
    sizes = {"width": 24, "depth": 2, "num_heads": 2, **sizes}
    torch.manual_seed(7)
    prior = TransformerPrior(TransformerPriorConfig(num_codes=num_codes, grid=grid, num_classes=num_classes, **sizes))
    with torch.no_grad():
        for weight in prior.parameters():
            weight.mul_(0.25 / weight.std())
    return prior.eval()


def make_unigram() -> UnigramPrior:
    return UnigramPrior(num_codes=3, grid=(2, 2)).fit(
        torch.tensor([[[0, 0], [0, 1]], [[0, 1], [1, 0]], [[0, 0], [0, 0]]])
    )


KINDS = {
    "uniform": lambda: UniformPrior(num_codes=3, grid=(2, 2)),
    "unigram": make_unigram,
    "transformer": lambda: make_transformer(num_codes=3, grid=(2, 2)),
    "transformer-labels": lambda: make_transformer(num_codes=3, grid=(2, 2), num_classes=2),
    "transformer-1d": lambda: make_transformer(num_codes=3, grid=(4,)),
    "transformer-3d": lambda: make_transformer(num_codes=2, grid=(2, 2, 2)),
}


def every_grid(prior: Prior) -> Tensor:
    """All grids of the prior's world, "K^N *grid", the last place changing fastest."""
    world = itertools.product(range(prior.num_codes), repeat=math.prod(prior.grid))
    return torch.tensor(list(world)).reshape(-1, *prior.grid)


def some_labels(prior: Prior, num: int) -> Tensor | None:
    return None if prior.num_classes is None else torch.arange(num) % prior.num_classes
