"""A tokenizer as two plain graphs: images to codes and codes to images, for tools that trace a computation.

    images ──encoder──> z_e ──codes of a graph──> codes          `ImagesToCodes`, what `model.encode` computes
    codes ──vectors──> z_q ──decoder──> features ──point──> images     `CodesToImages`, what `model.decode` computes

`torch.export` and ONNX hold a computation without Python around it: no operators of our own, no branches on values, no
loops whose length is the batch's. So values are not checked: `vqvae.interop.code_graphs` says what codes outside the
codebook give. The mean of a mixture of logistics is a sum over 255 levels: `LEVELS` at a time, for the whole batch.

Which tokenizers: any `VQVAE` in float32 with a quantizer of `vqvae.quantizers` and a likelihood of `vqvae.likelihoods`.
A prior in the loop has no part in it: `encode` does without.
"""

import copy
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from vqvae.interop.code_graphs import code_graph
from vqvae.interop.precision import check_float32
from vqvae.likelihoods import Categorical, Likelihood, LocalContext, LogisticMixture, Normal
from vqvae.model import VQVAE

# Levels of the mixture's mean that are summed at once: 255 = 51 x 5. More make a shorter graph of tensors that leave
# the cache, which is slow.
LEVELS = 5


class ImagesToCodes(nn.Module):
    """`model.encode` as a graph, in evaluation: uint8 `"b c h w"` to int64 `"b *grid"`.

    It holds a copy of the encoder and of the codes' vectors: later training of the model does not reach it.

    Raises:
        ValueError: no model of codes, not in float32, or a quantizer that is none of the library's.
    """

    def __init__(self, model: VQVAE):
        super().__init__()
        check_exportable(model)
        self.encoder = copy.deepcopy(model.encoder)
        self.quantizer = code_graph(model.quantizer)
        self.eval().requires_grad_(False)

    def forward(self, images: UInt8[Tensor, "b c h w"]) -> Int[Tensor, "b *grid"]:
        return self.quantizer.run(self.encoder(images).float())[0]


class CodesToImages(nn.Module):
    """`model.decode` as a graph: int64 `"b *grid"` to uint8 `"b c h w"`, the likelihood's point estimate.

    It holds a copy of the decoder and of the codes' vectors: later training of the model does not reach it.

    Raises:
        ValueError: as `ImagesToCodes`, or a likelihood that is none of the library's.
    """

    def __init__(self, model: VQVAE):
        super().__init__()
        check_exportable(model)
        self.quantizer = code_graph(model.quantizer)
        self.decoder = copy.deepcopy(model.decoder)
        # Of LocalContext the network that looks at other pixels has no part in the point estimate.
        likelihood = model.likelihood.mixture if isinstance(model.likelihood, LocalContext) else model.likelihood
        if not isinstance(likelihood, LogisticMixture | Categorical | Normal):
            raise ValueError(
                f"{type(likelihood).__name__} has no graph: expected LogisticMixture, LocalContext, Categorical or "
                "Normal"
            )
        self.likelihood = copy.deepcopy(likelihood)
        self.eval().requires_grad_(False)

    def forward(self, codes: Int[Tensor, "b *grid"]) -> UInt8[Tensor, "b c h w"]:
        features = self.decoder(self.quantizer.look_up(codes)).float()
        return _point_estimate(self.likelihood, features).round().clamp(0, 255).to(torch.uint8)


def check_exportable(model: Any) -> None:
    """Raise ValueError for what has no codes, or is not in float32."""
    if not isinstance(model, VQVAE):
        raise ValueError(f"got a {type(model).__name__}, expected a VQVAE: only a model of codes is such a tokenizer")
    check_float32(model, "export")


def _point_estimate(likelihood: Likelihood, features: Float[Tensor, "b f h w"]) -> Float[Tensor, "b c h w"]:
    """The likelihood's point estimate as a graph: levels 0..255, not rounded."""
    if isinstance(likelihood, LogisticMixture):
        return _mixture_mean(likelihood, features)
    if isinstance(likelihood, Categorical):
        probs = features.unflatten(1, (likelihood.num_channels, -1)).softmax(2)
        levels = torch.arange(probs.shape[2], dtype=probs.dtype, device=probs.device)
        return (probs * levels[:, None, None]).sum(2)
    return likelihood.point_estimate(features)


def _mixture_mean(mixture: LogisticMixture, features: Tensor) -> Tensor:
    """As `LogisticMixture.mean`, with the batch in one piece."""
    parts = mixture._split(features)
    weights = parts.logits.softmax(1)[:, : mixture.num_components]
    inverse = (-mixture._log_scales(parts)).exp()
    means = parts.means + mixture._offsets(parts.means)
    edges = torch.arange(1, 511, 2, dtype=torch.float64, device=features.device).div(255).sub(1).to(features.dtype)
    tanhs = None if parts.coefficients is None else parts.coefficients.tanh()
    x: list[Tensor] = []
    levels = []
    for channel in range(mixture.num_channels):
        mean = means[:, channel]
        if channel and tanhs is not None:
            first = channel * (channel - 1) // 2
            for earlier in range(channel):
                mean = mean + tanhs[:, first + earlier] * x[earlier]
        scaled, narrow = (mean * inverse[:, channel])[:, None], inverse[:, channel, None]
        # E[y] = sum_{v < 255} P(y > v), a component at a time.
        level = torch.zeros_like(mean)
        for start in range(0, len(edges), LEVELS):
            level = level + (scaled - narrow * edges[start : start + LEVELS, None, None]).sigmoid().sum(1)
        x.append(level * (2 / 255) - 1)
        levels.append((weights * level).sum(1))
    return torch.stack(levels, 1).unflatten(2, features.shape[2:])
