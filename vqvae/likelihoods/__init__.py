"""Likelihoods over 8-bit images: distributions that sum to one over the 256 levels of a pixel."""

from vqvae.likelihoods.base import Chooser, Likelihood, SymbolChooser, Symbols
from vqvae.likelihoods.categorical import Categorical, CategoricalConfig
from vqvae.likelihoods.local_context import LocalContext, LocalContextConfig
from vqvae.likelihoods.logistic_mixture import LogisticMixture, LogisticMixtureConfig
from vqvae.likelihoods.normal import Normal, NormalConfig

__all__ = [
    "Categorical",
    "CategoricalConfig",
    "Chooser",
    "Likelihood",
    "LocalContext",
    "LocalContextConfig",
    "LogisticMixture",
    "LogisticMixtureConfig",
    "Normal",
    "NormalConfig",
    "SymbolChooser",
    "Symbols",
]
