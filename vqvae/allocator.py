"""What becomes of memory that torch frees on the CPU, for programs that encode or train on batch after batch.

The C library of most Linux systems, glibc, gives buffers above 32 MiB back to the system as soon as they are freed, and
asks for the next one anew; the system then has to clear it, page by page. An activation of a large image is such a
buffer, so a network at 256x256 can spend more time on that than on its arithmetic (benchmarks/README.md).
"""

import ctypes
import platform

# Of glibc's <malloc.h>; both values are ints there, in bytes.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT, _MOST_KEPT = 2**30, 2**31 - 1


def keep_freed_memory() -> bool:
    """Have this process use freed buffers of up to 1 GiB again, and keep 2 GiB of free memory; False where it cannot.

    For programs, at their start: the `vqvae` command, `train.py` and the encoders on Ray call it, an import does not.
    Results are the same to the bit. A process takes up to a third more memory. It is of glibc's malloc alone; where
    there is another, nothing changes.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT) and mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT))
