"""One of several gloo processes that train codebooks on their share of the features; see test_quantizer_processes.py.

python quantizer_processes.py RANK WORLD_SIZE RENDEZVOUS_FILE OUTPUT_FOLDER
"""

import gc
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed.nn.functional  # before there is a process group, which its default arguments would keep
from safetensors.torch import save_file
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from vqvae.quantizers import (
    EMAVectorQuantizer,
    GroupedQuantizer,
    MultiScaleQuantizer,
    ProjectedQuantizer,
    Quantizer,
    ResidualQuantizer,
    SoftEMVectorQuantizer,
    VectorQuantizer,
)

DIM, NUM_CODES, IMAGES, STEPS = 6, 24, 8, 24  # codes without use die after 22


def ema(**options: Any) -> EMAVectorQuantizer.Config:
    return EMAVectorQuantizer.Config(**{"num_codes": NUM_CODES, "dim": DIM, "decay": 0.9, **options})


# Updated from statistics alone, on uneven shares of the images. What revival draws is settled by the bits of vectors:
# those that a composition or a map has computed differ by rounding, so there it is off.
STATISTICS: dict[str, Quantizer.Config] = {
    "normalised": ema(normalize=True),
    "clustered": ema(revival="clustered"),
    # Draws differ from process to process; without a spread there is nothing to draw.
    "soft em": SoftEMVectorQuantizer.Config(num_codes=NUM_CODES, dim=DIM, decay=0.9, variance=1e-9),
    "more codes than vectors": ema(num_codes=300),
    "grouped residual": GroupedQuantizer.Config(
        quantizer=ResidualQuantizer.Config(depth=2, quantizer=ema(dim=DIM // 2, revival="off"), shared=True)
    ),
    "multi-scale": MultiScaleQuantizer.Config(scales=(1, 2, 5), quantizer=ema(revival="off")),
}
# Updated by gradients too, which DistributedDataParallel averages: on even shares.
GRADIENTS: dict[str, Quantizer.Config] = {
    "learned": VectorQuantizer.Config(num_codes=NUM_CODES, dim=DIM, revival="clustered"),
    "projected": ProjectedQuantizer.Config(
        dim=DIM, quantizer=VectorQuantizer.Config(num_codes=NUM_CODES, dim=4, normalize=True, revival="off")
    ),
}


def features(step: int) -> torch.Tensor:
    """Of all processes; they wander, so that codes die and are revived."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(IMAGES, 5, 5, DIM, generator=generator) + 0.3 * step


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


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank, world_size = int(sys.argv[1]), int(sys.argv[2])
    distributed.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=world_size)
    train_all(rank, world_size, Path(sys.argv[4]))
    gc.collect()  # modules wrapped for several processes hold the group too, and themselves
    distributed.destroy_process_group()
