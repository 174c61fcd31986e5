"""What every prior's conditionals, of codes and of mixtures of codes, must be."""

import pytest
import torch
import torch.nn.functional as F
from prior_worlds import (
    KINDS,
    every_grid,
    make_depth,
    make_next_scale,
    make_pixelcnn,
    make_transformer,
    seeded,
    some_codes,
    some_labels,
)
from torch import Tensor

from priors import NGramPrior, Prior

MIXING = [kind for kind in KINDS if not kind.startswith("ngram")]


@pytest.fixture(params=MIXING)
def mixing(request: pytest.FixtureRequest) -> Prior:
    """A prior that has conditionals after mixtures of codes; an n-gram prior counts whole codes and has none."""
    return KINDS[request.param]()


def relaxed(prior: Prior, weights: Tensor, labels: Tensor | None = None) -> Tensor:
    """Each position's weights on its own conditional, nats "b"."""
    return (weights.to(prior.dtype) * prior.relaxed_log_conditionals(weights, labels)).flatten(1).sum(1)


def test_conditionals_hold_log_prob_and_are_normalised(prior: Prior) -> None:
    prior = prior.double()
    codes = every_grid(prior)
    labels = some_labels(prior, len(codes))
    conditionals = prior.log_conditionals(codes, labels)
    assert conditionals.shape == (*codes.shape, prior.num_codes)
    assert conditionals.dtype == torch.float64
    assert (conditionals.exp().sum(-1) - 1).abs().max() < 1e-12
    picked = conditionals.gather(-1, codes[..., None])[..., 0].flatten(1).sum(1)
    torch.testing.assert_close(picked, prior.log_prob(codes, labels), atol=1e-11, rtol=0)
    if labels is not None:
        assert not torch.allclose(conditionals, prior.log_conditionals(codes))
    assert prior.log_conditionals(codes[:0]).shape == (0, *conditionals.shape[1:])
    assert prior.log_prob(codes[:0]).shape == (0,)


# Beside those of the family, grids of several scales and of several codes in several positions.
WIDE = {
    **KINDS,
    "next-scale-3": lambda: make_next_scale(num_codes=5, scales=(1, 2, 3)),
    "next-scale-from-2": lambda: make_next_scale(num_codes=5, scales=(2, 3)),
    "depth-3": lambda: make_depth(num_codes=5, grid=(2, 2, 3)),
    "transformer-3x3": lambda: make_transformer(num_codes=5, grid=(3, 3)),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", WIDE)
def test_a_conditional_depends_on_the_codes_before_it_and_no_others(kind: str, autocast: bool) -> None:
    prior = WIDE[kind]()
    num = prior.num_positions
    steps = list(range(num))
    if kind.startswith("next-scale"):
        steps = [level for level, scale in enumerate(prior.scales) for _ in range(scale**2)]
    codes = some_codes(prior, 4)
    weights = torch.rand(4, *prior.grid, prior.num_codes).softmax(-1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        base = prior.log_conditionals(codes).flatten(1, -2)
        # Not all of a histogram's or an n-gram's conditionals read anything, or all that comes before.
        reads = kind.startswith(("transformer", "llama", "any-order", "next-scale", "depth"))
        conditionals = prior.relaxed_log_conditionals(weights).flatten(1, -2) if reads else None
        for position in range(num):
            other = codes.clone()
            other.flatten(1)[:, position] = (codes.flatten(1)[:, position] + 1) % prior.num_codes
            changed = (prior.log_conditionals(other).flatten(1, -2) != base).any(-1).any(0).tolist()
            after = [steps[at] > steps[position] for at in range(num)]
            assert changed == after if reads else not any(a and not b for a, b in zip(changed, after, strict=True))
            if reads:
                target = conditionals[:, position].square().sum()
                reach = torch.autograd.grad(target, weights, retain_graph=True)[0].flatten(1, -2).abs().sum((0, 2))
                assert (reach > 0).tolist() == [steps[at] < steps[position] for at in range(num)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-11)])
