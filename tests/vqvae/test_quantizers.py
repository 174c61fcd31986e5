"""Estimators, codebooks and what they gather: values and gradients against closed forms and NumPy."""

import copy

import numpy as np
import pytest
import torch
from quantizer_worlds import MEMBERS, features, trained

from vqvae.quantizers import (
    MASKED,
    EMAVectorQuantizer,
    VectorQuantizer,
    positionwise,
    rotation_trick,
    straight_through,
)
from vqvae.quantizers.positionwise import code_counts, statistics
from vqvae.quantizers.step_statistics import Pool, hash_rows

NUM_CODES, DIM = 16, 6
LISTED_KINDS = pytest.mark.parametrize("kind", [VectorQuantizer, EMAVectorQuantizer])


def test_straight_through_copies_the_gradient_and_keeps_the_value():
    z_e = (features(DIM, 5) * 1e3).requires_grad_()
    z_q = features(DIM, 5, seed=2).requires_grad_()
    out = straight_through(z_e, z_q)
    assert torch.equal(out, z_q)
    weights = features(DIM, 5, seed=3)
    to_e, to_q = torch.autograd.grad((out * weights).sum(), [z_e, z_q], allow_unused=True)
    assert torch.equal(to_e, weights)
    assert to_q is None


def jacobian_of_rotation(z_e: torch.Tensor, z_q: torch.Tensor) -> torch.Tensor:
    return torch.autograd.functional.jacobian(lambda x: rotation_trick(x, z_q), z_e)


def explicit_rotation(z_e: torch.Tensor, z_q: torch.Tensor) -> torch.Tensor:
    u, v = z_e / z_e.norm(), z_q / z_q.norm()
    w = (u + v) / (u + v).norm()
    return z_q.norm() / z_e.norm() * (torch.eye(len(u)).double() - 2 * w[:, None] * w + 2 * v[:, None] * u)


@pytest.mark.parametrize("scale", [1e-3, 1e6])
def test_rotation_trick_is_the_scaled_rotation(scale):
    z_e, z_q = features(DIM).double() * scale, features(DIM, seed=2).double()
    assert torch.equal(rotation_trick(z_e, z_q), z_q)
    jacobian = jacobian_of_rotation(z_e, z_q)
    torch.testing.assert_close(jacobian, explicit_rotation(z_e, z_q))
    torch.testing.assert_close(jacobian @ z_e, z_q)  # it carries z_e onto z_q


def test_rotation_trick_where_there_is_no_rotation():
    """Of opposite vectors it is a reflection; a zero vector passes straight through."""
    z_e, z_q, eye = features(DIM).double(), features(DIM, seed=2).double(), torch.eye(DIM).double()
    u = z_e / z_e.norm()
    torch.testing.assert_close(jacobian_of_rotation(z_e, -2 * z_e), 2 * (eye - 2 * u[:, None] * u))
    for pair in ((0 * z_e, z_q), (z_e, 0 * z_q), (0 * z_e, 0 * z_q)):
        torch.testing.assert_close(jacobian_of_rotation(*pair), eye)


AS_IT_IS = ("learned", "soft em", "simvq", "lfq", "grouped residual", "residual, shared", "residual soft em")
PROJECTED = ("ema, normalised", "fsq, even", "bsq", "residual fsq")


@pytest.mark.parametrize("name", [*AS_IT_IS, "residual, dropout", "multiscale ema", *PROJECTED])
def test_the_task_reaches_the_encoder_once(name):
    """As it is, or through the projection onto a sphere or into a box."""
    quantizer = trained(name)
    z_e = features(quantizer.dim, 4, 5, 5).requires_grad_()
    weights = features(quantizer.dim, 4, 5, 5, seed=4)
    gradient = torch.autograd.grad((quantizer(z_e).z_q * weights).sum(), z_e)[0]
    if name in PROJECTED:
        weights = torch.autograd.grad((quantizer.project(z_e) * weights).sum(), z_e)[0]
    assert torch.equal(gradient, weights)


@pytest.mark.parametrize("name", ["learned, rotation", "simvq, rotation", "residual, rotation"])
def test_rotation_turns_the_gradient_of_the_task(name):
    quantizer = trained(name).double()
    z_e = features(DIM, 5).double().requires_grad_()
    q = quantizer(z_e)
    weights = features(DIM, 5, seed=4).double()
    gradient = torch.autograd.grad((q.z_q * weights).sum(), z_e)[0]
    want = [explicit_rotation(*pair).T @ w for *pair, w in zip(z_e.detach(), q.z_q.detach(), weights, strict=True)]
    torch.testing.assert_close(gradient, torch.stack(want))


@LISTED_KINDS
def test_first_update_is_k_means(kind):
    """Well-parted clusters: every centre is found, and distortion is that of the clusters."""
    torch.manual_seed(0)
    centres = torch.randn(4, DIM) * 20
    quantizer = kind(num_codes=64, dim=DIM)
    z_e = (centres[torch.arange(256) % 4] + 0.01 * torch.randn(256, DIM))[:, None]
    quantizer(z_e)
    quantizer.update()
    assert (quantizer(z_e).z_q - z_e).square().mean() < 1e-3


def test_k_means_of_few_vectors_has_no_two_codes_alike():
    quantizer = VectorQuantizer(num_codes=8, dim=DIM)
    z_e = features(DIM, 3).repeat(5, 1)
    quantizer(z_e)
    quantizer.update()
    assert len(quantizer.codebook.unique(dim=0)) == 8
    assert torch.cdist(quantizer.codebook, z_e).min(1).values.max() < 0.05


