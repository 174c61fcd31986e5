"""How many codes a second a prior draws, here, by Hugging Face and by x-transformers; how near that is to the floor.

    pip install transformers x-transformers
    python benchmarks/sampling.py                                  # all cases, which takes long on one core
    python benchmarks/sampling.py --sizes 5M --tokens 49 --batches 1 16 --rounds 3      # a minute
    python benchmarks/sampling.py --precisions auto float32 bfloat16 int8 --json sampling.json
    python benchmarks/sampling.py --device cuda --compiled         # steps as CUDA graphs, and operation by operation

Every side has random weights of the same sizes (width, blocks, heads, gated branch, codes) and draws N codes for each
of B grids, with a cache, without top-k:

- `ours`: `TransformerPrior.sample` in each of --precisions, with --compiled also through `torch.compile`;
- `generate`: `LlamaForCausalLM.generate`, a token for the start beside the codes;
- `x-transformers`: `AutoregressiveWrapper.generate` (rotary positions, RMSNorm, SwiGLU).

The others are timed in float32 and in bfloat16. In each they get the way that a short trial halfway through a grid,
with at most 16 rows, shows to be the fastest: attention by hand or by scaled_dot_product_attention, for `generate` also
a growing or a static cache (never compiled). `×` is against the faster dtype of `generate`.

Sides take turns in one process; medians over rounds, of CPU time on one thread, of the clock otherwise. Rounds end
early once a case has taken --budget seconds, but each side runs once.

The floor of a step is what this machine needs at least for it, in the numbers that the side computes with:

    max((bytes of weights + mean bytes of cache) / bandwidth, FLOPs / peak)

Bandwidth is that of a sum over 1 GiB, peak that of a square matrix product, both measured when the program starts.
Weights that stay in a processor's cache may beat that; `floor in cache` has the bandwidth of reading so few bytes
again and again. The table of embeddings is no part of either, since a step reads few of its rows.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from priors import TransformerPrior, stepper
from priors.numerics import Numerics, Precision, choose

try:
    import transformers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
except ImportError as error:
    sys.exit(f"{error}: the others are missing; pip install transformers x-transformers")

TRIAL_ROWS, TRIAL_STEPS = 16, 8
OURS, GENERATE, X_TRANSFORMERS = "ours", "generate", "x-transformers"
DTYPES = ["float32", "bfloat16"]

# Draws so many codes after those given, "b n", and calls the last argument, if there is one, at each step.
Generate = Callable[[Tensor, int, Callable[[], None] | None], object]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes that all sides share. Embeddings for codes and output are apart everywhere."""

    width: int
    depth: int
    num_heads: int
    num_codes: int

    @property
    def hidden(self) -> int:
        return 32 * round(self.width * 8 / 3 / 32)

    @property
    def multiplied(self) -> int:
        """Weights that every place is multiplied by: all but embeddings."""
        return self.depth * (4 * self.width + 3 * self.hidden) * self.width + self.width * self.num_codes

    def prior(self, num_tokens: int) -> TransformerPrior:
        side = math.isqrt(num_tokens)
        grid = (side, side) if side * side == num_tokens else (num_tokens,)
        return TransformerPrior(grid=grid, **asdict(self))

    def llama(self, num_tokens: int) -> LlamaForCausalLM:
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=self.num_codes + 1, hidden_size=self.width, intermediate_size=self.hidden,
                num_hidden_layers=self.depth, num_attention_heads=self.num_heads, tie_word_embeddings=False,
                max_position_embeddings=num_tokens + 1, bos_token_id=self.num_codes, eos_token_id=None, pad_token_id=0,
            )
        )  # fmt: skip

    def x_transformer(self, num_tokens: int, flash: bool) -> AutoregressiveWrapper:
        layers = Decoder(
            dim=self.width, depth=self.depth, heads=self.num_heads, attn_dim_head=self.width // self.num_heads,
            rotary_pos_emb=True, rotary_emb_dim=self.width // self.num_heads, use_rmsnorm=True, attn_flash=flash,
            ff_glu=True, ff_swish=True, ff_no_bias=True, ff_mult=(self.hidden + 0.5) / self.width,
        )  # fmt: skip
        net = TransformerWrapper(num_tokens=self.num_codes + 1, max_seq_len=num_tokens + 1, attn_layers=layers)
        return AutoregressiveWrapper(net)


