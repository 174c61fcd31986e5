"""Likelihoods of every kind, and features and images for them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from vqvae.likelihoods import Categorical, LocalContext, LogisticMixture, Normal


def local_context(**options) -> LocalContext:
    """With weights that are not those of the start, at which pixels do not look at each other."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        likelihood = LocalContext(width=6, num_blocks=2, **options)
        for parameter in likelihood.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return likelihood


MEMBERS = {
    "categorical, 1 channel": lambda: Categorical(num_channels=1),
    "categorical, 3 channels": lambda: Categorical(num_channels=3),
    "mixture, 1 channel, zero": lambda: LogisticMixture(num_channels=1, zero_component=True),
    "mixture, 1 component": lambda: LogisticMixture(num_channels=1, num_components=1),
    "mixture, 3 channels": lambda: LogisticMixture(num_channels=3),
    "mixture, 3 channels, zero": lambda: LogisticMixture(num_channels=3, num_components=3, zero_component=True),
    "local context, 1 channel, zero": lambda: local_context(num_channels=1, num_components=3, zero_component=True),
    "local context, 3 channels": lambda: local_context(num_channels=3, num_components=2),
    "normal, 1 channel": lambda: Normal(num_channels=1),
    "normal, 3 channels": lambda: Normal(num_channels=3),
    "normal, 1 channel, narrow": lambda: Normal(num_channels=1, scale=0.1),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_features(likelihood, batch=6, size=3, dtype=torch.float64, spread=1.0) -> Tensor:
    shape = (batch, likelihood.num_features, size, size)
    return torch.randn(shape, generator=generator(1), dtype=torch.float64).mul(spread).to(dtype)


def some_images(likelihood, batch=6, size=3) -> Tensor:
    """Random levels, with many at both ends and the first image black."""
    shape = (batch, likelihood.num_channels, size, size)
    levels = torch.randint(-60, 316, shape, generator=generator(2)).clamp(0, 255)
    levels[0] = 0
    return levels.to(torch.uint8)


def pixels(images: Tensor) -> Tensor:
    """Each pixel as an image of its own."""
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1], 1, 1)


def known_levels(likelihood, images: Tensor) -> Iterator[Tensor]:
    """The images' levels, a step of the walk at a time."""
    for symbols in likelihood.order(*images.shape[2:]):
        yield images.flatten(1)[:, symbols].flatten().long()


def cdf_table(likelihood, features: Tensor, images: Tensor) -> Tensor:
    """P(level <= v) for all v, "b c h w 256"."""
    parameters = likelihood.symbol_parameters(images, features.double())
    return likelihood.cdf(parameters, torch.arange(256).expand(*images.shape, 256))


def pmf_table(likelihood, features: Tensor, images: Tensor) -> Tensor:
    table = cdf_table(likelihood, features, images)
    return table.diff(dim=-1, prepend=torch.zeros_like(table[..., :1]))


def pmf_at(likelihood, features: Tensor, images: Tensor) -> Tensor:
    """The probabilities of the images' levels."""
    return pmf_table(likelihood, features, images).gather(-1, images.long()[..., None])[..., 0]
