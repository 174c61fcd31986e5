"""What a prior is trained on, wherever its latents are: in memory, made batch by batch, or on the disk.

in memory      the default: encoded once, and kept in the run's folder
live           --live: each batch is encoded when it is asked for
on the disk    --codes: a tokenized set that `vqvae tokenize` wrote, memory-mapped
"""

import functools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vqvae import VQVAE, Autoencoder
from vqvae.data import Images
from vqvae.data.batching import index_batches
from vqvae.data.permutation import Permutation
from vqvae.evaluation import images_at_once
from vqvae.tokens import CodeDataset, check_same_origin
from vqvae.tokens.buckets import check_one_size
from vqvae.training.latents import Encoding, Inputs, encode_or_load, encoded, live_batches, live_sample
from vqvae.training.options import Run
from vqvae.training.run_folder import Session

# Test images that are looked at during training. Nothing is chosen by them, so the final figures stay honest.
NUM_WATCHED = 512
# Training images by which real latents are standardised where they are not all at hand.
LIVE_SAMPLE = 10_000
# Rows that are looked at together where all have to be.
PART = 10_000


@dataclass(frozen=True, kw_only=True)
class PriorData:
    """What a prior is trained on.

    Attributes:
        batches: shuffled batches without end; takes what `vqvae.data.batching.index_batches` does.
        parts: all of it once, in parts.
        sample: some of it, or all where it is in memory.
        watched: of the test images, to look at during training.
    """

    batches: Callable[..., Generator[Inputs, None, None]]
    parts: Callable[[], Iterable[Tensor]]
    sample: Callable[[], Tensor]
    watched: Inputs


def stored_or_encoded(
    session: Session, model: Autoencoder, guiding_prior: Any, data: Mapping[str, Images]
) -> PriorData:
    """The latents that the run's options ask for.

    Args:
        guiding_prior: the prior in the loop of a model that has one.
        data: images by split; none where the run has codes.

    Raises:
        ValueError: codes that are not there, or are of another tokenizer.
    """
    run = session.run
    if run.codes is not None:
        train, test = stored_parts(run.codes, model)
        return PriorData(
            batches=functools.partial(_stored_batches, train),
            parts=functools.partial(_stored_parts, train),
            sample=lambda: _stored(train, np.arange(min(PART, len(train)))).inputs,
            watched=_stored(test, np.arange(min(NUM_WATCHED, len(test)))),
        )
    encoding = Encoding(
        fabric=session.fabric, metrics=session.metrics, seed=run.seed, model=model, guiding_prior=guiding_prior
    )
    rows = rows_seen(run, len(data["train"]), session.fabric.world_size)
    kept = {
        split: encode_or_load(
            encoding,
            data[split],
            f"encode {split}",
            limit=limit,
            rows=rows if split == "train" else None,
            path=run.run / "state" / f"codes-{split}.safetensors",
            about=session.images[split]["digest"],
            later=session.later,
        )
        for split, limit in {"test": NUM_WATCHED, **({} if run.live else {"train": None})}.items()
    }
    watched = kept["test"].at(np.arange(min(NUM_WATCHED, len(kept["test"].values))))
    if not run.live:
        values = kept["train"].values
        return PriorData(
            batches=kept["train"].batches, parts=lambda: values.split(PART), sample=lambda: values, watched=watched
        )
    live = functools.partial(live_batches, encoding, data["train"], num_workers=run.data.num_workers)
    first = {"batch_size": images_at_once(*model.size), "seed": run.seed, "start": 0, "rank": 0, "world_size": 1}
    return PriorData(
        batches=live,
        parts=lambda: (batch.inputs for batch in encoded(encoding, data["train"], "encode train", rows=rows)),
        sample=lambda: live_sample(live(**first), min(LIVE_SAMPLE, len(data["train"]))),
        watched=watched,
    )


def rows_seen(run: Run, num_images: int, world_size: int) -> np.ndarray | None:
    """The training images that a prior is fitted to where its steps are too few to look at half of them, in order; None
    is all. Of a short trial no more are encoded, and counted, than its steps can see."""
    options = run.prior_fit
    seen = options.num_steps * options.accumulate * options.batch_size * world_size
    if 2 * seen > num_images:
        return None
    return np.sort(Permutation(num_images, (run.seed, 0))(np.arange(seen)))


def known_classes(run: Run, model: Autoencoder, data: Mapping[str, Images]) -> int | None:
    """How many classes a prior learns of what `stored_or_encoded` gives; None without labels. Errors as there."""
    return _labelled(run, model, data).num_classes if run.labels else None


def known_class_names(run: Run, model: Autoencoder, data: Mapping[str, Images]) -> tuple[str, ...] | None:
    """What those classes are called, where that is known. Errors as there."""
    return _labelled(run, model, data).class_names if run.labels else None


def _labelled(run: Run, model: Autoencoder, data: Mapping[str, Images]) -> Images | CodeDataset:
    return data["train"] if run.codes is None else stored_codes(run.codes, "train", model)


def stored_parts(folder: Path, model: Autoencoder) -> tuple[CodeDataset, CodeDataset]:
    """Both parts of a tokenized set, if they are of this model and of one source. Errors as `stored_codes`."""
    train, test = (stored_codes(folder, split, model) for split in ("train", "test"))
    check_same_origin(train, test)
    return train, test


def stored_codes(folder: Path, split: str, model: Autoencoder) -> CodeDataset:
    """The part of a tokenized set, if it is one of this model's.

    Raises:
        ValueError: no such set, one of another tokenizer, or a model whose prior is for other codes than the likeliest.
    """
    if not isinstance(model, VQVAE) or model.config.beta is not None or model.stochastic:
        what = "a posterior that codes are sampled from"
        if not isinstance(model, VQVAE) or model.config.beta is not None:
            what = "a prior in its loop" if isinstance(model, VQVAE) else "real latents"
        raise ValueError(
            f"--codes {folder} are the likeliest of an encoder by itself, but this model has {what}, and a prior is "
            "for what comes of that: leave --codes out"
        )
    check_one_size(folder, split)
    if not (folder / split).is_dir():
        raise ValueError(
            f"{folder} has no {split}: a prior is trained on train and watched on test; run `vqvae tokenize` "
            "without --split"
        )
    codes = CodeDataset(folder / split)
    codes.check_tokenizer(model)
    return codes


def _stored(codes: CodeDataset, indices: np.ndarray) -> Inputs:
    found = codes.__getitems__(indices)
    return Inputs(found.codes, found.labels)


def _stored_batches(codes: CodeDataset, **order: Any) -> Generator[Inputs, None, None]:
    return (_stored(codes, indices) for indices in index_batches(len(codes), **order))


def _stored_parts(codes: CodeDataset) -> Iterator[Tensor]:
    for first in range(0, len(codes), PART):
        yield codes.__getitems__(range(first, min(first + PART, len(codes)))).codes