SHAPES = {
    "5M": Shape(width=256, depth=6, num_heads=8, num_codes=512),
    "110M": Shape(width=768, depth=12, num_heads=12, num_codes=16384),
    "tiny": Shape(width=32, depth=2, num_heads=2, num_codes=16),
}


@dataclass(frozen=True)
class Case:
    """What is drawn: so many grids of so many codes, at once."""

    size: str
    num_tokens: int
    batch: int

    @property
    def shape(self) -> Shape:
        return SHAPES[self.size]

    def start(self, rows: int, length: int, device: str) -> Tensor:
        """The start and random codes, "b n", for `generate` and x-transformers."""
        codes = torch.randint(self.shape.num_codes, (rows, length), device=device)
        codes[:, 0] = self.shape.num_codes
        return codes


@dataclass(frozen=True)
class Side:
    """A contestant: what draws all codes, what it computes with (for the floor), and which of its ways it takes."""

    run: Callable[[], object]
    numerics: Numerics
    way: str = ""


@dataclass(frozen=True)
class Machine:
    """Where and by which clock things are timed. On one thread of a CPU that is CPU time, else the clock's."""

    device: str
    num_threads: int

    def now(self) -> tuple[float, float]:
        """Seconds of this machine's clock, and of the one on the wall."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        wall = time.perf_counter()
        return time.process_time() if self.device == "cpu" and self.num_threads == 1 else wall, wall

    def seconds(self, run: Callable[[], object]) -> tuple[float, float]:
        start, wall_start = self.now()
        run()
        end, wall_end = self.now()
        return end - start, wall_end - wall_start

    def bandwidth(self, num_bytes: int = 2**30) -> float:
        """Bytes a second of reading so many bytes again and again."""
        numbers = torch.ones(max(1, num_bytes // 4), device=self.device)
        repeats = max(1, 2**28 // num_bytes)
        times = [self.seconds(lambda: [numbers.sum() for _ in range(repeats)])[0] for _ in range(5)]
        return repeats * 4 * len(numbers) / statistics.median(times)

    def peak(self, kind: str) -> float:
        """Operations a second of a product of square matrices, of two kinds of float or of int8."""
        size = 2048 if self.device == "cpu" else 8192
        square = (32 * torch.randn(size, size, device=self.device)).to(getattr(torch, kind))
        multiply = torch._int_mm if kind == "int8" else torch.mm
        times = [self.seconds(lambda: multiply(square, square))[0] for _ in range(5)]
        return 2 * size**3 / statistics.median(times)


def generate_ways(shape: Shape, num_tokens: int, dtype: torch.dtype, device: str) -> dict[str, Generate]:
    """Ways of Hugging Face, which share their weights."""
    model: Any = shape.llama(num_tokens).eval()
    model.to(device, dtype)

    def generate(attention: str, static: bool, before: Tensor, num: int, tick: Callable[[], None] | None) -> None:
        def ticked(ids: Tensor, *_: object, **__: object) -> Tensor:
            if tick is not None:
                tick()
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        model.set_attn_implementation(attention)
        config = GenerationConfig(
            do_sample=True, top_k=0, top_p=1.0, temperature=1.0, min_new_tokens=num, max_new_tokens=num, use_cache=True,
            bos_token_id=shape.num_codes, eos_token_id=None, pad_token_id=0, disable_compile=True,
            cache_implementation="static" if static else None,
        )  # fmt: skip
        options = {"generation_config": config, "stopping_criteria": [ticked] if tick else None}
        out = model.generate(before, attention_mask=torch.ones_like(before), **options)
        assert tuple(out.shape) == (len(before), before.shape[1] + num)

    ways = product(("sdpa", "eager"), ("growing", "static"))
    return {f"{name}, {cache} cache": partial(generate, name, cache == "static") for name, cache in ways}


def x_transformers_ways(shape: Shape, num_tokens: int, dtype: torch.dtype, device: str) -> dict[str, Generate]:
    """Ways of x-transformers, each with weights of its own."""

    def generate(model: AutoregressiveWrapper, before: Tensor, num: int, tick: Callable[[], None] | None) -> None:
        def unfiltered(logits: Tensor) -> Tensor:
            if tick is not None:
                tick()
            return logits

        out = model.generate(before, num, filter_logits_fn=unfiltered, cache_kv=True)
        assert tuple(out.shape) == (len(before), num)

    models = {"sdpa": shape.x_transformer(num_tokens, True), "by hand": shape.x_transformer(num_tokens, False)}
    return {name: partial(generate, model.to(device, dtype).eval()) for name, model in models.items()}


def trial(generate: Generate, static: bool, case: Case, machine: Machine) -> float:
    """Seconds of a step halfway through a grid; with a static cache, whose steps are all as long, at its end."""
    steps = min(TRIAL_STEPS, case.num_tokens // 2)
    length = case.num_tokens + 1 - steps if static else case.num_tokens // 2
    before = case.start(min(case.batch, TRIAL_ROWS), length, machine.device)
    ticks: list[float] = []
    generate(before, steps, lambda: ticks.append(machine.now()[0]))
    return statistics.median(later - earlier for earlier, later in pairwise(ticks))


def rivals(name: str, case: Case, machine: Machine, dtypes: list[str]) -> dict[str, Side]:
    """A library's fastest way in each dtype."""
    ways_of = generate_ways if name == GENERATE else x_transformers_ways
    start = case.start(case.batch, 1, machine.device)
    sides = {}
    for dtype in dtypes:
        ways = ways_of(case.shape, case.num_tokens, getattr(torch, dtype), machine.device)
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(2 if case.size == "110M" else 4):  # the first is warm-up
            for way, generate in ways.items():
                times[way].append(trial(generate, "static" in way, case, machine))
        best = min(ways, key=lambda way: statistics.median(times[way][1:]))
        run = partial(ways[best], start, case.num_tokens, None)
        sides[f"{name}, {dtype}"] = Side(run, Numerics(getattr(torch, dtype)), best)
    return sides


