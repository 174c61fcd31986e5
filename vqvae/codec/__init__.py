"""Images as files of bits, and files of bits as images: the ELBO as bytes.

    codec.py              Codec: images to files and back
    dataset.py            CompressedImages: a file as a dataset of torch
    dreaming.py           dream, images out of any bytes, and undream, these bytes again
    block_decoder.py      the contents of blocks to images: DecodedBlock
    bits_back.py          tiles coded with bits back
    tile_coder.py         tiles to intervals, TileIntervals, and streams to tiles
    block.py              what is in a block: BlockContent
    recovery.py           the blocks of a damaged file that are whole
    model_fingerprint.py  which model and prior a file belongs to
    pixels.py             what a caller has for an image
    coder.py              intervals to bytes and back: a range coder, and a stack
    archive.py            files of blocks: opened, written, added to
    container.py          their layout: header, blocks, index
    tiles.py              Tiling: an image as tiles and back
    integer_tables.py     conditionals and CDFs as integer tables, which are the same on every machine
    storage.py            where the bytes of a file are

Words, each with one meaning here. A **file** is a header, **blocks** and an index. A block is a whole number of images
that are coded together: a head (marker, length, check) and its **content**, bytes of which `archive.py` reads no more
than the number of images, and which `block.py` takes apart. A **tile** is the part of an image that is coded at once,
of the model's size; a **tiling** says how an image is cut into them. A prior gives **conditionals**, real numbers; an
**integer table** has the widths of a symbol's intervals, whole numbers that add up to 2^24. An **incompressible** tile
costs no less than its pixels, or would not come back the same everywhere: it is **stored** as it is.
"""

from vqvae.codec.archive import Archive, write
from vqvae.codec.codec import Codec, Compression
from vqvae.codec.container import DamagedFile, Mode
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
