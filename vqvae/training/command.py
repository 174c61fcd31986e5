"""The `vqvae train` command.

program.py      one session of a run: what is said and checked before and after its stages
stages.py       codebook, prior, evaluate: what each reads and writes
loop.py         `fit`, the loop that trains either
objectives.py   what they are trained for
learner.py      optimiser, moving average, and the weights that are kept
options.py      the options of a run, written and read
presets.py      what they start from; parsing.py, how the command line changes them
checks.py       what a run cannot do, said before it begins
networks.py     compiled networks, and such as keep less for the backward pass
costs.py, rehearsal.py    how long it all takes, and --time-budget
progress.py     what is said of how far it is
previews.py     pictures at each validation
unfinished.py   its models while it trains
reproducing.py  its options as its report has them, and the command line that asks for them
run_folder.py, records.py, events.py, wandb_events.py, images.py    what a run keeps
model_kinds.py, prior_kinds.py                     which kinds of model and prior
prior_data.py, latents.py                          what a prior is trained on
devices.py, sharding.py                            from one process to many
"""

import signal
import sys
from collections.abc import Sequence

from vqvae import exits
from vqvae.allocator import keep_freed_memory
from vqvae.training.options import go_on
from vqvae.training.parsing import parse


def main() -> None:
    """Entry point of `train.py`: whatever goes wrong is one line and exit status 2."""
    keep_freed_memory()
    exits.run(lambda: run_command(sys.argv[1:]))


def run_command(args: Sequence[str]) -> None:
    """Train a codebook, and a prior over its codes.

    Args:
        args: the words of a command line after the program's name.
    """
    run = parse(list(args))
    from vqvae.training.program import train  # not for the help, or a mistyped option

    try:
        train(run)
    except KeyboardInterrupt:
        if (run.run / "state").is_dir():
            print(f"interrupted; go on with `{go_on(run)}`", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        raise
