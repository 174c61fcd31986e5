"""The contract of every quantizer, and the codebooks' equations against NumPy."""

import copy
import inspect
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import safefolder
from vqvae.quantizers import (
    MASKED,
    EMAVectorQuantizer,
    EMAVectorQuantizerConfig,
    VectorQuantizer,
    VectorQuantizerConfig,
    straight_through,
)
from vqvae.quantizers.base import code_counts, usage_and_perplexity

DIM, NUM_CODES = 6, 16
MEMBERS = {
    "learned": lambda: VectorQuantizer(num_codes=NUM_CODES, dim=DIM),
    "learned, normalised": lambda: VectorQuantizer(num_codes=NUM_CODES, dim=DIM, normalize=True),
    "learned, no revival": lambda: VectorQuantizer(num_codes=NUM_CODES, dim=DIM, revival=False),
    "ema": lambda: EMAVectorQuantizer(num_codes=NUM_CODES, dim=DIM),
    "ema, normalised": lambda: EMAVectorQuantizer(num_codes=NUM_CODES, dim=DIM, normalize=True),
    "ema, one code": lambda: EMAVectorQuantizer(num_codes=1, dim=DIM),
}


@pytest.fixture(params=MEMBERS)
def quantizer(request):
    torch.manual_seed(0)
    return MEMBERS[request.param]()


def features(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(seed))


def trained(quantizer, steps: int = 3):
    for step in range(steps):
        quantizer(features(4, 5, 5, seed=step))
        quantizer.update()
    return quantizer


@pytest.mark.parametrize("shape", [(3,), (3, 7), (3, 4, 5), (2, 3, 4, 5)])
def test_shapes_and_ranges(quantizer, shape):
    q = quantizer(features(*shape))
    assert q.z_q.shape == (*shape, DIM)
    assert q.z_q.dtype == torch.float32
    assert q.codes.shape == shape
    assert q.codes.dtype == torch.int64
    assert q.entropy.shape == (shape[0],)
    assert (q.entropy == 0).all()
    assert q.codes.min() >= 0
    assert q.codes.max() < quantizer.num_codes
    assert 0 < q.usage <= 1
    assert 1 - 1e-5 <= q.perplexity <= quantizer.num_codes * (1 + 1e-5)
    assert all(term.ndim == 0 and term >= 0 for term in q.auxiliary.values())


@pytest.mark.parametrize("training", [True, False])
def test_decode_gives_z_q_to_the_bit(quantizer, training):
    trained(quantizer).train(training)
    q = quantizer(features(4, 5, 5))
    assert torch.equal(quantizer.decode(q.codes), q.z_q)


def test_forward_leaves_the_codebook_alone(quantizer):
    trained(quantizer)
    before = copy.deepcopy(quantizer.state_dict())
    quantizer(features(4, 5, 5))
    assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())


def test_one_code_for_a_vector_alone_or_in_a_batch(quantizer):
    trained(quantizer).eval()
    z_e = features(64, 3)
    together = quantizer(z_e)
    for index in (0, 17, 63):
        alone = quantizer(z_e[index : index + 1])
        assert torch.equal(alone.codes[0], together.codes[index])
        assert torch.equal(alone.z_q[0], together.z_q[index])


def test_mask_leaves_places_out_of_everything(quantizer):
    trained(quantizer)
    twin = copy.deepcopy(quantizer)
    z_e, mask = features(2, 8), torch.arange(16).reshape(2, 8) % 3 > 0
    spoiled = torch.where(mask[..., None], z_e, torch.nan).requires_grad_()
    q = quantizer(spoiled, mask)
    assert (q.codes[~mask] == MASKED).all()
    assert (q.z_q[~mask] == 0).all()
    assert torch.equal(quantizer.decode(q.codes), q.z_q)
    kept = twin(z_e[mask])
    assert torch.equal(q.codes[mask], kept.codes)
    for name, term in q.auxiliary.items():
        torch.testing.assert_close(term, kept.auxiliary[name])
    torch.testing.assert_close(q.perplexity, kept.perplexity)
    quantizer.update()
    twin.update()
    torch.testing.assert_close(quantizer.state_dict(), twin.state_dict())
    gradient = torch.autograd.grad(sum(q.auxiliary.values()), spoiled)[0]
    assert (gradient[~mask] == 0).all()
    assert torch.isfinite(gradient).all()


