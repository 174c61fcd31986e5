"""Quantizers: continuous features to codes of a codebook. See `vqvae.quantizers.base` for what they share."""

from vqvae.quantizers.base import MASKED, Quantized, Quantizer, straight_through
from vqvae.quantizers.nearest import nearest
from vqvae.quantizers.vector import (
    EMAVectorQuantizer,
    EMAVectorQuantizerConfig,
    VectorQuantizer,
    VectorQuantizerConfig,
)

__all__ = [
    "MASKED",
    "EMAVectorQuantizer",
    "EMAVectorQuantizerConfig",
    "Quantized",
    "Quantizer",
    "VectorQuantizer",
    "VectorQuantizerConfig",
    "nearest",
    "straight_through",
]
