"""Figures beside the ELBO: how latents are used, and how far reconstructions are from their images."""

import math
from statistics import fmean

import torch
from jaxtyping import Float, Float64, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from safefolder import arrays
from safefolder.arrays import Codes

# A latent channel is active if its posterior is further than this from N(0, 1), in nats a position. As with the "active
# units" of Burda et al. 2015, where to draw the line is a convention: it only has to be well under what a use costs.
ACTIVE = 0.01

# Pixels along a side of SSIM's window, and MS-SSIM's exponents of its scales.
WINDOW = 11
# Of the local means of SSIM, values that are worked on at a time.
_STRIP = 1 << 20
_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


class CodeUsage:
    """The histogram of codes over any number of batches, for each codebook of a residual or grouped quantizer.

    usage = fraction of a codebook's codes that occurred; perplexity = exp of its histogram's entropy, at most
    `num_codes`; both are means over the codebooks. Only codes that occurred are listed, so 2^36 codes can be counted.

    Args:
        num_codes: codes of each codebook.
        axes: the last axes of the codes, which tell the codebooks apart: a quantizer's `code_axes`.
    """

    def __init__(self, num_codes: int, axes: tuple[int, ...] = ()):
        self.num_codes = num_codes
        self.axes = axes
        nothing = torch.zeros(0, dtype=torch.int64, device="cpu")
        self._seen = [(nothing, nothing)] * math.prod(axes)

    def add(self, codes: Codes) -> None:
        """Count codes, of any integer type; those that are masked (-1) are left out.

        Raises:
            ValueError: no integers, codes that the codebooks have not, or other last axes than theirs.
        """
        found = arrays.integers(codes, "codes").cpu()
        if self.axes and tuple(found.shape[-len(self.axes) :]) != self.axes:
            raise ValueError(f"expected codes whose last axes are {self.axes}, got shape {tuple(found.shape)}")
        if found.numel():
            low, high = found.aminmax()
            if low < -1 or high >= self.num_codes:
                raise ValueError(f"codes must lie in [0, {self.num_codes}), got {int(low)} to {int(high)}")
        columns = found.reshape(-1, len(self._seen)).unbind(1)
        self._seen = [self._merged(*seen, column) for seen, column in zip(self._seen, columns, strict=True)]

    def _merged(self, seen: Tensor, counts: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        new, new_counts = new[new >= 0].unique(return_counts=True)
        merged, where = torch.cat([seen, new]).unique(return_inverse=True)
        return merged, torch.zeros_like(merged).scatter_add_(0, where, torch.cat([counts, new_counts]))

    @property
    def counts(self) -> list[Int[Tensor, " n"]]:
        """How often each code that occurred did, for each codebook."""
        return [counts for _, counts in self._seen]

    @property
    def usages(self) -> list[float]:
        """Of each codebook."""
        return [len(counts) / self.num_codes for counts in self.counts]

    @property
    def perplexities(self) -> list[float]:
        """Of each codebook."""
        shares = [counts.double() / counts.sum().clamp_min(1) for counts in self.counts]
        return [torch.special.entr(share).sum().exp().item() for share in shares]

    @property
    def usage(self) -> float:
        return fmean(self.usages)

    @property
    def perplexity(self) -> float:
        return fmean(self.perplexities)


class ChannelUsage:
    """The mean KL(q(z|y) ‖ N(0, 1)) of each latent channel over any number of batches, for real latents.

    usage = fraction of the channels that are active: above `ACTIVE` nats a position. A perplexity does not exist.

    Args:
        dim: latent channels.
        grid: positions of an image.
    """

    def __init__(self, dim: int, grid: tuple[int, ...]):
        self.dim = dim
        self.grid = grid
        self._sum = torch.zeros(dim, dtype=torch.float64, device="cpu")
        self._num = 0

    def add(self, channel_kl: Float[Tensor, "b *grid d"]) -> None:
        """Count the KL of each position and channel, in nats."""
        self._sum += channel_kl.reshape(-1, self.dim).sum(0, dtype=torch.float64).cpu()
        self._num += channel_kl.numel() // self.dim

    @property
    def channels(self) -> list[float]:
        """The mean KL of each channel, in nats a position."""
        return (self._sum / max(self._num, 1)).tolist()

    @property
    def kl(self) -> float:
        """The mean KL of an image in nats: its rate under N(0, I) less its entropy, without noise of draws."""
        return sum(self.channels) * math.prod(self.grid)

    @property
    def usage(self) -> float:
        return fmean(channel > ACTIVE for channel in self.channels)

    @property
    def perplexity(self) -> None:
        return None


def _check_levels(images: Tensor, others: Tensor) -> None:
    """Raise ValueError for images that are not comparable: floats in [0, 1] would seem far too alike."""
    for each in (images, others):
        if not isinstance(each, Tensor) or each.dtype != torch.uint8 or each.ndim != 4:
            kind = f"{each.dtype} {tuple(each.shape)}" if isinstance(each, Tensor) else type(each).__name__
            raise ValueError(f"got images as {kind}, expected a uint8 tensor of shape (b, c, h, w)")
    if images.shape != others.shape:
        raise ValueError(f"got images of shapes {tuple(images.shape)} and {tuple(others.shape)}, expected equal ones")


def psnr(images: UInt8[Tensor, "b c h w"], others: UInt8[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio of each image in dB, peak 255; infinite where the two are equal.

    Raises:
        ValueError: what are no levels (uint8), or of two shapes.
    """
    _check_levels(images, others)
    total = torch.zeros(len(images), dtype=torch.float64, device=images.device)
    rows = max(1, _STRIP // max(1, images[:, :, :1].numel()))
    for some, same in zip(images.split(rows, 2), others.split(rows, 2), strict=True):
        total += (some.double() - same.double()).square().sum((1, 2, 3))  # whole numbers, so in any order the same
    return (10 * torch.log10(255**2 / (total / images[0].numel()))).float()


def ssim(images: UInt8[Tensor, "b c h w"], others: UInt8[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Structural similarity of each image (Wang et al. 2004): Gaussian window of 11 and σ 1.5, K1 0.01, K2 0.03.

    The mean over channels and over the positions where the window fits inside the image.

    Raises:
        ValueError: an image is smaller than the window, or what are no levels (uint8), or of two shapes.
    """
    _check_levels(images, others)
    _check_side(images, "SSIM", WINDOW)
    return _mean_similarities(images, others)[0].mean(1).float()


def ms_ssim(images: UInt8[Tensor, "b c h w"], others: UInt8[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Structural similarity of each image at five scales, each half the one before (Wang et al. 2003).

    Raises:
        ValueError: an image whose shorter side is under 176 pixels, at which the window of 11 just fits the last
            scale, or what are no levels (uint8), or of two shapes.
    """
    _check_levels(images, others)
    _check_side(images, "MS-SSIM", WINDOW << len(_SCALES) - 1)
    x, y = images.double(), others.double()
    total = x.new_ones(x.shape[:2])
    for at, weight in enumerate(_SCALES):
        similarity, contrast = _mean_similarities(x, y)
        # A scale on which the two are opposites counts as nothing alike: a power needs a base that is not negative.
        total = total * (similarity if at == len(_SCALES) - 1 else contrast).clamp_min(0) ** weight
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return total.mean(1).float()


def _check_side(images: Tensor, name: str, smallest: int) -> None:
    if min(images.shape[-2:]) < smallest:
        raise ValueError(
            f"{name} needs images of at least {smallest}x{smallest}, got {images.shape[-2]}x{images.shape[-1]}"
        )


def _mean_similarities(x: Tensor, y: Tensor) -> tuple[Float64[Tensor, "b c"], Float64[Tensor, "b c"]]:
    """Means, wherever the window fits, of the similarity, and of that of contrast and structure alone.

    Some rows at a time: of a photograph the parts would not fit in memory.
    """
    num, width = x.shape[2] - WINDOW + 1, x.shape[3] - WINDOW + 1
    size = max(1, _STRIP // x[:, :, 0].numel())
    sums = torch.zeros(2, *x.shape[:2], dtype=torch.float64, device=x.device)
    for start in range(0, num, size):
        rows = slice(start, min(start + size, num) + WINDOW - 1)
        luminance, contrast = _similarities(x[:, :, rows].double(), y[:, :, rows].double())
        sums += torch.stack([(luminance * contrast).sum((2, 3)), contrast.sum((2, 3))])
    return sums[0] / (num * width), sums[1] / (num * width)


def _similarities(x: Tensor, y: Tensor) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
    """The similarity of luminance, and that of contrast and structure, wherever the window fits."""
    offsets = torch.arange(WINDOW, dtype=torch.float64, device=x.device) - WINDOW // 2
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))
    weights = (window / window.sum()).tolist()

    def local_mean(x: Tensor) -> Tensor:
        for axis in (2, 3):
            size = x.shape[axis] - WINDOW + 1
            parts = (x.narrow(axis, at, size).mul(weight) for at, weight in enumerate(weights))
            total = next(parts)
            for part in parts:
                total += part
            x = total
        return x

    mean_x, mean_y = local_mean(x), local_mean(y)
    var_x, var_y = local_mean(x * x) - mean_x**2, local_mean(y * y) - mean_y**2
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance, (2 * covariance + c2) / (var_x + var_y + c2)
