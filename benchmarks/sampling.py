"""How many codes a second a prior draws, here, by Hugging Face and by x-transformers; how near that is to the floor.

    pip install transformers x-transformers
    python -m benchmarks sampling                                  # all cases, which takes long on one core
    python -m benchmarks sampling --sizes 5M --tokens 49 --batches 1 16 --rounds 3      # a minute
    python -m benchmarks sampling --precisions auto float32 bfloat16 int8 --compiled
    python -m benchmarks sampling --device cuda

Every side has random weights of the same sizes (width, blocks, heads, gated branch, codes) and draws N codes for each
of B grids, with a cache, without top-k:

- `ours`: `TransformerPrior.sample` in each of --precisions, with --compiled also through `torch.compile`;
- `generate`: `LlamaForCausalLM.generate`, a token for the start beside the codes;
- `x-transformers`: `AutoregressiveWrapper.generate` (rotary positions, RMSNorm, SwiGLU).

The others are timed in float32 and in bfloat16. In each they get the way that drawing the second half of grids, at most
16 of them, shows to be the fastest: attention by hand or by scaled_dot_product_attention, for `generate` also a growing
or a static cache (never compiled). `×` is against the faster dtype of `generate`.

Sides take turns in one process; medians over rounds, of CPU time on one thread, of the clock otherwise. No round begins
once a case has taken --budget seconds. 49 tokens are for the smaller models alone.

The floor of a step is what this machine needs at least for it, in the numbers that the side computes with:

    max((bytes of weights + mean bytes of cache) / bandwidth, FLOPs / peak)

Bandwidth is that of a sum over 1 GiB, peak that of a square matrix product, both measured when the program starts.
Weights that stay in a processor's cache may beat that. The table of embeddings is no part of either, since a step reads
few of its rows.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks import harness
from priors import Sampling, TransformerPrior
from priors.precision import Arithmetic, choose
from priors.trials import numerics_for
from priors.walks import WalkStart

TRIAL_ROWS, TRIAL_ROUNDS = 16, 2
GENERATE, X_TRANSFORMERS = "generate", "x-transformers"
QUICK = "--sizes tiny --tokens 16 --batches 2 --rounds 1"

# Draws so many codes after those given, "b n".
Generate = Callable[[Tensor, int], object]


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
        """Weights that every position is multiplied by: all but embeddings."""
        return self.depth * (4 * self.width + 3 * self.hidden) * self.width + self.width * self.num_codes

    def prior(self, num_tokens: int) -> TransformerPrior:
        side = math.isqrt(num_tokens)
        grid = (side, side) if side * side == num_tokens else (num_tokens,)
        return TransformerPrior(grid=grid, **asdict(self))

    def llama(self, num_tokens: int) -> Any:
        import transformers

        transformers.logging.set_verbosity_error()
        config = transformers.LlamaConfig(
            vocab_size=self.num_codes + 1,
            hidden_size=self.width,
            intermediate_size=self.hidden,
            num_hidden_layers=self.depth,
            num_attention_heads=self.num_heads,
            tie_word_embeddings=False,
            max_position_embeddings=num_tokens + 1,
            bos_token_id=self.num_codes,
            eos_token_id=None,
            pad_token_id=0,
        )
        return transformers.LlamaForCausalLM(config)

    def x_transformer(self, num_tokens: int, flash: bool) -> Any:
        import x_transformers

        layers = x_transformers.Decoder(
            dim=self.width,
            depth=self.depth,
            heads=self.num_heads,
            attn_dim_head=self.width // self.num_heads,
            rotary_pos_emb=True,
            rotary_emb_dim=self.width // self.num_heads,
            use_rmsnorm=True,
            attn_flash=flash,
            ff_glu=True,
            ff_swish=True,
            ff_no_bias=True,
            ff_mult=(self.hidden + 0.5) / self.width,
        )
        net = x_transformers.TransformerWrapper(
            num_tokens=self.num_codes + 1, max_seq_len=num_tokens + 1, attn_layers=layers
        )
        return x_transformers.AutoregressiveWrapper(net)


SHAPES = {
    "5M": Shape(width=256, depth=6, num_heads=8, num_codes=512),
    "110M": Shape(width=768, depth=12, num_heads=12, num_codes=16384),
    "tiny": Shape(width=32, depth=2, num_heads=2, num_codes=16),
}
Size = Literal["5M", "110M", "tiny"]


@dataclass(frozen=True)
class Case:
    """What is drawn: so many grids of so many codes, at once."""

    size: str
    num_tokens: int
    batch: int
    device: str
    given: Shape | None = None

    @property
    def shape(self) -> Shape:
        return self.given or SHAPES[self.size]

    def start(self, rows: int, length: int) -> Tensor:
        """The start and random codes, "b n", for `generate` and x-transformers."""
        codes = torch.randint(self.shape.num_codes, (rows, length), device=self.device)
        codes[:, 0] = self.shape.num_codes
        return codes


@dataclass(frozen=True)
class Side:
    """A contestant: what draws all codes, what it computes with (for the floor), and which of its ways it takes."""

    run: Callable[[], object]
    arithmetic: Arithmetic
    way: str = ""


def median_seconds(job: Callable[[], object], rounds: int, device: str) -> float:
    return statistics.median(harness.timed(job, device).counted for _ in range(rounds))


def bandwidth(device: str) -> float:
    """Bytes a second of reading 1 GiB."""
    numbers = torch.ones(2**28, device=device)
    return 2**30 / median_seconds(numbers.sum, 5, device)


def peak(kind: str, device: str) -> float:
    """Operations a second of a product of square matrices, of two kinds of float or of int8."""
    size = 2048 if device == "cpu" else 8192
    square = (32 * torch.randn(size, size, device=device)).to(getattr(torch, kind))
    multiply = torch._int_mm if kind == "int8" else torch.mm
    return 2 * size**3 / median_seconds(lambda: multiply(square, square), 5, device)


def generate_ways(case: Case, dtype: torch.dtype) -> dict[str, Generate]:
    """Ways of Hugging Face, which share their weights."""
    import transformers

    model = case.shape.llama(case.num_tokens).eval().to(case.device, dtype)

    def generate(attention: str, cache: str, before: Tensor, num: int) -> None:
        model.set_attn_implementation(attention)
        config = transformers.GenerationConfig(
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            min_new_tokens=num,
            max_new_tokens=num,
            use_cache=True,
            bos_token_id=case.shape.num_codes,
            eos_token_id=None,
            pad_token_id=0,
            disable_compile=True,
            cache_implementation="static" if cache == "static" else None,
        )
        out = model.generate(before, attention_mask=torch.ones_like(before), generation_config=config)
        assert tuple(out.shape) == (len(before), before.shape[1] + num)

    ways = product(("sdpa", "eager"), ("growing", "static"))
    return {f"{attention}, {cache} cache": partial(generate, attention, cache) for attention, cache in ways}


def x_transformers_ways(case: Case, dtype: torch.dtype) -> dict[str, Generate]:
    """Ways of x-transformers, each with weights of its own."""

    def generate(model: Any, before: Tensor, num: int) -> None:
        out = model.generate(before, num, filter_logits_fn=lambda logits: logits, cache_kv=True)
        assert tuple(out.shape) == (len(before), num)

    models = {name: case.shape.x_transformer(case.num_tokens, name == "sdpa") for name in ("sdpa", "by hand")}
    return {name: partial(generate, model.to(case.device, dtype).eval()) for name, model in models.items()}


WAYS = {GENERATE: generate_ways, X_TRANSFORMERS: x_transformers_ways}


def rival(name: str, case: Case, dtype: torch.dtype) -> Side:
    """A library's fastest way."""
    half = case.num_tokens // 2
    before = case.start(min(case.batch, TRIAL_ROWS), half + 1)
    ways = WAYS[name](case, dtype)
    trials = {way: partial(generate, before, case.num_tokens - half) for way, generate in ways.items()}
    for trial in trials.values():
        trial()  # what a first call prepares
    times = {way: median_seconds(trial, TRIAL_ROUNDS, case.device) for way, trial in trials.items()}
    best = min(times, key=lambda way: times[way])
    return Side(partial(ways[best], case.start(case.batch, 1), case.num_tokens), Arithmetic(dtype), best)


