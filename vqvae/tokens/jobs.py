"""One job at a time writes a set, of however many ranks, which need not know each other.

    .lock                   held by rank 0
    .rank-R-of-W.lock       held by rank R of W

Rank R of one job meets rank R of another at their lock; those of jobs with other numbers of ranks look for each other.
"""

import contextlib
import re
from collections.abc import Iterator

import safefolder
from vqvae.tokens.layout import Plan
from vqvae.tokens.shards import check_folder, missing

# Who tries a lock has it for a moment.
_TRYING_SECONDS = 1.0
_LOCK = re.compile(r"\.(rank-\d+-of-(\d+))\.lock")


@contextlib.contextmanager
def one_job(plan: Plan, rank: int = 0, world_size: int = 1) -> Iterator[list[int]]:
    """The shards that this rank has to make, while no other job writes there.

    A set that is whole and lies where nothing can be written needs no lock, and gives none.

    Raises:
        ValueError: another job is at work; or as `missing`; or the place cannot be written to.
    """
    check_folder(plan, rank, world_size)
    unwritable = None
    with contextlib.ExitStack() as stack:
        try:
            _lock(stack, plan, rank, world_size)
        except ValueError as error:
            if isinstance(error.__cause__, TimeoutError):
                raise ValueError(
                    f"{plan.folder} is being written by another job; wait until that has ended, or name another folder"
                ) from error
            unwritable = error
        shards = missing(plan, rank, world_size)
        if shards and unwritable is not None:
            raise unwritable
        yield shards


def _lock(stack: contextlib.ExitStack, plan: Plan, rank: int, world_size: int) -> None:
    if rank == 0:
        stack.enter_context(safefolder.locks.one_writer(plan.folder, inside=True))
    stack.enter_context(safefolder.locks.one_writer(plan.folder / f"rank-{rank}-of-{world_size}"))
    # Only now: of two that look for each other, one at least finds the other.
    for name in sorted(path.name for path in plan.folder.glob(".rank-*.lock")):
        match = _LOCK.fullmatch(name)
        if match and int(match[2]) != world_size:
            # One that a killed job left is gone after this. Others may be trying it at this moment.
            with safefolder.locks.one_writer(plan.folder / match[1], wait=_TRYING_SECONDS):
                pass
