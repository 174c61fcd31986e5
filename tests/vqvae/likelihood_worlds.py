"""Likelihoods of every kind, and features and images for them."""

import torch
from torch import Tensor

from vqvae.likelihoods import Categorical, LogisticMixture, Normal

MEMBERS = {
    "categorical, 1 channel": lambda: Categorical(num_channels=1),
    "categorical, 3 channels": lambda: Categorical(num_channels=3),
    "mixture, 1 channel": lambda: LogisticMixture(num_channels=1),
    "mixture, 1 channel, zero": lambda: LogisticMixture(num_channels=1, zero_component=True),
    "mixture, 1 component": lambda: LogisticMixture(num_channels=1, num_components=1),
    "mixture, 3 channels": lambda: LogisticMixture(num_channels=3),
    "mixture, 3 channels, zero": lambda: LogisticMixture(num_channels=3, num_components=3, zero_component=True),
    "normal, 1 channel": lambda: Normal(num_channels=1),
    "normal, 3 channels": lambda: Normal(num_channels=3),
    "normal, 1 channel, narrow": lambda: Normal(num_channels=1, scale=0.1),
    "normal, 3 channels, fixed": lambda: Normal(num_channels=3, scale=8.0),
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


def pmf_at(table: Tensor, images: Tensor) -> Tensor:
    """The table's probabilities of the images' levels."""
    masses = table.diff(dim=-1, prepend=torch.zeros_like(table[..., :1]))
    return masses.gather(-1, images.long()[..., None])[..., 0]