def test_all_masked_is_nothing(quantizer):
    trained(quantizer)
    before = copy.deepcopy(quantizer.state_dict())
    q = quantizer(features(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    assert (q.codes == MASKED).all()
    assert all(term == 0 for term in q.auxiliary.values())
    quantizer.update()
    assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_searches_in_float32(quantizer, dtype):
    trained(quantizer).eval()
    z_e = features(4, 5)
    plain = quantizer(z_e)
    with torch.autocast("cpu", dtype):
        cast = quantizer(z_e)
    assert torch.equal(plain.codes, cast.codes)
    assert torch.equal(plain.z_q, cast.z_q)
    assert all(term.dtype == torch.float32 for term in cast.auxiliary.values())


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e15])
def test_extreme_features_are_finite(quantizer, value):
    trained(quantizer)
    z_e = torch.full((2, 3, DIM), value, requires_grad=True)
    q = quantizer(z_e)
    gradient = torch.autograd.grad(q.z_q.sum() + sum(q.auxiliary.values()), z_e)[0]
    assert torch.isfinite(q.z_q).all()
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_is_an_error_and_no_code(quantizer, value):
    z_e = features(2, 3)
    z_e[1, 2, 3] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantizer(z_e)


def test_saved_and_loaded_goes_on_equally(quantizer, tmp_path):
    trained(quantizer)
    safefolder.save(tmp_path / "q", {"class": "q"}, quantizer.state_dict())
    twin = copy.deepcopy(quantizer)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.fill_(7)
    safefolder.load_weights(twin, safefolder.load(tmp_path / "q")[1], "q")
    for each in (quantizer, twin):
        each(features(4, 5, 5, seed=9))
        each.update()
    assert all(
        torch.equal(a, b) for a, b in zip(quantizer.state_dict().values(), twin.state_dict().values(), strict=True)
    )


def test_accumulated_forwards_are_one_update(quantizer):
    """Two halves of a batch before one update leave the codebook as the whole batch would."""
    trained(quantizer)
    twin = copy.deepcopy(quantizer)
    z_e = features(8, 5, 5, seed=5)
    quantizer(z_e)
    twin(z_e[:4])
    twin(z_e[4:])
    assert torch.equal(quantizer.new_counts, twin.new_counts)
    torch.testing.assert_close(quantizer.new_sums, twin.new_sums)
    quantizer.update()
    twin.update()
    if not (quantizer.traffic == 1).any():
        torch.testing.assert_close(quantizer.table, twin.table)


COMPILED = """
import torch
from vqvae.quantizers import EMAVectorQuantizer, VectorQuantizer
for kind in (VectorQuantizer, EMAVectorQuantizer):
    for train in (True, False):
        torch.manual_seed(0)
        quantizer = kind(num_codes=16, dim=6).train(train)
        compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
        z_e = torch.randn(2, 5, 6)
        assert torch.equal(compiled(z_e).codes, quantizer(z_e).codes)
        assert torch.equal(compiled(z_e).z_q, quantizer(z_e).z_q)
"""


