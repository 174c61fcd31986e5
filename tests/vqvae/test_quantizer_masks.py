"""Masked positions count nowhere: a masked batch is the batch of its valid positions, in every kind and composition.

Terms, usage, perplexity, dead codes, entropies, gradients, and all that `update` then does to a codebook are held
against those of the cropped batch, in training, in evaluation, and for draws.
"""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizer_worlds import (
    FSQ_SMALL,
    GUMBEL,
    IBQ_SMALL,
    LFQ_SMALL,
    MEMBERS,
    SIMVQ,
    SQVAE,
    Member,
    ema,
    features,
    grouped,
    learned,
    multiscale,
    objective,
    projected,
    residual,
    soft_em,
    take_step,
)
from torch import Tensor

from vqvae.quantizers import GumbelQuantizer, Quantized, Quantizer

MODES = ("train", "eval", "draw")
# What may stand where nothing counts.
JUNK = (0.0, 1e30, math.nan, -math.inf)

# One inside another inside another, with a random depth inside, and with kinds that gather statistics.
DEEP = {
    "grouped residual dropout": Member(config=grouped(residual(ema(dim=3), dropout=0.5)), random=True),
    "residual residual dropout": Member(config=residual(residual(ema(), depth=2, dropout=0.5), depth=2), random=True),
    "projected grouped residual": Member(config=projected(grouped(residual(learned(dim=2), depth=2)))),
    "residual projected simvq": Member(config=residual(projected(SIMVQ), depth=2)),
    "residual projected ibq": Member(config=residual(projected(IBQ_SMALL), depth=2, dropout=0.5), random=True),
    "grouped projected lfq": Member(config=grouped(projected(LFQ_SMALL))),
    "residual grouped gumbel": Member(
        config=residual(grouped(GumbelQuantizer.Config(num_codes=16, dim=3)), depth=2), random=True
    ),
    "projected residual sqvae": Member(config=projected(residual(SQVAE, depth=2, dropout=0.5)), random=True),
    "residual soft em dropout": Member(config=residual(soft_em(), dropout=0.5), random=True, soft=True),
    "projected multiscale": Member(config=projected(multiscale(ema())), grids=((5, 5),)),
    "multiscale projected gumbel": Member(config=multiscale(projected(GUMBEL)), grids=((5, 5),), random=True),
    "multiscale projected simvq": Member(config=multiscale(projected(SIMVQ)), grids=((5, 5),)),
    "residual dropout fsq": Member(config=residual(FSQ_SMALL, dropout=0.5), random=True),
}
WORLDS = {**{name: member for name, member in MEMBERS.items() if not member.extra}, **DEEP}
# One of each way in which something is counted; the others are left to the slow tests.
QUICK = {"sqvae, soft", "grouped residual dropout", "residual grouped gumbel", "multiscale projected gumbel"}
PARAMS = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in WORLDS]
PLACEWISE = [each for each in PARAMS if "multiscale" not in each.values[0]]

_made: dict[str, Quantizer] = {}


class SteadyDraws:
    """Random numbers by a seed for each call, so that a longer batch draws the same ones for its first rows.

    Without this the draws at a second depth would depend on how many there were at the first.
    """

    SOURCES = ((torch, "rand"), (torch, "randint"), (torch, "multinomial"), (torch.Tensor, "exponential_"))

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls = itertools.count()
        for owner, name in self.SOURCES:
            monkeypatch.setattr(owner, name, self.steady(getattr(owner, name)))

    def steady(self, original):
        def draw(*arguments, **options):
            return original(*arguments, **{**options, "generator": torch.Generator().manual_seed(next(self.calls))})

        return draw

    def begin_anew(self) -> None:
        self.calls = itertools.count()


@pytest.fixture(params=PARAMS)
def name(request):
    return request.param


def after_two_steps(name: str) -> Quantizer:
    if name not in _made:
        torch.manual_seed(0)
        quantizer = WORLDS[name].config.build()
        for step in range(2):
            take_step(quantizer, features(quantizer.dim, 4, 5, 5, seed=100 + step))
        _made[name] = quantizer
    return copy.deepcopy(_made[name])


