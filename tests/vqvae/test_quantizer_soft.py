"""Signs (LFQ, BSQ) and soft assignments (IBQ, Gumbel softmax): entropies by enumeration, gradients by dense references.

Straight-through gradients are no derivatives of what they stand for, so `gradcheck` gets the smooth terms alone.
"""

import itertools
import math

import pytest
import torch
from quantizer_worlds import features, generator, trained
from torch.nn import functional as F

from vqvae.quantizers import BSQ, LFQ, GumbelQuantizer, soft
from vqvae.quantizers.binary import pack_bits, unpack_signs
from vqvae.quantizers.soft import entropy_of

DIM = 6


@pytest.mark.parametrize("num_bits", [1, 31, 36, 62])
def test_bits_are_packed_and_unpacked(num_bits):
    bits = torch.rand(200, num_bits, generator=generator()) < 0.5
    bits[0], bits[1] = False, True
    codes = pack_bits(bits)
    assert codes[0] == 0
    assert codes[1] == 2**num_bits - 1
    # The lowest bit first.
    assert codes[2] == sum(int(bit) << position for position, bit in enumerate(bits[2].tolist()))
    assert torch.equal(unpack_signs(codes, num_bits, torch.float32) > 0, bits)


@pytest.mark.parametrize(("kind", "scale"), [(LFQ, 1.0), (BSQ, 4**-0.5)])
def test_codes_are_signs_the_first_channel_lowest(kind, scale):
    quantizer = kind(num_bits=4)
    z_e = torch.tensor([[-1.0, -2.0, -1.0, 0.0], [3.0, -1.0, -1.0, -1.0], [-1.0, -1.0, -0.1, 5.0]])
    q = quantizer(z_e)
    assert q.codes.tolist() == [0, 1, 8]
    signs = torch.tensor([[-1.0, -1, -1, -1], [1, -1, -1, -1], [-1, -1, -1, 1]])
    assert torch.equal(q.z_q, signs * scale)


def enumerated(vectors: torch.Tensor, side: float, tau: float) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(-distance²/τ) over all corners ±side: the mean entropy of a vector's, and their mean, in float64."""
    corners = side * torch.tensor(list(itertools.product([-1.0, 1.0], repeat=vectors.shape[1]))).flip(1).double()
    probs = F.softmax(-torch.cdist(vectors.double(), corners).square() / tau, dim=1)
    return torch.special.entr(probs).sum(1).mean(), probs.mean(0)


@pytest.mark.parametrize(("num_bits", "groups"), [(1, [1]), (12, [12]), (25, [9, 9, 7])])
def test_bsq_entropies_are_those_of_groups_of_bits(num_bits, groups):
    """Exact for up to twelve bits; of more, those of groups as even as can be are added up."""
    z_e, tau = features(num_bits, 20), 0.7
    parts = F.normalize(z_e.double(), dim=-1).split(groups, dim=-1)
    per_sample, averages = zip(*(enumerated(part, num_bits**-0.5, tau) for part in parts), strict=True)
    deficit = num_bits * math.log(2) - sum(torch.special.entr(average).sum() for average in averages)
    quantizer = BSQ(num_bits=num_bits, temperature=tau).double()
    terms = quantizer(z_e.double()).auxiliary
    torch.testing.assert_close(terms["per_sample_entropy"], 0.1 * sum(per_sample))
    torch.testing.assert_close(terms["codebook_entropy_deficit"], 0.1 * deficit)
    torch.testing.assert_close(quantizer(z_e).z_q.norm(dim=-1), torch.ones(20).double())


@pytest.mark.parametrize(("kind", "scale"), [(LFQ, 0.02), (BSQ, 1.0)])
def test_terms_of_signs_are_differentiable(kind, scale):
    quantizer = kind(num_bits=5).double()
    z_e = scale * features(5, 6).double()
    z_e = torch.where(z_e.abs() < 1e-3, 1e-3, z_e).requires_grad_()
    mask = torch.tensor([True, True, False, True, False, True])
    for valid in (None, mask):
        assert torch.autograd.gradcheck(lambda x, valid=valid: sum(quantizer(x, valid).auxiliary.values()), z_e)


def test_entropy_of_a_certain_distribution_is_zero_with_a_finite_gradient():
    probs = torch.tensor([0.0, 1.0, 0.0], requires_grad=True)
    entropy = entropy_of(probs)
    assert entropy == 0
    assert torch.isfinite(torch.autograd.grad(entropy, probs)[0]).all()


