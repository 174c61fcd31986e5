"""The `vqvae` command in this process, and runs of untrained parts for it."""

import sys
from typing import NamedTuple

import torch

from priors import TransformerPrior
from vqvae import VQVAE, cli
from vqvae.quantizers import EMAVectorQuantizer

CODES = EMAVectorQuantizer.Config(num_codes=8, dim=4)
SMALL = {"width": 16, "depth": 1, "num_heads": 2}
SIZE = 16


class Said(NamedTuple):
    """What a command wrote."""

    out: str
    err: str


class Command:
    """`vqvae`, called with its words."""

    def __init__(self, monkeypatch, capsys):
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *args, code=0) -> Said:
        self.monkeypatch.setattr(sys, "argv", ["vqvae", *map(str, args)])
        status = 0
        try:
            cli.main()
        except SystemExit as stopped:
            status = stopped.code or 0
        said = Said(*self.capsys.readouterr())
        assert status == code, said
        return said

    def refused(self, *args) -> str:
        """The one line of a mistake, after those of what was skipped."""
        out, err = self(*args, code=2)
        assert out == ""
        *skipped, last = err.splitlines()
        assert last.startswith("error: ")
        assert all(line.startswith("skipped ") for line in skipped), err
        return last


def in_empty_folder(monkeypatch, capsys, tmp_path) -> Command:
    """A fixture: the command, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return Command(monkeypatch, capsys)


def save_run(folder, quantizer=CODES, kind=TransformerPrior, num_classes=3, std=0.5):
    """A run of untrained parts: 4 x 4 codes, and a prior that is far from uniform."""
    torch.manual_seed(0)
    model = VQVAE(image_size=SIZE, width=8, num_blocks=1, quantizer=quantizer)
    model.save_pretrained(folder / "codebook")
    prior = kind(num_codes=model.num_codes, grid=model.grid, num_classes=num_classes, **SMALL)
    with torch.no_grad():
        for weight in prior.parameters():
            weight.normal_(std=std)
    prior.save_pretrained(folder / "prior")
    return folder
