"""VQVAE: images to codes and back, with a proper likelihood (van den Oord et al. 2017).

    images ──Encoder──> z_e ──Quantizer──> codes, z_q ──Decoder──> features ──Likelihood──> −ln P_dec(y|z) in nats
      uint8              "b h w d"         int64 "b h w"            "b f H W"                 distortion, "b"

The objective of training is `(distortion / num_dims).mean() + Σ auxiliary`: nats per dimension, so that the weights of
the quantizer's terms mean the same for every image size.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

import safefolder
from vqvae import quantizers
from vqvae.decoder import Decoder
from vqvae.encoder import Encoder
from vqvae.likelihoods import CategoricalConfig, LogisticMixtureConfig, NormalConfig
from vqvae.quantizers import EMAVectorQuantizerConfig, Quantized, QuantizerConfig

LikelihoodConfig = LogisticMixtureConfig | CategoricalConfig | NormalConfig


@dataclass(frozen=True, kw_only=True)
class VQVAEConfig:
    """What a VQVAE is built from.

    Attributes:
        image_size: height and width in pixels; divisible by `downsampling`.
        num_channels: 1 for greys, 3 for colour.
        width: channels at half resolution; further levels have twice and four times as many.
        downsampling: pixels per code along each side, a power of two.
        num_blocks: residual blocks at each resolution.
        attention: self-attention at the resolution of the codes.
        quantizer: which quantizer, and its options; its `dim` is the width of `z_e`.
        likelihood: which likelihood of the pixels, and its options.
    """

    image_size: int = 28
    num_channels: int = 1
    width: int = 64
    downsampling: int = 4
    num_blocks: int = 2
    attention: bool = False
    quantizer: QuantizerConfig = field(default_factory=EMAVectorQuantizerConfig)
    likelihood: LikelihoodConfig = field(default_factory=LogisticMixtureConfig)

    def to_plain(self) -> dict[str, Any]:
        """As plain data for JSON; a part's config is told from its siblings by its class."""
        return {f.name: _to_plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "VQVAEConfig":
        """The config that `to_plain` gave.

        Raises:
            ValueError: a field or a class that this version does not know.
        """
        try:
            config = cls(**{name: _from_plain(name, value) for name, value in plain.items()})
        except (KeyError, TypeError) as error:
            raise ValueError(f"a field is missing or unknown: {error}") from error
        for name, kind in (("quantizer", QuantizerConfig), ("likelihood", LikelihoodConfig)):
            part = getattr(config, name)
            if not isinstance(part, kind):
                raise ValueError(f"{name} is {part!r}, expected the options of a {name}")
        return config


# Configs that a saved model may name: only these are ever built from a file.
_KINDS: dict[str, type] = {
    kind.__name__.removesuffix("Config"): kind
    for kind in (
        *get_args(LikelihoodConfig),
        *(getattr(quantizers, name) for name in quantizers.__all__ if name.endswith("Config")),
    )
    if kind is not QuantizerConfig
}


def _to_plain(value: Any) -> Any:
    if not dataclasses.is_dataclass(value):
        return value
    fields = {f.name: _to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return {"class": type(value).__name__.removesuffix("Config"), **fields}


def _from_plain(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, Mapping):
        return value
    fields = dict(value)
    kind = fields.pop("class")
    if kind not in _KINDS:
        raise ValueError(f"unknown {name} {kind!r}, expected one of {', '.join(_KINDS)}")
    return _KINDS[kind](**{inner: _from_plain(inner, each) for inner, each in fields.items()})


@dataclass(frozen=True, kw_only=True)
class Output:
    """The result of a forward pass.

    Attributes:
        distortion: −ln P_dec(y|z), nats per image, `"b"`.
        quantized: codes, their vectors, auxiliary terms and the state of the codebook.
        features: the parameters of the likelihood at each pixel, `"b f h w"`.
    """

    distortion: Float[Tensor, " b"]
    quantized: Quantized
    features: Float[Tensor, "b f h w"]


class VQVAE(nn.Module):
    """A tokenizer of images.

    `grid` holds the axes of the codes of one image: (h, w); (h, w, depth) for residual and grouped quantizers, and
    (places,) for a multi-scale one.

        model = VQVAE(VQVAEConfig(image_size=32, num_channels=3))
        codes = model.encode(images)          # uint8 "b 3 32 32" -> int64 "b 8 8"
        model.decode(codes)                   # uint8 "b 3 32 32", the likelihood's mean
        model(images).distortion              # nats per image, "b"

    Raises:
        ValueError: sizes that do not fit each other.
    """

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        if config.image_size < 1 or config.image_size % config.downsampling:
            raise ValueError(
                f"image_size {config.image_size} is not a multiple of downsampling {config.downsampling}; "
                "change one of them"
            )
        if config.num_channels not in (1, 3):
            raise ValueError(f"num_channels must be 1 (grey) or 3 (colour), got {config.num_channels}")
        if config.width < 1 or config.num_blocks < 0:
            raise ValueError(
                f"expected width >= 1 and num_blocks >= 0, got width={config.width}, num_blocks={config.num_blocks}"
            )
        self.config = config
        self.likelihood = config.likelihood.build(config.num_channels)
        self.quantizer = config.quantizer.build()
        sizes: dict[str, Any] = {
            "dim": self.quantizer.dim,
            "width": config.width,
            "downsampling": config.downsampling,
            "num_blocks": config.num_blocks,
            "attention": config.attention,
        }
        self.grid = self.quantizer.code_grid((config.image_size // config.downsampling,) * 2)
        self.encoder = Encoder(num_channels=config.num_channels, **sizes)
        self.decoder = Decoder(num_features=self.likelihood.num_features, **sizes)

    @property
    def num_codes(self) -> int:
        return self.quantizer.num_codes

    @property
    def num_dims(self) -> int:
        """C·H·W of an image: what bits/dim divides by."""
        return self.config.num_channels * self.config.image_size**2

    def forward(self, images: UInt8[Tensor, "b c h w"] | Float[Tensor, "b c h w"]) -> Output:
        """Images (uint8, or float in [0, 1]) to distortion and codes.

        Raises:
            ValueError: another shape, another dtype, or floats outside [0, 1].
        """
        levels = self.to_levels(images)
        quantized = self.quantizer(self.encoder(levels))
        features = self.decoder(quantized.z_q)
        distortion = -self.likelihood.log_prob(levels, features)
        return Output(distortion=distortion, quantized=quantized, features=features)

    @property
    def stochastic(self) -> bool:
        """Whether there is a posterior over codes to draw from."""
        return self.quantizer.stochastic

    @torch.no_grad()
    def draw(
        self,
        images: UInt8[Tensor, "b c h w"] | Float[Tensor, "b c h w"],
        generator: torch.Generator | None = None,
    ) -> Output:
        """`forward` in evaluation, with codes drawn from the posterior P_enc(z|y). Errors as `forward`."""
        with _Evaluating(self):
            levels = self.to_levels(images)
            quantized = self.quantizer.draw(self.encoder(levels), generator=generator)
            features = self.decoder(quantized.z_q)
            distortion = -self.likelihood.log_prob(levels, features)
            return Output(distortion=distortion, quantized=quantized, features=features)

    @torch.no_grad()
    def encode(self, images: UInt8[Tensor, "b c h w"] | Float[Tensor, "b c h w"]) -> Int[Tensor, "b *grid"]:
        """Images to their codes, int64. Errors as `forward`."""
        with _Evaluating(self):
            return self.quantizer(self.encoder(self.to_levels(images))).codes

    @torch.no_grad()
    def decode(
        self,
        codes: Int[Tensor, "b *grid"],
        *,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> UInt8[Tensor, "b c h w"]:
        """Codes to images: the likelihood's mean rounded to levels, or pixels drawn from it.

        Raises:
            ValueError: codes of another grid, or outside the codebook.
        """
        if tuple(codes.shape[1:]) != self.grid:
            raise ValueError(f"expected codes of shape (b, {', '.join(map(str, self.grid))}), got {tuple(codes.shape)}")
        features = self.decoder(self.quantizer.decode(codes))
        if sample:
            return self.likelihood.sample(features, generator)
        return self._mean_levels(features)

    @torch.no_grad()
    def reconstruct(self, out: Output) -> UInt8[Tensor, "b c h w"]:
        """The likelihood's mean of a forward pass, rounded to levels: what `decode(encode(images))` gives."""
        return self._mean_levels(out.features)

    def _mean_levels(self, features: Tensor) -> Tensor:
        return self.likelihood.mean(features).round().clamp(0, 255).to(torch.uint8)

    def to_levels(self, images: Tensor) -> UInt8[Tensor, "b c h w"]:
        """Check images and give them as uint8 levels."""
        size = self.config.image_size
        expected = (self.config.num_channels, size, size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"expected images of shape (b, {', '.join(map(str, expected))}), got {tuple(images.shape)}"
            )
        if images.dtype == torch.uint8:
            return images
        if not images.is_floating_point():
            raise ValueError(f"expected images as uint8, or as floats in [0, 1], got {images.dtype}")
        if images.numel():
            low, high = images.aminmax()
            if not (low >= 0 and high <= 1):  # also False for NaN
                raise ValueError(
                    f"float images must lie in [0, 1], got {float(low):.4g} to {float(high):.4g}; "
                    "undo the normalisation, or pass uint8"
                )
        return (images.float() * 255).round().to(torch.uint8)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into `folder`, atomically."""
        safefolder.save(Path(folder), {"class": "VQVAE", **self.config.to_plain()}, self.state_dict())

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "VQVAE":
        """Read a model from a folder or a hub id; it comes in eval mode.

        Raises:
            ValueError: missing, corrupt, of another kind, or with weights that do not fit.
        """
        config, tensors = safefolder.load(source)
        if config["class"] != "VQVAE":
            raise ValueError(f"{source} holds a {config['class']}, expected a VQVAE")
        fields = {name: value for name, value in config.items() if name not in ("format", "class")}
        try:
            model = cls(VQVAEConfig.from_plain(fields))
        except ValueError as error:
            raise ValueError(f"{source}: config.json does not fit VQVAE: {error}") from error
        safefolder.load_weights(model, tensors, source)
        return model.eval()


class _Evaluating:
    """A module in eval mode for a while."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __enter__(self) -> None:
        self.was_training = self.module.training
        if self.was_training:
            self.module.eval()

    def __exit__(self, *_: object) -> None:
        if self.was_training:
            self.module.train()
