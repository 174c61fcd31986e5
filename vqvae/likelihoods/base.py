"""What a likelihood is: a distribution over 8-bit images, given the decoder's features.

    distortion(y) = -ln P_dec(y | z),    P_dec summing to one over the images {0..255}^(C H W).

Pixels are independent given the features. The channels of a pixel are either independent too, or
coupled in their order (red, then green given red, ...):

    P(y | features) = prod_pixels prod_c P(y_c | y_1..y_{c-1}, features)

Scoring, sampling and coding share one walk. It has one step for each channel where channels are
coupled, else a single step for everything. A step offers a table of log-probabilities over the 256
levels for the symbols it is about to fix, and a chooser answers with them: random draws, known
values, or the bits of a file.

`score_in_chunks` is how the trained-on families compute `log_prob`. Each image's log-probability
depends on its own features alone, so the gradient can be written down together with the value, a
cache-sized group of images at a time; the backward pass is then one product.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Float64, Int, UInt8
from torch import Tensor, nn

NUM_LEVELS = 256

Chooser = Callable[[Float[Tensor, "n 256"]], Int[Tensor, " n"]]
"""Answers a table of normalised log-probabilities with one level (0..255) a row."""

Score = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""`score(images, features, gradient)` returns log-probabilities "n" in nats of a group of images.

`features` come contiguous and in the computing dtype. Where `gradient` is a tensor (of the shape of
`features`, contiguous, uninitialised) it must be filled with d log-probability / d features.
"""


class Likelihood(nn.Module, ABC):
    """A distribution over uint8 images "b c h w", given features "b f h w" of the same size.

    Attributes:
        num_channels: image channels c.
        num_features: feature channels f that a decoder must give for each pixel.
        coupled: whether a channel's distribution depends on the channels before it.
    """

    def __init__(self, *, num_channels: int, num_features: int, coupled: bool) -> None:
        super().__init__()
        if num_channels < 1:
            raise ValueError(f"got num_channels={num_channels}, expected at least 1")
        self.num_channels = num_channels
        self.num_features = num_features
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

    @abstractmethod
    def _log_pmf(self, features: Tensor, images: Tensor, channels: slice) -> Float[Tensor, "b c h w 256"]:
        """Normalised log-probabilities of the given channels, given the images' earlier ones."""

    @abstractmethod
    def _cdf(self, features: Tensor, images: Tensor, channels: slice) -> Float64[Tensor, "b c h w 256"]:
        """Cumulative probabilities of the given channels, up to rounding."""

    def sample(
        self, features: Float[Tensor, "b f h w"], generator: torch.Generator | None = None
    ) -> UInt8[Tensor, "b c h w"]:
        """Images drawn from the likelihood: the walk with a random chooser.

        The generator must live on the features' device. The same generator state gives the same
        images.
        """

        def choose(log_probs: Tensor) -> Tensor:
            uniform = torch.rand(len(log_probs), 1, generator=generator, dtype=torch.float64, device=log_probs.device)
            rows = zip(log_probs.split(16_384), uniform.split(16_384), strict=True)
            return torch.cat([_inverse_transform(table, numbers) for table, numbers in rows])

        return self.walk(features, choose)

    @torch.no_grad()
    def walk(self, features: Float[Tensor, "b f h w"], chooser: Chooser) -> UInt8[Tensor, "b c h w"]:
        """Fix an image step by step; returns what the chooser chose.

        A step hands the chooser log-probabilities "n 256" (float32, or float64 for float64
        features) and receives n levels. Its rows are in the order "(b c h w)": all channels in the
        one step of a factorised likelihood, one channel a step where channels are coupled.

        Raises:
            ValueError: a chooser that answers with another shape or with levels outside 0..255.
        """
        features = self._checked_features(features)
        batch, _, height, width = features.shape
        images = torch.zeros(batch, self.num_channels, height, width, dtype=torch.uint8, device=features.device)
        for channels in self._steps():
            table = self._log_pmf(features, images, channels)
            levels = chooser(rearrange(table, "b c h w l -> (b c h w) l"))
            rows = table.shape[:-1].numel()
            if levels.shape != (rows,):
                raise ValueError(
                    f"a chooser answered a table of {rows} rows with shape {tuple(levels.shape)}, expected ({rows},)"
                )
            if rows and not 0 <= int(levels.min()) <= int(levels.max()) < NUM_LEVELS:
                raise ValueError(
                    f"a chooser answered levels from {int(levels.min())} to {int(levels.max())}, "
                    f"expected 0..{NUM_LEVELS - 1}"
                )
            images[:, channels] = levels.view(table.shape[:-1]).to(torch.uint8)
        return images

    @torch.no_grad()
    def cdf_table(
        self,
        features: Float[Tensor, "b f h w"],
        images: UInt8[Tensor, "b c h w"] | None = None,
    ) -> Float64[Tensor, "b c h w 256"]:
        """P(level <= v | earlier channels) for v = 0..255, in float64, for coding.

        Never decreasing, never below 0, and exactly 1 at v = 255, so that the differences are a
        distribution to the last bit. Takes 2 KiB for each pixel and channel.

        Args:
            images: the images to be coded; needed only where channels are coupled.

        Raises:
            ValueError: coupled channels and no images; images or features of a wrong shape.
        """
        features = self._checked_features(features).double()
        if images is not None:
            self._check_images(images, features)
        elif self.coupled:
            raise ValueError(
                f"{type(self).__name__} with {self.num_channels} coupled channels got no images, "
                "expected the images whose earlier channels condition the later ones; pass images="
            )
        else:
            images = torch.zeros(0, dtype=torch.uint8)
        parts = [self._cdf(features, images, channels) for channels in self._steps()]
        table = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        # Vectorised exponentials are monotone only to the last bit; a coder needs all of them.
        table = table.clamp_(0, 1).cummax(-1).values
        table[..., -1] = 1
        return table

    def _steps(self) -> list[slice]:
        if self.coupled:
            return [slice(channel, channel + 1) for channel in range(self.num_channels)]
        return [slice(0, self.num_channels)]

    def _checked_features(self, features: Tensor) -> Tensor:
        """The features in the computing dtype, contiguous."""
        self._check_features(features)
        return features.to(computing_dtype(features), memory_format=torch.contiguous_format)

    def _check_features(self, features: Tensor) -> None:
        if features.ndim != 4 or features.shape[1] != self.num_features:
            raise ValueError(
                f"got features of shape {tuple(features.shape)}, expected (b, {self.num_features}, "
                f"h, w) for {type(self).__name__} with num_channels={self.num_channels}"
            )
        if not features.is_floating_point():
            raise ValueError(f"got features of dtype {features.dtype}, expected floating point")

    def _check_images(self, images: Tensor, features: Tensor) -> None:
        if images.dtype != torch.uint8:
            raise ValueError(f"got images of dtype {images.dtype}, expected torch.uint8 with levels 0..255")
        expected = (features.shape[0], self.num_channels, *features.shape[2:])
        if tuple(images.shape) != expected:
            raise ValueError(
                f"got images of shape {tuple(images.shape)}, expected (b, c, h, w) = {expected} "
                f"for features of shape {tuple(features.shape)}"
            )

    def _check(self, images: Tensor, features: Tensor) -> None:
        self._check_features(features)
        self._check_images(images, features)


