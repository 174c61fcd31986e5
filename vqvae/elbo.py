"""The evidence lower bound of images under codes: rate + distortion - entropy.

For an image y and its codes z, in nats per image,

    -ln P(y)  <=  E_z[ -ln P_pri(z)  -  ln P_dec(y | z)  +  ln P_enc(z | y) ]
    negative  =        rate          +  distortion       -  entropy

- `rate` is the cross entropy of the codes under the prior: what sending them costs.
- `distortion` is the cross entropy of the 8-bit image under the decoder's likelihood: what sending
  the image costs once the codes are known.
- `entropy` is the encoder's, H_enc(z | y). It is 0 for a deterministic quantizer, whose negative
  ELBO is therefore an exact code length; a stochastic one gets it back by bits-back coding.

Averaged over images y of a population Pop, the slack of the bound is a divergence:

    mean negative  =  H(Pop)  +  KL(Pop(y) P_enc(z | y)  ||  P_pri(z) P_dec(y | z))

For a stochastic quantizer the expectation is over codes that are drawn, and `sampled_elbo` estimates it with its
standard error. Its most probable codes alone make a deterministic encoder with a bound of its own (`elbo` in evaluation
mode), which is another number and never mixed with it. With k draws there is a tighter bound (Burda et al. 2015,
"Importance Weighted Autoencoders"),

    -ln P(y)  <=  -E ln (1/k) sum_i P_dec(y | z_i) P_pri(z_i) / P_enc(z_i | y)  <=  negative
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor


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
        shapes = {
            "rate": tuple(self.rate.shape),
            "distortion": tuple(self.distortion.shape),
            "entropy": tuple(self.entropy.shape),
        }
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
class _HasCodes(Protocol):
    @property
    def num_codes(self) -> int: ...

    @property
    def grid(self) -> tuple[int, ...]: ...


@runtime_checkable
class _Model(_HasCodes, Protocol):
    def __call__(self, images: UInt8[Tensor, "b c h w"], /) -> Any: ...


@runtime_checkable
class PriorLike(_HasCodes, Protocol):
    """What this package knows of a prior."""

    @property
    def num_classes(self) -> int | None: ...

    def log_prob(self, codes: Int[Tensor, " b *grid"], labels: Int[Tensor, " b"] | None, /) -> Float[Tensor, " b"]: ...


def check_fit(model: _HasCodes, prior: _HasCodes, name: str = "prior") -> None:
    """Raise ValueError unless a prior is for the codes and the grid of a model."""
    mine, theirs = (model.num_codes, tuple(model.grid)), (prior.num_codes, tuple(prior.grid))
    if mine != theirs:
        raise ValueError(
            f"got a {name} of num_codes={theirs[0]}, grid={theirs[1]} for a model of "
            f"num_codes={mine[0]}, grid={mine[1]}, expected both equal; "
            "train the prior on this model's codes"
        )


def rate(
    prior: PriorLike, codes: Int[Tensor, "b *grid"], labels: Int[Tensor, " b"] | None = None
) -> Float[Tensor, " b"]:
    """Nats that codes cost under a prior: -ln P(z), an upper bound of it where the prior takes labels.

    The pixels do not hold the label, so a prior that is given one must pay for it: with even odds for the classes,
    -ln P(z) <= -ln P(z | label) + ln num_classes. A prior without classes is not given the labels.
    """
    if labels is None or prior.num_classes is None:
        return -prior.log_prob(codes, None)
    return math.log(prior.num_classes) - prior.log_prob(codes, labels)


@dataclass(frozen=True, kw_only=True)
class SampledELBO(ELBO):
    """The terms of the bound as means over codes drawn from the posterior, in nats per image, "b" each.

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
    images: UInt8[Tensor, "b c h w"],
    labels: Int[Tensor, " b"] | None = None,
    *,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
) -> SampledELBO:
    """The terms of the bound for some images, estimated on codes drawn from the posterior.

    Args:
        model: `model.draw(images, generator)` gives `distortion` "b" and `quantized` with `codes`, `entropy` and
            `log_posterior` of codes drawn from the posterior; has `num_codes` and `grid`.
        num_samples: draws an image.

    Raises:
        ValueError: a prior for other codes, or no draw.
    """
    options: dict[str, Any] = {"num_samples": num_samples, "generator": generator}
    return sampled_elbos(model, {"prior": prior}, images, labels, **options)["prior"]


def sampled_elbos(
    model: Any,
    priors: Mapping[str, PriorLike],
    images: UInt8[Tensor, "b c h w"],
    labels: Int[Tensor, " b"] | None = None,
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
    entropies = torch.stack([out.quantized.entropy for out in draws])
    log_posteriors = torch.stack([out.quantized.log_posterior for out in draws])
    terms = {}
    for name, prior in priors.items():
        rates = torch.stack([rate(prior, out.quantized.codes, labels) for out in draws])
        terms[name] = SampledELBO(
            rate=rates.mean(0),
            distortion=distortions.mean(0),
            entropy=entropies.mean(0),
            rates=rates,
            log_weights=-distortions - rates - log_posteriors,
        )
    return terms


def elbo(
    model: _Model,
    prior: PriorLike,
    images: UInt8[Tensor, "b c h w"],
    labels: Int[Tensor, " b"] | None = None,
) -> ELBO:
    """The terms of the bound for some images, under a model's codes and a prior over them.

    Runs the model as it is: put it into evaluation mode and call this under `torch.no_grad()` for
    an evaluation. The prior is known by its interface alone.

    Args:
        model: `model(images)` gives `distortion` "b" and `quantized` with `codes` "b *grid" and
            `entropy` "b"; has `num_codes` and `grid`.
        prior: `prior.log_prob(codes, labels)` gives nats "b"; has `num_codes` and `grid`.
        labels: classes "b" of the images, for a prior that takes them; they are paid for (see `rate`).

    Raises:
        ValueError: a prior for another number of codes or another grid than the model's.
    """
    check_fit(model, prior)
    result = model(images)
    nats = rate(prior, result.quantized.codes, labels)
    return ELBO(rate=nats, distortion=result.distortion, entropy=result.quantized.entropy)
