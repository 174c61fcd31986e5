"""What every model here is: images to latents and back, with a proper likelihood of the pixels.

    images ──Encoder──> features ──posterior──> latents ──Decoder──> features ──Likelihood──> −ln P_dec(y|z) in nats
      uint8              "b h w d"                "b *grid", or "b *grid d"     "b f H W"       distortion, "b"

`vqvae.model` has codes between encoder and decoder, `vqvae.gaussian` real vectors; all else is shared and lies here.

The objective of training is `(distortion / num_dims).mean() + Σ auxiliary`: nats per dimension, so that the weights of
the auxiliary terms mean the same for every image size.
"""

import abc
import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, Unpack

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor, nn

import safefolder
from safefolder.arrays import Labels, Latents
from vqvae import levels
from vqvae.config import AutoencoderConfig
from vqvae.levels import Images
from vqvae.metrics import ChannelUsage, CodeUsage

AnyAutoencoder = TypeVar("AnyAutoencoder", bound="Autoencoder")
AnyConfig = TypeVar("AnyConfig", bound=AutoencoderConfig)


@dataclass(frozen=True, kw_only=True)
class Output(abc.ABC):
    """Abstract: the result of a forward pass.

    Attributes:
        distortion: −ln P_dec(y|z), nats per image, `"b"`.
        features: the parameters of the likelihood at each pixel, `"b f h w"`.
        latents: codes `"b *grid"`, int64; or vectors `"b *grid d"`.
        auxiliary: named terms to add to the training objective, each a scalar, already weighted.
        entropy: of the posterior in nats per image, `"b"`; zero where the latents were not drawn.
        log_posterior: ln P_enc(z|y) of these latents in nats per image, `"b"`; zero where they were not drawn.
    """

    distortion: Float[Tensor, " b"]
    features: Float[Tensor, "b f h w"]
    latents: Shaped[Tensor, "b *places"]
    auxiliary: Mapping[str, Float[Tensor, ""]]
    entropy: Float[Tensor, " b"]
    log_posterior: Float[Tensor, " b"]

    @property
    @abc.abstractmethod
    def counted(self) -> Tensor:
        """What the model's `usage()` counts: codes, or the KL of each channel."""


