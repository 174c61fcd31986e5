"""Priors on a GPU: what they score and sample there is what they do on the CPU, in float64 to the code."""

import copy

import pytest
import torch
from prior_worlds import KINDS, make_any_order, make_ngram, make_transformer, seeded, some_codes, some_labels

from priors import DraftHead, Prior, Sampling

pytestmark = pytest.mark.cuda


def test_scores_are_those_of_the_cpu(prior: Prior, device: torch.device) -> None:
    there = copy.deepcopy(prior).to(device)
    codes, labels = some_codes(prior, 8), some_labels(prior, 8)
    expected = prior.log_prob(codes, labels)
    got = there.log_prob(codes.to(device), None if labels is None else labels.to(device))
    assert got.device.type == device.type
    torch.testing.assert_close(got.cpu(), expected, atol=1e-3, rtol=0)


def test_samples_are_those_of_the_cpu(prior: Prior, device: torch.device) -> None:
    """By numbers of the same generator, or of the same seeds."""
    prior = prior.double()
    there, labels = copy.deepcopy(prior).to(device), some_labels(prior, 8)
    for options in ({"generator": 3}, {"seeds": range(8)}):
        both = []
        for one in (prior, there):
            how = {"generator": seeded(3)} if "generator" in options else options
            both.append(one.sample(8, labels, **how).cpu())
        assert torch.equal(*both)


@pytest.mark.parametrize("options", [{"temperature": 0.7, "top_k": 2}, {"top_p": 0.8}, {"guidance": 2.0}])
def test_filters_and_guidance(options: dict, device: torch.device) -> None:
    prior = KINDS["transformer-labels"]().double()
    there = copy.deepcopy(prior).to(device)
    here, far = (one.sample(8, 1, Sampling(**options), seeded()).cpu() for one in (prior, there))
    assert torch.equal(here, far)


def test_a_few_steps_of_any_order(device: torch.device) -> None:
    prior = make_any_order(num_codes=3, grid=(3, 4)).double()
    there = copy.deepcopy(prior).to(device)
    mask = torch.arange(12).reshape(3, 4) % 2 == 0
    given = some_codes(prior, 4)
    here = prior.sample(4, sampling=Sampling(num_steps=3), generator=seeded(), given=given, mask=mask)
    far = there.sample(4, sampling=Sampling(num_steps=3), generator=seeded(), given=given, mask=mask)
    assert torch.equal(here, far.cpu())


@pytest.mark.parametrize("kind", ["head", "ngram"])
def test_drafts(kind: str, device: torch.device) -> None:
    sizes = {"num_codes": 3, "grid": (3, 4)}
    prior = make_transformer(**sizes).double()
    draft = DraftHead.of(prior).double() if kind == "head" else make_ngram(**sizes)
    both = []
    for where in ("cpu", device):
        one, proposing = copy.deepcopy(prior).to(where), copy.deepcopy(draft).to(where)
        both.append(one.sample(9, sampling=Sampling(draft=proposing, num_proposals=3), generator=seeded()).cpu())
    assert torch.equal(*both)


@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16"])
def test_every_arithmetic_samples_likely_grids(precision: str, device: torch.device) -> None:
    """Several blocks of other sizes, so that graphs are captured more than once."""
    prior = make_transformer(num_codes=5, grid=(4, 4), num_classes=3).to(device)
    sampling = Sampling(precision=precision, batch_size=24)
    labels = torch.arange(60, device=device) % 3
    codes = prior.sample(60, labels, sampling, seeded())
    even = torch.randint(5, codes.shape, generator=seeded()).to(device)
    assert prior.log_prob(codes, labels).mean() > prior.log_prob(even, labels).mean() + 1
