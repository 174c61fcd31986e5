"""The names of `vqvae`, which come from here when the first of them is used."""

from vqvae.autoencoder import Autoencoder
from vqvae.data import load_images
from vqvae.elbo import ELBO
from vqvae.gaussian import GaussianVAE, GaussianVAEConfig
from vqvae.model import VQVAE, VQVAEConfig
from vqvae.vqgan import VQGAN, VQGANConfig

__all__ = [
    "ELBO",
    "VQGAN",
    "VQVAE",
    "Autoencoder",
    "GaussianVAE",
    "GaussianVAEConfig",
    "VQGANConfig",
    "VQVAEConfig",
    "load_images",
]
