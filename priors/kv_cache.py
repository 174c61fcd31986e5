"""A trunk step by step: what a walk computes at each position, with the keys and values of those before it kept.

The result is that of `Trunk.forward` over all positions at once, to rounding. Linear maps are in the type of the walk
(`priors.precision`); what is added up over the depth and the norms are in float32 or better, and so is attention unless
many rows are sampled in bfloat16. Attention of one query is two batched products of vectors with the cache, by hand,
which on a CPU is faster than scaled_dot_product_attention; keys are kept transposed for it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from priors.compiled_step import Compiled, Graph, Layer, step_to_compile
from priors.packed_linear import plain, prepare
from priors.precision import Arithmetic
from priors.trunk import GridTrunk, SequenceTrunk, Trunk, gated_width

# Takes the vectors at the positions fixed since the last call, "b n w", and gives the features of the
# next position, "b w".
Advance = Callable[[Tensor], Tensor]


# Elements of a layer's keys from which on they are kept in bfloat16, and multiplied whole.
_LARGE = 2**19


class CachedTrunk:
    """One walk through a trunk over `rows` rows. Caches and scratch memory are allocated once, for all steps.

    Attributes: `length`, positions that are in the cache.
    """

    def __init__(self, trunk: Trunk, rows: int, num_positions: int, arithmetic: Arithmetic):
        self.length, self.rows, self.num_positions = 0, rows, num_positions
        self.num_heads, self.head_width, self.width = trunk.num_heads, trunk.head_width, trunk.width
        self.mlp_width, self.normalised = trunk.mlp_width, trunk.normalised
        self.dtype, self.wide = arithmetic.dtype, torch.promote_types(arithmetic.dtype, torch.float32)
        self.device = trunk.blocks[0].attention.out.weight.device
        self.eps = torch.full((), 1e-6, dtype=self.wide, device=self.device)
        # What scores are divided by goes into the queries' rotary.
        self.turn_scale = self.eps.new_tensor([self.head_width**-0.5, 1.0])[:, None, None]
        static = arithmetic.compiled or self.device.type == "cuda"
        # Products of bfloat16 vectors pay for whole caches that are large, though what lies ahead is multiplied too:
        # of a part oneDNN makes a copy first.
        large = rows * num_positions * trunk.width >= _LARGE
        self.whole = not static and self.device.type == "cpu" and self.dtype == torch.bfloat16 and large
        self.cached = self.dtype if static or self.whole else self.wide
        options = {"dtype": self.cached, "device": self.device}
        self.layers = []
        for block in trunk.blocks:
            rest = (block.attention.out, block.mlp.gate_and_value, block.mlp.out)
            centred = self._centred if self.normalised else None
            packed = not static
            qkv = prepare(block.attention.qkv.weight, arithmetic, rows, centred, packed=packed)
            # Zeros, as what lies ahead is hidden from a static step but must be numbers.
            values = torch.zeros(rows, self.num_heads, num_positions, self.head_width, **options)
            shape = values.shape if static else values.mT.shape
            keys = torch.zeros(shape, **options)
            keys = keys.mT if static else keys
            maps = (prepare(linear.weight, arithmetic, rows, packed=packed) for linear in rest)
            self.layers.append((keys, values, qkv, *maps))
        self._scratch: dict[int, _Scratch] = {}
        # Steps of one input are compiled where that was asked for, and launched at once on a GPU.
        self.one: Callable[..., Tensor] | None = None
        if static:
            self._make_static(trunk, arithmetic)

    def _make_static(self, trunk: Trunk, arithmetic: Arithmetic) -> None:
        step = Compiled() if arithmetic.compiled else step_to_compile
        self.one = Graph(step) if self.device.type == "cuda" else step
        self.position = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.cos = self.eps.new_empty(self.rows, 2, 1, self.head_width // 2)
        self.sin = torch.empty_like(self.cos)
        self.ahead = self.eps.new_full((self.num_positions, self.num_positions), -torch.inf).triu(1)
        self.static_layers = []
        for (keys, values, *_), block in zip(self.layers, trunk.blocks, strict=True):
            maps = (block.attention.qkv, block.attention.out, block.mlp.gate_and_value, block.mlp.out)
            self.static_layers.append(Layer(keys.mT, values, *(plain(linear.weight, arithmetic) for linear in maps)))

    def reset(self) -> None:
        """Begin anew, with the same memory."""
        self.length = 0

    @torch.no_grad()
    def __call__(self, x: Tensor, rotary: Tensor, visible: Tensor | None = None, num_kept: int | None = None) -> Tensor:
        """Features "b m w", in the type of the walk, of the next m inputs "b m w".

        Args:
            rotary: as `Trunk` takes them, of these inputs: "m 2 1 pairs" or "b m 2 1 pairs".
            visible: bool "m m", which of these inputs each of them sees beside all that came before; None is those up
                to itself.
            num_kept: only so many of them, the first, are seen by inputs to come; None is all.
        """
        b, m, width = x.shape
        if b == 0:
            return x.to(self.dtype)
        if m not in self._scratch:
            # One input a step is what most walks do; of other sizes the last is kept, as there may be many.
            self._scratch = {size: kept for size, kept in self._scratch.items() if size == 1}
            self._scratch[m] = _Scratch(self, m)
        s = self._scratch[m]
        s.x.copy_(x.reshape(b * m, width))
        begin = self.length
        self.length += m if num_kept is None else num_kept
        if self.one is not None and m == 1:
            self.position.fill_(begin)
            # One program for rotary of all rows and of each row.
            angles = torch.view_as_real(rotary[0] if rotary.ndim == 4 else rotary[:, 0])
            self.cos.copy_(angles[..., 0])
            self.sin.copy_(angles[..., 1])
            memory = (self.cos, self.sin, self.position, self.ahead)
            features = self.one(s.x, *memory, self.static_layers, self.dtype, self.normalised)
            return features.to(self.dtype, copy=True)[:, None]
        hidden = None
        if m > 1:
            hidden = torch.ones(m, m, dtype=torch.bool, device=self.device).triu(1) if visible is None else ~visible
        self._layers(s, rotary * self.turn_scale, slice(begin, begin + m), hidden)
        return s.normed.view(b, m, width).clone()

    @torch.no_grad()
    def from_positions(self, x: Tensor, rotary: Tensor, begins: Sequence[int]) -> Tensor:
        """The same of inputs "b m w" that stand at positions begins[row], begins[row] + 1, ... of each row.

        What the cache held from there on is forgotten; before, every row has been filled. `rotary` is "b m 2 1 pairs".
        """
        b, m, width = x.shape
        s = self._scratch.setdefault(m, _Scratch(self, m)) if m not in self._scratch else self._scratch[m]
        s.x.copy_(x.reshape(b * m, width))
        first, self.length = begins[0], max(begins) + m
        if all(begin == first for begin in begins):
            hidden = torch.ones(m, m, dtype=torch.bool, device=self.device).triu(1) if m > 1 else None
            self._layers(s, rotary * self.turn_scale, slice(first, first + m), hidden)
        else:
            at = torch.tensor(begins, device=self.device)[:, None] + torch.arange(m, device=self.device)
            length = self.num_positions if self.whole else self.length
            rows = _Rows(
                at[:, None, None].expand(s.new_keys.shape),
                at[:, None, :, None].expand(s.new_values.shape),
                torch.arange(length, device=self.device) > at[:, None, :, None],
                self.length,
            )
            self._layers(s, rotary * self.turn_scale, rows, None)
        return s.normed.view(b, m, width).clone()

    def _layers(self, s: "_Scratch", rotary: Tensor, new: "slice | _Rows", hidden: Tensor | None) -> None:
        """From `s.x` to `s.normed`; `hidden` are the inputs "m m" that each of them does not see, where all rows stand
        at the same positions."""
        b, m, heads = self.rows, s.m, self.rows * self.num_heads
        end = new.stop
        # How much of the cache is multiplied.
        length = self.num_positions if self.whole else end
        scores = s.scores[: heads * m * length].view(heads, m, length)
        for keys, values, qkv_map, out_map, gate_and_value_map, mlp_out_map in self.layers:
            s.qkv.copy_(qkv_map(self._normed(s)))
            torch.mul(s.pairs, rotary, out=s.rotated)
            if self.normalised:
                # The rest of each head's LayerNorm.
                norm = torch.linalg.vector_norm(s.queries_and_keys, dim=-1, keepdim=True, out=s.head_norm)
                torch.addcmul(self.eps, norm, norm, value=1 / self.head_width, out=norm).rsqrt_()
                torch.mul(s.rotated_real, norm, out=s.rotated_real)
            if isinstance(new, slice):
                keys[..., new].copy_(s.new_keys)
                values[:, :, new].copy_(s.new_values)
            else:
                keys.scatter_(3, new.keys_at, s.new_keys.to(keys.dtype))
                values.scatter_(2, new.values_at, s.new_values.to(values.dtype))
            if s.queries is not s.wide_queries:
                s.queries.copy_(s.wide_queries)
            seen_keys = keys.flatten(0, 1)[..., :length]
            seen_values = values.flatten(0, 1)[:, :length]
            torch.bmm(s.queries, seen_keys.to(scores.dtype), out=scores)
            if not isinstance(new, slice):
                scores.view(b, self.num_heads, m, length).masked_fill_(new.behind, -torch.inf)
            elif hidden is not None:
                scores[..., end - m : end].masked_fill_(hidden, -torch.inf)
            if length > end and isinstance(new, slice):
                scores[..., end:] = -torch.inf
            torch.softmax(scores, -1, out=scores)
            torch.bmm(scores, seen_values.to(scores.dtype), out=s.mixed)
            s.input.copy_(s.mixed_rows)
            s.x.add_(out_map(s.input.view(b * m, self.width)))
            gate, value = gate_and_value_map(self._normed(s)).split(self.mlp_width, -1)
            s.x.add_(mlp_out_map(F.silu(gate).mul_(value)))
        self._normed(s)

    def _centred(self, weight: Tensor) -> Tensor:
        """The map to queries, keys and values, with each head's mean taken from its queries and keys."""
        split = weight.unflatten(0, (3, self.num_heads, self.head_width))
        centred = split[:2] - split[:2].mean(2, keepdim=True)
        return torch.cat((centred, split[2:])).flatten(0, 2)

    def _normed(self, s: "_Scratch") -> Tensor:
        """RMSNorm in few calls: on a CPU torch's own takes longer."""
        norm = torch.linalg.vector_norm(s.x, dim=-1, keepdim=True, out=s.norm)
        torch.addcmul(self.eps, norm, norm, value=1 / self.width, out=norm).rsqrt_()
        return torch.mul(s.x, norm, out=s.normed)


