"""How far two sets of images are apart, from a feature vector of each image.

    Fréchet   ‖μ − ν‖² + tr(Σ + Τ − 2 (ΣΤ)^½)                                    (Heusel et al. 2017)
    kernel    E k(x, x') + E k(y, y') − 2 E k(x, y),  k(x, y) = (xᵀy/d + 1)³      (Bińkowski et al. 2018)
    precision the share of ys within the reach of an x, recall of xs within that of a y, where the reach of a vector is
              its distance to its k-th neighbour in its own set                     (Kynkäänniemi et al. 2019)

The Fréchet distance grows as sets shrink, so it compares only between sets of equal size; the kernel distance is the
unbiased one, over all pairs of different images, and may come out below zero; where y was made of x, an image and what
was made of it are no such pair. In Inception's features they are known as FID and KID.

Each estimate carries an interval: 1.96 standard deviations to either side, of the figure over bootstrap resamples of
the images; for the Fréchet distance to first order in how often each image stands in a resample (the infinitesimal
jackknife, Efron 1982), as resamples that hold images twice lie too far away and each costs two eigenproblems.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

# Resamples for an interval.
NUM_RESAMPLES = 200
_SPREAD = 1.96
# k of precision and recall.
NEIGHBOURS = 3
# Rows of a matrix of pairs that are worked on at once.
_ROWS = 1024


@dataclass(frozen=True)
class Estimate:
    """A figure and the interval in which it lies in 95 of 100 draws of as many images."""

    value: float
    low: float
    high: float

    @classmethod
    def around(cls, value: float, deviation: float) -> "Estimate":
        """From a standard deviation."""
        return cls(value, value - _SPREAD * deviation, value + _SPREAD * deviation)


def mean_estimate(values: Float[Tensor, " n"]) -> Estimate:
    """The mean of a figure of each image.

    Raises:
        ValueError: fewer than two values.
    """
    _check_number(values)
    values = values.double().cpu()
    return Estimate.around(
        values.mean().item(), torch.stack([(w * values).mean() for w in _weights(len(values))]).std().item()
    )


def frechet_distance(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], *, paired: bool = False) -> Estimate:
    """The Fréchet distance of two sets, in float64.

    Args:
        x: features of the images to compare with.
        y: features of those in question.
        paired: whether y[i] was made of x[i], so that a resample holds both.

    Raises:
        ValueError: fewer than two images in a set, other widths, or features that are not finite.
    """
    x, y = _in_their_span(*_checked(x, y, paired))
    mean_x, cov_x = _moments(x)
    mean_y, cov_y = _moments(y)
    # tr (ΣΤ)^½ = tr (Σ^½ Τ Σ^½)^½, whose eigenvalues are real.
    root, inverse_root = _roots(cov_x)
    middle = root @ cov_y @ root
    middle_root, inverse_middle_root = _roots((middle + middle.T) / 2)
    between = mean_x - mean_y
    value = between.square().sum() + cov_x.trace() + cov_y.trace() - 2 * middle_root.trace()
    # What the figure gains per share of one more image at a vector, less the mean over the set.
    of_x = _gain(x - mean_x, between, inverse_root @ middle_root @ inverse_root)
    of_y = _gain(y - mean_y, -between, root @ inverse_middle_root @ root)
    if paired:
        variance = ((of_x + of_y) / len(x)).square().sum()
    else:
        variance = (of_x / len(x)).square().sum() + (of_y / len(y)).square().sum()
    return Estimate.around(value.clamp_min(0).item(), variance.sqrt().item())


def kernel_distance(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], *, paired: bool = False) -> Estimate:
    """The kernel distance of two sets, unbiased; arguments and errors as `frechet_distance`."""
    x, y = _checked(x, y, paired)
    pairs = list(_both(x, y, paired))
    w = torch.stack([x.new_ones(len(x)), *(w for w, _ in pairs)])
    v = torch.stack([y.new_ones(len(y)), *(v for _, v in pairs)])
    within = _within(x, w) + _within(y, v)
    across = torch.zeros_like(within)
    for start in range(0, len(x), _ROWS):
        rows = slice(start, start + _ROWS)
        across += (w[:, rows] @ _kernel(x[rows], y) * v).sum(1)
    pairs_across = w.sum(1) * v.sum(1)
    if paired:  # an image and what was made of it are not two draws: those pairs are left out (Gretton et al. 2012)
        across -= (w * v) @ ((x * y).sum(1) / x.shape[1] + 1) ** 3
        pairs_across -= (w * v).sum(1)
    values = within - 2 * across / pairs_across
    # A resample may hold one image alone, of which there are no pairs.
    resampled = values[1:][torch.isfinite(values[1:])]
    return Estimate.around(values[0].item(), resampled.std().item())


def precision_recall(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], *, neighbours: int = NEIGHBOURS
) -> tuple[Estimate, Estimate]:
    """How many of `y` look like one of `x`, and how many of `x` like one of `y`.

    Their intervals are of which images are asked for, with the reaches as they are.

    Args:
        x: features of the images to compare with.
        y: features of those in question.
        neighbours: k, whose distance is the reach.

    Raises:
        ValueError: as `frechet_distance`, or sets of no more than `neighbours` images.
    """
    x, y = _checked(x, y, paired=False)
    if min(len(x), len(y)) <= neighbours:
        raise ValueError(f"precision and recall need more than {neighbours} images, got {len(x)} and {len(y)}")
    return mean_estimate(_reached(y, x, neighbours)), mean_estimate(_reached(x, y, neighbours))


def _reached(asked: Tensor, centres: Tensor, neighbours: int) -> Float[Tensor, " n"]:
    """1 for each vector that lies within the reach of a centre."""
    # A centre is its own first neighbour. Distances are exact to a millionth of the vectors' length: equal ones reach.
    slack = 1e-6 * centres.norm(dim=1).max()
    reach = torch.cat([torch.cdist(rows, centres).kthvalue(neighbours + 1).values for rows in centres.split(_ROWS)])
    return torch.cat([(torch.cdist(rows, centres) <= reach + slack).any(1) for rows in asked.split(_ROWS)]).double()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _within(x: Tensor, weights: Float64[Tensor, "r n"]) -> Float64[Tensor, " r"]:
    """The mean kernel over pairs of different images of a set, for each row of weights."""
    total = torch.zeros(len(weights), dtype=x.dtype, device=x.device)
    for start in range(0, len(x), _ROWS):
        rows = slice(start, start + _ROWS)
        kernel = _kernel(x[rows], x)
        kernel[torch.arange(len(kernel)), torch.arange(start, start + len(kernel))] = 0
        total += (weights[:, rows] @ kernel * weights).sum(1)
    return total / (weights.sum(1) ** 2 - weights.square().sum(1))


def _in_their_span(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The same vectors in fewer coordinates, where there are fewer vectors than those."""
    both = torch.cat([x, y])
    if len(both) < both.shape[1]:
        both = both @ torch.linalg.qr(both.T).Q
    return both[: len(x)], both[len(x) :]


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean(0)
    return mean, (x - mean).T @ (x - mean) / (len(x) - 1)


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of a positive semidefinite matrix, and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(0)
    inverse = torch.where(values > 1e-12 * values[-1], values.rsqrt(), 0.0)
    return vectors * values.sqrt() @ vectors.T, vectors * inverse @ vectors.T


