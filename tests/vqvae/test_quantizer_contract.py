"""The contract that every quantizer and every composition keeps."""

import copy
import math

import pytest
import torch
from quantizer_worlds import (
    ALL,
    ALL_PARAMS,
    SCALES,
    codebooks,
    features,
    generator,
    objective,
    state_of,
    steady_draws,
    take_step,
    trained,
    unchanged,
)

import safefolder
from vqvae.metrics import CodeUsage
from vqvae.quantizers import MASKED, Quantized, Quantizer

EVERY_MODE = pytest.mark.parametrize("mode", ["train", "eval", "draw"])
TRAIN_AND_EVAL = pytest.mark.parametrize("training", [True, False])


@pytest.fixture(params=ALL_PARAMS)
def name(request):
    return request.param


@pytest.fixture
def member(name):
    return ALL[name]


@pytest.fixture
def quantizer(name):
    return trained(name)


def some_mask(*shape: int) -> torch.Tensor:
    """Two positions in three count, and the last image has none that does."""
    mask = (torch.arange(math.prod(shape)) % 3 > 0).reshape(shape)
    mask[-1] = False
    return mask


def ran(quantizer: Quantizer, mode: str, z_e: torch.Tensor, mask: torch.Tensor | None = None) -> Quantized:
    """With the same draws each time."""
    quantizer.train(mode == "train")
    torch.manual_seed(5)
    return quantizer.draw(z_e, mask, generator(7)) if mode == "draw" else quantizer(z_e, mask)


@TRAIN_AND_EVAL
def test_shapes_and_ranges(member, quantizer, training):
    quantizer.train(training)
    for grid in member.grids:
        q = quantizer(features(quantizer.dim, 3, *grid))
        assert q.z_q.shape == (3, *grid, quantizer.dim)
        assert q.z_q.dtype == torch.float32
        assert q.codes.dtype == torch.int64
        assert q.codes.shape == (3, *quantizer.code_grid(grid))
        assert q.codes.min() >= MASKED
        assert q.codes.max() < quantizer.num_codes
        assert q.entropy.shape == (3,)
        positions = math.prod(quantizer.code_grid(grid))
        assert (q.entropy <= positions * math.log(quantizer.num_codes) * (1 + 1e-6)).all()
        if training and quantizer.stochastic:
            assert (q.entropy > 0).all()
            assert (q.log_posterior < 0).all()
        else:
            assert (q.entropy == 0).all()
            assert (q.log_posterior == 0).all()
        parts = quantizer.code_axes if quantizer.positionwise else (len(SCALES),)
        assert q.usage.shape == q.perplexity.shape == q.dead_codes.shape == parts
        assert all(term.ndim == 0 and term >= -1e-6 for term in q.auxiliary.values())


@pytest.mark.parametrize("masked", [False, True])
def test_draws_are_of_the_posterior_or_the_code_itself(quantizer, masked):
    quantizer.eval()
    z_e, mask = features(quantizer.dim, 4, 5, 5), some_mask(4, 5, 5) if masked else None
    plain = quantizer(z_e, mask)
    drawn, again = (quantizer.draw(z_e, mask, generator(2)) for _ in range(2))
    assert torch.equal(quantizer.decode(drawn.codes), drawn.z_q)
    assert torch.equal(drawn.codes, again.codes)
    assert torch.equal(drawn.codes < 0, plain.codes < 0)
    assert not drawn.z_q.requires_grad
    if quantizer.stochastic:
        assert (drawn.entropy[:3] > 0).all()
        assert (drawn.log_posterior[:3] < 0).all()
        if masked:  # of the last image no position counts
            assert drawn.entropy[3] == drawn.log_posterior[3] == 0
    else:
        assert torch.equal(drawn.codes, plain.codes)
        assert torch.equal(drawn.z_q, plain.z_q)
        assert (drawn.entropy == 0).all()
        assert (drawn.log_posterior == 0).all()


@TRAIN_AND_EVAL
def test_decode_gives_z_q_to_the_bit(member, quantizer, training):
    if training and member.soft:
        pytest.skip("a soft sample is a mixture of codes: no code stands for it")
    quantizer.train(training)
    for mask in (None, some_mask(4, 5, 5)):
        q = quantizer(features(quantizer.dim, 4, 5, 5), mask)
        assert torch.equal(quantizer.decode(q.codes), q.z_q)


def test_only_the_update_after_a_forward_in_training_changes_what_is_saved(quantizer):
    z_e = features(quantizer.dim, 4, 5, 5).requires_grad_()
    before = state_of(quantizer)
    quantizer.update()
    assert unchanged(quantizer, before)
    quantizer.eval()(z_e)
    quantizer.update()
    assert unchanged(quantizer, before)
    before = state_of(quantizer)
    objective(quantizer.train()(z_e)).backward()
    torch.testing.assert_close(state_of(quantizer), before, rtol=0, atol=0)


