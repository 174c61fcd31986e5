"""The evidence lower bound of images under latents: rate + distortion - entropy.

For an image y and its latents z, codes or real vectors, in nats per image,

    -ln P(y)  <=  E_z[ -ln P_pri(z)  -  ln P_dec(y | z)  +  ln P_enc(z | y) ]
    negative  =        rate          +  distortion       -  entropy

- `rate` is the cross entropy of the latents under the prior: what sending codes costs.
- `distortion` is the cross entropy of the 8-bit image under the decoder's likelihood: what sending
  the image costs once the latents are known.
- `entropy` is the encoder's, H_enc(z | y). It is 0 for a deterministic quantizer, whose negative
  ELBO is therefore an exact code length; a stochastic one gets it back by bits-back coding.

For real vectors P_pri(z) and P_enc(z | y) are densities. Rate and entropy are then differential: each may be negative
and depends on the unit of z, but their difference does not, and it is what counts.

Averaged over images y of a population Pop, the slack of the bound is a divergence:

    mean negative  =  H(Pop)  +  KL(Pop(y) P_enc(z | y)  ||  P_pri(z) P_dec(y | z))

For a stochastic encoder the expectation is over latents that are sampled, and `sampled_elbo` estimates it with its
standard error. The most probable codes alone make a deterministic encoder with a bound of its own (`elbo` in evaluation
mode), which is another number and never mixed with it. The mean of a Gaussian posterior makes none: a density at a
point is no probability. With k draws there is a tighter bound (Burda et al. 2015,
"Importance Weighted Autoencoders"),

    -ln P(y)  <=  -E ln (1/k) sum_i P_dec(y | z_i) P_pri(z_i) / P_enc(z_i | y)  <=  negative
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from safefolder import arrays
from safefolder.arrays import Labels, Latents
from vqvae.levels import Images


@dataclass(frozen=True, kw_only=True)
class ELBO:
    """The terms of the bound, in nats per image, "b" each.

    >>> elbo = ELBO(rate=torch.zeros(2), distortion=torch.full((2,), 10.0), entropy=torch.zeros(2))
    >>> elbo.negative
    tensor([10., 10.])

    Attributes:
        rate: -ln P_pri(z).
        distortion: -ln P_dec(y | z).
        entropy: H_enc(z | y).

    Raises:
        ValueError: terms that are not one number an image, of as many images.
    """

    rate: Float[Tensor, " b"]
    distortion: Float[Tensor, " b"]
    entropy: Float[Tensor, " b"]

    def __post_init__(self) -> None:
        shapes = {name: tuple(getattr(self, name).shape) for name in ("rate", "distortion", "entropy")}
        if len(set(shapes.values())) > 1 or self.rate.ndim != 1:
            raise ValueError(f"got terms of shapes {shapes}, expected (b,) for all three")

    @property
    def negative(self) -> Float[Tensor, " b"]:
        """The negative ELBO in nats per image: rate + distortion - entropy."""
        return self.rate + self.distortion - self.entropy

    def bits_per_dim(self, num_dims: int) -> Float[Tensor, " b"]:
        """The negative ELBO in bits per dimension: nats / (ln 2 * num_dims).

        Args:
            num_dims: channels * height * width of the original images, without any padding.

        Raises:
            ValueError: num_dims below 1.
        """
        if num_dims < 1:
            raise ValueError(f"got num_dims={num_dims}, expected channels * height * width of an image")
        return self.negative / (math.log(2) * num_dims)


@runtime_checkable
class OnGrid(Protocol):
    """A model or a prior: besides its grid it has `num_codes` if latents are codes, `dim` if they are vectors."""

    @property
    def grid(self) -> tuple[int, ...]: ...


@runtime_checkable
class PriorLike(OnGrid, Protocol):
    """What this package knows of a prior."""

    @property
    def num_classes(self) -> int | None: ...

    def log_prob(self, latents: Any, labels: Int[Tensor, " b"] | None, /) -> Float[Tensor, " b"]: ...


def is_continuous(model: OnGrid) -> bool:
    """Whether latents are real vectors, with a density, and not codes."""
    return not hasattr(model, "num_codes")


def check_fit(model: OnGrid, prior: OnGrid, name: str = "prior") -> None:
    """Raise ValueError unless a prior is for the codes, or the vectors, and the grid of a model."""
    mine, theirs = _latents_of(model), _latents_of(prior)
    if mine != theirs:
        kind = "latents" if is_continuous(model) else "codes"
        raise ValueError(
            f"got a {name} of {theirs} for a model of {mine}, expected both equal; "
            f"train the prior on this model's {kind}"
        )


def _latents_of(model: Any) -> str:
    size = f"dim={model.dim}" if is_continuous(model) else f"num_codes={model.num_codes}"
    return f"{size}, grid={tuple(model.grid)}"


def rate(prior: PriorLike, latents: Latents, labels: Labels | None = None) -> Float[Tensor, " b"]:
    """Nats that latents cost under a prior: -ln P(z), an upper bound of it where the prior takes labels.

    The pixels do not hold the label, so a prior that is given one must pay for it: with even odds for the classes,
    -ln P(z) <= -ln P(z | label) + ln num_classes. A prior without classes is not given the labels.

    Args:
        latents: codes "b *grid", of any integer type, or vectors "b *grid d", of which the rate is differential.
        labels: a class for each image, or one for all of them.
    """
    if not is_continuous(prior):
        latents = arrays.integers(latents, "codes")
    if labels is None or prior.num_classes is None:
        return -prior.log_prob(latents, None)
    found = arrays.labels_for(labels, len(latents), getattr(latents, "device", None))
    return math.log(prior.num_classes) - prior.log_prob(latents, found)


@dataclass(frozen=True, kw_only=True)
class SampledELBO(ELBO):
    """The terms of the bound as means over latents sampled from the posterior, in nats per image, "b" each.

    Attributes:
        rates: of each draw, "s b"; `rate` is their mean.
        log_weights: ln P_dec(y | z) + ln P_pri(z) - ln P_enc(z | y) of each draw, "s b".
    """

    rates: Float[Tensor, "s b"]
    log_weights: Float[Tensor, "s b"]

    @property
    def rate_error(self) -> Float[Tensor, " b"]:
        """The standard error of `rate` as a mean over draws; NaN for a single one."""
        return self.rates.std(0) / len(self.rates) ** 0.5

    @property
    def importance_weighted(self) -> Float[Tensor, " b"]:
        """The importance-weighted bound of all draws together, in nats per image: at most `negative`, on average."""
        return math.log(len(self.log_weights)) - self.log_weights.logsumexp(0)


def sampled_elbo(
    model: Any,
    prior: PriorLike,
    images: Images,
    labels: Labels | None = None,
    *,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
) -> SampledELBO:
    """The terms of the bound for some images, estimated on latents sampled from the posterior.

    Args:
        model: `model.draw(images, generator)` gives `distortion` "b", and `latents` sampled from the posterior with
            their `entropy` and `log_posterior`, "b" each; has `num_codes` or `dim`, and `grid`.
        num_samples: draws an image.

    Raises:
        ValueError: a prior for other latents, or no draw.
    """
    options: dict[str, Any] = {"num_samples": num_samples, "generator": generator}
    return sampled_elbos(model, {"prior": prior}, images, labels, **options)["prior"]


def sampled_elbos(
    model: Any,
    priors: Mapping[str, PriorLike],
    images: Images,
    labels: Labels | None = None,
    *,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
) -> dict[str, SampledELBO]:
    """`sampled_elbo` under several priors, on the same draws."""
    for name, prior in priors.items():
        check_fit(model, prior, name)
    if num_samples < 1:
        raise ValueError(f"expected at least one draw an image, got num_samples={num_samples}")
    draws = [model.draw(images, generator) for _ in range(num_samples)]
    distortions = torch.stack([out.distortion for out in draws])
    entropies = torch.stack([out.entropy for out in draws])
    log_posteriors = torch.stack([out.log_posterior for out in draws])
    terms = {}
    for name, prior in priors.items():
        rates = torch.stack([rate(prior, out.latents, labels) for out in draws])
        terms[name] = SampledELBO(
            rate=rates.mean(0),
            distortion=distortions.mean(0),
            entropy=entropies.mean(0),
            rates=rates,
            log_weights=-distortions - rates - log_posteriors,
        )
    return terms


def elbo(model: Any, prior: PriorLike, images: Images, labels: Labels | None = None) -> ELBO:
    """The terms of the bound for some images, under a model's codes and a prior over them.

    Runs the model as it is: put it into evaluation mode and call this under `torch.no_grad()` for
    an evaluation. The prior is known by its interface alone.

    Args:
        model: `model(images)` gives `distortion` "b", codes as `latents` "b *grid" and `entropy` "b"; has `num_codes`
            and `grid`.
        prior: `prior.log_prob(codes, labels)` gives nats "b"; has `num_codes` and `grid`.
        labels: classes "b" of the images, for a prior that takes them; they are paid for (see `rate`).

    Raises:
        ValueError: a prior for another number of codes or another grid than the model's; or a model whose latents
            are real vectors, which have a bound on draws only.
    """
    check_fit(model, prior)
    if is_continuous(model):
        raise ValueError(
            f"the latents of {type(model).__name__} are real vectors, whose density at a point is no probability: "
            "use sampled_elbo, which samples them"
        )
    result = model(images)
    nats = rate(prior, result.latents, labels)
    return ELBO(rate=nats, distortion=result.distortion, entropy=result.entropy)
