"""The gated PixelCNN over code grids of two axes.

van den Oord et al. 2016, "Conditional image generation with PixelCNN decoders"; over the codes of a VQ-VAE: van den
Oord, Vinyals & Kavukcuoglu 2017, "Neural discrete representation learning". Two stacks of convolutions see the codes
before a position, and together all of them: a single stack of masked convolutions has a blind spot at the right above.

    v_1 = embedded codes, one row down;     h_1 = embedded codes, one column to the right
    a_l = Conv(v_l)                         over the rows up to this one, in columns from -r to r
    v_{l+1} = gate(a_l + V_l s)             the vertical stack: all rows above the position
    b_l = Conv(h_l) + W_l a_l               over the columns up to this one
    h_{l+1} = h_l + U_l gate(b_l + V'_l s)  the horizontal stack: the positions at the left as well
    gate(x, y) = tanh(x) sigmoid(y)
    ln P(z_i | before, label) = log-softmax(Linear(relu(Linear(relu(h_i)))))

with r half of the kernel size, and s a learned vector of the label ("no label" is one too; without classes there is one
vector, and V s are biases). A position sees `depth * r` positions back, and what lies outside of the grid is 0. For
relaxed codes the embedding is the mixture sum_k w_ik embedding_k.

Departures: the input is shifted once where the paper masks the first layer, so that all layers are the same, and
convolutions are cropped instead of masked; residuals begin at the first layer; a learned s in place of one-hot labels.
Weights start so that no stack fades: tanh(x) sigmoid(y) is x/2 near 0, thus a gain of 2 in the vertical stack, which
has no residuals.

The walk keeps the last r rows and columns of every layer, and computes one position at a time. It uses the prior's own
weights, whatever precision is asked for.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from priors.base import Prior
from priors.code_embedding import CodeEmbedding, code_nats
from priors.grid import check_size
from priors.precision import Arithmetic
from priors.trunk import StartToken, check_share, widen
from priors.walks import Step, WalkStart
from safefolder.configured import ConfiguredOptions


class PixelCNNPrior(Prior):
    """Two stacks of gated convolutions over a code grid of two axes.

    Args:
        width: channels of both stacks.
        depth: layers.
        kernel_size: of the convolutions, odd; each layer sees (kernel_size - 1) / 2 positions further.
        dropout: share of the gated features of the horizontal stack that training drops.
        label_dropout: share of the labels that training replaces by "no label".
        code_noise: share of the codes read that training replaces by codes drawn evenly.

    >>> prior = PixelCNNPrior(num_codes=512, grid=(7, 7), num_classes=10)
    >>> prior.log_prob(torch.zeros(3, 7, 7, dtype=torch.int64)).shape
    torch.Size([3])
    """

    def __init__(
        self,
        *,
        width: int = 128,
        depth: int = 10,
        kernel_size: int = 3,
        dropout: float = 0.0,
        label_dropout: float = 0.1,
        code_noise: float = 0.0,
        **grid: Any,
    ):
        super().__init__(**grid)
        config = self.config
        self.label = StartToken(config.num_classes, config.width, config.label_dropout)
        self.code = CodeEmbedding(config.num_codes, config.width, config.code_noise)
        self.layers = cast(Sequence[GatedLayer], nn.ModuleList(GatedLayer(config) for _ in range(config.depth)))
        self.hidden = nn.Linear(config.width, config.width)
        self.logits = nn.Linear(config.width, config.num_codes)
        nn.init.kaiming_normal_(self.hidden.weight, nonlinearity="relu")
        nn.init.normal_(self.logits.weight, std=0.02)
        nn.init.zeros_(self.logits.bias)

    @classmethod
    def check_options(cls, options: ConfiguredOptions) -> None:
        super().check_options(options)
        if len(options.grid) != 2:
            raise ValueError(f"got grid={options.grid}, expected two axes, rows and columns; take a TransformerPrior")
        for name in ("width", "depth", "kernel_size"):
            check_size(getattr(options, name), name)
        if options.kernel_size < 3 or options.kernel_size % 2 == 0:
            raise ValueError(f"got kernel_size={options.kernel_size}, expected an odd number >= 3")
        for name in ("label_dropout", "dropout", "code_noise"):
            check_share(getattr(options, name), name)

    def _log_prob(self, codes: Tensor, labels: Tensor | None) -> Tensor:
        return -code_nats(self._all_logits(self.code(codes), labels), codes).sum(1)

    def _log_conditionals(self, codes: Tensor, labels: Tensor | None) -> Tensor:
        return self._all_logits(self.code(codes), labels).log_softmax(-1)

    def _relaxed_log_conditionals(self, weights: Tensor, labels: Tensor | None) -> Tensor:
        return self._all_logits(self.code.mixed(weights), labels).log_softmax(-1)

    def _all_logits(self, embedded: Tensor, labels: Tensor | None) -> Tensor:
        """Logits "b n k" of every position, from the embedded codes "b n c" of all positions."""
        x = rearrange(embedded, "b (h w) c -> b c h w", h=self.grid[0])
        v, h = F.pad(x, (0, 0, 1, -1)), F.pad(x, (1, -1))
        label, reach = self.label(len(x), labels), self.config.kernel_size // 2
        for layer in self.layers:
            biases = layer.biases(label)
            v, link = layer.vertical(F.pad(v, (0, 0, reach, 0)), biases)
            h = layer.horizontal(F.pad(h, (reach, 0)), link, biases)
        return self._read(rearrange(h, "b c h w -> b (h w) c"))

    def _read(self, features: Tensor) -> Tensor:
        """Logits "b n k" of the horizontal stack's features "b n c"."""
        return widen(self.logits(self.hidden(features.relu()).relu()))

    def _start_walk(self, start: WalkStart) -> Step:
        walk = _Walk(self, self.label(start.num, start.labels))

        def step(fixed: Tensor) -> Tensor:
            for vectors in self.code(fixed).unbind(1):
                walk.go_on(vectors)
            return self._read(walk.features).log_softmax(-1)

        return step

    def walk_bytes(self, arithmetic: Arithmetic, num_inputs: int = 1) -> int:
        # In both stacks the positions that the kernels reach back to, and the links of a row.
        config, columns = self.config, self.grid[1]
        positions = (config.kernel_size // 2) * (columns + 1) + 2 * columns
        return config.depth * config.width * positions * self.dtype.itemsize


class GatedLayer(nn.Module):
    """One layer of both stacks. What lies before the grid is padded by the caller: zeros, or what a walk has kept."""

    def __init__(self, config: ConfiguredOptions):
        super().__init__()
        width, self.reach, self.dropout = config.width, config.kernel_size // 2, config.dropout
        self.bias = nn.Linear(width, 4 * width, bias=False)
        self.above = nn.Conv2d(
            width, 2 * width, (self.reach + 1, config.kernel_size), padding=(0, self.reach), bias=False
        )
        self.before = nn.Conv2d(width, 2 * width, (1, self.reach + 1), bias=False)
        self.link = nn.Conv2d(2 * width, 2 * width, 1, bias=False)
        self.out = nn.Conv2d(width, width, 1, bias=False)
        for part, gain in ((self.bias, 0.3), (self.above, 2), (self.before, 1), (self.link, 0.5)):
            nn.init.normal_(part.weight, std=gain / math.sqrt(part.weight[0].numel()))
        nn.init.normal_(self.out.weight, std=1 / math.sqrt(width * config.depth))

    def biases(self, label: Tensor) -> Tensor:
        """Of the two gates, "b 2 2c 1 1", from vectors of labels "b c"."""
        return self.bias(label).unflatten(-1, (2, -1))[..., None, None]

    def vertical(self, v: Tensor, biases: Tensor) -> tuple[Tensor, Tensor]:
        """The stack's next features "b c h w" of `v` with `reach` rows above it, and what goes over, "b 2c h w"."""
        mixed = self.above(v)
        return _gate(mixed + biases[:, 0]), self.link(mixed)

    def horizontal(self, h: Tensor, link: Tensor, biases: Tensor) -> Tensor:
        """The stack's next features "b c h w" of `h` with `reach` columns before it."""
        gated = _gate(self.before(h) + link + biases[:, 1])
        return h[..., self.reach :] + self.out(F.dropout(gated, self.dropout, self.training))


class _Walk:
    """Position by position through the layers.

    Attributes: `features` "b 1 c", of the next position.
    """

    def __init__(self, prior: PixelCNNPrior, label: Tensor):
        self.layers, self.columns = prior.layers, prior.grid[1]
        self.reach = prior.config.kernel_size // 2
        self.biases = [layer.biases(label) for layer in self.layers]
        self.zeros = label.new_zeros(len(label), prior.config.width, 1, 1)
        self.rows = [self.zeros.expand(-1, -1, self.reach, self.columns) for _ in self.layers]
        self._begin_row(self.zeros.expand(-1, -1, 1, self.columns))

    def go_on(self, vectors: Tensor) -> None:
        """Over a position whose embedded codes "b c" are known."""
        self.row.append(vectors[..., None, None])
        if len(self.row) == self.columns:
            self._begin_row(torch.cat(self.row, -1))
        else:
            self._horizontal(self.row[-1])

    def _begin_row(self, above: Tensor) -> None:
        """The vertical stack of a row, from the embedded codes "b c 1 w" of the row above."""
        v, self.links = above, []
        for i, (layer, biases) in enumerate(zip(self.layers, self.biases, strict=True)):
            seen = torch.cat((self.rows[i], v), 2)
            self.rows[i] = seen[:, :, 1:]
            v, link = layer.vertical(seen, biases)
            self.links.append(link)
        self.row: list[Tensor] = []
        self.left = [self.zeros.expand(-1, -1, -1, self.reach) for _ in self.layers]
        self._horizontal(self.zeros)

    def _horizontal(self, h: Tensor) -> None:
        """The horizontal stack at one position, from the embedded codes "b c 1 1" of the position before."""
        column = len(self.row)
        for i, (layer, biases) in enumerate(zip(self.layers, self.biases, strict=True)):
            seen = torch.cat((self.left[i], h), 3)
            self.left[i] = seen[..., 1:]
            h = layer.horizontal(seen, self.links[i][..., column : column + 1], biases)
        self.features = h[:, None, :, 0, 0]


def _gate(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, 1)
    return value.tanh() * gate.sigmoid()
