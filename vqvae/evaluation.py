"""The ELBO of a whole test set: what an autoencoder and its priors are worth in bits.

Everything is summed in float64 and nothing is dropped: the means are over every image that could be read. Models run in
float32, whatever they were trained in. Priors come by their interface: this package knows none of them.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

import safefolder
from vqvae.autoencoder import Autoencoder, LikelihoodFit
from vqvae.bound import ELBO, PriorLike, check_fit, is_continuous, rate, sampled_elbos
from vqvae.data import Batch
from vqvae.likelihoods import LocalContext
from vqvae.metrics import ChannelUsage, CodeUsage, psnr

# Images of 64x64, and as many pixels of others, that go through a model together without gradients.
_AT_ONCE = 100


def images_at_once(height: int, width: int) -> int:
    """How many images of a size are worked on together without gradients, so that larger ones take no more memory."""
    return max(1, min(_AT_ONCE, _AT_ONCE * 64**2 // (height * width)))


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The negative ELBO of a test set in nats per image: rate under the last prior + distortion − entropy.

    Attributes:
        rate: cross entropy of the latents under each prior; differential for real vectors.
        entropy: of the encoder's posterior, differential for real vectors; 0 where codes are not sampled.
    """

    rate: dict[str, float]
    distortion: float
    entropy: float

    @property
    def negative_elbo(self) -> float:
        return list(self.rate.values())[-1] + self.distortion - self.entropy

    def rows(self) -> list[tuple[str, float]]:
        rows = [(f"rate, {name} prior", value) for name, value in self.rate.items()]
        rows += [("distortion", self.distortion), ("posterior entropy", self.entropy)]
        return [*rows, ("negative ELBO", self.negative_elbo)]


