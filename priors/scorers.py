"""Conditionals of several positions at once, in grids that stand at different positions: what speculation asks for.

A walk (`priors.walks`) goes forward, one step after the other, through all its grids alike. A scorer is asked for any
stretch of each grid that begins where all before it has been scored, also for one that it has scored already and whose
codes have changed since. A transformer keeps keys and values for it, and writes over what was wrong; a model of counts
reads the codes; any other prior scores the whole grid each time, which is right and slow.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

# Gives logits "b m k", ln P(z_i = . | before i) up to a constant for each position i, in nats, of: the codes, int64
# "b n" with n no less than the grid's, of which those before a position are read, also such as are scored in the same
# call; the first position of each row; and the positions, int64 "b m", from the row's first on, and the grid's last
# again in place of those behind it.
Scorer = Callable[[Tensor, Sequence[int], Tensor], Tensor]


def guided(scorer: Scorer, strengths: Tensor) -> Scorer:
    """A scorer of grids by one of two rows for each, the second without its label (classifier-free guidance)."""

    def score(codes: Tensor, begins: Sequence[int], at: Tensor) -> Tensor:
        given, free = scorer(codes.repeat(2, 1), [*begins, *begins], at.repeat(2, 1)).log_softmax(-1).chunk(2)
        return free + strengths[at][..., None] * (given - free)

    return score
