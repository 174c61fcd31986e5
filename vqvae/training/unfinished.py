"""Models of a run that is still training, or was stopped, as its last checkpoint has them.

A checkpoint is replaced whole while the run goes on, so what is read here is all of one step.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safefolder
from priors import ContinuousPrior, Prior
from priors.grid import TrainedOn
from safefolder.building import build
from vqvae import VQVAE, Autoencoder
from vqvae.training.images import load_data
from vqvae.training.learner import kept_weights
from vqvae.training.objectives import START
from vqvae.training.options import Run, load_run
from vqvae.training.prior_data import known_class_names, known_classes
from vqvae.training.prior_kinds import filled
from vqvae.training.run_folder import checkpoint, state_path


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """What the last checkpoint of a stage has.

    Attributes:
        stage: codebook or prior.
        step, num_steps: of how many it is the weights.
        model: of a codebook's checkpoint.
        prior: of a prior's, or that in the loop of a codebook, once it has joined in.
    """

    stage: str
    step: int
    num_steps: int
    model: Autoencoder | None
    prior: Prior | ContinuousPrior | None

    def __str__(self) -> str:
        return f"{self.stage} of step {self.step:,} of {self.num_steps:,}"


def unfinished_codebook(folder: Path) -> Unfinished | None:
    """The codebook that a run is training; None where it has one, or has not begun.

    Raises:
        ValueError: the run's options or the checkpoint are damaged, or do not fit each other.
    """
    if (found := _begun(folder, "codebook")) is None:
        return None
    run, path, held = found
    weights = kept_weights(held)
    model = build(run.model.build, run.model.owner.__name__, _part(weights, "model."), path, keep_type=False)
    assert isinstance(model, Autoencoder)
    prior, num_steps = None, run.codebook_fit.num_steps
    in_loop = isinstance(model, VQVAE) and model.config.beta is not None
    if in_loop and int(weights["num_updates"]) >= math.ceil(START * num_steps):
        prior = _prior(run, model, held, _part(weights, "prior."), path)
    return Unfinished(stage="codebook", step=held["step"], num_steps=num_steps, model=model, prior=prior)


def unfinished_prior(folder: Path, model: Autoencoder) -> Unfinished | None:
    """The prior that a run is training on the codes of a model; None where it has one, or has not begun.

    Errors as `unfinished_codebook`. Whether it is of this model its `trained_on` says.
    """
    if (found := _begun(folder, "prior")) is None:
        return None
    run, path, held = found
    prior = _prior(run, model, held, _part(kept_weights(held), "prior."), path)
    if (of := held.get("trained_on")) is not None:
        prior.trained_on = TrainedOn(*of)
    return Unfinished(stage="prior", step=held["step"], num_steps=run.prior_fit.num_steps, model=None, prior=prior)


def _begun(folder: Path, stage: str) -> tuple[Run, Path, dict[str, Any]] | None:
    """The options and the checkpoint of a stage that is not finished."""
    if safefolder.folder.has_part(folder, stage) or not (folder / "state" / "run.json").is_file():
        return None
    run = load_run(folder)
    path = state_path(run, stage)
    return (run, path, _of_one_step(path)) if path.is_file() else None


def _of_one_step(path: Path) -> dict[str, Any]:
    """A checkpoint, of which nothing was read of another that took its place meanwhile."""
    while True:
        before = _identity(path)
        try:
            held = checkpoint(path)
        except ValueError:
            if _identity(path) == before:
                raise
        else:
            if _identity(path) == before:
                return held


def _identity(path: Path) -> tuple[int, int, int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _part(weights: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): each for name, each in weights.items() if name.startswith(prefix)}


def _prior(
    run: Run, model: Autoencoder, held: Mapping[str, Any], weights: Mapping[str, Any], path: Path
) -> Prior | ContinuousPrior:
    if "num_classes" in held:
        num_classes, names = held["num_classes"], held["class_names"]
    else:  # of a version that did not note it
        data = load_data(run) if run.codes is None else {}
        num_classes, names = known_classes(run, model, data), known_class_names(run, model, data)
    config = filled(run.prior, model, num_classes)
    prior = build(config.build, config.owner.__name__, weights, path)
    assert isinstance(prior, Prior | ContinuousPrior)
    prior.class_names = None if names is None else tuple(names)
    return prior
