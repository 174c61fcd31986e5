"""A prior over code grids that is a Llama: other software generates codes with its weights.

    x_0 = start(label),      x_i = code(z_i),      i = 1 .. N-1
    x  <- x + Attention(RMSNorm(x));    x  <- x + SwiGLU(RMSNorm(x))         `depth` times
    ln P(z_{i+1} | z_1 .. z_i, label) = log-softmax(Linear(RMSNorm(x_i)))

Touvron et al. 2023, "LLaMA: Open and efficient foundation language models", over the codes of a grid in raster order,
behind a start token. Of it are:

- RMSNorm before each branch and at the end, x / sqrt(mean(x^2) + 1e-6): Zhang & Sennrich 2019, "Root mean square layer
  normalization". Their learned scale is a factor of the linear maps behind the norm, and lives in those.
- Rotary positions: Su et al. 2021, "RoFormer". Pair j of a head of d channels is turned by i * base^(-2j/d) at position
  i of the sequence, query and key alike. Rows and columns are not told apart, unlike in `priors.trunk`: what is above a
  place is always one row of positions away.
- SwiGLU (Shazeer 2020), no biases, and another matrix for the logits than for the embeddings.

Departures: none that its weights or its outputs show. Dropout, label dropout and noise on the codes read belong to
training. Logits are of codes alone, as start tokens are never drawn, and pairs of a head are neighbours here and half a
head apart in Hugging Face's layout, which is another order of the same rows (`priors.llama_folder` changes it).

A `TransformerPrior` is told the axes of the grid and has learned vectors of its places; take this one where the prior
is to be served by software for language models.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from priors.grid import check_grid, check_size
from priors.raster import RasterPrior
from priors.trunk import SequenceTrunk, check_labelled, check_share, check_trunk
from safefolder import Options


@dataclass(frozen=True, kw_only=True)
class LlamaPriorConfig(Options):
    """Sizes of a LlamaPrior.

    Attributes:
        num_codes: codes K at each place.
        grid: sizes of the code grid, any number of axes, e.g. (7, 7) or (7, 7, 2).
        num_classes: number of labels; None for a prior without labels.
        width: channels of the residual stream, a multiple of 2 * num_heads.
        depth: blocks.
        num_heads: attention heads.
        mlp_width: channels of the gated branch; None is 8/3 of the width, rounded to 32.
        rope_base: of the rotary angles, > 1.
        dropout: share of each branch's output and of the inputs that training drops.
        label_dropout: share of the labels that training replaces by "no label".
        code_noise: share of the codes read that training replaces by codes drawn evenly.
        checkpointing: training computes each block again in the backward pass: a third more time, less memory.
    """

    num_codes: int
    grid: Sequence[int]
    num_classes: int | None = None
    width: int = 192
    depth: int = 4
    num_heads: int = 6
    mlp_width: int | None = None
    rope_base: float = 10000.0
    dropout: float = 0.0
    label_dropout: float = 0.1
    code_noise: float = 0.0
    checkpointing: bool = False

    def __post_init__(self) -> None:
        check_size(self.num_codes, "num_codes")
        object.__setattr__(self, "grid", check_grid(self.grid))
        check_trunk(self, (math.prod(self.grid),))
        if self.mlp_width is not None:
            check_size(self.mlp_width, "mlp_width")
        base = self.rope_base
        if not isinstance(base, int | float) or not 1 < base < math.inf:
            raise ValueError(f"got rope_base={base!r}, expected a number above 1, e.g. 10000")
        check_labelled(self.num_classes, self.label_dropout)
        check_share(self.code_noise, "code_noise")


class LlamaPrior(RasterPrior):
    """A Llama over a code grid; `priors.llama_folder` writes it for other software, and reads theirs.

    >>> prior = LlamaPrior(LlamaPriorConfig(num_codes=512, grid=(7, 7), num_classes=10))
    >>> prior.log_prob(torch.zeros(3, 7, 7, dtype=torch.int64)).shape
    torch.Size([3])
    """

    config_class: ClassVar = LlamaPriorConfig

    def __init__(self, config: LlamaPriorConfig):
        super().__init__(config, SequenceTrunk(config, math.prod(config.grid), config.mlp_width, config.rope_base))
