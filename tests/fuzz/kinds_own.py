"""What this library writes itself: configs of models and of priors, and the options of a run."""

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from fuzz_files import Kind

from priors import GridModel, NextScalePrior, NextScalePriorConfig, NGramPrior, TransformerPrior, TransformerPriorConfig
from training.checks import check, stages
from training.options import FASHION, load_run, save_run
from training.prior_kinds import TransformerSize
from vqvae import VQVAE, Autoencoder, GaussianVAE, GaussianVAEConfig, VQVAEConfig
from vqvae.likelihoods import NormalConfig
from vqvae.quantizers import FSQConfig, ProjectedQuantizerConfig, ResidualQuantizerConfig, VectorQuantizerConfig

# Good weights, beside which each damaged config is put.
_PLACE = Path(tempfile.mkdtemp(prefix="fuzz-"))


def _models() -> list[Any]:
    sizes: dict[str, Any] = {"image_size": 8, "width": 8, "num_blocks": 1, "likelihood": NormalConfig()}
    deep = ResidualQuantizerConfig(depth=2, quantizer=FSQConfig(levels=(3, 3)))
    return [
        VQVAE(VQVAEConfig(**sizes, quantizer=VectorQuantizerConfig(num_codes=8, dim=4))),
        VQVAE(VQVAEConfig(**sizes, quantizer=ProjectedQuantizerConfig(dim=4, quantizer=deep))),
        GaussianVAE(GaussianVAEConfig(**sizes, dim=3)),
    ]


def _priors() -> list[Any]:
    sizes: dict[str, Any] = {"width": 16, "depth": 1, "num_heads": 2, "num_codes": 8}
    counts = NGramPrior(num_codes=8, grid=(2, 2))
    counts.fit(torch.randint(0, 8, (20, 2, 2)))
    return [
        TransformerPrior(TransformerPriorConfig(grid=(2, 2), num_classes=3, **sizes)),
        NextScalePrior(NextScalePriorConfig(scales=(1, 2), **sizes)),
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
        prior=TransformerSize(width=16, depth=1, num_heads=2),
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
