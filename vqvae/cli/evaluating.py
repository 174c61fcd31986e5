"""The figures of one model on images: its bits, and, where feature networks are named, what the eye sees."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from priors import NormalPrior, UniformPrior
from vqvae.cli.image_choice import Chosen
from vqvae.cli.opening import Opened
from vqvae.codec.model_fingerprint import fingerprint
from vqvae.data import Batch, batches
from vqvae.evaluation import Evaluation, images_at_once
from vqvae.evaluation import evaluate as evaluate_images
from vqvae.levels import times
from vqvae.looks import VGG16, EfficientNetLite, Inception, LooksMeter
from vqvae.looks.features import FeatureNetwork
from vqvae.looks.meter import Looks
from vqvae.looks.perceptual import published_weights

# Latents that are sampled together.
_SAMPLED_AT_ONCE = 100
Network = Literal["lite0", "lite2", "vgg16", "inception"]


class _NotAsked(tuple):
    """Empty, and told from the empty tuple of an option that was given without a value."""


NOT_ASKED: tuple[Network, ...] = _NotAsked()


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured of one model.

    Attributes:
        evaluation: its bits.
        looks: its figures of the eye; None where no network was named.
        fingerprint: of the model and the prior of the bound.
        data: the name of the images.
        split: which part of them.
    """

    evaluation: Evaluation
    looks: Looks | None
    fingerprint: str
    data: str
    split: str

    def save(self, path: Path) -> None:
        """Write the figures as JSON."""
        more = {} if self.looks is None else {"looks": self.looks.plain()}
        self.evaluation.save(path, models=self.fingerprint, data=self.data, split=self.split, **more)


def measure(
    opened: Opened,
    chosen: Chosen,
    *,
    prior: str | None = None,
    looks: Sequence[Network] = (),
    num_samples: int | None = None,
) -> Measured:
    """Measure the model of a run or of a folder on images.

    Args:
        prior: of the bound; the run's own unless given.
        looks: the feature networks of the figures of the eye; none for bits alone.
        num_samples: how many images of the prior the eye sees; as many as there are images unless given.
    """
    model, images = opened.model, chosen.images
    if num_samples is not None and not looks:
        raise ValueError("--num-samples is for the figures of the eye; name a network with --looks")
    if (num_samples is not None and 0 < num_samples < 5) or (num_samples or 0) < 0:
        raise ValueError(f"--num-samples must be 0, for none, or at least 5, got {num_samples}")
    priors = opened.priors(prior)
    last = list(priors.values())[-1]
    meter = LooksMeter([_network(name) for name in dict.fromkeys(looks)], prepared=chosen.prepared) if looks else None
    if meter is not None and min(model.size) < meter.smallest:
        raise ValueError(
            f"--looks needs images of at least {meter.smallest}x{meter.smallest}, those of {opened.source} have "
            f"{times(model.size)}"
        )
    labels: list[Tensor | None] = []
    with tqdm(total=len(images), desc="evaluate", unit="img", disable=None) as bar:
        stream = _watched(batches(images, images_at_once(*model.size)), bar, labels)
        evaluation = evaluate_images(model, priors, stream, observe=None if meter is None else meter.add)
    if meter is not None and num_samples != 0 and not isinstance(last, UniformPrior | NormalPrior):
        # The classes of the images, so that samples are of the same mixture of them.
        known = [each for each in labels if each is not None] if last.num_classes is not None else []
        for latents in _sampled(last, num_samples or evaluation.images, torch.cat(known) if known else None):
            for part in latents.split(images_at_once(*model.size)):
                meter.add_samples(model.decode(part))
    return Measured(
        evaluation=evaluation,
        looks=None if meter is None else meter.looks(),
        fingerprint=fingerprint(model, last).hex(),
        data=chosen.public_name,
        split=chosen.split,
    )


def named(looks: tuple[Network, ...]) -> tuple[Network, ...]:
    """The networks of --looks; none where it is not given. ValueError where it is, and names none."""
    if not looks and looks is not NOT_ASKED:
        raise ValueError(f"got --looks without a network; expected one or more of {', '.join(get_args(Network))}")
    return looks


def _network(name: Network) -> FeatureNetwork:
    if name == "vgg16":
        published_weights()  # before half a gigabyte is downloaded
        return VGG16()
    return Inception() if name == "inception" else EfficientNetLite(size=0 if name == "lite0" else 2)


def _watched(stream: Iterable[Batch], bar: tqdm, labels: list[Tensor | None]) -> Iterator[Batch]:
    for batch in stream:
        for name, reason in batch.skipped:
            bar.write(f"skipped {name}: {reason}", file=sys.stderr)
        labels.append(batch.labels)
        yield batch
        bar.update(len(batch.images))


def _sampled(prior: Any, num: int, labels: Tensor | None) -> Iterator[Tensor]:
    """Latents in parts, of the same mixture of classes as the images."""
    generator = torch.Generator().manual_seed(0)
    with tqdm(total=num, desc="sample", unit="img", disable=None) as bar:
        for part in torch.arange(num).split(_SAMPLED_AT_ONCE):
            chosen = None if labels is None else labels[part * len(labels) // num]
            yield prior.sample(len(part), chosen, generator=generator)
            bar.update(len(part))