def our_sides(case: Case, machine: Machine, precisions: list[Precision], compiled: bool) -> dict[str, Side]:
    prior = case.shape.prior(case.num_tokens).to(machine.device).eval()
    sides = {}
    for precision, through in product(precisions, (False, True) if compiled else (False,)):
        numerics = choose(precision, case.batch, prior, through)
        options: dict[str, Any] = {"precision": precision, "compiled": through, "batch_size": case.batch}
        run = partial(prior.sample, case.batch, **options)
        # The last two codes of each grid are enough to be warm, but for what compiles or captures.
        whole = through or machine.device == "cuda"
        run(prefix=None if whole else torch.zeros(case.batch, max(0, case.num_tokens - 2), dtype=torch.int64))
        name = f"{OURS}, {precision}{', compiled' if through else ''}"
        sides[name] = Side(run, numerics, named(numerics) if precision == "auto" else "")
        if machine.device == "cuda":
            sides[f"{name}, without graphs"] = Side(partial(without_graphs, run), numerics, "")
    return sides


def without_graphs(run: Callable[[], object]) -> None:
    """The same with every operation launched by itself."""
    kept: Any = stepper.Graph
    stepper.Graph = lambda step: step  # pyrefly: ignore
    try:
        run()
    finally:
        stepper.Graph = kept


def named(numerics: Numerics) -> str:
    """The key of its peak."""
    return "int8" if numerics.int8 else str(numerics.dtype).removeprefix("torch.")


def floors(case: Case, numerics: Numerics, machine: Machine, rates: dict[str, float]) -> tuple[float, float]:
    """Least seconds for a mean step, with weights from memory and from a processor's cache."""
    shape, rows, mean_length = case.shape, case.batch, (case.num_tokens + 1) / 2
    weights = shape.multiplied * (1 if numerics.int8 else numerics.dtype.itemsize)
    cached = 2 * rows * shape.depth * shape.width * mean_length
    num_bytes = int(weights + cached * numerics.dtype.itemsize)
    flops = 2 * rows * shape.multiplied + 2 * cached
    arithmetic = flops / rates[named(numerics)]
    fast = max(rates["bandwidth"], machine.bandwidth(num_bytes))
    return max(num_bytes / rates["bandwidth"], arithmetic), max(num_bytes / fast, arithmetic)


