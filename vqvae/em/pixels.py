"""Families of pixels: P_k(y) = prod_d P_kd(y_d) for every component k at once, and its exact M step.

- categorical: any distribution over the levels 0..V-1 at each pixel. Bernoulli is V = 2.
- Gaussian: a density over levels taken as real numbers. Its nats are no code length; `Gaussian.discretise`
  has the mass of each level's bin, [y - 1/2, y + 1/2], with the first and the last reaching to infinity.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float64, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from safefolder import Options

NUM_LEVELS = 256
# Table entries worked on at once, 32 MiB of float32; at most so many pixels, since their float32 sum is a partial one.
BLOCK_ELEMENTS = 2**23
MAX_PIXELS = 64
# Images drawn at once.
DRAWN = 256


class Pixels(nn.Module, ABC):
    """The pixels' distributions under each component.

    Attributes:
        num_levels: levels that images may have, from 0 on.
    """

    num_levels: int

    @abstractmethod
    def log_prob(self, levels: UInt8[Tensor, "m d"]) -> Float64[Tensor, "m k"]:
        """ln P_k(y) of each image under each component, in nats."""

    @abstractmethod
    def log_prior(self) -> float:
        """ln of the parameters' prior density, up to a constant; 0 without a prior."""

    @abstractmethod
    def new_statistics(self) -> list[Tensor]:
        """Zeros to accumulate what the M step needs."""

    @abstractmethod
    def accumulate(
        self, statistics: list[Tensor], levels: UInt8[Tensor, "m d"], posterior: Float[Tensor, "m k"]
    ) -> None:
        """Add images, weighted by the components' shares in them."""

    @abstractmethod
    def maximise(self, statistics: list[Tensor], shares: Float64[Tensor, " k"]) -> None:
        """The M step, with shares N_k = sum_n q(k | y_n).

        It takes the statistics over and leaves tensors of their shapes, to be zeroed: new memory is slow to come by.
        """

    @abstractmethod
    def draw(self, components: Int[Tensor, " n"], generator: torch.Generator | None) -> UInt8[Tensor, "n d"]:
        """One image from each of the given components."""


@dataclass(frozen=True, kw_only=True)
class CategoricalPixels(Options):
    """Pixels with a probability for each level.

    Attributes:
        num_levels: levels of the images, 2 to 256.
        alpha: pseudo-count of each level at each pixel of each component. 0 is maximum likelihood, under which
            a level that a pixel never had is impossible. 1, Laplace's, codes new images best.
    """

    num_levels: int = NUM_LEVELS
    alpha: float = 1.0

    def build(self, num_components: int, num_dims: int) -> "Table":
        """The family for so many components and pixels. ValueError: an option out of range."""
        if not 2 <= self.num_levels <= NUM_LEVELS:
            raise ValueError(f"got num_levels={self.num_levels}, expected 2 to {NUM_LEVELS}")
        return Table(num_components, num_dims, self.num_levels, self.alpha)


@dataclass(frozen=True, kw_only=True)
class BernoulliPixels(Options):
    """Binary pixels: images of levels 0 and 1 alone.

    Grey levels taken as probabilities of a 1 are no likelihood of the levels, so they are refused.

    Attributes:
        alpha: pseudo-count of either level, as in `CategoricalPixels`; a half is Jeffreys'.
    """

    alpha: float = 0.5

    def build(self, num_components: int, num_dims: int) -> "Table":
        """The family for so many components and pixels. ValueError: an option out of range."""
        return Table(num_components, num_dims, 2, self.alpha)


@dataclass(frozen=True, kw_only=True)
class GaussianPixels(Options):
    """Pixels with a mean for each component: a density, whose nats are not those of 8-bit levels.

    Attributes:
        variance: in squared levels. "pixel" fits one for each pixel of each component, "shared" a single one;
            a number stays as it is.
        min_variance: the least that is fitted. A component of few images comes down to it at many pixels, and then
            codes new images badly; "shared" does not.
    """

    variance: Literal["pixel", "shared"] | float = "pixel"
    min_variance: float = 1.0

    def build(self, num_components: int, num_dims: int) -> "Gaussian":
        """The family for so many components and pixels. ValueError: an option out of range."""
        if not (self.variance in ("pixel", "shared") or _is_positive(self.variance)):
            raise ValueError(f"got variance={self.variance!r}, expected 'pixel', 'shared' or a positive number")
        if not _is_positive(self.min_variance):
            raise ValueError(f"got min_variance={self.min_variance!r}, expected a positive number of squared levels")
        return Gaussian(num_components, num_dims, self.variance, self.min_variance)


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and 0 < value < math.inf


