"""What every prior's conditionals, of codes and of mixtures of codes, must be."""

import copy

import pytest
import torch
import torch.nn.functional as F
from prior_worlds import KINDS, every_grid, make_transformer, some_labels
from torch import Tensor, nn

from priors import NGramPrior, Prior


@pytest.fixture(params=[kind for kind in KINDS if not kind.startswith("ngram")])
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


def test_conditionals_are_those_of_the_walk(prior: Prior) -> None:
    prior = prior.double()
    codes = every_grid(prior)[::5]
    labels = some_labels(prior, len(codes))
    offered = []

    def follow(log_probs: Tensor) -> Tensor:
        offered.append(log_probs)
        return codes.flatten(1)[:, len(offered) - 1]

    prior.walk(len(codes), follow, labels)
    expected = torch.stack(offered, 1).reshape(*codes.shape, -1)
    torch.testing.assert_close(prior.log_conditionals(codes, labels), expected, atol=1e-11, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_conditional_depends_on_the_codes_before_it_alone(kind: str) -> None:
    prior = KINDS[kind]()
    torch.manual_seed(0)
    codes = torch.randint(prior.num_codes, (8, *prior.grid))
    base = prior.log_conditionals(codes).flatten(1, -2)
    for position in range(prior.num_positions):
        other = codes.clone()
        other.flatten(1)[:, position:] = (codes.flatten(1)[:, position:] + 1) % prior.num_codes
        changed = prior.log_conditionals(other).flatten(1, -2)
        assert torch.equal(changed[:, : position + 1], base[:, : position + 1])
        if kind.startswith("transformer") and position + 1 < prior.num_positions:
            assert not torch.equal(changed[:, position + 1], base[:, position + 1])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("transformer")])
def test_a_relaxed_conditional_reads_all_weights_before_it_and_no_others(kind: str) -> None:
    prior = KINDS[kind]()
    torch.manual_seed(0)
    weights = torch.randn(4, prior.num_positions, prior.num_codes).softmax(-1).requires_grad_()
    conditionals = prior._relaxed_log_conditionals(weights, None)
    for position in range(prior.num_positions):
        target = conditionals[:, position].square().sum()
        reach = torch.autograd.grad(target, weights, retain_graph=True)[0].abs().sum((0, 2))
        assert (reach > 0).tolist() == [before < position for before in range(prior.num_positions)]


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


def test_mixtures_score_between(mixing: Prior) -> None:
    """The last position is no context, so there the relaxed sum is linear, and its expectation exact."""
    prior = mixing.double()
    torch.manual_seed(0)
    codes = torch.randint(prior.num_codes, (6, *prior.grid))
    weights = F.one_hot(codes, prior.num_codes).double()
    shares = torch.rand(6, prior.num_codes).double().softmax(-1)
    weights.flatten(1, -2)[:, -1] = shares
    expected = torch.zeros(6).double()
    for code in range(prior.num_codes):
        codes.flatten(1)[:, -1] = code
        expected += shares[:, code] * prior.log_prob(codes)
    torch.testing.assert_close(relaxed(prior, weights), expected, atol=1e-11, rtol=0)


class Relaxed(nn.Module):
    def __init__(self, prior: Prior, labels: Tensor | None):
        super().__init__()
        self.prior, self.labels = prior, labels

    def forward(self, weights: Tensor) -> Tensor:
        return relaxed(self.prior, weights, self.labels)


