"""The latents that a prior is trained on: how they come from images, and how they are kept.

They are encoded once and kept in memory, and in the run's folder for a run that is resumed or another prior; or, live,
each batch anew. Of several processes each encodes its share of the training images, and all get all: an epoch's order
goes through the whole set. Where latents are sampled, one generator goes through all images, so that any number of
processes sample what one does; there each process encodes all of them.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from lightning_fabric import Fabric
from torch import Tensor, distributed

import safefolder
from priors import ContinuousPrior, NGramPrior, Prior, UnigramPrior
from vqvae import VQVAE, Autoencoder, GaussianVAE
from vqvae.data import Batch, Images, batches
from vqvae.data.batching import index_batches
from vqvae.evaluation import images_at_once
from vqvae.model import PriorGuidedEncoder
from vqvae.training.progress import Progress
from vqvae.training.records import Metrics

# Jacobi iterations of a prior in the loop that sample the codes to train on, in far less time than a walk. An
# evaluation walks.
NUM_ITERATIONS = 2


class Inputs(NamedTuple):
    """What a step is trained on: images of the codebook, latents of the prior.

    inputs: images; codes, int64 "b *grid"; or means and log standard deviations "b *grid 2d".
    labels: int64, "b"; None where the set has no labels.
    skipped: (name, reason) of each image that should have been here and could not be read.
    """

    inputs: Tensor
    labels: Tensor | None
    skipped: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Latents:
    """What a prior is trained on, for a set of images in memory, and their labels.

    Codes; or the means and the log standard deviations of Gaussian posteriors, side by side in the last axis.
    """

    values: Tensor
    labels: Tensor | None

    def at(self, indices: np.ndarray) -> Inputs:
        chosen = torch.from_numpy(indices)
        values = self.values[chosen]
        labels = None if self.labels is None else self.labels[chosen]
        return Inputs(values if values.is_floating_point() else values.long(), labels)

    def batches(self, **order: Any) -> Generator[Inputs, None, None]:
        """Shuffled batches without end, in the order that images would come in."""
        return (self.at(indices) for indices in index_batches(len(self.values), **order))


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How images become latents: by which model, and where.

    Attributes:
        guiding_prior: the prior in the loop of a model that has one.
    """

    fabric: Fabric
    metrics: Metrics
    seed: int
    model: Autoencoder
    guiding_prior: Any


@torch.no_grad()
def encode(encoding: Encoding, batch: Batch, generator: torch.Generator) -> Tensor:
    """The latents of a batch, as `Latents` holds them, on the device.

    They are computed in float32 as an evaluation does, unless a prior is in the loop.

    Args:
        generator: a prior of a stochastic encoder is for the codes that its posterior gives, not only the likeliest.
    """
    fabric, model = encoding.fabric, encoding.model
    levels = batch.images.to(fabric.device)
    encoder = model.through(encoding.guiding_prior, to_device(batch.labels, fabric), NUM_ITERATIONS)
    if isinstance(model, GaussianVAE):
        out = model(levels)
        return torch.cat([out.mean, out.log_std], -1)
    if isinstance(encoder, PriorGuidedEncoder):
        with fabric.autocast():  # draws, which rounding moves by less than the iterations do
            return encoder.encode(levels, generator).int()
    if encoder.stochastic:
        return encoder.draw(levels, generator).latents.int()
    return encoder.encode(levels).int()


