"""A transformer over positions and, inside each position, over its codes.

Lee et al. 2022, "Autoregressive image generation using residual quantization" (RQ-Transformer). A grid (.., d) has d
codes at each position t, those of residual or grouped quantisation:

    h_t = Trunk(start(label), v_1 .. v_{t-1}),      v_t = sum_j code_j(z_tj)                       large, over positions
    features_t1 .. features_td = Trunk(h_t, u_t1 .. u_t,d-1),   u_tj = sum_{i<=j} code_i(z_ti)     small, over depths
    ln P(z_tj | before, label) = log-softmax(Linear_j(features_tj))

"Before" is raster order with the last axis fastest: all codes of the positions before, and the shallower ones of t. A
walk so takes one step of the large trunk a position and not a code, and attention is over positions, not over d times
as many.

Departures: each depth has an embedding and a linear map of its own, as a code means another thing in another codebook
(theirs is one codebook for all depths), and both trunks are those of `priors.trunk`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from priors.code_embedding import CodeEmbedding, code_nats
from priors.grid import check_size
from priors.kv_cache import CachedTrunk, cache_bytes, raster_walk
from priors.packed_linear import prepare
from priors.precision import Arithmetic
from priors.trunk import GridTrunk, initialise, widen
from priors.trunk_model import TrunkPrior
from priors.walks import Step, WalkStart
from safefolder.configured import ConfiguredOptions


class DepthTransformerPrior(TrunkPrior):
    """A large transformer over the positions of a grid and a small one over the codes of each.

    Its grid's last axis is the number of codes d at a position, e.g. (7, 7, 4); `depth` is of the large transformer.

    Beside these its options are those of `TrunkPrior` and `TrunkModel`.

    Args:
        code_depth: blocks of the small transformer, over the codes of a position.

    >>> prior = DepthTransformerPrior(num_codes=512, grid=(7, 7, 4), num_classes=10)
    >>> prior.log_prob(torch.zeros(3, 7, 7, 4, dtype=torch.int64)).shape
    torch.Size([3])
    """

    def __init__(self, *, code_depth: int = 2, **options: Any):
        super().__init__(**options)
        config = self.config
        self.num_depths = self.grid[-1]
        codes = (CodeEmbedding(self.num_codes, config.width, config.code_noise) for _ in range(self.num_depths))
        self.code = cast(Sequence[CodeEmbedding], nn.ModuleList(codes))
        self.trunk = GridTrunk(config, self.grid[:-1])
        self.code_trunk = GridTrunk(replace(config, depth=code_depth), (self.num_depths,))
        heads = (nn.Linear(config.width, config.num_codes, bias=False) for _ in range(self.num_depths))
        self.logits = cast(Sequence[nn.Linear], nn.ModuleList(heads))
        initialise(self)

    @classmethod
    def trunk_axes(cls, options: ConfiguredOptions) -> tuple[int, ...]:
        if len(options.grid) < 2:
            raise ValueError(
                f"got grid={options.grid}, expected two axes or more, the last of them the codes of a position, "
                "e.g. (7, 7, 4); take a TransformerPrior for one code a position"
            )
        return options.grid[:-1]

    @classmethod
    def check_options(cls, options: ConfiguredOptions) -> None:
        super().check_options(options)
        check_size(options.code_depth, "code_depth")

    def _log_prob(self, codes: Tensor, labels: Tensor | None) -> Tensor:
        return -code_nats(self._all_logits(self._embedded(codes), labels), codes).sum(1)

    def _log_conditionals(self, codes: Tensor, labels: Tensor | None) -> Tensor:
        return self._all_logits(self._embedded(codes), labels).log_softmax(-1)

    def _relaxed_log_conditionals(self, weights: Tensor, labels: Tensor | None) -> Tensor:
        split = rearrange(weights, "b (t d) k -> b t d k", d=self.num_depths)
        mixtures = [code.mixed(split[:, :, j]) for j, code in enumerate(self.code)]
        return self._all_logits(torch.stack(mixtures, 2), labels).log_softmax(-1)

    def _embedded(self, codes: Tensor) -> Tensor:
        """Vectors "b t d w" of codes "b n" of whole positions."""
        split = rearrange(codes, "b (t d) -> b t d", d=self.num_depths)
        return torch.stack([code(split[:, :, j]) for j, code in enumerate(self.code)], 2)

    def _all_logits(self, embedded: Tensor, labels: Tensor | None) -> Tensor:
        """Logits "b n k" of every position, from the embedded codes "b t d w"."""
        b, sums = len(embedded), embedded.cumsum(2)
        positions = self.trunk(self.start(b, labels), sums[:, :-1, -1])
        features = self.code_trunk(positions.flatten(0, 1), sums[:, :, :-1].flatten(0, 1))
        logits = torch.stack([to_logits(features[:, j]) for j, to_logits in enumerate(self.logits)], 1)
        return widen(logits).view(b, self.num_positions, self.num_codes)

    def _start_walk(self, start: WalkStart) -> Step:
        advance = raster_walk(self.trunk, self.start(start.num, start.labels), start.arithmetic)
        cached = CachedTrunk(self.code_trunk.trunk, start.num, self.num_depths, start.arithmetic)
        rotary, target = self.code_trunk.rotary(self.code_trunk.target), self.code_trunk.target
        to_logits = [prepare(head.weight, start.arithmetic, start.num) for head in self.logits]
        # Codes of the position at work, and the sum of their vectors.
        begun = torch.empty(start.num, 0, dtype=torch.int64, device=self.device)
        total = nothing = target.new_zeros(start.num, target.shape[1])

        def step(fixed: Tensor) -> Tensor:
            nonlocal begun, total
            known, codes = begun.shape[1], torch.cat((begun, fixed), 1)
            whole = codes.shape[1] // self.num_depths * self.num_depths
            begun = codes[:, whole:]
            if whole or not cached.length:
                position = advance(self._embedded(codes[:, :whole]).sum(2))
                cached.reset()
                x, known, total = [position.to(target.dtype)], 0, nothing
            else:
                x = []
            for j in range(known, begun.shape[1]):
                total = total + self.code[j](begun[:, j])
                x.append(total)
            here = slice(cached.length, cached.length + len(x))
            features = cached(torch.stack(x, 1) + target[here], rotary[here])[:, -1]
            return widen(to_logits[begun.shape[1]](features)).log_softmax(-1)[:, None]

        return step

    def walk_bytes(self, arithmetic: Arithmetic, num_inputs: int = 1) -> int:
        large = cache_bytes(self.trunk.trunk, self.num_positions // self.num_depths, arithmetic, num_inputs)
        return large + cache_bytes(self.code_trunk.trunk, self.num_depths, arithmetic)
