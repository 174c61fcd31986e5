"""Images as files of bits, and files of bits as images: the ELBO as bytes."""

from vqvae.codec.codec import Codec, Compression, Cost, Decoded
from vqvae.codec.container import Archive, DamagedFile, Header, Mode, append, write
from vqvae.codec.dataset import CompressedImages
from vqvae.codec.dream import Dream, awake, bytes_for_an_image, dream
from vqvae.codec.recovery import Recovered, recover

__all__ = [
    "Archive",
    "Codec",
    "CompressedImages",
    "Compression",
    "Cost",
    "DamagedFile",
    "Decoded",
    "Dream",
    "Header",
    "Mode",
    "Recovered",
    "append",
    "awake",
    "bytes_for_an_image",
    "dream",
    "recover",
    "write",
]
