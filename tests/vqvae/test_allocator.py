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

if sys.argv[1] == "keep":
    assert keep_freed_memory()
torch.set_num_threads(1)
faults = []
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB: 16,384 pages
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again_where_a_program_asks_for_it():
    command = [sys.executable, "-c", FAULTS]
    environment = {"THP_MEM_ALLOC_ENABLE": "0"}  # huge pages would be few
    kept, plain = (
        int(subprocess.run([*command, word], env=environment, capture_output=True, text=True, check=True).stdout)
        for word in ("keep", "plain")
    )
    assert kept < 1000 < plain