def test_one_hot_weights_score_as_their_codes(mixing: Prior, dtype: torch.dtype, tolerance: float) -> None:
    prior = mixing.to(dtype)
    codes = every_grid(prior)
    labels = some_labels(prior, len(codes))
    weights = F.one_hot(codes, prior.num_codes)
    for given in (weights.float(), weights.double(), weights.bfloat16()):
        got = relaxed(prior, given, labels)
        assert got.dtype == dtype
        torch.testing.assert_close(got, prior.log_prob(codes, labels), atol=tolerance, rtol=0)
    assert relaxed(prior, weights[:0].float(), some_labels(prior, 0)).shape == (0,)


def test_mixtures_score_between(mixing: Prior) -> None:
    """The last position is no context, so there the relaxed sum is linear, and its expectation exact."""
    prior = mixing.double()
    codes = some_codes(prior, 6)
    weights = F.one_hot(codes, prior.num_codes).double()
    shares = torch.rand(6, prior.num_codes).double().softmax(-1)
    weights.flatten(1, -2)[:, -1] = shares
    expected = torch.zeros(6).double()
    for code in range(prior.num_codes):
        codes.flatten(1)[:, -1] = code
        expected += shares[:, code] * prior.log_prob(codes)
    torch.testing.assert_close(relaxed(prior, weights), expected, atol=1e-11, rtol=0)


TINY = {"num_codes": 3, "width": 8, "depth": 1, "num_heads": 1}
SMOOTH = {
    "uniform": KINDS["uniform"],
    "unigram": KINDS["unigram"],
    "transformer": lambda: make_transformer(**TINY, grid=(2, 2)),
    "transformer-labels": lambda: make_transformer(**TINY, grid=(2, 2), num_classes=2),
    "depth": lambda: make_depth(**TINY, grid=(2, 2), code_depth=1),
    "next-scale": lambda: make_next_scale(**TINY, scales=(1, 2)),
    "pixelcnn": lambda: make_pixelcnn(num_codes=3, grid=(2, 2), width=4, num_classes=2),
}


@pytest.mark.parametrize("kind", SMOOTH)
def test_relaxed_gradients_are_those_of_finite_differences(kind: str) -> None:
    prior = SMOOTH[kind]().double()
    labels = some_labels(prior, 2)
    weights = torch.randn(2, *prior.grid, 3, generator=seeded()).double().softmax(-1).requires_grad_()
    # To the weights alone: those of parameters are of the same operations as of `log_prob`.
    prior.requires_grad_(False)
    assert torch.autograd.gradcheck(lambda weights: relaxed(prior, weights, labels), (weights,))


def test_scores_are_in_float32_under_autocast(prior: Prior) -> None:
    codes = every_grid(prior)
    weights = F.one_hot(codes, prior.num_codes).float()
    scores = [lambda: prior.log_conditionals(codes), lambda: prior.log_prob(codes)]
    scores += [] if isinstance(prior, NGramPrior) else [lambda: relaxed(prior, weights)]
    expected = [score() for score in scores]
    with torch.autocast("cpu", torch.bfloat16):
        got = [score() for score in scores]
        walked = prior.walk(len(codes), lambda log_probs: log_probs.argmax(1))
    for value, wanted in zip(got, expected, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, wanted, atol=0.1, rtol=0.02)
    assert (got[0].exp().sum(-1) - 1).abs().max() < 1e-5
    # No autocast reaches a walk.
    assert torch.equal(walked, prior.walk(len(codes), lambda log_probs: log_probs.argmax(1)))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("kind", ["uniform", "transformer", "ngram"])
def test_bad_weights(kind: str) -> None:
    prior = KINDS[kind]()
    for weights, message in (
        (torch.zeros(2, 2, 2, 3, dtype=torch.int64), "weights of torch.int64, expected floating point"),
        (torch.zeros(2, 2, 2, 4), r"shape \(2, 2, 2, 4\), expected \(b, 2, 2, 3\)"),
        (torch.tensor(0.0), r"shape \(\), expected \(b, 2, 2, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            prior.relaxed_log_conditionals(weights)
    message = "NGramPrior has no conditionals after mixtures" if kind == "ngram" else "got labels, expected none"
    with pytest.raises(ValueError, match=message):
        prior.relaxed_log_conditionals(torch.zeros(2, 2, 2, 3), None if kind == "ngram" else [0, 0])
