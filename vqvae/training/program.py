"""One session of a run: its stages, and what is said before and after them."""

import contextlib
import sys

from vqvae import Autoencoder
from vqvae.training.checks import check, check_folder, stages
from vqvae.training.devices import launch, leaving_processes, lost_ranks_told, make_fabric
from vqvae.training.images import check_images, described, facts_of, load_data, say, with_cache
from vqvae.training.objectives import PriorObjective, codebook_objective
from vqvae.training.options import Run, go_on
from vqvae.training.prior_data import known_classes, stored_parts
from vqvae.training.prior_kinds import make_prior
from vqvae.training.records import Metrics, Stop
from vqvae.training.run_folder import Session, one_program
from vqvae.training.stages import evaluate_run, first_model, fit_codebook, fit_prior


@leaving_processes()
def train(run: Run) -> None:
    """The stages that the options ask for, one after the other.

    Raises:
        ValueError: what the run cannot do; nothing of it has changed then.
    """
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
        with Stop() as stop, contextlib.closing(Metrics(run.run, fabric)) as metrics:
            session = Session(fabric=fabric, run=run, metrics=metrics, stop=stop, images=images)
            if "codebook" in wanted:
                fit_codebook(session, data)
            if "prior" in wanted:
                fit_prior(session, data)
            if "evaluate" in wanted and fabric.is_global_zero:
                evaluate_run(session, data)
        fabric.barrier()
