"""Quantizers in evaluation as graphs: codes of features and vectors of codes, without branches on values.

Each kind of `vqvae.quantizers` has one here, without its checks, terms and statistics. Translations of our operators
for `torch.export` and ONNX do not replace them: the quantizers' own passes count and check in ways that fix the batch,
onnxruntime has no float64 for what a multi-scale quantizer enlarges by, and `vqvae.interop.code_agreement` judges codes
by these graphs. What differs from the library:

- The nearest code is searched in one precision, in one pass, where `vqvae.quantizers.nearest_search` finds that of
  a float64 brute force. Codes and features are taken relative to the codes' mean, so that features far from zero do
  not lose what tells codes apart. Codes can differ where two distances tie within rounding. Scores of `SECTION` codes
  are held at once, for all places of the batch.
- Maps that the library runs in float64 (projections, the grids and refinements of a multi-scale quantizer) run in
  float32. Enlarging and averaging a grid are products with constant matrices, which no tool resizes otherwise.
- A code outside the codebook is an error of the look-up in torch and in onnxruntime on a CPU, and undefined on most
  accelerators; kinds that compute their vectors (FSQ, LFQ, BSQ) take some vector for it. NaN in the features gives some
  code. `MASKED` codes have zeros for vectors, as in the library.

A graph in float64, with codes that are given, is what `vqvae.interop.code_agreement` judges those codes by.
"""

import abc
import copy
from collections.abc import Callable, Sequence
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from vqvae.quantizers import (
    BSQ,
    FSQ,
    IBQ,
    LFQ,
    MASKED,
    GroupedQuantizer,
    GumbelQuantizer,
    MultiScaleQuantizer,
    ProjectedQuantizer,
    Quantizer,
    ResidualQuantizer,
    SimVQ,
    StochasticVectorQuantizer,
)
from vqvae.quantizers.codebook import CodebookQuantizer

# Codes whose scores are held at once.
SECTION = 8192


class CodeGraph(nn.Module, abc.ABC):
    """Abstract: a quantizer in evaluation, of features `"b *grid d"`, without checks, terms and statistics."""

    @abc.abstractmethod
    def quantize(self, z: Tensor, given: Tensor | None = None, judge: "Judge | None" = None) -> tuple[Tensor, Tensor]:
        """Codes and vectors of projected features.

        Args:
            given: codes to take instead of the nearest ones; what is left of the features follows them.
            judge: asked at each codebook about its features and codes; its answers come back in the codes' stead.
        """

    @abc.abstractmethod
    def look_up(self, codes: Tensor) -> Tensor:
        """The vectors of codes."""

    def project(self, z: Tensor) -> Tensor:
        """Features in the space of the codes."""
        return z

    def run(self, z: Tensor, given: Tensor | None = None, judge: "Judge | None" = None) -> tuple[Tensor, Tensor]:
        """Codes and vectors of features. Arguments as `quantize`."""
        return self.quantize(self.project(z), given, judge)


