"""Soft EM: draws, statistics and updates against the enumerated E-step, and hard EM as its limit."""

import pytest
import torch
from quantizer_worlds import codebooks, ema, features, residual, soft_em
from torch import Tensor
from torch.nn import functional as F

from vqvae.quantizers import SoftEMVectorQuantizer
from vqvae.quantizers import soft_em as soft_em_module

DIM, NUM_CODES = 6, 16


def started(**options) -> SoftEMVectorQuantizer:
    """In float64, its codebook the k-means centres of a few features, about as far apart as a draw reaches."""
    torch.manual_seed(0)
    quantizer = soft_em(**options).build().double()
    quantizer(features(DIM, 40).double())
    quantizer.update()
    return quantizer


def posterior(quantizer: SoftEMVectorQuantizer, z_e: Tensor) -> Tensor:
    """softmax(−‖z − e‖²/2σ²) from the distances themselves, "n k"."""
    distances = (z_e[:, None].double() - quantizer.codebook.double()).square().sum(-1)
    return F.softmax(-distances / (2 * quantizer.variance), dim=-1)


def gathered(quantizer: SoftEMVectorQuantizer) -> tuple[Tensor, Tensor]:
    """Counts and sums of the step so far, in vectors."""
    sums = quantizer.sums_of_step
    return sums["counts"] / quantizer.num_samples, sums["vectors"] / quantizer.num_samples


@pytest.mark.parametrize(("variance", "offset"), [(0.5, 0.0), (3.0, 0.0), (0.5, 3000.0)])
def test_draws_follow_the_posterior(variance, offset, monkeypatch):
    """In float32, also where ‖e‖² is 5e7 and differs by a few between codes, and in several chunks."""
    monkeypatch.setattr(soft_em_module, "CHUNK_ELEMENTS", 50 * NUM_CODES)
    quantizer = started(variance=variance).float()
    quantizer.codebook += offset
    z_e = 0.5 * features(DIM, 1, seed=5) + offset
    quantizer(z_e.expand(4000, DIM))
    expected = posterior(quantizer, z_e)[0]
    assert ((expected > 1e-3) & (expected < 0.75)).sum() > 3
    counts = quantizer.sums_of_step["counts"].double() / 40_000
    assert ((counts - expected).abs() <= 5 * (expected / 40_000).sqrt() + 1e-3).all()


def test_expected_statistics_are_the_enumerated_e_step():
    """n_k = Σ_z P(k|z) and Σz_k = Σ_z P(k|z) z, within four standard errors of 400 forwards."""
    quantizer, z_e = started(num_samples=5), features(DIM, 30, seed=6).double()
    counts, sums = [], []
    for _ in range(400):
        quantizer(z_e)
        n, s = gathered(quantizer)
        counts.append(n)
        sums.append(s)
        quantizer.sums_of_step.clear()
    shares = posterior(quantizer, z_e)
    assert ((shares > 0.05) & (shares < 0.95)).sum() > 30  # the draws are no formality
    for draws, expected in ((torch.stack(counts), shares.sum(0)), (torch.stack(sums), shares.T @ z_e)):
        assert draws.dtype == torch.float64
        # The exact deviation of the mean; draws are independent, a share has variance p (1 − p)/m.
        spread = shares * (1 - shares) / (5 * 400)
        weights = torch.ones(30, 1).double() if draws.ndim == 2 else z_e.square()
        error = (spread.T @ weights).reshape(expected.shape).sqrt()
        assert ((draws.mean(0) - expected).abs() <= 4 * error + 1e-12).all()


def test_an_update_is_the_moving_average_of_the_statistics():
    quantizer, gamma, epsilon = started(revival="off", decay=0.9), 0.9, 1e-5
    counts, sums = quantizer.counts.clone(), quantizer.sums.clone()
    for step in range(3):
        quantizer(features(DIM, 50, seed=step).double())
        n, s = gathered(quantizer)
        assert ((n * 10).frac() == 0).all()
        assert (n.frac() > 0).any()
        counts, sums = gamma * counts + (1 - gamma) * n, gamma * sums + (1 - gamma) * s
        total = counts.sum()
        smoothed = (counts + epsilon) / (total + NUM_CODES * epsilon) * total
        quantizer.update()
        torch.testing.assert_close(quantizer.counts, counts)
        torch.testing.assert_close(quantizer.sums, sums)
        torch.testing.assert_close(quantizer.codebook, sums / smoothed[:, None])
        assert quantizer.counts.sum().item() == pytest.approx(0.9 ** (step + 1) * 40 + (1 - 0.9 ** (step + 1)) * 50)


def test_z_q_is_the_mean_of_the_draws():
    """As the statistics of one vector tell what it drew, they tell its mean; the term is the distance to it."""
    quantizer = started(num_samples=7, commitment_weight=0.3)
    for seed in range(5):
        z_e = features(DIM, 1, seed=seed).double()
        q = quantizer(z_e)
        shares = gathered(quantizer)[0]
        assert shares.sum().item() == pytest.approx(1)
        torch.testing.assert_close(q.z_q[0], shares @ quantizer.codebook)
        torch.testing.assert_close(q.auxiliary["commitment"], 0.3 * F.mse_loss(z_e, q.z_q))
        assert q.codes == torch.cdist(z_e, quantizer.codebook).argmin()
        quantizer.sums_of_step.clear()


def test_evaluation_takes_the_nearest_codes():
    quantizer = started(variance=5.0).eval()
    z_e = features(DIM, 200).double()
    q = quantizer(z_e)
    assert torch.equal(q.codes, torch.cdist(z_e, quantizer.codebook).argmin(-1))
    assert torch.equal(q.z_q, quantizer.codebook[q.codes])


@pytest.mark.parametrize(
    ("revival", "num_samples", "deep"), [("dead", 10, False), ("clustered", 10, True), ("off", 1, False)]
)
def test_without_a_spread_it_is_the_hard_kind(revival, num_samples, deep):
    """z_q and codes to the bit, statistics and codebook to the rounding of sums, through start, updates and revival."""
    configs = (ema(revival=revival, decay=0.9), soft_em(revival=revival, decay=0.9, num_samples=num_samples))
    torch.manual_seed(0)
    hard, soft_kind = (residual(config).build() if deep else config.build() for config in configs)
    for module in codebooks(soft_kind):
        module.variance = 1e-12
    soft_kind.load_state_dict(hard.state_dict())
    for step in range(25):
        z_e = features(DIM, 20, seed=step).double() + 0.2 * step  # away from the codes, so that some die
        hard, soft_kind = hard.double(), soft_kind.double()
        ours, theirs = soft_kind(z_e), hard(z_e)
        assert torch.equal(ours.codes, theirs.codes)
        torch.testing.assert_close(ours.z_q, theirs.z_q, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(dict(ours.auxiliary), dict(theirs.auxiliary))
        hard.update()
        soft_kind.update()
        torch.testing.assert_close(soft_kind.state_dict(), hard.state_dict(), rtol=1e-10, atol=1e-10)
    soft_kind.load_state_dict(hard.state_dict())
    assert torch.equal(soft_kind(z_e).z_q, hard(z_e).z_q)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "at least one sample"),
        ({"variance": 0.0}, "variance above zero"),
        ({"variance": float("inf")}, "finite number"),
        ({"decay": 1.0}, "decay"),
    ],
)
def test_what_cannot_draw_is_a_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        SoftEMVectorQuantizer(**options)
