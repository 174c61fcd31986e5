"""What every model here is: images to latents and back, with a proper likelihood of the pixels.

    images ──Encoder──> features ──posterior──> latents ──Decoder──> features ──Likelihood──> −ln P_dec(y|z) in nats
      uint8              "b h w d"                "b *grid", or "b *grid d"     "b f H W"       distortion, "b"

`vqvae.model` has codes between encoder and decoder, `vqvae.gaussian` real vectors; all else is shared and lies here.

The objective of training is `(distortion / num_dims).mean() + Σ auxiliary`: nats per dimension, so that the weights of
the auxiliary terms mean the same for every image size.
"""

import abc
import copy
import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor, nn

from safefolder import SavedModel
from safefolder.arrays import Labels, Latents
from safefolder.configured import ConfiguredOptions
from safefolder.fingerprint import add_parts
from vqvae import levels
from vqvae.levels import Images
from vqvae.likelihoods import Likelihood, LogisticMixture
from vqvae.metrics import ChannelUsage, CodeUsage

_DIGEST = re.compile("[0-9a-f]{64}")
Made = TypeVar("Made", bound="Autoencoder")


@dataclass(frozen=True, kw_only=True)
class Output(abc.ABC):
    """Abstract: the result of a forward pass.

    Attributes:
        distortion: −ln P_dec(y|z), nats per image, `"b"`.
        features: the parameters of the likelihood at each pixel, `"b f h w"`.
        latents: codes `"b *grid"`, int64; or vectors `"b *grid d"`.
        auxiliary: named terms to add to the training objective, each a scalar, already weighted.
        entropy: of the posterior in nats per image, `"b"`; zero where the latents were not sampled.
        log_posterior: ln P_enc(z|y) of these latents in nats per image, `"b"`; zero where they were not sampled.
    """

    distortion: Float[Tensor, " b"]
    features: Float[Tensor, "b f h w"]
    latents: Shaped[Tensor, "b *positions"]
    auxiliary: Mapping[str, Float[Tensor, ""]]
    entropy: Float[Tensor, " b"]
    log_posterior: Float[Tensor, " b"]

    @property
    @abc.abstractmethod
    def counted(self) -> Tensor:
        """What the model's `usage()` counts: codes, or the KL of each channel."""


@dataclass(frozen=True, kw_only=True)
class LikelihoodFit:
    """How the likelihood of a finished decoder was fitted to it, where that was done after training.

    Attributes:
        images: how many training images it was fitted on.
        before, after: their distortion in bits/dim with the parameters from training, and with those that are kept.
        of: digest of the decoder and the likelihood of which this is said.
    """

    images: int
    before: float
    after: float
    of: str

    def __str__(self) -> str:
        return (
            f"likelihood: fitted to the finished decoder on {self.images:,} training images, {self.before:.4f} -> "
            f"{self.after:.4f} bits/dim"
        )

    @classmethod
    def from_plain(cls, plain: Any) -> "LikelihoodFit | None":
        """What a config.json says. ValueError for anything but what `save_pretrained` writes."""
        if plain is None:
            return None
        kinds = {"images": int, "before": float, "after": float, "of": str}
        fields = plain if isinstance(plain, dict) else {}
        found = {name: type(each) for name, each in fields.items()} == kinds
        if not found or fields["images"] < 1 or not _DIGEST.fullmatch(fields["of"]):
            raise ValueError(f"got likelihood_fit {str(plain)[:100]}, expected images, before, after and a digest")
        return cls(**fields)


