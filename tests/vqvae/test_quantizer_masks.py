"""Masked positions count nowhere, where the contract cannot say it: of draws, of pictures, and three levels deep.

Terms, usage, perplexity, dead codes, entropies, gradients, and all that `update` then does to a codebook are held
against those of the cropped batch, in training, in evaluation, and for draws.
"""

import copy
import functools
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
    ema,
    features,
    generator,
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

# What may stand where nothing counts.
JUNK = (0.0, 1e30, math.nan, -math.inf)

# One inside another inside another, with a random depth inside, and with kinds that gather statistics.
DEEP = {
    "grouped residual dropout": grouped(residual(ema(dim=3), dropout=0.5)),
    "residual residual dropout": residual(residual(ema(), depth=2, dropout=0.5), depth=2),
    "projected grouped residual": projected(grouped(residual(learned(dim=2), depth=2))),
    "residual projected simvq": residual(projected(SIMVQ), depth=2),
    "residual projected ibq": residual(projected(IBQ_SMALL), depth=2, dropout=0.5),
    "grouped projected lfq": grouped(projected(LFQ_SMALL)),
    "residual grouped gumbel": residual(grouped(GumbelQuantizer.Config(num_codes=16, dim=3)), depth=2),
    "projected residual sqvae": projected(residual(SQVAE, depth=2, dropout=0.5)),
    "residual soft em dropout": residual(soft_em(), dropout=0.5),
    "projected multiscale": projected(multiscale(ema())),
    "multiscale projected gumbel": multiscale(projected(GUMBEL)),
    "multiscale projected simvq": multiscale(projected(SIMVQ)),
    "residual dropout fsq": residual(FSQ_SMALL, dropout=0.5),
}
# What the contract skips: kinds that draw in training, and pictures.
SKIPPED = {name: member for name, member in MEMBERS.items() if member.random or "multiscale" in name}
CONFIGS = {**{name: member.config for name, member in SKIPPED.items() if not member.extra}, **DEEP}
# One of each way in which something is counted; the others are left to the slow tests.
QUICK = {"sqvae, soft", "grouped residual dropout", "residual grouped gumbel", "multiscale projected gumbel"}


class SteadyDraws:
    """Random numbers by a seed for each call, so that a longer batch draws the same ones for its first rows.

    Without this the draws at a second depth would depend on how many there were at the first.
    """

    SOURCES = ((torch, "rand"), (torch, "randint"), (torch, "multinomial"), (torch.Tensor, "exponential_"))

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.begin_anew()
        for owner, name in self.SOURCES:
            monkeypatch.setattr(owner, name, self.steady(getattr(owner, name)))

    def steady(self, original):
        def draw(*arguments, **options):
            return original(*arguments, **{**options, "generator": generator(next(self.calls))})

        return draw

    def begin_anew(self) -> None:
        self.calls = itertools.count()


@functools.cache
def _after_two_steps(name: str) -> Quantizer:
    torch.manual_seed(0)
    quantizer = CONFIGS[name].build()
    for step in range(2):
        take_step(quantizer, features(quantizer.dim, 4, 5, 5, seed=100 + step))
    return quantizer


def after_two_steps(name: str) -> Quantizer:
    return copy.deepcopy(_after_two_steps(name))


def ran(quantizer: Quantizer, mode: str, z_e: Tensor, mask: Tensor | None = None) -> Quantized:
    quantizer.train(mode == "train")
    torch.manual_seed(5)
    return quantizer.draw(z_e, mask, generator(7)) if mode == "draw" else quantizer(z_e, mask)


def state(quantizer: Quantizer) -> dict[str, Tensor]:
    """All tensors of the module, those that no file holds too."""
    found = {**dict(quantizer.named_parameters()), **dict(quantizer.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def compare(name: str, mode: str, masked: tuple[Tensor, Tensor], cropped: Tensor, draws: SteadyDraws) -> None:
    """A batch with a mask, and its valid part."""
    quantizer, twin = after_two_steps(name), after_two_steps(name)
    z_e, mask = masked
    z_e, cropped = z_e.requires_grad_(mode != "draw"), cropped.clone().requires_grad_(mode != "draw")
    draws.begin_anew()
    got = ran(quantizer, mode, z_e, mask)
    draws.begin_anew()
    want = ran(twin, mode, cropped)
    torch.testing.assert_close(dict(got.auxiliary), dict(want.auxiliary))
    torch.testing.assert_close(got.entropy.sum(), want.entropy.sum())
    torch.testing.assert_close(got.log_posterior.sum(), want.log_posterior.sum())
    for field in ("dead_codes", "usage", "perplexity"):
        torch.testing.assert_close(getattr(got, field), getattr(want, field))
    torch.testing.assert_close(got.z_q[mask].reshape(want.z_q.shape), want.z_q)
    assert (got.z_q[~mask] == 0).all()
    if mode != "draw":
        gradient, expected = (torch.autograd.grad(objective(q), x)[0] for q, x in ((got, z_e), (want, cropped)))
        assert (gradient[~mask] == 0).all()
        torch.testing.assert_close(gradient[mask].reshape(expected.shape), expected)
    quantizer.update()
    twin.update()
    torch.testing.assert_close(state(quantizer), state(twin))
    if mode == "train":  # what was gathered and is not saved shows at the next update, with revival
        for each in (quantizer, twin):
            draws.begin_anew()
            take_step(each, features(each.dim, 4, 5, 5, seed=9) + 3)
        torch.testing.assert_close(state(quantizer), state(twin), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["train", "eval", "draw"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CONFIGS]
)
def test_case_10_masked_images_count_nowhere(name, mode, monkeypatch):
    dim = after_two_steps(name).dim
    z_e, mask = features(dim, 6, 5, 5), torch.ones(6, 5, 5, dtype=torch.bool)
    mask[4:] = False
    junk = torch.tensor(JUNK)[torch.arange(2 * 25 * dim) % len(JUNK)].reshape(2, 5, 5, dim)
    compare(name, mode, (torch.cat([z_e[:4], junk]), mask), z_e[:4], SteadyDraws(monkeypatch))


@pytest.mark.parametrize(
    "name", ["residual, dropout", "grouped residual dropout", "residual residual dropout", "residual dropout fsq"]
)
def test_case_10_padding_counts_nowhere(name, monkeypatch):
    """Images padded to one size, as batches of several sizes are: each keeps its own random depth."""
    z_e, mask = features(after_two_steps(name).dim, 4, 5, 7), torch.ones(4, 5, 7, dtype=torch.bool)
    mask[:, :, 5:] = False
    padded = torch.where(mask[..., None], z_e, math.nan)
    compare(name, "train", (padded, mask), z_e[:, :, :5], SteadyDraws(monkeypatch))


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["sqvae, soft", "projected grouped residual", "residual projected simvq"]),
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
