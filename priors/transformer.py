"""A decoder-only transformer over code grids.

    x_1 = start(label) + target_1,      x_i = code(z_{i-1}) + target_i,      i = 1 .. N
    x  <- x + Attention(RMSNorm(x));    x  <- x + SwiGLU(RMSNorm(x))         `depth` times
    ln P(z_i | before, label) = log-softmax(Linear(RMSNorm(x_i)))

- Causal self-attention: Vaswani et al. 2017, "Attention is all you need".
- RMSNorm before each branch, x / sqrt(mean(x^2) + 1e-6): Zhang & Sennrich 2019. Without their
  learned scale, which the linear map behind every norm here can hold, and which takes a tenth of a
  training step.
- Each head's queries and keys go through a LayerNorm without parameters, (x - mean) / sqrt(var + 1e-6),
  before they are turned: Dehghani et al. 2023, "Scaling vision transformers to 22 billion parameters".
  On 7 x 7 grids it saves 2 % of the rate after 300 steps; an RMSNorm there saves as much and takes
  five times as long on a CPU.
- SwiGLU, W_3 (silu(W_1 x) * W_2 x), 8/3 width rounded to 32: Shazeer 2020.
- Rotary positions, pairs (a, b) of a head turned by an angle: Su et al. 2021, "RoFormer". The
  pairs are dealt out to the grid's axes (half to rows, half to columns in two dimensions), and
  pair j of the n of an axis turns by coordinate * base^(-j/n). Two departures: the base is
  max(100, length of the axis), since axes are tens of places long and not thousands; and a query is
  turned by the place that it predicts, a key by the place whose code it holds, so that "the code
  above" is the same rotation everywhere, also where a row begins. The start token's key stands at
  (-1, .., -1).
- `target_i`, a learned vector of the place to predict, is our addition: grids are small and fixed.
- The start token is the class's embedding, or a learned "no label" one, which in training also
  replaces a share `label_dropout` of the labels, for guidance (Ho & Salimans 2022).
- Weights start at N(0, 0.02), those that write into the residual stream at 0.02 / sqrt(2 depth)
  (Radford et al. 2019, GPT-2). No biases.

Log-softmax is in float32 or better under any autocast.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from priors.base import Prior, Step, check_grid, check_size

# Up to this length bf16 attention on a CPU trains 2 to 8 times faster by hand than through
# scaled_dot_product_attention, whose backward pass is slow there. In float32 there is no such gap.
_LONGEST_BY_HAND = 256


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
        for name in ("num_codes", "width", "depth", "num_heads"):
            check_size(getattr(self, name), name)
        if self.num_classes is not None:
            check_size(self.num_classes, "num_classes")
        object.__setattr__(self, "grid", check_grid(self.grid))
        if self.width % (2 * self.num_heads):
            raise ValueError(
                f"got width={self.width} with num_heads={self.num_heads}, "
                f"expected a multiple of {2 * self.num_heads}, as rotary positions need even heads"
            )
        if self.width // self.num_heads < 2 * len(self.grid):
            raise ValueError(
                f"got heads of {self.width // self.num_heads} channels for a grid of "
                f"{len(self.grid)} axes, expected {2 * len(self.grid)} or more"
            )
        for name in ("dropout", "label_dropout"):
            share = getattr(self, name)
            if not isinstance(share, int | float) or not 0 <= share < 1:
                raise ValueError(f"got {name}={share!r}, expected a number in [0, 1)")


class TransformerPrior(Prior):
    """An autoregressive transformer over a code grid.

    >>> prior = TransformerPrior(TransformerPriorConfig(num_codes=512, grid=(7, 7), num_classes=10))
    >>> prior.log_prob(torch.zeros(3, 7, 7, dtype=torch.int64)).shape
    torch.Size([3])
    """

    def __init__(self, config: TransformerPriorConfig):
        super().__init__(num_codes=config.num_codes, grid=config.grid, num_classes=config.num_classes)
        self.config = config
        width = config.width
        self.code = nn.Embedding(config.num_codes, width)
        self.start = nn.Embedding((config.num_classes or 0) + 1, width)  # the last is "no label"
        self.target = nn.Parameter(torch.empty(self.num_places, width))
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.logits = nn.Linear(width, config.num_codes, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        for name, weight in self.named_parameters():
            writes = name.endswith(("attention.out.weight", "mlp.out.weight"))
            nn.init.normal_(weight, std=0.02 / math.sqrt(2 * self.config.depth) if writes else 0.02)

    def _log_prob(self, codes: Tensor, labels: Tensor | None) -> Tensor:
        if labels is not None and self.training and self.config.label_dropout > 0:
            dropped = torch.rand(labels.shape, device=labels.device) < self.config.label_dropout
            labels = labels.masked_fill(dropped, self._no_label)
        start = self._start_tokens(len(codes), labels)
        x = torch.cat((start[:, None], self.code(codes[:, :-1])), 1) + self.target
        turns = _rotations(self.grid, self.config.width // self.config.num_heads, x)
        logits = self._trunk(x, turns, [None] * len(self.blocks))
        nats = F.cross_entropy(_widen(logits).flatten(0, 1), codes.flatten(), reduction="none")
        return -nats.view_as(codes).sum(1)

    def _start_walk(self, num: int, labels: Tensor | None, guidance: float | None) -> Step:
        start = self._start_tokens(num, labels)
        if guidance is not None:
            start = torch.cat((start, self._start_tokens(num, None)))
        turns = _rotations(self.grid, self.config.width // self.config.num_heads, start)
        caches = [_Cache(self.num_places) for _ in self.blocks]
        done = 0

        def step(fixed: Tensor) -> Tensor:
            nonlocal done
            x = self.code(fixed)
            if guidance is not None:
                x = x.repeat(2, 1, 1)
            if done == 0:
                x = torch.cat((start[:, None], x), 1)
            here = slice(done, done + x.shape[1])
            done = here.stop
            logits = _widen(self._trunk(x + self.target[here], turns[here], caches)[:, -1])
            if guidance is not None:
                guided, free = logits.log_softmax(-1).chunk(2)
                logits = free + guidance * (guided - free)
            return logits.log_softmax(-1)

        return step

    @property
    def _no_label(self) -> int:
        return self.start.num_embeddings - 1

    def _start_tokens(self, num: int, labels: Tensor | None) -> Tensor:
        if labels is None:
            labels = torch.full((num,), self._no_label, device=self.device)
        return self.start(labels)

    def _trunk(self, x: Tensor, turns: Tensor, caches: Sequence["_Cache | None"]) -> Tensor:
        x = F.dropout(x, self.config.dropout, self.training)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, turns, cache)
        return self.logits(_rms_norm(x))

    def _config_fields(self) -> dict[str, Any]:
        return {**asdict(self.config), "grid": list(self.grid)}

    @classmethod
    def _from_config_fields(cls, fields: dict[str, Any]) -> "TransformerPrior":
        return cls(TransformerPriorConfig(**fields))


class _Cache:
    """Keys and values of the places done, of one layer; one tensor a layer, never a stack."""

    def __init__(self, num_places: int):
        self.num_places = num_places
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store "b h n d" after what is there, and return all so far."""
        if self.keys is None or self.values is None:
            b, h, _, d = keys.shape
            self.keys = keys.new_empty(b, h, self.num_places, d)
            self.values = values.new_empty(b, h, self.num_places, d)
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class _Attention(nn.Module):
    def __init__(self, config: TransformerPriorConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, turns: Tensor, cache: _Cache | None) -> Tensor:
        qkv = rearrange(self.qkv(x), "b n (s h d) -> b n s h d", s=3, h=self.num_heads)
        queries, keys = rearrange(_normalise_and_turn(qkv[:, :, :2], turns), "b n s h d -> s b h n d")
        values = rearrange(qkv[:, :, 2], "b n h d -> b h n d")
        if cache is not None:
            keys, values = cache.append(keys, values)
        # A step's single query sees all that the cache holds; several come only into an empty one.
        causal = queries.shape[2] > 1
        assert not causal or queries.shape[2] == keys.shape[2]
        mixed = _attend(queries, keys, values, causal)
        return self.out(rearrange(mixed, "b h n d -> b n (h d)"))


