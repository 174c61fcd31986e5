"""A decoder-only transformer over code grids.

    x_1 = start(label),  x_i = code(z_{i-1})  ->  `priors.trunk`  ->  features_i
    ln P(z_i | before, label) = log-softmax(Linear(features_i))

The trunk, with its sources, is described in `priors.trunk`. For relaxed codes (`relaxed_tables`)
the input is the mixture sum_k w_{i-1,k} code(k). Log-softmax is in float32 or better under any autocast.

Residual and grouped codes, "b h w d", are a grid of three axes like any other: flattened, one code a step
(`DepthTransformerPrior` takes one step of its large trunk for all d).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from priors.base import Prior
from priors.code_maps import CodeEmbedding, code_nats
from priors.grid import check_grid, check_size
from priors.linear_maps import prepare
from priors.numerics import Numerics
from priors.stepper import cache_bytes, raster_walk
from priors.trunk import GridTrunk, StartToken, check_labelled, check_share, check_trunk, initialise, widen
from priors.walks import Start, Step


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
        code_noise: share of the codes read that training replaces by codes drawn evenly, so that samples that went
            wrong somewhere are not new to the prior.
        checkpointing: training computes each block again in the backward pass: a third more time, less memory.
    """

    num_codes: int
    grid: Sequence[int]
    num_classes: int | None = None
    width: int = 192
    depth: int = 4
    num_heads: int = 6
    dropout: float = 0.0
    label_dropout: float = 0.1
    code_noise: float = 0.0
    checkpointing: bool = False

    def __post_init__(self) -> None:
        check_size(self.num_codes, "num_codes")
        object.__setattr__(self, "grid", check_grid(self.grid))
        check_trunk(self, self.grid)
        check_labelled(self.num_classes, self.label_dropout)
        check_share(self.code_noise, "code_noise")


class TransformerPrior(Prior):
    """An autoregressive transformer over a code grid.

    >>> prior = TransformerPrior(TransformerPriorConfig(num_codes=512, grid=(7, 7), num_classes=10))
    >>> prior.log_prob(torch.zeros(3, 7, 7, dtype=torch.int64)).shape
    torch.Size([3])
    """

    has_numerics = True

    def __init__(self, config: TransformerPriorConfig):
        super().__init__(num_codes=config.num_codes, grid=config.grid, num_classes=config.num_classes)
        self.config = config
        self.start = StartToken(config.num_classes, config.width, config.label_dropout)
        self.code = CodeEmbedding(config.num_codes, config.width, config.code_noise)
        self.trunk = GridTrunk(config, self.grid)
        self.logits = nn.Linear(config.width, config.num_codes, bias=False)
        initialise(self)

    def _log_prob(self, codes: Tensor, labels: Tensor | None) -> Tensor:
        return -code_nats(self._all_logits(self.code(codes[:, :-1]), labels), codes).sum(1)

    def _tables(self, codes: Tensor, labels: Tensor | None) -> Tensor:
        return self._all_logits(self.code(codes[:, :-1]), labels).log_softmax(-1)

    def _relaxed_tables(self, weights: Tensor, labels: Tensor | None) -> Tensor:
        mixtures = weights[:, :-1].to(self.code.weight.dtype) @ self.code.weight
        return self._all_logits(mixtures, labels).log_softmax(-1)

    def _all_logits(self, embedded: Tensor, labels: Tensor | None) -> Tensor:
        """Logits "b n k" of every place, from the embedded codes "b n-1 w" of all but the last."""
        return widen(self.logits(self.trunk(self.start(len(embedded), labels), embedded)))

    def _start_walk(self, start: Start) -> Step:
        advance = raster_walk(self.trunk, self.start(start.num, start.labels), start.numerics)
        to_logits = prepare(self.logits.weight, start.numerics, start.num)
        return lambda fixed: widen(to_logits(advance(self.code(fixed)))).log_softmax(-1)[:, None]

    def walk_bytes(self, numerics: Numerics, num_inputs: int = 1) -> int:
        return cache_bytes(self.trunk.trunk, self.num_places, numerics, num_inputs)

    def config_fields(self) -> dict[str, Any]:
        return {**asdict(self.config), "grid": list(self.grid)}

    @classmethod
    def _from_config_fields(cls, fields: dict[str, Any]) -> "TransformerPrior":
        return cls(TransformerPriorConfig(**fields))
