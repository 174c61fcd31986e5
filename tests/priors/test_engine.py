"""The engine of walks: a trunk step by step against the trunk at once, and what it keeps in memory."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from prior_worlds import KINDS, blocks_of, make_any_order, make_next_scale, make_transformer, sampled
from test_prior_controls import recorded
from torch import Tensor

import priors.base
import priors.precision
from priors import Prior, Sampling
from priors.compiled_step import Compiled, step_to_compile
from priors.kv_cache import CachedTrunk, cache_bytes
from priors.precision import Arithmetic, choose
from priors.trunk import GridTrunk, Trunk, initialise
from priors.walks import WalkOrder

ROWS, GRID = 3, (2, 4)
POSITIONS = 8
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 0.15}


def make_trunk(dtype: torch.dtype = torch.float64, width: int = 24, depth: int = 2) -> GridTrunk:
    torch.manual_seed(0)
    config = SimpleNamespace(width=width, depth=depth, num_heads=2, dropout=0.0, checkpointing=False)
    trunk = GridTrunk(config, GRID)
    initialise(trunk)
    with torch.no_grad():
        for weight in trunk.parameters():
            weight.mul_(0.25 / weight.std())
    return trunk.eval().to(dtype)


def some_inputs(trunk: GridTrunk) -> tuple[Tensor, Tensor]:
    """Inputs "b n w", and the rotary of their positions."""
    x = torch.randn(ROWS, POSITIONS, trunk.trunk.width, generator=torch.Generator().manual_seed(1)).double()
    x = x.to(trunk.target.dtype)
    return x, trunk.rotary(x)


def steps(cached: CachedTrunk, x: Tensor, rotary: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """All features "b n w", of so many inputs a call."""
    ends = list(itertools.accumulate(sizes))
    parts = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    return torch.cat([cached(x[:, part], rotary[..., part, :, :, :]) for part in parts], 1)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("sizes", [(1,) * 8, (8,), (3, 1, 1, 2, 1), (1, 5, 2)])
def test_steps_are_the_trunk_at_once(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    trunk = make_trunk(torch.float64 if dtype == torch.float64 else torch.float32)
    x, rotary = some_inputs(trunk)
    expected = trunk.trunk(x, rotary).detach()
    cached = CachedTrunk(trunk.trunk, ROWS, POSITIONS, Arithmetic(dtype))
    got = steps(cached, x, rotary, sizes)
    assert got.dtype == dtype
    assert not got.requires_grad
    assert cached.length == POSITIONS
    torch.testing.assert_close(got.to(x.dtype), expected, atol=TOLERANCES[dtype], rtol=0)
    cached.reset()
    assert cached.length == 0
    assert torch.equal(steps(cached, x, rotary, sizes), got)


def test_int8_steps_are_near_the_trunk() -> None:
    trunk = make_trunk(torch.float32, width=32)
    x, rotary = some_inputs(trunk)
    got = steps(CachedTrunk(trunk.trunk, ROWS, POSITIONS, Arithmetic(torch.bfloat16, int8=True)), x, rotary, (1,) * 8)
    error = (got - trunk.trunk(x, rotary)).detach().square().mean().sqrt()
    assert 1e-4 < error < 0.1  # features have a mean square of 1


@pytest.mark.parametrize("sizes", [(1,) * 8, (4, 1, 3)])
def test_rows_may_be_turned_each_in_its_own_order(sizes: tuple[int, ...]) -> None:
    trunk = make_trunk()
    x, _ = some_inputs(trunk)
    order = torch.stack([torch.randperm(POSITIONS, generator=torch.Generator().manual_seed(i)) for i in range(ROWS)])
    rotary = trunk.rotary(x, order)
    assert rotary.ndim == 5
    got = steps(CachedTrunk(trunk.trunk, ROWS, POSITIONS, Arithmetic(torch.float64)), x, rotary, sizes)
    torch.testing.assert_close(got, trunk.trunk(x, rotary).detach(), atol=1e-11, rtol=0)
    assert not torch.allclose(got, trunk.trunk(x, trunk.rotary(x)).detach())


def test_what_sees_what_within_a_call() -> None:
    trunk = make_trunk()
    x, rotary = some_inputs(trunk)
    blocks = torch.block_diag(*[torch.ones(size, size) for size in (1, 3, 4)]).bool()
    visible = torch.ones(POSITIONS, POSITIONS, dtype=torch.bool).tril() | blocks
    expected = trunk.trunk(x, rotary, visible).detach()
    cached = CachedTrunk(trunk.trunk, ROWS, POSITIONS, Arithmetic(torch.float64))
    parts = [slice(0, 1), slice(1, 4), slice(4, 8)]
    got = torch.cat([cached(x[:, part], rotary[part], visible[part, part]) for part in parts], 1)
    torch.testing.assert_close(got, expected, atol=1e-11, rtol=0)
    assert not torch.allclose(expected, trunk.trunk(x, rotary).detach())
    alone = torch.eye(2, dtype=torch.bool)
    cached.reset()
    pair = cached(x[:, :2], rotary[:2], alone)
    torch.testing.assert_close(pair[:, 1], trunk.trunk(x[:, 1:2], rotary[1:2])[:, 0].detach(), atol=1e-11, rtol=0)


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("sizes", [(1,) * 8, (8,), (3, 1, 1, 2, 1)])
def test_large_walks_in_bfloat16_multiply_whole_caches(
    sizes: tuple[int, ...], order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = make_trunk(torch.float32)
    x, rotary = some_inputs(trunk)
    if order:
        rotary = trunk.rotary(x, torch.stack([torch.arange(POSITIONS).roll(3 * i) for i in range(ROWS)]))
    monkeypatch.setattr("priors.kv_cache._LARGE", 1)
    assert not CachedTrunk(trunk.trunk, ROWS, POSITIONS, Arithmetic(torch.float32)).whole
    cached = CachedTrunk(trunk.trunk, ROWS, POSITIONS, Arithmetic(torch.bfloat16))
    assert cached.whole
    assert all(cache.dtype == torch.bfloat16 for layer in cached.layers for cache in layer[:2])
    expected = trunk.trunk(x, rotary).detach()
    got = steps(cached, x, rotary, sizes)
    torch.testing.assert_close(got.float(), expected, atol=0.25, rtol=0)
    assert (got - expected).square().mean().sqrt() < 0.05  # features have a mean square of 1
    cached.reset()  # what an earlier walk left in the caches is hidden
    assert torch.equal(steps(cached, x, rotary, sizes), got)


def test_large_walks_see_and_keep_what_they_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = make_trunk(torch.float32)
    x, rotary = some_inputs(trunk)
    blocks = torch.block_diag(*[torch.ones(size, size) for size in (1, 3, 4)]).bool()
    visible = torch.ones(POSITIONS, POSITIONS, dtype=torch.bool).tril() | blocks
    expected = trunk.trunk(x, rotary, visible).detach()
    assert (expected - trunk.trunk(x, rotary).detach()).square().mean().sqrt() > 0.2
    monkeypatch.setattr("priors.kv_cache._LARGE", 1)
    cached = CachedTrunk(trunk.trunk, ROWS, POSITIONS, Arithmetic(torch.bfloat16))
    got = []
    for part in (slice(0, 1), slice(1, 4), slice(4, 8)):
        # Before each part a call whose inputs are all dropped, over positions that are written anew.
        dropped = slice(part.start, min(part.stop + 2, POSITIONS))
        cached(torch.full_like(x[:, dropped], 100.0), rotary[dropped], num_kept=0)
        assert cached.length == part.start
        got.append(cached(x[:, part], rotary[part], visible[part, part]))
    assert (torch.cat(got, 1) - expected).square().mean().sqrt() < 0.05
    # Of probes that see but themselves the first is kept.
    cached.reset()
    first = cached(x[:, :3], rotary[:3], torch.eye(3, dtype=torch.bool), 1)
    alone = torch.cat([trunk.trunk(x[:, i : i + 1], rotary[i : i + 1]) for i in range(3)], 1).detach()
    assert (first - alone).square().mean().sqrt() < 0.05
    rest = cached(x[:, 1:], rotary[1:])
    assert (rest - trunk.trunk(x, rotary)[:, 1:].detach()).square().mean().sqrt() < 0.05


@pytest.mark.parametrize("kind", ["transformer", "any-order", "next-scale"])
def test_large_walks_draw_nearly_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = Sampling(temperature=0.0, precision="bfloat16", num_steps=2 if kind == "any-order" else None)
    prefix = torch.arange(3).repeat_interleave(3)[:, None]
    prior = KINDS[kind]()
    small = prior.sample(9, sampling=sampling, prefix=prefix)
    monkeypatch.setattr("priors.kv_cache._LARGE", 1)
    assert (prior.sample(9, sampling=sampling, prefix=prefix) == small).float().mean() > 0.9


def test_a_walk_is_large_by_its_rows_positions_and_width() -> None:
    trunk = make_trunk(torch.float32, width=64, depth=1)
    for rows, whole in ((2**10, True), (2**10 - 1, False)):
        assert CachedTrunk(trunk.trunk, rows, POSITIONS, Arithmetic(torch.bfloat16)).whole == whole


@pytest.mark.parametrize("num_kept", [0, 1, 2])
def test_dropped_inputs_leave_no_trace(num_kept: int) -> None:
    trunk = make_trunk()
    x, rotary = some_inputs(trunk)
    plain = CachedTrunk(trunk.trunk, ROWS, POSITIONS, Arithmetic(torch.float64))
    expected = steps(plain, x, rotary, (2, num_kept, 6 - num_kept) if num_kept else (2, 6))
    cached = CachedTrunk(trunk.trunk, ROWS, POSITIONS, Arithmetic(torch.float64))
    first = steps(cached, x, rotary, (2,))
    probes = torch.cat((x[:, 2 : 2 + num_kept], torch.full_like(x[:, :3], 100.0)), 1)
    cached(probes, rotary[2 : 5 + num_kept], num_kept=num_kept)
    assert cached.length == 2 + num_kept
    rest = cached(x[:, 2 + num_kept :], rotary[2 + num_kept :])
    got = torch.cat((first, expected[:, 2 : 2 + num_kept], rest), 1)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_no_rows() -> None:
    trunk = make_trunk(torch.float32)
    x, rotary = some_inputs(trunk)
    cached = CachedTrunk(trunk.trunk, 0, POSITIONS, Arithmetic(torch.bfloat16))
    assert cached(x[:0, :2], rotary[:2]).shape == (0, 2, 24)
    assert cached(x[:0, :1], rotary[2:3]).dtype == torch.bfloat16


def test_features_are_not_overwritten_by_later_steps() -> None:
    trunk = make_trunk()
    x, rotary = some_inputs(trunk)
    for compiled in (False, True):
        cached = eager_static(trunk.trunk, torch.float64) if compiled else plain_stepper(trunk.trunk)
        first = cached(x[:, :1], rotary[:1])
        before = first.clone()
        cached(x[:, 1:2], rotary[1:2])
        assert torch.equal(first, before)


def plain_stepper(trunk: Trunk) -> CachedTrunk:
    return CachedTrunk(trunk, ROWS, POSITIONS, Arithmetic(torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_caches_stay_where_they_are_and_take_what_is_said(dtype: torch.dtype) -> None:
    trunk = make_trunk(torch.float32)
    x, rotary = some_inputs(trunk)
    cached = CachedTrunk(trunk.trunk, ROWS, POSITIONS, Arithmetic(dtype))
    caches = [cache for layer in cached.layers for cache in layer[:2]]
    positions = [cache.data_ptr() for cache in caches]
    steps(cached, x, rotary, (3, 1, 1, 1, 1, 1))
    cached.reset()
    steps(cached, x, rotary, (1,) * 8)
    assert [cache.data_ptr() for layer in cached.layers for cache in layer[:2]] == positions
    taken = sum(cache.untyped_storage().nbytes() for cache in caches)
    assert taken == ROWS * cache_bytes(trunk.trunk, POSITIONS, Arithmetic(dtype), 0)
    assert taken == 4 * 2 * 2 * ROWS * POSITIONS * 24


@pytest.mark.parametrize("num_inputs", [1, 3, 8])
def test_cache_bytes_are_those_of_a_step_at_most(num_inputs: int) -> None:
    trunk = make_trunk(torch.float32)
    x, rotary = some_inputs(trunk)
    cached, arithmetic = CachedTrunk(trunk.trunk, ROWS, POSITIONS, Arithmetic(torch.float32)), Arithmetic(torch.float32)
    cached(x[:, :num_inputs], rotary[:num_inputs])
    parts = [part for part in vars(cached._scratch[num_inputs]).values() if isinstance(part, Tensor)]
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
    of_a_step = cache_bytes(trunk.trunk, POSITIONS, arithmetic, num_inputs) - cache_bytes(
        trunk.trunk, POSITIONS, arithmetic, 0
    )
    gated = 3 * trunk.trunk.blocks[0].mlp.out.in_features * num_inputs * 4
    assert sum(storages.values()) / ROWS < of_a_step < 2 * sum(storages.values()) / ROWS + gated


@pytest.mark.parametrize("guided", [False, True])
def test_blocks_keep_the_caches_under_their_limit(guided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = make_transformer(num_codes=3, grid=(2, 2), num_classes=2)
    arithmetic = Arithmetic(torch.float32)
    seen, walk = [], Prior._walk

    def spy(self: Prior, chooser: object, labels: object, strengths: object, order: WalkOrder, *rest: object) -> Tensor:
        seen.append(len(order.known))
        return walk(self, chooser, labels, strengths, order, *rest)

    monkeypatch.setattr(Prior, "_walk", spy)
    labels = torch.arange(40) % 2
    sampling = Sampling(guidance=2.0 if guided else None, precision="float32")
    prior.sample(40, labels, sampling)
    assert seen == [40]
    limit = 12 * (prior.walk_bytes(arithmetic, 2) + 16 * prior.num_codes)
    monkeypatch.setattr(priors.draws, "CACHE_BYTES", limit)
    seen.clear()
    prior.sample(40, labels, sampling)
    assert sum(seen) == 40
    widest = 2 if guided else 1
    assert 12 // widest - 1 <= max(seen) <= 12 // widest
    assert max(seen) * widest * prior.walk_bytes(arithmetic, 2) <= limit
    monkeypatch.setattr(priors.draws, "CACHE_BYTES", 1)
    seen.clear()
    prior.sample(3, labels[:3], sampling)
    assert seen == [1, 1, 1]  # a block is never empty


def first_block(prior: Prior, **options: object) -> int:
    return len(next(iter(blocks_of(prior, 200, precision="float32", **options))))


def test_blocks_shrink_with_what_a_step_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step over many positions has many inputs, scores and conditionals, beside the caches."""
    arithmetic = Arithmetic(torch.float32)
    monkeypatch.setattr(priors.draws, "CACHE_BYTES", 2**20)
    sizes = []
    for last in (2, 4, 8):
        prior = make_next_scale(num_codes=50, scales=(1, last), width=8, depth=1, num_heads=1)
        assert prior.num_at_once == last**2
        sizes.append(first_block(prior))
        each = prior.walk_bytes(arithmetic, 2 * last**2) + 16 * 50 * last**2
        assert sizes[-1] == max(1, min(200, 2**20 // each))
        assert prior.walk_bytes(arithmetic, 2 * last**2) > prior.walk_bytes(arithmetic)
    assert 200 >= sizes[0] > 2 * sizes[1] > 4 * sizes[2]
    prior = make_any_order(num_codes=50, grid=(4, 8), width=8, depth=1, num_heads=1)
    assert prior.num_at_once == 1
    by_steps = [first_block(prior, num_steps=num_steps) for num_steps in (32, 8, 2, 1)]
    assert by_steps == sorted(by_steps, reverse=True)
    assert first_block(prior) == by_steps[0] > 2 * by_steps[2] > 2 * by_steps[3]
    # The first step reads all that is known at once.
    prior = make_transformer(num_codes=2, grid=(64,), width=8, depth=1, num_heads=1)
    prefix = torch.zeros(200, 60, dtype=torch.int64)
    assert first_block(prior, prefix=prefix) < first_block(prior) / 2


def eager_static(trunk: Trunk, dtype: torch.dtype) -> CachedTrunk:
    """A cached on its static path, not compiled."""
    cached = CachedTrunk(trunk, ROWS, POSITIONS, Arithmetic(dtype, compiled=True))
    cached.one = step_to_compile
    return cached


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4), (torch.bfloat16, 0.2)])
@pytest.mark.parametrize("sizes", [(1,) * 8, (3, 1, 1, 2, 1)])
def test_static_steps_are_the_trunk_at_once(dtype: torch.dtype, tolerance: float, sizes: tuple[int, ...]) -> None:
    trunk = make_trunk(torch.float64 if dtype == torch.float64 else torch.float32)
    x, rotary = some_inputs(trunk)
    cached = eager_static(trunk.trunk, dtype)
    expected = trunk.trunk(x, rotary).detach()
    for _ in range(2):  # what an earlier walk left in the caches is hidden
        got = steps(cached, x, rotary, sizes)
        assert got.dtype == dtype
        torch.testing.assert_close(got.to(x.dtype), expected, atol=tolerance, rtol=0)
        cached.reset()