@dataclass(frozen=True, kw_only=True)
class ImageBounds:
    """What each image of a batch costs.

    Attributes:
        images: as they are.
        reconstructions: the likelihood's point estimates, without draws.
        labels: of the images; None where the set has none.
        bound: the terms in nats, "b" each, with the rate under the last prior; `Evaluation.bound` is their mean.
        psnr: of the reconstructions, in dB; infinite where nothing differs.
    """

    images: UInt8[Tensor, "b c h w"]
    reconstructions: UInt8[Tensor, "b c h w"]
    labels: Int[Tensor, " b"] | None
    bound: ELBO
    psnr: Float[Tensor, " b"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Means over the test images, in nats per image where nothing else is said.

    Attributes:
        images: how many images were read and counted.
        skipped: how many could not be read.
        dims: C·H·W, what bits per dimension divide by.
        bound: of the system itself: on sampled latents, where there is a posterior to sample from.
        deterministic: of its most probable codes instead; None where those are the system's codes, and for real
            vectors, of which a single one has no probability.
        draws: latents sampled an image, for the bound; 0 where none are.
        rate_error: standard error of the bound's rate, as an estimate on so many draws.
        importance_weighted: the importance-weighted bound of all draws together; None where none are.
        code_usage: how often each code of each codebook occurred, without draws; for real vectors, the KL of each
            channel to N(0, 1).
        features_distortion: of the pixels given the latents alone, where the likelihood also looks at pixels nearby:
            what the codes know of an image by themselves; None elsewhere.
        psnr: of the reconstruction, the likelihood's point estimate, against the image, without draws, in dB; the mean
            over images that differ.
        likelihood_fit: how the likelihood was fitted to the decoder after training; None where it was not.
    """

    images: int
    skipped: int
    dims: int
    bound: Bound
    deterministic: Bound | None
    draws: int
    rate_error: float
    importance_weighted: float | None
    code_usage: CodeUsage | ChannelUsage
    features_distortion: float | None
    psnr: float
    likelihood_fit: LikelihoodFit | None = None

    @property
    def bits_per_dim(self) -> float:
        return self.bits(self.bound.negative_elbo)

    def bits(self, nats: float) -> float:
        """Nats per image as bits per dimension."""
        return nats / (math.log(2) * self.dims)

    def save(self, path: Path, **more: Any) -> None:
        """Write the figures and `more` plain ones as JSON, whole or not at all."""
        safefolder.files.write_text(path, json.dumps(self.plain(**more), indent=2, allow_nan=False) + "\n")

    def plain(self, **more: Any) -> dict[str, Any]:
        """The figures and `more` plain ones as data for JSON; per codebook where there are several.

        A figure that is no finite number, as of images that a likelihood gives no probability, is None.
        """
        figures: dict[str, Any] = {"images": self.images, "skipped": self.skipped, "dims": self.dims}
        figures |= self._plain(self.bound)
        if self.draws:
            figures |= {"draws": self.draws, "rate_error": self.rate_error}
            figures |= {"importance_weighted": self.importance_weighted}
        if self.deterministic is not None:
            figures |= {"deterministic": self._plain(self.deterministic)}
        if self.features_distortion is not None:
            figures |= {"features_distortion": self.features_distortion}
        if (fit := self.likelihood_fit) is not None:  # bits/dim, on training images
            figures |= {"likelihood_fit": {"images": fit.images, "before": fit.before, "after": fit.after}}
        usage = self.code_usage
        figures |= {"usage": usage.usage, "perplexity": usage.perplexity, "psnr": self.psnr}
        if isinstance(usage, ChannelUsage):
            figures |= {"kl": usage.kl, "kl_by_channel": usage.channels}
        elif usage.axes:
            figures |= {"usage_by_codebook": usage.usages, "perplexity_by_codebook": usage.perplexities}
        return _finite({**figures, **more})

    def _plain(self, bound: Bound) -> dict[str, Any]:
        negative = bound.negative_elbo
        return {**vars(bound), "negative_elbo": negative, "bits_per_dim": self.bits(negative)}

    def table(self, seconds: float | None = None, *, what: str = "test images") -> str:
        """The figures as lines for a terminal.

        Args:
            seconds: how long it all took; not said unless given.
            what: what the images are called.
        """
        lines = [f"{'':24}{'nats/image':>12}{'bits/dim':>10}"]
        lines += [self._row(*row) for row in self.bound.rows()]
        if self.importance_weighted is not None:
            lines += [self._row(f"  on {self.draws} draws together", self.importance_weighted)]
            lines += [f"rates are means over {self.draws} draws an image, standard error {self.rate_error:.2g} nats"]
        if self.deterministic is not None:
            lines += ["with the most probable codes instead:"]
            lines += [self._row(*row) for row in self.deterministic.rows()]
        if self.features_distortion is not None:
            lines += [self._row("distortion, no context", self.features_distortion)]
        usage = self.code_usage
        if isinstance(usage, ChannelUsage):
            lines += [self._row("KL to N(0, I)", usage.kl), f"{'active channels':24}{usage.usage:12.1%}"]
        else:
            lines += [f"{'usage':24}{usage.usage:12.1%}", f"{'perplexity':24}{usage.perplexity:12.1f}"]
        lines += [f"{'PSNR of reconstructions':24}{self.psnr:9.2f} dB"]
        if self.likelihood_fit is not None:
            lines += [str(self.likelihood_fit)]
        if seconds is not None:
            lines += [f"{'time':24}{seconds:10.0f} s"]
        skipped = f", {self.skipped} that could not be read left out" if self.skipped else ""
        return "\n".join([*lines, f"{self.images} {what} of {self.dims} dimensions{skipped}"])

    def _row(self, name: str, nats: float) -> str:
        return f"{name:24}{nats:12.2f}{self.bits(nats):10.4f}"


class _Sums:
    """Sums over images of the terms of a bound."""

    def __init__(self, names: Iterable[str]):
        self.rates = dict.fromkeys(names, 0.0)
        self.distortion = self.entropy = 0.0

    def add(self, rates: Mapping[str, Tensor], distortion: Tensor, entropy: Tensor) -> None:
        for name, nats in rates.items():
            self.rates[name] += nats.double().sum().item()
        self.distortion += distortion.double().sum().item()
        self.entropy += entropy.double().sum().item()

    def mean(self, images: int) -> Bound:
        rates = {name: nats / images for name, nats in self.rates.items()}
        return Bound(rate=rates, distortion=self.distortion / images, entropy=self.entropy / images)


@torch.no_grad()
def evaluate(
    model: Autoencoder,
    priors: Mapping[str, PriorLike],
    batches: Iterable[Batch],
    *,
    num_draws: int = 4,
    seed: int = 0,
    observe: Callable[[UInt8[Tensor, "b c h w"], UInt8[Tensor, "b c h w"]], None] | None = None,
    observe_bounds: Callable[[ImageBounds], None] | None = None,
) -> Evaluation:
    """Run an autoencoder and its priors over test images.

    Args:
        model: in eval mode.
        priors: by name; the negative ELBO is that of the last, which is also in the loop of a model that has one.
        batches: of images and labels, read once. Where a prior takes labels, it is given those of the images.
        num_draws: latents sampled an image, for a model with a posterior to sample from.
        seed: of the draws.
        observe: is handed the images and the reconstructions of each batch, such as `vqvae.looks.LooksMeter.add`.
        observe_bounds: is handed what each batch's images cost, one by one.

    Raises:
        ValueError: a prior does not fit the model's latents, no prior was given, or there is no image.
    """
    if not priors:
        raise ValueError("an ELBO needs at least one prior, got none")
    for name, prior in priors.items():
        check_fit(model, prior, name)
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    plain, sampled = _Sums(priors), _Sums(priors)
    usage = model.usage()
    in_loop = list(priors.values())[-1]
    stochastic = model.through(in_loop).stochastic
    has_codes = not is_continuous(model)
    decibels: list[Tensor] = []
    images = skipped = dims = 0
    weighted = variance = without = 0.0
    context = model.likelihood if isinstance(model.likelihood, LocalContext) else None
    for batch in batches:
        levels = batch.images.to(device)
        labels = None if batch.labels is None else batch.labels.to(device)
        each: ELBO | None = None  # of the system itself: on sampled latents, where there are any
        encoder = model.through(in_loop, labels)
        out = encoder(levels)
        if has_codes:
            rates = {name: rate(prior, out.latents, labels) for name, prior in priors.items()}
            plain.add(rates, out.distortion, out.entropy)
            each = ELBO(rate=list(rates.values())[-1], distortion=out.distortion, entropy=out.entropy)
        if context is not None:
            without -= context.features_log_prob(levels, out.features).double().sum().item()
        usage.add(out.counted)
        reconstructions = model.reconstruct(out)
        decibels.append(psnr(levels, reconstructions))
        if observe is not None:
            observe(levels, reconstructions)
        images, dims = images + len(levels), levels[0].numel()
        skipped += len(batch.skipped)
        if stochastic:
            terms = sampled_elbos(encoder, priors, levels, labels, num_samples=num_draws, generator=generator)
            each = last = list(terms.values())[-1]
            sampled.add({name: term.rate for name, term in terms.items()}, last.distortion, last.entropy)
            weighted += last.importance_weighted.double().sum().item()
            variance += last.rate_error.double().square().sum().item()
        if observe_bounds is not None:
            assert each is not None  # real vectors are sampled
            observe_bounds(
                ImageBounds(
                    images=levels, reconstructions=reconstructions, labels=labels, bound=each, psnr=decibels[-1]
                )
            )
    if not images:
        raise ValueError("there is no test image to evaluate on")
    finite = torch.cat(decibels)
    finite = finite[torch.isfinite(finite)]
    return Evaluation(
        images=images,
        skipped=skipped,
        dims=dims,
        bound=(sampled if stochastic else plain).mean(images),
        deterministic=plain.mean(images) if stochastic and has_codes else None,
        draws=num_draws if stochastic else 0,
        rate_error=variance**0.5 / images,
        importance_weighted=weighted / images if stochastic else None,
        code_usage=usage,
        features_distortion=None if context is None else without / images,
        psnr=finite.mean().item() if len(finite) else math.inf,
        likelihood_fit=model.likelihood_fit,
    )


def _finite(value: Any) -> Any:
    """Plain data with None for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
