"""The figures of the eye over any number of batches, each with its interval and what it was measured with.

    meter = LooksMeter([EfficientNetLite(size=2)])
    meter.add(images, reconstructions)        # uint8, as often as there are batches
    meter.add_samples(samples)
    meter.looks().reconstructions["PSNR"]     # Estimate(value=..., low=..., high=...)

Networks see images in groups of one size whatever the batches were, so the figures do not depend on those. Figures
are comparable where their protocols are equal.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from vqvae.looks.distances import (
    NEIGHBOURS,
    Estimate,
    frechet_distance,
    kernel_distance,
    mean_estimate,
    precision_recall,
)
from vqvae.looks.features import FeatureMaps, FeatureNetwork
from vqvae.looks.inception import Inception
from vqvae.looks.perceptual import PerceptualDistance
from vqvae.looks.vgg import VGG16
from vqvae.metrics import ms_ssim, psnr, ssim

# Images that a network sees at once.
_GROUP = 32


@dataclass(frozen=True, kw_only=True)
class Looks:
    """Figures of the eye.

    Attributes:
        protocol: what they were measured with and on: a word or number each.
        reconstructions: by name; PSNR in dB.
        samples: by name; empty where no sample was added.
        num_samples: how many samples there were.
    """

    protocol: dict[str, str | int]
    reconstructions: dict[str, Estimate]
    samples: dict[str, Estimate] = field(default_factory=dict)
    num_samples: int = 0

    def plain(self) -> dict[str, Any]:
        """As JSON takes it: null for a PSNR that is infinite."""
        plain: dict[str, Any] = {"protocol": self.protocol, "reconstructions": _plain(self.reconstructions)}
        if self.samples:
            plain |= {"num_samples": self.num_samples, "samples": _plain(self.samples)}
        return plain

    def lines(self) -> list[str]:
        """As a table for a terminal."""
        width = max(map(len, [*self.reconstructions, *self.samples, *self.protocol])) + 2
        lines = [f"{'reconstructions, for the eye':<{width + 17}}95 % interval"]
        lines += [f"  {name:<{width}}{_row(estimate)}" for name, estimate in self.reconstructions.items()]
        if self.samples:
            lines += [f"{self.num_samples:,} samples"]
            lines += [f"  {name:<{width}}{_row(estimate)}" for name, estimate in self.samples.items()]
        lines += ["measured with:"]
        return [*lines, *(f"  {name:<{width}}{value}" for name, value in self.protocol.items())]


def _plain(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, float | None]]:
    return {
        name: {key: value if math.isfinite(value) else None for key, value in asdict(estimate).items()}
        for name, estimate in estimates.items()
    }


def _row(estimate: Estimate) -> str:
    return f"{estimate.value:>12.5g}   {estimate.low:.5g} to {estimate.high:.5g}"


class LooksMeter:
    """Collects the features of images, reconstructions and samples.

    In memory it keeps a vector of each image and network: 5 kB for EfficientNet-Lite, 8 kB for Inception.

    Args:
        networks: what sees the images. A network with maps gives a perceptual distance, VGG16 that of LPIPS.
        prepared: how images came to their size before they came here, crop and filter; part of the protocol.
        device: where they see them.

    Raises:
        ValueError: no network, or two of one name.
    """

    def __init__(
        self, networks: Sequence[FeatureNetwork], *, prepared: str = "as given", device: torch.device | str = "cpu"
    ):
        names = [network.name for network in networks]
        if not networks or len({*names}) < len(names):
            raise ValueError(f"expected one or more feature networks of different names, got {names or 'none'}")
        self.prepared = prepared
        self.device = torch.device(device)
        self._networks = {network.name: network.to(self.device) for network in networks}
        self._distances = [
            _distance(network).to(self.device) for network in networks if isinstance(network, FeatureMaps)
        ]
        self._digest = hashlib.sha256()
        self._pairs = _Groups(self._see_pairs)
        self._samples = _Groups(self._see_samples)
        self._num = 0
        self._shape: tuple[int, ...] = ()
        self._values: dict[str, list[Tensor]] = {}
        self._features: dict[tuple[str, str], list[Tensor]] = {}

    @property
    def smallest(self) -> int:
        """Pixels along the shorter side of the smallest images that all networks see."""
        return max([distance.network.smallest for distance in self._distances], default=1)

    def add(self, images: UInt8[Tensor, "b c h w"], reconstructions: UInt8[Tensor, "b c h w"]) -> None:
        """Count images and what was made of them.

        Raises:
            ValueError: what are no levels (uint8), pairs of two shapes, or other sizes than those before.
        """
        if images.shape != reconstructions.shape:
            raise ValueError(f"got images {tuple(images.shape)} and reconstructions {tuple(reconstructions.shape)}")
        for each in (images, reconstructions):
            self._check(each)
        for image in images.cpu():
            self._digest.update(image.contiguous().numpy().tobytes())
        self._num += len(images)
        self._pairs.add(images, reconstructions)

    def add_samples(self, samples: UInt8[Tensor, "b c h w"]) -> None:
        """Count samples. Errors as `add`."""
        self._check(samples)
        self._samples.add(samples)

    def looks(self) -> Looks:
        """The figures of all that was added.

        Raises:
            ValueError: fewer than two images, or a single sample, or a figure that is not finite.
        """
        self._pairs.flush()
        self._samples.flush()
        if self._num < 2:
            raise ValueError(f"figures with intervals need at least two images, got {self._num}")
        figures = {name: _mean(name, torch.cat(values)) for name, values in self._values.items()}
        samples: dict[str, Estimate] = {}
        num_samples = 0
        for name in self._networks:
            frechet, kernel = ("FID", "KID") if name == Inception.name else (f"{name} Frechet", f"{name} kernel")
            real, made = (torch.cat(self._features[name, kind]) for kind in ("images", "reconstructions"))
            prefix = "r" if name == Inception.name else ""
            figures[prefix + frechet] = frechet_distance(real, made, paired=True)
            figures[prefix + kernel] = kernel_distance(real, made, paired=True)
            if (drawn := self._features.get((name, "samples"))) is None:
                continue
            drawn = torch.cat(drawn)
            num_samples, prefix = len(drawn), "g" if name == Inception.name else ""
            samples[prefix + frechet] = frechet_distance(real, drawn)
            samples[prefix + kernel] = kernel_distance(real, drawn)
            if min(len(real), len(drawn)) > NEIGHBOURS:
                samples[f"{name} precision"], samples[f"{name} recall"] = precision_recall(real, drawn)
        return Looks(protocol=self._protocol(), reconstructions=figures, samples=samples, num_samples=num_samples)

    def _protocol(self) -> dict[str, str | int]:
        channels, height, width = self._shape
        protocol: dict[str, str | int] = {
            "images": self._num,
            "size": f"{channels}x{height}x{width}",
            "crop and filter": self.prepared,
            "SHA-256 of the images": self._digest.hexdigest()[:16],
        }
        for name, network in self._networks.items():
            protocol[name] = (
                f"weights {network.digest}, Fréchet and kernel at {network.side}x{network.side}, {network.resize}"
            )
        return protocol

    def _check(self, images: Tensor) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"got images as {images.dtype} {tuple(images.shape)}, expected uint8 (b, c, h, w)")
        shape = tuple(images.shape[1:])
        self._shape = self._shape or shape
        if shape != self._shape:
            raise ValueError(f"got images of {shape} after those of {self._shape}; measure each size by itself")

    @torch.no_grad()
    def _see_pairs(self, images: Tensor, reconstructions: Tensor) -> None:
        self._values.setdefault("PSNR", []).append(psnr(images, reconstructions))
        side = min(self._shape[1:])
        for name, figure, smallest in (("SSIM", ssim, 11), ("MS-SSIM", ms_ssim, 176)):
            if side >= smallest:
                self._values.setdefault(name, []).append(figure(images, reconstructions))
        images, reconstructions = images.to(self.device), reconstructions.to(self.device)
        for distance in self._distances:
            values = distance(images.float() / 255, reconstructions.float() / 255)
            self._values.setdefault(distance.name, []).append(values.cpu())
        self._see("images", images)
        self._see("reconstructions", reconstructions)

    def _see_samples(self, samples: Tensor) -> None:
        self._see("samples", samples.to(self.device))

    def _see(self, kind: str, images: Tensor) -> None:
        # Always as many at once: the same image in a smaller group would have other last bits.
        full = torch.cat([images, images[-1:].expand(_GROUP - len(images), -1, -1, -1)])
        for name, network in self._networks.items():
            self._features.setdefault((name, kind), []).append(network.pooled(full)[: len(images)].cpu())


class _Groups:
    """Hands batches of any sizes on in groups of one size, and what is left at the end."""

    def __init__(self, see: Callable[..., None]):
        self._see = see
        self._waiting: tuple[Tensor, ...] = ()

    def add(self, *tensors: Tensor) -> None:
        tensors = tuple(tensor.cpu() for tensor in tensors)
        if self._waiting:
            tensors = tuple(torch.cat(pair) for pair in zip(self._waiting, tensors, strict=True))
        full = len(tensors[0]) // _GROUP * _GROUP
        for start in range(0, full, _GROUP):
            self._see(*(tensor[start : start + _GROUP] for tensor in tensors))
        self._waiting = tuple(tensor[full:] for tensor in tensors)

    def flush(self) -> None:
        """Hand on what is left."""
        waiting, self._waiting = self._waiting, ()
        if waiting and len(waiting[0]):
            self._see(*waiting)


def _distance(network: FeatureMaps) -> PerceptualDistance:
    return PerceptualDistance.lpips(network) if isinstance(network, VGG16) else PerceptualDistance(network)


def _mean(name: str, values: Tensor) -> Estimate:
    """The mean over images; of a PSNR over those that differ from their reconstructions."""
    if name == "PSNR":
        values = values[values != math.inf]
        if len(values) < 2:
            value = values.mean().item() if len(values) else math.inf
            return Estimate(value, value, value)
    if not torch.isfinite(values).all():
        raise ValueError(f"the {name} of {int((~torch.isfinite(values)).sum())} images is not finite")
    return mean_estimate(values)