class Autoencoder(SavedModel):
    """Abstract: an encoder, a posterior over latents, a decoder and a likelihood.

    `Autoencoder.from_pretrained` reads a model of either kind.

    Args:
        image_size: side in pixels, or height and width, of the images it is trained on; divisible by `factor`.
        num_channels: 1 for greys, 3 for colour.
        likelihood: which likelihood of the pixels, and its options.

    Attributes:
        grid: axes of the latents of one image: of codes all of them, of vectors without their width.
        stochastic: whether there is a posterior over latents to sample from.
    """

    class Config(ConfiguredOptions):
        """Abstract: what a model is built from, as plain data."""

        @classmethod
        def meant(cls, name: str, value: Any) -> Any:
            """The side of a square image whose height and width were given; see `safefolder.Options`."""
            is_pair = name == "image_size" and isinstance(value, tuple | list) and len(value) == 2
            return value[0] if is_pair and value[0] == value[1] else value

    run_part = "codebook"
    keeps_half = False
    summary = "An image tokenizer: images to latents and back, with a likelihood of every pixel."
    pipeline_tag = "image-feature-extraction"
    _noted = ("likelihood_fit",)
    grid: tuple[int, ...]
    encoder: nn.Module
    decoder: nn.Module

    @classmethod
    def check_options(cls, options: ConfiguredOptions) -> None:
        options.put(likelihood=dataclasses.replace(options.likelihood, num_channels=options.num_channels))

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 28,
        num_channels: int = 1,
        likelihood: Likelihood.Config = LogisticMixture.Config(),
    ):
        super().__init__()
        if self.factor < 1:
            raise ValueError(f"downsampling must be a power of two from 1 on, got {self.factor}")
        check_divides(image_size, self.factor, f"downsampling {self.factor}")
        if num_channels not in (1, 3):
            raise ValueError(f"num_channels must be 1 (grey) or 3 (colour), got {num_channels}")
        self.likelihood = likelihood.build()
        self._likelihood_fit: LikelihoodFit | None = None

    @property
    def likelihood_fit(self) -> LikelihoodFit | None:
        """How the likelihood was fitted after training; None where it was not, or where other weights came since.

        `vqvae train` sets it, and it is saved beside the weights.
        """
        fit = self._likelihood_fit
        return fit if fit is not None and fit.of == self.decoding_digest() else None

    @likelihood_fit.setter
    def likelihood_fit(self, fit: LikelihoodFit | None) -> None:
        self._likelihood_fit = fit

    def decoding_digest(self) -> str:
        """64 hexadecimal digits that tell the weights of decoder and likelihood from others."""
        digest = hashlib.sha256()
        tensors = self.state_dict()
        parts = {name: each for name, each in tensors.items() if name.startswith(("decoder.", "likelihood."))}
        add_parts(digest, self, {}, parts)
        return digest.hexdigest()

    @property
    @abc.abstractmethod
    def factor(self) -> int:
        """Pixels per position of the latents along each side."""

    @abc.abstractmethod
    def make_networks(self, *, encoded: int, decoded: int) -> None:
        """Set `encoder` and `decoder`, with fresh weights.

        The encoder takes images, uint8 `"b c h w"`, to features `"b h/s w/s d"` for the factor s, with d = `encoded`;
        the decoder features with d = `decoded` to the parameters of the likelihood, `"b f h w"`.

        Raises:
            ValueError: sizes that do not fit each other.
        """

    @abc.abstractmethod
    def latent_grid(self, feature_grid: tuple[int, int]) -> tuple[int, ...]:
        """`grid` for features of these rows and columns.

        Raises:
            ValueError: the latents are of another grid alone.
        """

    def resized(self: Made, image_size: int | tuple[int, int]) -> Made:
        """A copy for images of another size: with the same weights, and the `grid` that its priors are for.

        Raises:
            ValueError: sides that the factor does not divide, or latents that are of one grid alone.
        """
        config = dataclasses.replace(self.config, image_size=image_size)
        check_divides(config.image_size, self.factor, f"{self.factor}, which the networks reduce it by")
        found = copy.deepcopy(self)
        object.__setattr__(found, "config", config)
        found.grid = found.latent_grid(found.feature_grid)
        return found

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images that it is trained on."""
        return levels.height_and_width(self.config.image_size)

    @property
    def feature_grid(self) -> tuple[int, int]:
        """Rows and columns of the encoder's features of such an image."""
        height, width = self.size
        return height // self.factor, width // self.factor

    @property
    def num_dims(self) -> int:
        """C·H·W of such an image: what bits/dim divides by."""
        return self.config.num_channels * math.prod(self.size)

    @property
    @abc.abstractmethod
    def stochastic(self) -> bool:
        """Whether there is a posterior over latents to sample from."""

    @abc.abstractmethod
    def forward(self, images: Images) -> Output:
        """Images (uint8, or float in [0, 1]) to distortion and latents; `vqvae.levels` says what they may be.

        Raises:
            ValueError: another shape, another dtype, or floats outside [0, 1].
        """

    @abc.abstractmethod
    def draw(self, images: Images, generator: torch.Generator | None = None) -> Output:
        """`forward` in evaluation, with latents sampled from the posterior P_enc(z|y). Errors as `forward`."""

    @abc.abstractmethod
    def latents(self, features: Float[Tensor, "b h2 w2 d"]) -> Shaped[Tensor, "b *positions"]:
        """The latents of the encoder's features, without draws."""

    @torch.no_grad()
    def encode(self, images: Images, *, pad: bool = False) -> Shaped[Tensor, "b *positions"]:
        """Images of any height and width to their latents, without draws: of a VQVAE its codes, int64.

        Args:
            pad: repeat the last row and column of images whose sides the factor does not divide; `decode` crops them
                again with `size`.

        Raises:
            ValueError: as `forward`.
        """
        with self.evaluating():
            return self.latents(self.encoder(self.to_levels(images, pad=pad)))

    @abc.abstractmethod
    def vectors(self, latents: Latents) -> Float[Tensor, "b h2 w2 d"]:
        """What the decoder takes, of latents on a grid of any height and width.

        Raises:
            ValueError: latents with other axes or of another type, or values that no latent has.
        """

    def through(self, prior: Any, labels: Labels | None = None, num_iterations: int | None = None) -> Any:
        """What encodes images with these labels where a prior has a say in it; most models encode without."""
        return self

    @abc.abstractmethod
    def update(self) -> None:
        """What happens once per optimiser step, after it."""

    @abc.abstractmethod
    def usage(self) -> CodeUsage | ChannelUsage:
        """An empty count of how the latents are used, to which `out.counted` of each batch is added."""

    @torch.no_grad()
    def decode(
        self,
        latents: Latents,
        *,
        size: tuple[int, int] | None = None,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> UInt8[Tensor, "b c h w"]:
        """Latents to images: the likelihood's point estimate, its mean for most, rounded to levels; or pixels sampled.

        Args:
            size: height and width of images that `encode` padded, to which they are cropped.

        Raises:
            ValueError: latents with other axes, or outside their range; or a size that is not of this grid.
        """
        vectors = self.vectors(latents)
        self.check_crop(size, vectors)
        features = self.decoder(vectors)
        images = self.likelihood.sample(features, generator) if sample else self.point_estimate(features)
        return images if size is None else images[..., : size[0], : size[1]]

    @torch.no_grad()
    def reconstruct(self, images: Images | Output, *, pad: bool = False) -> UInt8[Tensor, "b c h w"]:
        """What `decode(encode(images))` gives; of a forward pass, its point estimate, rounded to levels.

        Args:
            pad: take images of any height and width; see `encode`.
        """
        if isinstance(images, Output):
            return self.point_estimate(images.features)
        if not pad:
            return self.decode(self.encode(images))
        images = self.check_images(images)
        return self.decode(self.encode(images, pad=True), size=(images.shape[2], images.shape[3]))

    def check_crop(self, size: tuple[int, int] | None, vectors: Float[Tensor, "b h2 w2 d"]) -> None:
        """Raise ValueError unless images of this size are padded to these positions."""
        if size is None:
            return
        if not isinstance(size, Sequence) or len(size) != 2 or not all(isinstance(side, int) for side in size):
            raise ValueError(f"got size={size!r}, expected height and width, such as (192, 256)")
        most = [self.factor * side for side in vectors.shape[1:3]]
        if not all(0 <= full - side < self.factor for full, side in zip(most, size, strict=True)):
            raise ValueError(
                f"got size={tuple(size)} for latents of {vectors.shape[1]}x{vectors.shape[2]} positions, expected "
                f"sides of at most {most[0]}x{most[1]} and less than {self.factor} below"
            )

    def point_estimate(self, features: Float[Tensor, "b f h w"]) -> UInt8[Tensor, "b c h w"]:
        """The likelihood's point estimate of the decoder's features, rounded to levels."""
        return self.likelihood.point_estimate(features).round().clamp(0, 255).to(torch.uint8)

    def to_levels(self, images: Images, *, pad: bool = False) -> UInt8[Tensor, "b c h2 w2"]:
        """Check images and give them as uint8 levels; what may be given is in `vqvae.levels`.

        Those that are no tensors come on the model's device.
        """
        if not pad:
            return self.check_images(images, self.factor)
        return levels.padded(self.check_images(images), self.factor)

    def check_images(self, images: Images, factor: int = 1) -> UInt8[Tensor, "b c h w"]:
        """Check all but their size, and that `factor` divides that, and give them as uint8 levels."""
        device, channels = next(self.parameters()).device, self.config.num_channels
        return levels.to_levels(images, num_channels=channels, size=self.size, factor=factor, device=device)

    def _notes(self) -> dict[str, Any]:
        fit = self.likelihood_fit
        return {} if fit is None else {"likelihood_fit": dataclasses.asdict(fit)}

    def _read_notes(self, notes: Mapping[str, Any]) -> None:
        self.likelihood_fit = LikelihoodFit.from_plain(notes.get("likelihood_fit"))

    def card_tags(self) -> list[str]:
        return ["image-tokenizer", "vq-vae" if hasattr(self, "num_codes") else "vae"]

    def card_facts(self) -> dict[str, object]:
        (height, width), channels = self.size, self.config.num_channels
        images = f"{height} × {width}, {channels} channel{'s' if channels > 1 else ''}"
        return {"images": images, **super().card_facts()}

    def usage_lines(self) -> list[str]:
        height, width = self.size
        return [
            f"images = torch.zeros(1, {self.config.num_channels}, {height}, {width}, dtype=torch.uint8)  # yours",
            "latents = model.encode(images)",
            "again = model.decode(latents)",
        ]


def check_divides(image_size: int | tuple[int, int], factor: int, by: str) -> None:
    """Raise ValueError unless the factor, in the words of `by`, divides the sides of an image."""
    if any(side < 1 or side % factor for side in levels.height_and_width(image_size)):
        raise ValueError(f"image_size {image_size} is not a multiple of {by}; change one of them")
