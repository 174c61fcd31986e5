"""One session of a run: its stages, and what is said before and after them."""

import contextlib
import sys
import time
from collections.abc import Mapping

import torch
from lightning_fabric import Fabric

from vqvae import Autoencoder, exits
from vqvae.data import Images
from vqvae.training.checks import check, check_folder, stages
from vqvae.training.costs import Costs, Outlook, seconds_of, settled, told
from vqvae.training.devices import launch, leaving_processes, lost_ranks_told, make_fabric
from vqvae.training.images import check_images, described, facts_of, load_data, no_cache_of_refused, say, with_cache
from vqvae.training.objectives import PriorObjective, codebook_objective
from vqvae.training.options import Run, go_on
from vqvae.training.prior_data import known_classes, stored_parts
from vqvae.training.prior_kinds import make_prior
from vqvae.training.records import Metrics, Stop
from vqvae.training.rehearsal import rehearse
from vqvae.training.run_folder import Session, checkpoint, one_program, state_path
from vqvae.training.stages import evaluate_run, first_model, fit_codebook, fit_prior
from vqvae.training.wandb_events import WandbEvents

# Runs of fewer steps are over before anybody would ask how long they take.
MANY_STEPS = 100


@leaving_processes()
def train(run: Run) -> None:
    """The stages that the options ask for, one after the other.

    Raises:
        ValueError: what the run cannot do; nothing of it has changed then.
    """
    began = time.monotonic()
    wanted = stages(run)
    check(run, wanted)
    fabric = make_fabric(run)
    with one_program(fabric, run), lost_ranks_told(fabric, go_on(run)):
        if "prior" in wanted and run.codes is not None:
            has_codebook = (run.run / "codebook").exists()
            model = Autoencoder.from_pretrained(run.run / "codebook") if has_codebook else first_model(run)
            stored_parts(run.codes, model)  # an error before anything is written
        data = load_data(run) if run.codes is None or wanted != ("prior",) else {}
        images = facts_of(data)
        note = check_images(run, images)
        check_folder(
            run,
            wanted,
            {
                "codebook": lambda: codebook_objective(run, run.model.build(), data),
                "prior": lambda model: PriorObjective(make_prior(run.prior, model, known_classes(run, model, data))),
            },
            images,
        )
        launch(fabric, go_on(run))
        if fabric.is_global_zero:
            precision = fabric.strategy.precision.precision
            of, notes = described(run, data) if data else (f"codes from {run.codes}", [])
            print(f"{run.run}: {of}; {fabric.world_size} x {fabric.device.type}, {precision}", file=sys.stderr)
            for each in (note, *notes):
                if each:
                    say(each)
        data = with_cache(run, data, sweep=fabric.is_global_zero)
        # Of the run as it will be written, with as many steps as fit a budget.
        also = (lambda: WandbEvents(run.run, run.to_plain())) if run.logger == "wandb" else None
        session: Session | None = None
        with (
            no_cache_of_refused(run, lambda: session is not None and session.is_begun),
            Stop() as stop,
            contextlib.closing(Metrics(run.run, fabric, also)) as metrics,
        ):
            costs = _costs(fabric, metrics, run, data, wanted)
            if costs is not None and run.time_budget is not None:
                # Of the process that took longest, so that all settle on the same numbers.
                passed = fabric.all_reduce(
                    torch.tensor(time.monotonic() - began, device=fabric.device), reduce_op="max"
                )
                assert isinstance(passed, torch.Tensor)
                run = settled(run, wanted, costs, seconds_of(run.time_budget) - passed.item())
                check(run, wanted)
                fabric.print(told(run, wanted, costs), file=sys.stderr)
            session = Session(fabric=fabric, run=run, metrics=metrics, stop=stop, images=images)
            session.outlook = Outlook(run=run, wanted=wanted, costs=costs)
            if "codebook" in wanted:
                fit_codebook(session, data)
            if "prior" in wanted:
                fit_prior(session, data)
            if "evaluate" in wanted and fabric.is_global_zero:
                evaluate_run(session, data)
        fabric.barrier()


def _costs(
    fabric: Fabric, metrics: Metrics, run: Run, data: Mapping[str, Images], wanted: tuple[str, ...]
) -> Costs | None:
    """What the stages cost, where a budget is to be kept, or where people ask how long what comes later takes."""
    fits = {"codebook": run.codebook_fit, "prior": run.prior_fit}
    paths = {stage: state_path(run, stage) for stage in fits}
    finished = [
        stage != "evaluate" and paths[stage].exists() and checkpoint(paths[stage])["step"] >= fits[stage].num_steps
        for stage in wanted
    ]
    left = wanted[finished.index(False) :] if not all(finished) else ()  # what comes later is done anew
    if run.time_budget is not None:
        return rehearse(fabric, metrics, run, _untrained(run), data, left)
    # The stage that is under way is timed by its own steps. Several processes would have to fail together, and to
    # compile twice would take longer than the answer is worth.
    later, num_steps = left[1:], sum(fits[stage].num_steps for stage in left if stage != "evaluate")
    if not later or num_steps < MANY_STEPS or fabric.world_size > 1 or run.strategy.startswith("fsdp") or run.compile:
        return None
    try:
        return rehearse(fabric, metrics, run, _untrained(run), data, later)
    except Exception as error:
        if not isinstance(error, ValueError | MemoryError) and not exits.is_out_of_memory(error):
            raise
        return None  # the run says by itself what it cannot do


def _untrained(run: Run) -> Autoencoder:
    """A model as large as the run's; of a tokenized set the very one, as the set asks for it."""
    with torch.random.fork_rng([]):
        if run.codes is None:
            return run.model.build()
        has_codebook = (run.run / "codebook").exists()
        return Autoencoder.from_pretrained(run.run / "codebook") if has_codebook else first_model(run)
