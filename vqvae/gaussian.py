"""GaussianVAE: real latents by the reparameterisation trick (Kingma & Welling 2014; Rezende et al. 2014).

    images ──Encoder──> μ, ln σ ──z = μ + σ·ε──> z ──Decoder──> features ──Likelihood──> −ln P_dec(y|z) in nats
      uint8            "b h w 2d"   ε ~ N(0, I)  "b h w d"       "b f H W"                 distortion, "b"

The posterior q(z|y) = N(μ, σ²) is diagonal, and training is under the prior N(0, I). Each latent then costs, exactly,

    KL(q(z|y) ‖ N(0, 1)) = ½ (μ² + σ² − 1 − 2 ln σ)      nats,

and with β = 1 and no free bits the objective, distortion and KL over `num_dims`, is a sample of the negative ELBO in
nats per dimension. Its expectation differs from `vqvae.bound`'s rate − entropy only by where the draw enters: the KL is
the two terms' difference in closed form. A prior that is trained on draws later takes the place of N(0, I).

σ. The encoder's raw number r becomes ln σ = 8 tanh(r/8): close to r where it matters, and inside ±8 for any finite r,
so that neither σ² (at most e¹⁶) nor 1/σ² overflows, no clamp cuts the gradient off at an edge, and the posterior cannot
run away to a density without bound. A fresh encoder's numbers are small, so training starts with σ near 1.

Free bits (Kingma et al. 2016, "Improved Variational Inference with Inverse Autoregressive Flow"): the latent channels
are the paper's groups, and a channel's KL counts only above a floor of λ nats a position,

    auxiliary = β / num_dims · Σ_channels max(λ · positions, mean over the batch of the channel's KL in nats per image)

with λ = `free_bits` · ln 2, since the option is in bits. A channel under its floor gets no gradient from the KL, so it
costs nothing to use it. The mean is over the images of one process. The bound is then no longer the objective; `kl`
and `draw` are without floor and weight.

Collapse. A channel whose posterior is the prior says nothing. As with the "active units" of Burda et al. 2015, who look
at the variance of the means, a channel counts as active above a small threshold: here a mean KL of 0.01 nats a
position. `update` watches a moving average of it, and warns once when under a tenth of the channels are active.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from safefolder import arrays
from safefolder.arrays import Latents
from vqvae.autoencoder import Output
from vqvae.levels import Images
from vqvae.metrics import ACTIVE, ChannelUsage
from vqvae.residual import ResidualAutoencoder

LOG_STD_BOUND = 8.0
# As quantizers do: collapse is looked for this often (in updates), in a moving average over about fifty batches.
CHECK_EVERY = 50
KL_DECAY = 0.98
COLLAPSED = 0.1


@dataclass(frozen=True, kw_only=True)
class GaussianOutput(Output):
    """The result of a forward pass.

    Attributes:
        mean: μ, `"b h w d"`.
        log_std: ln σ, `"b h w d"`.
        channel_kl: KL(q(z|y) ‖ N(0, 1)) of each position and channel in nats, `"b h w d"`.
    """

    mean: Float[Tensor, "b h2 w2 d"]
    log_std: Float[Tensor, "b h2 w2 d"]
    channel_kl: Float[Tensor, "b h2 w2 d"]

    @property
    def kl(self) -> Float[Tensor, " b"]:
        """KL(q(z|y) ‖ N(0, I)), nats per image."""
        return self.channel_kl.flatten(1).sum(1)

    @property
    def counted(self) -> Float[Tensor, "b h2 w2 d"]:
        """The KL of each position and channel."""
        return self.channel_kl


class GaussianVAE(ResidualAutoencoder):
    """A variational autoencoder with a diagonal Gaussian posterior over a grid of vectors.

        model = GaussianVAE(image_size=32, num_channels=3, dim=8)
        means = model.encode(images)          # uint8 "b 3 32 32" -> float "b 8 8 8"
        model.decode(means)                   # uint8 "b 3 32 32", the likelihood's mean
        model.draw(images)                    # terms of the bound: distortion, entropy, log_posterior, "b" each

    A forward in training samples z. In evaluation it takes z = μ, for reconstructions: its distortion is NOT a bound on
    −ln P(y) together with anything, since a density at a point is no probability, and its `entropy` and `log_posterior`
    are zero because nothing was sampled. Only `draw` gives bits.

    Args:
        dim: latent channels of each position.
        free_bits: bits of each channel and position that the objective does not charge for.
        beta: weight of the KL in the objective (Higgins et al. 2017); 1 is the ELBO.

    Raises:
        ValueError: sizes that do not fit each other, or options outside their range.
    """

    def __init__(self, *, dim: int = 8, free_bits: float = 0.0, beta: float = 1.0, **networks: Any):
        super().__init__(**networks)
        if dim < 1:
            raise ValueError(f"expected at least one latent channel, got dim={dim}")
        # Also False for NaN.
        if not (0 <= free_bits < math.inf and 0 <= beta < math.inf):
            raise ValueError(f"expected free_bits and beta of at least zero, got free_bits={free_bits}, beta={beta}")
        self.grid = self.latent_grid(self.feature_grid)
        self.make_networks(encoded=2 * dim, decoded=dim)
        # Starts at a nat, so that nothing is said in the first two hundred updates or so.
        self.register_buffer("recent_kl", torch.ones(dim), persistent=False)
        self.num_checked = 0
        self.warned = False

    def latent_grid(self, feature_grid: tuple[int, int]) -> tuple[int, ...]:
        """The same: a vector at each position."""
        return feature_grid

    @property
    def dim(self) -> int:
        return self.config.dim

    @property
    def stochastic(self) -> bool:
        """There is always a posterior to sample from."""
        return True

    def forward(self, images: Images) -> GaussianOutput:
        """Images (uint8, or float in [0, 1]) to distortion and latents: z sampled in training, the mean in evaluation.

        The draw is from torch's global generator. In evaluation the result is no bound, see the class.

        Raises:
            ValueError: another shape, another dtype, floats outside [0, 1], or an encoder that gives NaN or infinity.
        """
        levels = self.to_levels(images)
        mean, log_std = self._posterior(self.encoder(levels))
        out = self._output(levels, mean, log_std, torch.randn_like(mean) if self.training else None)
        if self.training:
            self._watch(out.channel_kl)
        return out

    @torch.no_grad()
    def draw(self, images: Images, generator: torch.Generator | None = None) -> GaussianOutput:
        """`forward` in evaluation, with z sampled from the posterior: the terms of the bound. Errors as `forward`.

        Args:
            generator: of the model's device; torch's global one unless given.
        """
        with self.evaluating():
            levels = self.to_levels(images)
            mean, log_std = self._posterior(self.encoder(levels))
            noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
            return self._output(levels, mean, log_std, noise)

    def latents(self, features: Float[Tensor, "b h2 w2 d2"]) -> Float[Tensor, "b h2 w2 d"]:
        """The means of the posteriors."""
        return self._posterior(features)[0]

    def vectors(self, latents: Latents) -> Float[Tensor, "b h2 w2 d"]:
        """The latents themselves, as a tensor.

        Raises:
            ValueError: other axes, another type, NaN or infinity.
        """
        if not isinstance(latents, Tensor):
            latents = arrays.vectors(latents, "latents").to(self.recent_kl)
        fits = latents.ndim == 4 and latents.shape[3] == self.dim and 0 not in latents.shape[1:]
        if not fits or not latents.is_floating_point():
            expected = (*self.grid, self.dim)
            raise ValueError(
                f"expected floating-point latents of shape (b, h, w, {self.dim}), such as (b, "
                f"{', '.join(map(str, expected))}), got {latents.dtype} {tuple(latents.shape)}"
            )
        if not torch.isfinite(latents).all():
            raise ValueError("the latents to decode hold NaN or infinity; look for a diverged or broken prior")
        return latents

    def _posterior(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """μ and ln σ of the encoder's features, in float32 or better under any autocast."""
        with torch.autocast(encoded.device.type, enabled=False):
            encoded = encoded.to(torch.promote_types(encoded.dtype, torch.float32))
            # Waits for the device: an error must come before its consequences. A traced graph cannot branch on values.
            if not torch.compiler.is_compiling() and not torch.isfinite(encoded).all():
                raise ValueError("the encoder gave NaN or infinity; look for a diverged or broken encoder")
            mean, raw = encoded.chunk(2, -1)
            return mean, LOG_STD_BOUND * torch.tanh(raw / LOG_STD_BOUND)

    def _output(self, levels: Tensor, mean: Tensor, log_std: Tensor, noise: Tensor | None) -> GaussianOutput:
        with torch.autocast(mean.device.type, enabled=False):
            z = mean if noise is None else mean + log_std.exp() * noise
            # expm1 keeps the digits near σ = 1, where σ² − 1 cancels.
            channel_kl = 0.5 * (mean.square() + torch.expm1(2 * log_std) - 2 * log_std)
            charged = channel_kl.sum((0, 1, 2)) / max(len(mean), 1)
            if self.config.free_bits:
                charged = charged.clamp_min(self.config.free_bits * math.log(2) * math.prod(mean.shape[1:3]))
            if noise is None:
                entropy = log_posterior = mean.new_zeros(len(mean))
            else:
                entropy = (log_std + 0.5 * math.log(2 * math.pi * math.e)).flatten(1).sum(1)
                log_posterior = -(0.5 * noise.square() + log_std + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)
        features = self.decoder(z)
        return GaussianOutput(
            distortion=-self.likelihood.log_prob(levels, features),
            features=features,
            latents=z,
            auxiliary={
                "kl": self.config.beta * charged.sum() / math.prod(levels.shape[1:]),
                **self.likelihood.auxiliary(levels, features),
            },
            entropy=entropy,
            log_posterior=log_posterior,
            mean=mean,
            log_std=log_std,
            channel_kl=channel_kl,
        )

    @torch.no_grad()
    def _watch(self, channel_kl: Tensor) -> None:
        if len(channel_kl):
            self.recent_kl.lerp_(channel_kl.mean((0, 1, 2)).to(self.recent_kl), 1 - KL_DECAY)

    def update(self) -> None:
        """Look for a collapse now and then; after the optimiser's step."""
        self.num_checked += 1
        if self.num_checked % CHECK_EVERY or self.warned:
            return
        active = int((self.recent_kl > ACTIVE).sum())  # waits for the device, once in CHECK_EVERY updates
        if active < COLLAPSED * self.dim:
            self.warned = True
            warnings.warn(
                f"the posterior of GaussianVAE has collapsed: in recent batches {active} of {self.dim} latent channels "
                f"had a mean KL above {ACTIVE} nats a position; set free_bits above zero (a tenth of a bit, say), or "
                "lower beta",
                stacklevel=2,
            )

    def usage(self) -> ChannelUsage:
        """An empty count of the channels' KL, to which `out.counted` of each batch is added."""
        return ChannelUsage(self.dim, self.grid)
