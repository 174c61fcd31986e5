"""The options that every transformer over a grid has, and what they are held against."""

from typing import Any

from priors.base import Prior
from priors.grid import GridModel, check_size
from priors.trunk import StartToken, check_share
from safefolder.configured import ConfiguredOptions


class TrunkModel(GridModel):
    """Abstract: a model that stands on a trunk (`priors.trunk`), and begins with a `StartToken`.

    Args:
        width: channels of the residual stream, a multiple of 2 * num_heads.
        depth: blocks.
        num_heads: attention heads.
        dropout: share of each branch's output and of the inputs that training drops.
        label_dropout: share of the labels that training replaces by "no label".
        checkpointing: training computes each block again in the backward pass: a third more time, less memory.
    """

    def __init__(
        self,
        *,
        width: int = 192,
        depth: int = 4,
        num_heads: int = 6,
        dropout: float = 0.0,
        label_dropout: float = 0.1,
        checkpointing: bool = False,
        **grid: Any,
    ):
        super().__init__(**grid)

    @classmethod
    def check_options(cls, options: ConfiguredOptions) -> None:
        super().check_options(options)
        axes, width, num_heads = len(cls.trunk_axes(options)), options.width, options.num_heads
        for name in ("width", "depth", "num_heads"):
            check_size(getattr(options, name), name)
        if width % (2 * num_heads):
            raise ValueError(
                f"got width={width} with num_heads={num_heads}, "
                f"expected a multiple of {2 * num_heads}, as rotary positions need even heads"
            )
        if width // num_heads < 2 * axes:
            raise ValueError(
                f"got heads of {width // num_heads} channels for a grid of {axes} axes, expected {2 * axes} or more"
            )
        for name in ("dropout", "label_dropout"):
            check_share(getattr(options, name), name)

    @classmethod
    def trunk_axes(cls, options: ConfiguredOptions) -> tuple[int, ...]:
        """The axes along which the trunk's positions are told, of options whose grid is checked already."""
        return options.grid


class TrunkPrior(Prior, TrunkModel):
    """Abstract: a transformer over codes.

    Args:
        code_noise: share of the codes read that training replaces by codes drawn evenly, so that samples that went
            wrong somewhere are not new to the prior.
    """

    has_arithmetic = True

    def __init__(self, *, code_noise: float = 0.0, **options: Any):
        super().__init__(**options)
        self.start = StartToken(self.num_classes, self.config.width, self.config.label_dropout)

    @classmethod
    def check_options(cls, options: ConfiguredOptions) -> None:
        super().check_options(options)
        check_share(options.code_noise, "code_noise")
