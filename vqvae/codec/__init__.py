"""Images as files of bits, and files of bits as images: the ELBO as bytes."""

from vqvae.codec.codec import Codec, Compression
from vqvae.codec.container import Archive, DamagedFile, Mode, write
from vqvae.codec.dataset import CompressedImages
from vqvae.codec.dreaming import Dream, dream
from vqvae.codec.recovery import recover

__all__ = [
    "Archive",
    "Codec",
    "CompressedImages",
    "Compression",
    "DamagedFile",
    "Dream",
    "Mode",
    "dream",
    "recover",
    "write",
]