def measure(case: Case, machine: Machine, rates: dict[str, float], options: argparse.Namespace) -> dict[str, Any]:
    """Time one case and print its table."""
    sides: dict[str, Side] = {}
    if OURS in options.sides:
        precisions = [name for name in options.precisions if machine.device == "cpu" or name != "int8"]
        sides |= our_sides(case, machine, precisions, options.compiled)
    for name in (GENERATE, X_TRANSFORMERS):
        if name in options.sides:
            sides |= rivals(name, case, machine, options.dtypes)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    began = time.perf_counter()
    rounds = 0
    while rounds < options.rounds and (rounds == 0 or time.perf_counter() - began < options.budget):
        rounds += 1
        for name, side in sides.items():
            times[name].append(machine.seconds(side.run))
    num = case.batch * case.num_tokens
    speeds, clock = ({name: num / statistics.median(both[i] for both in times[name]) for name in sides} for i in (0, 1))
    generated = [speed for name, speed in speeds.items() if name.startswith(GENERATE)]
    made = f"{case.shape.multiplied:,} weights without embeddings, {case.shape.num_codes:,} codes"
    print(f"\n{case.size} ({made}), {case.num_tokens} tokens, batch {case.batch}; rounds: {rounds}\n")
    print("| | way | tokens/s | by the clock | × | of the floor | of the floor in cache |\n" + 7 * "|---" + "|")
    rows = []
    for name, side in sides.items():
        step = case.batch / speeds[name]
        memory, cache = (least / step for least in floors(case, side.numerics, machine, rates))
        ratio = speeds[name] / max(generated) if generated else None
        speed = f"{speeds[name]:,.1f} | {clock[name]:,.1f} | {'' if ratio is None else f'{ratio:.2f}'}"
        print(f"| {name} | {side.way} | {speed} | {memory:.0%} | {cache:.0%} |", flush=True)
        row = {"side": name, "way": side.way, "tokens_per_second": speeds[name], "by_the_clock": clock[name]}
        rows.append({**row, "ratio": ratio, "floor": memory, "floor_in_cache": cache, "seconds": times[name]})
    return {**asdict(case), "rounds": rounds, "sides": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how fast codes are drawn.")
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=["5M", "110M"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[49, 256], help="49 is for 5M alone")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    everyone = [OURS, GENERATE, X_TRANSFORMERS]
    parser.add_argument("--sides", nargs="+", choices=everyone, default=everyone)
    parser.add_argument("--precisions", nargs="+", choices=["auto", *DTYPES, "int8"], default=["auto", "float32"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="of the others")
    parser.add_argument("--compiled", action="store_true", help="ours through torch.compile too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=120, help="seconds after which a case has no further round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="file for all figures, written after each case")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    machine = Machine(options.device, options.threads)
    kinds = [*DTYPES, "int8"] if options.device == "cpu" else DTYPES
    rates = {"bandwidth": machine.bandwidth(), **{kind: machine.peak(kind) for kind in kinds}}
    peaks = ", ".join(f"{kind} {rates[kind] / 1e9:,.0f} G" for kind in kinds)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{options.device}, threads: {options.threads}, {versions}, x-transformers {version('x-transformers')}")
    print(f"reads {rates['bandwidth'] / 2**30:,.1f} GiB/s; operations a second: {peaks}", flush=True)
    done = []
    for size, num_tokens, batch in product(options.sizes, options.tokens, options.batches):
        if (size, num_tokens) != ("110M", 49):
            done.append(measure(Case(size, num_tokens, batch), machine, rates, options))
            if options.json is not None:
                options.json.write_text(json.dumps({"machine": asdict(machine), **rates, "cases": done}, indent=1))


if __name__ == "__main__":
    main()
