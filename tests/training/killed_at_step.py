"""train.py that kills itself, as `kill -9` does, in the middle of its Nth step; see test_photographs.py.

python killed_at_step.py N [options of train.py]
"""

import itertools
import os
import signal
import sys

import train
from vqvae.training.learner import Learner

if __name__ == "__main__":
    number, steps, step = int(sys.argv.pop(1)), itertools.count(1), Learner.step

    def killed(self: Learner) -> None:
        if next(steps) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        step(self)

    Learner.step = killed  # pyrefly: ignore[bad-assignment]
    train.main()
