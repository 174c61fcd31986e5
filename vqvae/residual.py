"""Autoencoders with the residual networks of `vqvae.networks.encoder` and `vqvae.networks.decoder`."""

from collections.abc import Mapping
from typing import Any, ClassVar

from vqvae.autoencoder import Autoencoder
from vqvae.networks.decoder import Decoder
from vqvae.networks.encoder import Encoder


class ResidualAutoencoder(Autoencoder):
    """Abstract: an autoencoder whose networks are residual convolutions.

    Args:
        width: channels at half resolution; further levels have twice and four times as many.
        downsampling: pixels per position of the latents along each side, a power of two.
        num_blocks: residual blocks at each resolution.
        attention: self-attention at the resolution of the latents.
        smooth: a decoder that interpolates where it doubles, so that photographs start without a lattice of pixels.
    """

    later_options: ClassVar[Mapping[str, Any]] = {"smooth": False}

    def __init__(
        self,
        *,
        width: int = 64,
        downsampling: int = 4,
        num_blocks: int = 2,
        attention: bool = False,
        smooth: bool = False,
        **images: Any,
    ):
        if width < 1 or num_blocks < 0:
            raise ValueError(f"expected width >= 1 and num_blocks >= 0, got width={width}, num_blocks={num_blocks}")
        super().__init__(**images)

    @property
    def factor(self) -> int:
        return self.config.downsampling

    def make_networks(self, *, encoded: int, decoded: int) -> None:
        sizes = {name: getattr(self.config, name) for name in ("width", "downsampling", "num_blocks", "attention")}
        self.encoder = Encoder(num_channels=self.config.num_channels, dim=encoded, **sizes)
        self.decoder = Decoder(
            num_features=self.likelihood.num_features, dim=decoded, smooth=self.config.smooth, **sizes
        )
