"""What this library writes itself: configs of models and of priors, and the options of a run."""

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from fuzz_files import Kind

from priors import NextScalePrior, NGramPrior, TransformerPrior
from priors.grid import GridModel
from vqvae import VQVAE, Autoencoder, GaussianVAE
from vqvae.likelihoods import Normal
from vqvae.quantizers import FSQ, ProjectedQuantizer, ResidualQuantizer, VectorQuantizer
from vqvae.training.checks import check, stages
from vqvae.training.options import load_run, save_run
from vqvae.training.presets import FASHION

# Good weights, beside which each damaged config is put.
_PLACE = Path(tempfile.mkdtemp(prefix="fuzz-"))


def _models() -> list[Any]:
    sizes: dict[str, Any] = {"image_size": 8, "width": 8, "num_blocks": 1, "likelihood": Normal.Config()}
    deep = ResidualQuantizer.Config(depth=2, quantizer=FSQ.Config(levels=(3, 3)))
    return [
        VQVAE(**sizes, quantizer=VectorQuantizer.Config(num_codes=8, dim=4)),
        VQVAE(**sizes, quantizer=ProjectedQuantizer.Config(dim=4, quantizer=deep)),
        GaussianVAE(**sizes, dim=3),
    ]


def _priors() -> list[Any]:
    sizes: dict[str, Any] = {"width": 16, "depth": 1, "num_heads": 2, "num_codes": 8}
    counts = NGramPrior(num_codes=8, grid=(2, 2))
    counts.fit(torch.randint(0, 8, (20, 2, 2)))
    return [
        TransformerPrior(grid=(2, 2), num_classes=3, **sizes),
        NextScalePrior(scales=(1, 2), **sizes),
        counts,
    ]


def _kind(make: Callable[[], list[Any]], read: type[Autoencoder] | type[GridModel], name: str) -> Kind:
    """Configs of several models, each read beside the weights that it was of."""

    def good(_: Path) -> Sequence[bytes]:
        texts = []
        for number, model in enumerate(make()):
            model.save_pretrained(_PLACE / name / str(number))
            texts.append((_PLACE / name / str(number) / "config.json").read_bytes())
        return texts

    def read_all(path: Path) -> None:
        refused = 0
        folders = sorted((_PLACE / name).iterdir())
        for folder in folders:
            shutil.copyfile(path, folder / "config.json")
            try:
                read.from_pretrained(folder)
            except ValueError:
                refused += 1
        if refused == len(folders):
            raise ValueError("no weights fit it")

    return Kind(good=good, read=read_all, name="config.json", is_json=True)


def _good_runs(folder: Path) -> Sequence[bytes]:
    run = dataclasses.replace(
        FASHION,
        run=folder,
        model=dataclasses.replace(FASHION.model, width=8, num_blocks=1),
        prior=TransformerPrior.Config(width=16, depth=1, num_heads=2),
    )
    save_run(run)
    return [(folder / "state" / "run.json").read_bytes()]


def _read_run(path: Path) -> None:
    run = load_run(path.parents[1])
    check(run, stages(run))


KINDS = {
    "model-config": _kind(_models, Autoencoder, "models"),
    "prior-config": _kind(_priors, GridModel, "priors"),
    "run": Kind(good=_good_runs, read=_read_run, name="state/run.json", is_json=True),
}
