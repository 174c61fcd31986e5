"""What becomes of memory that torch frees on the CPU, for programs that encode or train on batch after batch.

The C library of most Linux systems, glibc, gives buffers above 32 MiB back to the system as soon as they are freed, and
asks for the next one anew; the system then has to clear it, page by page. An activation of a large image is such a
buffer, so a network at 256x256 can spend more time on that than on its arithmetic (benchmarks/README.md).
"""

import ctypes
import os
import platform

# Of glibc's <malloc.h>; values are ints there, in bytes.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER, _LARGEST_KEPT = -1, 2**30


def keep_freed_memory() -> bool:
    """Have this process keep freed buffers of up to 1 GiB, to use them again; False where it does not.

    For programs, at their start: the `vqvae` command and `train.py` call it, an import does not. glibc keeps for its
    main thread alone; a buffer that another thread asks for is new every time.
    Results are the same to the bit. The largest memory of a process grows, mostly by a fifth, with large batches of
    large images by more. It is of glibc's malloc alone; with another, or where the environment says what malloc does
    (`MALLOC_TRIM_THRESHOLD_`, `MALLOC_MMAP_THRESHOLD_`, `GLIBC_TUNABLES` of malloc), nothing changes.
    """
    told = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys()
    if told or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