@pytest.mark.parametrize("kind", ["uniform", "unigram", "tiny", "tiny-labels"])
def test_relaxed_gradients_are_those_of_finite_differences(kind: str) -> None:
    sizes = {"num_codes": 3, "grid": (2, 2), "width": 8, "depth": 1, "num_heads": 1}
    if kind.startswith("tiny"):
        prior = make_transformer(**sizes, num_classes=2 if kind == "tiny-labels" else None).double()
    else:
        prior = KINDS[kind]().double()
    relaxed = Relaxed(prior, some_labels(prior, 2))
    names = [name for name, _ in relaxed.named_parameters()]
    torch.manual_seed(0)
    weights = torch.randn(2, 2, 2, 3).double().softmax(-1).requires_grad_()
    tensors = [weight.detach().clone().requires_grad_() for weight in relaxed.parameters()]

    def of(weights: Tensor, *tensors: Tensor) -> Tensor:
        return torch.func.functional_call(relaxed, dict(zip(names, tensors, strict=True)), (weights,))

    # Fast mode compares along random directions, of the weights and of every parameter.
    assert torch.autograd.gradcheck(of, (weights, *tensors), fast_mode=True)
    assert torch.autograd.gradcheck(lambda weights: of(weights, *tensors), (weights,))
    gradients = torch.autograd.grad(of(weights, *tensors).sum(), [weights, *tensors])
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_conditionals_and_relaxed_in_float32_under_autocast(prior: Prior) -> None:
    codes = every_grid(prior)
    weights = F.one_hot(codes, prior.num_codes).float()
    scores = [lambda: prior.log_conditionals(codes)]
    scores += [] if isinstance(prior, NGramPrior) else [lambda: relaxed(prior, weights)]
    expected = [score() for score in scores]
    with torch.autocast("cpu", torch.bfloat16):
        got = [score() for score in scores]
    for value, wanted in zip(got, expected, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, wanted, atol=0.1, rtol=0.02)
    assert (got[0].exp().sum(-1) - 1).abs().max() < 1e-5


def test_conditionals_follow_the_mode_as_log_prob_does() -> None:
    prior = make_transformer(num_codes=3, grid=(2, 2), num_classes=2, dropout=0.3, label_dropout=0.5).train()
    codes = every_grid(prior)
    labels = some_labels(prior, len(codes))
    values = []
    for score in (
        lambda: prior.log_prob(codes, labels),
        lambda: prior.log_conditionals(codes, labels).gather(-1, codes[..., None]).flatten(1).sum(1),
        lambda: relaxed(prior, F.one_hot(codes, 3).float(), labels),
    ):
        torch.manual_seed(1)
        values.append(score())
    assert not torch.allclose(values[0], copy.deepcopy(prior).eval().log_prob(codes, labels))
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], atol=1e-4, rtol=0)


def test_no_grids_have_no_conditionals(prior: Prior) -> None:
    codes = torch.zeros(0, *prior.grid, dtype=torch.int64)
    assert prior.log_conditionals(codes).shape == (0, *prior.grid, prior.num_codes)
    if not isinstance(prior, NGramPrior):
        assert relaxed(prior, torch.zeros(0, *prior.grid, prior.num_codes)).shape == (0,)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("ngram")])
def test_who_counts_whole_codes_has_no_conditionals_after_mixtures(kind: str) -> None:
    prior = KINDS[kind]()
    weights = F.one_hot(every_grid(prior), prior.num_codes).float()
    with pytest.raises(
        ValueError, match="NGramPrior has no conditionals after mixtures of codes; take a TransformerPrior"
    ):
        prior.relaxed_log_conditionals(weights)
    with pytest.raises(ValueError, match=r"weights of torch\.int64, expected floating point"):
        prior.relaxed_log_conditionals(weights.long())


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("kind", ["uniform", "unigram", "transformer"])
def test_bad_codes_and_weights(kind: str) -> None:
    prior = KINDS[kind]()
    for codes, message in (
        (torch.zeros(2, 2, 2), "float32, expected integers"),
        (torch.zeros(2, 4, dtype=torch.int64), r"shape \(2, 4\), expected \(b, 2, 2\)"),
        (torch.full((1, 2, 2), 3), "codes from 3 to 3, expected 0 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            prior.log_conditionals(codes)
    for weights, message in (
        (torch.zeros(2, 2, 2, 3, dtype=torch.int64), "weights of torch.int64, expected floating point"),
        (torch.zeros(2, 2, 2), r"shape \(2, 2, 2\), expected \(b, 2, 2, 3\)"),
        (torch.zeros(2, 2, 2, 4), r"shape \(2, 2, 2, 4\), expected \(b, 2, 2, 3\)"),
        (torch.tensor(0.0), r"shape \(\), expected \(b, 2, 2, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            relaxed(prior, weights)
    with pytest.raises(ValueError, match="got labels, expected none"):
        relaxed(prior, torch.zeros(2, 2, 2, 3), torch.zeros(2, dtype=torch.int64))