def test_one_code_for_a_vector_alone_or_in_a_batch(quantizer):
    quantizer.eval()
    z_e = features(quantizer.dim, 64, 5, 5)
    together = quantizer(z_e)
    for index in (0, 17, 63):
        alone = quantizer(z_e[index : index + 1])
        assert torch.equal(alone.codes[0], together.codes[index])
        assert torch.equal(alone.z_q[0], together.z_q[index])


@EVERY_MODE
def test_what_is_masked_does_not_matter(quantizer, mode):
    """Codes, vectors, terms, gradients and the state after an update are to the bit those with anything else there."""
    twin = copy.deepcopy(quantizer)
    z_e, mask = features(quantizer.dim, 4, 5, 5), some_mask(4, 5, 5)
    junk = torch.tensor([torch.nan, 1e30, -torch.inf, 0.0]).reshape(4, 1, 1, 1)
    spoiled, other = (torch.where(mask[..., None], z_e, x).requires_grad_() for x in (junk, z_e + 1))
    q, same = ran(quantizer, mode, spoiled, mask), ran(twin, mode, other, mask)
    fine = q.codes[~mask] if quantizer.positionwise else q.codes.split([s**2 for s in SCALES], 1)[-1][~mask.flatten(1)]
    assert (fine == MASKED).all()
    assert (q.codes[-1] == MASKED).all()
    assert (q.z_q[~mask] == 0).all()
    assert q.entropy[-1] == 0
    for field in ("codes", "z_q", "entropy", "log_posterior", "usage", "perplexity", "dead_codes", "auxiliary"):
        torch.testing.assert_close(getattr(q, field), getattr(same, field), rtol=0, atol=0)
    if mode == "train":
        gradient, expected = (torch.autograd.grad(objective(each), x)[0] for each, x in ((q, spoiled), (same, other)))
        assert (gradient[~mask] == 0).all()
        assert (gradient[mask] != 0).any()
        torch.testing.assert_close(gradient, expected, rtol=0, atol=0)
    quantizer.update()
    twin.update()
    torch.testing.assert_close(state_of(quantizer), state_of(twin), rtol=0, atol=0)


@EVERY_MODE
def test_what_is_kept_is_all_that_there_is(member, quantizer, mode, monkeypatch):
    """With a mask, a quantizer sees what one sees that is given the valid part alone.

    Of any positions; of whole images where positions depend on each other or on the order of draws.
    """
    twin = copy.deepcopy(quantizer)
    z_e, mask = features(quantizer.dim, 6, 5, 5), some_mask(6, 5, 5)
    whole = not quantizer.positionwise or (member.random and mode != "eval")
    if whole:
        mask = (torch.arange(6) < 4)[:, None, None].expand(6, 5, 5)
    cropped = z_e[:4] if whole else z_e[mask]
    inputs = [(quantizer, z_e.requires_grad_(), mask), (twin, cropped.detach().requires_grad_(), None)]
    results = []
    for each, x, valid in inputs:
        steady_draws(monkeypatch)
        results.append(ran(each, mode, x, valid))
    got, want = results
    if not whole:
        assert torch.equal(got.codes[mask], want.codes)
    torch.testing.assert_close(got.z_q[mask].reshape(want.z_q.shape), want.z_q)
    for field in ("auxiliary", "usage", "perplexity", "dead_codes"):
        torch.testing.assert_close(getattr(got, field), getattr(want, field))
    for field in ("entropy", "log_posterior"):
        torch.testing.assert_close(getattr(got, field).sum(), getattr(want, field).sum())
    if mode != "draw":
        ours, theirs = (torch.autograd.grad(objective(q), x)[0] for q, (_, x, _) in zip(results, inputs, strict=True))
        torch.testing.assert_close(ours[mask].reshape(theirs.shape), theirs)
    quantizer.update()
    twin.update()
    torch.testing.assert_close(state_of(quantizer), state_of(twin))
    for each in (quantizer, twin):  # what was gathered and is not saved shows at the next update, with revival
        steady_draws(monkeypatch)
        take_step(each.train(), features(each.dim, 4, 5, 5, seed=9) + 3)
    torch.testing.assert_close(state_of(quantizer), state_of(twin), rtol=1e-4, atol=1e-5)


@EVERY_MODE
def test_all_masked_is_nothing(quantizer, mode):
    before = state_of(quantizer)
    z_e = torch.full((2, 5, 5, quantizer.dim), torch.nan, requires_grad=True)
    q = ran(quantizer, mode, z_e, torch.zeros(2, 5, 5, dtype=torch.bool))
    assert (q.codes == MASKED).all()
    for figure in (q.z_q, q.entropy, q.log_posterior, q.usage, *q.auxiliary.values()):
        assert (figure == 0).all()
    assert (q.perplexity == 1).all()
    assert (q.dead_codes == quantizer.num_codes).all()
    if mode != "draw":
        gradient = torch.autograd.grad(objective(q), z_e, allow_unused=True)[0]
        assert gradient is None or (gradient == 0).all()
    quantizer.update()
    assert unchanged(quantizer, before)


