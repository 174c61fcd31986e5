"""Categorical over the 256 levels of each pixel and channel (van den Oord et al. 2016, PixelRNN).

    P(y = v) = exp(logit_v) / sum_w exp(logit_w)

No order among levels is assumed, so any distribution can be reached, a spike at one level included;
in exchange nothing is shared between neighbouring levels, which has to be learned.

Memory: 256 features for each pixel and channel. A batch of 128 images of 28x28 takes 98 MiB of
features and as much again for their gradient (nothing else of that size is kept); colour at 256x256
takes 192 MiB an image for each of the two. `LogisticMixture` needs ten times less.

Feature layout: logits "(c 256)", of which a symbol's 256 are its parameters. Features of 0 give the
uniform distribution, 8 bits/dim.
"""

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from safefolder.options import Given
from vqvae.likelihoods.base import NUM_LEVELS, Likelihood
from vqvae.likelihoods.chunks import score_in_chunks


class Categorical(Likelihood):
    """256 logits for each pixel and channel, all of them independent.

    Args:
        num_channels: image channels, at least 1.
    """

    def __init__(self, *, num_channels: Given[int] = 1) -> None:
        super().__init__(
            num_channels=num_channels, num_features=NUM_LEVELS * num_channels, num_parameters=NUM_LEVELS, coupled=False
        )

    def log_prob(self, images: UInt8[Tensor, "b c h w"], features: Float[Tensor, "b f h w"]) -> Float[Tensor, " b"]:
        self._check(images, features)
        return score_in_chunks(self._score, images, features, features.shape[1:].numel())

    def _score(self, images: Tensor, features: Tensor, gradient: Tensor | None) -> Tensor:
        logits = self._logits(features)
        levels = rearrange(images.long(), "n c h w -> n c 1 (h w)")
        probs = torch.empty_like(logits) if gradient is None else self._logits(gradient)
        torch.softmax(logits, 2, out=probs)
        # The largest probability of a softmax is exp(largest logit) / sum of exp(logits).
        top, top_prob = logits.amax(2), probs.amax(2)
        values = logits.gather(2, levels).squeeze(2) - top + top_prob.log()
        if gradient is not None:
            probs.neg_().scatter_add_(2, levels, torch.ones_like(levels, dtype=probs.dtype))
        return values.sum((1, 2))

    def mean(self, features: Float[Tensor, "b f h w"]) -> Float[Tensor, "b c h w"]:
        """The expected level, 0..255, exactly."""
        features = self._checked_features(features)
        levels = torch.arange(NUM_LEVELS, dtype=features.dtype, device=features.device)
        means: list[Tensor] = []
        with torch.autocast(features.device.type, enabled=False):  # whose products would be of half precision
            for image in features:
                probs = self._logits(image[None]).softmax(2)[0]
                means.append(torch.einsum("clp,l->cp", probs, levels).unflatten(1, image.shape[1:]))
        return torch.stack(means) if means else features.new_zeros(0, self.num_channels, *features.shape[2:])

    def _pixel_parameters(self, features: Tensor, earlier: Tensor, channels: slice) -> Tensor:
        return features.unflatten(1, (self.num_channels, NUM_LEVELS))[:, channels]

    def _log_pmf(self, parameters: Tensor) -> Tensor:
        return parameters.log_softmax(-1)

    def _cdf(self, parameters: Tensor, levels: Tensor) -> Tensor:
        # Sums of sums of 16: an order of magnitude less rounding than one sum of 256.
        within = parameters.softmax(-1).unflatten(-1, (16, 16)).cumsum_(-1)
        before = within[:, :-1, -1].cumsum(-1)
        within[:, 1:] += before[..., None]
        return within.flatten(1).gather(-1, levels)

    def _logits(self, features: Tensor) -> Float[Tensor, "n c 256 p"]:
        return features.flatten(2).unflatten(1, (self.num_channels, NUM_LEVELS))
