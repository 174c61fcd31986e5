"""The mixture: E step, M step, fit, and what a fitted one is good for."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor
from tqdm import tqdm

from safefolder import SavedModel
from vqvae.bound import ELBO
from vqvae.em.pixels import BernoulliPixels, CategoricalPixels, Gaussian, GaussianPixels, Table
from vqvae.em.seeds import choose_seeds

PixelsConfig = CategoricalPixels | BernoulliPixels | GaussianPixels

# Numbers in a chunk of images, or of their components: 32 MiB of float64. An M step on a table passes over all of it
# for every chunk, so small chunks cost time.
CHUNK_ELEMENTS = 2**22
# How much of an image its first component leaves to all of them.
SOFTNESS = 0.1


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a fit went: entry t is after t M steps, the last one that of the mixture as it is now.

    Attributes:
        objective: what never rises, in nats per image: the negative ELBO less ln of the parameters' prior (up to a
            constant).
        negative_elbo: its mean over the images, in nats per image; -ln P(y) where the E steps are soft.
        converged: whether the fit ended by its tolerance.
    """

    objective: Float64[Tensor, " t"]
    negative_elbo: Float64[Tensor, " t"]
    converged: bool


class Mixture(SavedModel):
    """A model of images with one finite latent, fitted by exact EM.

    images ──E step──> posterior "b k" ──M step──> log_weights "k" and the pixels' parameters

        mixture = Mixture(num_components=100)
        mixture.fit(images, num_steps=50)               # uint8 "n 1 28 28" -> Fit
        mixture.log_prob(images)                        # nats per image, "n"
        mixture.elbo(images).bits_per_dim(mixture.num_dims)
        mixture.sample(16)                              # uint8 "16 1 28 28"

    Of Gaussian pixels all these are densities, whose bits say nothing about 8-bit levels; those of
    `mixture.discretised()` do.

    Before a fit all components are alike: even weights, and every level as likely as any other.

    Args:
        num_components: K, the values of the latent.
        shape: channels, height and width of the images.
        pixels: which family the pixels are of, and its options.
        even_weights: hold the prior at 1/K instead of fitting it.

    Raises:
        ValueError: no component, an empty shape, or options of the pixels out of range.
    """

    summary = "A mixture of images, fitted by exact EM: its latent is one number."
    card_name = "mixture"
    log_weights: Tensor

    def __init__(
        self,
        *,
        num_components: int = 100,
        shape: tuple[int, int, int] = (1, 28, 28),
        pixels: PixelsConfig = CategoricalPixels(),
        even_weights: bool = False,
    ):
        super().__init__()
        if num_components < 1:
            raise ValueError(f"got num_components={num_components}, expected at least 1")
        if min(shape) < 1:
            raise ValueError(f"got shape={shape}, expected (channels, height, width), each at least 1")
        self.pixels = pixels.build(num_components, self.num_dims)
        even = torch.full((num_components,), -math.log(num_components))
        self.register_buffer("log_weights", even)

    @property
    def num_dims(self) -> int:
        """C·H·W of an image: what bits/dim divides by."""
        return math.prod(self.config.shape)

    @torch.no_grad()
    def fit(
        self,
        images: UInt8[Tensor, "n c h w"],
        num_steps: int = 100,
        *,
        hard: bool = False,
        tolerance: float = 1e-6,
        resume: bool = False,
        generator: torch.Generator | None = None,
    ) -> Fit:
        """Alternate E and M steps until the objective falls by less than a share `tolerance` of itself.

        Images may lie on another device than the mixture: they are taken over chunk by chunk.

        Args:
            num_steps: M steps at most; 0 only chooses the start.
            hard: hard EM: the posterior's argmax in place of the posterior.
            tolerance: 0 goes on until the objective stands still, rounding included.
            resume: go on from the parameters as they are, instead of new seeds.
            generator: on the CPU; draws the seeds by k-means++.

        Raises:
            ValueError: images of another shape or dtype, none of them, levels out of range, or an image that no
                component can have given (with resume and alpha = 0).
        """
        levels = self._levels(images)
        if not len(levels):
            raise ValueError("got no images, expected at least one to fit a mixture to")
        if num_steps < 0 or not tolerance >= 0:
            raise ValueError(f"got num_steps={num_steps}, tolerance={tolerance}, expected neither to be negative")
        statistics = _Statistics(self)
        if not resume:
            self._start(levels, statistics, generator)
        objective: list[float] = []
        negative: list[float] = []
        converged = False
        with tqdm(total=num_steps, desc="em", unit="step", disable=None, leave=False) as bar:
            for step in range(num_steps + 1):
                last = step == num_steps
                bound = sum(self._expect(part, hard, None if last else statistics) for part in self._chunks(levels))
                negative.append(-bound / len(levels))
                objective.append(negative[-1] - self.pixels.log_prior() / len(levels))
                bar.set_postfix(nats=f"{objective[-1]:.4f}", refresh=False)
                if step and objective[-2] - objective[-1] <= tolerance * abs(objective[-1]):
                    converged = True
                    break
                if not last:
                    self._maximise(statistics)
                    bar.update()
        return Fit(
            objective=torch.tensor(objective, dtype=torch.float64, device="cpu"),
            negative_elbo=torch.tensor(negative, dtype=torch.float64, device="cpu"),
            converged=converged,
        )

    @torch.no_grad()
    def log_prob(self, images: UInt8[Tensor, "b c h w"]) -> Float64[Tensor, " b"]:
        """ln P(y) in nats per image; of Gaussian pixels the log density. Errors as `posterior`."""
        parts = [self._joint(part).logsumexp(1) for part in self._chunks(self._levels(images))]
        return torch.cat(parts)

    @torch.no_grad()
    def posterior(self, images: UInt8[Tensor, "b c h w"]) -> Float64[Tensor, "b k"]:
        """q(k | y) = P(k | y): the E step. An image that no component can have given tells nothing: it gets the prior.

        Raises:
            ValueError: images of another shape or dtype, or levels that the pixels do not have.
        """
        return torch.cat([self._posterior(self._joint(part)) for part in self._chunks(self._levels(images))])

    @torch.no_grad()
    def elbo(self, images: UInt8[Tensor, "b c h w"], posterior: Float[Tensor, "b k"] | None = None) -> ELBO:
        """The terms of the bound, summed over the latent rather than sampled.

        rate = E_q[-ln pi_z], distortion = E_q[-ln P_z(y)], entropy = H(q). The default is the exact posterior, for
        which the negative ELBO is -ln P(y).

        Args:
            posterior: any encoder q(k | y): rows that sum to 1.

        Raises:
            ValueError: images as in `posterior`, or rows that are no distributions over the components.
        """
        levels = self._levels(images)
        if posterior is not None:
            self._check_posterior(posterior, len(levels))
        rate, distortion, entropy = [], [], []
        start = 0
        for part in self._chunks(levels):
            log_probs = self.pixels.log_prob(part)
            log_weights = self.log_weights.double()
            if posterior is None:
                encoder = self._posterior(log_weights + log_probs)
            else:
                encoder = posterior[start : start + len(part)].to(log_probs)
            start += len(part)
            rate.append(_cross_entropy(encoder, log_weights.expand_as(encoder)))
            distortion.append(_cross_entropy(encoder, log_probs))
            entropy.append(-torch.xlogy(encoder, encoder).sum(1))
        return ELBO(rate=torch.cat(rate), distortion=torch.cat(distortion), entropy=torch.cat(entropy))

    @torch.no_grad()
    def sample(self, num: int, generator: torch.Generator | None = None) -> UInt8[Tensor, "n c h w"]:
        """Images drawn from the mixture; of Gaussian pixels rounded into 0..255, as `discretised` has them.

        Args:
            generator: on the mixture's device.

        Raises:
            ValueError: a negative number.
        """
        if num < 0:
            raise ValueError(f"got num={num}, expected a number of images")
        weights = self.log_weights.double().exp()
        if num:
            components = torch.multinomial(weights, num, replacement=True, generator=generator)
        else:
            components = torch.empty(0, dtype=torch.int64, device=weights.device)
        return self.pixels.draw(components, generator).view(num, *self.config.shape)

    @torch.no_grad()
    def discretised(self) -> "Mixture":
        """A mixture of Gaussians as one of 256 levels: a categorical mixture of the masses of the levels' bins.

        Its table takes 1 KiB (in float32) for each pixel and component.

        Raises:
            ValueError: pixels that have levels already.
        """
        if not isinstance(self.pixels, Gaussian):
            name = type(self.config.pixels).__name__
            raise ValueError(f"got {name}, which have levels already; expected Gaussian ones")
        mixture = dataclasses.replace(self.config, pixels=CategoricalPixels(alpha=0.0)).build().to(self.log_weights)
        mixture.log_weights.copy_(self.log_weights)
        self.pixels.discretise(cast(Table, mixture.pixels))
        return mixture

    def card_facts(self) -> dict[str, object]:
        return {"class": "`Mixture`", **{name: str(value) for name, value in self.config.to_plain().items()}}

    def usage_lines(self) -> list[str]:
        return ["images = mixture.sample(16)"]

    def _chunks(self, levels: Tensor) -> Iterator[Tensor]:
        """The images a few at a time, on the mixture's device; one empty chunk of none."""
        size = max(1, CHUNK_ELEMENTS // max(self.config.num_components, self.num_dims))
        for part in levels.split(size):
            yield part.to(self.log_weights.device)

    def _joint(self, levels: Tensor) -> Float64[Tensor, "b k"]:
        """ln pi_k + ln P_k(y)."""
        return self.pixels.log_prob(levels).add_(self.log_weights)

    def _posterior(self, joint: Tensor) -> Tensor:
        evidence = joint.logsumexp(1, keepdim=True)
        return torch.where(evidence > -math.inf, joint - evidence, self.log_weights.double()).exp_()

    def _expect(self, levels: Tensor, hard: bool, statistics: "_Statistics | None") -> float:
        """The E step of some images: their ELBO in nats, and what the M step will need of them."""
        joint = self._joint(levels)
        bound = joint.amax(1) if hard else joint.logsumexp(1)
        if not bound.isfinite().all():
            number = int((~bound.isfinite()).sum())
            raise ValueError(
                f"{number} images are impossible to every component, so they have no posterior; "
                "fit from new seeds (resume=False), or build the mixture with alpha > 0"
            )
        if statistics is not None:
            if hard:
                posterior = torch.zeros_like(joint).scatter_(1, joint.argmax(1, keepdim=True), 1)
            else:
                posterior = joint.sub_(bound[:, None]).exp_()
            statistics.add(levels, posterior)
        return float(bound.sum())

    def _maximise(self, statistics: "_Statistics") -> None:
        shares = statistics.shares
        weights = torch.full_like(shares, 1 / len(shares)) if self.config.even_weights else shares / shares.sum()
        self.log_weights.copy_(weights.log())
        self.pixels.maximise(statistics.pixels, shares)
        statistics.clear()

    def _start(self, levels: Tensor, statistics: "_Statistics", generator: torch.Generator | None) -> None:
        """An M step on each image's nearest seed, softened."""
        seeds = choose_seeds(levels, self.config.num_components, generator).to(self.log_weights.device)
        offsets = seeds.square().sum(1) / 2
        for part in self._chunks(levels):
            nearest = torch.addmm(offsets, part.float(), seeds.T, alpha=-1).argmin(1)
            even = SOFTNESS / self.config.num_components
            posterior = part.new_full((len(part), self.config.num_components), even, dtype=torch.float32)
            posterior.scatter_add_(1, nearest[:, None], torch.full_like(posterior[:, :1], 1 - SOFTNESS))
            statistics.add(part, posterior)
        self._maximise(statistics)

    def _levels(self, images: Tensor) -> UInt8[Tensor, "b d"]:
        expected = self.config.shape
        if images.ndim != 4 or tuple(images.shape[1:]) != tuple(expected):
            sizes = ", ".join(map(str, expected))
            raise ValueError(f"got images of shape {tuple(images.shape)}, expected (n, {sizes})")
        if images.dtype != torch.uint8:
            raise ValueError(f"got images of dtype {images.dtype}, expected torch.uint8 levels")
        num_levels = self.pixels.num_levels
        if images.numel() and int(images.max()) >= num_levels:
            remedy = (
                "threshold the images, as in (images > 127).to(torch.uint8)" if num_levels == 2 else "raise num_levels"
            )
            raise ValueError(
                f"got a level of {int(images.max())}, expected 0..{num_levels - 1} for "
                f"{type(self.config.pixels).__name__}; {remedy}"
            )
        return images.flatten(1)

    def _check_posterior(self, posterior: Tensor, num: int) -> None:
        expected = (num, self.config.num_components)
        if tuple(posterior.shape) != expected:
            raise ValueError(f"got a posterior of shape {tuple(posterior.shape)}, expected (b, k) = {expected}")
        off = (posterior.sum(1, dtype=torch.float64) - 1).abs()
        if not ((posterior >= 0).all() and (off < 1e-4).all()):  # also False for NaN
            raise ValueError("got a posterior with rows that are no distributions, expected each >= 0 and to sum to 1")


class _Statistics:
    """What an M step needs of the images: N_k, and what the family of pixels asks for."""

    def __init__(self, mixture: Mixture):
        self.family, self.dtype = mixture.pixels, mixture.log_weights.dtype
        self.shares = torch.zeros_like(mixture.log_weights, dtype=torch.float64)
        self.pixels = mixture.pixels.new_statistics()

    def clear(self) -> None:
        for tensor in (self.shares, *self.pixels):
            tensor.zero_()

    def add(self, levels: Tensor, posterior: Tensor) -> None:
        posterior = posterior.to(self.dtype)  # once, so that all the sums are of the same numbers
        self.shares += posterior.sum(0, dtype=torch.float64)
        self.family.accumulate(self.pixels, levels, posterior)


def _cross_entropy(weights: Tensor, log_probs: Tensor) -> Tensor:
    """E[-log_probs]; what has no weight counts nothing, impossible or not."""
    return -torch.where(weights > 0, weights * log_probs, 0).sum(1)
