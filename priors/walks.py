"""What a walk over grids of codes is told, and which grids of many it takes."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from jaxtyping import Float, Int
from torch import Tensor

from priors.precision import Arithmetic

# Takes the codes fixed since the last call, "b n" (at the first call those known before, perhaps n = 0),
# and gives the log-probabilities of the next positions, "b m k", which are all fixed before the next call.
Step = Callable[[Int[Tensor, "b n"]], Float[Tensor, "b m k"]]


@dataclass(frozen=True)
class WalkOrder:
    """Which codes a walk fixes, and in which order.

    Attributes:
        known: int64 "b n", flattened; what is kept where `kept` says so. One row stands for any number of grids.
        kept: bool "b n": positions that hold their known code.
        num_before: positions at the start of the order that are known in every grid; no conditional of theirs is
            offered.
        order: int64 "b n", positions in the order in which they are taken; None is raster order.
        sizes: how many positions each step fixes after those; None leaves it to the model.
    """

    known: Tensor
    kept: Tensor
    num_before: int
    order: Tensor | None = None
    sizes: tuple[int, ...] | None = None


@dataclass(frozen=True)
class WalkStart:
    """What a walk begins with: rows, their labels, their order, and how to compute.

    Attributes:
        num: rows b; with guidance two for each grid.
        labels: int64 "b", `num_classes` for "no label"; None for a prior without classes.
        order, sizes: as in `WalkOrder`, for these rows.
        skipped: positions in raster order that are taken as done and are not looked at, where a walk can do so: for
            trials of how long a step in the middle takes.
    """

    num: int
    labels: Tensor | None
    arithmetic: Arithmetic
    order: Tensor | None = None
    sizes: tuple[int, ...] | None = None
    skipped: int = 0


def taken(walk_order: WalkOrder, rows: Tensor) -> WalkOrder:
    """The order of some of the grids; one that is the same for all is so for them."""

    def some(each: Tensor) -> Tensor:
        return each.expand(len(rows), -1) if len(each) == 1 else each[rows]

    order = None if walk_order.order is None else some(walk_order.order)
    return replace(walk_order, known=some(walk_order.known), kept=some(walk_order.kept), order=order)
