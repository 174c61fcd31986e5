"""The Inception v3 of the FID (Heusel et al. 2017), as torch-fidelity has it (extra `looks`).

It is the network of the FID's first implementation, with weights converted from TensorFlow's; torchvision's Inception
is another one, whose distances look like FIDs and are none.
"""

import io
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vqvae.looks.features import FeatureNetwork
from vqvae.looks.weights import downloaded, from_file


class Inception(FeatureNetwork):
    """The 2,048 pooled features of which a Fréchet distance is the FID and a kernel distance the KID.

    Args:
        weights: a file of torch-fidelity's weights; from torch's cache, or downloaded (91 MB), unless given.

    Raises:
        ValueError: torch-fidelity is not installed, no weights are at hand, or the file holds others.
    """

    name = "Inception"
    side = 299
    resize = "bilinear as in TensorFlow 1"

    def __init__(self, *, weights: Path | None = None):
        super().__init__()
        try:
            from torch_fidelity import feature_extractor_inceptionv3 as reference
        except ModuleNotFoundError as error:
            raise ValueError("Inception needs torch-fidelity: pip install 'vqvae-priors[looks]'") from error
        url = reference.URL_INCEPTION_V3
        state = downloaded(url, self.name) if weights is None else from_file(weights)
        # It reads a file with a loader that would run code in it; what it gets here was read without.
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        try:
            self.network = reference.FeatureExtractorInceptionV3(
                "inception", ["2048"], feature_extractor_weights_path=file
            )
        except RuntimeError as error:
            first = str(error).splitlines()[-1].strip()
            raise ValueError(f"{weights or url} does not hold the weights of this network: {first}") from error
        self.freeze()

    def _pooled(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        return self.network(images)[0]
