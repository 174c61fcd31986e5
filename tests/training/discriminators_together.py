"""A program for a test: a run by several processes, each of which saves the discriminator that it ends with.

python discriminators_together.py OUT OPTIONS...
"""

import os
import sys
from pathlib import Path

import safetensors.torch

from vqvae.training import loop
from vqvae.training.command import run_command
from vqvae.training.learner import Learner

if __name__ == "__main__":
    out, *options = sys.argv[1:]
    rivals = []

    class Remembering(Learner):
        def __init__(self, fabric, objective, fit_options):
            super().__init__(fabric, objective, fit_options)
            rivals.append(objective.rival)

    loop.Learner = Remembering
    run_command(options)
    (rival,) = rivals
    tensors = {name: value.contiguous() for name, value in rival.state_dict().items()}
    safetensors.torch.save_file(tensors, Path(out) / f"rival-{os.environ.get('LOCAL_RANK', '0')}.safetensors")