class Table(Pixels):
    """A table of ln P_kd(v), "(d v) k": a component's pixels lie apart so that an image's rows are added up whole."""

    log_probs: Tensor

    def __init__(self, num_components: int, num_dims: int, num_levels: int, alpha: float) -> None:
        super().__init__()
        # From 1e-30 on, float32 holds alpha beside nothing and ln(alpha / N).
        if not (alpha == 0 or 1e-30 <= alpha < math.inf):
            raise ValueError(f"got alpha={alpha}, expected 0 or a pseudo-count of at least 1e-30")
        self.num_dims, self.num_levels, self.alpha = num_dims, num_levels, alpha
        even = torch.full((num_dims * num_levels, num_components), -math.log(num_levels))
        self.register_buffer("log_probs", even)

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Pixels to work on at once, and their rows of the table."""
        count = max(1, min(MAX_PIXELS, BLOCK_ELEMENTS // (self.num_levels * self.log_probs.shape[1])))
        for start in range(0, self.num_dims, count):
            stop = min(start + count, self.num_dims)
            yield slice(start, stop), slice(start * self.num_levels, stop * self.num_levels)

    def _rows(self, levels: Tensor) -> Tensor:
        """For each pixel its row in the table of a block."""
        return levels.long() + torch.arange(levels.shape[1], device=levels.device) * self.num_levels

    def log_prob(self, levels: UInt8[Tensor, "m d"]) -> Float64[Tensor, "m k"]:
        total = self.log_probs.new_zeros(len(levels), self.log_probs.shape[1], dtype=torch.float64)
        for pixels, rows in self.blocks():
            total += F.embedding_bag(self._rows(levels[:, pixels]), self.log_probs[rows], mode="sum")
        return total

    def log_prior(self) -> float:
        if not self.alpha:
            return 0.0
        # Over the levels in the table's own precision: float64 throughout takes long for the last 1e-7.
        parts = (self.log_probs[rows].unflatten(0, (-1, self.num_levels)).sum(1) for _, rows in self.blocks())
        return self.alpha * sum(float(part.sum(dtype=torch.float64)) for part in parts)

    def new_statistics(self) -> list[Tensor]:
        return [torch.zeros_like(self.log_probs)]

    def accumulate(
        self, statistics: list[Tensor], levels: UInt8[Tensor, "m d"], posterior: Float[Tensor, "m k"]
    ) -> None:
        (counts,) = statistics
        for pixels, rows in self.blocks():
            # A bag for each level of each pixel: the images that have it.
            ordered, order = self._rows(levels[:, pixels]).flatten().sort()
            starts = torch.searchsorted(ordered, torch.arange(rows.stop - rows.start, device=levels.device))
            members = order.div_(pixels.stop - pixels.start, rounding_mode="floor")
            counts[rows] += F.embedding_bag(members, posterior, starts, mode="sum")

    def maximise(self, statistics: list[Tensor], shares: Float64[Tensor, " k"]) -> None:
        (counts,) = statistics
        tiny = torch.finfo(counts.dtype).tiny
        dead = (shares + self.num_levels * self.alpha < tiny).nonzero().squeeze(1)
        for _, rows in self.blocks():
            block = counts[rows].view(-1, self.num_levels, counts.shape[1]).add_(self.alpha)
            # The counts' own sum rather than `shares`, so that rounding leaves distributions.
            total = block.sum(1, keepdim=True)
            block.log_().sub_(total.log_())
            if len(dead):
                counts[rows, dead] = self.log_probs[rows, dead]
        self.log_probs, statistics[0] = counts, self.log_probs

    def draw(self, components: Int[Tensor, " n"], generator: torch.Generator | None) -> UInt8[Tensor, "n d"]:
        device = components.device
        table = self.log_probs.view(self.num_dims, self.num_levels, -1)
        images = torch.empty(len(components), self.num_dims, dtype=torch.uint8, device=device)
        for chosen, image in zip(components.split(DRAWN), images.split(DRAWN), strict=True):
            for pixels, columns in zip(table.split(MAX_PIXELS), image.split(MAX_PIXELS, dim=1), strict=True):
                cdf = pixels[:, :, chosen].double().exp_().cumsum(1)  # d v n
                shape = (len(pixels), 1, len(chosen))
                height = torch.rand(shape, generator=generator, dtype=torch.float64, device=device) * cdf[:, -1:]
                # The first level whose cumulative probability exceeds the height: none without mass.
                columns.copy_((cdf <= height).sum(1).clamp_(max=self.num_levels - 1).T)
        return images


class Gaussian(Pixels):
    """Means "k d", and variances "k d" or one."""

    num_levels = NUM_LEVELS
    mean: Tensor
    variance: Tensor

    def __init__(self, num_components: int, num_dims: int, variance: str | float, min_variance: float) -> None:
        super().__init__()
        self.kind, self.min_variance = variance, min_variance
        initial = variance if not isinstance(variance, str) else max(min_variance, NUM_LEVELS**2 / 12)
        self.register_buffer("mean", torch.full((num_components, num_dims), (NUM_LEVELS - 1) / 2))
        self.register_buffer("variance", torch.full((num_components, num_dims) if variance == "pixel" else (), initial))

    def _centred(self, levels: Tensor) -> Tensor:
        """About the components' average, so that squares of little more than the deviations are summed."""
        return levels.double() - self.mean.double().mean(0)

    def log_prob(self, levels: UInt8[Tensor, "m d"]) -> Float64[Tensor, "m k"]:
        centred, mean, variance = self._centred(levels), self._centred(self.mean), self.variance.double()
        precision = (1 / variance).expand_as(mean)
        constant = mean.square().mul_(precision).sum(1) + (2 * math.pi * variance).log().expand_as(mean).sum(1)
        total = centred @ (mean * precision).T
        total -= centred.square_() @ precision.T / 2
        return total.sub_(constant / 2)

    def log_prior(self) -> float:
        return 0.0

    def new_statistics(self) -> list[Tensor]:
        return [torch.zeros_like(self.mean, dtype=torch.float64) for _ in range(2)]

    def accumulate(
        self, statistics: list[Tensor], levels: UInt8[Tensor, "m d"], posterior: Float[Tensor, "m k"]
    ) -> None:
        sums, squares = statistics
        centred, weights = self._centred(levels), posterior.double().T
        sums += weights @ centred
        squares += weights @ centred.square_()

    def maximise(self, statistics: list[Tensor], shares: Float64[Tensor, " k"]) -> None:
        sums, squares = statistics
        shares = shares[:, None]
        alive = shares >= torch.finfo(self.mean.dtype).tiny
        shift = sums / shares  # from the centre; NaN where there is no share
        old, centre = self.mean.double(), self.mean.double().mean(0)
        self.mean.copy_(torch.where(alive, centre + shift, old))
        if self.kind == "pixel":
            variance = (squares / shares - shift.square()).clamp_(min=self.min_variance)
            self.variance.copy_(torch.where(alive, variance, self.variance.double()))
        elif self.kind == "shared":
            scatter = torch.where(alive, squares - shares * shift.square(), 0).sum()
            self.variance.copy_((scatter / (shares.sum() * shift.shape[1])).clamp_(min=self.min_variance))

    def draw(self, components: Int[Tensor, " n"], generator: torch.Generator | None) -> UInt8[Tensor, "n d"]:
        """Drawn from the density, then rounded into 0..255: draws of the discretised mixture."""
        mean, deviation = self.mean, self.variance.sqrt().expand_as(self.mean)
        images = torch.empty(len(components), mean.shape[1], dtype=torch.uint8, device=mean.device)
        for chosen, image in zip(components.split(DRAWN), images.split(DRAWN), strict=True):
            noise = torch.randn(image.shape, generator=generator, dtype=mean.dtype, device=mean.device)
            image.copy_((mean[chosen] + deviation[chosen] * noise).round_().clamp_(0, NUM_LEVELS - 1))
        return images

    def discretise(self, table: Table) -> None:
        """Fill a table with the masses of the levels' bins.

        With c = |v - mu| / s and h = 1 / 2s a bin within the range has Phi(h - c) - Phi(-h - c), whose logarithm is
        taken from those of its terms, so that it is finite at any distance.
        """
        values = torch.arange(NUM_LEVELS, dtype=torch.float64, device=self.mean.device)[:, None]
        variance = self.variance.expand_as(self.mean)
        for pixel, rows in enumerate(table.log_probs.split(NUM_LEVELS)):
            mean, deviation = self.mean[:, pixel].double(), variance[:, pixel].double().sqrt()
            distance, half = (values - mean).abs_().div_(deviation), 0.5 / deviation
            upper, lower = torch.special.log_ndtr(half - distance), torch.special.log_ndtr(-half - distance)
            masses = upper + (-torch.expm1(lower - upper)).log_()
            masses[0] = torch.special.log_ndtr((0.5 - mean) / deviation)
            masses[-1] = torch.special.log_ndtr((mean - NUM_LEVELS + 1.5) / deviation)
            rows.copy_(masses)