def test_static_int8_steps_are_near_the_trunk() -> None:
    trunk = make_trunk(torch.float32)
    x, rotary = some_inputs(trunk)
    cached = CachedTrunk(trunk.trunk, ROWS, POSITIONS, Arithmetic(torch.bfloat16, int8=True, compiled=True))
    cached.one = step_to_compile
    error = (steps(cached, x, rotary, (2, *(1,) * 6)) - trunk.trunk(x, rotary)).detach().square().mean().sqrt()
    assert error < 0.1


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float64, "auto"), (torch.float32, "float32")])
@pytest.mark.parametrize("make", [make_transformer, make_any_order])
def test_a_static_walk_draws_the_same_codes(
    make: object, dtype: torch.dtype, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prior = make(num_codes=7, grid=GRID, num_classes=2).to(dtype)
    labels = torch.arange(6) % 2
    options = {"precision": precision, "guidance": 2.0, "prefix": torch.ones(6, 2, dtype=torch.int64)}
    calls = counting(monkeypatch)
    drawn = [
        sampled(prior, 6, labels, compiled=compiled, generator=torch.Generator().manual_seed(0), **options)
        for compiled in (False, True)
    ]
    assert len(calls) == POSITIONS - 3
    assert torch.equal(*drawn)


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each static step, which is put in the place of compiled ones."""
    rows: list[int] = []

    def step(x: Tensor, *inputs: object) -> Tensor:
        rows.append(len(x))
        return step_to_compile(x, *inputs)

    monkeypatch.setattr("priors.kv_cache.Compiled", lambda: step)
    return rows


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float64, "auto"), (torch.float32, "float32")])
@pytest.mark.parametrize("num_steps", [None, 5])
def test_a_static_walk_under_masks_draws_the_same_codes(
    dtype: torch.dtype, precision: str, num_steps: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotations are then those of each row."""
    prior = make_any_order(num_codes=7, grid=GRID, num_classes=2).to(dtype)
    rows, labels, num = counting(monkeypatch), torch.arange(6) % 2, 6
    codes = torch.randint(7, (num, *GRID), generator=torch.Generator().manual_seed(0))
    masks = (torch.rand(num, POSITIONS, generator=torch.Generator().manual_seed(1)).argsort(1) < 5).view(num, *GRID)
    masks[0] = torch.tensor([False] * 4 + [True] * 4).view(GRID)  # one is known in more positions
    options = {"precision": precision, "guidance": 2.0, "given": codes, "mask": masks, "num_steps": num_steps}
    drawn = [
        sampled(prior, num, labels, compiled=compiled, generator=torch.Generator().manual_seed(0), **options)
        for compiled in (False, True)
    ]
    # The first step reads three known codes and the start; each of the others reads one.
    assert rows == [2 * num] * 4
    assert torch.equal(*drawn)
    assert torch.equal(drawn[0][~masks], codes[~masks])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_static_walks_with_seeds_do_not_show_other_masks(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid in raster order alone goes by rotary of all rows, among others with holes by those of each row."""
    prior, num = make_any_order(num_codes=7, grid=GRID), 6
    rows = counting(monkeypatch)
    codes = torch.randint(7, (num, *GRID), generator=torch.Generator().manual_seed(0))
    masks = torch.rand(num, *GRID, generator=torch.Generator().manual_seed(1)) < 0.5
    masks[0] = True
    masks[1] = (torch.arange(POSITIONS) > 2).view(GRID)
    options = {"precision": precision, "compiled": True}
    drawn, conditionals = recorded(prior, monkeypatch, num=num, seeds=range(num), given=codes, mask=masks, **options)
    assert rows == [16] * POSITIONS
    for i in range(num):
        alone, own_conditionals = recorded(
            prior, monkeypatch, num=1, seeds=[i], given=codes[i : i + 1], mask=masks[i], **options
        )
        assert torch.equal(alone[0], drawn[i]), i
        assert torch.equal(own_conditionals[0], conditionals[i]), i
    assert rows == [16] * POSITIONS * (num + 1)


@pytest.mark.slow
@pytest.mark.usefixtures("untyped")
def test_compiled_steps_are_eager_ones() -> None:
    trunk = make_trunk(torch.float32)
    x, rotary = some_inputs(trunk)
    cached = CachedTrunk(trunk.trunk, ROWS, POSITIONS, Arithmetic(torch.float32, compiled=True))
    assert isinstance(cached.one, Compiled)
    got = steps(cached, x, rotary, (2, *(1,) * 6))
    torch.testing.assert_close(got, trunk.trunk(x, rotary).detach(), atol=1e-4, rtol=0)
    prior = make_transformer(num_codes=7, grid=GRID)
    eager, compiled = (
        prior.sample(
            16, sampling=Sampling(compiled=compiled, precision="float32"), generator=torch.Generator().manual_seed(0)
        )
        for compiled in (False, True)
    )
    assert (eager == compiled).float().mean() > 0.95


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
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


def test_auto_goes_by_rows_weights_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_asked_for_is_what_is_taken() -> None:
    prior = make_transformer(num_codes=3, grid=(2, 2))
    assert choose("float32", 64, prior, False) == Arithmetic(torch.float32)
    assert choose("bfloat16", 1, prior, False) == Arithmetic(torch.bfloat16)
    assert choose("int8", 1, prior, False) == Arithmetic(torch.bfloat16, int8=True)
    assert choose("auto", 64, prior.double(), False) == Arithmetic(torch.float64)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_the_same_generator_draws_the_same_codes(precision: str) -> None:
    prior = make_transformer(num_codes=7, grid=GRID)
    twin = copy.deepcopy(prior)
    first, second = (
        each.sample(20, sampling=Sampling(precision=precision), generator=torch.Generator().manual_seed(0))
        for each in (prior, twin)
    )
    assert torch.equal(first, second)
