"""Bits-back coding of codes that are drawn (Townsend, Bird & Barber 2019, "Practical lossless compression with latent
variables using bits back coding"; Hinton & van Camp 1993).

A stack of bits holds what was coded so far. To add the units of a group,

    pop codes z under P_enc(z | y):      bits of the stack choose them; it gets shorter by -log2 P_enc(z | y)
    push pixels under P_dec(y | z)       it grows by -log2 P_dec(y | z)
    push codes under P_pri(z)            and by -log2 P_pri(z)

A decoder pops codes, pops pixels, and pushes the codes under the posterior of the pixels, which gives back the bits
that chose them. So a unit costs rate + distortion - entropy on average, the negative ELBO of `vqvae.elbo`.

The first group needs bits to begin with. They are those of SHAKE-128 of nothing, which everybody has; but what is
popped of them comes back as something that must be kept, so they do count: the file is longer by `initial_bits`. Words
of them that are never reached stay out of the file. Groups are small so that these bits are few. How many were not
reached is in the file, and the exact bottom of the stack that a decoder has: popping goes down to there and no further.

The posterior of a model with a prior in its loop looks at the codes before: its tables come from the prior's walk, as
in `vqvae.quantizers.prior_in_loop`.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from vqvae.codec import tables
from vqvae.codec.body import STORED
from vqvae.codec.coder import BadStream, Stack
from vqvae.codec.container import read_varint, varint
from vqvae.codec.tables import NUM_OFFSETS, Intervals
from vqvae.codec.unit_coder import UnitCoder

_UNITS_PER_GROUP = 8
# Bits that a group's units may leave beyond those that they took. Drawn codes leave more with a probability of 2^-64 at
# most: codes with P_enc(z | y) <= 2^-64 P_pri(z) P_dec(y | z) have no more of P_enc together.
_MOST_GAINED = 64


class BitsBack:
    """Bits-back coding with the models of a `UnitCoder`.

    Raises:
        ValueError: a model without a posterior over codes.
    """

    def __init__(self, coder: UnitCoder):
        self.coder = coder
        coder.model.check_has_posterior()
        places = int(np.prod(coder.model.grid))
        # No symbol takes more than 24 bits.
        self._num_initial = 4 + _UNITS_PER_GROUP * places * tables.PRECISION // 32
        self._initial = _random_words(self._num_initial)

    @torch.no_grad()
    def encode(
        self, units: UInt8[Tensor, "u c s s"], labels: Int[Tensor, " u"] | None, at_the_top: Intervals | None
    ) -> tuple[bytes, list[int]]:
        """A stream, and the kind of each unit. What is `at_the_top` is pushed last, and so popped first."""
        stack = Stack(self._initial)
        reached = stack.depth
        kinds = torch.zeros(len(units), dtype=torch.int64)
        limits = torch.full((len(units),), 8.0 * self.coder.model.num_dims, dtype=torch.float64)
        for group in torch.arange(len(units)).split(_UNITS_PER_GROUP):
            while len(group):
                trial = stack.clone()
                mine = None if labels is None else labels[group]
                codes, lowest = self._draw(trial, units[group], mine, kinds[group])
                plan = self.coder.plan(units[group], codes, mine, kinds[group])
                posterior, clear = self._posterior(plan.units, codes, mine, kinds[group])
                bits = plan.rate() + plan.distortion() - posterior.bits().sum(1)
                unclear = ~(plan.clear & clear).cpu()
                kinds[group] += unclear
                hopeless = (kinds[group] == NUM_OFFSETS) | (bits.cpu() >= limits[group])
                kinds[group] = kinds[group].masked_fill(hopeless, STORED)
                if not unclear.any() and not (kinds[group] == STORED).any():
                    trial.push(self.coder.in_order(plan))
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
    ) -> tuple[UInt8[Tensor, "u c s s"], Int[Tensor, "u *grid"]]:
        """Units that are not stored, and their codes; labels are those of all units.

        Raises:
            ValueError: a stream that is none of this model's.
        """
        kinds_of = torch.tensor(kinds)
        groups = [group[kinds_of[group] != STORED] for group in torch.arange(len(kinds)).split(_UNITS_PER_GROUP)]
        units, codes = ([part] for part in self.coder.no_units())
        for group in reversed([group for group in groups if len(group)]):
            offsets = kinds_of[group].to(self.coder.device)
            mine = None if labels is None else labels[group]
            sources, before = [(stack, len(group))], stack.num_bits
            codes.append(self.coder.decode_codes(sources, _known(self.coder, mine), offsets))
            units.append(self.coder.decode_units(sources, codes[-1], offsets))
            posterior, _ = self._posterior(units[-1], codes[-1], mine, offsets)
            stack.push(_place_by_place(posterior))
            if stack.num_bits > before + _MOST_GAINED:
                raise BadStream("the stream gives back more bits for its images than it has for them")
        if not np.array_equal(stack.words(), self._initial):
            raise BadStream("the bits that chose the codes did not come back")
        return torch.cat(units[::-1]), torch.cat(codes[::-1])

    def initial_bits(self, stream: bytes) -> int:
        """How many of a stream's bits are there only because the first group needed some."""
        if not stream:
            return 0
        reached, _ = read_varint(stream)
        return 32 * (self._num_initial - reached)

    def _draw(
        self, stack: Stack, units: Tensor, labels: Tensor | None, offsets: Tensor
    ) -> tuple[Int[Tensor, "u *grid"], int]:
        """Codes that the stack's bits choose, and its least depth in words meanwhile."""
        coder = self.coder
        scores, weighs_prior = coder.model.posterior_scores(units.to(coder.device))
        scores, offsets = scores.flatten(1, -2), offsets.to(coder.device)
        place, lowest = 0, stack.depth

        def choose(log_probs: Tensor) -> Tensor:
            nonlocal place, lowest
            here = scores[:, place] + log_probs if weighs_prior else scores[:, place]
            widths = tables.CodeTables(here.log_softmax(-1), offsets).widths()
            chosen = torch.from_numpy(stack.get(widths)).long()
            # A code that is only company (`CodeTables`) has odds of 2^-24; its unit then does not verify.
            chosen = chosen.clamp_max(coder.num_codes - 1).to(coder.device)
            place, lowest = place + 1, min(lowest, stack.depth)
            return chosen

        if weighs_prior:
            return coder.prior.walk(len(units), choose, _known(coder, labels)), lowest
        nothing = scores[:, 0]
        codes = torch.stack([choose(nothing) for _ in range(scores.shape[1])], 1)
        return codes.view(len(units), *coder.model.grid), lowest

    def _posterior(
        self, units: Tensor, codes: Tensor, labels: Tensor | None, offsets: Tensor
    ) -> tuple[Intervals, Tensor]:
        """Where codes lie under the posterior, "u n", and whether all of a unit's tables are clear."""
        coder = self.coder
        scores, weighs_prior = coder.model.posterior_scores(units.to(coder.device))
        if weighs_prior:
            scores = scores + coder.prior.log_conditionals(codes, _known(coder, labels))
        log_probs = scores.flatten(1, -2).log_softmax(-1)
        spread = offsets.to(coder.device)[:, None].expand(log_probs.shape[:2])
        found = tables.CodeTables(log_probs, spread)
        return found.intervals(codes.flatten(1)), found.clear.all(1)


def _known(coder: UnitCoder, labels: Tensor | None) -> Tensor | None:
    return None if labels is None or coder.num_classes is None else labels


def _place_by_place(intervals: Intervals) -> Intervals:
    return Intervals(*(part.T.flatten() for part in intervals))


def _random_words(num: int) -> Any:
    words = np.frombuffer(hashlib.shake_128(b"").digest(4 * num), "<u4").astype(np.uint32)
    words[-1] |= 1  # a stack's top word is not zero
    return words