def encoded(
    encoding: Encoding, images: Images, name: str, limit: int | None = None, rows: np.ndarray | None = None
) -> Iterator[Inputs]:
    """The latents of every image that can be read, or of about the first `limit`, or of those at `rows`, in batches and
    in order."""
    fabric, size = encoding.fabric, images_at_once(*images.shape[1:])
    generator = torch.Generator(fabric.device).manual_seed(step_seed(encoding.seed, name, 0, 0) % 2**63)
    total = len(images) if limit is None else min(limit, len(images))
    stream: Iterator[Batch] = batches(images, size)
    if rows is not None:
        total = len(rows)
        stream = (images.__getitems__(rows[start : start + size]) for start in range(0, total, size))
    done = 0
    with Progress(name, total, "img", shown=fabric.is_global_zero) as bar:
        for batch in with_progress(stream, bar, encoding.metrics):
            if not len(batch.images):
                continue
            yield Inputs(encode(encoding, batch, generator).cpu(), batch.labels)
            done += len(batch.images)
            if limit is not None and done >= limit:
                return


def encoded_together(encoding: Encoding, images: Images, name: str) -> Iterator[Inputs]:
    """What `encoded` gives of all images where nothing is sampled; each process encodes every `world_size`-th batch.

    All processes take part. The batches are those of one process, so the latents are too, to the bit.
    """
    fabric = encoding.fabric
    order, unused = index_batches(len(images), images_at_once(*images.shape[1:])), torch.Generator(fabric.device)
    num_read = 0
    with Progress(name, len(images), "img", shown=fabric.is_global_zero) as bar:
        while indices := list(islice(order, fabric.world_size)):
            mine = None
            if fabric.global_rank < len(indices):
                batch = images.__getitems__(indices[fabric.global_rank])
                latents = encode(encoding, batch, unused).cpu() if len(batch.images) else None
                mine = latents, batch.labels, batch.skipped
            found: list[Any] = [None] * fabric.world_size
            distributed.all_gather_object(found, mine)
            for latents, labels, skipped in found[: len(indices)]:
                encoding.metrics.skip(skipped)
                if latents is not None:
                    yield Inputs(latents, labels)
                    num_read += len(latents)
            bar.update(sum(map(len, indices)))
    if not num_read:
        next(batches(images, images_at_once(*images.shape[1:])))  # which says so


def encode_all(
    encoding: Encoding, images: Images, name: str, limit: int | None = None, rows: np.ndarray | None = None
) -> Latents:
    """What `encoded` gives, in memory; all processes take part."""
    model = encoding.model
    draws = isinstance(model, VQVAE) and (model.stochastic or model.config.beta is not None)
    if encoding.fabric.world_size > 1 and limit is None and rows is None and not draws:
        parts = list(encoded_together(encoding, images, name))
    else:
        parts = list(encoded(encoding, images, name, limit, rows))
    if not parts:
        raise ValueError(f"none of the {len(images) if rows is None else len(rows)} images to encode can be read")
    known = [part.labels for part in parts if part.labels is not None]
    values = torch.cat([part.inputs for part in parts])
    return Latents(values, torch.cat(known) if len(known) == len(parts) else None)


def encode_or_load(
    encoding: Encoding,
    images: Images,
    name: str,
    limit: int | None = None,
    rows: np.ndarray | None = None,
    *,
    path: Path,
    about: str,
    later: list[Callable[[], None]],
) -> Latents:
    """`encode_all`, or what a file of it holds, if it is of the same models and images.

    Where the file is missing, broken or of something else, another is written whole or not at all, later.

    Args:
        about: the digest of the images.
        later: what is to be written later.
    """
    fabric = encoding.fabric

    def digest(chosen: np.ndarray | None) -> str:
        found = blake2b(digest_size=16)
        batch_size = images_at_once(*images.shape[1:])
        facts = [encoding.seed, name, limit, len(images), images.shape, about, batch_size, NUM_ITERATIONS]
        facts += [str(fabric.strategy.precision.precision)]
        facts += [] if chosen is None else [chosen.tolist()]
        found.update(json.dumps(facts).encode())
        for part in dict.fromkeys((encoding.model, encoding.guiding_prior)):
            for key, value in part.state_dict().items():
                found.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
                found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return found.hexdigest()

    # Where all are there, a few need not be encoded by themselves.
    found = _load_latents(path, digest(None))
    if found is None and rows is not None:
        found = _load_latents(path, digest(rows))
    # No process writes before all have looked, and all encode where one has to.
    if fabric.all_reduce(torch.tensor(int(found is None), device=fabric.device), reduce_op="max") or found is None:
        found = encode_all(encoding, images, name, limit, rows)
        later.append(functools.partial(_save_latents, path, found, digest(rows)))
    return found


