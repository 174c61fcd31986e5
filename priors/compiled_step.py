"""One input through a trunk by operations that are the same at every position: to be compiled, or kept as a CUDA graph.

The position is a number in memory, keys and values are written by index, and attention looks at the whole cache with
what lies ahead hidden. torch.compile makes one pass over the cache of it, which eager operations cannot; a CUDA graph
takes away the launches, which in a small trunk take longer than the work.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from priors.packed_linear import Weight, multiply
from priors.trunk import rms_norm

_MOST_SHAPES = 128


class Layer(NamedTuple):
    """Keys and values "b h n d" of a layer, and its weights."""

    keys: Tensor
    values: Tensor
    qkv: Weight
    out: Weight
    gate_and_value: Weight
    mlp_out: Weight


def step_to_compile(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    ahead: Tensor,
    layers: list[Layer],
    dtype: torch.dtype,
    normalised: bool,
) -> Tensor:
    """Features "b w" of inputs "b w", in float32 or better; the caches are written.

    Args:
        cos, sin: of the rotary of query and key, "b 2 1 pairs".
        position: int64 "1", where in the cache this input goes.
        ahead: "n n", what is added to the scores of the input at a position (first): -inf for later positions.
        dtype: of the products with weights.
        normalised: whether queries and keys are, as in `Trunk`.
    """
    bias = ahead.index_select(0, position)
    for layer in layers:
        b, h, _, d = layer.keys.shape
        split = multiply(rms_norm(x).to(dtype), layer.qkv).to(x.dtype).view(b, 3, h, d)
        both = F.layer_norm(split[:, :2], (d,), eps=1e-6) if normalised else split[:, :2]
        first, second = both[..., 0::2], both[..., 1::2]
        rotated = torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2)
        cached = layer.keys.dtype
        layer.keys.index_copy_(2, position, rotated[:, 1, :, None].to(cached))
        layer.values.index_copy_(2, position, split[:, 2, :, None].to(cached))
        scores = (rotated[:, 0, :, None] * layer.keys).sum(-1) * d**-0.5 + bias
        mixed = (scores.softmax(-1)[..., None] * layer.values).sum(2)
        x = x + multiply(mixed.reshape(b, h * d).to(dtype), layer.out)
        gate, value = multiply(rms_norm(x).to(dtype), layer.gate_and_value).chunk(2, -1)
        x = x + multiply(F.silu(gate) * value, layer.mlp_out)
    return rms_norm(x)


@functools.cache
def _made() -> Callable[..., Tensor]:
    return torch.compile(step_to_compile, fullgraph=True, dynamic=False)


class Compiled:
    """`step_to_compile` through torch.compile, once for all walks of the same shapes."""

    def __init__(self) -> None:
        self.step, self.is_ready = _made(), False

    def __call__(self, *inputs: object) -> Tensor:
        if self.is_ready:
            return self.step(*inputs)
        self.is_ready = True
        # Models and batches of other sizes are other programs; torch stops at eight unless told how many.
        with torch._dynamo.config.patch(recompile_limit=_MOST_SHAPES):
            return self.step(*inputs)


class Graph:
    """`step_to_compile` as one CUDA graph for a walk. Its tensors stay where they are; only their values change."""

    def __init__(self, step: Callable[..., Tensor]):
        self.step = step
        self.graph: torch.cuda.CUDAGraph | None = None
        self.features: Tensor | None = None

    def __call__(self, x: Tensor, *inputs: object) -> Tensor:
        with torch.cuda.device(x.device):
            if self.graph is None:
                # What libraries allocate at their first call must be there before the capture.
                aside = torch.cuda.Stream()
                aside.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(aside):
                    self.step(x, *inputs)
                torch.cuda.current_stream().wait_stream(aside)
                self.graph = torch.cuda.CUDAGraph()
                # Other threads may go on with the GPU meanwhile, as one that pins memory does.
                with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                    self.features = self.step(x, *inputs)
            self.graph.replay()
        assert self.features is not None
        return self.features