@LISTED_KINDS
def test_a_code_without_traffic_dies_after_22_updates(kind):
    """0.9^22 is the first power under a tenth of an even share; the code becomes a vector of that update's batch."""
    quantizer = kind(num_codes=4, dim=DIM)
    clusters = 20 * torch.eye(4, DIM)
    quantizer(clusters.repeat(6, 1))
    quantizer.update()
    lost = int(quantizer.eval()(clusters[3:]).codes)
    quantizer.train()
    before = quantizer.codebook[lost].clone()
    for update in range(1, 23):
        z_e = clusters[:3].repeat(8, 1) + 0.1 * features(DIM, 24, seed=update)
        quantizer(z_e)
        quantizer.update()
        now = quantizer.codebook[lost]
        assert torch.allclose(now, before) == (update < 22)
    assert (z_e == now).all(1).any()
    assert quantizer.traffic[lost] == 24 / 4
    if kind is EMAVectorQuantizer:
        assert quantizer.counts[lost] == 24 / 4
        torch.testing.assert_close(quantizer.sums[lost], now * 24 / 4)


@pytest.mark.parametrize("name", ["learned, clustered", "ema, clustered"])
def test_clustered_revival_is_the_papers_formula(name):
    quantizer = trained(name)
    quantizer.traffic.copy_(torch.arange(NUM_CODES) * 1e-5)
    z_e = features(DIM, 2, 3, seed=77)  # fewer than the codes, so that some are idle
    q = quantizer(z_e)
    counts = code_counts(q.codes.flatten(), NUM_CODES)
    share = 0.99 * quantizer.traffic + 0.01 * counts / counts.sum()
    weights = torch.exp(-10 * NUM_CODES * share / 0.01 - 1e-3)[:, None]
    anchors = quantizer.pool.draw(NUM_CODES)
    assert all((z_e.flatten(0, 1) == anchor).all(1).any() for anchor in anchors)
    moved = copy.deepcopy(quantizer)
    moved.learn(quantizer.sums_of_step["counts"], quantizer.sums_of_step["vectors"])
    before = moved.codebook.detach()
    quantizer.update()
    assert weights.max() > 0.9
    assert weights.min() < 0.01
    torch.testing.assert_close(quantizer.traffic, share)
    torch.testing.assert_close(quantizer.codebook.detach(), (1 - weights) * before + weights * anchors)


@pytest.mark.parametrize("name", ["learned, no revival", "simvq", "sqvae"])
def test_a_quantizer_that_is_loaded_from_before_its_start_starts_again(name):
    torch.manual_seed(0)
    quantizer = MEMBERS[name].config.build()
    fresh, started = copy.deepcopy(quantizer.state_dict()), []
    for _ in range(2):
        quantizer.load_state_dict(fresh)
        torch.manual_seed(1)
        quantizer.update()  # nothing was quantised yet, so it is no start
        for seed in range(3):
            quantizer(features(quantizer.dim, 20, seed=seed))
            quantizer.update()
        started.append(copy.deepcopy(quantizer.state_dict()))
    torch.testing.assert_close(*started, rtol=0, atol=0)
    assert any(not torch.equal(started[0][key], value) for key, value in fresh.items())


def test_a_bfloat16_quantizer_trains():
    quantizer = trained("ema").bfloat16()
    quantizer(features(DIM, 4, 5).bfloat16())
    quantizer.update()
    q = quantizer(features(DIM, 4, 5).bfloat16())
    assert q.z_q.dtype == torch.float32
    assert torch.equal(quantizer.decode(q.codes), q.z_q)


def test_a_pool_of_a_union_is_the_union_of_pools():
    z, salt = features(DIM, 40), torch.tensor(3)
    whole, parts = Pool(16, DIM), Pool(16, DIM)
    whole.add(z, None, salt)
    for part in (z[30:], z[:30]):
        parts.add(part, None, salt)
    assert torch.equal(whole.joint(), parts.joint())
    assert torch.equal(whole.joint(), z[hash_rows(z, salt).argsort()[:16]])
    assert torch.equal(whole.draw(5), whole.joint()[:5])
    firsts = {int(hash_rows(z, torch.tensor(step)).argmin()) for step in range(20)}
    assert len(firsts) > 10  # each step draws in another order


def test_draws_are_distinct_vectors_in_turn():
    pool, z = Pool(16, DIM), features(DIM, 3)
    valid = torch.arange(12) % 4 < 3  # the fourth is another vector
    pool.add(torch.cat([z, features(DIM, 1, seed=9)]).repeat(3, 1), valid, torch.tensor(0))
    drawn = pool.draw(7)
    assert torch.equal(drawn[3:], drawn[[0, 1, 2, 0]])
    assert set(map(tuple, drawn[:3].tolist())) == set(map(tuple, z.tolist()))
    assert len(pool.joint()) == 9


@pytest.mark.parametrize("codes", [[0, 0, 2, 2, MASKED], [3], [MASKED, MASKED], [1, 3, 3, 3, 2, 0, MASKED]])
def test_counting_by_sorting_is_counting_by_listing(codes, monkeypatch):
    listed = statistics(torch.tensor(codes), 4)
    monkeypatch.setattr(positionwise, "LISTED", 0)
    torch.testing.assert_close(statistics(torch.tensor(codes), 4), listed)
    valid = np.array([code for code in codes if code >= 0])
    shares = np.unique(valid, return_counts=True)[1] / max(len(valid), 1)
    want = (len(shares) / 4, np.exp(-(shares * np.log(shares)).sum()), 4 - len(shares))
    assert [each.item() for each in listed] == pytest.approx(want)
