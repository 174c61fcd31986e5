"""Small priors over worlds that can be enumerated, one of each kind."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from priors import (
    AnyOrderPrior,
    ContinuousPrior,
    DepthTransformerPrior,
    LlamaPrior,
    MixtureTransformerPrior,
    NextScalePrior,
    NGramPrior,
    NormalPrior,
    PixelCNNPrior,
    Prior,
    Sampling,
    TransformerPrior,
    UniformPrior,
    UnigramPrior,
)


def sampled(prior: Prior, num: Any, labels: Any = None, **options: Any) -> Tensor:
    """`Prior.sample`, by options of `Sampling` among its other arguments."""
    empty = torch.zeros(0, *prior.grid, dtype=torch.int64, device=prior.device)
    return torch.cat([empty, *blocks_of(prior, num, labels, **options)])


def blocks_of(prior: Prior, num: Any, labels: Any = None, **options: Any) -> Iterator[Tensor]:
    """`Prior.samples`, likewise."""
    names = {each.name for each in fields(Sampling)}
    sampling = Sampling(**{name: value for name, value in options.items() if name in names})
    others = {name: value for name, value in options.items() if name not in names}
    return prior.samples(num, labels, sampling, **others)


def make_transformer(
    *, num_codes: int, grid: tuple[int, ...], num_classes: int | None = None, **sizes: float
) -> TransformerPrior:
    """A transformer whose weights are large enough that its probabilities are far from uniform."""
    sizes = {"width": 24, "depth": 2, "num_heads": 2, **sizes}
    torch.manual_seed(7)
    prior = TransformerPrior(num_codes=num_codes, grid=grid, num_classes=num_classes, **sizes)
    with torch.no_grad():
        for weight in prior.parameters():
            weight.mul_(0.25 / weight.std())
    return prior.eval()


def make_llama(*, num_codes: int, grid: tuple[int, ...], num_classes: int | None = None, **sizes: float) -> LlamaPrior:
    """As `make_transformer`, in the design of Llama."""
    sizes = {"width": 24, "depth": 2, "num_heads": 2, **sizes}
    torch.manual_seed(7)
    prior = LlamaPrior(num_codes=num_codes, grid=grid, num_classes=num_classes, **sizes)
    with torch.no_grad():
        for weight in prior.parameters():
            weight.mul_(0.25 / weight.std())
    return prior.eval()


def make_any_order(
    *, num_codes: int, grid: tuple[int, ...], num_classes: int | None = None, **sizes: float
) -> AnyOrderPrior:
    """An any-order transformer whose distributions are far from uniform, and from each other."""
    sizes = {"width": 24, "depth": 2, "num_heads": 2, **sizes}
    torch.manual_seed(7)
    prior = AnyOrderPrior(num_codes=num_codes, grid=grid, num_classes=num_classes, **sizes)
    with torch.no_grad():
        for weight in prior.parameters():
            weight.mul_(0.25 / weight.std())
    return prior.eval()


def make_depth(*, num_codes: int, grid: tuple[int, ...], **sizes: Any) -> DepthTransformerPrior:
    """As `make_transformer`, over the last axis by a transformer of its own."""
    sizes = {"width": 24, "depth": 2, "code_depth": 2, "num_heads": 2, **sizes}
    torch.manual_seed(7)
    prior = DepthTransformerPrior(num_codes=num_codes, grid=grid, **sizes)
    with torch.no_grad():
        for weight in prior.parameters():
            weight.mul_(0.25 / weight.std())
    return prior.eval()


def make_next_scale(*, num_codes: int, scales: tuple[int, ...], **sizes: Any) -> NextScalePrior:
    """As `make_transformer`, scale by scale."""
    sizes = {"width": 24, "depth": 2, "num_heads": 2, **sizes}
    torch.manual_seed(7)
    prior = NextScalePrior(num_codes=num_codes, scales=scales, **sizes)
    with torch.no_grad():
        for weight in prior.parameters():
            weight.mul_(0.25 / weight.std())
    return prior.eval()


def make_unigram() -> UnigramPrior:
    return UnigramPrior(num_codes=3, grid=(2, 2)).fit(
        torch.tensor([[[0, 0], [0, 1]], [[0, 1], [1, 0]], [[0, 0], [0, 0]]])
    )


def make_ngram(*, num_codes: int, grid: tuple[int, ...]) -> NGramPrior:
    """An n-gram prior of grids in which a code is likely to be that of the position before, plus 0 or 1."""
    generator = torch.Generator().manual_seed(7)
    steps = (torch.rand(2000, math.prod(grid), generator=generator) < 0.3).long()
    codes = steps.cumsum(1) % num_codes
    return NGramPrior(num_codes=num_codes, grid=grid).fit(codes.reshape(-1, *grid))


def make_pixelcnn(
    *, num_codes: int, grid: tuple[int, ...], num_classes: int | None = None, **sizes: float
) -> PixelCNNPrior:
    """A PixelCNN whose probabilities are far from uniform."""
    sizes = {"width": 12, "depth": 2, **sizes}
    torch.manual_seed(7)
    prior = PixelCNNPrior(num_codes=num_codes, grid=grid, num_classes=num_classes, **sizes)
    with torch.no_grad():
        prior.logits.weight.mul_(1.2 / prior.logits.weight.std())
        for layer in prior.layers:
            layer.bias.weight.mul_(3)
    return prior.eval()


KINDS = {
    "uniform": lambda: UniformPrior(num_codes=3, grid=(2, 2)),
    "unigram": make_unigram,
    "transformer": lambda: make_transformer(num_codes=3, grid=(2, 2)),
    "transformer-labels": lambda: make_transformer(num_codes=3, grid=(2, 2), num_classes=2),
    "transformer-1d": lambda: make_transformer(num_codes=3, grid=(4,)),
    "transformer-3d": lambda: make_transformer(num_codes=2, grid=(2, 2, 2)),
    "llama": lambda: make_llama(num_codes=3, grid=(2, 2)),
    "llama-labels": lambda: make_llama(num_codes=3, grid=(2, 2), num_classes=2),
    "llama-3d": lambda: make_llama(num_codes=2, grid=(2, 2, 2)),
    "depth": lambda: make_depth(num_codes=3, grid=(2, 1, 2)),
    "depth-labels": lambda: make_depth(num_codes=3, grid=(1, 2, 2), num_classes=2),
    "next-scale": lambda: make_next_scale(num_codes=3, scales=(1, 2)),
    "next-scale-labels": lambda: make_next_scale(num_codes=3, scales=(1, 2), num_classes=2),
    "any-order": lambda: make_any_order(num_codes=3, grid=(2, 2)),
    "any-order-labels": lambda: make_any_order(num_codes=3, grid=(2, 2), num_classes=2),
    "ngram": lambda: make_ngram(num_codes=3, grid=(2, 2)),
    "ngram-1d": lambda: make_ngram(num_codes=3, grid=(4,)),
    "ngram-3d": lambda: make_ngram(num_codes=2, grid=(2, 2, 2)),
    "pixelcnn": lambda: make_pixelcnn(num_codes=3, grid=(2, 2)),
    "pixelcnn-labels": lambda: make_pixelcnn(num_codes=3, grid=(2, 2), num_classes=2),
}


def make_mixture(
    *,
    dim: int,
    grid: tuple[int, ...],
    num_classes: int | None = None,
    shift: float = 0.0,
    scale: float = 1.0,
    **sizes: float,
) -> MixtureTransformerPrior:
    """A mixture transformer far from N(0, I), whose components are neither narrow nor far out."""
    sizes = {"width": 16, "depth": 1, "num_heads": 2, "num_components": 3, **sizes}
    torch.manual_seed(7)
    config = MixtureTransformerPrior.Config(dim=dim, grid=grid, num_classes=num_classes, **sizes)
    prior = config.build()
    with torch.no_grad():
        for weight in prior.parameters():
            weight.mul_(0.25 / weight.std())
        prior.mixture.weight.mul_(0.35)
        means = slice(config.num_components, config.num_components * (1 + dim))
        prior.mixture.bias[means].mul_(5)
        # Channels differ, as a scale that is applied to the wrong one must be seen.
        prior.shift.copy_(shift * (1 + torch.arange(dim)))
        prior.scale.copy_(scale ** (1 + torch.arange(dim)))
    return prior.eval()


CONTINUOUS = {
    "normal": NormalPrior,
    "mixture": make_mixture,
    "mixture-standardised": lambda **sizes: make_mixture(**sizes, shift=0.7, scale=1.6),
    "mixture-labels": lambda **sizes: make_mixture(**sizes, num_classes=2),
}


def every_grid(prior: Prior) -> Tensor:
    """All grids of the prior's world, "K^N *grid", the last position changing fastest."""
    world = itertools.product(range(prior.num_codes), repeat=math.prod(prior.grid))
    return torch.tensor(list(world)).reshape(-1, *prior.grid)


def some_labels(prior: Prior | ContinuousPrior, num: int) -> Tensor | None:
    return None if prior.num_classes is None else torch.arange(num) % prior.num_classes
