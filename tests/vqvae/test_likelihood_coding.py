"""The contract of every likelihood, for coding: its walk, its symbols and their cumulative probabilities."""

import pytest
import torch
from likelihood_worlds import MEMBERS, cdf_table, known_levels, pmf_table, some_features, some_images
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vqvae.likelihoods import LocalContext, LogisticMixture
from vqvae.likelihoods.base import Symbols


@pytest.fixture(params=MEMBERS)
def likelihood(request):
    return MEMBERS[request.param]()


@pytest.mark.parametrize(("dtype", "atol", "rtol"), [(torch.float64, 1e-12, 1e-10), (torch.float32, 1e-5, 1e-4)])
def test_walk_scores_known_images(likelihood, dtype, atol, rtol):
    images, features = some_images(likelihood), some_features(likelihood, dtype=dtype)
    known = known_levels(likelihood, images)
    scores = []

    def chooser(table: Tensor) -> Tensor:
        assert table.dtype == dtype
        rows = table.exp().sum(-1)
        torch.testing.assert_close(rows, torch.ones_like(rows), atol=atol, rtol=0)
        levels = next(known)
        scores.append(table.gather(1, levels[:, None]).sum())
        return levels

    assert torch.equal(likelihood.walk(features, chooser), images)
    assert next(known, None) is None
    torch.testing.assert_close(sum(scores), likelihood.log_prob(images, features).sum(), atol=0, rtol=rtol)


def assert_visit_offers_the_parameters(likelihood, images, features):
    """And both views of a step's symbols are of one distribution, which other parameters may replace."""
    known = known_levels(likelihood, images)
    offered = []

    def chooser(symbols: Symbols) -> Tensor:
        assert symbols.likelihood is likelihood
        offered.append(symbols.parameters)
        levels = torch.arange(256).expand(len(symbols.parameters), 256)
        cdf = symbols.cdf(levels)
        torch.testing.assert_close(cdf, symbols.log_probs().exp().cumsum(-1), atol=1e-12, rtol=0)
        first = symbols.parameters[:1].expand(len(levels), -1)
        assert torch.equal(symbols.cdf(levels, first), cdf[:1].expand(len(levels), -1))
        return next(known)

    assert torch.equal(likelihood.visit(features, chooser), images)
    assert next(known, None) is None
    parameters = likelihood.symbol_parameters(images, features).flatten(1, 3)
    order = likelihood.order(*images.shape[2:])
    assert torch.equal(torch.cat(order).sort().values, torch.arange(images[0].numel()))
    for symbols, actual in zip(order, offered, strict=True):
        torch.testing.assert_close(actual, parameters[:, symbols].flatten(0, 1), atol=1e-12, rtol=1e-12)


def test_visit_offers_the_parameters(likelihood):
    images, features = some_images(likelihood, size=4)[..., :3], some_features(likelihood, size=4)[..., :3]
    assert_visit_offers_the_parameters(likelihood, images, features)
    if not isinstance(likelihood, LocalContext):
        expected = torch.arange(images[0].numel()).view(likelihood.num_channels if likelihood.coupled else 1, -1)
        assert torch.equal(torch.stack(likelihood.order(4, 3)), expected)


def test_bad_choosers(likelihood, untyped):
    features = some_features(likelihood)
    with pytest.raises(ValueError, match=r"shape \(1,\), expected"):
        likelihood.walk(features, lambda table: table.argmax(-1)[:1])
    with pytest.raises(ValueError, match="levels from 256 to 256"):
        likelihood.walk(features, lambda table: torch.full((len(table),), 256))
    with pytest.raises(ValueError, match=r"levels from -1 to -1, expected 0\.\.255"):
        likelihood.visit(features, lambda symbols: torch.full((len(symbols.parameters),), -1))


def test_cdf_is_a_distribution(likelihood):
    for spread in (0.0, 1.0, 50.0, 1e4):
        for features in (some_features(likelihood, spread=spread), some_features(likelihood).sign() * spread):
            for dtype in (torch.float64, torch.float32):
                table = cdf_table(likelihood, features.to(dtype), some_images(likelihood))
                assert (table[..., -1] == 1).all()
                assert table.min() >= 0
                assert table.max() <= 1
                assert (table.diff(dim=-1) >= -1e-15).all()


