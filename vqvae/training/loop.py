"""`fit`, the one loop that trains a codebook or a prior."""

import contextlib
import functools
import math
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import torch

from priors.grid import TrainedOn
from vqvae.training.latents import Inputs, on_device, step_seed, to_device
from vqvae.training.learner import Learner, Objective, mean_terms
from vqvae.training.objectives import CodebookObjective
from vqvae.training.options import FitConfig, go_on
from vqvae.training.previews import Preview
from vqvae.training.progress import Progress
from vqvae.training.records import load_state, save_state
from vqvae.training.run_folder import Session, checkpoint, is_of, state_path


def fit(
    session: Session,
    name: str,
    objective: Objective,
    stream: Callable[..., Generator[Inputs, None, None]],
    options: FitConfig,
    validate: Callable[[Any], Mapping[str, float]],
    preview: Preview,
    began: float,
    unit: str,
    of: TrainedOn | None = None,
) -> Any:
    """Fit one model, from the last checkpoint if there is one; its objective with the final weights comes back.

    A step depends on the seed and the step's number alone, so a resumed run repeats the uninterrupted one to the bit.
    It takes `options.accumulate` batches, one after the other: what it minimises is the mean over them, and statistics,
    moving averages and processes meet once, after the last.

    Args:
        stream: batches without end; takes what `vqvae.data.batching.index_batches` does.
        validate: figures of the objective with the weights that are kept.
        preview: draws a picture of it.
        began: when the stage began, of `time.monotonic`.
        unit: what an input is called beside the bar.
        of: what the checkpoint must have been made of; one that was made of something else counts for nothing.
    """
    fabric, run, metrics, stop = session.fabric, session.run, session.metrics, session.stop
    path = state_path(run, name)
    is_new = not path.exists() or not is_of(path, of)
    held = {} if is_new else checkpoint(path)
    if not is_new and held["step"] >= options.num_steps:
        # What precision was asked for this time must not change what was trained in another.
        return Learner.finished(objective, held).to(fabric.device)
    if is_new and path.exists():
        fabric.print(f"{name}: trained anew, as the codebook is another than it was trained on", file=sys.stderr)
    learner = Learner(fabric, objective, options)
    state: dict[str, Any] = {**learner.state, "step": 0, "seconds": 0.0}
    if not is_new:
        load_state(fabric, path, state)
        learner.warms_up = held.get("ema_warms_up", False)
    start = saved = state["step"]
    metrics.stage(name, start)
    began -= state["seconds"]

    @contextlib.contextmanager
    def diverging(step: int) -> Iterator[None]:
        """A ValueError inside says what to do about it: weights that diverged give features that no code is near to."""
        try:
            yield
        except ValueError as error:
            raise ValueError(
                f"{name} stopped at step {step}: {error}; the last good checkpoint is "
                f"{f'{path} of step {saved}' if saved else 'none'}; lower --{name}-fit.learning-rate "
                f"(now {options.learning_rate:g}) or take --precision 32-true, and go on from it with `{go_on(run)}`"
            ) from error

    objective.train()
    world = {"rank": fabric.global_rank, "world_size": fabric.world_size}
    parts = options.accumulate
    incoming = stream(batch_size=options.batch_size, start=start * parts, seed=run.seed, **world)
    each = options.batch_size * parts * fabric.world_size
    bar = Progress(
        name,
        options.num_steps * each,
        unit,
        start=start * each,
        each=each,
        shown=fabric.is_global_zero,
        outlook=functools.partial(session.outlook.told, name),
    )
    # Whether all steps were finite since that was looked at. On a GPU to look is to wait for it, so that is done only
    # where figures are read anyway and before anything is kept. (A quantizer and a discriminator look at each step.)
    finite = torch.ones((), dtype=torch.bool, device=fabric.device)

    def check_finite(step: int) -> None:
        with diverging(step):
            if not finite:
                raise ValueError("the objective or its gradient is not finite")

    with bar, contextlib.closing(incoming), stop.catching():
        for step in range(start, options.num_steps):
            learner.set_rate(schedule(step, options))
            found = []
            for number in range(step * parts, (step + 1) * parts):  # of the batch, among those of all steps
                batch = next(incoming)
                metrics.skip(batch.skipped)
                # Dropout draws from a stream of its own for every batch, process and stage, whatever came before.
                torch.manual_seed(step_seed(run.seed, name, number + 1, fabric.global_rank))
                with learner.accumulating(number + 1 < (step + 1) * parts):
                    with diverging(step):
                        part = learner.module(on_device(batch.inputs, fabric.device), to_device(batch.labels, fabric))
                    fabric.backward(part["objective"] / parts)
                found.append({key: value.detach() for key, value in part.items()})
            terms = mean_terms(found)
            objective.rest()
            norm = learner.clip(options.max_norm)
            done = step + 1
            is_noted = step % 20 == 0 or done == options.num_steps
            finite &= torch.isfinite(terms["objective"] + norm)
            if fabric.device.type != "cuda" or is_noted or step == start:
                check_finite(step)
            terms["model/gradient"] = norm  # before it was clipped
            learner.step()
            with diverging(step):
                terms |= learner.step_rival()
            if step == start and not path.exists():  # there is nothing that other options could spoil
                session.begin()
            figures = None
            if is_noted or step == start:
                figures = {key: value.item() for key, value in terms.items()}
            if figures is not None and is_noted:
                metrics.add(done, "train", {**figures, "seconds": time.monotonic() - began})
            bar.update(each, figures)
            if done % options.validate_every == 0 or done == options.num_steps:
                check_finite(step)
                with learner.evaluating() as kept, diverging(done):
                    metrics.add(done, "test", validate(kept))
                    if (png := preview.png(kept)) is not None:
                        metrics.picture(done, png)
            stopping = stop.requested(fabric, step)
            if done % options.save_every == 0 or done == options.num_steps or stopping:
                check_finite(step)
                session.begin()
                state.update(step=done, seconds=time.monotonic() - began)
                save_state(fabric, path, {**state, **_notes(objective, of), "ema_warms_up": learner.warms_up})
                saved = done
            if stopping:
                fabric.print(f"{name}: saved at step {done}; go on with `{go_on(run)}`", file=sys.stderr)
                sys.exit(128 + stopping)
    return learner.ema_weights()


def _notes(objective: Objective, of: TrainedOn | None) -> dict[str, Any]:
    """What a checkpoint says for whoever looks at it while the run trains, see `vqvae.training.unfinished`."""
    notes: dict[str, Any] = {"trained_on": None if of is None else list(of)}
    if isinstance(objective, CodebookObjective):
        return notes
    names = objective.prior.class_names
    return {**notes, "num_classes": objective.prior.num_classes, "class_names": None if names is None else list(names)}


def schedule(step: int, options: FitConfig) -> float:
    """The share of the learning rate at a step: linear warm-up, cosine decay to a fiftieth."""
    warm = min(1.0, (step + 1) / max(1, options.num_warmup))
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / options.num_steps)))
