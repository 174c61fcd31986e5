"""VGG16 (Simonyan and Zisserman 2015), the network of LPIPS; torchvision's, with its ImageNet weights."""

from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from vqvae.looks.features import FeatureMaps, load_weights
from vqvae.looks.weights import downloaded, from_file

# After the last activation of each of the five blocks, before its pooling.
_ENDS = (4, 9, 16, 23, 30)


class VGG16(FeatureMaps):
    """VGG16's maps before each pooling; its pooled features are the means of the last map, 512 of them.

    Args:
        weights: a file of torchvision's weights; from torch's cache, or downloaded (528 MB), unless given.

    Raises:
        ValueError: no weights are at hand, or the file holds others.
    """

    name = "VGG16"
    side = 224
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)
    smallest = 16
    widths = (64, 128, 256, 512, 512)

    def __init__(self, *, weights: Path | None = None):
        super().__init__()
        from torchvision.models import VGG16_Weights, vgg16

        url = VGG16_Weights.IMAGENET1K_V1.url
        state = downloaded(url, self.name) if weights is None else from_file(weights)
        with torch.device("meta"):  # most of its weights are in layers that nothing here needs
            layers = vgg16().features
        layers = nn.Sequential(*list(layers.children())[: _ENDS[-1]])
        state = {name.removeprefix("features."): tensor for name, tensor in state.items()}
        load_weights(layers, state, str(weights or url), ignore=["classifier."])
        for layer in layers:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # the maps are read after the layers that follow
        self.layers = layers
        self.freeze()

    def _maps(self, images: Float[Tensor, "b 3 h w"]) -> list[Tensor]:
        maps = [images]
        for start, end in pairwise((0, *_ENDS)):
            maps.append(self.layers[start:end](maps[-1]))
        return maps[1:]

    def _pooled(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        return self.layers(self.normalised(self.scaled(images))).mean(dim=(2, 3))
