"""Which arithmetic, and how many proposals, sample a block of a prior's grids fastest: the candidates and their trials.

Each candidate samples a few codes of a block of the size asked for (`priors.numerics` keeps what came out). Trials have
a generator of their own, and so leave every draw as it is.
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch

from priors.numerics import Numerics, fastest, is_small, timed, worth
from priors.precision import Arithmetic, choose, has_bf16
from priors.sampling import Sampling, probabilities, random_chooser
from priors.speculation import speculate
from priors.walks import WalkStart

# Codes of a grid that a trial of speculation samples, and how often.
_CODES, _TIMES = 12, 3
# Positions below which a trial would take as long as what it is for.
_SHORT = 16
# Codes that a prior proposes to another unless it is said how many; a head says how often it is right.
_OF_A_PRIOR = 2


def numerics_for(prior: Any, sampling: Sampling, start: Callable[[Arithmetic], WalkStart]) -> Numerics:
    """How to sample blocks of `prior`, by rule or by trial.

    Args:
        start: what a walk of a block begins with, in an arithmetic.
    """
    begun = start(choose(sampling.precision, start(Arithmetic(prior.dtype)).num, prior, sampling.compiled))
    accepted = _accepted(sampling)
    ruled = Numerics(begun.arithmetic, _proposals_by_rule(prior, sampling))
    num_weights = sum(weight.numel() for weight in prior.parameters())
    steps = prior.num_positions if begun.sizes is None else len(begun.sizes)
    if is_small(num_weights, begun.num) or steps < _SHORT:
        return ruled
    arithmetics = [begun.arithmetic]
    if sampling.precision == "auto" and not sampling.compiled and prior.has_arithmetic and prior.dtype == torch.float32:
        arithmetics = _arithmetics(prior.device)
    candidates: dict[Numerics, Callable[[], float]] = {}
    for arithmetic in arithmetics:
        if sampling.draft is None or accepted is not None:
            candidates[Numerics(arithmetic)] = partial(_plain_trial, prior, start(arithmetic))
        if sampling.draft is None:
            continue
        numbers = [sampling.num_proposals or _OF_A_PRIOR]
        if accepted is not None and sampling.num_proposals is None:
            numbers = list(range(1, len(accepted) + 1))
        for number in numbers:
            trial = partial(_draft_trial, prior, sampling, start(arithmetic), number, accepted)
            candidates[Numerics(arithmetic, number)] = trial
    if len(candidates) < 2:
        return ruled
    sizes = {key: value for key, value in prior.config.to_plain().items() if key not in ("dropout", "label_dropout")}
    chances = None if accepted is None else [round(each, 2) for each in accepted]
    kind = None if sampling.draft is None else type(sampling.draft).__name__
    # Blocks of about as many rows share what was found.
    rows = 1 << (begun.num - 1).bit_length()
    options = [sampling.precision, rows, kind, chances, sampling.num_proposals, begun.sizes]
    name = f"{type(prior).__name__} {json.dumps([sizes, prior.grid, str(prior.device), *options])}"
    with prior.evaluating(), torch.inference_mode(), torch.autocast(prior.device.type, enabled=False):
        return fastest(name, candidates)


def _proposals_by_rule(prior: Any, sampling: Sampling) -> int:
    if sampling.draft is None:
        return 0
    return sampling.num_proposals or _OF_A_PRIOR


def _accepted(sampling: Sampling) -> tuple[float, ...] | None:
    """How often the guesses of the draft are accepted, where it says so; such a draft is used only where it pays."""
    accepted = getattr(sampling.draft, "accepted", None)
    if accepted is None or sampling.num_proposals is not None:
        return None
    return tuple(accepted.tolist())


def _arithmetics(device: torch.device) -> list[Arithmetic]:
    dtypes = [torch.float32, *([torch.bfloat16] if has_bf16(device) else [])]
    layouts = (True, False) if device.type == "cpu" and torch.backends.mkldnn.is_available() else (True,)
    return [Arithmetic(dtype, packed=packed) for dtype in dtypes for packed in layouts]


def _plain_trial(prior: Any, start: WalkStart) -> float:
    """Seconds for a step."""
    chooser = random_chooser(generator=torch.Generator().manual_seed(0))
    # In the middle, where a step takes what steps take on average.
    skipped = prior.num_positions // 2 if prior.can_skip else 0
    step = prior._start_walk(replace(start, skipped=skipped))
    fixed = torch.zeros(start.num, min(1, skipped), dtype=torch.int64, device=prior.device)

    def once() -> None:
        nonlocal fixed
        fixed = torch.stack([chooser(each) for each in step(fixed).unbind(1)], 1)

    return timed(once)


def _draft_trial(
    prior: Any, sampling: Sampling, start: WalkStart, num_proposals: int, accepted: tuple[float, ...] | None
) -> float:
    """Seconds for a position."""
    skipped = prior.num_positions // 2 if prior.can_skip else 0
    num = min(prior.num_positions - skipped, _CODES)
    shape = partial(probabilities, sampling)

    def once() -> float:
        begun, stop = replace(start, skipped=skipped), skipped + num
        scorer = prior._start_scorer(begun, num_proposals + 1)
        draft: Any = sampling.draft
        proposing = draft.start_draft(prior, scorer, begun)
        codes = torch.zeros(start.num, prior.num_positions, dtype=torch.int64, device=prior.device)
        passes = 0

        def tick(_: int) -> None:
            nonlocal passes
            passes += 1

        generator = torch.Generator().manual_seed(0)
        began = time.perf_counter()
        speculate(scorer, proposing, codes, [skipped] * start.num, num_proposals, shape, generator, tick, stop)
        seconds = time.perf_counter() - began
        return seconds / max(1, passes) if accepted is not None else seconds / num

    with cast(Any, sampling.draft).evaluating():
        once()
        seconds = min(once() for _ in range(_TIMES))
    if accepted is None:
        return seconds
    return worth(seconds, prior.num_positions, start.num, accepted[:num_proposals])
