"""Freed memory is used again, and an import of the library changes nothing of it."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
import vqvae, priors
from vqvae.allocator import keep_freed_memory

if sys.argv[1] != "plain":
    assert keep_freed_memory() == (sys.argv[1] == "keep")
torch.set_num_threads(1)
faults = []
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB: 16,384 pages
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again_where_a_program_asks_for_it():
    command = [sys.executable, "-c", FAULTS]
    kept, plain, told = (
        int(subprocess.run([*command, word], env=said, capture_output=True, text=True, check=True).stdout)
        for word, said in (("keep", {}), ("plain", {}), ("told", {"MALLOC_MMAP_THRESHOLD_": "1000000"}))
    )
    assert kept < 1000 < plain
    assert told > 1000  # what the user says stays
