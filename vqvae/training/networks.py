"""How the networks of a run compute while they are trained: compiled, or with less memory. Neither is of the model."""

import os
import shutil

import torch
from torch import nn

from priors.trunk import Trunk
from vqvae import Autoencoder
from vqvae.networks.blocks import Recomputing
from vqvae.training.options import Run

_COMPILERS = ("c++", "g++", "clang++")


def prepare(run: Run, objective: nn.Module) -> None:
    """Have encoder, decoder and a prior's trunk compiled, and activations computed again, as the options say.

    In place, so that names of weights stay; a copy, as the moving average is one, is as if nothing had happened.
    """
    for part in list(objective.modules()):
        if run.checkpointing and isinstance(part, Recomputing):
            part.recomputes = True
        if run.compile and isinstance(part, Autoencoder):
            part.encoder.compile()
            part.decoder.compile()
        if run.compile and isinstance(part, Trunk):
            part.compile()


def check_compiler(run: Run) -> None:
    """Raise ValueError where --compile cannot be had here."""
    if not run.compile:
        return
    on_gpu = run.accelerator in ("cuda", "gpu") or (run.accelerator == "auto" and torch.cuda.is_available())
    if on_gpu:
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ValueError("--compile needs triton on a GPU, which is not installed: install it, or leave it out")
    elif shutil.which(os.environ.get("CXX", "")) is None and not any(map(shutil.which, _COMPILERS)):
        raise ValueError(
            f"--compile needs a C++ compiler on a CPU, got none of {', '.join(_COMPILERS)}: install one, or "
            "leave it out"
        )
