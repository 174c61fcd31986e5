"""A VQ-VAE that takes its ELBO seriously: images to codes and back, in bits that are counted honestly."""

from vqvae.autoencoder import Autoencoder
from vqvae.data import load_images
from vqvae.elbo import ELBO
from vqvae.gaussian import GaussianVAE
from vqvae.model import VQVAE
from vqvae.vqgan import VQGAN

__all__ = [
    "ELBO",
    "VQGAN",
    "VQVAE",
    "Autoencoder",
    "GaussianVAE",
    "load_images",
]
