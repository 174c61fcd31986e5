"""Perceptual distance (Zhang et al. 2018): how far two images are apart in the features of a network.

    d(x, y) = Σ_l  mean_{h,w} Σ_c w_lc (φ̂_lc(x) − φ̂_lc(y))²,      φ̂ = φ / (‖φ‖ over channels)

With VGG16 and the published weights w ≥ 0 of its channels this is LPIPS 0.1. Without such weights w = 1/L for L depths,
and the distance carries the name of its network; it lies between 0 and 4.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from torch import Tensor, nn

from vqvae.looks.features import FeatureMaps
from vqvae.looks.vgg import VGG16
from vqvae.looks.weights import from_file


class PerceptualDistance(nn.Module):
    """The distance in the features of one network.

    Args:
        network: gives the features.
        channel_weights: of each depth, `"d"`; all alike unless given.
        name: the distance's name; the network's unless given.
    """

    def __init__(
        self, network: FeatureMaps, *, channel_weights: Sequence[Tensor] | None = None, name: str | None = None
    ):
        super().__init__()
        self.network = network
        self.name = name or f"{network.name} distance"
        if channel_weights is None:
            self.channel_weights = None
        else:
            if tuple(map(len, channel_weights)) != network.widths:
                raise ValueError(
                    f"got weights of {tuple(map(len, channel_weights))} channels, expected {network.widths} for "
                    f"{network.name}"
                )
            self.channel_weights = nn.ParameterList(channel_weights).requires_grad_(False)

    @classmethod
    def lpips(cls, network: VGG16) -> "PerceptualDistance":
        """LPIPS 0.1: VGG16 and the published weights of its channels, from the wheel `lpips` (extra `looks`).

        Raises:
            ValueError: the wheel is not installed.
        """
        state = from_file(published_weights())
        linear = [state[f"lin{at}.model.1.weight"].flatten() for at in range(len(network.widths))]
        return cls(network, channel_weights=linear, name="LPIPS")

    def forward(self, images: Float[Tensor, "b c h w"], others: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
        """The distance of each pair of images, values from 0 to 1, float32, with a gradient to both.

        Raises:
            ValueError: images smaller than the network needs.
        """
        total = images.new_zeros(len(images))
        maps, other_maps = self.network.maps(images), self.network.maps(others)
        for at, (x, y) in enumerate(zip(maps, other_maps, strict=True)):
            difference = (_unit(x) - _unit(y)).square()
            if self.channel_weights is None:
                depth = difference.sum(1) / len(maps)
            else:
                depth = (difference * self.channel_weights[at][:, None, None]).sum(1)
            total = total + depth.mean(dim=(1, 2))
        return total


def published_weights() -> Path:
    """The file of LPIPS 0.1 in the wheel `lpips`.

    Raises:
        ValueError: the wheel is not installed.
    """
    spec = importlib.util.find_spec("lpips")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("LPIPS needs the weights in the wheel lpips: pip install 'vqvae-priors[looks]'")
    return Path(spec.submodule_search_locations[0], "weights", "v0.1", "vgg.pth")


def _unit(features: Tensor) -> Tensor:
    """Features of unit length at each position, in float32; none where they are all zero, as after a rectifier."""
    features = features.float()
    # A length of zero has no slope; this much keeps it finite.
    square = features.square().sum(1, keepdim=True)
    return features * (square + 1e-10).rsqrt()
