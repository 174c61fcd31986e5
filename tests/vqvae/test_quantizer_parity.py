"""Parity with vector-quantize-pytorch 1.32, an independent implementation, where it is right.

What its source does, and what is not reproduced here:

- The training forward changes the state (moving averages, revival, k-means), by default once per forward; the codes
  that it returns do not stand for the vectors that it returns with them. Shared codebooks decay once per depth.
- The gradient of the task reaches the encoder once per depth of a `ResidualVQ` (straight through: times the depth).
- Straight-through values are `x + (q - x)`, rounded; SimVQ's are so in evaluation too.
- NaN features get code 0. A masked position that holds NaN makes its codebook NaN (0 · NaN in a matrix product).
- The terms of VQ and LFQ are zero in evaluation. A learned codebook has one term, whose weight is both the codebook's
  and the commitment's. LFQ's entropies clamp probabilities at 1e-5.
"""

import warnings

import pytest
import torch
from quantizer_worlds import features
from torch.nn import functional as F

from vqvae.quantizers import (
    FSQ,
    LFQ,
    EMAVectorQuantizer,
    GroupedQuantizer,
    ResidualQuantizer,
    SimVQ,
    VectorQuantizer,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    import vector_quantize_pytorch as other

K, D = 32, 6
TERMS = {"commitment_weight": 0.25, "rotation_trick": False}
CONFIG = EMAVectorQuantizer.Config(num_codes=K, dim=D)


def their_vq(**options):
    torch.manual_seed(0)
    return other.VectorQuantize(dim=D, codebook_size=K, **{**TERMS, **options})


def copy_state(ours: EMAVectorQuantizer, theirs) -> None:
    """Codebook, counts and sums of theirs, past the start by k-means."""
    ours.codebook.copy_(theirs._codebook.embed[0])
    ours.counts.copy_(theirs._codebook.cluster_size[0])
    ours.sums.copy_(theirs._codebook.embed_avg[0])
    ours.num_updates += 1


@pytest.mark.parametrize(("normalize", "masked"), [(False, False), (True, False), (False, True)])
def test_moving_averages(normalize, masked):
    theirs = their_vq(use_cosine_sim=normalize, decay=0.9)
    ours = EMAVectorQuantizer(num_codes=K, dim=D, normalize=normalize, decay=0.9, revival="off")
    copy_state(ours, theirs)
    mask = torch.arange(160).reshape(8, 20) % 3 > 0 if masked else None
    for step in range(6):
        z_e = features(D, 8, 20, seed=step).requires_grad_()
        same = z_e.detach().clone().requires_grad_()
        q, (_, codes, term) = ours(z_e, mask), theirs(same, mask=mask)
        assert torch.equal(q.codes, codes)  # its fill is -1 too
        torch.testing.assert_close(q.auxiliary["commitment"], term)
        gradients = torch.autograd.grad(q.auxiliary["commitment"], z_e), torch.autograd.grad(term, same)
        torch.testing.assert_close(*gradients)
        ours.update()
        torch.testing.assert_close(ours.table, theirs.codebook, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.counts, theirs._codebook.cluster_size[0])
    q, (quantized, codes, _) = ours.eval()(z_e), theirs.eval()(z_e)
    torch.testing.assert_close(q.z_q, quantized)
    torch.testing.assert_close(ours.decode(codes), theirs.get_output_from_indices(codes))


def test_learned_codebook():
    """Its one term of weight 1 has the gradients of our two of weight 1, and the value of one."""
    theirs = their_vq(learnable_codebook=True, ema_update=False, commitment_weight=1.0)
    ours = VectorQuantizer(num_codes=K, dim=D, commitment_weight=1.0)
    with torch.no_grad():
        ours.codebook.copy_(theirs.codebook)
    z_e = features(D, 8, 20).requires_grad_()
    same = z_e.detach().clone().requires_grad_()
    q, (_, codes, term) = ours(z_e), theirs(same)
    assert torch.equal(q.codes, codes)
    torch.testing.assert_close(q.auxiliary["codebook"], term)
    torch.testing.assert_close(q.auxiliary["commitment"], term)
    to_e, to_codebook = torch.autograd.grad(sum(q.auxiliary.values()), [z_e, ours.codebook])
    same_e, same_codebook = torch.autograd.grad(term, [same, theirs._codebook.embed])
    torch.testing.assert_close(to_e, same_e)
    torch.testing.assert_close(to_codebook, same_codebook[0])


@pytest.mark.parametrize("levels", [(8, 6, 5), (7, 5, 5, 5, 5), (3, 4), (5,)])
def test_fsq(levels):
    theirs, ours = other.FSQ(levels=list(levels)), FSQ(levels=levels)
    z_e = (2 * features(len(levels), 8, 200)).requires_grad_()
    same = z_e.detach().clone().requires_grad_()
    q, (quantized, codes) = ours(z_e), theirs(same)
    assert torch.equal(q.codes, codes.long())
    torch.testing.assert_close(q.z_q, quantized)
    assert torch.equal(ours.decode(q.codes), theirs.indices_to_codes(codes))
    weights = features(len(levels), 8, 200, seed=3)
    gradients = (torch.autograd.grad((out * weights).sum(), x) for out, x in ((q.z_q, z_e), (quantized, same)))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("num_bits", [2, 8])
def test_lfq(num_bits):
    """It numbers bits from the last channel, so that it sees the channels the other way round."""
    theirs = other.LFQ(dim=num_bits, codebook_size=2**num_bits, commitment_loss_weight=0.25)
    ours = LFQ(num_bits=num_bits)
    z_e = (0.05 * features(num_bits, 8, 50)).requires_grad_()
    same = z_e.detach().flip(-1).requires_grad_()
    q = ours(z_e)
    (quantized, codes, _), (per_sample, batch, commitment) = theirs(same, 100.0, return_loss_breakdown=True)
    assert torch.equal(q.codes, codes.long())
    torch.testing.assert_close(q.z_q, quantized.flip(-1))
    terms = q.auxiliary
    deficit = num_bits * torch.tensor(2.0).log() - batch
    torch.testing.assert_close(terms["commitment"], 0.25 * commitment)
    torch.testing.assert_close(terms["per_sample_entropy"], 0.1 * per_sample, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(terms["codebook_entropy_deficit"], 0.1 * deficit, rtol=1e-3, atol=1e-5)
    entropies = terms["per_sample_entropy"] + terms["codebook_entropy_deficit"]
    gradient = torch.autograd.grad(entropies, z_e)[0]
    same_gradient = torch.autograd.grad(0.1 * (per_sample - batch), same)[0].flip(-1)
    torch.testing.assert_close(gradient, same_gradient, rtol=2e-2, atol=2e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_residual(shared):
    torch.manual_seed(0)
    theirs = other.ResidualVQ(dim=D, num_quantizers=3, codebook_size=K, shared_codebook=shared, **TERMS)
    ours = ResidualQuantizer(depth=3, quantizer=CONFIG, shared=shared)
    for step, layer in zip(ours.steps, theirs.layers, strict=False):
        copy_state(step, layer)
    z_e = features(D, 8, 50)
    q, (quantized, codes, _) = ours.eval()(z_e), theirs.eval()(z_e)
    assert torch.equal(q.codes, codes)
    torch.testing.assert_close(q.z_q, quantized)
    coarse = codes.clone()
    coarse[..., 1:] = -1
    for each in (codes, coarse):
        torch.testing.assert_close(ours.decode(each), theirs.get_output_from_indices(each))
    # One of the faults of the list above, so that the list does not outlive it unseen.
    weights = features(D, 8, 50, seed=3)
    outputs = [(each.train(), z_e.clone().requires_grad_()) for each in (ours, theirs)]
    mine, (its, _, terms) = (each(x) for each, x in outputs)
    torch.testing.assert_close(q.auxiliary["commitment"], terms.sum())
    gradients = [
        torch.autograd.grad((out * weights).sum(), x)[0] for out, (_, x) in zip((mine.z_q, its), outputs, strict=True)
    ]
    torch.testing.assert_close(gradients[1], 3 * gradients[0])


def test_grouped_residual():
    torch.manual_seed(0)
    theirs = other.GroupedResidualVQ(dim=2 * D, groups=2, num_quantizers=2, codebook_size=K).eval()
    ours = GroupedQuantizer(quantizer=ResidualQuantizer.Config(depth=2, quantizer=CONFIG)).eval()
    for part, group in zip(ours.parts, theirs.rvqs, strict=True):
        for step, layer in zip(part.steps, group.layers, strict=True):
            copy_state(step, layer)
    z_e = features(2 * D, 8, 20)
    q, (quantized, codes, _) = ours(z_e), theirs(z_e)
    assert torch.equal(q.codes, codes.movedim(0, -2))
    torch.testing.assert_close(q.z_q, quantized)


@pytest.mark.parametrize("rotation", [False, True])
def test_simvq(rotation):
    torch.manual_seed(0)
    theirs = other.SimVQ(dim=D, codebook_size=K, rotation_trick=rotation)
    ours = SimVQ(num_codes=K, dim=D, codebook_weight=1.0, commitment_weight=0.25, rotation=rotation)
    with torch.no_grad():
        ours.frozen.copy_(theirs.frozen_codebook)
        ours.map.copy_(theirs.code_transform.weight)
    z_e = features(D, 8, 50).requires_grad_()
    same = z_e.detach().clone().requires_grad_()
    q, (quantized, codes, term) = ours(z_e), theirs(same)
    assert torch.equal(q.codes, codes)
    torch.testing.assert_close(q.z_q, quantized, rtol=1e-5, atol=1e-5)
    total = sum(q.auxiliary.values())
    torch.testing.assert_close(total, term)
    weights = features(D, 8, 50, seed=3)
    got = torch.autograd.grad((q.z_q * weights).mean() + total, [z_e, ours.map])
    want = torch.autograd.grad((quantized * weights).mean() + term, [same, theirs.code_transform.weight])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert F.mse_loss(ours.decode(q.codes), theirs.indices_to_codes(codes)) < 1e-12
