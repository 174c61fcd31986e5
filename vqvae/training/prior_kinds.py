"""The kinds of prior that a run can train, and what a model's latents decide of their options."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from priors import (
    AnyOrderPrior,
    ContinuousPrior,
    DepthTransformerPrior,
    LlamaPrior,
    MixtureTransformerPrior,
    NextScalePrior,
    NormalPrior,
    PixelCNNPrior,
    Prior,
    TransformerPrior,
    UniformPrior,
)
from priors.grid import GridModel
from priors.trunk_model import TrunkModel
from safefolder.options import is_given, option_fields
from vqvae import VQVAE, Autoencoder, GaussianVAE
from vqvae.quantizers import MultiScaleQuantizer

PRIOR_KINDS: Mapping[str, type[GridModel]] = {
    "Transformer": TransformerPrior,
    "AnyOrder": AnyOrderPrior,
    "DepthTransformer": DepthTransformerPrior,
    "NextScale": NextScalePrior,
    "PixelCNN": PixelCNNPrior,
    "Llama": LlamaPrior,
}


def kind_of(config: GridModel.Config) -> str:
    """The name of its kind in `PRIOR_KINDS`; the one kind for real vectors is a transformer."""
    name = config.owner.__name__.removesuffix("Prior")
    return "Transformer" if name == "MixtureTransformer" else name


def name_of(prior: Prior | ContinuousPrior) -> str:
    """What elbo.json calls it: transformer (also one of vectors), any_order, depth_transformer, pixelcnn, ..."""
    name = type(prior).__name__.removesuffix("Prior").removeprefix("Mixture")
    return re.sub("(?<=[a-z])(?=[A-Z][a-z])", "_", name).lower()


def untrained(model: Autoencoder) -> dict[str, Prior | ContinuousPrior]:
    """The prior that knows nothing of the data, by the name that elbo.json has for it."""
    if isinstance(model, GaussianVAE):
        return {"normal": NormalPrior(dim=model.dim, grid=model.grid)}
    assert isinstance(model, VQVAE)
    return {"uniform": UniformPrior(num_codes=model.num_codes, grid=model.grid)}


def with_kind(config: GridModel.Config, name: str, *, of_codes: bool) -> GridModel.Config:
    """Another kind, with what the two share; how wide and deep it is, transformers only share among themselves."""
    kind = PRIOR_KINDS[name] if of_codes or name != "Transformer" else MixtureTransformerPrior
    if config.owner is kind:
        return config
    shared = {each.name for each in option_fields(type(config)) if not is_given(type(config), each.name)}
    shared &= {each.name for each in option_fields(kind.Config)}
    if not (issubclass(kind, TrunkModel) and issubclass(config.owner, TrunkModel)):
        shared -= {"width", "depth"}
    return kind.Config(**{name: getattr(config, name) for name in shared})


def filled(config: GridModel.Config, model: Autoencoder, num_classes: int | None) -> GridModel.Config:
    """The options of a prior for the latents of a model. ValueError where they are not of its kind."""
    decided: dict[str, Any] = {"grid": model.grid, "num_classes": num_classes}
    kind = config.owner
    if isinstance(model, GaussianVAE):
        if kind is not MixtureTransformerPrior:
            raise ValueError(f"real latents take --prior-kind Transformer only, got {kind_of(config)}")
        return dataclasses.replace(config, dim=model.dim, **decided)
    assert isinstance(model, VQVAE)
    quantizer = type(model.quantizer).__name__
    if kind is DepthTransformerPrior and len(model.grid) < 3:
        raise ValueError(
            f"--prior-kind DepthTransformer is for several codes a position, got a grid of {model.grid} by "
            f"{quantizer}: take --quantizer ResidualQuantizer, or --prior-kind Transformer"
        )
    if kind is NextScalePrior:
        if not isinstance(model.quantizer, MultiScaleQuantizer):
            raise ValueError(
                f"--prior-kind NextScale is for codes of several scales, got {quantizer}: "
                "take --quantizer MultiScaleQuantizer, or --prior-kind Transformer"
            )
        decided["scales"] = model.quantizer.scales
    return dataclasses.replace(config, num_codes=model.num_codes, **decided)


def make_prior(config: GridModel.Config, model: Autoencoder, num_classes: int | None) -> Prior | ContinuousPrior:
    """A prior with fresh weights for the latents of a model. Errors as `filled`."""
    return filled(config, model, num_classes).build()
