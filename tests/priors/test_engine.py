"""The engine of walks: a trunk step by step against the trunk at once, and what it keeps in memory."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from prior_worlds import (
    blocks_of,
    make_any_order,
    make_depth,
    make_llama,
    make_next_scale,
    make_pixelcnn,
    make_transformer,
    sampled,
    seeded,
    some_codes,
)
from test_prior_controls import recorded
from torch import Tensor

import priors.base
import priors.precision
from priors import Prior, TransformerPrior
from priors.compiled_step import Compiled, step_to_compile
from priors.kv_cache import CachedTrunk, cache_bytes
from priors.precision import Arithmetic, choose
from priors.trunk import GridTrunk, SequenceTrunk, initialise

AnyTrunk = GridTrunk | SequenceTrunk
ROWS, GRID = 3, (2, 4)
POSITIONS = 8
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 0.2}


def make_trunk(dtype: torch.dtype = torch.float64, llama: bool = False) -> AnyTrunk:
    torch.manual_seed(0)
    config = TransformerPrior.Config(num_codes=2, grid=GRID, width=24, depth=2, num_heads=2)
    trunk = SequenceTrunk(config, POSITIONS, 40, 50.0) if llama else GridTrunk(config, GRID)
    initialise(trunk)
    with torch.no_grad():
        for weight in trunk.parameters():
            weight.mul_(0.25 / weight.std())
    return trunk.eval().to(dtype)


def some_inputs(trunk: AnyTrunk) -> tuple[Tensor, Tensor]:
    """Inputs "b n w", and the rotary of their positions."""
    x = torch.randn(ROWS, POSITIONS, trunk.trunk.width, generator=seeded(1)).double()
    x = x.to(next(trunk.parameters()).dtype)
    return x, trunk.rotary(x)


def cached_trunk(trunk: AnyTrunk, dtype: torch.dtype, static: bool = False) -> CachedTrunk:
    """One whose steps of one input are static where asked for, but not compiled."""
    cached = CachedTrunk(trunk.trunk, ROWS, POSITIONS, Arithmetic(dtype, compiled=static))
    cached.one = step_to_compile if static else cached.one
    return cached


def steps(cached: CachedTrunk, x: Tensor, rotary: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """All features "b n w", of so many inputs a call."""
    ends = list(itertools.accumulate(sizes))
    parts = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    return torch.cat([cached(x[:, part], rotary[..., part, :, :, :]) for part in parts], 1)


@pytest.mark.parametrize("llama", [False, True])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("sizes", [(1,) * 8, (8,), (3, 1, 1, 2, 1)])
def test_steps_are_the_trunk_at_once(dtype: torch.dtype, sizes: tuple[int, ...], static: bool, llama: bool) -> None:
    """Llama's queries and keys are not normalised."""
    trunk = make_trunk(torch.float64 if dtype == torch.float64 else torch.float32, llama)
    x, rotary = some_inputs(trunk)
    expected = trunk.trunk(x, rotary).detach()
    cached = cached_trunk(trunk, dtype, static)
    got = steps(cached, x, rotary, sizes)
    assert got.dtype == dtype
    assert not got.requires_grad
    assert cached.length == POSITIONS
    torch.testing.assert_close(got.to(x.dtype), expected, atol=TOLERANCES[dtype], rtol=0)
    cached.reset()  # what an earlier walk left in the caches is hidden, and its features are its own
    before = got.clone()
    assert torch.equal(steps(cached, x, rotary, sizes), got)
    assert torch.equal(got, before)


