"""Mixtures small enough to enumerate, and their plain loops."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from vqvae.em import BernoulliPixels, CategoricalPixels, GaussianPixels, Mixture

FOUR = CategoricalPixels(num_levels=4, alpha=0.3)
FAMILIES = {
    "categorical": FOUR,
    "categorical, alpha 0": CategoricalPixels(num_levels=4, alpha=0.0),
    "Bernoulli": BernoulliPixels(alpha=0.2),
    "Gaussian": GaussianPixels(min_variance=0.05),
    "Gaussian, shared": GaussianPixels(variance="shared", min_variance=0.05),
    "Gaussian, fixed": GaussianPixels(variance=0.7),
}
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def every_image(num_levels: int, num_dims: int) -> Tensor:
    levels = torch.tensor(list(itertools.product(range(num_levels), repeat=num_dims)))
    return levels.to(torch.uint8).view(-1, 1, 1, num_dims)


def num_levels(family) -> int:
    return 2 if isinstance(family, BernoulliPixels) else 4


def some_images(family, num: int, seed: int = 0, num_dims: int = 3) -> Tensor:
    """Images of two clusters, so that components have something to find."""
    generator = seeded(seed)
    centres = torch.randint(num_levels(family), (2, num_dims), generator=generator)
    noise = torch.randint(num_levels(family), (num, num_dims), generator=generator)
    levels = centres[torch.randint(2, (num,), generator=generator)]
    keep = torch.rand(num, num_dims, generator=generator) < 0.6
    return torch.where(keep, levels, noise).to(torch.uint8).view(num, 1, 1, num_dims)


def random_mixture(family, num_components: int = 3, num_dims: int = 3, seed: int = 0) -> Mixture:
    """In float64, with uneven parameters."""
    model = Mixture(num_components=num_components, shape=(1, 1, num_dims), pixels=family).double()
    generator = seeded(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    model.log_weights.copy_(normal(num_components).log_softmax(0))
    if isinstance(family, GaussianPixels):
        model.pixels.mean.copy_(1.5 + normal(num_components, num_dims))
        if isinstance(family.variance, str):
            model.pixels.variance.copy_(normal(*model.pixels.variance.shape).exp())
    else:
        tables = normal(num_dims, num_levels(family), num_components).mul(2).log_softmax(1)
        model.pixels.log_probs.copy_(tables.flatten(0, 1))
    return model


def plain_joint(model: Mixture, images: Tensor) -> Tensor:
    """ln pi_k + ln P_k(y), one number at a time."""
    joint = torch.zeros(len(images), model.config.num_components, dtype=torch.float64)
    for n, image in enumerate(images.flatten(1).tolist()):
        for k in range(model.config.num_components):
            joint[n, k] = model.log_weights[k]
            for d, level in enumerate(image):
                if isinstance(model.config.pixels, GaussianPixels):
                    variance = model.pixels.variance.expand_as(model.pixels.mean)[k, d].item()
                    square = (level - model.pixels.mean[k, d].item()) ** 2
                    joint[n, k] -= square / variance / 2 + math.log(2 * math.pi * variance) / 2
                else:
                    joint[n, k] += model.pixels.log_probs[d * model.pixels.num_levels + level, k]
    return joint


def state(model: Mixture) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], **tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **tolerance)
