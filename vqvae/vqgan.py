"""VQGAN: a VQVAE with the networks of the public tokenizers (Esser et al. 2021, "Taming Transformers").

`vqvae.vqgan_networks` has the networks. Those who made the public models trained them with perceptual and adversarial
losses; here one is a `VQVAE` like any other: its likelihood is a discretised normal around the picture that its decoder
gives, so that it has a distortion in nats, and it can be trained on by that.

`vqvae.interop` reads and writes the files of such models.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from safefolder import Options
from vqvae.config import LikelihoodConfig
from vqvae.likelihoods import NormalConfig
from vqvae.model import VQVAE, CodesConfig
from vqvae.vqgan_networks import SPATIAL_GROUPS, VQGANDecoder, VQGANEncoder


@dataclass(frozen=True, kw_only=True)
class DiffusersConfig(Options):
    """What a `VQModel` config tells diffusers' pipelines; nothing here reads it, and an export writes it as it came.

    Attributes:
        scaling_factor: what a diffusion model's pipeline multiplies `z_e` by.
        lookup_from_codebook: whether `VQModel.decode(..., force_not_quantize=True)` takes codes, not vectors.
        force_upcast: whether a pipeline in float16 runs this model in float32.
        sample_size: pixels along a side, as the file has it, which many files have wrong; None is `image_size`.
    """

    scaling_factor: float = 0.18215
    lookup_from_codebook: bool = False
    force_upcast: bool = False
    sample_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class VQGANConfig(CodesConfig):
    """What a VQGAN is built from. Its networks are convolutional: any multiple of `factor` is an `image_size`.

    Attributes:
        channels: of each level, from the finest on; each level but the first halves the resolution.
        num_blocks: residual blocks at each level of the encoder; the decoder has one more.
        down_attention: levels of the encoder with attention after each residual block, ascending; 0 is the finest.
        up_attention: the same of the decoder; levels are counted from the finest there too.
        mid_attention: attention at the resolution of the codes, in both.
        latent_channels: width of the encoder's and decoder's own ends, which a 1×1 convolution maps to the quantizer's.
        spatial_norm: the decoder's norms are MoVQ's.
        num_groups: of the other norms; divides every width.
        diffusers: for the way back to diffusers, if it came from there.

    Raises:
        ValueError: no level, levels that are not there, widths that the groups do not divide, an image that cannot be
            halved so often.
    """

    image_size: int = 256
    num_channels: int = 3
    likelihood: LikelihoodConfig = field(default_factory=NormalConfig)
    channels: tuple[int, ...] = (128, 128, 256, 256, 512)
    num_blocks: int = 2
    down_attention: tuple[int, ...] = ()
    up_attention: tuple[int, ...] = ()
    mid_attention: bool = True
    latent_channels: int = 256
    spatial_norm: bool = False
    num_groups: int = 32
    diffusers: DiffusersConfig = field(default_factory=DiffusersConfig)

    parts: ClassVar[Mapping[str, tuple[type, ...]]] = {**CodesConfig.parts, "diffusers": (DiffusersConfig,)}

    def __post_init__(self) -> None:
        if not self.channels or min(self.num_blocks, self.latent_channels, self.num_groups) < 1:
            raise ValueError(
                f"got channels={self.channels}, num_blocks={self.num_blocks}, latent_channels={self.latent_channels}, "
                f"num_groups={self.num_groups}, expected one level and one of each at least"
            )
        if self.image_size < 1 or self.image_size % self.factor:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of {self.factor}, by which the networks reduce it, "
                f"having {len(self.channels)} levels; change one of them"
            )
        groups = {"num_groups": self.num_groups}
        if self.spatial_norm:
            groups["the groups of spatial norms"] = SPATIAL_GROUPS
        for name, number in groups.items():
            if any(width < 1 or width % number for width in self.channels):
                raise ValueError(
                    f"got channels={self.channels}, expected multiples of {name}, {number}; change one of them"
                )
        for name in ("down_attention", "up_attention"):
            levels = getattr(self, name)
            if list(levels) != sorted(set(levels) & set(range(len(self.channels)))):
                raise ValueError(
                    f"got {name}={levels}, expected levels from 0 (finest) to {len(self.channels) - 1}, ascending"
                )

    @property
    def factor(self) -> int:
        return 2 ** (len(self.channels) - 1)

    def networks(self, *, encoded: int, decoded: int, num_features: int) -> tuple[VQGANEncoder, VQGANDecoder]:
        return (
            VQGANEncoder(
                num_channels=self.num_channels,
                dim=encoded,
                channels=self.channels,
                num_blocks=self.num_blocks,
                attention=self.down_attention,
                mid_attention=self.mid_attention,
                latent_channels=self.latent_channels,
                num_groups=self.num_groups,
            ),
            VQGANDecoder(
                num_features=num_features,
                dim=decoded,
                channels=self.channels,
                num_blocks=self.num_blocks,
                attention=self.up_attention,
                mid_attention=self.mid_attention,
                latent_channels=self.latent_channels,
                spatial_norm=self.spatial_norm,
                num_groups=self.num_groups,
            ),
        )

    def build(self) -> "VQGAN":
        """The model, with fresh weights. Errors as `VQVAE`."""
        return VQGAN(self)


class VQGAN(VQVAE):
    """A `VQVAE` with VQGAN's networks.

        model = import_diffusers("owner/name", subfolder="vqvae", image_size=256)
        codes = model.encode(images)          # uint8 "b 3 256 256" -> int64 "b 16 16"
        model.decode(codes)                   # uint8 "b 3 256 256", the picture that the decoder gives

    `VQVAE.from_pretrained` reads it too.
    """

    config_class: ClassVar[type[CodesConfig]] = VQGANConfig
