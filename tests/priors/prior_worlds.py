"""Small priors over worlds that can be enumerated, one of each kind."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
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


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def strong(kind: type[Prior], **sizes: Any) -> Any:
    """A prior whose weights are large enough that its probabilities are far from uniform, and from each other."""
    torch.manual_seed(7)
    prior = kind(**{"width": 24, "depth": 2, "num_heads": 2, **sizes})
    with torch.no_grad():
        for weight in prior.parameters():
            weight.mul_(0.25 / weight.std())
    return prior.eval()


make_transformer = partial(strong, TransformerPrior)
make_llama = partial(strong, LlamaPrior)
make_any_order = partial(strong, AnyOrderPrior)
make_depth = partial(strong, DepthTransformerPrior)
make_next_scale = partial(strong, NextScalePrior)


def make_unigram() -> UnigramPrior:
    return UnigramPrior(num_codes=3, grid=(2, 2)).fit(
        torch.tensor([[[0, 0], [0, 1]], [[0, 1], [1, 0]], [[0, 0], [0, 0]]])
    )


def make_ngram(*, num_codes: int, grid: tuple[int, ...]) -> NGramPrior:
    """An n-gram prior of grids in which a code is likely to be that of the position before, plus 0 or 1."""
    steps = (torch.rand(2000, math.prod(grid), generator=seeded(7)) < 0.3).long()
    codes = steps.cumsum(1) % num_codes
    return NGramPrior(num_codes=num_codes, grid=grid).fit(codes.reshape(-1, *grid))


def make_pixelcnn(**sizes: Any) -> PixelCNNPrior:
    """A PixelCNN whose probabilities are far from uniform."""
    torch.manual_seed(7)
    prior = PixelCNNPrior(**{"width": 12, "depth": 2, **sizes})
    with torch.no_grad():
        prior.logits.weight.mul_(1.2 / prior.logits.weight.std())
        for layer in prior.layers:
            layer.bias.weight.mul_(3)
    return prior.eval()


# Those with labels have options that are not the defaults.
KINDS = {
    "uniform": lambda: UniformPrior(num_codes=3, grid=(2, 2)),
    "unigram": make_unigram,
    "transformer": lambda: make_transformer(num_codes=3, grid=(2, 2)),
    "transformer-labels": lambda: make_transformer(num_codes=3, grid=(2, 2), num_classes=2),
    "transformer-3d": lambda: make_transformer(num_codes=2, grid=(2, 2, 2)),
    "llama": lambda: make_llama(num_codes=3, grid=(2, 2)),
    "llama-labels": lambda: make_llama(num_codes=3, grid=(2, 2), num_classes=2, mlp_width=40),
    "depth": lambda: make_depth(num_codes=3, grid=(2, 1, 2)),
    "depth-labels": lambda: make_depth(num_codes=3, grid=(1, 2, 2), num_classes=2, code_depth=1),
    "next-scale": lambda: make_next_scale(num_codes=3, scales=(1, 2)),
    "next-scale-labels": lambda: make_next_scale(num_codes=3, scales=(1, 2), num_classes=2),
    "any-order": lambda: make_any_order(num_codes=3, grid=(2, 2)),
    "any-order-labels": lambda: make_any_order(num_codes=3, grid=(2, 2), num_classes=2, raster_share=0.75),
    "ngram": lambda: make_ngram(num_codes=3, grid=(2, 2)),
    "ngram-3d": lambda: make_ngram(num_codes=2, grid=(2, 2, 2)),
    "pixelcnn": lambda: make_pixelcnn(num_codes=3, grid=(2, 2)),
    "pixelcnn-labels": lambda: make_pixelcnn(num_codes=3, grid=(2, 2), num_classes=2, kernel_size=5),
}
LABELLED = [kind for kind in KINDS if kind.endswith("labels")]


def make_mixture(*, dim: int, shift: float = 0.0, scale: float = 1.0, **sizes: Any) -> MixtureTransformerPrior:
    """A mixture transformer far from N(0, I), whose components are neither narrow nor far out."""
    torch.manual_seed(7)
    sizes = {"width": 16, "depth": 1, "num_heads": 2, "num_components": 3, **sizes}
    prior = MixtureTransformerPrior(dim=dim, **sizes)
    with torch.no_grad():
        for weight in prior.parameters():
            weight.mul_(0.25 / weight.std())
        prior.mixture.weight.mul_(0.35)
        prior.mixture.bias[sizes["num_components"] :][: sizes["num_components"] * dim].mul_(5)  # the means
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


def some_codes(prior: Prior, num: int, seed: int = 0) -> Tensor:
    return torch.randint(prior.num_codes, (num, *prior.grid), generator=seeded(seed))


def offered(prior: Prior, codes: Tensor, labels: Tensor | None = None, **options: Any) -> Tensor:
    """The conditionals "b m k" of a walk that takes `codes` "b m", which stand in the order of the walk."""
    flat, conditionals = codes.flatten(1), []

    def follow(log_probs: Tensor) -> Tensor:
        conditionals.append(log_probs)
        return flat[:, len(conditionals) - 1]

    prior.walk(len(flat), follow, labels, **options)
    return torch.stack(conditionals, 1)


def rebuilt(prior: Any, **changes: Any) -> Any:
    """The same weights under another config."""
    twin = replace(prior.config, **changes).build().to(prior.dtype)
    twin.load_state_dict(prior.state_dict())
    return twin.eval()
