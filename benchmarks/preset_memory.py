"""Memory and time of one training step of the presets for photographs, at several batch sizes.

    python -m benchmarks preset_memory --presets photo-64 photo-128 photo-256 --batches 1 4 8
    python -m benchmarks preset_memory --batches 8 32 --device cuda

Each figure is of a process of its own on random levels: the largest resident memory, and the CPU seconds of the second
of two steps (forward, backward, AdamW) of the codebook with its terms for the eye; the discriminator judges, and its
own step is not in it. In bfloat16 autocast. `parameters` are those of the tokenizer and of the prior. On a GPU the
memory is that which torch allocates, and the seconds are those of the clock.
"""

from typing import Literal

import torch

from benchmarks import harness
from vqvae.training.networks import prepare
from vqvae.training.objectives import codebook_objective
from vqvae.training.parsing import parse
from vqvae.training.prior_kinds import make_prior

QUICK = "--presets photo-64 --batches 1"
Preset = Literal["photo-64", "photo-128", "photo-256"]


def main(
    presets: tuple[Preset, ...] = ("photo-64", "photo-128", "photo-256"),
    batches: tuple[int, ...] = (1, 4, 8),
    ways: tuple[Literal["kept", "checkpointing"], ...] = ("kept", "checkpointing"),
    device: harness.Device = "cpu",
) -> None:
    """Measure each preset at each batch size."""
    table = harness.Table(
        "preset", "parameters, M", "batch", "activations", "peak, GiB", f"{'CPU ' if device == 'cpu' else ''}s a step"
    )
    for preset in presets:
        for batch in batches:
            for way in ways:
                found = harness.in_child(measure, preset, batch, way, device)
                sizes = f"{found['tokenizer'] / 1e6:.1f} + {found['prior'] / 1e6:.1f}"
                table.row(preset, sizes, batch, way, f"{found['peak']:.2f}", f"{found['seconds']:.1f}")


def measure(preset: str, batch: int, way: str, device: str) -> dict[str, float]:
    """In a process of its own."""
    run = parse(["--preset", preset, "--looks.start", "0", *(["--checkpointing"] if way == "checkpointing" else [])])
    torch.manual_seed(0)
    model = run.model.build()
    prior = make_prior(run.prior, model, None)
    sizes = {
        name: sum(each.numel() for each in part.parameters()) for name, part in (("tokenizer", model), ("prior", prior))
    }
    del prior
    objective = codebook_objective(run, model, {}).to(device).train()
    if objective.rival is not None:  # which is no part of the module, as it has an optimiser of its own
        objective.rival.to(device)
    prepare(run, objective)
    optimizer = torch.optim.AdamW([each for each in objective.parameters() if each.requires_grad])
    images = torch.randint(256, (batch, 3, *model.size), dtype=torch.uint8, device=device)

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16):
            terms = objective(images, None)
        terms["objective"].backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.update()

    seconds = [harness.timed(step, device).counted for _ in range(2)][-1]
    return {**sizes, "peak": harness.peak_bytes(device) / 2**30, "seconds": seconds}
