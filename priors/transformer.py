"""A decoder-only transformer over code grids.

    x_1 = start(label),  x_i = code(z_{i-1})  ->  `priors.trunk`  ->  features_i
    ln P(z_i | before, label) = log-softmax(Linear(features_i))

The trunk, with its sources, is described in `priors.trunk`; all around it is in `priors.raster`.

Residual and grouped codes, "b h w d", are a grid of three axes like any other: flattened, one code a step
(`DepthTransformerPrior` takes one step of its large trunk for all d).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from priors.grid import check_grid, check_size
from priors.raster import RasterPrior
from priors.trunk import GridTrunk, check_labelled, check_share, check_trunk
from safefolder import Options


@dataclass(frozen=True, kw_only=True)
class TransformerPriorConfig(Options):
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


class TransformerPrior(RasterPrior):
    """An autoregressive transformer over a code grid.

    >>> prior = TransformerPrior(TransformerPriorConfig(num_codes=512, grid=(7, 7), num_classes=10))
    >>> prior.log_prob(torch.zeros(3, 7, 7, dtype=torch.int64)).shape
    torch.Size([3])
    """

    config_class: ClassVar = TransformerPriorConfig

    def __init__(self, config: TransformerPriorConfig):
        super().__init__(config, GridTrunk(config, config.grid))
