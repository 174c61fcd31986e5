"""Exact speculative sampling: a cheap draft proposes codes, the prior scores them all in one pass, and as many are
taken as leave the distribution that of the prior.

With p the prior's conditional at a position and q the draft's, both after temperature, filters and guidance, a proposal
z ~ q is taken with probability min(1, p(z) / q(z)). The first that is not is replaced by a draw from what q falls short
of, max(0, p - q) normalised, and what was proposed behind it is forgotten; if all are taken, the pass has the prior's
own conditional of one position more. Every code so has the distribution p, whatever q is: Leviathan, Kalman & Matias
2023, "Fast inference from transformers via speculative decoding"; Chen et al. 2023, "Accelerating large language model
decoding with speculative sampling". The probability of acceptance is the mass that they share, sum_k min(p_k, q_k).

Each grid goes on by as many codes as were taken of it, so grids of a block stand at different positions
(`priors.scorers`). Draws are by inverting a CDF, in float64, from numbers that are drawn for all grids and proposals of
a pass at once.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from priors.scorers import Scorer

# Gives logits "b k", ln Q(z_i = .) up to a constant, of one position i of each row, from the codes before it. It takes
# the codes as a `Scorer` does; the positions; the same as int64 "b" with the grid's last in place of those behind it;
# and a number: a pass asks for its first position, number 0, before which all codes are final, then for the following.
Draft = Callable[[Tensor, Sequence[int], Tensor, int], Tensor]


class PriorDraft:
    """Any prior as a draft, by its scorer."""

    def __init__(self, scorer: Scorer):
        self.scorer = scorer

    def __call__(self, codes: Tensor, begins: Sequence[int], at: Tensor, number: int) -> Tensor:
        if number or min(begins) == 0:
            return self.scorer(codes, begins, at[:, None])[:, -1]
        # Of a pass whose proposals were all taken the last one has not been read yet.
        return self.scorer(codes, [begin - 1 for begin in begins], torch.stack((at - 1, at), 1))[:, -1]


def guided_draft(draft: Draft, strengths: Tensor) -> Draft:
    """As `priors.scorers.guided`: of two rows for each grid, the second without its label."""

    def propose(codes: Tensor, begins: Sequence[int], at: Tensor, number: int) -> Tensor:
        both = draft(codes.repeat(2, 1), [*begins, *begins], at.repeat(2), number)
        given, free = both.log_softmax(-1).chunk(2)
        return free + strengths[at][:, None] * (given - free)

    return propose


def speculate(
    target: Scorer,
    draft: Draft,
    codes: Tensor,
    begins: Sequence[int],
    num_proposals: int,
    to_probabilities: Callable[[Tensor], Tensor],
    generator: torch.Generator | None,
    tick: Callable[[int], object] | None = None,
    stop: int | None = None,
) -> Tensor:
    """Grids "b n" whose codes before `begins` are those of `codes` "b n", and the rest is sampled.

    Args:
        num_proposals: codes proposed in a pass, at most.
        to_probabilities: what is sampled from, "*b k", of logits.
        tick: is told how many codes were fixed, after each pass.
        stop: the position before which to stop; None is the end.
    Raises ValueError for probabilities that are not finite.
    """
    num, num_positions = codes.shape
    rows = torch.arange(num, device=codes.device)
    ahead = torch.arange(num_proposals + 1, device=codes.device)
    # Proposals behind a grid's end go where nobody looks.
    codes, places = torch.cat((codes, codes.new_zeros(num, num_proposals + 1)), 1), list(begins)
    # A draft may read what the first pass finds.
    proposing, drafts = 0, None
    stop = num_positions if stop is None else stop
    while min(places) < stop:
        proposing = min(proposing, stop - 1 - min(places))
        uniform = _uniform(num, 2 * proposing + 1, generator, codes.device)
        first = torch.tensor(places, device=codes.device)
        at = (first[:, None] + ahead[: proposing + 1]).clamp(max=num_positions - 1)
        for number in range(proposing):
            # Grids that are whole wait at their end.
            here = [min(place + number, num_positions) for place in places]
            q = to_probabilities(draft(codes, here, at[:, number], number))
            if drafts is None:  # and nothing behind the last proposal
                drafts = q.new_zeros(num, num_proposals + 1, q.shape[-1])
            drafts[:, number] = q
            codes[rows, first + number] = draw(q, uniform[:, number])
        p = to_probabilities(target(codes, places, at))
        rest, taken = p[:, 0], [0] * num
        if drafts is not None:
            drafts[:, proposing] = 0
            proposed = codes.gather(1, first[:, None] + ahead[:proposing])[..., None]
            priors, drafted = (each[:, :proposing].gather(-1, proposed)[..., 0] for each in (p, drafts))
            is_taken = uniform[:, proposing : 2 * proposing] * drafted < priors
            taken = is_taken.cumprod(1).sum(1).tolist()
            rest, q = (torch.stack([row[i] for row, i in zip(each, taken, strict=True)]) for each in (p, drafts))
            # A shade of p, so that rounding never leaves nothing.
            rest = (rest - q).clamp_(min=0).add_(rest, alpha=1e-30)
        ends = [place + more for place, more in zip(places, taken, strict=True)]
        codes[rows, torch.tensor(ends, device=codes.device)] = draw(rest, uniform[:, -1])
        ends = [min(stop, end + 1) for end in ends]
        if tick is not None:
            tick(sum(ends) - sum(places))
        places, proposing = ends, num_proposals
    return codes[:, :num_positions]


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """One code "b" a row, with probabilities in proportion to `weights` "b k", from float64 numbers "b" in [0, 1).

    The first code whose CDF exceeds u; never one of weight 0. ValueError for weights that are not finite.
    """
    cdf = weights.double().cumsum(-1)
    total = cdf[:, -1:]
    if not bool(total.isfinite().all()):
        raise ValueError("got probabilities that are not finite: see whether the prior's training diverged")
    below = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, below, right=True)[:, 0]


def _uniform(num: int, columns: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    source = generator.device if generator is not None else device
    return torch.rand(num, columns, dtype=torch.float64, device=source, generator=generator).to(device)