def test_cdf_at_some_levels_is_the_log_probs(likelihood):
    for spread in (1.0, 50.0, 1e4):
        features, images = some_features(likelihood, spread=spread), some_images(likelihood)
        parameters = likelihood.symbol_parameters(images, features)
        levels = torch.tensor([255, -1, 100, -1, 254, 255]).expand(*images.shape, 6)
        cdf = likelihood.cdf(parameters, levels)
        assert (cdf[..., [1, 3]] == 0).all()
        assert (cdf[..., [0, 5]] == 1).all()
        # Vectorised functions may differ in the last bit from one place in memory to the next.
        table = cdf_table(likelihood, features, images)[..., [100, 254]]
        torch.testing.assert_close(cdf[..., [2, 4]], table, atol=1e-15, rtol=0)
        probs = Symbols(parameters.flatten(0, -2), likelihood).log_probs().exp()
        masses = pmf_table(likelihood, features, images).flatten(0, -2)
        torch.testing.assert_close(masses, probs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("member", [name for name in MEMBERS if "normal" not in name])
def test_cdf_of_rounded_parameters(member):
    """Weights that do not sum to one are taken as their shares, so that level 255 gets its own mass alone."""
    likelihood = MEMBERS[member]()
    parameters = likelihood.symbol_parameters(some_images(likelihood), some_features(likelihood))
    shifted = parameters.clone()
    mixture = likelihood.mixture if isinstance(likelihood, LocalContext) else likelihood
    num_others = 2 * mixture.num_components if isinstance(mixture, LogisticMixture) else 0
    shifted[..., : likelihood.num_parameters - num_others] += 0.125
    levels = torch.arange(256).expand(*parameters.shape[:-1], 256)
    expected = likelihood.cdf(parameters, levels)
    torch.testing.assert_close(likelihood.cdf(shifted, levels), expected, atol=2e-15, rtol=0)


class Largest(TorchDispatchMode):
    """Elements of the largest new tensor; views of `known` aside."""

    def __init__(self, *known: Tensor):
        super().__init__()
        self.known = {each.untyped_storage().data_ptr() for each in known}
        self.num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        answer = func(*args, **(kwargs or {}))
        for each in answer if isinstance(answer, (tuple, list)) else [answer]:
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in self.known:
                self.num = max(self.num, each.numel())
        return answer


def test_cdf_takes_what_is_asked_for(likelihood):
    num = 300_000 // likelihood.num_parameters
    features = some_features(likelihood, batch=1, size=1)
    parameter = likelihood.symbol_parameters(some_images(likelihood, 1, 1), features)[0, 0, 0, 0]
    parameters = parameter.expand(num, -1).contiguous()
    for wanted in (1, 20):
        levels = torch.full((num, wanted), 77)
        with Largest(parameters, levels) as largest:
            likelihood.cdf(parameters, levels)
        assert largest.num <= max(num * wanted, torch.get_num_threads() * 131_072)


@pytest.mark.usefixtures("untyped")
def test_bad_levels_and_parameters(likelihood):
    parameters = torch.zeros(6, likelihood.num_parameters)
    good = torch.zeros(6, 2, dtype=torch.int64)
    for levels, own, message in (
        (good - 2, parameters, "levels from -2 to -2, expected -1 "),
        (good + 256, parameters, "levels from 256 to 256, expected -1 "),
        (good.float(), parameters, "levels of dtype torch.float32, expected integers"),
        (good[:5], parameters, r"levels of shape \(5, 2\) for parameters of shape \(6, "),
        (good[0], parameters, r"levels of shape \(2,\) for parameters of shape \(6, "),
        (good, parameters[:, 1:], rf"parameters of shape .*, expected floating .* {parameters.shape[1]}\)"),
        (good, parameters.long(), "parameters of shape .* dtype torch.int64, expected floating"),
    ):
        with pytest.raises(ValueError, match=message):
            Symbols(parameters, likelihood).cdf(levels, own)