def _gain(centred: Tensor, between: Tensor, transport: Tensor) -> Tensor:
    """‖x‖² − xᵀTx + 2 x·(μ − ν) of each vector, less its mean; T is the transport map between the two Gaussians."""
    gain = centred.square().sum(1) - (centred @ transport * centred).sum(1) + 2 * centred @ between
    return gain - gain.mean()


def _weights(num: int, seed: int = 0) -> Iterator[Float64[Tensor, " n"]]:
    """How often each of `num` images stands in a resample; the same at every call."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(NUM_RESAMPLES):
        yield torch.randint(num, (num,), generator=generator).bincount(minlength=num).double()


def _both(x: Tensor, y: Tensor, paired: bool) -> Iterator[tuple[Tensor, Tensor]]:
    of_x = _weights(len(x))
    of_y = _weights(len(y), seed=0 if paired else 1)
    for w, v in zip(of_x, of_y, strict=True):
        yield w.to(x.device), v.to(y.device)


def _checked(x: Tensor, y: Tensor, paired: bool) -> tuple[Float64[Tensor, "n d"], Float64[Tensor, "m d"]]:
    for features in (x, y):
        _check_number(features)
        if not torch.isfinite(features).all():
            raise ValueError("got features that are not finite")
    if x.shape[1:] != y.shape[1:] or x.ndim != 2:
        raise ValueError(f"got features of shapes {tuple(x.shape)} and {tuple(y.shape)}, expected (n, d) and (m, d)")
    if paired and len(x) != len(y):
        raise ValueError(f"got {len(x)} and {len(y)} images for pairs")
    return x.double(), y.double()


def _check_number(values: Tensor) -> None:
    if len(values) < 2:
        raise ValueError(f"a figure with an interval needs at least two images, got {len(values)}")
