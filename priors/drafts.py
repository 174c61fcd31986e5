"""A block of a prior's grids by proposals of a draft: what is asked for, checked, and how it is begun.

A draft is any `Prior`, or a `DraftHead`: what has `check_fits(prior)`, a ValueError unless it can propose codes to a
prior, and `start_draft(prior, scorer, start)`, its `Draft` for one block.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from priors.precision import Arithmetic
from priors.sampling import Sampling, probabilities
from priors.scorers import guided
from priors.speculation import guided_draft, speculate
from priors.walks import WalkOrder, WalkStart


def check_draft(prior: Any, sampling: Sampling, walk_order: WalkOrder, seeds: Sequence[int] | None) -> None:
    """ValueError for a draft, or a number of its proposals, that cannot be had."""
    draft: Any = sampling.draft
    if draft is None:
        if sampling.num_proposals is not None:
            raise ValueError(f"got num_proposals={sampling.num_proposals} without a draft to propose them")
        return
    if not callable(getattr(draft, "start_draft", None)):
        raise ValueError(f"got a {type(draft).__name__} as draft, expected a prior over codes or a DraftHead")
    draft.check_fits(prior)
    if walk_order.order is not None or walk_order.sizes is not None or prior.num_at_once > 1:
        name = type(prior).__name__
        raise ValueError(f"got a draft, expected none: {name} does not sample code by code in raster order")
    if sampling.compiled or seeds is not None:
        other = "compiled=True" if sampling.compiled else "seeds for each grid"
        raise ValueError(f"got a draft beside {other}, expected one of the two")


@torch.no_grad()
def speculated(
    prior: Any,
    sampling: Sampling,
    num_proposals: int,
    generator: torch.Generator | None,
    labels: Tensor | None,
    strengths: Tensor | None,
    walk_order: WalkOrder,
    arithmetic: Arithmetic,
    tick: Callable[[int], object],
) -> Tensor:
    """A block of grids in raster order, "b *grid", by proposals of the draft (`priors.speculation`)."""
    known, draft = walk_order.known, cast(Any, sampling.draft)
    begins = walk_order.kept.sum(1).tolist()
    tick(sum(begins))
    with prior.evaluating(), draft.evaluating(), torch.autocast(prior.device.type, enabled=False):
        start = WalkStart(len(known), labels, arithmetic)
        start = start if strengths is None else prior.doubled(start)
        scorer = prior._start_scorer(start, num_proposals + 1)
        proposing = draft.start_draft(prior, scorer, start)
        if strengths is not None:
            scorer, proposing = guided(scorer, strengths), guided_draft(proposing, strengths)
        to_probabilities = functools.partial(probabilities, sampling)
        codes = speculate(scorer, proposing, known, begins, num_proposals, to_probabilities, generator, tick)
    return codes.reshape(len(codes), *prior.grid)
