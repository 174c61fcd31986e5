"""Several processes end with the codebook of one that saw all their features.

One of several, with gloo: python test_quantizer_processes.py RANK WORLD_SIZE RENDEZVOUS_FILE OUTPUT_FOLDER
"""

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.nn.functional  # before there is a process group, which its default arguments would keep
from quantizer_worlds import ema, grouped, learned, multiscale, projected, residual, soft_em
from safetensors.torch import load_file, save_file
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from vqvae.quantizers import Quantizer

IMAGES, STEPS = 8, 24  # codes without use die after 22
# Updated from statistics alone, on uneven shares of the images. What revival draws is settled by the bits of vectors:
# those that a composition or a map has computed differ by rounding, so there it is off.
STATISTICS = {
    "normalised": ema(normalize=True),
    "clustered": ema(revival="clustered"),
    "soft em": soft_em(variance=1e-9),  # draws differ from process to process; without a spread there are none
    "more codes than vectors": ema(num_codes=300),
    "grouped residual": grouped(residual(ema(dim=3, revival="off"), shared=True)),
    "multi-scale": multiscale(ema(revival="off")),
}
# Updated by gradients too, which DistributedDataParallel averages: on even shares.
GRADIENTS = {
    "learned": learned(revival="clustered"),
    "projected": projected(learned(dim=4, normalize=True, revival="off")),
}


def features(step: int) -> torch.Tensor:
    """Of all processes; they wander, so that codes die and are revived."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(IMAGES, 5, 5, 6, generator=generator) + 0.3 * step


def share(step: int, rank: int, world_size: int, even: bool) -> slice:
    if world_size == 1:
        return slice(None)
    middle = IMAGES // 2 if even else (1, 5, 0, 8)[step % 4]  # also nothing at all
    return slice(0, middle) if rank == 0 else slice(middle, None)


def train(config: Quantizer.Config, rank: int, world_size: int, even: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    quantizer = config.build()
    module: torch.nn.Module = quantizer
    if even and world_size > 1:
        module = DistributedDataParallel(quantizer)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1) if even else None
    for step in range(STEPS):
        mine = features(step)[share(step, rank, world_size, even)]
        mask = torch.ones(mine.shape[:-1], dtype=torch.bool)
        mask[:, step % 5] = False
        # Two forwards an update, as under gradient accumulation.
        for part, valid in zip(mine.chunk(2), mask.chunk(2), strict=True):
            q = module(part, valid)
            if optimizer is not None:
                ((sum(q.auxiliary.values()) + q.z_q.square().mean()) / 2).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        quantizer.update()
    return {name: value.contiguous() for name, value in quantizer.state_dict().items()}


def train_all(rank: int, world_size: int, folder: Path) -> None:
    for even, configs in ((False, STATISTICS), (True, GRADIENTS)):
        for name, config in configs.items():
            save_file(train(config, rank, world_size, even), folder / f"{name} {rank} of {world_size}.safetensors")


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    command = [sys.executable, __file__]
    running = [subprocess.Popen([*command, str(rank), "2", tmp_path / "rendezvous", tmp_path]) for rank in range(2)]
    train_all(0, 1, tmp_path)
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    for name in (*STATISTICS, *GRADIENTS):
        first, second = (load_file(tmp_path / f"{name} {rank} of 2.safetensors") for rank in range(2))
        one = load_file(tmp_path / f"{name} 0 of 1.safetensors")
        assert first
        for key, value in one.items():
            assert torch.equal(first[key], second[key]), (name, key)
            torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank, world_size = int(sys.argv[1]), int(sys.argv[2])
    distributed.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=world_size)
    train_all(rank, world_size, Path(sys.argv[4]))
    gc.collect()  # modules wrapped for several processes hold the group too, and themselves
    distributed.destroy_process_group()
