"""A transformer from coarse pictures of codes to fine ones, a whole scale at once.

Tian et al. 2024, "Visual Autoregressive Modeling" (VAR). Codes are one row of pictures r_1 .. r_L of s_l x s_l
positions, coarsest first, each in raster order, as multi-scale residual quantisation gives them:

    ln P(r_1 .. r_L | label) = sum_l sum_i ln P(r_li | r_1 .. r_{l-1}, label)

The codes of a scale are independent of each other given all coarser scales, so that a walk takes L steps. The input of
position i of scale l is

    x_1i = start(label) + target_1i + scale_1
    x_li = area_l( sum_{m<l} bicubic(code(r_m)) )_i + target_li + scale_l,      l > 1

where each picture of embedded codes is enlarged to the finest grid, and their sum shrunk to scale l, as the quantizer
does with its vectors. Attention sees the position's own scale and all coarser ones.

Departures: the embeddings summed are the prior's own, since it knows no quantizer; both maps being linear, they are
one matrix, made once, without the quantizer's convolutions; the class comes in through the start token alone, by the
trunk of `priors.trunk`; and queries and keys are rotated by where the position's middle lies on the finest grid.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from priors.code_embedding import CodeEmbedding, code_nats
from priors.grid import check_grid, check_size
from priors.kv_cache import CachedTrunk, cache_bytes
from priors.packed_linear import prepare
from priors.precision import Arithmetic
from priors.trunk import Trunk, initialise, rotary_pairs, rotations, widen
from priors.trunk_model import TrunkPrior
from priors.walks import Step, WalkStart
from safefolder.configured import ConfiguredOptions
from safefolder.options import Given


class NextScalePrior(TrunkPrior):
    """A transformer that gives all codes of a scale at once, after all coarser ones.

    Beside these its options are those of `TrunkPrior` and `TrunkModel`.

    Args:
        scales: sides of the square pictures of codes, growing.
        grid: (sum of s * s,), the row of all codes; follows from the scales and need not be given.

    >>> prior = NextScalePrior(num_codes=512, scales=(1, 2, 4), num_classes=10)
    >>> prior.log_prob(torch.zeros(3, 21, dtype=torch.int64)).shape
    torch.Size([3])
    """

    # Not saved: they follow from the scales.
    gathering: Tensor  # "n m", the share of each position's embedding (second) in each position's input
    scale_of: Tensor  # "n", the index of each position's scale

    def __init__(
        self, *, scales: Given[Sequence[int]] = (1, 2, 3, 4, 7), grid: Given[Sequence[int]] = (), **options: Any
    ):
        super().__init__(grid=grid, **options)
        config = self.config
        self.scales = tuple(scales)
        self.code = CodeEmbedding(config.num_codes, config.width, config.code_noise)
        self.target = nn.Parameter(torch.empty(self.num_positions, config.width))
        self.scale = nn.Parameter(torch.empty(len(self.scales), config.width))
        self.trunk = Trunk(config)
        self.logits = nn.Linear(config.width, config.num_codes, bias=False)
        self.num_read = self.num_positions - self.scales[-1] ** 2  # the finest scale is read by none
        self.register_buffer("gathering", self._gathering(), persistent=False)
        scale_of = [index for index, scale in enumerate(self.scales) for _ in range(scale**2)]
        self.register_buffer("scale_of", torch.tensor(scale_of), persistent=False)
        initialise(self)

    @classmethod
    def trunk_axes(cls, options: ConfiguredOptions) -> tuple[int, ...]:
        return (options.scales[-1], options.scales[-1])

    @classmethod
    def check_options(cls, options: ConfiguredOptions) -> None:
        if len(options.scales) == 0:
            raise ValueError(f"got scales={options.scales!r}, expected the sides of square grids, e.g. (1, 2, 4)")
        for scale in options.scales:
            check_size(scale, "a scale")
        if any(a >= b for a, b in itertools.pairwise(options.scales)):
            raise ValueError(f"got scales={options.scales}, expected each larger than the one before")
        positions = sum(scale**2 for scale in options.scales)
        if options.grid != () and check_grid(options.grid) != (positions,):
            raise ValueError(
                f"got grid={tuple(options.grid)} with scales={options.scales}, expected ({positions},), their "
                "positions in a row; leave grid out"
            )
        options.put(grid=(positions,))
        super().check_options(options)

    def _log_prob(self, codes: Tensor, labels: Tensor | None) -> Tensor:
        return -code_nats(self._all_logits(self.code(codes[:, : self.num_read]), labels), codes).sum(1)

    def _log_conditionals(self, codes: Tensor, labels: Tensor | None) -> Tensor:
        return self._all_logits(self.code(codes[:, : self.num_read]), labels).log_softmax(-1)

    def _relaxed_log_conditionals(self, weights: Tensor, labels: Tensor | None) -> Tensor:
        return self._all_logits(self.code.mixed(weights[:, : self.num_read]), labels).log_softmax(-1)

    def _all_logits(self, embedded: Tensor, labels: Tensor | None) -> Tensor:
        """Logits "b n k" of every position, from the embedded codes "b m w" of all scales but the finest."""
        everywhere = slice(0, self.num_positions)
        x = self._inputs(self.start(len(embedded), labels), embedded, everywhere)
        return widen(self.logits(self.trunk(x, self._rotary(), self._visible(everywhere))))

    def _inputs(self, start: Tensor, embedded: Tensor, here: slice) -> Tensor:
        """Inputs "b n w" of some positions, from start tokens "b w" and the codes "b m w" of coarser scales."""
        with torch.autocast(embedded.device.type, enabled=False):
            shares = self.gathering[here, : embedded.shape[1]]
            gathered = (shares @ embedded.to(shares.dtype)).to(embedded.dtype)
        first = self.scale_of[here, None] == 0
        return torch.where(first, start[:, None], gathered) + (self.target[here] + self.scale[self.scale_of[here]])

    def _gathering(self) -> Tensor:
        like = widen(self.target)
        # Of a model without memory it has none either: it grows with the square of the positions.
        return gathering(self.scales, "meta" if like.is_meta else "cpu").to(like)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NextScalePrior":
        super()._apply(fn, recurse)
        self.gathering = self._gathering()  # made anew: what was rounded to float32 is no float64 matrix
        return self

    def _rotary(self) -> Tensor:
        like, finest = widen(self.target), self.scales[-1]
        positions = []
        for scale in self.scales:
            middles = (torch.arange(scale, device=like.device, dtype=like.dtype) + 0.5) * (finest / scale) - 0.5
            positions.append(torch.cartesian_prod(middles, middles))
        rotation = rotations(torch.cat(positions), (finest, finest), self.trunk.head_width)
        return rotary_pairs(rotation, rotation)

    def _visible(self, here: slice) -> Tensor:
        """Which of some positions (second) each of them sees."""
        return self.scale_of[here, None] >= self.scale_of[None, here]

    def _start_walk(self, start: WalkStart) -> Step:
        token, rotary = self.start(start.num, start.labels), self._rotary()
        cached = CachedTrunk(self.trunk, start.num, self.num_positions, start.arithmetic)
        to_logits = prepare(self.logits.weight, start.arithmetic, start.num * self.scales[-1] ** 2)
        ends = list(itertools.accumulate(scale**2 for scale in self.scales))
        codes = torch.empty(start.num, 0, dtype=torch.int64, device=self.device)

        def step(fixed: Tensor) -> Tensor:
            nonlocal codes
            codes = torch.cat((codes, fixed), 1)
            known = codes.shape[1]
            # The scale at work, whole: of what a prefix holds of it nothing is read, but keys and values are all seen.
            here = slice(cached.length, next(end for end in ends if end > known))
            x = self._inputs(token, self.code(codes[:, : self.num_read]), here)
            features = cached(x, rotary[here], self._visible(here))[:, known - here.start :]
            logits = to_logits(features.flatten(0, 1)).view(*features.shape[:2], self.num_codes)
            return widen(logits).log_softmax(-1)

        return step

    @property
    def num_at_once(self) -> int:
        return self.scales[-1] ** 2

    def walk_bytes(self, arithmetic: Arithmetic, num_inputs: int = 1) -> int:
        return cache_bytes(self.trunk, self.num_positions, arithmetic, num_inputs)


def gathering(scales: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """The matrix "n m" from embedded codes of all scales but the finest to the inputs of all positions, float64.

    It enlarges each scale to the finest by bicubic interpolation and shrinks the sum by averaging; rows of a scale are
    zero for its own codes and those of finer ones.
    """
    finest, begins = scales[-1], [0, *itertools.accumulate(scale**2 for scale in scales)]
    options = {"dtype": torch.float64, "device": device}
    matrix = torch.zeros(begins[-1], begins[-2], **options)
    for source, small in enumerate(scales[:-1]):
        basis = torch.eye(small**2, **options).view(-1, 1, small, small)
        enlarged = F.interpolate(basis, size=(finest, finest), mode="bicubic")
        for target in range(source + 1, len(scales)):
            shrunk = F.interpolate(enlarged, size=(scales[target], scales[target]), mode="area")
            rows, columns = slice(*begins[target : target + 2]), slice(*begins[source : source + 2])
            matrix[rows, columns] = shrunk.flatten(1).T
    return matrix
