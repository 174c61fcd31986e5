"""Quantizers: continuous features to codes. `vqvae.quantizers.base` says what they share; each kind has a file.

kind                       codes                                            paper
VectorQuantizer            nearest of a codebook that gradients learn       van den Oord et al. 2017
EMAVectorQuantizer         nearest of a codebook of moving averages         van den Oord et al. 2017
SoftEMVectorQuantizer      nearest; vectors shared among codes in training  Roy et al. 2018
SimVQ                      nearest of a frozen codebook seen through a map  Zhu et al. 2024
IBQ                        most similar; all codes have gradients           Shi et al. 2024
GumbelQuantizer            sampled, by learned logits                       Jang et al. 2016, Ramesh et al. 2021
StochasticVectorQuantizer  sampled, by distance (SQ-VAE)                    Takida et al. 2022
FSQ                        rounded channels                                 Mentzer et al. 2023
LFQ                        signs                                            Yu et al. 2023
BSQ                        signs of unit vectors                            Zhao et al. 2024
ProjectedQuantizer         any kind, in another width                       Yu et al. 2021
GroupedQuantizer           any kind, for each group of channels             Jégou et al. 2011
ResidualQuantizer          any kind, on what is left, again and again       Zeghidour et al. 2021, Lee et al. 2022
MultiScaleQuantizer        any kind, at growing resolutions                 Tian et al. 2024
"""

from vqvae.quantizers.base import MASKED, Quantized, Quantizer
from vqvae.quantizers.bsq import BSQ
from vqvae.quantizers.ema import EMAVectorQuantizer
from vqvae.quantizers.estimators import gumbel_softmax, rotation_trick, straight_through
from vqvae.quantizers.fsq import FSQ
from vqvae.quantizers.grouped import GroupedQuantizer
from vqvae.quantizers.gumbel import GumbelQuantizer
from vqvae.quantizers.ibq import IBQ
from vqvae.quantizers.lfq import LFQ
from vqvae.quantizers.multiscale import MultiScaleQuantizer
from vqvae.quantizers.nearest_search import nearest
from vqvae.quantizers.projected import ProjectedQuantizer
from vqvae.quantizers.residual import ResidualQuantizer
from vqvae.quantizers.simvq import SimVQ
from vqvae.quantizers.soft_em import SoftEMVectorQuantizer
from vqvae.quantizers.stochastic import StochasticVectorQuantizer
from vqvae.quantizers.vector import VectorQuantizer

__all__ = [
    "BSQ",
    "FSQ",
    "IBQ",
    "LFQ",
    "MASKED",
    "EMAVectorQuantizer",
    "GroupedQuantizer",
    "GumbelQuantizer",
    "MultiScaleQuantizer",
    "ProjectedQuantizer",
    "Quantized",
    "Quantizer",
    "ResidualQuantizer",
    "SimVQ",
    "SoftEMVectorQuantizer",
    "StochasticVectorQuantizer",
    "VectorQuantizer",
    "gumbel_softmax",
    "nearest",
    "rotation_trick",
    "straight_through",
]