def our_sides(case: Case, precisions: tuple[Any, ...], compiled: bool) -> dict[str, Side]:
    prior = case.shape.prior(case.num_tokens).to(case.device).eval()
    sides = {}
    for precision, through in product(precisions, (False, True) if compiled else (False,)):
        rule = choose(precision, case.batch, prior, through)
        sampling = Sampling(precision=precision, compiled=through, batch_size=case.batch)
        run = partial(prior.sample, case.batch, sampling=sampling)
        run()  # what a first call prepares
        numerics = numerics_for(prior, sampling, partial(WalkStart, case.batch, None))
        arithmetic, way = rule, ""
        if precision == "auto":
            arithmetic, way = numerics.arithmetic, str(numerics)
        sides[f"ours, {precision}{', compiled' if through else ''}"] = Side(run, arithmetic, way)
    return sides


def named(arithmetic: Arithmetic) -> str:
    """The key of its peak."""
    return "int8" if arithmetic.int8 else str(arithmetic.dtype).removeprefix("torch.")


def floor(case: Case, arithmetic: Arithmetic, rates: dict[str, float]) -> float:
    """Least seconds for a mean step."""
    shape, rows, mean_length = case.shape, case.batch, (case.num_tokens + 1) / 2
    weights = shape.multiplied * (1 if arithmetic.int8 else arithmetic.dtype.itemsize)
    cached = 2 * rows * shape.depth * shape.width * mean_length
    flops = 2 * rows * shape.multiplied + 2 * cached
    memory = (weights + cached * arithmetic.dtype.itemsize) / rates["bandwidth"]
    return max(memory, flops / rates[named(arithmetic)])


