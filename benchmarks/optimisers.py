"""Optimisers of a prior at equal steps, over seeds: AdamW and Muon, their learning rates, a moving average.

    python -m benchmarks optimisers RUN --num-steps 750 --seeds 3          # RUN: a run of train.py with a codebook
    python -m benchmarks optimisers RUN --only adamw-2e-3 --num-steps 1500

The prior is the default run's (width 128, depth 3), on the codes of RUN's tokenizer, which are encoded once; without
a run a small one of our own is trained. Batches of 64 in bfloat16 autocast, the warm-up, decay, clipping and optimisers
of `vqvae train`, one thread. The rate is a mean over the whole test set, in nats an image. CPU seconds are of the steps
alone; what else the machine did changes them. Kept results are taken from --output.
"""

import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from tyro.conf import Positional

from benchmarks import harness, prior_quality
from priors import TransformerPrior
from vqvae import VQVAE
from vqvae.data.batching import index_batches
from vqvae.training.loop import schedule
from vqvae.training.optimisers import make_optimiser
from vqvae.training.options import FitConfig
from vqvae.training.sharding import decay_at

QUICK = "--num-steps 2 --own-steps 2 --only adamw-2e-3 --output runs/benchmarks/optimisers-quick"
# AdamW's rate, Muon's, weight decay, a moving average.
KINDS: dict[str, dict[str, Any]] = {
    "adamw-2e-3": {"learning_rate": 2e-3},
    "adamw-4e-3": {"learning_rate": 4e-3},
    "adamw-8e-3": {"learning_rate": 8e-3},
    "adamw-4e-3+ema-0.99": {"learning_rate": 4e-3, "ema": 0.99},
    "muon-0.02+adamw-4e-3": {"learning_rate": 4e-3, "muon": 0.02},
    "muon-0.05+adamw-4e-3": {"learning_rate": 4e-3, "muon": 0.05},
    "muon-0.05+adamw-8e-3": {"learning_rate": 8e-3, "muon": 0.05},
    "muon-0.05+adamw-8e-3+decay-0.1": {"learning_rate": 8e-3, "muon": 0.05, "weight_decay": 0.1},
    "muon-0.05+adamw-8e-3+ema-0.99": {"learning_rate": 8e-3, "muon": 0.05, "ema": 0.99},
    "muon-0.1+adamw-4e-3": {"learning_rate": 4e-3, "muon": 0.1},
}


def main(
    run: Positional[Path | None] = None,
    num_steps: int = 750,
    seeds: int = 1,
    only: tuple[str, ...] = (),
    own_steps: int = 1000,
    output: Path = harness.OUT / "optimisers",
) -> None:
    """Train a prior by each of them; --own-steps is for a run of our own."""
    torch.set_num_threads(1)
    run = harness.some_run(run, own_steps)
    output.mkdir(parents=True, exist_ok=True)
    model = VQVAE.from_pretrained(run / "codebook").eval()
    codes = prior_quality.saved_codes(run, model, output / "codes.pt")
    kept = harness.Kept(output / "results.json")
    table = harness.Table("optimiser", "nats an image", "each seed", "CPU s")
    for name, options in harness.pick(KINDS, only).items():
        jobs = {
            f"{name} | {num_steps} | {seed}": partial(trained, model, codes, options, num_steps, seed)
            for seed in range(seeds)
        }
        found = list(kept.fill(jobs).values())
        nats = [each[0] for each in found]
        cpu = statistics.mean(each[1] for each in found)
        table.row(name, f"{statistics.mean(nats):.2f}", ", ".join(f"{each:.2f}" for each in nats), f"{cpu:.0f}")


def trained(model: VQVAE, codes: dict[str, Tensor], options: dict[str, Any], num_steps: int, seed: int) -> list[float]:
    """Nats an image of the test codes, and CPU seconds."""
    fit = FitConfig(num_steps=num_steps, **options)
    torch.manual_seed(seed)
    classes = int(codes["train_labels"].max()) + 1
    sizes = {"width": 128, "depth": 3, "num_heads": 4}
    prior = TransformerPrior(num_codes=model.num_codes, grid=model.grid, num_classes=classes, **sizes).train()
    optimiser, rates = make_optimiser(
        prior, learning_rate=fit.learning_rate, weight_decay=fit.weight_decay, muon=fit.muon, fused=True
    )
    weights = list(prior.parameters())
    average = [weight.detach().clone() for weight in weights]
    order = index_batches(len(codes["train"]), fit.batch_size, seed=seed)
    began = harness.now().counted
    for step in tqdm(range(num_steps), desc="steps", disable=None, leave=False):
        rows = torch.from_numpy(next(order))
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(step, fit)
        with torch.autocast("cpu", torch.bfloat16):
            loss = -prior(codes["train"][rows], codes["train_labels"][rows]).mean() / prior.num_positions
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, fit.max_norm)
        optimiser.step()
        if fit.ema is not None:
            torch._foreach_lerp_(average, [each.detach() for each in weights], 1 - decay_at(step, fit.ema))
    spent = harness.now().counted - began
    with torch.no_grad():
        for weight, mean in zip(weights, average, strict=True):
            if fit.ema is not None:
                weight.copy_(mean)
        parts = zip(codes["test"].split(500), codes["test_labels"].split(500), strict=True)
        nats = torch.cat([-prior.eval().log_prob(part, labels) for part, labels in parts])
    return [nats.mean().item(), spent]