class Autoencoder(nn.Module, abc.ABC, Generic[AnyConfig]):
    """Abstract: an encoder, a posterior over latents, a decoder and a likelihood.

    `Autoencoder.from_pretrained` reads a model of either kind.

    Attributes:
        config: what it is built from.
        grid: axes of the latents of one image: of codes all of them, of vectors without their width.
        stochastic: whether there is a posterior over latents to draw from.
    """

    config_class: ClassVar[type[AutoencoderConfig]]
    config: AnyConfig
    grid: tuple[int, ...]
    encoder: nn.Module
    decoder: nn.Module

    def __init__(self, config: AnyConfig):
        super().__init__()
        if type(config) is not self.config_class:
            raise ValueError(
                f"{type(self).__name__} is built from a {self.config_class.__name__}, got a {type(config).__name__}: "
                "call its build()"
            )
        if config.factor < 1:
            raise ValueError(f"downsampling must be a power of two from 1 on, got {config.factor}")
        if config.image_size < 1 or config.image_size % config.factor:
            raise ValueError(
                f"image_size {config.image_size} is not a multiple of downsampling {config.factor}; change one of them"
            )
        if config.num_channels not in (1, 3):
            raise ValueError(f"num_channels must be 1 (grey) or 3 (colour), got {config.num_channels}")
        self.config = config
        self.likelihood = config.likelihood.build(config.num_channels)

    def make_networks(self, *, encoded: int, decoded: int) -> None:
        """Encoder and decoder of the config, for features of these widths out of the one and into the other."""
        self.encoder, self.decoder = self.config.networks(
            encoded=encoded, decoded=decoded, num_features=self.likelihood.num_features
        )

    @property
    def side(self) -> int:
        """Places along each side of the encoder's features."""
        return self.config.image_size // self.config.factor

    @property
    def num_dims(self) -> int:
        """C·H·W of an image: what bits/dim divides by."""
        return self.config.num_channels * self.config.image_size**2

    @property
    @abc.abstractmethod
    def stochastic(self) -> bool:
        """Whether there is a posterior over latents to draw from."""

    @abc.abstractmethod
    def forward(self, images: Images) -> Output:
        """Images (uint8, or float in [0, 1]) to distortion and latents; `vqvae.levels` says what they may be.

        Raises:
            ValueError: another shape, another dtype, or floats outside [0, 1].
        """

    @abc.abstractmethod
    def draw(
        self,
        images: Images,
        generator: torch.Generator | None = None,
    ) -> Output:
        """`forward` in evaluation, with latents drawn from the posterior P_enc(z|y). Errors as `forward`."""

    @abc.abstractmethod
    def encode(self, images: Images) -> Shaped[Tensor, "b *places"]:
        """Images to their latents, without draws. Errors as `forward`."""

    @abc.abstractmethod
    def vectors(self, latents: Latents) -> Float[Tensor, "b h2 w2 d"]:
        """What the decoder takes, of latents.

        Raises:
            ValueError: latents of another shape or type, or values that no latent has.
        """

    def through(self, prior: Any, labels: Labels | None = None, num_sweeps: int | None = None) -> Any:
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
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> UInt8[Tensor, "b c h w"]:
        """Latents to images: the likelihood's point, which is its mean for most, rounded to levels; or pixels drawn.

        Raises:
            ValueError: latents of another grid, or outside their range.
        """
        features = self.decoder(self.vectors(latents))
        if sample:
            return self.likelihood.sample(features, generator)
        return self._levels(features)

    @torch.no_grad()
    def reconstruct(self, images: Images | Output) -> UInt8[Tensor, "b c h w"]:
        """What `decode(encode(images))` gives; of a forward pass, the likelihood's point, rounded to levels."""
        if isinstance(images, Output):
            return self._levels(images.features)
        return self.decode(self.encode(images))

    def _levels(self, features: Tensor) -> Tensor:
        return self.likelihood.point(features).round().clamp(0, 255).to(torch.uint8)

    def to_levels(self, images: Images) -> UInt8[Tensor, "b c h w"]:
        """Check images and give them as uint8 levels; what may be given is in `vqvae.levels`.

        Those that are no tensors come on the model's device.
        """
        size, channels = self.config.image_size, self.config.num_channels
        return levels.to_levels(images, num_channels=channels, size=size, device=next(self.parameters()).device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into `folder`, atomically."""
        safefolder.save(Path(folder), {"class": type(self).__name__, **self.config.to_plain()}, self.state_dict())

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        figures: Mapping[str, Any] | None = None,
    ) -> str:
        """Put the model and its card on the hub, in one commit, and say where; see `safefolder.push`."""
        return safefolder.push_pretrained(
            self, repo_id, private=private, revision=revision, token=token, figures=figures
        )

    def card_facts(self) -> dict[str, object]:
        """What a model card says that it is made of."""
        size, channels = self.config.image_size, self.config.num_channels
        images = f"{size} × {size}, {channels} channel{'s' if channels > 1 else ''}"
        return {"images": images, **safefolder.model_facts(self)}

    def model_card(
        self, figures: Mapping[str, Any] | None = None, *, source: str = "owner/name", revision: str | None = None
    ) -> str:
        """The README.md of the model on the hub at `source`, with figures where some were measured, as in elbo.json."""
        kind, size = type(self), self.config.image_size
        usage = safefolder.python(
            "import torch",
            "",
            safefolder.import_line(kind),
            "",
            f"model = {safefolder.loading(kind, source, revision=revision)}",
            f"images = torch.zeros(1, {self.config.num_channels}, {size}, {size}, dtype=torch.uint8)  # yours",
            "latents = model.encode(images)",
            "again = model.decode(latents)",
        )
        return safefolder.card(
            title=source.rpartition("/")[2],
            summary="An image tokenizer: images to latents and back, with a likelihood of every pixel.",
            facts=self.card_facts(),
            usage=usage,
            tags=["image-tokenizer", "vq-vae" if hasattr(self, "num_codes") else "vae"],
            figures=figures,
            pipeline_tag="image-feature-extraction",
        )

    @classmethod
    def from_pretrained(
        cls: type[AnyAutoencoder], source: str | Path, **hub: Unpack[safefolder.HubOptions]
    ) -> AnyAutoencoder:
        """Read a model from its folder, from that of a run, or from a hub id; it comes in eval mode, on the CPU.

        Its weights are float32, or float64 where they were saved so; nothing else that the caller has set plays a
        part. `hub` says which revision, which folder inside, and how it is fetched: `safefolder.HubOptions`.

        Raises:
            ValueError: missing, corrupt, of another kind, or with weights that do not fit.
        """
        config, tensors = safefolder.load(source, part="codebook", **hub)
        kinds = {kind.__name__: kind for kind in _concrete(cls)}
        kind = kinds.get(config["class"])
        if kind is None:
            raise ValueError(f"{source} holds a {config['class']}, expected a {' or '.join(kinds)}")
        fields = {name: value for name, value in config.items() if name not in ("format", "class")}

        def make() -> AnyAutoencoder:
            return kind(kind.config_class.from_plain(fields))

        return safefolder.build(make, kind.__name__, tensors, source, keep_type=False)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """In eval mode inside; after it every part is in the mode that it was in. Not for several threads."""
        training = [part for part in self.modules() if part.training]
        try:
            for part in training:
                part.training = False
            yield
        finally:
            for part in training:
                part.training = True


def _concrete(kind: type[AnyAutoencoder]) -> Iterator[type[AnyAutoencoder]]:
    if not inspect.isabstract(kind):
        yield kind
    for below in kind.__subclasses__():
        yield from _concrete(below)