def near(got: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """But for rounding; features have a mean square of 1."""
    limit = 0.05 if dtype == torch.bfloat16 else 1e-11
    return (got - expected.detach()).square().mean().sqrt() < limit


@pytest.fixture(params=["exact", "large"])
def walking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[GridTrunk, torch.dtype]:
    """A trunk, and the type of its walks: exact ones, and large ones in bfloat16, which multiply whole caches."""
    monkeypatch.setattr("priors.kv_cache._LARGE", 1)
    exact = request.param == "exact"
    return make_trunk(torch.float64 if exact else torch.float32), torch.float64 if exact else torch.bfloat16


@pytest.mark.parametrize("sizes", [(1,) * 8, (8,), (3, 1, 1, 2, 1)])
@pytest.mark.parametrize("own_order", [False, True])
def test_rows_may_be_turned_each_in_its_own_order(
    walking: tuple[GridTrunk, torch.dtype], own_order: bool, sizes: tuple[int, ...]
) -> None:
    trunk, dtype = walking
    x, raster = some_inputs(trunk)
    order = torch.stack([torch.randperm(POSITIONS, generator=seeded(i)) for i in range(ROWS)])
    rotary = trunk.rotary(x, order) if own_order else raster
    cached, expected = cached_trunk(trunk, dtype), trunk.trunk(x, rotary)
    assert cached.whole == (dtype == torch.bfloat16)
    got = steps(cached, x, rotary, sizes)
    assert near(got, expected, dtype)
    assert not own_order or not near(got, trunk.trunk(x, raster), dtype)
    cached.reset()  # what an earlier walk left in the caches is hidden
    assert torch.equal(steps(cached, x, rotary, sizes), got)


def test_what_sees_what_within_a_call(walking: tuple[GridTrunk, torch.dtype]) -> None:
    trunk, dtype = walking
    x, rotary = some_inputs(trunk)
    blocks = torch.block_diag(*[torch.ones(size, size) for size in (1, 3, 4)]).bool()
    visible = torch.ones(POSITIONS, POSITIONS, dtype=torch.bool).tril() | blocks
    expected, cached, got = trunk.trunk(x, rotary, visible), cached_trunk(trunk, dtype), []
    assert not near(trunk.trunk(x, rotary), expected, dtype)
    for part in (slice(0, 1), slice(1, 4), slice(4, 8)):
        # Before each part a call whose inputs are all dropped, over positions that are written anew.
        dropped = slice(part.start, min(part.stop + 2, POSITIONS))
        cached(torch.full_like(x[:, dropped], 100.0), rotary[dropped], num_kept=0)
        assert cached.length == part.start
        got.append(cached(x[:, part], rotary[part], visible[part, part]))
    assert near(torch.cat(got, 1), expected, dtype)
    # Of probes that see but themselves the first is kept.
    cached.reset()
    first = cached(x[:, :3], rotary[:3], torch.eye(3, dtype=torch.bool), 1)
    alone = torch.cat([trunk.trunk(x[:, i : i + 1], rotary[i : i + 1]) for i in range(3)], 1)
    assert near(first, alone, dtype)
    assert near(cached(x[:, 1:], rotary[1:]), trunk.trunk(x, rotary)[:, 1:], dtype)


@pytest.mark.parametrize(
    ("precision", "most", "most_kl"),
    [("float32", 2e-5, 1e-7), ("bfloat16", 0.25, 3e-4), ("int8", 0.35, 1e-3)],
)
@pytest.mark.parametrize("make", [make_llama, make_transformer])
@pytest.mark.parametrize("kind", ["plain", "static", "large"])
def test_conditionals_of_walks_are_the_exact_ones_but_for_rounding(
    precision: str, most: float, most_kl: float, make: object, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every position: the largest difference, and the mean KL from the exact one, in nats."""
    monkeypatch.setattr("priors.kv_cache.Compiled", lambda: step_to_compile)
    if kind == "large":
        monkeypatch.setattr("priors.kv_cache._LARGE", 1)
    prior = make(num_codes=11, grid=(3, 4), width=32)
    options = {"precision": precision, "compiled": kind == "static", "generator": seeded()}
    drawn, walked = recorded(prior, monkeypatch, num=16, **options)
    exact = copy.deepcopy(prior).double().log_conditionals(drawn).flatten(1, -2).detach()
    assert exact.std() > 0.5
    assert (walked - exact).abs().max() < most
    assert (exact.exp() * (exact - walked)).sum(-1).mean() < most_kl


# ---- memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_bytes_are_those_of_caches_and_a_step(dtype: torch.dtype) -> None:
    trunk = make_trunk(torch.float32)
    x, rotary = some_inputs(trunk)
    for num_inputs in (1, 3, 8):
        cached = cached_trunk(trunk, dtype)
        cached(x[:, :num_inputs], rotary[:num_inputs])
        of_caches, of_both = (cache_bytes(trunk.trunk, POSITIONS, Arithmetic(dtype), num) for num in (0, num_inputs))
        caches = [cache for layer in cached.layers for cache in layer[:2]]
        assert sum(cache.untyped_storage().nbytes() for cache in caches) == ROWS * of_caches
        scratch = [part for part in vars(cached._scratch[num_inputs]).values() if isinstance(part, Tensor)]
        storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in scratch}
        gated = 3 * trunk.trunk.mlp_width * num_inputs * 4
        taken = sum(storages.values()) / ROWS
        assert taken < of_both - of_caches < 2 * taken + gated


def test_walk_bytes_of_two_trunks_of_wide_branches_and_of_convolutions() -> None:
    prior = make_depth(num_codes=4, grid=(3, 2, 4), depth=3, code_depth=1)
    # Keys and values, of 3 layers at 6 positions and of 1 layer at 4 codes.
    caches = 2 * (3 * 6 + 1 * 4) * 24 * 4
    # Of each input what a step needs beside them, as much as 16 vectors and the scores of two heads.
    of_a_position, of_a_code = (16 * 24 + 2 * 6) * 4, (16 * 24 + 2 * 4) * 4
    assert prior.walk_bytes(Arithmetic(torch.float32), 5) == caches + 5 * of_a_position + of_a_code
    plain, wide = (make_llama(num_codes=4, grid=(3,), mlp_width=mlp_width) for mlp_width in (None, 200))
    more = wide.walk_bytes(Arithmetic(torch.float32), 2) - plain.walk_bytes(Arithmetic(torch.float32), 2)
    assert more == 4 * 2 * 3 * (200 - plain.trunk.trunk.mlp_width)
    prior = make_pixelcnn(num_codes=3, grid=(3, 4), depth=3, kernel_size=5, width=8)
    kept = 3 * 8 * (2 * 4 + 2 + 2 * 4) * 4  # layers, channels, two rows and two columns and a row of links, bytes
    assert prior.walk_bytes(Arithmetic(torch.bfloat16)) == kept


@pytest.mark.parametrize("guided", [False, True])
def test_blocks_keep_the_caches_under_their_limit(guided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = make_transformer(num_codes=3, grid=(2, 2), num_classes=2)
    each = prior.walk_bytes(Arithmetic(torch.float32), 2) + 16 * prior.num_codes

    def sizes(limit: int, num: int) -> list[int]:
        monkeypatch.setattr(priors.base, "CACHE_BYTES", limit)
        options = {"guidance": 2.0 if guided else None, "precision": "float32"}
        return [len(block) for block in blocks_of(prior, num, torch.arange(num) % 2, **options)]

    assert sizes(2**30, 40) == [40]
    seen = sizes(12 * each, 40)
    assert sum(seen) == 40
    assert max(seen) == (6 if guided else 12)
    assert sizes(1, 3) == [1, 1, 1]  # a block is never empty


def first_block(prior: Prior, **options: object) -> int:
    return len(next(iter(blocks_of(prior, 200, precision="float32", **options))))


def test_blocks_shrink_with_what_a_step_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step over many positions has many inputs, scores and conditionals, beside the caches."""
    monkeypatch.setattr(priors.base, "CACHE_BYTES", 2**19)
    tiny = {"width": 8, "depth": 1, "num_heads": 1}
    sizes = [first_block(make_next_scale(num_codes=50, scales=(1, last), **tiny)) for last in (2, 4, 8)]
    assert 200 > sizes[0] > 2 * sizes[1] > 4 * sizes[2]
    prior = make_any_order(num_codes=50, grid=(4, 4), **tiny)
    by_steps = [first_block(prior, num_steps=num_steps) for num_steps in (16, 4, 1)]
    assert first_block(prior) == by_steps[0] > 2 * by_steps[1] > 2 * by_steps[2]
    # The first step reads all that is known at once.
    prior = make_transformer(num_codes=2, grid=(64,), **tiny)
    prefix = torch.zeros(200, 60, dtype=torch.int64)
    assert first_block(prior, prefix=prefix) < first_block(prior) / 2


# ---- static steps


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each static step, which is put in the place of compiled ones."""
    rows: list[int] = []

    def step(x: Tensor, *inputs: object) -> Tensor:
        rows.append(len(x))
        return step_to_compile(x, *inputs)

    monkeypatch.setattr("priors.kv_cache.Compiled", lambda: step)
    return rows


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float64, "auto"), (torch.float32, "float32")])
@pytest.mark.parametrize("known", ["prefix", "masks", "masks in steps"])
def test_a_static_walk_draws_the_same_codes(
    dtype: torch.dtype, precision: str, known: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under masks rotations are those of each row."""
    make, num = make_transformer if known == "prefix" else make_any_order, 6
    prior = make(num_codes=7, grid=GRID, num_classes=2).to(dtype)
    rows, labels = counting(monkeypatch), torch.arange(num) % 2
    codes = some_codes(prior, num)
    masks = (torch.rand(num, POSITIONS, generator=seeded(1)).argsort(1) < 5).view(num, *GRID)
    masks[0] = torch.tensor([False] * 4 + [True] * 4).view(GRID)  # one is known in more positions
    options = {"precision": precision, "guidance": 2.0, "num_steps": 5 if known == "masks in steps" else None}
    options |= {"prefix": codes.flatten(1)[:, :3]} if known == "prefix" else {"given": codes, "mask": masks}
    drawn = [sampled(prior, num, labels, compiled=each, generator=seeded(), **options) for each in (False, True)]
    # The first step reads three known codes and the start; each of the others reads one.
    assert rows == [2 * num] * 4
    assert torch.equal(*drawn)
    assert known == "prefix" or torch.equal(drawn[0][~masks], codes[~masks])


@pytest.mark.slow
@pytest.mark.usefixtures("untyped")
def test_compiled_walks_are_eager_ones() -> None:
    prior = make_transformer(num_codes=7, grid=GRID)
    x = torch.randn(ROWS, POSITIONS, 24, generator=seeded(1))
    cached = CachedTrunk(prior.trunk.trunk, ROWS, POSITIONS, Arithmetic(torch.float32, compiled=True))
    assert isinstance(cached.one, Compiled)
    rotary = prior.trunk.rotary(x)
    expected = prior.trunk.trunk(x, rotary).detach()
    torch.testing.assert_close(steps(cached, x, rotary, (2, *(1,) * 6)), expected, atol=1e-4, rtol=0)
    eager, compiled = (
        sampled(prior, ROWS, compiled=each, precision="float32", generator=seeded()) for each in (False, True)
    )
    assert (eager == compiled).float().mean() > 0.9


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_cuda_graphs_are_eager_steps(dtype: torch.dtype) -> None:
    trunk = make_trunk(dtype).cuda()
    x, rotary = some_inputs(trunk)
    x, rotary = x.cuda(), trunk.rotary(x.cuda())
    cached = CachedTrunk(trunk.trunk, ROWS, POSITIONS, Arithmetic(dtype))
    expected = trunk.trunk(x, rotary).detach()
    tolerance = {"atol": 1e-10 if dtype == torch.float64 else 1e-3, "rtol": 0}
    for sizes in ((1,) * 8, (3, *(1,) * 5)):
        torch.testing.assert_close(steps(cached, x, rotary, sizes), expected, **tolerance)
        cached.reset()
    cached.one = step_to_compile
    torch.testing.assert_close(steps(cached, x, rotary, (1,) * 8), expected, **tolerance)


# ---- which arithmetic


def test_arithmetic_goes_by_rows_weights_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = make_transformer(num_codes=3, grid=(2, 2))
    monkeypatch.setattr(priors.precision, "has_bf16", lambda device: True)
    assert choose("auto", 15, prior, False) == Arithmetic(torch.float32)
    assert choose("auto", 16, prior, False) == Arithmetic(torch.bfloat16)
    monkeypatch.setattr(priors.precision, "_WEIGHTS_FOR_BF16", 1000)
    assert choose("auto", 1, prior, True) == Arithmetic(torch.bfloat16, compiled=True)
    monkeypatch.setattr(priors.precision, "has_bf16", lambda device: False)
    assert choose("auto", 64, prior, False) == Arithmetic(torch.float32)
    on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, parameters=list)
    untyped = getattr(choose, "__wrapped__", choose)
    assert untyped("auto", 1, on_gpu, False) == Arithmetic(torch.float32)
    monkeypatch.setattr(priors.precision, "has_bf16", lambda device: True)
    assert untyped("auto", 1, on_gpu, False) == Arithmetic(torch.bfloat16)
    with pytest.raises(ValueError, match="precision='int8' on cuda, expected a prior on the CPU"):
        untyped("int8", 1, on_gpu, False)
    # What is asked for is what is taken.
    assert choose("float32", 64, prior, False) == Arithmetic(torch.float32)
    assert choose("bfloat16", 1, prior, False) == Arithmetic(torch.bfloat16)
    assert choose("int8", 1, prior, False) == Arithmetic(torch.bfloat16, int8=True)
    assert choose("auto", 64, prior.double(), False) == Arithmetic(torch.float64)
