"""A run's folder while it is worked on: one program at a time, and its parts, which know what they were made of.

    codebook/            the tokenizer
    prior/ unigram/ ngram/    priors, each with the digests of the tokenizer and the images that it was trained on
    draft/               a head that proposes the prior's next codes, where it has one
    reconstructions/ samples/    pictures of each validation, see `vqvae.training.previews`
    state/run.json       the options
    state/images.json    digests of the images, see `vqvae.training.images`
    state/STAGE.ckpt     what resuming needs
    state/codes-*        latents that were encoded once

The options are written together with the first checkpoint that was made with them: a command that is refused, whatever
for and however late, leaves every byte as it was, and the run goes on as before.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric

import safefolder
from priors.grid import GridModel, TrainedOn
from vqvae import Autoencoder, fingerprint
from vqvae.interop.pickles import read_pickle
from vqvae.tokens import CodeDataset
from vqvae.training.costs import Outlook
from vqvae.training.images import Facts, save_facts
from vqvae.training.options import Run, go_on, save_run
from vqvae.training.records import Metrics, Stop


@dataclass(kw_only=True)
class Session:
    """What every stage works with.

    Attributes:
        images: what tells the images of this session from others; none where it looks at none.
        later: what is to be written into the folder once it is certain that the session goes on.
        outlook: how long it all takes.
        is_begun: whether the run's folder is of this session, see `begin`.
    """

    fabric: Fabric
    run: Run
    metrics: Metrics
    stop: Stop
    images: Facts = field(default_factory=dict)
    later: list[Callable[[], None]] = field(default_factory=list)
    outlook: Outlook = field(default_factory=Outlook)
    is_begun: bool = False

    def begin(self) -> None:
        """From here on the run is what was asked for: all of that has been tried."""
        self.metrics.begin()
        if self.fabric.is_global_zero:
            if not self.is_begun:
                save_run(self.run)
                save_facts(self.run, self.images)
            for write in self.later:
                write()
        self.is_begun = True
        self.later.clear()


@contextlib.contextmanager
def one_program(fabric: Fabric, run: Run) -> Iterator[None]:
    """Be the only program that trains in the run's folder; of several processes the first is it for all."""
    if not fabric.is_global_zero:
        yield
        return
    with safefolder.locks.one_writer(run.run, inside=True):
        yield


def state_path(run: Run, stage: str) -> Path:
    """The checkpoint of a stage."""
    return run.run / "state" / f"{stage}.ckpt"


def checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, its tensors mapped from the file.

    Raises:
        ValueError: it is damaged, or no checkpoint.
    """
    try:
        held = read_pickle(path)
    except ValueError as error:
        raise ValueError(f"{path} is corrupt: {str(error).removeprefix(f'{path} ')}") from error
    if not isinstance(held, dict) or type(held.get("step")) is not int or not isinstance(held.get("module"), dict):
        raise ValueError(f"{path} is corrupt, or no checkpoint of vqvae train")
    return held


def trained_on(run: Run, model: Autoencoder, images: Facts) -> TrainedOn:
    """What is noted of a prior that is trained on the latents of a model: of images, or of the run's --codes."""
    if run.codes is not None:
        return TrainedOn(fingerprint.of_tokenizer(model), CodeDataset(run.codes / "train").digest())
    train = images.get("train")
    return TrainedOn(fingerprint.of_tokenizer(model), None if train is None else train["timeless"])


def is_of(path: Path, of: TrainedOn | None) -> bool:
    """Whether a checkpoint goes on with the tokenizer that its stage is now trained on; one that does not say does."""
    known = checkpoint(path).get("trained_on")
    return known is None or of is None or known[0] == of.tokenizer


def check_parts(run: Run, model: Autoencoder, priors: Mapping[str, GridModel]) -> None:
    """ValueError where a prior of the run, by the name of its folder, is of another codebook than the run has."""
    for name, prior in priors.items():
        advice = f"train it again by `{go_on(run)}`"
        fingerprint.check_trained_on(model, prior, str(run.run / name), advice)


def tell_of_stale_parts(run: Run, model: Autoencoder) -> None:
    """Say what of the run was made with another codebook than it has now."""
    if (run.run / "prior").is_dir():
        try:
            check_parts(run, model, {"prior": GridModel.from_pretrained(run.run / "prior")})
        except ValueError as error:
            print(f"note: {error}", file=sys.stderr)
