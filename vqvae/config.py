"""What models are built from: sizes, networks and likelihood, as plain data that a config.json holds.

    AutoencoderConfig      what every model has; its networks are for subclasses to say
    ResidualConfig         with the networks of `vqvae.encoder` and `vqvae.decoder`

`vqvae.model`, `vqvae.gaussian` and `vqvae.vqgan` have the configs that can be built. What people mean is taken, see
`safefolder.options`: `VQVAEConfig(image_size=(64, 64), quantizer="FSQ", likelihood="Normal")` has an `image_size` of
64, and the defaults of each kind.
"""

import abc
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, get_args

from torch import nn

from safefolder.options import Options, shown
from vqvae.decoder import Decoder
from vqvae.encoder import Encoder
from vqvae.likelihoods import CategoricalConfig, LocalContextConfig, LogisticMixtureConfig, NormalConfig

LikelihoodConfig = LogisticMixtureConfig | LocalContextConfig | CategoricalConfig | NormalConfig
AnyConfig = TypeVar("AnyConfig", bound="AutoencoderConfig")


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(Options):
    """Abstract: what encoder, decoder and likelihood are built from.

    Attributes:
        image_size: height and width in pixels; divisible by `factor`.
        num_channels: 1 for greys, 3 for colour.
        likelihood: which likelihood of the pixels, and its options.
    """

    image_size: int = 28
    num_channels: int = 1
    likelihood: LikelihoodConfig = field(default_factory=LogisticMixtureConfig)

    # The fields that are configs themselves, and the kinds each may be: only these are ever built from a file.
    parts: ClassVar[Mapping[str, tuple[type, ...]]] = {"likelihood": get_args(LikelihoodConfig)}

    @classmethod
    def meant(cls, name: str, value: Any) -> Any:
        """The side of an image whose height and width were given; see `safefolder.Options`."""
        if name != "image_size" or not isinstance(value, tuple | list) or len(value) != 2:
            return value
        if value[0] != value[1]:
            raise ValueError(
                f"got image_size={shown(value)}, expected one number, as images are square: crop or scale them to that"
            )
        return value[0]

    @property
    @abc.abstractmethod
    def factor(self) -> int:
        """Pixels per place of the latents along each side."""

    @abc.abstractmethod
    def networks(self, *, encoded: int, decoded: int, num_features: int) -> tuple[nn.Module, nn.Module]:
        """An encoder and a decoder with fresh weights.

        The encoder takes images, uint8 `"b c h w"`, to features `"b h/s w/s d"` for the factor s, with d = `encoded`;
        the decoder features with d = `decoded` to `num_features` parameters of the likelihood, `"b f h w"`.

        Raises:
            ValueError: sizes that do not fit each other.
        """

    @abc.abstractmethod
    def build(self) -> nn.Module:
        """The model, with fresh weights.

        Raises:
            ValueError: sizes that do not fit each other.
        """

    def to_plain(self) -> dict[str, Any]:
        """As plain data for JSON; a part's config is told from its siblings by its class."""
        return {f.name: _to_plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_plain(cls: type[AnyConfig], plain: Mapping[str, Any]) -> AnyConfig:
        """The config that `to_plain` gave.

        Raises:
            ValueError: a field or a class that this version does not know.
        """
        try:
            config = cls(**{name: _from_plain(name, value, cls.parts.get(name, ())) for name, value in plain.items()})
        except (KeyError, TypeError) as error:
            raise ValueError(f"a field is missing or unknown: {error}") from error
        for name, kinds in cls.parts.items():
            part = getattr(config, name)
            if not isinstance(part, kinds):
                raise ValueError(f"{name} is {part!r}, expected the options of a {name}")
        return config


def _to_plain(value: Any) -> Any:
    if not dataclasses.is_dataclass(value):
        return value
    fields = {f.name: _to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return {"class": type(value).__name__.removesuffix("Config"), **fields}


def _from_plain(name: str, value: Any, kinds: tuple[type, ...]) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, Mapping):
        return value
    fields = dict(value)
    chosen = fields.pop("class")
    known = {kind.__name__.removesuffix("Config"): kind for kind in kinds}
    if chosen not in known:
        raise ValueError(f"unknown {name} {chosen!r}, expected one of {', '.join(known)}")
    # A quantizer's own parts are quantizers.
    return known[chosen](**{inner: _from_plain(inner, each, kinds) for inner, each in fields.items()})


@dataclass(frozen=True, kw_only=True)
class ResidualConfig(AutoencoderConfig, abc.ABC):
    """Abstract: the residual networks of `vqvae.encoder` and `vqvae.decoder`.

    Attributes:
        width: channels at half resolution; further levels have twice and four times as many.
        downsampling: pixels per place of the latents along each side, a power of two.
        num_blocks: residual blocks at each resolution.
        attention: self-attention at the resolution of the latents.
    """

    width: int = 64
    downsampling: int = 4
    num_blocks: int = 2
    attention: bool = False

    @property
    def factor(self) -> int:
        return self.downsampling

    def networks(self, *, encoded: int, decoded: int, num_features: int) -> tuple[Encoder, Decoder]:
        if self.width < 1 or self.num_blocks < 0:
            raise ValueError(
                f"expected width >= 1 and num_blocks >= 0, got width={self.width}, num_blocks={self.num_blocks}"
            )
        sizes: dict[str, Any] = {
            "width": self.width,
            "downsampling": self.downsampling,
            "num_blocks": self.num_blocks,
            "attention": self.attention,
        }
        return (
            Encoder(num_channels=self.num_channels, dim=encoded, **sizes),
            Decoder(num_features=num_features, dim=decoded, **sizes),
        )