def measure(case: Case, sides: dict[str, Side], rates: dict[str, float], rounds: int, budget: float) -> None:
    """Time one case and print its table."""
    jobs = {name: partial(harness.timed, side.run, case.device) for name, side in sides.items()}
    found = harness.interleaved(jobs, rounds, budget)
    num = case.batch * case.num_tokens
    speeds = {name: num / statistics.median(spent.counted for spent in each) for name, each in found.items()}
    walls = {name: num / statistics.median(spent.wall for spent in each) for name, each in found.items()}
    generated = max((speed for name, speed in speeds.items() if name.startswith(GENERATE)), default=None)
    made = f"{case.shape.multiplied:,} weights without embeddings, {case.shape.num_codes:,} codes"
    print(f"\n{case.size} ({made}), {case.num_tokens} tokens, batch {case.batch}\n")
    table = harness.Table("", "way", "tokens/s", "by the clock", "×", "of the floor", "rounds")
    for name, side in sides.items():
        ratio = f"{speeds[name] / generated:.2f}" if generated else ""
        share = floor(case, side.arithmetic, rates) * speeds[name] / case.batch
        cells = (f"{speeds[name]:,.1f}", f"{walls[name]:,.1f}", ratio, f"{share:.0%}", len(found[name]))
        table.row(name, side.way, *cells)


def main(
    sizes: tuple[Size, ...] = ("5M", "110M"),
    tokens: tuple[int, ...] = (49, 256),
    batches: tuple[int, ...] = (1, 16, 64),
    precisions: tuple[Literal["auto", "float32", "bfloat16", "int8"], ...] = ("auto", "float32"),
    beside: tuple[Literal["generate", "x-transformers"], ...] = ("generate", "x-transformers"),
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16"),
    compiled: bool = False,
    rounds: int = 5,
    budget: float = 120,
    threads: int = 1,
    device: harness.Device = "cpu",
) -> None:
    """Time every case; `beside` are the others, in `dtypes`."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    kinds = ["float32", "bfloat16", *(["int8"] if device == "cpu" else [])]
    rates = {"bandwidth": bandwidth(device), **{kind: peak(kind, device) for kind in kinds}}
    peaks = ", ".join(f"{kind} {rates[kind] / 1e9:,.0f} G" for kind in kinds)
    print(f"reads {rates['bandwidth'] / 2**30:,.1f} GiB/s; operations a second: {peaks}", flush=True)
    for size, num_tokens, batch in product(sizes, tokens, batches):
        if (size, num_tokens) != ("110M", 49):
            case = Case(size, num_tokens, batch, device)
            sides = our_sides(case, precisions, compiled)
            for name, dtype in product(beside, dtypes):
                sides[f"{name}, {dtype}"] = rival(name, case, getattr(torch, dtype))
            measure(case, sides, rates, rounds, budget)
