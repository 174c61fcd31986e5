"""Pictures of the same things at each validation, so that one can flip through them and see a run learn.

codebook    the first test images above their reconstructions
prior       samples, two of each class where it knows ten, by the same random numbers

They are made by the first process alone, of the weights that are kept, and change nothing: random numbers are put back
as they were, and samples come of a copy of the prior, as what is prepared of weights to sample with stays with them.
"""

import copy
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from priors import ContinuousPrior, Prior
from vqvae import Autoencoder, exits, pictures
from vqvae.data import Batch
from vqvae.evaluation import images_at_once
from vqvae.training.latents import to_device
from vqvae.training.objectives import CodebookObjective, PriorObjective, RateAwareObjective

# Of images and their reconstructions together.
MOST_PIXELS = 2**20
MOST_IMAGES = 16
# Grids of more positions take long to sample, so there are fewer.
LARGE_GRID = 256
# A picture that takes longer is made only where training takes ten times as long between two.
LONG_SECONDS = 10.0
SHARE = 0.1


class Preview:
    """What a validation draws.

    Args:
        make: the picture, of the objective with the weights that are kept; None for a stage that has none.
        seed: of what is random in it.
    """

    def __init__(self, fabric: Fabric, make: Callable[..., Tensor] | None, seed: int):
        self.fabric, self.make, self.seed = fabric, make, seed
        self.cost, self.ended, self.told = 0.0, -float("inf"), False

    def png(self, kept: Any) -> bytes | None:
        """The picture, as the bytes of a PNG file; None on other processes than the first, and where it has no time."""
        if self.make is None or not self.fabric.is_global_zero:
            return None
        began = time.monotonic()
        if self.cost > LONG_SECONDS and began - self.ended < self.cost / SHARE:
            self._tell(f"a picture takes {self.cost:.0f} s, so that there is none at some validations")
            return None
        device = self.fabric.device
        try:
            with torch.random.fork_rng([] if device.index is None else [device], device_type=device.type):
                torch.manual_seed(self.seed)
                drawn = pictures.to_png(self.make(kept))
        except Exception as error:
            if not isinstance(error, MemoryError) and not exits.is_out_of_memory(error):
                raise
            self._tell("there is not enough memory for pictures while it trains")
            self.cost, self.ended = float("inf"), began
            return None
        self.ended = time.monotonic()
        self.cost = self.ended - began
        return drawn

    def _tell(self, what: str) -> None:
        if not self.told:
            print(f"note: {what}", file=sys.stderr)
        self.told = True


def reconstructions(fabric: Fabric, watched: Batch) -> Callable[..., Tensor]:
    """What draws the first of the watched images above what a codebook makes of them."""
    height, width = watched.images.shape[-2:]
    num = min(MOST_IMAGES, max(4, MOST_PIXELS // (2 * height * width)))
    images = watched.images[:num].to(fabric.device)
    labels = None if watched.labels is None else watched.labels[:num]

    def make(kept: CodebookObjective | RateAwareObjective) -> Tensor:
        out = kept.encoder(to_device(labels, fabric))(images)
        columns = min(8, len(images))
        return pictures.pairs(images, kept.model.reconstruct(out), columns, side=pictures.side_for(columns))

    return make


def samples(model: Autoencoder) -> Callable[..., Tensor]:
    """What draws samples of a prior."""

    def make(kept: PriorObjective) -> Tensor:
        prior = copy.deepcopy(kept.prior)
        return sample_grid(model, prior, 2 if prior.num_positions <= LARGE_GRID else 1)

    return make


def sample_grid(model: Autoencoder, prior: Prior | ContinuousPrior, rows: int, seed: int = 0) -> Tensor:
    """A picture of ten columns, a class each where the prior knows classes, under its name where it has one."""
    num = 10 * rows
    labels = None if prior.num_classes is None else torch.arange(num, device=prior.device) % 10 % prior.num_classes
    generator = torch.Generator(prior.device).manual_seed(seed)
    latents = prior.sample(num, labels=labels, generator=generator)
    images = torch.cat([model.decode(part) for part in latents.split(images_at_once(*model.size))])
    names = prior.class_names or ()
    return pictures.grid(images, 10, heads=[names[column % len(names)] for column in range(10)] if names else ())
