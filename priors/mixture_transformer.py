"""A decoder-only transformer over grids of real vectors, with a mixture of Gaussians at each position.

Tschannen, Eastwood & Mentzer 2023, "GIVT: Generative infinite-vocabulary transformers", causal kind:

    u = (z - shift) / scale                                              per channel, fixed
    x_1 = start(label),  x_i = W u_{i-1}  ->  `priors.trunk`  ->  features_i
    (a, m, r) = Linear(features_i),       s = exp(-7 + softplus(r + 7))
    p(u_i | before, label) = sum_c softmax(a)_c prod_j N(u_ij; m_cj, s_cj^2)
    ln p(z | label) = sum_i ln p(u_i | before, label) - N sum_j ln scale_j

so one linear map takes the place of a code's embedding and mixture parameters that of its logits.

- `shift` and `scale`, 0 and 1 until `standardise(latents)` sets them, let latents of any unit meet a
  model that starts near N(0, I). They are saved with the weights and take no gradient.
- The floor e^-7 (in standard units) of a standard deviation: where latents lie on a surface of fewer
  dimensions than d, or repeat, the likelihood of a Gaussian has no maximum, and ever narrower ones
  give an infinite density. With the floor a position has at most 6.1 d nats. Softplus, as a clamp would
  give no gradient to a component that has come to the floor.
- The head starts small: N(0, 0.001) weights, logits 0, log-standard deviations 0, means N(0, 0.1), so
  that components differ and can part.
- Both linear maps, and all behind the last, are in float32 or better under any autocast: they read
  and write numbers, of which bfloat16 would keep three digits.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from priors.continuous import ContinuousPrior, draw_noise
from priors.grid import check_size
from priors.kv_cache import raster_walk
from priors.precision import Arithmetic
from priors.sampling import Sampling, random_chooser
from priors.trunk import GridTrunk, StartToken, initialise, widen
from priors.trunk_model import TrunkModel
from safefolder.arrays import Vectors
from safefolder.configured import ConfiguredOptions

_LOWEST_LOG_STD = -7.0


class MixtureTransformerPrior(ContinuousPrior, TrunkModel):
    """An autoregressive transformer over a grid of vectors.

    Beside these its options are those of `TrunkModel`.

    Args:
        num_components: Gaussians in the mixture at each position.

    >>> prior = MixtureTransformerPrior(dim=4, grid=(7, 7))
    >>> latents = 3 * torch.randn(64, 7, 7, 4) + 1
    >>> prior.standardise(latents).log_prob(latents).shape
    torch.Size([64])
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, *, num_components: int = 8, **options: Any):
        super().__init__(**options)
        config = self.config
        self.vector = nn.Linear(config.dim, config.width, bias=False)
        self.start = StartToken(self.num_classes, config.width, config.label_dropout)
        self.trunk = GridTrunk(config, self.grid)
        self.mixture = nn.Linear(config.width, num_components * (1 + 2 * config.dim))
        self.register_buffer("shift", torch.zeros(config.dim))
        self.register_buffer("scale", torch.ones(config.dim))
        initialise(self)
        nn.init.normal_(self.mixture.weight, std=0.001)
        nn.init.zeros_(self.mixture.bias)
        means = slice(num_components, num_components * (1 + config.dim))
        with torch.no_grad():
            self.mixture.bias[means].normal_(std=0.1)

    @classmethod
    def check_options(cls, options: ConfiguredOptions) -> None:
        check_size(options.num_components, "num_components")
        super().check_options(options)

    @torch.no_grad()
    def standardise(self, latents: Vectors) -> "MixtureTransformerPrior":
        """Set `shift` and `scale` to the mean and standard deviation of each channel over images and positions.

        Call it once, before training, with a good share of the training latents: weights that were
        trained under another scale no longer fit. Returns the prior itself.
        Raises ValueError for latents that `log_prob` refuses, and for a channel that does not vary.
        """
        flat = self._check_latents(latents).flatten(0, 1)
        if len(flat) == 0:
            raise ValueError("got no latents, expected one grid or more to standardise by")
        scale, shift = torch.std_mean(flat, 0, correction=0)
        # What is left of a constant after the rounding of its mean is no spread.
        varies = scale > 1e-6 * shift.abs()
        if still := (~varies).nonzero().flatten().tolist():
            raise ValueError(f"got latents that are the same everywhere in channels {still}: no density fits those")
        self.shift.copy_(shift)
        self.scale.copy_(scale)
        return self

    def _log_prob(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        scale = widen(self.scale)
        units = (latents - widen(self.shift)) / scale
        features = self.trunk(self.start(len(units), labels), _in_full(self.vector, units[:, :-1]))
        return self._mixtures(features).log_prob(units).sum(1) - self.num_positions * scale.log().sum()

    def _start_walk(self, num: int, labels: Tensor | None) -> Callable[[Tensor], "_Mixture"]:
        """A step takes the standardised vectors "b n d" fixed since the last, and gives the next position's mixture."""
        advance = raster_walk(self.trunk, self.start(num, labels), Arithmetic(self.dtype))
        return lambda fixed: self._mixtures(advance(_in_full(self.vector, fixed)))

    def _sample(self, num: int, labels: Tensor | None, temperature: float, generator: torch.Generator | None) -> Tensor:
        units = torch.zeros(num, self.num_positions, self.dim, dtype=self.dtype, device=self.device)
        step = self._start_walk(num, labels)
        for position in range(self.num_positions):
            mixture = step(units[:, max(position - 1, 0) : position])
            units[:, position] = mixture.sample(temperature, generator)
        return widen(self.shift) + widen(self.scale) * units

    def _mixtures(self, features: Tensor) -> "_Mixture":
        out = widen(_in_full(self.mixture, features))
        m, d = self.config.num_components, self.dim
        logits, means, raw = out.split((m, m * d, m * d), -1)
        log_stds = _LOWEST_LOG_STD + F.softplus(raw - _LOWEST_LOG_STD)
        means, log_stds = (rearrange(each, "... (m d) -> ... m d", m=m) for each in (means, log_stds))
        return _Mixture(logits.log_softmax(-1), means, log_stds)


class _Mixture(NamedTuple):
    """Mixtures of diagonal Gaussians: log-weights "* m", means and log-standard deviations "* m d"."""

    log_weights: Tensor
    means: Tensor
    log_stds: Tensor

    def log_prob(self, units: Tensor) -> Tensor:
        """Nats "*" of vectors "* d"."""
        deviations = (units[..., None, :] - self.means) * (-self.log_stds).exp()
        nats = deviations.square() / 2 + self.log_stds + math.log(2 * math.pi) / 2
        return (self.log_weights - nats.sum(-1)).logsumexp(-1)

    def sample(self, temperature: float, generator: torch.Generator | None) -> Tensor:
        """Vectors "b d" of mixtures "b m": first the component, then the noise."""
        component = random_chooser(Sampling(temperature=temperature), generator=generator)(self.log_weights)
        picked = component[:, None, None].expand(-1, 1, self.means.shape[-1])
        mean, log_std = (each.gather(1, picked)[:, 0] for each in (self.means, self.log_stds))
        noise = draw_noise(tuple(mean.shape), mean.dtype, mean.device, generator)
        return mean + temperature * log_std.exp() * noise


def _in_full(layer: nn.Linear, x: Tensor) -> Tensor:
    """The linear map at the precision of its weights, whatever the autocast around it."""
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.to(layer.weight.dtype))