def test_compiles_whole():
    """In a process without the type checker's hook, which torch.compile cannot trace."""
    subprocess.run([sys.executable, "-c", COMPILED], check=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q: q(torch.zeros(2, DIM + 1)), "d = 6 last"),
        (lambda q: q(torch.zeros(DIM)), "got shape"),
        (lambda q: q(torch.zeros(2, DIM, dtype=torch.int64)), "floating-point"),
        (
            lambda q: q(torch.zeros(2, DIM), torch.ones(3, dtype=torch.bool)),
            "boolean mask of shape",
        ),
        (lambda q: q.decode(torch.tensor([[0, 10_000]])), "must lie in"),
        (lambda q: q.decode(torch.tensor([[-2]])), "must lie in"),
        (lambda q: q.decode(torch.tensor([[0.5]])), "integers"),
    ],
)
def test_bad_input_is_a_sentence(quantizer, call, message, untyped):
    with pytest.raises(ValueError, match=message):
        call(quantizer)


@pytest.mark.parametrize("kind", [VectorQuantizer, EMAVectorQuantizer])
@pytest.mark.parametrize("sizes", [{"num_codes": 0}, {"dim": 0}])
def test_empty_codebooks_are_refused(kind, sizes):
    with pytest.raises(ValueError, match="at least one"):
        kind(**sizes)


def test_decay_must_be_a_share():
    with pytest.raises(ValueError, match="decay"):
        EMAVectorQuantizer(decay=1.0)


@pytest.mark.parametrize(
    ("kind", "config"),
    [(VectorQuantizer, VectorQuantizerConfig), (EMAVectorQuantizer, EMAVectorQuantizerConfig)],
)
def test_config_and_constructor_have_the_same_options(kind, config):
    options = {name: p.default for name, p in inspect.signature(kind).parameters.items()}
    assert options == vars(config())
    assert isinstance(config().build(), kind)


# --- values -----------------------------------------------------------------------------------------------------------


def sonnet(inputs: np.ndarray, codes: np.ndarray, beta: float) -> dict[str, np.ndarray]:
    """Sonnet's `VectorQuantizer` in NumPy (v1 and v2 agree): distances, losses, and their gradients by hand."""
    flat = inputs.reshape(-1, inputs.shape[-1])
    distances = (flat**2).sum(1, keepdims=True) - 2 * flat @ codes.T + (codes**2).sum(1)[None]
    indices = distances.argmin(1)
    quantized = codes[indices].reshape(inputs.shape)
    e_latent_loss = ((quantized - inputs) ** 2).mean()
    q_latent_loss = ((quantized - inputs) ** 2).mean()
    d_inputs = beta * 2 * (inputs - quantized) / inputs.size
    d_codes = np.zeros_like(codes)
    np.add.at(d_codes, indices, 2 * (quantized - inputs).reshape(flat.shape) / inputs.size)
    return {
        "indices": indices.reshape(inputs.shape[:-1]),
        "quantized": quantized,
        "loss": q_latent_loss + beta * e_latent_loss,
        "d_inputs": d_inputs,
        "d_codes": d_codes,
    }