def _save_latents(path: Path, latents: Latents, digest: str) -> None:
    tensors = {"values": latents.values} | ({} if latents.labels is None else {"labels": latents.labels})
    with safefolder.files.replacing(path) as scratch:
        safetensors.torch.save_file(tensors, scratch, {"of": digest})


def _load_latents(path: Path, digest: str) -> Latents | None:
    try:
        with safetensors.safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("of") != digest:
                return None
            has_labels = "labels" in set(file.keys())
            return Latents(file.get_tensor("values"), file.get_tensor("labels") if has_labels else None)
    except (OSError, safetensors.SafetensorError):
        return None


def live_batches(
    encoding: Encoding, images: Images, *, num_workers: int = 0, **order: Any
) -> Generator[Inputs, None, None]:
    """Shuffled batches without end, each encoded when it is asked for; `order` is that of `vqvae.data.batching`.

    What is sampled depends on the seed, the rank and the batch's number alone.
    """
    with contextlib.closing(batches(images, num_workers=num_workers, **order)) as stream:
        for step, batch in enumerate(stream, order["start"]):
            seed = step_seed(order["seed"], "live", step, order["rank"]) % 2**63
            generator = torch.Generator(encoding.fabric.device).manual_seed(seed)
            values = encode(encoding, batch, generator)
            yield Inputs(values if values.is_floating_point() else values.long(), batch.labels, batch.skipped)


def live_sample(stream: Iterable[Inputs], num_images: int) -> Tensor:
    """Latents of so many images, or somewhat more, of a live stream."""
    parts = []
    for batch in stream:
        parts.append(batch.inputs)
        if sum(map(len, parts)) >= num_images:
            break
    return torch.cat(parts)


def fit_baselines(model: VQVAE, parts: Iterable[Tensor]) -> dict[str, Prior]:
    """Priors that count, by name, of codes "b *grid" in parts; n-grams where the grid has contexts of 63 bits."""
    sizes: dict[str, Any] = {"num_codes": model.num_codes, "grid": model.grid}
    found: dict[str, Any] = {"unigram": UnigramPrior(**sizes)}
    with contextlib.suppress(ValueError):
        found["ngram"] = NGramPrior(**sizes)
    for part in parts:
        for prior in found.values():
            prior.fit(part)
    return found


def sampled_latents(prior: Prior | ContinuousPrior, values: Tensor) -> Tensor:
    """What a prior scores, of `Latents.values`; draws are from torch's global generator."""
    if isinstance(prior, Prior):
        return values
    mean, log_std = values.chunk(2, -1)
    return mean + log_std.exp() * torch.randn_like(mean)


def with_progress(stream: Iterable[Batch], bar: Progress, metrics: Metrics) -> Iterator[Batch]:
    """Batches on their way, with the bar moved on and unreadable images named."""
    for batch in stream:
        metrics.skip(batch.skipped)
        yield batch
        bar.update(len(batch.images) + len(batch.skipped))


def step_seed(seed: int, name: str, step: int, rank: int) -> int:
    """64 bits that no other step (in `fit`: batch), process or stage of the run has."""
    return int.from_bytes(blake2b(f"{seed} {name} {step} {rank}".encode(), digest_size=8).digest())


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """The same there. A copy to a GPU is queued, from pinned memory: another would wait for the steps before it."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=device.type == "cuda")


def to_device(labels: Tensor | None, fabric: Fabric) -> Tensor | None:
    return None if labels is None else on_device(labels, fabric.device)
