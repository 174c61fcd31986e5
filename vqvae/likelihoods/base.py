"""What a likelihood is: a distribution over 8-bit images, given the decoder's features.

    distortion(y) = -ln P_dec(y | z),    P_dec summing to one over the images {0..255}^(C H W).

Pixels are independent given the features. The channels of a pixel are either independent too, or
coupled in their order (red, then green given red, ...):

    P(y | features) = prod_pixels prod_c P(y_c | y_1..y_{c-1}, features)

A *symbol* is one channel of one pixel. A few real numbers determine its distribution, its parameters
(which they are, each family says): a coder rounds them to a grid, so that writer and reader agree on
them, and asks for the cumulative probabilities of only the levels that it looks at.

Scoring, sampling and coding share one walk. It has one step for each channel where channels are
coupled, else a single step for everything. A step offers the symbols that it is about to fix, and a
chooser answers with their levels: random draws, known values, or the bits of a file.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Float64, Int, Integer, UInt8
from torch import Tensor, nn

from safefolder import arrays
from safefolder.configured import Configured, ConfiguredOptions
from vqvae.likelihoods.chunks import computing_dtype, rows_per_group

NUM_LEVELS = 256

Chooser = Callable[[Float[Tensor, "n 256"]], Int[Tensor, " n"]]
"""Answers normalised log-probabilities with one level (0..255) a row."""


@dataclass(frozen=True)
class Symbols:
    """The symbols that a step of the walk is about to fix.

    Attributes:
        parameters: what determines their distributions, a row each.
        likelihood: what the parameters are of.
    """

    parameters: Float[Tensor, "n p"]
    likelihood: "Likelihood"

    @torch.no_grad()
    def log_probs(self) -> Float[Tensor, "n 256"]:
        """Normalised log-probabilities in nats of all levels; a group of rows is worked on at a time."""
        log_probs = self.parameters.new_empty(len(self.parameters), NUM_LEVELS)
        size = rows_per_group(self.parameters, NUM_LEVELS)
        for part, row in zip(log_probs.split(size), self.parameters.split(size), strict=True):
            part.copy_(self.likelihood._log_pmf(row))
        return log_probs

    def cdf(
        self, levels: Integer[Tensor, "n e"], parameters: Float[Tensor, "n p"] | None = None
    ) -> Float64[Tensor, "n e"]:
        """P(level <= v) for e levels v of each symbol, see `Likelihood.cdf`.

        Args:
            parameters: instead of the symbols' own, such as these rounded.
        """
        return self.likelihood.cdf(self.parameters if parameters is None else parameters, levels)


SymbolChooser = Callable[[Symbols], Int[Tensor, " n"]]
"""Answers symbols with one level (0..255) each."""


class Likelihood(nn.Module, Configured):
    """A distribution over uint8 images "b c h w", given features "b f h w" of the same size.

    Attributes:
        num_channels: image channels c.
        num_features: feature channels f that a decoder must give for each pixel.
        num_parameters: the real numbers p that determine a symbol's distribution.
        coupled: whether a channel's distribution depends on the channels before it.
    """

    class Config(ConfiguredOptions):
        """Abstract: the options of one family, as plain data; the channels are those of the model's images."""

    def __init__(self, *, num_channels: int, num_features: int, num_parameters: int, coupled: bool) -> None:
        super().__init__()
        if num_channels < 1:
            raise ValueError(f"got num_channels={num_channels}, expected at least 1")
        self.num_channels = num_channels
        self.num_features = num_features
        self.num_parameters = num_parameters
        self.coupled = coupled

    @abstractmethod
    def log_prob(self, images: UInt8[Tensor, "b c h w"], features: Float[Tensor, "b f h w"]) -> Float[Tensor, " b"]:
        """ln P(images | features) in nats per image; float32, or float64 for float64 features.

        Raises:
            ValueError: images that are not uint8 or not of this many channels, features of another
                number of channels or another size.
        """

    @abstractmethod
    def mean(self, features: Float[Tensor, "b f h w"]) -> Float[Tensor, "b c h w"]:
        """The expected level, 0..255 (see the families for coupled channels)."""

    def point_estimate(self, features: Float[Tensor, "b f h w"]) -> Float[Tensor, "b c h w"]:
        """The levels, 0..255, of one image that stands for the distribution, as a reconstruction: its mean."""
        return self.mean(features)

    def auxiliary(
        self, images: UInt8[Tensor, "b c h w"], features: Float[Tensor, "b f h w"]
    ) -> dict[str, Float[Tensor, ""]]:
        """Named terms to add to the training objective, weighted, in nats per dimension; here none."""
        return {}

    @abstractmethod
    def _pixel_parameters(
        self, features: Float[Tensor, "n f"], earlier: UInt8[Tensor, "n c"], channels: slice
    ) -> Float[Tensor, "n d p"]:
        """The parameters of d of the channels of n pixels.

        Args:
            features: the pixels' own, in the computing dtype, which is the answer's too.
            earlier: the pixels' levels; a channel's parameters depend on those before it alone.
            channels: which channels: one where they are coupled, otherwise all.
        """

    @abstractmethod
    def _log_pmf(self, parameters: Float[Tensor, "n p"]) -> Float[Tensor, "n 256"]:
        """Log-probabilities, normalised where the parameters are as `_pixel_parameters` gives them."""

    @abstractmethod
    def _cdf(self, parameters: Float[Tensor, "n p"], levels: Int[Tensor, "n e"]) -> Float[Tensor, "n e"]:
        """P(level <= v) up to rounding, for v in 0..254, also where the parameters were rounded."""

    def sample(
        self, features: Float[Tensor, "b f h w"], generator: torch.Generator | None = None
    ) -> UInt8[Tensor, "b c h w"]:
        """Images sampled from the likelihood: the walk with a random chooser.

        The generator must live on the features' device. The same generator state gives the same
        images.
        """

        def choose(symbols: Symbols) -> Tensor:
            parameters = symbols.parameters
            uniform = torch.rand(len(parameters), 1, generator=generator, dtype=torch.float64, device=parameters.device)
            # A group of rows at a time, so that there never are the log-probabilities of all symbols.
            size = rows_per_group(parameters, NUM_LEVELS)
            rows = zip(parameters.split(size), uniform.split(size), strict=True)
            return torch.cat([_inverse_transform(self._log_pmf(row), numbers) for row, numbers in rows])

        return self.visit(features, choose)

    def walk(self, features: Float[Tensor, "b f h w"], chooser: Chooser) -> UInt8[Tensor, "b c h w"]:
        """As `visit`, with a chooser that is handed the symbols' log-probabilities "n 256"."""
        return self.visit(features, lambda symbols: chooser(symbols.log_probs()))

    @torch.no_grad()
    def visit(self, features: Float[Tensor, "b f h w"], chooser: SymbolChooser) -> UInt8[Tensor, "b c h w"]:
        """Fix images step by step; returns what the chooser chose.

        A step hands the chooser n symbols, whose parameters are in float32, or in float64 for
        float64 features, and receives n levels. Its rows are in the order "(b m)": image by image,
        and within an image as in `order`. That is "(b c h w)": all channels in the one step of a
        factorised likelihood, one channel a step where channels are coupled.

        Raises:
            ValueError: a chooser that answers with another shape or with levels outside 0..255.
        """
        features = self._checked_features(features)
        batch, _, height, width = features.shape
        images = torch.zeros(batch, self.num_channels, height, width, dtype=torch.uint8, device=features.device)
        flat = images.flatten(2)  # a view
        for pixels, rows in self._pixel_steps(features, images):
            for channels in self._channel_steps():
                parameters = self._step_parameters(rows, flat[:, :, pixels], channels)
                levels = chooser(Symbols(parameters.flatten(0, 2), self))
                levels = _checked_answer(levels, parameters.shape[:-1].numel())
                flat[:, channels, pixels] = levels.view(parameters.shape[:-1]).to(torch.uint8)
        return images

    @torch.no_grad()
    def symbol_parameters(
        self, images: UInt8[Tensor, "b c h w"], features: Float[Tensor, "b f h w"]
    ) -> Float[Tensor, "b c h w p"]:
        """The parameters of all symbols, given the images' own earlier ones.

        In float32, or in float64 for float64 features: what `visit` offers to a chooser that
        answers with these images. Where channels are independent their content has no say.

        Raises:
            ValueError: as for `log_prob`.
        """
        self._check(images, features)
        features, flat = self._checked_features(features), images.flatten(2)
        parameters = features.new_empty(*flat.shape, self.num_parameters)
        for pixels, rows in self._pixel_steps(features, images):
            for channels in self._channel_steps():
                parameters[:, channels, pixels] = self._step_parameters(rows, flat[:, :, pixels], channels)
        return parameters.view(*images.shape, self.num_parameters)

    @torch.no_grad()
    def cdf(self, parameters: Float[Tensor, "*n p"], levels: Integer[Tensor, "*n e"]) -> Float64[Tensor, "*n e"]:
        """P(level <= v) of symbols with these parameters, for e levels v of each: for coding.

        Exactly 0 at v = -1 and 1 at v = 255, and within [0, 1]. It is computed in float64 and
        accurate absolutely, to 1e-15, not relatively: tails below 1e-16 vanish, and between levels
        it may decrease by as much. Parameters may be rounded ones: whatever they are, what they
        determine is a distribution. Time grows with the parameters and the levels asked for, and no
        more memory than a group of rows takes is used on the way.

        Raises:
            ValueError: parameters or levels of a wrong shape or type, levels outside -1..255.
        """
        if levels.dtype in (torch.uint16, torch.uint32, torch.uint64):  # of which torch knows no least
            levels = arrays.integers(levels, "levels")
        self._check_levels(parameters, levels)
        num, wanted = levels.shape[:-1].numel(), levels.shape[-1]
        rows = parameters.reshape(num, self.num_parameters), levels.reshape(num, wanted)
        cdf = torch.empty(num, wanted, dtype=torch.float64, device=parameters.device)
        size = rows_per_group(parameters, max(wanted, self.num_parameters))
        for part, row, chosen in zip(cdf.split(size), *(each.split(size) for each in rows), strict=True):
            part.copy_(self._cdf(row.double(), chosen.long().clamp(0, NUM_LEVELS - 2))).clamp_(0, 1)
            part.masked_fill_(chosen < 0, 0).masked_fill_(chosen == NUM_LEVELS - 1, 1)
        return cdf.view(levels.shape)

    def order(self, height: int, width: int) -> list[Int[Tensor, " m"]]:
        """For each step of the walk, the symbols that it fixes in an image of this size.

        They are flat indices into "(c h w)", in the order of the step's rows.
        """
        symbols = torch.arange(self.num_channels * height * width, device="cpu").view(self.num_channels, height * width)
        return [
            symbols[channels, pixels].flatten()
            for pixels in self._pixel_groups(height, width)
            for channels in self._channel_steps()
        ]

    def _pixel_groups(self, height: int, width: int) -> list[Int[Tensor, " m"]]:
        """The pixels of each of the `_pixel_steps`, as flat indices into "(h w)"."""
        return [torch.arange(height * width, device="cpu")]

    def _pixel_steps(
        self, features: Float[Tensor, "b f h w"], images: UInt8[Tensor, "b c h w"]
    ) -> Iterator[tuple[Int[Tensor, " m"], Float[Tensor, "b m f"]]]:
        """The pixels to fix next and their features, step by step; here all pixels at once.

        Args:
            images: being filled in: when the generator is resumed they hold the pixels of the steps
                before, and nothing else of theirs may be looked at.
        """
        [pixels] = self._pixel_groups(*features.shape[2:])
        yield pixels.to(features.device), rearrange(features, "b f h w -> b (h w) f")

    def _channel_steps(self) -> list[slice]:
        """The channels that are fixed at once."""
        if self.coupled:
            return [slice(channel, channel + 1) for channel in range(self.num_channels)]
        return [slice(0, self.num_channels)]

    def _step_parameters(
        self, rows: Float[Tensor, "b m f"], earlier: UInt8[Tensor, "b c m"], channels: slice
    ) -> Float[Tensor, "b d m p"]:
        """The parameters of the symbols of a step."""
        pixels = rearrange(earlier, "b c m -> (b m) c")
        parameters = self._pixel_parameters(rows.flatten(0, 1), pixels, channels)
        return rearrange(parameters.unflatten(0, rows.shape[:2]), "b m d p -> b d m p")

    def _checked_features(self, features: Tensor) -> Tensor:
        """The features in the computing dtype, contiguous."""
        self._check_features(features)
        return features.to(computing_dtype(features), memory_format=torch.contiguous_format)

    def _check_features(self, features: Tensor) -> None:
        if not isinstance(features, Tensor):
            raise ValueError(f"got features as {type(features).__name__}, expected a tensor: torch.from_numpy(...)")
        if features.ndim != 4 or features.shape[1] != self.num_features:
            raise ValueError(
                f"got features of shape {tuple(features.shape)}, expected (b, {self.num_features}, "
                f"h, w) for {type(self).__name__} with num_channels={self.num_channels}"
            )
        if not features.is_floating_point():
            raise ValueError(f"got features of dtype {features.dtype}, expected floating point")

    def _check_levels(self, parameters: Tensor, levels: Tensor) -> None:
        p = self.num_parameters
        if not parameters.is_floating_point() or parameters.shape[-1:] != (p,):
            raise ValueError(
                f"got parameters of shape {tuple(parameters.shape)} and dtype {parameters.dtype}, expected floating "
                f"point of shape (..., {p}) for {type(self).__name__}"
            )
        if levels.ndim != parameters.ndim or levels.shape[:-1] != parameters.shape[:-1]:
            raise ValueError(
                f"got levels of shape {tuple(levels.shape)} for parameters of shape {tuple(parameters.shape)}, "
                "expected the same shape but for the last axis, which holds the levels of a symbol"
            )
        if levels.is_floating_point() or levels.dtype == torch.bool:
            raise ValueError(f"got levels of dtype {levels.dtype}, expected integers such as torch.int64")
        if levels.numel() and not -1 <= int(levels.min()) <= int(levels.max()) < NUM_LEVELS:
            raise ValueError(
                f"got levels from {int(levels.min())} to {int(levels.max())}, expected -1 (none) to {NUM_LEVELS - 1}"
            )

    def _check(self, images: Tensor, features: Tensor) -> None:
        self._check_features(features)
        if not isinstance(images, Tensor) or images.dtype != torch.uint8:
            kind = getattr(images, "dtype", type(images).__name__)
            raise ValueError(f"got images of dtype {kind}, expected torch.uint8 with levels 0..255, as a tensor")
        expected = (features.shape[0], self.num_channels, *features.shape[2:])
        if tuple(images.shape) != expected:
            raise ValueError(
                f"got images of shape {tuple(images.shape)}, expected (b, c, h, w) = {expected} "
                f"for features of shape {tuple(features.shape)}"
            )


def _checked_answer(levels: Tensor, num: int) -> Tensor:
    """A chooser's levels, which may be of any integer type, as int64."""
    levels = arrays.integers(levels, "levels from a chooser")
    if levels.shape != (num,):
        raise ValueError(f"a chooser answered {num} symbols with shape {tuple(levels.shape)}, expected ({num},)")
    if num and not 0 <= int(levels.min()) <= int(levels.max()) < NUM_LEVELS:
        raise ValueError(
            f"a chooser answered levels from {int(levels.min())} to {int(levels.max())}, expected 0..{NUM_LEVELS - 1}"
        )
    return levels


def _inverse_transform(log_probs: Tensor, uniform: Tensor) -> Int[Tensor, " n"]:
    """The first symbols whose cumulative probability exceeds a number "n 1" in [0, 1).

    So a symbol without mass is never sampled.
    """
    cdf = log_probs.exp().cumsum(-1, dtype=torch.float64)
    symbols = torch.searchsorted(cdf, uniform * cdf[:, -1:], right=True)
    return symbols.squeeze(-1).clamp(max=NUM_LEVELS - 1)
