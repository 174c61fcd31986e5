"""Tiles to intervals and back: codes under the prior, then pixels under the decoder's likelihood.

An encoder knows all symbols, so it computes all integer tables at once, as in evaluation. A decoder walks: position by
position through the prior, then step by step through the likelihood, and asks the stream for each step's symbols. Its
integer tables are the encoder's (see `vqvae.codec.integer_tables`).

A stream begins with the labels of its images, at even odds, if it has any. Then come its tiles, a group at a time, each
in the order of the decoder:

    for each position of the grid:  the codes of all tiles
    for each step of the likelihood: of all tiles, the sixteens of its symbols; then their places in the sixteens

Labels come in parts of 2^20 // num_classes, at least 1. Each of those, and each group of tiles, is a part of the
stream, which begins only while the stream lasts (`vqvae.codec.coder`): so a block costs its reader no more time and
memory than its stream pays for and one group takes, whatever number of images it claims.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from safefolder.building import neutrally
from vqvae.autoencoder import Autoencoder
from vqvae.bound import PriorLike, check_fit, is_continuous
from vqvae.codec import integer_tables
from vqvae.codec.coder import BadStream, require_constriction
from vqvae.codec.integer_tables import Intervals
from vqvae.likelihoods.base import Symbols

# Numbers in the largest tensor of one chunk of work.
_CHUNK = 1 << 22
# Tiles of one group are coded together: enough to make work for the networks, few enough to hold.
_TILES_PER_GROUP = 128
_DIMS_PER_GROUP = 1 << 19
# Numbers in the integer tables of labels that are read together.
_LABEL_NUMBERS = 1 << 20


@runtime_checkable
class WalkingPrior(PriorLike, Protocol):
    """A prior over codes that can be walked through."""

    def log_conditionals(self, codes: Tensor, labels: Tensor | None, /) -> Tensor: ...

    def walk(self, num: int, chooser: Any, labels: Tensor | None, /) -> Tensor: ...


@runtime_checkable
class Source(Protocol):
    """Where a decoder's symbols come from: a stream, or a stack of bits."""

    def begin(self) -> None: ...

    def get(self, widths: Int[Tensor, "n k"], /) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True)
class TileIntervals:
    """How tiles would be coded, t of them with n codes and d symbols each, in the order of the stream.

    Attributes:
        tiles: "t c h w".
        codes: "t *grid".
        labels: "t", or None.
        code_intervals: "t n".
        high, low: the two steps of each symbol's level, "t d"; with d = 0 where codes alone are coded.
        clear: whether every number is far enough from the border between two grid points, "t".
    """

    tiles: UInt8[Tensor, "t c h w"]
    codes: Int[Tensor, "t *grid"]
    labels: Int[Tensor, " t"] | None
    code_intervals: Intervals
    high: Intervals
    low: Intervals
    clear: Bool[Tensor, " t"]

    def rate(self) -> Float[Tensor, " t"]:
        """Bits of the codes."""
        return self.code_intervals.bits().sum(1)

    def distortion(self) -> Float[Tensor, " t"]:
        """Bits of the pixels."""
        return (self.high.bits() + self.low.bits()).sum(1)

    def rows(self, kept: Tensor) -> "TileIntervals":
        """Some of the tiles."""
        return self._each(lambda mine: mine[kept])

    def with_rows(self, where: Tensor, other: "TileIntervals") -> "TileIntervals":
        """These with the tiles at the indices `where` as in another."""
        return self._each(lambda mine, theirs: mine.index_copy(0, where.to(mine.device), theirs), other)

    def _each(self, change: Callable[..., Tensor], *others: "TileIntervals") -> "TileIntervals":
        def of(name: str) -> Any:
            mine, *theirs = (getattr(each, name) for each in (self, *others))
            if mine is None:
                return None
            if isinstance(mine, Intervals):
                return Intervals(*(change(*parts) for parts in zip(mine, *theirs, strict=True)))
            return change(mine, *theirs)

        return TileIntervals(**{field.name: of(field.name) for field in dataclasses.fields(self)})


