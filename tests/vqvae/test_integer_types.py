"""Codes and labels of any integer type are the numbers that they stand for, in tensors and in arrays."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from likelihood_worlds import MEMBERS as LIKELIHOODS
from likelihood_worlds import some_features
from quantizer_worlds import ema, features, generator, trained

from priors import TransformerPrior, UnigramPrior
from vqvae import VQVAE
from vqvae.bound import elbo, rate, sampled_elbo
from vqvae.metrics import CodeUsage
from vqvae.quantizers import EMAVectorQuantizer, GumbelQuantizer

TYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
SIGNED = {name for name in TYPES if name.startswith("int")}
SIZES = {"image_size": 8, "width": 8, "num_blocks": 0, "downsampling": 4}


def forms(codes: torch.Tensor, name: str) -> list:
    """Codes of a type, as a tensor, as an array, and as an array that no tensor shares: as a file of it is mapped."""
    array = codes.numpy().astype(name)
    mapped = array.copy()
    mapped.flags.writeable = False
    return [torch.from_numpy(array), array, mapped, array.astype(array.dtype.newbyteorder())]


@pytest.mark.parametrize("name", ["fsq", "projected residual", "multiscale ema"])
def test_case_25_a_quantizer_decodes_codes_of_any_type(name):
    quantizer = trained(name).eval()
    z_e = features(quantizer.dim, 3, 5, 5)
    mask = (torch.arange(75) % 3 > 0).reshape(3, 5, 5)
    plain, masked = quantizer(z_e), quantizer(z_e, mask)
    for kind in TYPES:
        for codes in forms(plain.codes, kind):
            assert torch.equal(quantizer.decode(codes), plain.z_q)
        if kind in SIGNED:
            for codes in forms(masked.codes, kind):
                assert torch.equal(quantizer.decode(codes), masked.z_q)
    assert torch.equal(quantizer.decode(plain.codes.tolist()), plain.z_q)


HUNDRED = EMAVectorQuantizer(num_codes=100, dim=4).eval()


@settings(max_examples=80, deadline=None)
@given(name=st.sampled_from(TYPES), value=st.integers(-(2**63), 2**64 - 1), as_array=st.booleans())
def test_case_25_the_range_is_said_as_it_is(name, value, as_array):
    """-1 is masked in the types that have a -1."""
    info = np.iinfo(name)
    if not info.min <= value <= info.max:
        value = int(info.min) + value % (int(info.max) - int(info.min) + 1)
    array = np.array([0, value, 75], name)
    codes = array if as_array else torch.from_numpy(array)
    if value == -1:
        assert (HUNDRED.decode(codes)[1] == 0).all()
    elif 0 <= value < 100:
        assert torch.equal(HUNDRED.decode(codes), HUNDRED.table[torch.tensor([0, value, 75])])
    else:
        low, high = min(0, value), max(75, value)
        message = (
            f"got codes up to {value}" if value >= 2**63 else rf"codes must lie in \[0, 100\), got {low} to {high}$"
        )
        with pytest.raises(ValueError, match=message):
            HUNDRED.decode(codes)


def test_case_25_a_model_decodes_and_counts_codes_of_any_type():
    torch.manual_seed(0)
    model = VQVAE(**SIZES, quantizer=ema(num_codes=200, dim=4)).eval()
    codes = torch.randint(200, (5, *model.grid), generator=generator())
    want, usage = model.decode(codes), model.usage()
    usage.add(codes)
    for kind in set(TYPES) - {"int8"}:
        for form in forms(codes, kind):
            assert torch.equal(model.decode(form), want)
            other = model.usage()
            other.add(form)
            assert [each.tolist() for each in other.counts] == [each.tolist() for each in usage.counts]
    assert torch.equal(model.decode(codes.tolist()), want)
    with pytest.raises(ValueError, match=r"such as \(b, 2, 2\), got \(1, 4\)"):
        model.decode([[0, 1, 2, 3]])


def test_case_25_usage_counts_no_codes_that_there_are_not():
    for codes, message in ((torch.tensor([[0, -2]]), "got -2 to 0"), (np.array([[250]], np.uint8), "got 250")):
        with pytest.raises(ValueError, match=rf"codes must lie in \[0, 8\), {message}"):
            CodeUsage(8).add(codes)
    with pytest.raises(ValueError, match=r"last axes are \(4,\), got shape \(4, 7, 7\)"):
        CodeUsage(8, (4,)).add(torch.zeros(4, 7, 7, dtype=torch.int64))
    usage = CodeUsage(8)
    usage.add(torch.tensor([[-1, 3, 3]], dtype=torch.int8))
    assert usage.usage == 1 / 8


def test_case_25_the_bound_takes_codes_and_labels_of_any_type():
    torch.manual_seed(0)
    model = VQVAE(**SIZES, quantizer=GumbelQuantizer.Config(num_codes=16, dim=4)).eval()
    prior = TransformerPrior(num_codes=16, grid=model.grid, num_classes=3, width=16, depth=1, num_heads=2).eval()
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8, generator=generator())
    codes, labels = model.encode(images), torch.tensor([2, 0, 1])
    unigram = UnigramPrior(num_codes=16, grid=model.grid).fit(codes)
    with torch.no_grad():
        want, bound, none = rate(prior, codes, labels), elbo(model, prior, images, labels), rate(unigram, codes)
        for kind in ("uint8", "uint16", "int32", "uint64"):
            for form, known in zip(forms(codes, kind)[:2], forms(labels, kind)[:2], strict=True):
                assert torch.equal(rate(prior, form, known), want)
                assert torch.equal(rate(unigram, form, known), none)
                assert torch.equal(elbo(model, prior, images, known).rate, bound.rate)
        for known in ([2, 0, 1], (2, 0, 1)):
            assert torch.equal(rate(prior, codes, known), want)
            assert sampled_elbo(model, prior, images, known, num_samples=2).rate.shape == (3,)
        assert torch.equal(rate(prior, codes, 2), rate(prior, codes, [2, 2, 2]))
        looping = VQVAE(**SIZES, quantizer=ema(num_codes=16, dim=4), beta=1.0).eval()
        through = looping.through(prior, labels).encode(images)
        for known in ([2, 0, 1], labels.numpy()):
            assert torch.equal(looping.through(prior, known).encode(images), through)


@pytest.mark.usefixtures("untyped")
def test_case_25_levels_of_any_type():
    """Of those that a coder asks for, and of those that a chooser answers."""
    likelihood = LIKELIHOODS["mixture, 3 channels"]()
    feats = some_features(likelihood, batch=2, dtype=torch.float32)
    want = likelihood.walk(feats, lambda table: table.argmax(-1))
    parameters = likelihood.symbol_parameters(want, feats)
    levels = torch.arange(0, 256, 5).expand(*want.shape, -1)
    cdf = likelihood.cdf(parameters, levels)
    for kind in set(TYPES) - {"int8"}:
        dtype = getattr(torch, kind)
        assert torch.equal(likelihood.cdf(parameters, levels.to(dtype)), cdf)
        assert torch.equal(likelihood.walk(feats, lambda table, dtype=dtype: table.argmax(-1).to(dtype)), want)
    with pytest.raises(ValueError, match=r"got levels from a chooser of torch\.float32, expected integers"):
        likelihood.walk(feats, lambda table: table.argmax(-1).float())


@pytest.mark.parametrize("name", ["residual, dropout", "multiscale ema"])
def test_case_33_features_and_masks_as_arrays(name):
    quantizer = trained(name).eval()
    z_e, mask = features(quantizer.dim, 3, 5, 5), (torch.arange(75) % 3 > 0).reshape(3, 5, 5)
    want = quantizer(z_e, mask)
    for form, valid in ((z_e.numpy(), mask.numpy()), (z_e.double().numpy(), mask.tolist()), (z_e.tolist(), mask)):
        q = quantizer(form, valid)
        assert torch.equal(q.codes, want.codes)
        assert torch.equal(q.z_q, want.z_q)
        assert torch.equal(quantizer.draw(form, valid).codes, want.codes)
