"""Linear maps of a walk: right for every layout and precision, and never those of weights that have changed since."""

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from prior_worlds import make_transformer
from torch import Tensor, nn

from priors import Sampling, packed_linear
from priors.packed_linear import multiply, plain, prepare
from priors.precision import Arithmetic

KINDS = {
    "float64": (Arithmetic(torch.float64), 1e-12),
    "float32": (Arithmetic(torch.float32), 1e-4),
    "bfloat16": (Arithmetic(torch.bfloat16), 0.02),
}
INT8 = Arithmetic(torch.bfloat16, int8=True)


def some_weight(out: int = 40, inputs: int = 24, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(out, inputs, generator=torch.Generator().manual_seed(seed)))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def some_rows(num: int, width: int = 24) -> Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(1))


def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linear, "_packed", lambda weight, rows: None)


@pytest.mark.parametrize("rows", [1, 3, 16, 33])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [True, False])
def test_maps_are_linear(kind: str, rows: int, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not packed:
        unpacked(monkeypatch)
    arithmetic, tolerance = KINDS[kind]
    weight, x = some_weight(), some_rows(rows)
    expected = F.linear(x.double(), weight.double()).detach()
    scale = expected.abs().max()
    of_the_layer = prepare(weight, arithmetic, 3)
    for got in (of_the_layer(x.to(arithmetic.dtype)), multiply(x.to(arithmetic.dtype), plain(weight, arithmetic))):
        assert got.dtype == arithmetic.dtype
        assert not got.requires_grad
        assert (got.double() - expected).abs().max() < tolerance * scale
    assert of_the_layer(x[:0].to(arithmetic.dtype)).shape == (0, 40)


@pytest.mark.parametrize("inputs", [2, 8, 24, 32, 40, 100])
@pytest.mark.parametrize("out", [1, 3, 32, 50])
def test_8_bits_round_by_half_a_step_at_most(inputs: int, out: int) -> None:
    """Also for widths that torch's product, which reads 16 at a time, would read past."""
    weight = some_weight(out, inputs)
    steps = weight.detach().abs().amax(1) / 127
    for rows in (1, 2, 5, 20):
        x = some_rows(rows, inputs).bfloat16()
        expected = F.linear(x.double(), weight.detach().double())
        # Half a step an input, and the roundings of scales and of results to bfloat16.
        bound = x.double().abs().sum(1, keepdim=True) * steps * 0.51 + expected.abs() * 2**-6
        for got in (prepare(weight, INT8)(x), multiply(x, plain(weight, INT8))):
            assert got.dtype == torch.bfloat16
            assert ((got.double() - expected).abs() <= bound).all()


def test_8_bits_of_a_row_of_zeros() -> None:
    weight = nn.Parameter(torch.cat((torch.zeros(1, 16), torch.ones(1, 16))))
    assert prepare(weight, INT8)(torch.ones(1, 16).bfloat16()).tolist() == [[0, 16]]


def test_a_change_comes_before_the_rounding() -> None:
    weight, x = some_weight(), some_rows(3)
    doubled = prepare(weight, Arithmetic(torch.float32), 1, lambda weight: 2 * weight)
    torch.testing.assert_close(doubled(x), F.linear(x, 2 * weight).detach())


def step_of(optimiser: Callable[..., torch.optim.Optimizer]) -> Callable[[nn.Parameter], None]:
    def change(weight: nn.Parameter) -> None:
        weight.grad = torch.ones_like(weight)
        optimiser([weight]).step()

    return change


def swap(weight: nn.Parameter) -> None:
    weight.data = weight.data + 1


@torch.no_grad()
def add(weight: nn.Parameter) -> None:
    weight.add_(1)


@torch.no_grad()
def nudge(weight: nn.Parameter) -> None:
    weight[3, 5] += 1


@torch.no_grad()
def double(weight: nn.Parameter) -> None:
    weight.mul_(2)  # which leaves the bits of all mantissas


@torch.no_grad()
def negate(weight: nn.Parameter) -> None:
    weight.neg_()


def reorder(order: Callable[[Tensor], Tensor]) -> Callable[[nn.Parameter], None]:
    """The same numbers elsewhere, so that no sum of them tells."""

    def change(weight: nn.Parameter) -> None:
        with torch.no_grad():
            weight.copy_(order(weight.detach().clone()))

    return change


CHANGES = {
    "in place": add,
    "one entry": nudge,
    "doubled": double,
    "negated": negate,
    "two rows": reorder(lambda weight: weight[[1, 0, *range(2, len(weight))]]),
    "rows shuffled": reorder(lambda weight: weight[torch.randperm(len(weight), generator=seeded())]),
    "columns shuffled": reorder(lambda weight: weight[:, torch.randperm(weight.shape[1], generator=seeded())]),
    "flipped": reorder(lambda weight: weight.flip(0)),
    "mirrored": reorder(lambda weight: weight.flip(1)),
    "behind autograd's back": lambda weight: weight.data.add_(1),
    "swapped": swap,
    "SGD": step_of(lambda weights: torch.optim.SGD(weights, lr=1.0)),
    "AdamW": step_of(lambda weights: torch.optim.AdamW(weights, lr=1.0)),
    "fused AdamW": step_of(lambda weights: torch.optim.AdamW(weights, lr=1.0, fused=True)),
}


@pytest.mark.parametrize("arithmetic", [*(arithmetic for arithmetic, _ in KINDS.values()), INT8], ids=[*KINDS, "int8"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_maps_follow_a_changed_weight(change: Callable[[nn.Parameter], None], arithmetic: Arithmetic) -> None:
    weight, x = some_weight(), some_rows(3).to(arithmetic.dtype)
    before = prepare(weight, arithmetic)(x), multiply(x, plain(weight, arithmetic))
    change(weight)
    fresh = nn.Parameter(weight.detach().clone())
    after = prepare(weight, arithmetic)(x), multiply(x, plain(weight, arithmetic))
    expected = prepare(fresh, arithmetic)(x), multiply(x, plain(fresh, arithmetic))
    for old, new, right in zip(before, after, expected, strict=True):
        assert torch.equal(new, right)
        assert not torch.equal(new, old)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_transposed_square_is_another_weight(dtype: torch.dtype) -> None:
    weight = nn.Parameter(some_weight(24, 24).detach().to(dtype))
    arithmetic, x = Arithmetic(dtype), some_rows(3).to(dtype)
    old = prepare(weight, arithmetic)(x)
    for change in (lambda: weight.copy_(weight.T.clone()), lambda: weight.data.copy_(weight.data.T.clone())):
        with torch.no_grad():
            change()
        new = prepare(weight, arithmetic)(x)
        assert torch.equal(new, prepare(nn.Parameter(weight.detach().clone()), arithmetic)(x))
        assert not torch.equal(new, old)
        old = new


def test_samples_follow_training_and_another_type() -> None:
    prior = make_transformer(num_codes=7, grid=(2, 2))
    greedy = Sampling(temperature=0.0, precision="float32")
    first = prior.sample(1, None, greedy)
    optimiser = torch.optim.AdamW(prior.parameters(), lr=1e-2, fused=True)
    wanted = (first + 1) % 7
    for _ in range(60):
        optimiser.zero_grad()
        (-prior(wanted).mean()).backward()
        optimiser.step()
    assert torch.equal(prior.sample(1, None, greedy), wanted)
    assert torch.equal(prior.double().sample(1, sampling=Sampling(temperature=0.0)), wanted)
    assert torch.equal(prior.float().sample(1, None, greedy), wanted)


def test_an_unchanged_weight_is_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, arithmetic = some_weight(), Arithmetic(torch.float32)
    first = prepare(weight, arithmetic)
    assert prepare(weight, arithmetic) is first
    assert prepare(weight, Arithmetic(torch.float32, compiled=True)) is first
    kept = weakref.ref(first)
    del first
    second = prepare(weight, Arithmetic(torch.bfloat16))
    gc.collect()
    assert kept() is None  # a weight is kept in one precision, the last
    assert prepare(weight, Arithmetic(torch.bfloat16)) is second
    assert prepare(weight, INT8) is not second  # of the same type
    prepare(weight, arithmetic)
    assert prepare(weight, Arithmetic(torch.bfloat16)) is not second


@pytest.mark.parametrize("arithmetic", [*(arithmetic for arithmetic, _ in KINDS.values()), INT8], ids=[*KINDS, "int8"])
def test_maps_that_are_not_packed_share_memory_with_plain(
    arithmetic: Arithmetic, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, multiplied = [], packed_linear.multiply
    monkeypatch.setattr(packed_linear, "multiply", lambda x, weight: made.append(weight) or multiplied(x, weight))
    weight, x = some_weight(), some_rows(3).to(arithmetic.dtype)
    torch.testing.assert_close(prepare(weight, arithmetic, packed=False)(x), multiplied(x, plain(weight, arithmetic)))
    assert len(made) == 1
    assert made[0] is plain(weight, arithmetic)
    if not arithmetic.int8 and arithmetic.dtype == weight.dtype:  # and the weight's own where it is as wanted
        assert made[0].data_ptr() == weight.data_ptr()
    packed = prepare(weight, arithmetic)
    assert prepare(weight, arithmetic, packed=False) is not packed
    assert prepare(weight, arithmetic) is packed
    changed = prepare(some_weight(), arithmetic, 1, lambda weight: 2 * weight, packed=False)
    limit = 0.1 if arithmetic.int8 else 0.05
    torch.testing.assert_close(changed(x), 2 * multiplied(x, plain(some_weight(), arithmetic)), atol=limit, rtol=limit)


@pytest.mark.parametrize("inputs", [1, 15, 16, 17, 40])
def test_8_bits_are_filled_up_to_sixteen_inputs(inputs: int) -> None:
    rounded, scale = plain(some_weight(3, inputs), INT8)
    assert rounded.dtype == torch.int8
    assert rounded.shape == (3, -(-inputs // 16) * 16)
    assert not rounded[:, inputs:].any()
    assert scale.shape == (3,)


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        prior = make_transformer(num_codes=3, grid=(2, 2))
        inside = prior.sample(4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(prior.sample(4, generator=torch.Generator().manual_seed(0)), inside)


def test_maps_die_with_their_model() -> None:
    before = len(packed_linear._prepared)
    prior = make_transformer(num_codes=3, grid=(2, 2))
    for precision in ("float32", "bfloat16", "int8"):
        prior.sample(1, sampling=Sampling(precision=precision))
    assert len(packed_linear._prepared) > before
    kept = [weakref.ref(weight) for weight in prior.parameters()]
    del prior
    gc.collect()
    assert [ref() for ref in kept if ref() is not None] == []
    assert len(packed_linear._prepared) <= before


def test_a_copy_has_maps_of_its_own() -> None:
    prior = make_transformer(num_codes=7, grid=(2, 2))
    greedy = Sampling(temperature=0.0, precision="float32")
    first = prior.sample(1, None, greedy)
    twin = copy.deepcopy(prior)
    with torch.no_grad():
        twin.logits.weight.neg_()
    assert not torch.equal(twin.sample(1, None, greedy), first)
    assert torch.equal(prior.sample(1, None, greedy), first)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_without_onednn_the_walk_is_the_same(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = make_transformer(num_codes=7, grid=(2, 2))
    twin = copy.deepcopy(prior)
    drawn = prior.sample(64, sampling=Sampling(precision=precision), generator=torch.Generator().manual_seed(0))
    unpacked(monkeypatch)
    again = twin.sample(64, sampling=Sampling(precision=precision), generator=torch.Generator().manual_seed(0))
    # Sums in another order may fall on the other side of a border, of float32 hardly ever.
    assert (drawn == again).float().mean() > (0.99 if precision == "float32" else 0.9)
