"""A decoder-only transformer over code grids.

    x_1 = start(label),  x_i = code(z_{i-1})  ->  `priors.trunk`  ->  features_i
    ln P(z_i | before, label) = log-softmax(Linear(features_i))

The trunk, with its sources, is described in `priors.trunk`. For relaxed codes (`relaxed_tables`)
the input is the mixture sum_k w_{i-1,k} code(k). Log-softmax is in float32 or better under any autocast.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from priors.base import Prior, Step
from priors.grid import check_grid, check_size
from priors.trunk import TrunkModel, check_trunk, widen


@dataclass(frozen=True, kw_only=True)
class TransformerPriorConfig:
    """Sizes of a TransformerPrior.

    Attributes:
        num_codes: codes K at each place.
        grid: sizes of the code grid, any number of axes, e.g. (7, 7) or (7, 7, 2).
        num_classes: number of labels; None for a prior without labels.
        width: channels of the residual stream, a multiple of 2 * num_heads.
        depth: blocks.
        num_heads: attention heads.
        dropout: share of each branch's output and of the inputs that training drops.
        label_dropout: share of the labels that training replaces by "no label".
    """

    num_codes: int
    grid: Sequence[int]
    num_classes: int | None = None
    width: int = 192
    depth: int = 4
    num_heads: int = 6
    dropout: float = 0.0
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        check_size(self.num_codes, "num_codes")
        object.__setattr__(self, "grid", check_grid(self.grid))
        check_trunk(self)


class TransformerPrior(Prior, TrunkModel):
    """An autoregressive transformer over a code grid.

    >>> prior = TransformerPrior(TransformerPriorConfig(num_codes=512, grid=(7, 7), num_classes=10))
    >>> prior.log_prob(torch.zeros(3, 7, 7, dtype=torch.int64)).shape
    torch.Size([3])
    """

    def __init__(self, config: TransformerPriorConfig):
        super().__init__(num_codes=config.num_codes, grid=config.grid, num_classes=config.num_classes)
        self.config = config
        self.code = nn.Embedding(config.num_codes, config.width)
        self._add_trunk(config)
        self.logits = nn.Linear(config.width, config.num_codes, bias=False)
        self._initialise()

    def _log_prob(self, codes: Tensor, labels: Tensor | None) -> Tensor:
        logits = self._all_logits(self.code(codes[:, :-1]), labels)
        nats = F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none")
        return -nats.view_as(codes).sum(1)

    def _tables(self, codes: Tensor, labels: Tensor | None) -> Tensor:
        return self._all_logits(self.code(codes[:, :-1]), labels).log_softmax(-1)

    def _relaxed_tables(self, weights: Tensor, labels: Tensor | None) -> Tensor:
        mixtures = weights[:, :-1].to(self.code.weight.dtype) @ self.code.weight
        return self._all_logits(mixtures, labels).log_softmax(-1)

    def _all_logits(self, embedded: Tensor, labels: Tensor | None) -> Tensor:
        """Logits "b n k" of every place, from the embedded codes "b n-1 w" of all but the last."""
        return widen(self.logits(self._features(embedded, labels)))

    def _start_walk(self, num: int, labels: Tensor | None, guidance: float | None) -> Step:
        start = self._start_tokens(num, labels)
        if guidance is not None:
            start = torch.cat((start, self._start_tokens(num, None)))
        advance = self._advance(start)

        def step(fixed: Tensor) -> Tensor:
            x = self.code(fixed)
            if guidance is not None:
                x = x.repeat(2, 1, 1)
            logits = widen(self.logits(advance(x)))
            if guidance is not None:
                guided, free = logits.log_softmax(-1).chunk(2)
                logits = free + guidance * (guided - free)
            return logits.log_softmax(-1)

        return step

    def config_fields(self) -> dict[str, Any]:
        return {**asdict(self.config), "grid": list(self.grid)}

    @classmethod
    def _from_config_fields(cls, fields: dict[str, Any]) -> "TransformerPrior":
        return cls(TransformerPriorConfig(**fields))