def ran(
    quantizer: Quantizer, mode: str, z_e: Tensor, mask: Tensor | None = None, draws: SteadyDraws | None = None
) -> Quantized:
    quantizer.train(mode == "train")
    torch.manual_seed(5)
    if draws is not None:
        draws.begin_anew()
    if mode == "draw":
        return quantizer.draw(z_e, mask, torch.Generator().manual_seed(7))
    return quantizer(z_e, mask)


def state(quantizer: Quantizer) -> dict[str, Tensor]:
    """All tensors of the module, those that no file holds too, and what is gathered for the next update."""
    found = {**dict(quantizer.named_parameters()), **dict(quantizer.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def compare(
    name: str,
    mode: str,
    masked: tuple[Tensor, Tensor],
    cropped: Tensor,
    names: tuple[str, ...] | None = None,
    draws: SteadyDraws | None = None,
) -> None:
    """Of a batch with a mask and of its valid part; with `names`, of these terms alone, as others depend on draws."""
    quantizer, twin = after_two_steps(name), after_two_steps(name)
    z_e, mask = masked
    z_e, cropped = z_e.requires_grad_(mode != "draw"), cropped.clone().requires_grad_(mode != "draw")
    got, want = ran(quantizer, mode, z_e, mask, draws), ran(twin, mode, cropped, None, draws)
    terms = want.auxiliary.keys() if names is None else want.auxiliary.keys() & set(names)
    for term in terms:
        torch.testing.assert_close(got.auxiliary[term], want.auxiliary[term], msg=lambda m, t=term: f"{t}: {m}")
    torch.testing.assert_close(got.entropy.sum(), want.entropy.sum())
    if names is not None:
        return
    torch.testing.assert_close(got.log_posterior.sum(), want.log_posterior.sum())
    assert torch.equal(got.dead_codes, want.dead_codes)
    torch.testing.assert_close(got.usage, want.usage)
    torch.testing.assert_close(got.perplexity, want.perplexity)
    valid = got.z_q[mask].reshape(want.z_q.shape)
    torch.testing.assert_close(valid, want.z_q)
    assert (got.z_q[~mask] == 0).all()
    if mode != "draw":
        gradient, expected = (torch.autograd.grad(objective(q), x)[0] for q, x in ((got, z_e), (want, cropped)))
        assert (gradient[~mask] == 0).all()
        torch.testing.assert_close(gradient[mask].reshape(expected.shape), expected)
    for each in (quantizer, twin):
        torch.manual_seed(6)
        each.update()
    torch.testing.assert_close(state(quantizer), state(twin))
    if mode != "train":
        return
    # What was gathered and is not saved shows at the next update, with revival.
    for each in (quantizer.train(), twin.train()):
        torch.manual_seed(8)
        if draws is not None:
            draws.begin_anew()
        take_step(each, features(each.dim, 4, 5, 5, seed=9) + 3)
    torch.testing.assert_close(state(quantizer), state(twin), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_case_10_masked_images_count_nowhere(name, mode, monkeypatch):
    quantizer = after_two_steps(name)
    draws = SteadyDraws(monkeypatch)
    z_e, mask = features(quantizer.dim, 6, 5, 5), torch.ones(6, 5, 5, dtype=torch.bool)
    mask[4:] = False
    junk = torch.tensor(JUNK)[torch.arange(2 * 25 * quantizer.dim) % len(JUNK)].reshape(2, 5, 5, quantizer.dim)
    compare(name, mode, (torch.cat([z_e[:4], junk]), mask), z_e[:4], draws=draws)


@pytest.mark.parametrize("mode", ["train", "draw"])
@pytest.mark.parametrize("name", PLACEWISE)
def test_case_10_padding_counts_nowhere(name, mode):
    """Images padded to one size, as batches of several sizes are: each keeps its own random depth."""
    quantizer = after_two_steps(name)
    z_e, mask = features(quantizer.dim, 4, 5, 7), torch.ones(4, 5, 7, dtype=torch.bool)
    mask[:, :, 5:] = False
    names = None
    if quantizer.stochastic:
        if quantizer.code_axes:
            return  # what later depths see depends on what was drawn before
        names = ("kl", "codebook_entropy_deficit")
    elif "soft em" in name and mode == "train":
        return  # every term depends on what was drawn
    padded = torch.where(mask[..., None], z_e, math.nan)
    compare(name, mode, (padded, mask), z_e[:, :, :5], names)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "draw"])
@pytest.mark.parametrize("name", [name for name in DEEP if "multiscale" not in name])
def test_case_10_positions_anywhere_count_nowhere(name, mode):
    """Two positions in three count, and the last image has none that does; held against the valid vectors in a row.

    Of kinds that are less deep the contract says it.
    """
    quantizer, member = after_two_steps(name), WORLDS[name]
    if member.random and mode != "eval":
        return  # as many random numbers come in another order; those before have compared them
    z_e, mask = features(quantizer.dim, 6, 8), (torch.arange(48) % 3 > 0).reshape(6, 8)
    mask[-1] = False
    compare(name, mode, (torch.where(mask[..., None], z_e, 1e30), mask), z_e[mask])


@pytest.mark.parametrize("mode", ["draw"])
def test_case_10_nothing_valid_is_nothing(name, mode):
    """An all-false mask: finite terms, all zero, and an update that does nothing; the contract has the other modes."""
    quantizer = after_two_steps(name)
    before = state(quantizer)
    z_e = torch.full((2, 5, 5, quantizer.dim), math.nan)
    q = ran(quantizer, mode, z_e, torch.zeros(2, 5, 5, dtype=torch.bool))
    assert all(term == 0 for term in q.auxiliary.values()), q.auxiliary
    for figure in (q.z_q, q.entropy, q.log_posterior, q.usage):
        assert (figure == 0).all()
    assert (q.perplexity == 1).all()
    assert (q.dead_codes == quantizer.num_codes).all()
    quantizer.update()
    after = state(quantizer)
    clocks = {name for name in after if name.endswith("num_updates")}
    torch.testing.assert_close(
        {k: v for k, v in after.items() if k not in clocks},
        {k: v for k, v in before.items() if k not in clocks},
        rtol=0,
        atol=0,
    )


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["sqvae, soft", "ibq", "projected lfq"]),
    mode=st.sampled_from(["eval", "draw"]),
    valid=st.lists(st.booleans(), min_size=12, max_size=12),
    junk=st.sampled_from(JUNK),
)
def test_case_10_any_mask_is_a_crop(name, mode, valid, junk):
    """The terms that do not depend on what was drawn, of any positions of three images; of none they are zero."""
    quantizer = after_two_steps(name)
    z_e, mask = features(quantizer.dim, 3, 4), torch.tensor(valid).reshape(3, 4)
    got = ran(quantizer, mode, torch.where(mask[..., None], z_e, junk), mask)
    want = ran(quantizer, mode, z_e[mask])
    drawn = {"distance"} if mode == "draw" else set()
    terms = [{term: value for term, value in q.auxiliary.items() if term not in drawn} for q in (got, want)]
    torch.testing.assert_close(*terms)
    torch.testing.assert_close(got.entropy.sum(), want.entropy.sum())
    if mode == "eval":
        assert torch.equal(got.codes[mask], want.codes)
        for field in ("usage", "perplexity", "dead_codes"):
            torch.testing.assert_close(getattr(got, field), getattr(want, field))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["sqvae", "residual grouped gumbel", "grouped residual dropout", "multiscale ema"])
def test_case_10_what_stands_under_the_mask_has_no_say(name, mode):
    """To the bit."""
    quantizer, twin = after_two_steps(name), after_two_steps(name)
    z_e, mask = features(quantizer.dim, 4, 5, 5), (torch.arange(100) % 3 > 0).reshape(4, 5, 5)
    junk = torch.tensor(JUNK).reshape(4, 1, 1, 1)  # of each image another
    got = ran(quantizer, mode, torch.where(mask[..., None], z_e, junk), mask)
    want = ran(twin, mode, z_e, mask)
    for field in ("codes", "z_q", "auxiliary", "entropy", "log_posterior", "usage", "perplexity", "dead_codes"):
        torch.testing.assert_close(getattr(got, field), getattr(want, field), rtol=0, atol=0)
    quantizer.update()
    twin.update()
    torch.testing.assert_close(state(quantizer), state(twin), rtol=0, atol=0)
