"""Bits-back coding of codes that are drawn (Townsend, Bird & Barber 2019, "Practical lossless compression with latent
variables using bits back coding"; Hinton & van Camp 1993).

A stack of bits holds what was coded so far. To add the tiles of a group,

    pop codes z under P_enc(z | y):      bits of the stack choose them; it gets shorter by -log2 P_enc(z | y)
    push pixels under P_dec(y | z)       it grows by -log2 P_dec(y | z)
    push codes under P_pri(z)            and by -log2 P_pri(z)

A decoder pops codes, pops pixels, and pushes the codes under the posterior of the pixels, which gives back the bits
that chose them. So a tile costs rate + distortion - entropy on average, the negative ELBO of `vqvae.bound`.

The first group needs bits to begin with. They are those of SHAKE-128 of nothing, which everybody has; but what is
popped of them comes back as something that must be kept, so they do count: the file is longer by `initial_bits`. Words
of them that are never reached stay out of the file. Groups are small so that these bits are few. How many were not
reached is in the file, and the exact bottom of the stack that a decoder has: popping goes down to there and no further.

The posterior of a model with a prior in its loop looks at the codes before: its conditionals come from the prior's
walk, as in `vqvae.quantizers.prior_in_loop`.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from vqvae.codec import integer_tables
from vqvae.codec.block import STORED
from vqvae.codec.coder import BadStream, Stack
from vqvae.codec.container import read_varint, varint
from vqvae.codec.integer_tables import NUM_OFFSETS, Intervals
from vqvae.codec.tile_coder import TileCoder

_TILES_PER_GROUP = 8
# Bits that a group's tiles may leave beyond those that they took. Drawn codes leave more with a probability of 2^-64 at
# most: codes with P_enc(z | y) <= 2^-64 P_pri(z) P_dec(y | z) have no more of P_enc together.
_MOST_GAINED = 64


class BitsBack:
    """Bits-back coding with the models of a `TileCoder`.

    Raises:
        ValueError: a model without a posterior over codes.
    """

    def __init__(self, coder: TileCoder):
        self.coder = coder
        coder.model.check_has_posterior()
        positions = int(np.prod(coder.model.grid))
        # No symbol takes more than 24 bits.
        self._num_initial = 4 + _TILES_PER_GROUP * positions * integer_tables.PRECISION // 32
        self._initial = _random_words(self._num_initial)

    @torch.no_grad()
    def encode(
        self, tiles: UInt8[Tensor, "t c h w"], labels: Int[Tensor, " t"] | None, at_the_top: Intervals | None
    ) -> tuple[bytes, list[int]]:
        """A stream, and the kind of each tile. What is `at_the_top` is pushed last, and so popped first."""
        stack = Stack(self._initial)
        reached = stack.depth
        kinds = torch.zeros(len(tiles), dtype=torch.int64)
        limits = torch.full((len(tiles),), 8.0 * self.coder.model.num_dims, dtype=torch.float64)
        for group in torch.arange(len(tiles)).split(_TILES_PER_GROUP):
            while len(group):
                trial = stack.clone()
                mine = None if labels is None else labels[group]
                codes, lowest = self._draw(trial, tiles[group], mine, kinds[group])
                intervals = self.coder.intervals(tiles[group], codes, mine, kinds[group])
                posterior, clear = self._posterior(intervals.tiles, codes, mine, kinds[group])
                bits = intervals.rate() + intervals.distortion() - posterior.bits().sum(1)
                unclear = ~(intervals.clear & clear).cpu()
                kinds[group] += unclear
                incompressible = (kinds[group] == NUM_OFFSETS) | (bits.cpu() >= limits[group])
                kinds[group] = kinds[group].masked_fill(incompressible, STORED)
                if not unclear.any() and not (kinds[group] == STORED).any():
                    trial.push(self.coder.in_order(intervals))
                    stack, reached = trial, min(reached, lowest)
                    break
                group = group[kinds[group] != STORED]
        if at_the_top is not None:
            stack.push(at_the_top)
        elif (kinds == STORED).all():
            return b"", kinds.tolist()
        return varint(reached) + stack.words()[reached:].astype("<u4").tobytes(), kinds.tolist()

    @torch.no_grad()
    def open(self, stream: bytes) -> Stack:
        """A stream as a stack.

        Raises:
            ValueError: a stream that is none of this model's.
        """
        if not stream:
            return Stack(self._initial, bottom=Stack(self._initial).depth)
        reached, start = read_varint(stream)
        if reached > self._num_initial or (len(stream) - start) % 4:
            raise BadStream(
                f"the stream has {len(stream) - start} bytes above {reached} initial words, expected a multiple of 4 "
                f"above at most {self._num_initial}"
            )
        words = np.frombuffer(stream, "<u4", offset=start).astype(np.uint32)
        words = np.concatenate((self._initial[:reached], words))
        if len(words) and words[-1] == 0:
            raise BadStream("the stream ends in a word of zeros, which no stack does")
        return Stack(words, bottom=reached)

    @torch.no_grad()
    def decode(
        self, stack: Stack, kinds: Sequence[int], labels: Int[Tensor, " n"] | None
    ) -> tuple[UInt8[Tensor, "t c h w"], Int[Tensor, "t *grid"]]:
        """Tiles that are not stored, and their codes; labels are those of all tiles.

        Raises:
            ValueError: a stream that is none of this model's.
        """
        kinds_of = torch.tensor(kinds)
        groups = [group[kinds_of[group] != STORED] for group in torch.arange(len(kinds)).split(_TILES_PER_GROUP)]
        tiles, codes = ([part] for part in self.coder.no_tiles())
        for group in reversed([group for group in groups if len(group)]):
            offsets = kinds_of[group].to(self.coder.device)
            mine = None if labels is None else labels[group]
            sources, before = [(stack, len(group))], stack.num_bits
            codes.append(self.coder.decode_codes(sources, self.coder.known(mine), offsets))
            tiles.append(self.coder.decode_tiles(sources, codes[-1], offsets))
            posterior, _ = self._posterior(tiles[-1], codes[-1], mine, offsets)
            stack.push(posterior.position_by_position())
            if stack.num_bits > before + _MOST_GAINED:
                raise BadStream("the stream gives back more bits for its images than it has for them")
        if not np.array_equal(stack.words(), self._initial):
            raise BadStream("the bits that chose the codes did not come back")
        return torch.cat(tiles[::-1]), torch.cat(codes[::-1])

    def initial_bits(self, stream: bytes) -> int:
        """How many of a stream's bits are there only because the first group needed some."""
        if not stream:
            return 0
        reached, _ = read_varint(stream)
        return 32 * (self._num_initial - reached)

    def _draw(
        self, stack: Stack, tiles: Tensor, labels: Tensor | None, offsets: Tensor
    ) -> tuple[Int[Tensor, "t *grid"], int]:
        """Codes that the stack's bits choose, and its least depth in words meanwhile."""
        coder = self.coder
        scores, weighs_prior = coder.model.posterior_scores(tiles.to(coder.device))
        scores, offsets = scores.flatten(1, -2), offsets.to(coder.device)
        positions, lowest = iter(scores.unbind(1)), stack.depth

        def choose(log_probs: Tensor) -> Tensor:
            nonlocal lowest
            here = next(positions) + log_probs if weighs_prior else next(positions)
            widths = integer_tables.CodeTables(here.log_softmax(-1), offsets).widths()
            chosen = torch.from_numpy(stack.get(widths)).long()
            # A code that is only padding (`CodeTables`) has odds of 2^-24; its tile then does not verify.
            chosen = chosen.clamp_max(coder.num_codes - 1).to(coder.device)
            lowest = min(lowest, stack.depth)
            return chosen

        if weighs_prior:
            return coder.prior.walk(len(tiles), choose, coder.known(labels)), lowest
        nothing = scores[:, 0]
        codes = torch.stack([choose(nothing) for _ in range(scores.shape[1])], 1)
        return codes.view(len(tiles), *coder.model.grid), lowest

    def _posterior(
        self, tiles: Tensor, codes: Tensor, labels: Tensor | None, offsets: Tensor
    ) -> tuple[Intervals, Tensor]:
        """Where codes lie under the posterior, "t n", and whether all of a tile's integer tables are clear."""
        coder = self.coder
        scores, weighs_prior = coder.model.posterior_scores(tiles.to(coder.device))
        if weighs_prior:
            scores = scores + coder.prior.log_conditionals(codes, coder.known(labels))
        log_probs = scores.flatten(1, -2).log_softmax(-1)
        spread = offsets.to(coder.device)[:, None].expand(log_probs.shape[:2])
        found = integer_tables.CodeTables(log_probs, spread)
        return found.intervals(codes.flatten(1)), found.clear.all(1)


def _random_words(num: int) -> Any:
    words = np.frombuffer(hashlib.shake_128(b"").digest(4 * num), "<u4").astype(np.uint32)
    words[-1] |= 1  # a stack's top word is not zero
    return words
