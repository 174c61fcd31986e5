"""The transformer that priors over grids share: from the vectors at the positions done to features of the next one.

    x_1 = start + target_1,      x_i = vector_{i-1} + target_i,       i = 1 .. N
    x  <- x + Attention(RMSNorm(x));    x  <- x + SwiGLU(RMSNorm(x))         `depth` times
    features_i = RMSNorm(x_i)

What a vector holds (the embedding of a code, the map of a latent) and what is read from the features is the prior's.
A `SequenceTrunk` has the same blocks in Llama's design: no targets, positions counted along the sequence, and queries
and keys as the linear map gives them.

- Causal self-attention: Vaswani et al. 2017, "Attention is all you need".
- RMSNorm before each branch, x / sqrt(mean(x^2) + 1e-6): Zhang & Sennrich 2019. Without their
  learned scale, which the linear map behind every norm here can hold, and which takes time.
- Each head's queries and keys go through a LayerNorm without parameters, (x - mean) / sqrt(var + 1e-6),
  before they are rotated: Dehghani et al. 2023, "Scaling vision transformers to 22 billion parameters".
- SwiGLU, W_3 (silu(W_1 x) * W_2 x), 8/3 width rounded to 32: Shazeer 2020.
- Rotary positions, pairs (a, b) of a head rotated by an angle: Su et al. 2021, "RoFormer". The
  pairs are dealt out to the grid's axes (half to rows, half to columns in two dimensions), and
  pair j of the n of an axis rotary by coordinate * base^(-j/n). Two departures: the base is
  max(100, length of the axis), since axes are tens of positions long and not thousands; and a query is
  rotated by the position that it predicts, a key by the position whose vector it holds, so that "the position
  above" is the same rotation everywhere, also where a row begins, and in any order of the positions.
  The start token's key stands at (-1, .., -1).
- `target_i`, a learned vector of the position to predict, is our addition: grids are small and fixed.
- The start token of a prior with labels is the class's embedding, or a learned "no label" one, which in
  training also replaces a share `label_dropout` of the labels, for guidance (Ho & Salimans 2022).
- Weights start at N(0, 0.02), those that write into the residual stream at 0.02 / sqrt(2 depth)
  (Radford et al. 2019, GPT-2). No biases.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from safefolder.configured import ConfiguredOptions

# Up to this length bf16 attention on a CPU trains faster by hand than through
# scaled_dot_product_attention, whose backward pass is slow there. In float32 there is no such gap.
_LONGEST_BY_HAND = 256


def check_share(share: float, name: str) -> None:
    """ValueError unless it is a number in [0, 1)."""
    if not isinstance(share, int | float) or not 0 <= share < 1:
        raise ValueError(f"got {name}={share!r}, expected a number in [0, 1)")


class StartToken(nn.Module):
    """The vector that a walk begins with: of a class, or of "no label", the last. One row without classes."""

    def __init__(self, num_classes: int | None, width: int, label_dropout: float):
        super().__init__()
        self.label_dropout = label_dropout
        self.embedding = nn.Embedding((num_classes or 0) + 1, width)

    def forward(self, num: int, labels: Tensor | None) -> Tensor:
        """Tokens "b w" of labels "b"; in training some become "no label"."""
        no_label = self.embedding.num_embeddings - 1
        if labels is None:
            return self.embedding.weight[no_label].expand(num, -1)
        if self.training and self.label_dropout > 0:
            dropped = torch.rand(labels.shape, dtype=torch.float32, device=labels.device) < self.label_dropout
            labels = labels.masked_fill(dropped, no_label)
        return self.embedding(labels)


class Trunk(nn.Module):
    """The blocks alone; where things stand is told by `rotary`, and what sees what by `visible`."""

    def __init__(self, config: ConfiguredOptions, normalised: bool = True, mlp_width: int | None = None):
        """`normalised`: whether queries and keys are. `mlp_width`: of the gated branch, None for 8/3 of the width."""
        super().__init__()
        self.width, self.num_heads, self.depth = config.width, config.num_heads, config.depth
        self.dropout, self.checkpointing, self.normalised = config.dropout, config.checkpointing, normalised
        self.mlp_width = gated_width(config.width) if mlp_width is None else mlp_width
        blocks = (Block(config, normalised, self.mlp_width) for _ in range(config.depth))
        self.blocks = cast(Sequence[Block], nn.ModuleList(blocks))

    def forward(self, x: Tensor, rotary: Tensor, visible: Tensor | None = None) -> Tensor:
        """Features "b n w" of inputs "b n w".

        Args:
            rotary: of queries and keys, from `rotary_pairs`: "n 2 1 pairs" or "b n 2 1 pairs".
            visible: bool "n n", which keys (second) each query (first) sees; None is those up to its own.
        """
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            if self.checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, visible, use_reentrant=False)
            else:
                x = block(x, rotary, visible)
        return rms_norm(x)

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads


class GridTrunk(nn.Module):
    """A trunk over the positions of a grid, in raster order or any other."""

    def __init__(self, config: ConfiguredOptions, grid: Sequence[int]):
        super().__init__()
        self.grid = tuple(grid)
        self.target = nn.Parameter(torch.empty(math.prod(grid), config.width))
        self.trunk = Trunk(config)

    def forward(self, start: Tensor, vectors: Tensor, order: Tensor | None = None) -> Tensor:
        """Features "b n w" of all positions at once, in their order.

        Args:
            start: start tokens "b w".
            vectors: those at all positions but the last, "b n-1 w", in order.
            order: positions in the order in which they are taken, "b n"; None is raster order.
        """
        target = self.target if order is None else self.target[order]
        return self.trunk(torch.cat((start[:, None], vectors), 1) + target, self.rotary(start, order))

    @property
    def num_positions(self) -> int:
        return len(self.target)

    def inputs(self, vectors: Tensor, here: slice | Tensor) -> Tensor:
        """What the blocks take, "b m w", for the positions `here` ("b m", or a slice in raster order), from the vectors
        before each."""
        return vectors + self.target[here]

    def rotary(self, like: Tensor, order: Tensor | None = None) -> Tensor:
        """Rotary pairs of the positions in an order, for `Trunk`: a key stands where the query before it pointed."""
        rotation = rotations(grid_positions(self.grid, like), self.grid, self.trunk.head_width)
        queries = rotation[1:] if order is None else rotation[1:][order]
        before = rotation[:1].expand(*queries.shape[:-2], 1, -1)
        return rotary_pairs(queries, torch.cat((before, queries[..., :-1, :]), -2))


class SequenceTrunk(nn.Module):
    """A trunk over positions in one sequence, in the design of Llama (Touvron et al. 2023, "LLaMA: Open and efficient
    foundation language models"): the vector at position i = 0 .. N-1 is all that enters there, and pair j of a head of
    d channels is rotated by i * base^(-2j/d), query and key alike."""

    def __init__(self, config: ConfiguredOptions, num_positions: int, mlp_width: int | None, rope_base: float):
        super().__init__()
        self.num_positions, self.rope_base = num_positions, rope_base
        self.trunk = Trunk(config, normalised=False, mlp_width=mlp_width)

    def forward(self, start: Tensor, vectors: Tensor) -> Tensor:
        """Features "b n w" of all positions at once, from start tokens "b w" and vectors "b n-1 w" before the last."""
        return self.trunk(torch.cat((start[:, None], vectors), 1), self.rotary(start))

    def rotary(self, like: Tensor) -> Tensor:
        """Rotary pairs of the positions, as `Trunk` takes them."""
        options = {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
        head_width = self.trunk.head_width
        speeds = self.rope_base ** (-torch.arange(0, head_width, 2, **options) / head_width)
        angle = torch.arange(self.num_positions, **options)[:, None] * speeds
        rotation = torch.polar(torch.ones_like(angle), angle)
        return rotary_pairs(rotation, rotation)

    def inputs(self, vectors: Tensor, here: slice | Tensor) -> Tensor:
        """What the blocks take, "b m w": the vectors as they are, wherever they stand."""
        return vectors


def initialise(model: nn.Module) -> None:
    """Fresh weights for every map and embedding of a prior that stands on trunks."""
    depths = {
        id(weight): trunk.depth
        for trunk in model.modules()
        if isinstance(trunk, Trunk)
        for weight in trunk.parameters()
    }
    for name, weight in model.named_parameters():
        writes = id(weight) in depths and name.endswith(("attention.out.weight", "mlp.out.weight"))
        nn.init.normal_(weight, std=0.02 / math.sqrt(2 * depths[id(weight)]) if writes else 0.02)


class Attention(nn.Module):
    """Self-attention with rotated queries and keys, normalised before that or not."""

    def __init__(self, config: ConfiguredOptions, normalised: bool):
        super().__init__()
        self.num_heads, self.normalised = config.num_heads, normalised
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, rotary: Tensor, visible: Tensor | None) -> Tensor:
        qkv = rearrange(self.qkv(x), "b n (s h d) -> b n s h d", s=3, h=self.num_heads)
        rotate = normalise_and_rotate if self.normalised else rotated
        queries, keys = rearrange(rotate(qkv[:, :, :2], rotary), "b n s h d -> s b h n d")
        values = rearrange(qkv[:, :, 2], "b n h d -> b h n d")
        return self.out(rearrange(_attend(queries, keys, values, visible), "b h n d -> b n (h d)"))


class SwiGLU(nn.Module):
    """The gated branch between two attentions."""

    def __init__(self, config: ConfiguredOptions, mlp_width: int):
        super().__init__()
        self.gate_and_value = nn.Linear(config.width, 2 * mlp_width, bias=False)
        self.out = nn.Linear(mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.gate_and_value(x).chunk(2, -1)
        return self.out(F.silu(gate) * value)


class Block(nn.Module):
    """Attention and the gated branch, each added to the residual stream "b n w"."""

    def __init__(self, config: ConfiguredOptions, normalised: bool, mlp_width: int):
        super().__init__()
        self.dropout = config.dropout
        self.attention = Attention(config, normalised)
        self.mlp = SwiGLU(config, mlp_width)

    def forward(self, x: Tensor, rotary: Tensor, visible: Tensor | None) -> Tensor:
        branch = self.attention(rms_norm(x), rotary, visible)
        x = x + F.dropout(branch, self.dropout, self.training)
        branch = self.mlp(rms_norm(x))
        return x + F.dropout(branch, self.dropout, self.training)


def gated_width(width: int) -> int:
    """Channels of the gated branch where nothing else is asked for: 8/3 of the stream's, rounded to 32."""
    return max(32, 32 * round(width * 8 / 3 / 32))


def _attend(queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None) -> Tensor:
    slow = queries.device.type == "cpu" and queries.dtype == torch.bfloat16
    if not (slow and keys.shape[2] <= _LONGEST_BY_HAND):
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible, is_causal=visible is None)
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
    # Added, as masked_fill costs a copy more in either direction.
    hidden = scores.new_full(scores.shape[-2:], -math.inf)
    scores = scores + (hidden.triu(1) if visible is None else torch.zeros_like(hidden).where(visible, hidden))
    return scores.softmax(-1) @ values


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + 1e-6) over the last axis."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def grid_positions(grid: tuple[int, ...], like: Tensor) -> Tensor:
    """Coordinates "n+1 axes" of the start token, (-1, .., -1), and of the positions in raster order."""
    options = {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
    axes = torch.meshgrid(*(torch.arange(size, **options) for size in grid), indexing="ij")
    positions = torch.stack([axis.flatten() for axis in axes], 1)
    return torch.cat((positions.new_full((1, len(grid)), -1), positions))


def rotations(positions: Tensor, lengths: Sequence[int], head_width: int) -> Tensor:
    """Unit complex numbers "n pairs" for coordinates "n axes" of a grid whose axes are so long."""
    pairs, angles = head_width // 2, []
    for i, size in enumerate(lengths):
        num = pairs // len(lengths) + (i < pairs % len(lengths))
        speeds = max(100, size) ** (-torch.arange(num, device=positions.device, dtype=positions.dtype) / num)
        angles.append(positions[:, i, None] * speeds)
    angle = torch.cat(angles, -1)
    return torch.polar(torch.ones_like(angle), angle)


def rotary_pairs(queries: Tensor, keys: Tensor) -> Tensor:
    """Complex rotations "*b n 2 1 pairs" of the queries' and keys' rotations "*b n pairs"."""
    return torch.stack((queries, keys), -2)[..., None, :]


def normalise_and_rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """LayerNorm each head of "b n s h d" in float32 or better, then rotate it as `rotated`."""
    return rotated(F.layer_norm(widen(x), x.shape[-1:], eps=1e-6), rotary).to(x.dtype)


def rotated(x: Tensor, rotary: Tensor) -> Tensor:
    """The pairs (x_2j, x_2j+1) of each head of "b n s h d", rotated by `rotary`.

    In float32 or better. As one complex product the rotation is faster than as sums and products of halves.
    """
    pairs = torch.view_as_complex(widen(x).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotary).flatten(-2).to(x.dtype)


def widen(logits: Tensor) -> Tensor:
    """At least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