class _SwiGLU(nn.Module):
    def __init__(self, config: TransformerPriorConfig):
        super().__init__()
        hidden = max(32, 32 * round(config.width * 8 / 3 / 32))
        self.gate_and_value = nn.Linear(config.width, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.gate_and_value(x).chunk(2, -1)
        return self.out(F.silu(gate) * value)


class _Block(nn.Module):
    def __init__(self, config: TransformerPriorConfig):
        super().__init__()
        self.dropout = config.dropout
        self.attention = _Attention(config)
        self.mlp = _SwiGLU(config)

    def forward(self, x: Tensor, turns: Tensor, cache: _Cache | None) -> Tensor:
        branch = self.attention(_rms_norm(x), turns, cache)
        x = x + F.dropout(branch, self.dropout, self.training)
        branch = self.mlp(_rms_norm(x))
        return x + F.dropout(branch, self.dropout, self.training)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, causal: bool) -> Tensor:
    slow = queries.device.type == "cpu" and queries.dtype == torch.bfloat16
    # A step's single query makes no large table, however many keys it meets.
    by_hand = slow and (queries.shape[2] == 1 or keys.shape[2] <= _LONGEST_BY_HAND)
    if not by_hand:
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=causal)
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
    if causal:
        # Added, as masked_fill costs a copy more in either direction.
        scores = scores + scores.new_full(scores.shape[-2:], -math.inf).triu(1)
    return scores.softmax(-1) @ values


def _rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def _rotations(grid: tuple[int, ...], head_width: int, like: Tensor) -> Tensor:
    """Unit complex numbers "n (query key) 1 pairs" that turn a query or key at each place."""
    options = {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
    axes = torch.meshgrid(*(torch.arange(size, **options) for size in grid), indexing="ij")
    places = torch.stack([axis.flatten() for axis in axes], 1)
    before = torch.cat((places.new_full((1, len(grid)), -1), places[:-1]))
    pairs, angles = head_width // 2, []
    for i, size in enumerate(grid):
        num = pairs // len(grid) + (i < pairs % len(grid))
        turn = max(100, size) ** (-torch.arange(num, **options) / num)
        angles.append(torch.stack((places[:, i], before[:, i]), 1)[..., None] * turn)
    angle = torch.cat(angles, -1)[:, :, None]
    return torch.polar(torch.ones_like(angle), angle)


def _normalise_and_turn(x: Tensor, turns: Tensor) -> Tensor:
    """LayerNorm each head of "b n s h d", then rotate its pairs (x_2j, x_2j+1) by `turns`.

    In float32 or better. As one complex product the rotation takes a third of the time that sums and
    products of halves take.
    """
    x, dtype = F.layer_norm(_widen(x), x.shape[-1:], eps=1e-6), x.dtype
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(dtype)


def _widen(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
