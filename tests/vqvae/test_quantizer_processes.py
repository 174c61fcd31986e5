"""Several processes end with the codebook of one that saw all their features."""

import subprocess
import sys
from pathlib import Path

import pytest
import quantizer_processes as worker
import torch
from safetensors.torch import load_file

from vqvae.quantizers.step_statistics import Pool

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes were left with, and what one was."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, worker.__file__]
    running = [
        subprocess.Popen([*command, str(rank), "2", str(folder / "rendezvous"), str(folder)]) for rank in range(2)
    ]
    worker.train_all(0, 1, folder)
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    return folder


@pytest.mark.parametrize("name", [*worker.STATISTICS, *worker.GRADIENTS])
def test_two_processes_are_one(folder, name):
    first, second = (load_file(folder / f"{name} {rank} of 2.safetensors") for rank in range(2))
    one = load_file(folder / f"{name} 0 of 1.safetensors")
    assert first
    for key, value in one.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-5)


def test_a_pool_does_not_depend_on_the_split():
    salt = torch.tensor(3)
    vectors = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    whole, parts = Pool(30, 4), Pool(30, 4)
    whole.add(vectors, None, salt)
    for part in vectors.split(17):
        parts.add(part, None, salt)
    assert torch.equal(whole.joint(), parts.joint())
    assert torch.equal(whole.draw(10), parts.draw(10))
