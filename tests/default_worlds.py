"""Worlds with another default device, and with another default type.

With "meta" as the default device, whatever is made without saying where is a tensor without numbers, which fails as
soon as it meets one that has them: as a tensor of the CPU does on a GPU. What is made without saying of which type
follows the default one. So the results under either must be those without, to the bit.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

DEFAULTS = (torch.device("meta"), torch.float64, torch.bfloat16)


@contextlib.contextmanager
def default(what: torch.device | torch.dtype) -> Iterator[None]:
    if isinstance(what, torch.device):
        with what:
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(what)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def check_same_under_any_default(run: Callable[[], list[Tensor]]) -> None:
    want = run()
    for what in DEFAULTS:
        with default(what):
            got = run()
        for index, (one, other) in enumerate(zip(got, want, strict=True)):
            assert one.device == other.device, (what, index)
            torch.testing.assert_close(
                one, other, rtol=0, atol=0, equal_nan=True, msg=lambda m, at=(what, index): f"{at}: {m}"
            )