def _inverse_transform(log_probs: Tensor, uniform: Tensor) -> Int[Tensor, " n"]:
    """The first symbols whose cumulative probability exceeds a number "n 1" in [0, 1).

    So a symbol without mass is never drawn.
    """
    cdf = log_probs.exp().cumsum(-1, dtype=torch.float64)
    symbols = torch.searchsorted(cdf, uniform * cdf[:, -1:], right=True)
    return symbols.squeeze(-1).clamp(max=NUM_LEVELS - 1)


def computing_dtype(features: Tensor) -> torch.dtype:
    """float64 for float64 features, else float32: half precision never reaches a likelihood."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def images_per_group(features: Tensor, elements_per_image: int) -> int:
    """How many images to work on at once, where an image needs tensors of so many elements.

    On a CPU, intermediates of half a MiB a thread: larger ones leave its cache, smaller ones pay
    more for the calls than for the work. Elsewhere the whole batch.
    """
    if features.device.type != "cpu" or torch.compiler.is_compiling():
        return max(1, len(features))
    return max(1, torch.get_num_threads() * 131_072 // max(1, elements_per_image))


def score_in_chunks(score: Score, images: Tensor, features: Tensor, elements_per_image: int) -> Float[Tensor, " b"]:
    """Log-probabilities "b" by `score`, a group of images at a time, with its own gradient.

    Args:
        elements_per_image: the size of the largest intermediate tensor for one image, from which
            the group's size is chosen.
    """
    return _ScoreInChunks.apply(score, images, features, elements_per_image)


class _ScoreInChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, score: Score, images: Tensor, features: Tensor, elements_per_image: int) -> Tensor:
        wanted = ctx.needs_input_grad[2]
        values, ctx.gradients = _score_groups(score, images, features, elements_per_image, wanted)
        ctx.save_for_backward(images, features)
        ctx.score, ctx.elements_per_image = score, elements_per_image
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor, None]:  # pyrefly: ignore[bad-override]
        # The first call gives the gradient's memory away, which saves another of that size; only
        # a second one through a retained graph computes it anew.
        images, features = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            _, gradients = _score_groups(ctx.score, images, features, ctx.elements_per_image, True)
        return None, None, gradients.mul_(grad[:, None, None, None]).to(features.dtype), None


def _score_groups(
    score: Score, images: Tensor, features: Tensor, elements_per_image: int, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities "b" and, where wanted, their gradients, in the features' memory format."""
    dtype = computing_dtype(features)
    batch = features.shape[0]
    group = images_per_group(features, elements_per_image)
    values = torch.empty(batch, dtype=dtype, device=features.device)
    gradients = torch.empty_like(features, dtype=dtype) if wanted else None
    for start in range(0, batch, group):
        rows = slice(start, start + group)
        chunk = features[rows].to(dtype, memory_format=torch.contiguous_format)
        if gradients is None:
            values[rows] = score(images[rows], chunk, None)
        elif gradients.is_contiguous():
            values[rows] = score(images[rows], chunk, gradients[rows])
        else:
            gradient = torch.empty_like(chunk)
            values[rows] = score(images[rows], chunk, gradient)
            gradients[rows] = gradient
    return values, gradients
