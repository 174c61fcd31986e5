"""The likelihood's own parameters, fitted to a decoder that is finished.

Terms for the eye move the decoder to the end of training, a moving average of weights is no decoder that any step has
seen, and what a likelihood has itself, such as the scale of `Normal`, follows both late. With the decoder as it is
kept, and images y of the training set with their latents z,

    θ  =  argmin_θ  Σ_y  −ln P_dec(y | z; θ)

so that the distortion is as good a bound as this decoder allows. Nothing else moves: codes, features, and the pictures
that are made of them stay as they are, to the bit.

The decoder's features of a sample of images are computed once and kept in bounded memory; then L-BFGS with a strong
Wolfe line search goes over all of them at every look, so there is no learning rate and no randomness. What it finds is
taken only where it costs less. `LocalContext` has weights enough to learn its sample by heart, hence few looks.
"""

import copy
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from vqvae.autoencoder import Autoencoder, LikelihoodFit
from vqvae.data import Images
from vqvae.data.batching import index_batches
from vqvae.interop.scale import HIGHEST, LOWEST
from vqvae.likelihoods import Likelihood, Normal
from vqvae.training.progress import Progress

NUM_IMAGES = 1024
# Of features and pixels that are kept on the CPU; large images are fewer, so that they fit.
MOST_BYTES = 1 << 28
BATCH = 16
# At the whole sample. A scale at the other end of its range takes most of them.
NUM_LOOKS = 40
# In bits/dim. What gains less is done.
TOLERANCE = 1e-5

Skip = Callable[[Iterable[tuple[str, str]]], None]
Pairs = list[tuple[Tensor, Tensor]]


def with_fitted_likelihood(model: Autoencoder, images: Images, *, seed: int, skip: Skip) -> Autoencoder:
    """The model in float32, its likelihood fitted and this noted; itself where its likelihood learns nothing.

    Args:
        images: to take a sample of, the same for a seed.
        skip: is told of images that cannot be read.
    """
    if not list(model.likelihood.parameters()):
        return model
    model = copy.deepcopy(model).float()
    pairs = _features(model, images, seed, skip)
    num = sum(len(levels) for levels, _ in pairs)
    if not num:
        return model
    to_bits = 1 / (num * model.num_dims * math.log(2))
    fitted, first, last = _fit(model.likelihood, pairs, to_bits)
    if not math.isfinite(first):  # nothing is near to what is not finite
        return model
    model.likelihood.load_state_dict(fitted)
    model.likelihood_fit = LikelihoodFit(images=num, before=first, after=last, of=model.decoding_digest())
    return model


@torch.no_grad()
def _features(model: Autoencoder, images: Images, seed: int, skip: Skip) -> Pairs:
    """Levels and features of a sample of images, on the CPU, in batches."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    pairs: Pairs = []
    num = used = 0
    with model.evaluating():
        for indices in index_batches(len(images), BATCH, seed=seed, epochs=1, drop_last=False):
            batch = images.__getitems__(indices)
            skip(batch.skipped)
            if not len(batch.images):
                continue
            levels = batch.images.to(device)
            # The bound is on latents that are sampled, where there is a posterior to sample from.
            out = model.draw(levels, generator) if model.stochastic else model(levels)
            pairs.append((batch.images, out.features.float().cpu()))
            num += len(levels)
            used += sum(each.numel() * each.element_size() for each in pairs[-1])
            if num >= NUM_IMAGES or used >= MOST_BYTES:
                break
    return pairs


def _fit(likelihood: Likelihood, pairs: Pairs, to_bits: float) -> tuple[dict[str, Tensor], float, float]:
    """The weights of least distortion that were found, and the distortion of those given and of these."""
    device = next(likelihood.parameters()).device
    trial = copy.deepcopy(likelihood).eval().requires_grad_()
    trial.to(memory_format=torch.contiguous_format)  # the optimiser flattens gradients by views

    def distortion(of: Likelihood, *, learning: bool) -> float:
        total = 0.0
        with torch.set_grad_enabled(learning):
            for levels, features in pairs:
                cost = -to_bits * of.log_prob(levels.to(device), features.to(device)).sum()
                if learning:
                    cost.backward()
                total += cost.item()
        return total

    def bounded() -> None:
        if isinstance(trial, Normal):  # beyond its bounds a scale has no slope; a long step may lead there
            trial.log_scale.data.clamp_(LOWEST, HIGHEST)

    first = best = distortion(likelihood, learning=False)
    found = copy.deepcopy(likelihood.state_dict())
    left = NUM_LOOKS
    with Progress("likelihood", NUM_LOOKS, "look") as bar:
        while left > 0:
            bounded()
            optimizer = torch.optim.LBFGS(
                trial.parameters(), max_iter=left, max_eval=left, history_size=10, line_search_fn="strong_wolfe"
            )

            def look() -> float:
                nonlocal left
                left -= 1
                bar.update()
                trial.zero_grad()
                return distortion(trial, learning=True)

            optimizer.step(look)
            bounded()
            before, last = best, distortion(trial, learning=False)
            if last < best:
                best, found = last, copy.deepcopy(trial.state_dict())
            if not last < before - TOLERANCE:
                break
    return found, first, best
