"""SimVQ, FSQ and the compositions: values and gradients against closed forms and composition by hand."""

import pytest
import torch
from quantizer_worlds import ema, features, objective, trained
from torch.nn import functional as F

from vqvae.quantizers import FSQ, LFQ, MASKED, ResidualQuantizer, SimVQ

DIM = 6


def test_simvq_trains_its_map_and_never_its_codebook():
    """Its terms and gradients are held against another implementation's in test_quantizer_parity."""
    quantizer = trained("simvq")
    assert [name for name, _ in quantizer.named_parameters()] == ["map", "offset"]
    before, frozen = quantizer.table.clone(), quantizer.frozen.clone()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1)
    sum(quantizer(features(DIM, 4, 5)).auxiliary.values()).backward()
    optimizer.step()
    moved = quantizer.table.clone()
    assert (moved != before).all()
    quantizer.update()
    assert torch.equal(quantizer.frozen, frozen)
    assert torch.equal(quantizer.table, moved)  # only the first update places the codes


def test_simvq_starts_with_the_mean_and_covariance_of_the_features():
    """Of those that count, in however many forwards they came."""
    mixing = torch.eye(DIM) + 0.5 * features(DIM, DIM)
    z_e, mask = features(DIM, 40, 5, seed=2) @ mixing + 3, torch.arange(200).reshape(40, 5) % 3 > 0
    quantizer = SimVQ(num_codes=4096, dim=DIM)
    quantizer(z_e[:10], mask[:10])
    quantizer(z_e[10:], mask[10:])
    quantizer.update()
    covariance = z_e[mask].T.cov(correction=0)
    torch.testing.assert_close(quantizer.offset.detach(), z_e[mask].mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((quantizer.map @ quantizer.map.T).detach() / DIM, covariance, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(quantizer.table.T.cov().detach(), covariance, rtol=0.1, atol=0.1)
    assert quantizer.eval()(z_e).usage > SimVQ(num_codes=4096, dim=DIM).eval()(z_e).usage


def test_projected_is_map_quantizer_map():
    quantizer = trained("projected learned")
    z_e = features(DIM, 4, 5).requires_grad_()
    same = z_e.detach().clone().requires_grad_()
    q = quantizer(z_e)
    inner = quantizer.quantizer(quantizer.to_inner(same))
    assert torch.equal(q.codes, inner.codes)
    torch.testing.assert_close(q.z_q, quantizer.to_outer(inner.z_q))
    torch.testing.assert_close(q.auxiliary, inner.auxiliary)
    by_hand = objective(inner.with_vectors(quantizer.to_outer(inner.z_q)))
    parameters = list(quantizer.parameters())
    got, want = torch.autograd.grad(objective(q), [z_e, *parameters]), torch.autograd.grad(by_hand, [same, *parameters])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["grouped ema", "grouped lfq", "grouped residual"])
def test_grouped_is_each_group_alone(name):
    quantizer = trained(name)
    z_e = features(quantizer.dim, 4, 5)
    q = quantizer(z_e)
    halves = [part(half) for part, half in zip(quantizer.parts, z_e.chunk(2, dim=-1), strict=True)]
    for index, half in enumerate(halves):
        assert torch.equal(q.codes[:, :, index], half.codes)
        assert torch.equal(q.perplexity[index], half.perplexity)
    assert torch.equal(q.z_q, torch.cat([half.z_q for half in halves], dim=-1))
    for term, value in q.auxiliary.items():
        torch.testing.assert_close(value, sum(half.auxiliary[term] for half in halves))


@pytest.mark.parametrize("name", ["residual, shared", "residual learned", "residual grouped"])
def test_residual_commitment_is_that_of_partial_sums(name):
    """weight·Σ mse(z, sg partial sum), the groups of a depth summed; its gradient reaches z at every depth."""
    quantizer = trained(name)
    z_e = features(DIM, 4, 5).requires_grad_()
    q = quantizer(z_e)
    groups = 2 if "grouped" in name else 1
    partial = []
    for depth in range(1, quantizer.depth + 1):
        codes = q.codes.clone()
        codes[:, :, depth:] = MASKED
        partial.append(quantizer.decode(codes))
    want = 0.25 * groups * sum(F.mse_loss(z_e, each) for each in partial)
    torch.testing.assert_close(q.auxiliary["commitment"], want)
    got = torch.autograd.grad(q.auxiliary["commitment"], z_e)[0]
    torch.testing.assert_close(got, torch.autograd.grad(want, z_e)[0])


@pytest.mark.parametrize(("dropout", "full"), [(0.0, 1.0), (0.5, 2 / 3), (1.0, 1 / 3)])
def test_dropout_keeps_evenly_drawn_depths_of_one_shared_codebook(dropout, full):
    quantizer = ResidualQuantizer(depth=3, quantizer=ema(), dropout=dropout, shared=True)
    torch.manual_seed(0)
    q = quantizer(features(DIM, 3000, 2))
    depths = (q.codes != MASKED).sum(-1)
    assert (depths[:, 0] == depths[:, 1]).all()
    assert ((q.codes != MASKED) == (torch.arange(3) < depths[..., None])).all()
    shares = torch.bincount(depths[:, 0], minlength=4)[1:] / 3000
    torch.testing.assert_close(shares, torch.tensor([(1 - full) / 2] * 2 + [full]), atol=0.04, rtol=0)
    quantizer.update()
    (codebook,) = quantizer.steps
    assert codebook.traffic.sum().item() == pytest.approx((q.codes != MASKED).sum().item())  # of all depths
    assert (quantizer.eval()(features(DIM, 100, 2)).codes != MASKED).all()


@pytest.mark.parametrize("levels", [(8, 4), (3, 5, 7), (2, 2, 2)])
def test_fsq_gets_finer_with_depth_by_its_levels_and_signs_by_half(levels):
    """A code is off by half a level, and the next depth lays all its levels into one."""
    sizes = torch.tensor(levels)
    z_e = 2 * features(len(levels), 500)
    for depth in (1, 2, 3):
        quantizer = ResidualQuantizer(depth=depth, quantizer=FSQ.Config(levels=levels))
        error = (quantizer(z_e).z_q - quantizer.project(z_e)).abs().amax(0)
        bound = 0.5 / (sizes // 2) * (1.0 / (sizes - 1)) ** (depth - 1)
        assert (error <= bound + 2e-3).all()
        assert (error > 0.8 * bound - 2e-3).all()
        signs = ResidualQuantizer(depth=depth, quantizer=LFQ.Config(num_bits=len(levels)))
        assert (signs(z_e.clamp(-2, 2)).z_q - z_e.clamp(-2, 2)).abs().max() <= 0.5 ** (depth - 1)


@pytest.mark.parametrize(
    ("scales", "refiners"), [((1, 2, 3, 5), (0, 1, 2, 3)), ((1, 2, 3, 4, 5), (0, 0, 1, 2, 3)), ((5,), (0,))]
)
def test_multiscale_is_the_algorithm_of_var(scales, refiners):
    """Algorithm 1 of the paper, written out with torch's own resizing; neighbouring scales share refiners."""
    quantizer = trained("multiscale ema").eval()
    quantizer.scales = scales
    z_e = features(DIM, 4, 5, 5)
    q = quantizer(z_e)
    f, total, refinements, codes = z_e.permute(0, 3, 1, 2), 0, [], []
    for scale, refiner in zip(scales, refiners, strict=True):
        inner = quantizer.quantizer(F.interpolate(f, size=(scale, scale), mode="area").permute(0, 2, 3, 1))
        codes.append(inner.codes.flatten(1))
        big = F.interpolate(inner.z_q.permute(0, 3, 1, 2), size=(5, 5), mode="bicubic")
        found = 0.5 * quantizer.refiners[refiner](big) + 0.5 * big
        f, total = f - found, total + found
        refinements.append(F.mse_loss(total.permute(0, 2, 3, 1), z_e))
    assert torch.equal(q.codes, torch.cat(codes, dim=1))
    torch.testing.assert_close(q.z_q, total.permute(0, 2, 3, 1))
    torch.testing.assert_close(q.auxiliary["refinement"], torch.stack(refinements).mean())
    torch.testing.assert_close(q.auxiliary["commitment"], 0.25 * torch.stack(refinements).mean())


def test_a_coarse_position_counts_if_any_under_it_does():
    quantizer = trained("multiscale ema")
    mask = torch.zeros(1, 5, 5, dtype=torch.bool)
    mask[0, 0, 0] = True
    z_e = features(DIM, 1, 5, 5)
    codes = quantizer(z_e, mask).codes[0].split([1, 4, 9, 25])
    for part in codes:
        assert part[0] >= 0
        assert (part[1:] == MASKED).all()
    alone = quantizer.quantizer(z_e[:, :1, :1])
    assert codes[0][0] == alone.codes.item()  # the mean over the one position that counts


def test_residual_of_projections_passes_the_chain_rule():
    """Kinds with a gradient of their own are subtracted with it: that of a sum written out by hand."""
    quantizer = trained("residual projected")
    z_e = features(DIM, 4, 5).requires_grad_()
    same = z_e.detach().clone().requires_grad_()
    rest, total, terms = same, 0, 0
    for step in quantizer.steps:
        q = step(rest)
        rest, total, terms = rest - q.z_q, total + q.z_q, terms + sum(q.auxiliary.values())
    parameters = list(quantizer.parameters())
    weights = features(DIM, 4, 5, seed=3)
    q = quantizer(z_e)
    got = torch.autograd.grad((q.z_q * weights).sum() + sum(q.auxiliary.values()), [z_e, *parameters])
    want = torch.autograd.grad((total * weights).sum() + terms, [same, *parameters])
    torch.testing.assert_close(got, want)
