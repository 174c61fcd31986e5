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
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from priors.base import Prior
from priors.code_maps import CodeEmbedding, code_nats
from priors.grid import check_grid, check_size
from priors.linear_maps import prepare
from priors.numerics import Numerics
from priors.stepper import cache_bytes, raster_walk
from priors.trunk import SequenceTrunk, StartToken, check_labelled, check_share, check_trunk, initialise, widen
from priors.walks import Start, Step


@dataclass(frozen=True, kw_only=True)
class LlamaPriorConfig:
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


class LlamaPrior(Prior):
    """A Llama over a code grid; `priors.llama_folder` writes it for other software, and reads theirs.

    >>> prior = LlamaPrior(LlamaPriorConfig(num_codes=512, grid=(7, 7), num_classes=10))
    >>> prior.log_prob(torch.zeros(3, 7, 7, dtype=torch.int64)).shape
    torch.Size([3])
    """

    has_numerics = True

    def __init__(self, config: LlamaPriorConfig):
        super().__init__(num_codes=config.num_codes, grid=config.grid, num_classes=config.num_classes)
        self.config = config
        self.start = StartToken(config.num_classes, config.width, config.label_dropout)
        self.code = CodeEmbedding(config.num_codes, config.width, config.code_noise)
        self.trunk = SequenceTrunk(config, self.num_places, config.mlp_width, config.rope_base)
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
    def _from_config_fields(cls, fields: dict[str, Any]) -> "LlamaPrior":
        return cls(LlamaPriorConfig(**fields))
