"""The names of `vqvae`, which come from here when the first of them is used."""

from vqvae.autoencoder import Autoencoder
from vqvae.bound import ELBO
from vqvae.data import load_images
from vqvae.gaussian import GaussianVAE
from vqvae.model import VQVAE
from vqvae.tiling import Tiled
from vqvae.vqgan import VQGAN

__all__ = [
    "ELBO",
    "VQGAN",
    "VQVAE",
    "Autoencoder",
    "GaussianVAE",
    "Tiled",
    "load_images",
]
