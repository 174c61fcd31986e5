"""Likelihoods over 8-bit images: distributions that sum to one over the 256 levels of a pixel."""

from vqvae.likelihoods.base import Likelihood
from vqvae.likelihoods.categorical import Categorical
from vqvae.likelihoods.local_context import LocalContext
from vqvae.likelihoods.logistic_mixture import LogisticMixture
from vqvae.likelihoods.normal import Normal

__all__ = [
    "Categorical",
    "Likelihood",
    "LocalContext",
    "LogisticMixture",
    "Normal",
]
