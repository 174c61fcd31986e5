"""How long a training step of a prior takes, here and by Hugging Face, and which share of the machine's peak that is.

    pip install transformers
    python -m benchmarks prior_step                                # 5M: 49 tokens x 64 grids, 256 tokens x 16 and x 64
    python -m benchmarks prior_step --tokens 49 --batches 64 --rounds 3

A step is forward, backward, a step of fused AdamW and clearing the gradients, on random codes. The sides have the same
sizes (those of `sampling`) and take turns in one process; medians over rounds, of CPU time on one thread, of the clock
otherwise. No round begins once a case has taken --budget seconds.

- `ours`: `-prior(codes).mean()` as in train.py, in float32 and under autocast to bfloat16;
- `Llama`: `LlamaForCausalLM` with `labels=input_ids`, the same two, with attention by scaled_dot_product_attention or
  by hand (`eager`), each a row. `×` is against the fastest of these four;
- `Llama, bfloat16 weights`: weights, gradients and moments in bfloat16, which no longer is the same training (steps
  smaller than a weight's rounding are lost), shown for comparison.

MFU is the share of the peak, that of a square matrix product in the side's dtype measured when the program starts, of

    6 * weights * tokens + 6 * depth * width * length * tokens       operations a step,

weights without the embeddings; attention with half of its pairs, as a causal one needs.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.sampling import SHAPES, Shape, Size, peak

DTYPES = ("float32", "bfloat16")
PURE = "bfloat16 weights"
QUICK = "--sizes tiny --tokens 16 --batches 2 --rounds 1"


@dataclass(frozen=True)
class Side:
    """A contestant: one training step, the dtype of its products, and whether its `×` counts as a rival's."""

    step: Callable[[], object]
    dtype: str
    rival: bool


def step(model: nn.Module, objective: Callable[[], Tensor], autocast: bool, device: str) -> Callable[[], object]:
    """A training step of a model, with an optimiser of its own."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    model.train()

    def run() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = objective()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def make_sides(shape: Shape, codes: Tensor) -> dict[str, Side]:
    """All contestants, each with weights of its own."""
    device, num_tokens = codes.device.type, codes.shape[1]
    sides: dict[str, Side] = {}
    for dtype in DTYPES:
        prior = shape.prior(num_tokens).to(device)
        objective = partial(our_loss, prior, codes.reshape(-1, *prior.grid))
        sides[f"ours, {dtype}"] = Side(step(prior, objective, dtype != "float32", device), dtype, rival=False)
    for dtype, attention in product([*DTYPES, PURE], ("sdpa", "eager")):
        model = shape.llama(num_tokens)
        model.to(device, torch.bfloat16 if dtype == PURE else torch.float32)
        model.set_attn_implementation(attention)
        run = step(model, partial(llama_loss, model, codes), dtype == "bfloat16", device)
        sides[f"Llama, {dtype}, {attention}"] = Side(run, dtype.split()[0], rival=dtype != PURE)
    return sides


def our_loss(prior: nn.Module, grids: Tensor) -> Tensor:
    return -prior(grids).mean()


def llama_loss(model: nn.Module, codes: Tensor) -> Tensor:
    return model(input_ids=codes, labels=codes, use_cache=False).loss


def measure(shape: Shape, codes: Tensor, peaks: dict[str, float], rounds: int, budget: float) -> None:
    """Time one case and print its table."""
    sides, device = make_sides(shape, codes), codes.device.type
    for side in sides.values():
        side.step()
    jobs = {name: partial(harness.timed, side.step, device) for name, side in sides.items()}
    found = harness.interleaved(jobs, rounds, budget)
    seconds = {name: statistics.median(spent.counted for spent in each) for name, each in found.items()}
    walls = {name: statistics.median(spent.wall for spent in each) for name, each in found.items()}
    fastest = min(seconds[name] for name, side in sides.items() if side.rival)
    # Two a weight forward, four backward; of attention half of what all pairs take.
    operations = 6 * codes.numel() * (shape.multiplied + shape.depth * shape.width * codes.shape[1])
    table = harness.Table("", "ms a step", "by the clock", "tokens/s", "×", "MFU", "rounds")
    for name, side in sides.items():
        times = (f"{1000 * seconds[name]:,.0f}", f"{1000 * walls[name]:,.0f}", f"{codes.numel() / seconds[name]:,.0f}")
        share = operations / seconds[name] / peaks[side.dtype]
        table.row(name, *times, f"{fastest / seconds[name]:.2f}", f"{share:.0%}", len(found[name]))


def main(
    sizes: tuple[Size, ...] = ("5M",),
    tokens: tuple[int, ...] = (49, 256),
    batches: tuple[int, ...] = (),
    rounds: int = 5,
    budget: float = 180,
    threads: int = 1,
    device: harness.Device = "cpu",
) -> None:
    """Time every case; batches are 16 and 64 at 256 tokens and more, 64 below, unless given."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    peaks = {dtype: peak(dtype, device) for dtype in DTYPES}
    print("operations a second:", ", ".join(f"{dtype} {rate / 1e9:,.0f} G" for dtype, rate in peaks.items()))
    for size, length in product(sizes, tokens):
        for batch in batches or ((16, 64) if length >= 256 else (64,)):
            shape = SHAPES[size]
            print(f"\n{size} ({shape.multiplied:,} weights without embeddings), {length} tokens, batch {batch}\n")
            codes = torch.randint(shape.num_codes, (batch, length), device=device)
            measure(shape, codes, peaks, rounds, budget)