def dense_ibq(z: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The paper's formulas on whole matrices."""
    probs = F.softmax(z @ table.T, dim=-1)
    one_hot = F.one_hot(probs.argmax(-1), len(table)).to(z.dtype)
    chosen = (one_hot + probs - probs.detach()) @ table
    hard = one_hot @ table
    sharp = F.softmax(z @ table.T / 0.01, dim=-1)
    average = sharp.mean(0)
    return chosen, {
        "alignment": F.mse_loss(chosen, z),
        "commitment": F.mse_loss(hard.detach(), z),
        "codebook": 0.25 * F.mse_loss(hard, z.detach()),
        "per_sample_entropy": 0.05 * torch.special.entr(sharp).sum(-1).mean(),
        "codebook_entropy_deficit": 0.05 * (math.log(len(table)) - torch.special.entr(average).sum()),
    }


@pytest.mark.parametrize("chunk", [None, 40])
def test_ibq_is_its_dense_reference(chunk, monkeypatch):
    """In values and in gradients to features and to every code, however the vectors are cut into chunks."""
    if chunk:
        monkeypatch.setattr(soft, "CHUNK_ELEMENTS", chunk)
    quantizer = trained("ibq").double()
    z, weights = 0.1 * features(DIM, 30).double().requires_grad_(), features(DIM, 30, seed=3).double()
    q, (chosen, terms) = quantizer(z), dense_ibq(z, quantizer.codebook)
    torch.testing.assert_close(q.z_q, chosen)
    torch.testing.assert_close(dict(q.auxiliary), terms)
    for name, (ours, theirs) in {
        "z_q": ((q.z_q * weights).sum(), (chosen * weights).sum()),
        **{name: (q.auxiliary[name], terms[name]) for name in terms},
    }.items():
        inputs = {"codebook": [quantizer.codebook], "commitment": [z]}.get(name, [z, quantizer.codebook])
        got, want = (torch.autograd.grad(each, inputs, retain_graph=True) for each in (ours, theirs))
        torch.testing.assert_close(got, want, msg=lambda message, name=name: f"{name}: {message}")
        assert all((gradient != 0).any(-1).all() for gradient in got[1:]), name  # each code has one


def gumbel_logits(quantizer, z_e: torch.Tensor) -> torch.Tensor:
    return F.linear(z_e, quantizer.to_logits.weight, quantizer.to_logits.bias)


@pytest.mark.parametrize("hard", [True, False])
def test_gumbel_is_a_relaxed_sample(hard):
    """Values and gradients of a sample with the same noise, written out."""
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(num_codes=8, dim=DIM, hard=hard, temperature=0.7).double()
    z_e, weights = features(DIM, 20).double().requires_grad_(), features(DIM, 20, seed=3).double()
    torch.manual_seed(1)
    q = quantizer(z_e)
    torch.manual_seed(1)
    logits = gumbel_logits(quantizer, z_e)
    sample = F.softmax((logits - torch.empty_like(logits).exponential_().log()) / 0.7, dim=-1)
    if hard:
        codes = sample.argmax(-1)
        chosen = (F.one_hot(codes, 8).double() + sample - sample.detach()) @ quantizer.codebook
    else:
        codes, chosen = logits.argmax(-1), sample @ quantizer.codebook
    assert torch.equal(q.codes, codes)
    torch.testing.assert_close(q.z_q, chosen)
    posterior = F.softmax(logits, dim=-1)
    torch.testing.assert_close(q.entropy, torch.special.entr(posterior).sum(-1))
    kl = (posterior * (posterior * 8).log()).sum(-1).mean()
    torch.testing.assert_close(q.auxiliary["kl"], 5e-4 * kl)
    inputs = [z_e, *quantizer.to_logits.parameters()]
    for ours, theirs in (((q.z_q * weights).sum(), (chosen * weights).sum()), (q.auxiliary["kl"], 5e-4 * kl)):
        got, want = (torch.autograd.grad(each, inputs, retain_graph=True) for each in (ours, theirs))
        torch.testing.assert_close(got, want)
    gradient = torch.autograd.grad((q.z_q * weights).sum(), quantizer.codebook)[0]
    shares = F.one_hot(codes, 8).double() if hard else sample  # hard, a code that was not drawn has no gradient
    torch.testing.assert_close(gradient, shares.T @ weights)


def test_gumbel_evaluates_the_most_probable_code():
    quantizer = trained("gumbel").eval()
    z_e = features(DIM, 200)
    q = quantizer(z_e)
    assert torch.equal(q.codes, gumbel_logits(quantizer, z_e).double().argmax(-1))
    assert torch.equal(q.z_q, quantizer.codebook[q.codes])


def test_gumbel_temperature_falls_along_half_a_cosine():
    quantizer = GumbelQuantizer(num_codes=4, dim=2, temperature=2.0, final_temperature=0.5, anneal_steps=8)
    taus = []
    for _ in range(11):
        taus.append(quantizer.current_temperature.item())
        quantizer.update()
    want = [0.5 + 1.5 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(9)] + [0.5, 0.5]
    assert taus == pytest.approx(want)


@pytest.mark.parametrize("training", [True, False])
def test_gumbel_kl_does_not_depend_on_chunks(training, monkeypatch):
    """The noise is drawn chunk by chunk, so samples may differ; the posterior's entropy and its gradient may not."""
    results = []
    for chunk in (2**22, 40):
        monkeypatch.setattr(soft, "CHUNK_ELEMENTS", chunk)
        quantizer = trained("gumbel").train(training)
        z_e = features(DIM, 30).requires_grad_()
        q = quantizer(z_e)
        gradients = torch.autograd.grad(q.auxiliary["kl"], [z_e, *quantizer.to_logits.parameters()])
        results.append((q.auxiliary["kl"], q.entropy, *gradients))
    torch.testing.assert_close(*results)


def test_a_sample_and_its_gradient_are_one_draw_in_every_chunk(monkeypatch):
    """What is computed again in the backward pass draws the same noise."""
    monkeypatch.setattr(soft, "CHUNK_ELEMENTS", 40)
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(num_codes=8, dim=DIM, hard=False).double()
    z_e = features(DIM, 30).double().requires_grad_()

    def seeded(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(4)
        return quantizer(x).z_q

    assert torch.autograd.gradcheck(seeded, z_e, fast_mode=True)
