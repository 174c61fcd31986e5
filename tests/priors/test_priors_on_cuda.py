"""Priors on a GPU do what they do on the CPU."""

import copy

import pytest
import torch
from device_worlds import CPU, DEVICES, check_same_there
from lanes import some
from prior_worlds import CONTINUOUS, KINDS, every_grid, sampled, seeded, some_labels
from torch import Tensor

from priors import AnyOrderPrior, NGramPrior
from priors.kv_cache import CachedTrunk
from priors.sampling import known_chooser


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", some(KINDS))
def test_a_prior_gives_what_it_gives_on_the_cpu(kind, device):
    """Scoring, training, and draws of every kind, by a generator of the CPU: it gives any device the same codes."""
    fresh = KINDS[kind]()
    codes = every_grid(fresh)[:6]
    labels = some_labels(fresh, 6)
    mask = torch.zeros(fresh.grid, dtype=torch.bool)
    mask.view(-1)[fresh.num_positions // 2 :] = True

    def run(place: torch.device) -> list[Tensor]:
        prior = copy.deepcopy(fresh).to(place)
        known, classes = codes.to(place), None if labels is None else labels.to(place)
        guidance = None if labels is None else 2.0
        found = [prior.log_prob(known, classes), prior.log_conditionals(known, classes)]
        if hasattr(prior, "fit"):
            found += list(prior.fit(known).state_dict().values())
        for options in (
            {"generator": seeded(), "guidance": guidance},
            {"prefix": codes.flatten(1)[:, :1], "temperature": 0.0},
            {"given": known, "mask": mask, "top_k": 2, "generator": seeded()},
            {"num_steps": 2 if isinstance(prior, AnyOrderPrior) else None, "seeds": range(6), "top_p": 0.9},
            {"num_steps": 2 if isinstance(prior, AnyOrderPrior) else None, "seeds": range(6), "min_p": 0.1},
        ):
            found.append(sampled(prior, 6, labels, precision="float32" if prior.has_arithmetic else "auto", **options))
        chooser = known_chooser(codes)
        if not isinstance(prior, AnyOrderPrior):  # codes in the order of the walk, which is the raster here
            found += [prior.walk(6, chooser, classes), chooser.log_prob]
        if not isinstance(prior, NGramPrior):
            weights = torch.nn.functional.one_hot(known, prior.num_codes).to(torch.float32)
            found.append(prior.relaxed_log_conditionals(weights, classes))
        torch.manual_seed(0)
        score = prior.train().log_prob(known, classes)
        if score.requires_grad:
            score.sum().backward()
            found += [each.grad for each in prior.parameters() if each.grad is not None]
        return [each.detach() for each in (*found, score)]

    check_same_there(run, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", CONTINUOUS)
def test_a_density_gives_what_it_gives_on_the_cpu(kind, device):
    fresh = CONTINUOUS[kind](dim=3, grid=(2, 2))
    latents = torch.randn(6, 2, 2, 3, generator=seeded())
    labels = some_labels(fresh, 6)

    def run(place: torch.device) -> list[Tensor]:
        prior = copy.deepcopy(fresh).to(place)
        known, classes = latents.to(place), None if labels is None else labels.to(place)
        found = [prior.log_prob(known, classes), prior.sample(6, labels, generator=torch.Generator(place))]
        if hasattr(prior, "standardise"):
            found.append(prior.standardise(known).scale)
        torch.manual_seed(0)
        score = prior.train().log_prob(known, classes)
        if score.requires_grad:
            score.sum().backward()
            found += [each.grad for each in prior.parameters() if each.grad is not None]
        return [each.detach() for each in (*found, score)]

    check_same_there(run, device)


@pytest.mark.parametrize("device", DEVICES)
def test_steps_of_one_input_are_static_there(device, monkeypatch):
    """As a graph needs them; the double-precision walk of a codec too."""
    seen: list[bool] = []
    advance = CachedTrunk.__call__

    def noted(self, x, *rest, **more):
        seen.append(self.one is not None)
        return advance(self, x, *rest, **more)

    monkeypatch.setattr(CachedTrunk, "__call__", noted)
    fresh = KINDS["transformer-labels"]().double()
    codes = every_grid(fresh)[:5]

    def run(place: torch.device) -> list[Tensor]:
        seen.clear()
        prior, chooser = copy.deepcopy(fresh).to(place), known_chooser(codes)
        walked = prior.walk(5, chooser, labels=0)
        assert seen == [place != CPU] * 4
        return [walked, chooser.log_prob]

    check_same_there(run, device)
