"""Whether a PNG is whole, by the checksums that it brings.

    signature, 8 bytes;  then chunks:  length (4 bytes), kind (4), data (length), CRC-32 of kind and data (4)

Pillow does not look at those of the pixels (IDAT), and reads a damaged file with other pixels.
(W3C, "Portable Network Graphics (PNG) Specification", chapter 5.)
"""

import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Beside a chunk's data.
_AROUND = 12


def damage(data: bytes) -> str:
    """What is wrong with the chunks of a PNG, in words; "" where nothing is.

    What follows the last chunk (IEND) is no part of the image. Where that is missing all that could be known of the
    pixels is there or not, which the decoder sees.
    """
    view = memoryview(data)
    at = len(SIGNATURE)
    while at + _AROUND <= len(view):
        end = at + _AROUND + int.from_bytes(view[at : at + 4])
        kind = bytes(view[at + 4 : at + 8])
        if end > len(view):
            return f"the PNG is truncated: its chunk at byte {at:,} lacks {end - len(view):,} bytes"
        if zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(view[end - 4 : end]):
            return f"the PNG is damaged: the checksum of its chunk at byte {at:,} does not fit"
        if kind == b"IEND":
            break
        at = end
    return ""
