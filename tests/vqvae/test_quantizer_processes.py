"""Several processes end with the codebook of one that saw all their features."""

import subprocess
import sys

import pytest
import quantizer_processes as worker
import torch
from safetensors.torch import load_file


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    command = [sys.executable, worker.__file__]
    running = [subprocess.Popen([*command, str(rank), "2", tmp_path / "rendezvous", tmp_path]) for rank in range(2)]
    worker.train_all(0, 1, tmp_path)
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    for name in (*worker.STATISTICS, *worker.GRADIENTS):
        first, second = (load_file(tmp_path / f"{name} {rank} of 2.safetensors") for rank in range(2))
        one = load_file(tmp_path / f"{name} 0 of 1.safetensors")
        assert first
        for key, value in one.items():
            assert torch.equal(first[key], second[key]), (name, key)
            torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
