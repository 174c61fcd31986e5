"""The `vqvae train` command: the stages of a run, and what is said before and after them.

stages.py       codebook, prior, evaluate: what each reads and writes
loop.py         `fit`, the loop that trains either
objectives.py   what they are trained for
learner.py      optimiser, moving average, and the weights that are kept
options.py      the options of a run, its presets, and the command line
checks.py       what a run cannot do, said before it begins
run_folder.py, records.py, events.py, images.py    what a run keeps
prior_kinds.py, prior_data.py, latents.py          which prior, and what it is trained on
devices.py, sharding.py                            from one process to many
"""

import contextlib
import signal
import sys
from collections.abc import Sequence

from vqvae import Autoencoder, exits
from vqvae.allocator import keep_freed_memory
from vqvae.training.checks import check, check_folder, stages
from vqvae.training.devices import launch, leave_processes, lost_ranks_told, make_fabric
from vqvae.training.images import check_images, facts_of, load_data
from vqvae.training.objectives import PriorObjective, codebook_objective
from vqvae.training.options import Run, parse
from vqvae.training.prior_data import check_codes, known_classes
from vqvae.training.prior_kinds import make_prior
from vqvae.training.records import Metrics, Stop
from vqvae.training.run_folder import Session, go_on, one_program, state_path
from vqvae.training.stages import evaluate_run, first_model, fit_codebook, fit_prior


def main() -> None:
    """Entry point of `train.py`: whatever goes wrong is one line and exit status 2."""
    keep_freed_memory()
    exits.run(lambda: run_command(sys.argv[1:]))


def run_command(args: Sequence[str]) -> None:
    """Train a codebook, then a prior over its codes, and say what both are worth.

    Args:
        args: the words of a command line after the program's name.
    """
    run = parse(list(args))
    try:
        train(run)
    except SystemExit:  # saved as asked; what was under way is let go of here
        leave_processes()
        raise
    except KeyboardInterrupt:
        if state_path(run, "codebook").parent.is_dir():
            print(f"interrupted; go on with `{go_on(run)}`", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        raise
    # Not after an error, which other processes may know nothing of.
    leave_processes()


def train(run: Run) -> None:
    """The three stages."""
    wanted = stages(run)
    check(run, wanted)
    fabric = make_fabric(run)
    with one_program(fabric, run), lost_ranks_told(fabric, go_on(run)):
        if "prior" in wanted and run.codes is not None:
            has_codebook = (run.run / "codebook").exists()
            check_codes(run, Autoencoder.from_pretrained(run.run / "codebook") if has_codebook else first_model(run))
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
        of = f"codes from {run.codes}"
        if data:
            of = f"{len(data['train'])} training and {len(data['test'])} test images from {run.data.source}"
        precision = fabric.strategy.precision.precision
        for line in (
            f"{run.run}: {of}; {fabric.world_size} x {fabric.device.type}, {precision}",
            *([f"note: {note}"] if note else []),
            *dict.fromkeys(f"note: {each.label_note}" for each in data.values() if each.label_note),
        ):
            fabric.print(line, file=sys.stderr)
        with Stop() as stop, contextlib.closing(Metrics(run.run, fabric)) as metrics:
            session = Session(fabric=fabric, run=run, metrics=metrics, stop=stop, images=images)
            if "codebook" in wanted:
                fit_codebook(session, data)
            if "prior" in wanted:
                fit_prior(session, data)
            if "evaluate" in wanted and fabric.is_global_zero:
                evaluate_run(session, data)
        fabric.barrier()
