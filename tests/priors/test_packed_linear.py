"""Linear maps of a walk: right for every layout and precision, and never those of weights that have changed since."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from prior_worlds import make_transformer, seeded
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
    return nn.Parameter(torch.randn(out, inputs, generator=seeded(seed)))


def some_rows(num: int, width: int = 24) -> Tensor:
    return torch.randn(num, width, generator=seeded(1))


@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [True, False])
def test_maps_are_linear(kind: str, rows: int, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not packed:  # as where this torch has no oneDNN
        monkeypatch.setattr(packed_linear, "_packed", lambda weight, rows: None)
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


@pytest.mark.parametrize("inputs", [1, 15, 16, 17, 40, 100])
@pytest.mark.parametrize("out", [1, 50])
def test_8_bits_round_by_half_a_step_at_most(inputs: int, out: int) -> None:
    """Also for widths that torch's product, which reads 16 at a time, would read past."""
    weight = some_weight(out, inputs)
    steps = weight.detach().abs().amax(1) / 127
    for rows in (1, 2, 20):
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


def step_of(optimiser: Callable[..., torch.optim.Optimizer], **options: bool) -> Callable[[nn.Parameter], None]:
    def change(weight: nn.Parameter) -> None:
        weight.grad = torch.ones_like(weight)
        optimiser([weight], lr=1.0, **options).step()

    return change


def written(new: Callable[[Tensor], Tensor]) -> Callable[[nn.Parameter], None]:
    """Other numbers in the same memory, of which torch counts a version."""

    def change(weight: nn.Parameter) -> None:
        with torch.no_grad():
            weight.copy_(new(weight.detach().clone()))

    return change


def behind(weight: nn.Parameter) -> None:
    weight.data.add_(1)


def swap(weight: nn.Parameter) -> None:
    weight.data = weight.data + 1


CHANGES = {
    "one entry": written(lambda weight: weight.index_put((torch.tensor(3), torch.tensor(5)), weight[3, 5] + 1)),
    "doubled": written(lambda weight: 2 * weight),  # which leaves the bits of all mantissas
    "negated": written(lambda weight: -weight),
    # The same numbers elsewhere, so that no sum of them tells.
    "two rows": written(lambda weight: weight[[1, 0, *range(2, len(weight))]]),
    "columns shuffled": written(lambda weight: weight[:, torch.randperm(weight.shape[1], generator=seeded(5))]),
    "transposed": written(lambda weight: weight.T),
    "data": behind,
    "swapped": swap,
    "AdamW": step_of(torch.optim.AdamW),
    "fused AdamW": step_of(torch.optim.AdamW, fused=True),
}


@pytest.mark.parametrize("arithmetic", [*(arithmetic for arithmetic, _ in KINDS.values()), INT8], ids=[*KINDS, "int8"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_maps_follow_a_changed_weight(change: Callable[[nn.Parameter], None], arithmetic: Arithmetic) -> None:
    weight, x = some_weight(24, 24), some_rows(3).to(arithmetic.dtype)
    before = prepare(weight, arithmetic)(x), multiply(x, plain(weight, arithmetic))
    change(weight)
    fresh = nn.Parameter(weight.detach().clone())
    after = prepare(weight, arithmetic)(x), multiply(x, plain(weight, arithmetic))
    expected = prepare(fresh, arithmetic)(x), multiply(x, plain(fresh, arithmetic))
    for old, new, right in zip(before, after, expected, strict=True):
        assert torch.equal(new, right)
        assert not torch.equal(new, old)


def test_an_unchanged_weight_is_prepared_once_for_the_last_precision() -> None:
    weight, arithmetic = some_weight(), Arithmetic(torch.float32)
    first = prepare(weight, arithmetic)
    assert prepare(weight, Arithmetic(torch.float32, compiled=True)) is first
    kept = weakref.ref(first)
    del first
    second = prepare(weight, Arithmetic(torch.bfloat16))
    gc.collect()
    assert kept() is None
    assert prepare(weight, Arithmetic(torch.bfloat16)) is second
    assert prepare(weight, INT8) is not second  # of the same type


@pytest.mark.parametrize("arithmetic", [*(arithmetic for arithmetic, _ in KINDS.values()), INT8], ids=[*KINDS, "int8"])
def test_maps_that_are_not_packed_or_are_changed(arithmetic: Arithmetic) -> None:
    weight, x = some_weight(), some_rows(3).to(arithmetic.dtype)
    torch.testing.assert_close(prepare(weight, arithmetic, packed=False)(x), multiply(x, plain(weight, arithmetic)))
    if not arithmetic.int8 and arithmetic.dtype == weight.dtype:
        assert plain(weight, arithmetic).data_ptr() == weight.data_ptr()  # memory is taken where it must be
    limit = 0.1 if arithmetic.int8 else 0.05
    for packed in (True, False):
        doubled = prepare(some_weight(), arithmetic, 1, lambda weight: 2 * weight, packed=packed)
        expected = 2 * multiply(x, plain(some_weight(), arithmetic))
        torch.testing.assert_close(doubled(x), expected, atol=limit, rtol=limit)


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        prior = make_transformer(num_codes=3, grid=(2, 2))
        inside = prior.sample(4, generator=seeded())
    assert torch.equal(prior.sample(4, generator=seeded()), inside)


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