class TileCoder:
    """A model and a prior as a coder of tiles. Both are copied, in float64 and for evaluation.

    Raises:
        ValueError: a prior for other codes, a model whose latents are no codes, or one of more than 2^20 codes.
    """

    def __init__(self, model: Autoencoder, prior: WalkingPrior):
        if is_continuous(model):
            raise ValueError(
                f"the latents of {type(model).__name__} are real vectors, which have no code length; "
                "a codec needs a model with codes (VQVAE)"
            )
        check_fit(model, prior)
        require_constriction()
        self.device = next(model.parameters()).device
        if self.device.type == "mps":
            raise ValueError("the codec computes in float64, which MPS has not: move the model to the CPU")
        self.model: Any = copy.deepcopy(model).double().eval()
        self.prior: Any = copy.deepcopy(prior).double().to(self.device).eval()  # pyrefly: ignore[missing-attribute]
        self.size = model.size
        self.num_channels: int = model.config.num_channels
        num_codes: Any = self.model.num_codes
        self.num_codes: int = num_codes
        if num_codes > integer_tables.MAX_CODES:
            raise ValueError(
                f"got a model of {num_codes:,} codes, expected at most {integer_tables.MAX_CODES:,} for a codec"
            )
        self.likelihood = self.model.likelihood
        self.order = [step.to(self.device) for step in self.likelihood.order(*self.size)]
        self.group_size = max(1, min(_TILES_PER_GROUP, _DIMS_PER_GROUP // model.num_dims))

    @property
    def num_classes(self) -> int | None:
        return self.prior.num_classes

    def known(self, labels: Tensor | None) -> Tensor | None:
        """Labels as the prior takes them: not at all where it was made without classes."""
        return None if self.num_classes is None else labels

    @property
    def label_bits(self) -> float:
        """What a label costs at most."""
        num = self.num_classes or 1
        return float((integer_tables.PRECISION - integer_tables.even_widths(num)[:num].log2()).max())

    def no_tiles(self) -> tuple[UInt8[Tensor, "0 c h w"], Int[Tensor, "0 *grid"]]:
        """No tiles and no codes, for others to follow."""
        return (
            torch.zeros(0, self.num_channels, *self.size, dtype=torch.uint8, device=self.device),
            torch.zeros(0, *self.model.grid, dtype=torch.int64, device=self.device),
        )

    @torch.no_grad()
    def encode(self, tiles: UInt8[Tensor, "t c h w"], labels: Int[Tensor, " t"] | None) -> Int[Tensor, "t *grid"]:
        """The codes of tiles, weighing the prior where the model does."""
        return self.model.through(self.prior, self.known(labels)).encode(tiles.to(self.device))

    @torch.no_grad()
    def intervals(
        self,
        tiles: UInt8[Tensor, "t c h w"],
        codes: Int[Tensor, "t *grid"],
        labels: Int[Tensor, " t"] | None,
        offsets: Int[Tensor, " t"],
        *,
        pixels: bool = True,
    ) -> TileIntervals:
        """How tiles with these codes are coded on grids shifted by these offsets, with or without their pixels."""
        tiles, codes, offsets = (each.to(self.device) for each in (tiles, codes, offsets))
        code_intervals, clear = self.code_intervals(codes, labels, offsets)
        none = code_intervals.left[:, :0]
        high = low = Intervals(none, none)
        if pixels:
            high, low, levels_clear = self.level_intervals(tiles, codes, offsets)
            clear = clear & levels_clear
        return TileIntervals(
            tiles=tiles, codes=codes, labels=labels, code_intervals=code_intervals, high=high, low=low, clear=clear
        )

    def settle(
        self,
        tiles: UInt8[Tensor, "t c h w"],
        codes: Int[Tensor, "t *grid"],
        labels: Int[Tensor, " t"] | None,
        *,
        pixels: bool = True,
    ) -> tuple[TileIntervals, Int[Tensor, " t"]]:
        """`intervals` on the first grid on which each tile is clear, and its offset. Some may be clear on none."""
        offsets = torch.zeros(len(tiles), dtype=torch.int64)
        found = self.intervals(tiles, codes, labels, offsets, pixels=pixels)
        for offset in range(1, integer_tables.NUM_OFFSETS):
            unclear = (~found.clear).nonzero()[:, 0].cpu()
            if not len(unclear):
                break
            offsets[unclear] = offset
            some = found.rows(unclear)
            again = self.intervals(some.tiles, some.codes, some.labels, offsets[unclear], pixels=pixels)
            found = found.with_rows(unclear, again)
        return found, offsets

    def code_intervals(
        self, codes: Int[Tensor, "t *grid"], labels: Int[Tensor, " t"] | None, offsets: Int[Tensor, " t"]
    ) -> tuple[Intervals, Bool[Tensor, " t"]]:
        """Of codes under the prior, "t n", and whether all of a tile's integer tables are clear."""
        parts = []
        for rows in self._chunks(len(codes), self.num_codes * codes[0].numel() if len(codes) else 1):
            known = None if labels is None else self.known(labels[rows])
            log_probs = self.prior.log_conditionals(codes[rows], known).flatten(1, -2)
            found = integer_tables.CodeTables(log_probs, _spread(offsets[rows], log_probs.shape[1]))
            parts.append((*found.intervals(codes[rows].flatten(1)), found.clear.all(1)))
        left, width, clear = (torch.cat(column) for column in zip(*parts, strict=True))
        return Intervals(left, width), clear

    def level_intervals(
        self, tiles: UInt8[Tensor, "t c h w"], codes: Int[Tensor, "t *grid"], offsets: Int[Tensor, " t"]
    ) -> tuple[Intervals, Intervals, Bool[Tensor, " t"]]:
        """Of the pixels under the likelihood, both steps "t d", and whether all of a tile's are clear."""
        order = torch.cat(self.order)
        parts = []
        for rows in self._chunks(len(tiles), self.likelihood.num_features * math.prod(self.size)):
            features = self.model.decoder(self.model.vectors(codes[rows]))
            parameters = self.likelihood.symbol_parameters(tiles[rows], features).flatten(1, 3)[:, order]
            levels = tiles[rows].flatten(1)[:, order].long()
            found = integer_tables.level_intervals(
                self.likelihood.cdf,
                parameters.flatten(0, 1),
                levels.flatten(),
                _spread(offsets[rows], len(order)).flatten(),
            )
            parts.append([part.view(levels.shape) for part in (*found.high, *found.low, found.clear)])
        first, wide, left, width, clear = (torch.cat(column) for column in zip(*parts, strict=True))
        return Intervals(first, wide), Intervals(left, width), clear.all(1)

    def in_order(self, intervals: TileIntervals) -> Intervals:
        """The symbols of a group of tiles, in the order of its stream, "n"; with pixels if they have them."""
        parts = [intervals.code_intervals.position_by_position()]
        start = 0
        for step in self.order if intervals.high.left.shape[1] else []:
            here = slice(start, start + len(step))
            parts += [
                Intervals(*(part[:, here].flatten() for part in each)) for each in (intervals.high, intervals.low)
            ]
            start = here.stop
        return Intervals(*map(torch.cat, zip(*parts, strict=True)))

    def labels_as_intervals(self, labels: Int[Tensor, " b"]) -> Intervals:
        """Checked labels, at even odds."""
        widths = self._label_widths()
        return Intervals((widths.cumsum(0) - widths)[labels], widths[labels])

    @property
    def labels_per_part(self) -> int:
        """How many labels are read together."""
        return max(1, _LABEL_NUMBERS // len(self._label_widths()))

    @neutrally
    def checked_labels(self, labels: Any, num: int | None = None) -> Int[Tensor, " b"]:
        """Labels of so many images, or of any number: integers in a tensor, an array or a list; int64 on the CPU.

        Raises:
            ValueError: a prior without classes, labels that it does not know, or another number of them.
        """
        expected = f"expected integers of shape {'(b,)' if num is None else f'({num},)'}, one for each image"
        try:
            found = torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"got labels that are no numbers ({error}), {expected}") from error
        if not found.numel():
            found = found.long()
        is_whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
        if not is_whole or found.ndim != 1 or num not in (None, len(found)):
            raise ValueError(f"got labels of {found.dtype} {tuple(found.shape)}, {expected}")
        found, num_classes = found.cpu().long(), self.num_classes
        if num_classes is None:
            raise ValueError("got labels, expected none: this prior was made without num_classes")
        if len(found) and not 0 <= int(found.min()) <= int(found.max()) < num_classes:
            raise ValueError(
                f"got labels from {int(found.min())} to {int(found.max())}, expected 0 to {num_classes - 1}"
            )
        return found

    def decode_labels(self, source: Source, num: int) -> Int[Tensor, " b"]:
        """The labels of so many images. Errors as `decode_codes`."""
        widths, size = self._label_widths(), self.labels_per_part
        parts = []
        for start in range(0, num, size):
            source.begin()
            part = min(size, num - start)
            parts.append(self._ask([(source, part)], widths.expand(part, -1), part, self.num_classes or 0, "labels"))
        return torch.cat(parts).cpu()

    def _label_widths(self) -> Int[Tensor, " k"]:
        if self.num_classes is None:
            raise BadStream("the stream has labels, and this prior was made without num_classes")
        return integer_tables.even_widths(self.num_classes)

    @torch.no_grad()
    def decode_codes(
        self, sources: Sequence[tuple[Source, int]], labels: Int[Tensor, " t"] | None, offsets: Int[Tensor, " t"]
    ) -> Int[Tensor, "t *grid"]:
        """Codes of a group of tiles with these labels, from one stream or several at once, so many tiles of each.

        Raises:
            ValueError: a stream that cannot be one of this model's, or ended before.
        """
        num = len(offsets)
        for source, count in sources:
            if count:
                source.begin()

        def choose(log_probs: Tensor) -> Tensor:
            widths = integer_tables.CodeTables(log_probs, offsets).widths()
            return self._ask(sources, widths, num, self.num_codes, "codes")

        return self.prior.walk(num, choose, labels)

    @torch.no_grad()
    def decode_tiles(
        self, sources: Sequence[tuple[Source, int]], codes: Int[Tensor, "t *grid"], offsets: Int[Tensor, " t"]
    ) -> UInt8[Tensor, "t c h w"]:
        """Pixels of tiles whose codes are known. Errors as `decode_codes`."""
        num = len(codes)

        def choose(symbols: Symbols) -> Tensor:
            rows = len(symbols.parameters) // max(num, 1)
            found = integer_tables.LevelTables(
                symbols.likelihood.cdf, symbols.parameters, _spread(offsets, rows).flatten()
            )
            high = self._ask(sources, found.high(), num, integer_tables.STEP, "pixels")
            return high * integer_tables.STEP + self._ask(sources, found.low(high), num, integer_tables.STEP, "pixels")

        return self.likelihood.visit(self.model.decoder(self.model.vectors(codes)), choose)

    @torch.no_grad()
    def walked(
        self, tiles: UInt8[Tensor, "t c h w"], codes: Int[Tensor, "t *grid"], offsets: Int[Tensor, " t"]
    ) -> Intervals:
        """`in_order` of known tiles and codes by the decoder's own walk, for bits that no encoder chose.

        The grid's guard cannot be kept there. What makes the integer tables agree is that the steps and their shapes
        are those of the decoder.
        """
        parts: list[Intervals] = []
        positions, steps = iter(codes.flatten(1).unbind(1)), iter(self.order)

        def choose_code(log_probs: Tensor) -> Tensor:
            known = next(positions)
            parts.append(integer_tables.CodeTables(log_probs, offsets).intervals(known))
            return known

        def choose_level(symbols: Symbols) -> Tensor:
            step = next(steps)
            levels = tiles.flatten(1)[:, step].flatten().long()
            spread = _spread(offsets, len(step)).flatten()
            found = integer_tables.LevelTables(symbols.likelihood.cdf, symbols.parameters, spread)
            parts.extend(found.intervals(levels))
            return levels

        codes = self.prior.walk(len(codes), choose_code, None)
        self.likelihood.visit(self.model.decoder(self.model.vectors(codes)), choose_level)
        return Intervals(*map(torch.cat, zip(*parts, strict=True)))

    def _ask(
        self, sources: Sequence[tuple[Source, int]], widths: Tensor, num: int, num_symbols: int, what: str
    ) -> Tensor:
        """Symbols "n" for n rows of widths, tile by tile, from the source of each tile."""
        rows = len(widths) // max(num, 1)
        parts = widths.split([count * rows for _, count in sources])
        found = [source.get(part) for (source, _), part in zip(sources, parts, strict=True)]
        symbols = torch.from_numpy(np.concatenate(found)).long() if found else torch.zeros(0, dtype=torch.int64)
        if len(symbols) and int(symbols.max()) >= num_symbols:
            raise BadStream(f"the stream has {what} that the model does not know")
        return symbols.to(self.device)

    @staticmethod
    def _chunks(num: int, size: int) -> list[slice]:
        length = max(1, _CHUNK // max(size, 1))
        return [slice(start, start + length) for start in range(0, max(num, 1), length)]


def _spread(offsets: Tensor, rows: int) -> Int[Tensor, "t m"]:
    return rearrange(offsets, "t -> t 1").expand(-1, rows)
