"""How long a training step of a prior takes, here and by Hugging Face, and which share of the machine's peak that is.

    pip install transformers x-transformers
    python benchmarks/prior_step.py                                # 5M: 49 tokens x 64 grids, 256 tokens x 16 and x 64
    python benchmarks/prior_step.py --tokens 49 --batches 64 --rounds 3

A step is forward, backward, a step of fused AdamW and clearing the gradients, on random codes. The sides have the same
sizes (those of `sampling.py`) and take turns in one process; medians over rounds, of CPU time on one thread, of the
clock otherwise.

- `ours`: `-prior(codes).mean()` as in train.py, in float32 and under autocast to bfloat16;
- `Llama`: `LlamaForCausalLM` with `labels=input_ids`, the same two, with attention by scaled_dot_product_attention or
  by hand (`eager`), each a row. `×` is against the fastest of these four;
- `Llama, bfloat16 weights`: weights, gradients and moments in bfloat16, which no longer is the same training (steps
  smaller than a weight's rounding are lost), shown for comparison.

MFU is the share of the peak, that of a square matrix product in the side's dtype measured when the program starts, of

    6 * weights * tokens + 6 * depth * width * length * tokens       operations a step,

weights without the embeddings; attention with half of its pairs, as a causal one needs.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from sampling import DTYPES, SHAPES, Machine, Shape  # pyrefly: ignore[missing-import]
from torch import Tensor, nn

OURS, LLAMA = "ours", "Llama"
PURE = "bfloat16 weights"


@dataclass(frozen=True)
class Side:
    """A contestant: one training step, the dtype of its products, and whether its `×` counts as a rival's."""

    step: Callable[[], object]
    dtype: str
    rival: bool


def step(model: nn.Module, objective: Callable[[], Tensor], autocast: bool, device: str) -> Callable[[], Tensor]:
    """A training step of a model, with an optimiser of its own."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    model.train()

    def run() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = objective()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return run


def make_sides(shape: Shape, codes: Tensor, names: list[str]) -> dict[str, Side]:
    """All contestants, each with weights of its own."""
    device, num_tokens = codes.device.type, codes.shape[1]
    sides: dict[str, Side] = {}
    if OURS in names:
        for dtype in DTYPES:
            prior = shape.prior(num_tokens).to(device)
            grids = codes.reshape(-1, *prior.grid)
            objective = lambda prior=prior, grids=grids: -prior(grids).mean()  # noqa: E731
            sides[f"{OURS}, {dtype}"] = Side(step(prior, objective, dtype != "float32", device), dtype, rival=False)
    if LLAMA in names:
        for dtype, attention in product([*DTYPES, PURE], ("sdpa", "eager")):
            model: Any = shape.llama(num_tokens)
            model.to(device, torch.bfloat16 if dtype == PURE else torch.float32)
            model.set_attn_implementation(attention)
            objective = partial(llama_loss, model, codes)
            run = step(model, objective, dtype == "bfloat16", device)
            sides[f"{LLAMA}, {dtype}, {attention}"] = Side(run, dtype.split()[0], rival=dtype != PURE)
    return sides


def llama_loss(model: nn.Module, codes: Tensor) -> Tensor:
    return model(input_ids=codes, labels=codes, use_cache=False).loss


def operations(shape: Shape, batch: int, length: int) -> int:
    """Of a step's products: two a weight forward, four backward; of attention half of what all pairs take."""
    return 6 * batch * length * (shape.multiplied + shape.depth * shape.width * length)


def measure(size: str, length: int, batch: int, machine: Machine, peaks: dict[str, float], options: Any) -> dict:
    """Time one case and print its table."""
    shape = SHAPES[size]
    codes = torch.randint(shape.num_codes, (batch, length), device=machine.device)
    sides = make_sides(shape, codes, options.sides)
    for side in sides.values():
        side.step()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    began, rounds = time.perf_counter(), 0
    while rounds < options.rounds and (rounds == 0 or time.perf_counter() - began < options.budget):
        rounds += 1
        for name, side in sides.items():
            times[name].append(machine.seconds(side.step))
    seconds, clock = ({name: statistics.median(both[i] for both in times[name]) for name in sides} for i in (0, 1))
    fastest = min((seconds[name] for name, side in sides.items() if side.rival), default=None)
    print(
        f"\n{size} ({shape.multiplied:,} weights without embeddings), {length} tokens, batch {batch}; rounds: {rounds}"
    )
    print("\n| | ms a step | by the clock | tokens/s | × | MFU |\n|---|---|---|---|---|---|")
    rows = []
    for name, side in sides.items():
        ratio = fastest / seconds[name] if fastest else None
        mfu = operations(shape, batch, length) / seconds[name] / peaks[side.dtype]
        figures = f"{1000 * seconds[name]:,.0f} | {1000 * clock[name]:,.0f} | {batch * length / seconds[name]:,.0f}"
        print(f"| {name} | {figures} | {'' if ratio is None else f'{ratio:.2f}'} | {mfu:.0%} |", flush=True)
        rows.append({"side": name, "ratio": ratio, "mfu": mfu, "seconds": times[name]})
    return {"size": size, "num_tokens": length, "batch": batch, "rounds": rounds, "sides": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a prior's training step.")
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=["5M"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[49, 256])
    parser.add_argument(
        "--batches", type=int, nargs="+", help="16 and 64 at 256 tokens and more, 64 below, unless given"
    )
    parser.add_argument("--sides", nargs="+", choices=[OURS, LLAMA], default=[OURS, LLAMA])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=180, help="seconds after which a case has no further round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="file for all figures, written after each case")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    machine = Machine(options.device, options.threads)
    peaks = {dtype: machine.peak(dtype) for dtype in DTYPES}
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{options.device}, threads: {options.threads}, {versions}")
    print(
        "operations a second:", ", ".join(f"{dtype} {peak / 1e9:,.0f} G" for dtype, peak in peaks.items()), flush=True
    )
    done = []
    for size, length in product(options.sizes, options.tokens):
        for batch in options.batches or ([16, 64] if length >= 256 else [64]):
            done.append(measure(size, length, batch, machine, peaks, options))
            if options.json is not None:
                figures = {"machine": asdict(machine), "peaks": peaks, "cases": done}
                options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
