"""The scale of a discretised normal, by maximum likelihood, for a model that came without one.

An imported tokenizer gives a picture, and a picture is no likelihood before something says how far pixels lie from it.
With features f of given images y, the scale of each channel is

    s = argmax_s  Σ ln P(y | 127.5 (1 + f), s)

under the discretised normal itself (`vqvae.likelihoods.normal`), so bins and ends are counted, which a root mean square
would not. For every channel it is the root of the derivative in ln s. Were levels real numbers, that derivative would
be D/s² − 1 per pixel, D the mean square. So false position (with the Illinois rule) goes by the logarithm of one more
than it, which would then be a straight line in ln s, and in truth is nearly one.
"""

import copy
import math
from collections.abc import Callable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vqvae.autoencoder import Autoencoder
from vqvae.interop.precision import check_float32
from vqvae.likelihoods.normal import Normal

BATCH = 16
# A `Normal` keeps its scale from 0.1 to 128 levels, and has a slope only between.
LOWEST, HIGHEST = math.log(0.1) + 1e-6, math.log(128.0) - 1e-6
# In ln s: a likelihood is flat at its maximum, so a scale so close is as good.
TOLERANCE = 1e-5
MAX_STEPS = 60


@torch.no_grad()
def fit_scale(model: Autoencoder, images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, " c"]:
    """Set the scale of the model's likelihood, a `Normal` that learns it, to that of most likelihood; and return it.

    The networks run once over the images, in batches; their features, four bytes a pixel and channel, are kept on the
    CPU meanwhile. A scale stays within the likelihood's bounds, 0.1 to 128 levels.

    Raises:
        ValueError: another likelihood, one whose scale is fixed, a model in less than float32, where the scale would be
            rounded by up to a 256th, no images, or images of another shape.
    """
    likelihood = model.likelihood
    if not isinstance(likelihood, Normal) or likelihood.scale is not None:
        name = type(likelihood).__name__ + (" with a fixed scale" if isinstance(likelihood, Normal) else "")
        raise ValueError(
            f"got a model with a {name}, expected Normal.Config() with the scale learned; build it with that"
        )
    check_float32(model, "fit the scale of", or_wider=True)
    if not len(images):
        raise ValueError("got no images, expected some to fit the scale to")
    with torch.inference_mode(False), torch.no_grad():  # a slope needs gradients, which inference mode forbids for good
        log_scale = _most_likely(model, likelihood, images)
    likelihood.log_scale.copy_(log_scale)
    model.likelihood_fit = None  # another, which this one takes the place of
    return likelihood.log_scale.exp()


def _most_likely(model: Autoencoder, likelihood: Normal, images: Tensor) -> Tensor:
    """The logarithm of the scale, "c"."""
    device = likelihood.log_scale.device
    levels, features = [], []
    with model.evaluating():
        for batch in images.split(BATCH):
            levels.append(model.to_levels(batch.to(device)).cpu().clone())
            features.append(model(batch.to(device)).features.float().cpu())

    trial = copy.deepcopy(likelihood).requires_grad_()

    def slope(log_scale: Tensor) -> Tensor:
        """d ln P / d ln s of each channel, per pixel."""
        trial.log_scale.copy_(log_scale)
        total = torch.zeros(len(log_scale), dtype=torch.float64)
        for each, given in zip(levels, features, strict=True):
            with torch.enable_grad():
                log_prob = trial.log_prob(each.to(device), given.to(device)).sum()
                total += torch.autograd.grad(log_prob, trial.log_scale)[0].cpu().double()
        return total * (len(log_scale) / (len(images) * model.num_dims))

    return _root(slope, likelihood.log_scale)


def _root(slope: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Where the slope of each channel changes from above to below zero; a bound where it does not."""
    low, high = (torch.full(like.shape, bound, dtype=torch.float64) for bound in (LOWEST, HIGHEST))
    at_low, at_high = (_straightened(slope(bound)) for bound in (low, high))
    last_low = torch.zeros(like.shape, dtype=torch.bool)
    last_high = last_low.clone()
    root = low
    for _ in range(MAX_STEPS):
        before, root = root, low + (high - low) * at_low / (at_low - at_high)
        root = torch.where(at_low <= 0, low, torch.where(at_high >= 0, high, root))
        if (root - before).abs().max() < TOLERANCE:
            break
        here = _straightened(slope(root))
        above = here > 0
        # A side that stays twice counts half, or the other would never move.
        at_high = torch.where(above & last_low, at_high / 2, at_high)
        at_low = torch.where(~above & last_high, at_low / 2, at_low)
        inside = (at_low > 0) & (at_high < 0)
        low, at_low = torch.where(above & inside, root, low), torch.where(above & inside, here, at_low)
        high, at_high = torch.where(~above & inside, root, high), torch.where(~above & inside, here, at_high)
        last_low, last_high = above, ~above
    return root


def _straightened(slope: Tensor) -> Tensor:
    return torch.log1p(slope.clamp_min(-1 + 1e-9))
