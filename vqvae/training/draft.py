"""The draft of a prior: a head that proposes codes, fitted to the finished prior, so that sampling takes less time.

It changes no sample's distribution (`priors.speculation`), so nothing of a run depends on it. It learns in a quarter of
the prior's steps from a quarter of its batches, which is some 5 % of the prior's own time.
"""

import copy
import dataclasses
import math
import sys
import time

import torch

from priors import ContinuousPrior, DraftHead, Prior
from priors.grid import TrainedOn
from priors.raster import RasterPrior
from vqvae.training.latents import step_seed, to_device
from vqvae.training.loop import fit
from vqvae.training.objectives import DraftObjective
from vqvae.training.options import FitConfig, Run
from vqvae.training.previews import Preview
from vqvae.training.prior_data import PriorData
from vqvae.training.progress import duration
from vqvae.training.run_folder import Session

# Weights of a prior from which on a pass over several codes costs little more than one, so that a draft pays.
MANY_WEIGHTS = 2**24
# Of the prior's steps and batches; and how much faster the head learns.
_SHARE = 4
_FASTER = 5


def wants_draft(run: Run, prior: Prior | ContinuousPrior) -> bool:
    """Whether a prior gets one."""
    if not isinstance(prior, RasterPrior) or prior.num_positions == 1 or run.strategy.startswith("fsdp"):
        return False
    many = sum(weight.numel() for weight in prior.parameters()) >= MANY_WEIGHTS
    return many if run.draft == "auto" else run.draft == "yes"


def fit_draft(session: Session, prior: RasterPrior, known: PriorData, of: TrainedOn) -> None:
    """A head on a finished prior, to `draft/`; all processes take part."""
    fabric, run = session.fabric, session.run
    began = time.monotonic()
    prior = copy.deepcopy(prior).to(fabric.device)
    torch.manual_seed(step_seed(run.seed, "draft", 0, 0))
    objective = DraftObjective(DraftHead.of(prior), prior)
    watched = (known.watched.inputs.to(fabric.device), to_device(known.watched.labels, fabric))

    def validate(kept: DraftObjective) -> dict[str, float]:
        kept._prior = [prior]
        return {"accepted": kept.accepted(*watched).mean().item()}

    options = draft_options(run.prior_fit)
    preview = Preview(fabric, None, 0)
    kept = fit(session, "draft", objective, known.batches, options, validate, preview, began, "grid", of)
    if fabric.is_global_zero:
        kept.head.eval()
        kept.head.accepted.copy_(kept.accepted(*watched))
        kept.head.save_pretrained(run.run / "draft")
        print(
            f"draft: {options.num_steps:,} steps done, {duration(time.monotonic() - began)} this time; the prior takes "
            f"{kept.head.accepted[0]:.0%} of its guesses; {run.run}/: draft/",
            file=sys.stderr,
        )
    fabric.barrier()


def draft_options(options: FitConfig) -> FitConfig:
    """How the head is fitted, by how its prior was."""

    def share(number: int) -> int:
        return math.ceil(number / _SHARE)

    return dataclasses.replace(
        options,
        num_steps=share(options.num_steps),
        batch_size=share(options.batch_size),
        learning_rate=_FASTER * options.learning_rate,
        num_warmup=share(options.num_warmup),
        muon=None,
        ema=None,
        validate_every=share(options.validate_every),
        save_every=share(options.save_every),
    )
