"""A step of a prior on a GPU, here a pretended one, queues its work and waits for none of it."""

import copy
from typing import Any

import pretended_cuda
import pytest
import torch
from device_worlds import CUDA, PRETENDED, there
from run_files import SMALL
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from priors import TransformerPrior
from vqvae.training.latents import on_device
from vqvae.training.learner import Average
from vqvae.training.objectives import PriorObjective
from vqvae.training.optimisers import make_optimiser
from vqvae.training.parsing import parse

_aten = torch.ops.aten
# What gives Python a number, or a tensor whose size depends on numbers.
_READS = {
    _aten._local_scalar_dense.default,
    _aten.equal.default,
    _aten.is_nonzero.default,
    _aten.masked_select.default,
    _aten.nonzero.default,
    _aten._unique2.default,
    _aten.unique_dim.default,
}


class Waits(TorchDispatchMode):
    """Lists the operators at which Python would wait for the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [each for each in tree_leaves((args, out)) if isinstance(each, Tensor)]
        on_gpu = {isinstance(each, pretended_cuda.OnCuda) for each in tensors}
        queued = kwargs.get("non_blocking") or (func is _aten.copy_.default and len(args) > 2 and args[2])
        crosses = func in (_aten.copy_.default, _aten._to_copy.default) and on_gpu == {True, False} and not queued
        if crosses or (func in _READS and True in on_gpu):
            self.found.append(str(func))
        return out


@pytest.mark.parametrize("muon", [None, 0.05])
def test_a_step_of_a_prior_waits_for_nothing(muon: float | None) -> None:
    run = parse([*SMALL, "--data.source", "."])
    torch.manual_seed(0)
    model = run.model.build()
    prior = TransformerPrior(num_codes=model.num_codes, grid=model.grid, width=16, depth=1, num_heads=2, num_classes=2)
    fresh = PriorObjective(prior).train()
    codes = torch.randint(model.num_codes, (8, *model.grid), dtype=torch.int32)
    labels = torch.randint(2, (8,))
    with there(PRETENDED):
        objective = copy.deepcopy(fresh).to(CUDA)
        average = Average(objective, 0.9)
        average.place(CUDA)
        optimizer, _ = make_optimiser(objective, learning_rate=1e-3, weight_decay=0.0, muon=muon, fused=False)
        for _ in range(2):  # the first makes what an optimiser keeps
            with Waits() as waits:
                terms = objective(on_device(codes, CUDA), on_device(labels, CUDA))
                terms["objective"].backward()
                torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                average.update_parameters(objective)
        assert not waits.found
        assert average.n_averaged.device.type == "cpu"


def test_what_waits_is_found() -> None:
    with there(PRETENDED), Waits() as waits:
        values = torch.ones(3).to(CUDA)
        assert values.sum().item() == 3
        assert bool((values > 0).all())
        values.cpu()
        on_device(torch.ones(3), CUDA)
    assert len(waits.found) == 4
