"""The ELBO of a whole test set: what a tokenizer and its priors are worth in bits.

Everything is summed in float64 and nothing is dropped: the means are over every image that could be read. Models run in
float32, whatever they were trained in. Priors come by their interface: this package knows none of them.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

import safefolder
from vqvae.data import Batch
from vqvae.elbo import PriorLike, check_fit, rate
from vqvae.metrics import CodeUsage, psnr
from vqvae.model import VQVAE


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Means over the test images; `rate`, `distortion`, `entropy`, `negative_elbo` in nats per image.

    Attributes:
        images: how many images were read and counted.
        skipped: how many could not be read.
        dims: C·H·W, what `bits_per_dim` divides by.
        rate: cross entropy of the codes under each prior.
        negative_elbo: rate under the last prior + distortion − entropy.
        bits_per_dim: negative_elbo / (ln 2 · dims).
        usage, perplexity: of the codes of the test images, means over the codebooks.
        psnr: of the likelihood's mean against the image, in dB, mean over images that differ.
        code_usage: how often each code of each codebook occurred.
    """

    images: int
    skipped: int
    dims: int
    rate: dict[str, float]
    distortion: float
    entropy: float
    negative_elbo: float
    bits_per_dim: float
    usage: float
    perplexity: float
    psnr: float
    code_usage: CodeUsage

    def save(self, path: Path, **more: float | int | str) -> None:
        """Write the figures as JSON, with `more` entries, whole or not at all; per codebook where there are several."""
        figures = {name: value for name, value in vars(self).items() if name != "code_usage"}
        if self.code_usage.axes:
            figures |= {"usage_by_codebook": self.code_usage.usages}
            figures |= {"perplexity_by_codebook": self.code_usage.perplexities}
        safefolder.write_text(path, json.dumps({**figures, **more}, indent=2) + "\n")

    def table(self, seconds: float | None = None) -> str:
        """The figures as lines for a terminal."""
        bits = 1 / (math.log(2) * self.dims)
        rows = [(f"rate, {name} prior", value) for name, value in self.rate.items()]
        rows += [("distortion", self.distortion), ("posterior entropy", self.entropy)]
        lines = [f"{'':24}{'nats/image':>12}{'bits/dim':>10}"]
        lines += [f"{name:24}{nats:12.2f}{nats * bits:10.4f}" for name, nats in rows]
        lines += [f"{'negative ELBO':24}{self.negative_elbo:12.2f}{self.bits_per_dim:10.4f}"]
        lines += [f"{'usage':24}{self.usage:12.1%}", f"{'perplexity':24}{self.perplexity:12.1f}"]
        lines += [f"{'PSNR of the mean':24}{self.psnr:9.2f} dB"]
        if seconds is not None:
            lines += [f"{'time':24}{seconds:10.0f} s"]
        skipped = f", {self.skipped} that could not be read left out" if self.skipped else ""
        return "\n".join([*lines, f"{self.images} test images of {self.dims} dimensions{skipped}"])


@torch.no_grad()
def evaluate(model: VQVAE, priors: Mapping[str, PriorLike], batches: Iterable[Batch]) -> Evaluation:
    """Run a tokenizer and its priors over test images.

    Args:
        model: in eval mode.
        priors: by name; the negative ELBO is that of the last.
        batches: of images and labels, read once. Where a prior takes labels, it is given those of the images.

    Raises:
        ValueError: a prior does not fit the tokenizer's codes, no prior was given, or there is no image.
    """
    if not priors:
        raise ValueError("an ELBO needs at least one prior, got none")
    for name, prior in priors.items():
        check_fit(model, prior, name)
    device = next(model.parameters()).device
    rates = dict.fromkeys(priors, 0.0)
    distortion = entropy = 0.0
    usage = CodeUsage(model.num_codes, model.quantizer.code_axes)
    decibels: list[torch.Tensor] = []
    images = skipped = 0
    for batch in batches:
        levels = batch.images.to(device)
        labels = None if batch.labels is None else batch.labels.to(device)
        out = model(levels)
        for name, prior in priors.items():
            rates[name] += rate(prior, out.quantized.codes, labels).double().sum().item()
        distortion += out.distortion.double().sum().item()
        entropy += out.quantized.entropy.double().sum().item()
        usage.add(out.quantized.codes)
        decibels.append(psnr(levels, model.reconstruct(out)))
        images += len(levels)
        skipped += len(batch.skipped)
    if not images:
        raise ValueError("there is no test image to evaluate on")
    rates = {name: nats / images for name, nats in rates.items()}
    distortion, entropy = distortion / images, entropy / images
    negative = list(rates.values())[-1] + distortion - entropy
    finite = torch.cat(decibels)
    finite = finite[torch.isfinite(finite)]
    return Evaluation(
        images=images,
        skipped=skipped,
        dims=model.num_dims,
        rate=rates,
        distortion=distortion,
        entropy=entropy,
        negative_elbo=negative,
        bits_per_dim=negative / (math.log(2) * model.num_dims),
        usage=usage.usage,
        perplexity=usage.perplexity,
        psnr=finite.mean().item() if len(finite) else math.inf,
        code_usage=usage,
    )