def test_learned_codebook_is_sonnets():
    quantizer = trained(VectorQuantizer(num_codes=NUM_CODES, dim=DIM))
    z_e = features(4, 3, 3).requires_grad_()
    want = sonnet(z_e.detach().double().numpy(), quantizer.codebook.detach().double().numpy(), 0.25)
    q = quantizer(z_e)
    np.testing.assert_array_equal(q.codes.numpy(), want["indices"])
    np.testing.assert_allclose(q.z_q.detach().numpy(), want["quantized"], rtol=1e-6)
    objective = sum(q.auxiliary.values())
    np.testing.assert_allclose(objective.item(), want["loss"], rtol=1e-6)
    d_inputs, d_codes = torch.autograd.grad(objective, [z_e, quantizer.codebook])
    np.testing.assert_allclose(d_inputs.numpy(), want["d_inputs"], rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(d_codes.numpy(), want["d_codes"], rtol=1e-4, atol=1e-9)


def test_ema_codebook_is_sonnets():
    """Sonnet's `VectorQuantizerEMA` in NumPy, its moving averages taken from a common start."""
    quantizer = trained(EMAVectorQuantizer(num_codes=NUM_CODES, dim=DIM, revival=False))
    counts, sums = quantizer.counts.double().numpy(), quantizer.sums.double().numpy()
    codebook, gamma, epsilon = quantizer.codebook.double().numpy(), 0.99, 1e-5
    for step in range(5):
        z_e = features(4, 3, 3, seed=100 + step)
        flat = z_e.double().reshape(-1, DIM).numpy()
        encodings = np.eye(NUM_CODES)[sonnet(flat, codebook, 0.25)["indices"]]
        counts = gamma * counts + (1 - gamma) * encodings.sum(0)
        sums = gamma * sums + (1 - gamma) * encodings.T @ flat
        n = counts.sum()
        codebook = sums / ((counts + epsilon) / (n + NUM_CODES * epsilon) * n)[:, None]
        quantizer(z_e)
        quantizer.update()
        np.testing.assert_allclose(quantizer.codebook.numpy(), codebook, rtol=1e-4, atol=1e-6)


def test_straight_through_copies_the_gradient_and_keeps_the_value():
    z_e = (features(5) * 1e3).requires_grad_()
    z_q = features(5, seed=2)
    out = straight_through(z_e, z_q)
    assert torch.equal(out, z_q)
    weights = features(5, seed=3)
    assert torch.equal(torch.autograd.grad((out * weights).sum(), z_e)[0], weights)


def test_straight_through_reaches_the_encoder(quantizer):
    trained(quantizer)
    z_e = features(4, 3).requires_grad_()
    weights = features(4, 3, seed=4)
    got = torch.autograd.grad((quantizer(z_e).z_q * weights).sum(), z_e)[0]
    inner = F.normalize(z_e, dim=-1) if quantizer.normalize else z_e
    want = torch.autograd.grad((inner * weights).sum(), z_e)[0]
    torch.testing.assert_close(got, want)


def test_normalised_codes_are_unit_vectors():
    q = trained(VectorQuantizer(num_codes=NUM_CODES, dim=DIM, normalize=True))(features(4, 3))
    torch.testing.assert_close(q.z_q.norm(dim=-1), torch.ones(4, 3))


@pytest.mark.parametrize("kind", [VectorQuantizer, EMAVectorQuantizer])
def test_first_update_is_k_means(kind):
    """Well-parted clusters, one code each: every centre is found, and distortion is that of the clusters."""
    torch.manual_seed(0)
    centres = torch.randn(4, DIM) * 20
    quantizer = kind(num_codes=64, dim=DIM)
    z_e = (centres[torch.arange(256) % 4] + 0.01 * torch.randn(256, DIM))[:, None]
    quantizer(z_e)
    quantizer.update()
    error = (quantizer(z_e).z_q - z_e).square().mean()
    assert error < 1e-3


@pytest.mark.parametrize("kind", [VectorQuantizer, EMAVectorQuantizer])
def test_revival_brings_back_dead_codes(kind):
    torch.manual_seed(0)
    used = {}
    for revival in (True, False):
        quantizer = kind(num_codes=64, dim=DIM, revival=revival)
        quantizer(torch.randn(8, 4, DIM) * 0.01 + 5)
        quantizer.update()
        for step in range(60):  # the features leave for elsewhere
            quantizer(features(32, 8, seed=step))
            quantizer.update()
        used[revival] = quantizer(features(32, 8, seed=99)).usage.item()
    assert used[True] > 0.9
    assert used[False] < 0.5


def test_update_without_a_forward_changes_nothing(quantizer):
    trained(quantizer)
    before = copy.deepcopy(quantizer.state_dict())
    quantizer.update()
    assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())


def test_counts_usage_and_perplexity():
    counts = code_counts(torch.tensor([0, 0, 2, 2, MASKED]), 4)
    assert counts.tolist() == [2, 0, 2, 0]
    usage, perplexity = usage_and_perplexity(counts)
    assert usage == 0.5
    assert perplexity == pytest.approx(2)