class _Rows(NamedTuple):
    """New inputs at other positions in each row: where their keys "b h d m" and values "b h m d" go, which of the cache
    stand behind each, "b 1 m n", and the end of the furthest."""

    keys_at: Tensor
    values_at: Tensor
    behind: Tensor
    stop: int


class _Scratch:
    """Memory of a step over m inputs, and the views of it that each layer takes."""

    def __init__(self, cached: CachedTrunk, m: int):
        b, h, d = cached.rows, cached.num_heads, cached.head_width
        wide = {"dtype": cached.wide, "device": cached.device}
        own = {"dtype": cached.dtype, "device": cached.device}
        self.m = m
        self.x = torch.empty(b * m, h * d, **wide)
        self.norm = torch.empty(b * m, 1, **wide)
        self.normed = torch.empty(b * m, h * d, **own)
        self.qkv = torch.empty(b * m, 3 * h * d, **wide)
        split = self.qkv.view(b, m, 3, h, d)
        self.queries_and_keys = split[:, :, :2]
        self.pairs = torch.view_as_complex(self.queries_and_keys.unflatten(-1, (d // 2, 2)))
        self.head_norm = torch.empty(b, m, 2, h, 1, **wide)
        rotated = torch.empty(2, b, h, m, d, **wide)
        # Written in the order of the products, read in the order of attention.
        self.rotated_real = rotated.permute(1, 3, 0, 2, 4)
        self.rotated = torch.view_as_complex(self.rotated_real.unflatten(-1, (d // 2, 2)))
        self.new_keys = rotated[1].transpose(-1, -2)
        self.new_values = split[:, :, 2].transpose(1, 2)
        self.wide_queries = rotated[0].view(b * h, m, d)
        narrow = {"dtype": cached.dtype if cached.whole else cached.wide, "device": cached.device}
        self.queries = torch.empty_like(self.wide_queries, **narrow) if cached.whole else self.wide_queries
        self.scores = torch.empty(b * h * m * cached.num_positions, **narrow)
        self.mixed = torch.empty(b * h, m, d, **narrow)
        self.mixed_rows = self.mixed.view(b, h, m, d).transpose(1, 2)
        self.input = torch.empty(b, m, h, d, **own)


def cache_bytes(trunk: Trunk, num_positions: int, arithmetic: Arithmetic, num_inputs: int = 1) -> int:
    """Bytes of a row: keys and values, and what a step over so many inputs needs, at most."""
    wide = torch.promote_types(arithmetic.dtype, torch.float32).itemsize
    kept = 2 * trunk.depth * num_positions * trunk.width
    # Queries, keys and values twice, the stream, its norm and the gated branch; and the scores.
    wider = max(0, trunk.mlp_width - gated_width(trunk.width))
    step = num_inputs * (16 * trunk.width + 3 * wider + trunk.num_heads * num_positions)
    return wide * (kept + step)


def raster_walk(trunk: GridTrunk | SequenceTrunk, start: Tensor, arithmetic: Arithmetic, skipped: int = 0) -> Advance:
    """The trunk position by position in raster order, after the start tokens "b w"; `skipped` as in `WalkStart`."""
    cached = CachedTrunk(trunk.trunk, len(start), trunk.num_positions, arithmetic)
    cached.length = skipped
    rotary = trunk.rotary(start)

    def advance(vectors: Tensor) -> Tensor:
        x = vectors if cached.length else torch.cat((start[:, None], vectors), 1)
        here = slice(cached.length, cached.length + x.shape[1])
        return cached(trunk.inputs(x, here), rotary[here])[:, -1]

    return advance
