"""Priors make no tensor elsewhere than where they live, nor of torch's default type."""

import copy

import pytest
import torch
from default_worlds import check_same_under_any_default
from prior_worlds import CONTINUOUS, KINDS, every_grid, sampled, seeded, some_labels
from torch import Tensor

from priors import AnyOrderPrior, DraftHead, NextScalePrior, NGramPrior
from priors.raster import RasterPrior

QUICK = ["transformer-labels", "any-order", "ngram"]
SLOW = ["unigram", "llama", "depth-labels", "next-scale-labels", "pixelcnn-labels"]


@pytest.mark.parametrize("kind", [*QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)])
def test_case_24_a_prior_keeps_to_its_device_and_type(kind):
    """Scoring, training, and draws of every kind: by a generator, by seeds, behind known codes, guided."""
    fresh = KINDS[kind]()
    codes = every_grid(fresh)[:6]
    labels = some_labels(fresh, 6)
    mask = torch.zeros(fresh.grid, dtype=torch.bool)
    mask.view(-1)[fresh.num_positions // 2 :] = True
    head = DraftHead.of(fresh) if isinstance(fresh, RasterPrior) else None

    def run() -> list[Tensor]:
        prior = copy.deepcopy(fresh)
        found = [prior.log_prob(codes, labels), prior.log_conditionals(codes, labels)]
        guidance = None if labels is None else 2.0
        if hasattr(prior, "fit"):
            prior.fit(codes)
        for options in (
            {"generator": seeded(), "guidance": guidance},
            {"prefix": codes.flatten(1)[:, :1], "temperature": 0.0},
            {"given": codes, "mask": mask, "top_k": 2, "generator": seeded()},
            {"num_steps": 2 if isinstance(prior, AnyOrderPrior) else None, "seeds": range(6)},
        ):
            found.append(sampled(prior, 6, labels, **options))
        if head is not None and isinstance(prior, RasterPrior):
            for draft in (head, copy.deepcopy(fresh)):
                drafting = {"draft": draft, "num_proposals": 2, "guidance": guidance}
                found.append(sampled(prior, 6, labels, **drafting, generator=seeded()))
            found += [guess.detach() for guess, _ in head.guesses(prior, *guessed_from(prior, codes, labels))]
        found.append(prior.walk(6, lambda log_probs: log_probs.argmax(-1), labels))
        if not isinstance(prior, NGramPrior):
            weights = torch.nn.functional.one_hot(codes, prior.num_codes).float()
            found.append(prior.relaxed_log_conditionals(weights, labels))
        torch.manual_seed(0)
        found.append(prior.train().log_prob(codes, labels))
        return [each.detach() for each in found]

    check_same_under_any_default(run)


def guessed_from(prior: RasterPrior, codes: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    return prior.features_and_conditionals(codes, labels)[0], codes.flatten(1)


def test_a_prior_that_is_made_without_memory_takes_none():
    """As one is that a folder's config asks for, before its weights are looked at."""
    sizes = {"num_codes": 512, "width": 256, "depth": 1, "num_heads": 2}
    with torch.device("meta"):
        priors = [
            NextScalePrior(**sizes, scales=(1, 200, 400)),  # of 51 GB
            AnyOrderPrior(**sizes, grid=(1024, 1024)),
            NGramPrior(num_codes=512, grid=(1024, 1024)),
        ]
    for prior in priors:
        assert {each.device.type for each in (*prior.parameters(), *prior.buffers())} == {"meta"}


@pytest.mark.parametrize("kind", ["normal", "mixture-labels"])
def test_case_24_a_density_keeps_to_its_device_and_type(kind):
    fresh = CONTINUOUS[kind](dim=3, grid=(2, 2))
    latents = torch.randn(6, 2, 2, 3, generator=seeded())
    labels = some_labels(fresh, 6)

    def run() -> list[Tensor]:
        prior = copy.deepcopy(fresh)
        torch.manual_seed(0)
        found = [prior.log_prob(latents, labels), prior.train().log_prob(latents, labels)]
        found.append(prior.sample(6, labels, generator=seeded()))
        if hasattr(prior, "standardise"):
            found.append(prior.standardise(latents).scale)
        return [each.detach() for each in found]

    check_same_under_any_default(run)
