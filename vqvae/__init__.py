"""A VQ-VAE that takes its ELBO seriously: images to codes and back, in bits that are counted honestly."""

from vqvae.data import load_images
from vqvae.elbo import ELBO
from vqvae.model import VQVAE, VQVAEConfig

__all__ = ["ELBO", "VQVAE", "VQVAEConfig", "load_images"]
