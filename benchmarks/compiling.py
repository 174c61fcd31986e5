"""What `--compile` gives on this machine: a training step of a codebook and of the default prior, compiled and not.

    python -m benchmarks compiling [--rounds 5] [--steps 5] [--device cuda]

The codebook is at 64x64, f = 8, width 32, `--model.smooth`, `Normal`, 32 images a step; the prior that of the preset
`fashion-mini`, 64 grids. On random levels and codes, one thread, rounds interleaved; CPU seconds of a step (on a GPU
those of the clock; forward, backward, AdamW), medians, and what the first step takes, in which all is compiled, without
torch's cache of what was compiled before.
"""

import os
import tempfile
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks import harness
from priors import TransformerPrior
from priors.trunk import Trunk
from vqvae import VQVAE
from vqvae.likelihoods import Normal

QUICK = "--rounds 1 --steps 1 --only prior --no-bfloat16"


def main(
    rounds: int = 5,
    steps: int = 5,
    only: tuple[str, ...] = ("codebook", "prior"),
    bfloat16: bool = True,
    device: harness.Device = "cpu",
) -> None:
    """Measure both ways. bfloat16: under autocast, too."""
    torch.set_num_threads(1)
    table = harness.Table("model", "arithmetic", "first step, s", "as it is, s", "compiled, s", "compiled / as it is")
    makers = {"codebook": _codebook, "prior": _prior}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = scratch
        for name in only:
            for half in (False, True) if bfloat16 else (False,):
                ways = {way: makers[name](way == "compiled", half, device) for way in ("as it is", "compiled")}
                first = harness.timed(ways["compiled"], device).wall
                ways["as it is"]()
                found = harness.interleaved(
                    {way: partial(_seconds, step, steps, device) for way, step in ways.items()}, rounds
                )
                plain, compiled = (found[way] for way in ways)
                seconds = [f"{median(each):.3f}" for each in (plain, compiled)]
                ratio = f"{harness.ratio(compiled, plain):.2f}"
                table.row(name, "bfloat16" if half else "float32", f"{first:.0f}", *seconds, ratio)


def _seconds(step: Callable[[], object], num: int, device: str) -> float:
    return harness.timed(lambda: [step() for _ in range(num)], device).counted / num


def _codebook(compiled: bool, half: bool, device: str) -> Callable[[], object]:
    torch.manual_seed(0)
    model = VQVAE(image_size=64, num_channels=3, width=32, downsampling=8, smooth=True, likelihood=Normal.Config())
    model.to(device)
    images = torch.randint(256, (32, 3, 64, 64), dtype=torch.uint8, device=device)
    if compiled:
        model.encoder.compile()
        model.decoder.compile()

    def loss() -> torch.Tensor:
        out = model(images)
        return out.distortion.mean() / model.num_dims + torch.stack(list(out.auxiliary.values())).sum()

    return _step(model, loss, half, device, model.update)


def _prior(compiled: bool, half: bool, device: str) -> Callable[[], object]:
    torch.manual_seed(0)
    prior = TransformerPrior(num_codes=512, grid=(7, 7), width=128, depth=3, num_heads=4).to(device)
    codes = torch.randint(512, (64, 7, 7), device=device)
    for part in prior.modules():
        if compiled and isinstance(part, Trunk):
            part.compile()
    return _step(prior, lambda: -prior.log_prob(codes).mean(), half, device)


def _step(
    model: Any, loss: Callable[[], torch.Tensor], half: bool, device: str, after: Callable[[], object] = lambda: None
) -> Callable[[], object]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=half):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        after()

    return step