@pytest.mark.parametrize(("dtype", "mode"), [(torch.bfloat16, "train"), (torch.float16, "eval")])
def test_autocast_changes_nothing(quantizer, dtype, mode):
    z_e = features(quantizer.dim, 4, 5, 5)
    plain = ran(quantizer, mode, z_e)
    with torch.autocast("cpu", dtype):
        cast = ran(quantizer, mode, z_e)
        assert torch.equal(quantizer.decode(cast.codes), quantizer.decode(plain.codes))
    assert torch.equal(plain.codes, cast.codes)
    assert torch.equal(plain.z_q, cast.z_q)
    torch.testing.assert_close(plain.auxiliary, cast.auxiliary, rtol=0, atol=0)
    half, single = ran(quantizer, mode, z_e.to(dtype)), ran(quantizer, mode, z_e.to(dtype).float())
    assert half.z_q.dtype == torch.float32
    assert torch.equal(half.codes, single.codes)


def test_extreme_features_are_finite(quantizer):
    for value in (0.0, 1e-30, 1e15, -1e15):
        z_e = torch.full((2, 5, 5, quantizer.dim), value, requires_grad=True)
        q = quantizer(z_e)
        gradient = torch.autograd.grad(q.z_q.sum() + sum(q.auxiliary.values()), z_e)[0]
        assert all(torch.isfinite(found).all() for found in (q.z_q, gradient, *q.auxiliary.values())), value


def test_nan_and_infinity_are_errors_and_no_code(quantizer):
    for value in (math.nan, -math.inf):
        z_e = features(quantizer.dim, 2, 5, 5)
        z_e[1, 2, 3, -1] = value
        with pytest.raises(ValueError, match="NaN or infinity"):
            quantizer(z_e)


def test_an_empty_batch_is_quantised(quantizer):
    q = quantizer(features(quantizer.dim, 0, 5, 5))
    assert q.z_q.shape == (0, 5, 5, quantizer.dim)
    assert all(term == 0 for term in q.auxiliary.values())


def test_work_is_as_precise_as_the_quantizer(quantizer):
    """Not as its features: those of another precision are rounded first."""
    quantizer.eval()
    z_e = features(quantizer.dim, 4, 5, 5).double()
    q = quantizer(z_e)
    assert q.z_q.dtype == torch.float32
    assert torch.equal(q.codes, quantizer(z_e.float()).codes)
    double = copy.deepcopy(quantizer).double()
    precise = double(z_e)
    assert precise.z_q.dtype == torch.float64
    assert torch.equal(double.decode(precise.codes), precise.z_q)
    assert all(term.dtype == torch.float64 for term in precise.auxiliary.values())


def test_saved_and_loaded_goes_on_equally(quantizer, tmp_path):
    safefolder.save(tmp_path / "q", {"class": "q"}, quantizer.state_dict())
    twin = copy.deepcopy(quantizer)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.fill_(7)
    safefolder.folder.load_weights(twin, safefolder.load(tmp_path / "q")[1], "q")
    for each in (quantizer, twin):
        torch.manual_seed(3)
        take_step(each, features(quantizer.dim, 4, 5, 5, seed=9))
    torch.testing.assert_close(state_of(quantizer), state_of(twin), rtol=0, atol=0)


def test_accumulated_forwards_are_one_update(member, quantizer):
    """Two halves of a batch before one update leave the codebook as the whole batch would, revival included."""
    if member.random or not codebooks(quantizer):
        pytest.skip("draws depend on the batch" if member.random else "nothing is gathered")
    twin = copy.deepcopy(quantizer)
    for step in range(3):
        z_e = features(quantizer.dim, 8, 5, 5, seed=20 + step) + 3 * step  # away from the codes, so that some die
        quantizer(z_e)
        twin(z_e[:4])
        twin(z_e[4:])
        quantizer.update()
        twin.update()
        torch.testing.assert_close(state_of(quantizer), state_of(twin), rtol=1e-5, atol=1e-6)


def test_statistics_are_those_of_the_codes(quantizer):
    quantizer.eval()
    q = quantizer(features(quantizer.dim, 6, 5, 5), some_mask(6, 5, 5))
    # A multi-scale quantizer has a row of codes, which its statistics tell apart by scale.
    parts = [q.codes] if quantizer.positionwise else q.codes.split([scale**2 for scale in SCALES], 1)
    metrics = [CodeUsage(quantizer.num_codes, quantizer.code_axes) for _ in parts]
    for metric, codes in zip(metrics, parts, strict=True):
        metric.add(codes)
    used = [len(counts) for metric in metrics for counts in metric.counts]
    assert (quantizer.num_codes - q.dead_codes).flatten().tolist() == used
    assert q.usage.flatten().tolist() == pytest.approx([usage for metric in metrics for usage in metric.usages])
    perplexities = [perplexity for metric in metrics for perplexity in metric.perplexities]
    assert q.perplexity.flatten().tolist() == pytest.approx(perplexities, rel=1e-5)
