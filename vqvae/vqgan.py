"""VQGAN: a VQVAE with the networks of the public tokenizers (Esser et al. 2021, "Taming Transformers").

`vqvae.networks.vqgan` has the networks. Those who made the public models trained them with perceptual and adversarial
losses; here one is a `VQVAE` like any other: its likelihood is a discretised normal around the picture that its decoder
gives, so that it has a distortion in nats, and it can be trained on by that.

`vqvae.interop` reads and writes the files of such models.
"""

from dataclasses import dataclass

from safefolder import Options
from safefolder.configured import ConfiguredOptions
from vqvae.autoencoder import check_divides
from vqvae.likelihoods import Likelihood, Normal
from vqvae.model import VQVAE
from vqvae.networks.vqgan import SPATIAL_GROUPS, VQGANDecoder, VQGANEncoder
from vqvae.quantizers import EMAVectorQuantizer, Quantizer


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


class VQGAN(VQVAE):
    """A `VQVAE` with VQGAN's networks. They are convolutional: any multiple of `factor` is an `image_size`.

        model = import_diffusers("owner/name", subfolder="vqvae", image_size=256)
        codes = model.encode(images)          # uint8 "b 3 256 256" -> int64 "b 16 16"
        model.decode(codes)                   # uint8 "b 3 256 256", the picture that the decoder gives

    `VQVAE.from_pretrained` reads it too. Beside these it has the options `image_size`, `num_channels`, `likelihood`,
    `quantizer` and `beta` of a `VQVAE`.

    Args:
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

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 256,
        num_channels: int = 3,
        likelihood: Likelihood.Config = Normal.Config(),
        quantizer: Quantizer.Config = EMAVectorQuantizer.Config(),
        beta: float | None = None,
        channels: tuple[int, ...] = (128, 128, 256, 256, 512),
        num_blocks: int = 2,
        down_attention: tuple[int, ...] = (),
        up_attention: tuple[int, ...] = (),
        mid_attention: bool = True,
        latent_channels: int = 256,
        spatial_norm: bool = False,
        num_groups: int = 32,
        diffusers: DiffusersConfig = DiffusersConfig(),
    ):
        super().__init__(
            image_size=image_size, num_channels=num_channels, likelihood=likelihood, quantizer=quantizer, beta=beta
        )

    @classmethod
    def check_options(cls, options: ConfiguredOptions) -> None:
        super().check_options(options)
        if not options.channels or min(options.num_blocks, options.latent_channels, options.num_groups) < 1:
            raise ValueError(
                f"got channels={options.channels}, num_blocks={options.num_blocks}, "
                f"latent_channels={options.latent_channels}, num_groups={options.num_groups}, expected one level and "
                "one of each at least"
            )
        factor, num_levels = _factor(options), len(options.channels)
        check_divides(
            options.image_size, factor, f"{factor}, by which the networks reduce it, having {num_levels} levels"
        )
        groups = {"num_groups": options.num_groups}
        if options.spatial_norm:
            groups["the groups of spatial norms"] = SPATIAL_GROUPS
        for name, number in groups.items():
            if any(width < 1 or width % number for width in options.channels):
                raise ValueError(
                    f"got channels={options.channels}, expected multiples of {name}, {number}; change one of them"
                )
        for name in ("down_attention", "up_attention"):
            levels = getattr(options, name)
            if list(levels) != sorted(set(levels) & set(range(len(options.channels)))):
                raise ValueError(
                    f"got {name}={levels}, expected levels from 0 (finest) to {len(options.channels) - 1}, ascending"
                )

    @property
    def factor(self) -> int:
        return _factor(self.config)

    def make_networks(self, *, encoded: int, decoded: int) -> None:
        config = self.config
        names = ("channels", "num_blocks", "mid_attention", "latent_channels", "num_groups")
        sizes = {name: getattr(config, name) for name in names}
        self.encoder = VQGANEncoder(
            num_channels=config.num_channels, dim=encoded, attention=config.down_attention, **sizes
        )
        self.decoder = VQGANDecoder(
            num_features=self.likelihood.num_features,
            dim=decoded,
            attention=config.up_attention,
            spatial_norm=config.spatial_norm,
            **sizes,
        )


def _factor(options: ConfiguredOptions) -> int:
    return 2 ** (len(options.channels) - 1)