class Codebook(CodeGraph):
    """Abstract: one code a place.

    Attributes:
        num_scores: what `find` holds at once for each place.
    """

    num_scores = 1

    @abc.abstractmethod
    def find(self, z: Tensor) -> Tensor:
        """The codes of projected features."""

    @abc.abstractmethod
    def vectors(self, codes: Tensor) -> Tensor:
        """The vectors of codes that are not masked."""

    def lead(self, z: Tensor, codes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """By how much `codes` fit better than `others`, as a function that is linear in z, and its slope in z.

        Half the difference of the squared distances, ((a + b)/2 − z)·(b − a) for vectors a and b; the slope is |a − b|.
        """
        a, b = self.vectors(codes), self.vectors(others)
        return (((a + b) / 2 - z) * (b - a)).sum(-1), (a - b).norm(dim=-1)

    def rounding(self, z: Tensor) -> Tensor:
        """What a lead may be off by in float32 through the search itself, where the features are exact."""
        return torch.zeros_like(z[..., 0])

    def quantize(self, z: Tensor, given: Tensor | None = None, judge: "Judge | None" = None) -> tuple[Tensor, Tensor]:
        codes = self.find(z) if given is None else given
        return (codes if judge is None else judge(self, z, codes)), self.vectors(codes)

    def look_up(self, codes: Tensor) -> Tensor:
        return torch.where((codes != MASKED)[..., None], self.vectors(codes.clamp_min(0)), 0.0)


Judge = Callable[[Codebook, Tensor, Tensor], Tensor]


class Listed(Codebook):
    """Codes of a table, by the least of affine scores `offset_k − (z − centre)·weight_k`.

    Nearest codes have the table's rows as weights and half their squared distances from the centre as offsets; then
    `weight` is None. The largest logit has the logits' weights and biases, and no centre.
    """

    def __init__(
        self,
        table: Tensor,
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        normalize: bool = False,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.normalize = normalize
        exact = table.detach().to(dtype)
        self.num_scores = min(len(exact), SECTION)
        self.register_buffer("table", exact.clone())
        centre = exact.double().mean(0).to(dtype) if weight is None else torch.zeros_like(exact[0])
        offsets = (exact.double() - centre.double()).square().sum(1) / 2 if bias is None else -bias.detach().double()
        self.register_buffer("centre", centre)
        self.register_buffer("offsets", offsets.to(dtype))
        self.register_buffer("weight", None if weight is None else weight.detach().to(dtype).clone())

    def project(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=-1) if self.normalize else z

    def find(self, z: Tensor) -> Tensor:
        z, weights = z - self.centre, self._weights()
        if len(weights) <= SECTION:
            return (self.offsets - z @ weights.T).argmin(-1)
        codes, best = [], []
        for start in range(0, len(weights), SECTION):
            scores = self.offsets[start : start + SECTION] - z @ weights[start : start + SECTION].T
            codes.append(scores.argmin(-1) + start)
            best.append(scores.amin(-1))
        section = torch.stack(best, -1).argmin(-1, keepdim=True)
        return torch.stack(codes, -1).gather(-1, section).squeeze(-1)

    def vectors(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.table)

    def lead(self, z: Tensor, codes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        if self.weight is None:
            return super().lead(z, codes, others)
        slope = F.embedding(codes, self.weight) - F.embedding(others, self.weight)
        return self.offsets[others] - self.offsets[codes] + (z * slope).sum(-1), slope.norm(dim=-1)

    def rounding(self, z: Tensor) -> Tensor:
        """Two scores are off by (d + 3)·eps·(‖z‖·max‖weight‖ + max|offset|): see `vqvae.quantizers.nearest_search`."""
        radius, height = self._weights().norm(dim=1).max(), self.offsets.abs().max()
        scale = (z - self.centre).norm(dim=-1) * radius + height
        return (z.shape[-1] + 3) * torch.finfo(torch.float32).eps * scale

    def _weights(self) -> Tensor:
        return self.table - self.centre if self.weight is None else self.weight


class Levels(Codebook):
    """Codes of FSQ: a level of each channel."""

    def __init__(self, quantizer: FSQ):
        super().__init__()
        self.quantizer = copy.deepcopy(quantizer)

    def project(self, z: Tensor) -> Tensor:
        return self.quantizer.project(z)

    def find(self, z: Tensor) -> Tensor:
        return self.quantizer.assign(z, None).codes

    def vectors(self, codes: Tensor) -> Tensor:
        return self.quantizer.vectors_of(codes)


class Signs(Codebook):
    """Codes of LFQ and BSQ: a bit a channel, which is products and remainders, as shifts are not everywhere signed."""

    def __init__(self, num_bits: int, *, sphere: bool, dtype: torch.dtype):
        super().__init__()
        self.sphere = sphere
        self.length = num_bits**0.5 if sphere else 1.0
        self.dtype = dtype
        self.register_buffer("powers", torch.tensor([2**bit for bit in range(num_bits)]))

    def project(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=-1) if self.sphere else z

    def find(self, z: Tensor) -> Tensor:
        return ((z > 0).long() * self.powers).sum(-1)

    def vectors(self, codes: Tensor) -> Tensor:
        bits = codes[..., None] // self.powers % 2
        return (2 * bits - 1).to(self.dtype) / self.length


class Projected(CodeGraph):
    """Any codes between two linear maps."""

    def __init__(self, quantizer: ProjectedQuantizer, dtype: torch.dtype):
        super().__init__()
        self.inner = code_graph(quantizer.quantizer, dtype)
        self.register_buffer("to_inner", quantizer.to_inner.weight.detach().to(dtype).clone())
        self.register_buffer("to_outer", quantizer.to_outer.weight.detach().to(dtype).clone())

    def quantize(self, z: Tensor, given: Tensor | None = None, judge: Judge | None = None) -> tuple[Tensor, Tensor]:
        codes, vectors = self.inner.run(F.linear(z, self.to_inner), given, judge)
        return codes, F.linear(vectors, self.to_outer)

    def look_up(self, codes: Tensor) -> Tensor:
        return F.linear(self.inner.look_up(codes), self.to_outer)


class Grouped(CodeGraph):
    """Codes of each group of channels."""

    def __init__(self, quantizer: GroupedQuantizer, dtype: torch.dtype):
        super().__init__()
        graphs = (code_graph(each, dtype) for each in quantizer.parts)
        self.parts = cast(Sequence[CodeGraph], nn.ModuleList(graphs))
        self.num_axes = len(quantizer.code_axes)

    def project(self, z: Tensor) -> Tensor:
        return torch.cat([part.project(x) for part, x in zip(self.parts, self._split(z), strict=True)], -1)

    def quantize(self, z: Tensor, given: Tensor | None = None, judge: Judge | None = None) -> tuple[Tensor, Tensor]:
        axis = z.ndim - 1
        columns = [None] * len(self.parts) if given is None else given.unbind(axis)
        found = [
            part.quantize(x, column, judge) for part, x, column in zip(self.parts, self._split(z), columns, strict=True)
        ]
        return torch.stack([codes for codes, _ in found], axis), torch.cat([vectors for _, vectors in found], -1)

    def look_up(self, codes: Tensor) -> Tensor:
        columns = codes.unbind(codes.ndim - self.num_axes)
        return torch.cat([part.look_up(column) for part, column in zip(self.parts, columns, strict=True)], -1)

    def _split(self, z: Tensor) -> Sequence[Tensor]:
        return z.split(z.shape[-1] // len(self.parts), -1)


class Residual(CodeGraph):
    """Codes of what is left, again and again."""

    def __init__(self, quantizer: ResidualQuantizer, dtype: torch.dtype):
        super().__init__()
        graphs = (code_graph(each, dtype) for each in quantizer.steps)
        self.steps = cast(Sequence[CodeGraph], nn.ModuleList(graphs))
        self.depth = quantizer.depth
        self.num_axes = len(quantizer.code_axes)
        scales = [torch.as_tensor(quantizer._scale(i), device=_device(quantizer)) for i in range(self.depth)]
        self.register_buffer(
            "scales", torch.stack([scale.detach().expand(quantizer.dim) for scale in scales]).to(dtype)
        )

    def project(self, z: Tensor) -> Tensor:
        return self.steps[0].project(z)

    def quantize(self, z: Tensor, given: Tensor | None = None, judge: Judge | None = None) -> tuple[Tensor, Tensor]:
        axis = z.ndim - 1
        rest, all_codes, total = z, [], torch.zeros_like(z)
        for index in range(self.depth):
            column = None if given is None else given.select(axis, index)
            scale = self.scales[index]
            codes, vectors = self._step(index).quantize(rest / scale, column, judge)
            all_codes.append(codes)
            rest, total = rest - vectors * scale, total + vectors * scale
        return torch.stack(all_codes, axis), total

    def look_up(self, codes: Tensor) -> Tensor:
        columns = codes.unbind(codes.ndim - self.num_axes)
        first, *others = (self._step(index).look_up(x) * self.scales[index] for index, x in enumerate(columns))
        return sum(others, first)

    def _step(self, index: int) -> CodeGraph:
        return self.steps[min(index, len(self.steps) - 1)]


class MultiScale(CodeGraph):
    """Codes of what is left, at growing resolutions."""

    def __init__(self, quantizer: MultiScaleQuantizer, dtype: torch.dtype):
        super().__init__()
        self.inner = code_graph(quantizer.quantizer, dtype)
        self.scales = quantizer.scales
        self.refiner_of = [quantizer._refiner(index) for index in range(len(self.scales))]
        self.refiners = copy.deepcopy(nn.ModuleList(quantizer.refiners)).to(dtype)
        side, device = self.scales[-1], _device(quantizer)
        for scale in self.scales[:-1]:
            # Of one axis, the other as it is: both modes treat the axes one after the other.
            small, large = (torch.eye(n, dtype=torch.float64, device=device)[None, None] for n in (scale, side))
            enlarge = F.interpolate(small, size=(side, scale), mode="bicubic")[0, 0]
            shrink = F.interpolate(large, size=(scale, side), mode="area")[0, 0]
            self.register_buffer(f"enlarge{scale}", enlarge.to(dtype))
            self.register_buffer(f"shrink{scale}", shrink.to(dtype))

    def project(self, z: Tensor) -> Tensor:
        return self.inner.project(z)

    def quantize(self, z: Tensor, given: Tensor | None = None, judge: Judge | None = None) -> tuple[Tensor, Tensor]:
        parts = [None] * len(self.scales) if given is None else self._pictures(given)
        rest, all_codes, total = z, [], torch.zeros_like(z)
        for index, (scale, part) in enumerate(zip(self.scales, parts, strict=True)):
            codes, vectors = self.inner.quantize(self._resized(rest, "shrink", scale), part, judge)
            found = self._enlarged(vectors, index)
            all_codes.append(codes.flatten(1))
            rest, total = rest - found, total + found
        return torch.cat(all_codes, 1), total

    def look_up(self, codes: Tensor) -> Tensor:
        parts = self._pictures(codes)
        first, *others = (self._enlarged(self.inner.look_up(part), index) for index, part in enumerate(parts))
        return torch.where((parts[-1] != MASKED)[..., None], sum(others, first), 0.0)

    def _pictures(self, codes: Tensor) -> list[Tensor]:
        parts = codes.split([scale**2 for scale in self.scales], 1)
        return [part.unflatten(1, (scale, scale)) for scale, part in zip(self.scales, parts, strict=True)]

    def _enlarged(self, vectors: Tensor, index: int) -> Tensor:
        x = rearrange(self._resized(vectors, "enlarge", self.scales[index]), "b h w d -> b d h w")
        return rearrange((self.refiners[self.refiner_of[index]](x) + x) / 2, "b d h w -> b h w d")

    def _resized(self, x: Tensor, how: str, scale: int) -> Tensor:
        if scale == self.scales[-1]:
            return x
        matrix = cast(Tensor, getattr(self, f"{how}{scale}"))
        columns = torch.matmul(matrix, x)  # of each row: "m w" times "b h w d"
        rows = torch.matmul(matrix, columns.transpose(1, 2))
        return rows.transpose(1, 2)


def code_graph(quantizer: Quantizer, dtype: torch.dtype = torch.float32) -> CodeGraph:
    """A copy of a quantizer as a graph in this precision.

    Raises:
        ValueError: a kind that is none of the library's.
    """
    match quantizer:
        case ProjectedQuantizer():
            return Projected(quantizer, dtype)
        case GroupedQuantizer():
            return Grouped(quantizer, dtype)
        case ResidualQuantizer():
            return Residual(quantizer, dtype)
        case MultiScaleQuantizer():
            return MultiScale(quantizer, dtype)
        case CodebookQuantizer():
            return Listed(quantizer.table, normalize=quantizer.normalize, dtype=dtype)
        case SimVQ() | StochasticVectorQuantizer():
            return Listed(quantizer.table, dtype=dtype)
        case GumbelQuantizer():
            weight, bias = quantizer.logits()
            return Listed(quantizer.table, weight=weight, bias=bias, dtype=dtype)
        case IBQ():
            no_bias = torch.zeros_like(quantizer.table[:, 0])
            return Listed(quantizer.table, weight=quantizer.table, bias=no_bias, dtype=dtype)
        case FSQ():
            return Levels(quantizer).to(dtype)
        case LFQ() | BSQ():
            graph = Signs(quantizer.dim, sphere=isinstance(quantizer, BSQ), dtype=dtype)
            return graph.to(_device(quantizer))
    raise ValueError(
        f"{type(quantizer).__name__} has no graph: expected a quantizer of vqvae.quantizers, whose search of codes is "
        "known here; write its graph beside those of vqvae.interop.code_graphs"
    )


def _device(quantizer: Quantizer) -> torch.device:
    return cast(Tensor, quantizer._anchor).device
