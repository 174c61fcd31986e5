"""A prior over code grids that is a Llama: other software generates codes with its weights.

    x_0 = start(label),      x_i = code(z_i),      i = 1 .. N-1
    x  <- x + Attention(RMSNorm(x));    x  <- x + SwiGLU(RMSNorm(x))         `depth` times
    ln P(z_{i+1} | z_1 .. z_i, label) = log-softmax(Linear(RMSNorm(x_i)))

Touvron et al. 2023, "LLaMA: Open and efficient foundation language models", over the codes of a grid in raster order,
behind a start token. Of it are:

- RMSNorm before each branch and at the end, x / sqrt(mean(x^2) + 1e-6): Zhang & Sennrich 2019, "Root mean square layer
  normalization". Their learned scale is a factor of the linear maps behind the norm, and lives in those.
- Rotary positions: Su et al. 2021, "RoFormer". Pair j of a head of d channels is rotated by i * base^(-2j/d) at
  position i of the sequence, query and key alike. Rows and columns are not told apart, unlike in `priors.trunk`: what
  is above a position is always one row of positions away.
- SwiGLU (Shazeer 2020), no biases, and another matrix for the logits than for the embeddings.

Departures: none that its weights or its outputs show. Dropout, label dropout and noise on the codes read belong to
training. Logits are of codes alone, as start tokens are never sampled, and pairs of a head are neighbours here and half
a head apart in Hugging Face's layout, which is another order of the same rows (`priors.llama_folder` changes it).

A `TransformerPrior` is told the axes of the grid and has learned vectors of its positions; take this one where the
prior is to be served by software for language models.
"""

import math
from typing import Any

from priors.grid import check_size
from priors.raster import RasterPrior
from priors.trunk import SequenceTrunk
from safefolder.configured import ConfiguredOptions


class LlamaPrior(RasterPrior):
    """A Llama over a code grid; `priors.llama_folder` writes it for other software, and reads theirs.

    Beside these its options are those of `TrunkPrior` and `TrunkModel`.

    Args:
        mlp_width: channels of the gated branch; None is 8/3 of the width, rounded to 32.
        rope_base: of the rotary angles, > 1.

    >>> prior = LlamaPrior(num_codes=512, grid=(7, 7), num_classes=10)
    >>> prior.log_prob(torch.zeros(3, 7, 7, dtype=torch.int64)).shape
    torch.Size([3])
    """

    def __init__(self, *, mlp_width: int | None = None, rope_base: float = 10000.0, **options: Any):
        super().__init__(**options)

    @classmethod
    def trunk_axes(cls, options: ConfiguredOptions) -> tuple[int, ...]:
        return (math.prod(options.grid),)

    @classmethod
    def check_options(cls, options: ConfiguredOptions) -> None:
        super().check_options(options)
        if options.mlp_width is not None:
            check_size(options.mlp_width, "mlp_width")
        if not 1 < options.rope_base < math.inf:
            raise ValueError(f"got rope_base={options.rope_base!r}, expected a number above 1, e.g. 10000")

    def make_trunk(self) -> SequenceTrunk:
        return SequenceTrunk(self.config, self.num_positions, self.config.mlp_width, self.config.rope_base)
