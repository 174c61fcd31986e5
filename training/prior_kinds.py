"""The kinds of prior that a run can train: the options of each, and how it is built for a model's latents."""

import dataclasses
import re
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from priors import (
    AnyOrderPrior,
    AnyOrderPriorConfig,
    ContinuousPrior,
    DepthTransformerPrior,
    DepthTransformerPriorConfig,
    LlamaPrior,
    LlamaPriorConfig,
    MixtureTransformerPrior,
    MixtureTransformerPriorConfig,
    NextScalePrior,
    NextScalePriorConfig,
    PixelCNNPrior,
    PixelCNNPriorConfig,
    Prior,
    TransformerPrior,
    TransformerPriorConfig,
)
from safefolder.options import Options
from vqvae import VQVAE, Autoencoder, GaussianVAE
from vqvae.quantizers import MultiScaleQuantizer

PriorConfig = (
    TransformerPriorConfig
    | MixtureTransformerPriorConfig
    | AnyOrderPriorConfig
    | DepthTransformerPriorConfig
    | NextScalePriorConfig
    | PixelCNNPriorConfig
    | LlamaPriorConfig
)


@dataclass(frozen=True, kw_only=True)
class PriorSize(Options):
    """What all kinds take; codes and grid come from the codebook."""

    width: int
    depth: int
    dropout: float = 0.0
    label_dropout: float = 0.1
    code_noise: float = 0.0
    """share of the codes read that training replaces by codes drawn evenly; 0 for real vectors"""
    labels: bool = True
    """condition on classes where the images have them (their ln(num_classes) nats are counted in the rate)"""

    def config(self, model: Autoencoder, num_classes: int | None) -> PriorConfig:
        """What the prior for the latents of a model is built from. ValueError where they are not of its kind."""
        options = {name: value for name, value in vars(self).items() if name != "labels"}
        options |= {"grid": model.grid, "num_classes": num_classes if self.labels else None}
        if isinstance(model, VQVAE):
            return self._of_codes(model, {**options, "num_codes": model.num_codes})
        assert isinstance(model, GaussianVAE)
        if not isinstance(self, TransformerSize):
            raise ValueError(f"real latents take --prior-kind Transformer only, got {kind_of(self)}")
        if options.pop("code_noise"):
            raise ValueError(f"real latents hold no codes to disturb: leave --prior.code-noise {self.code_noise} out")
        return MixtureTransformerPriorConfig(dim=model.dim, **options)

    @abstractmethod
    def _of_codes(self, model: VQVAE, options: dict[str, Any]) -> PriorConfig: ...


@dataclass(frozen=True, kw_only=True)
class TrunkSize(PriorSize):
    """What transformers take."""

    width: int = 192
    depth: int = 4
    num_heads: int = 6
    checkpointing: bool = False
    """compute each block again in the backward pass: a third more time, less memory"""


@dataclass(frozen=True, kw_only=True)
class TransformerSize(TrunkSize):
    """Place by place in raster order; codes of several axes are flattened. The one kind for real vectors."""

    def _of_codes(self, model: VQVAE, options: dict[str, Any]) -> PriorConfig:
        return TransformerPriorConfig(**options)


@dataclass(frozen=True, kw_only=True)
class LlamaSize(TrunkSize):
    """Place by place in raster order, with the weights of a Llama, for software that serves language models."""

    def _of_codes(self, model: VQVAE, options: dict[str, Any]) -> PriorConfig:
        return LlamaPriorConfig(**options)


@dataclass(frozen=True, kw_only=True)
class AnyOrderSize(TrunkSize):
    """Place by place in any order."""

    raster_share: float = 0.25
    """share of the grids that training takes in raster order"""

    def _of_codes(self, model: VQVAE, options: dict[str, Any]) -> PriorConfig:
        return AnyOrderPriorConfig(**options)


@dataclass(frozen=True, kw_only=True)
class DepthTransformerSize(TrunkSize):
    """A large transformer over places, and a small one over the codes of each."""

    code_depth: int = 2
    """blocks of the small one"""

    def _of_codes(self, model: VQVAE, options: dict[str, Any]) -> PriorConfig:
        if len(model.grid) < 3:
            raise ValueError(
                f"--prior-kind DepthTransformer is for several codes a place, got a grid of {model.grid} by "
                f"{type(model.quantizer).__name__}: take --quantizer ResidualQuantizer, or --prior-kind Transformer"
            )
        return DepthTransformerPriorConfig(**options)


@dataclass(frozen=True, kw_only=True)
class NextScaleSize(TrunkSize):
    """Scale by scale, those of a multi-scale quantizer."""

    def _of_codes(self, model: VQVAE, options: dict[str, Any]) -> PriorConfig:
        if not isinstance(model.quantizer, MultiScaleQuantizer):
            raise ValueError(
                f"--prior-kind NextScale is for codes of several scales, got {type(model.quantizer).__name__}: "
                "take --quantizer MultiScaleQuantizer, or --prior-kind Transformer"
            )
        return NextScalePriorConfig(scales=model.quantizer.scales, **options)


@dataclass(frozen=True, kw_only=True)
class PixelCNNSize(PriorSize):
    """Gated convolutions over grids of two axes."""

    width: int = 128
    depth: int = 10
    kernel_size: int = 3

    def _of_codes(self, model: VQVAE, options: dict[str, Any]) -> PriorConfig:
        return PixelCNNPriorConfig(**options)


PRIOR_KINDS: dict[str, type[PriorSize]] = {
    "Transformer": TransformerSize,
    "AnyOrder": AnyOrderSize,
    "DepthTransformer": DepthTransformerSize,
    "NextScale": NextScaleSize,
    "PixelCNN": PixelCNNSize,
    "Llama": LlamaSize,
}


def kind_of(size: PriorSize) -> str:
    """The name of its kind in `PRIOR_KINDS`."""
    return type(size).__name__.removesuffix("Size")


def name_of(prior: Prior) -> str:
    """What elbo.json calls it: transformer, any_order, depth_transformer, next_scale, pixelcnn, llama."""
    return re.sub("(?<=[a-z])(?=[A-Z][a-z])", "_", type(prior).__name__.removesuffix("Prior")).lower()


def with_kind(size: PriorSize, name: str) -> PriorSize:
    """Another kind, with what the two share; how wide and deep it is, transformers only share among themselves."""
    kind = PRIOR_KINDS[name]
    if type(size) is kind:
        return size
    shared = TrunkSize if isinstance(size, TrunkSize) and issubclass(kind, TrunkSize) else PriorSize
    names = {field.name for field in dataclasses.fields(shared)}
    names -= {"width", "depth"} if shared is PriorSize else set()
    return kind(**{name: getattr(size, name) for name in names})


def make_prior(size: PriorSize, model: Autoencoder, num_classes: int | None) -> Prior | ContinuousPrior:
    """A prior with fresh weights for the latents of a model. Errors as `PriorSize.config`."""
    match size.config(model, num_classes):
        case TransformerPriorConfig() as config:
            return TransformerPrior(config)
        case MixtureTransformerPriorConfig() as config:
            return MixtureTransformerPrior(config)
        case AnyOrderPriorConfig() as config:
            return AnyOrderPrior(config)
        case DepthTransformerPriorConfig() as config:
            return DepthTransformerPrior(config)
        case NextScalePriorConfig() as config:
            return NextScalePrior(config)
        case PixelCNNPriorConfig() as config:
            return PixelCNNPrior(config)
        case LlamaPriorConfig() as config:
            return LlamaPrior(config)
