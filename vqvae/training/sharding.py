"""Priors too large for one device: weights, gradients and moments shared out over processes (`--strategy fsdp`).

Rajbhandari et al. 2020, "ZeRO: memory optimizations toward training trillion parameter models", stage 3, by PyTorch's
`fully_shard`: each transformer block is gathered when its turn comes, and let go after it. Gradients are means over
processes, as without. A checkpoint is one file of full tensors, whatever the number of processes that wrote it.

To validate, and at the end, the full model is put together on each device, without gradients or moments.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from priors.trunk import Block


def shard(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Share out the parameters of a module over all processes, in place; it stays what it is."""
    everyone = init_device_mesh(mesh.device_type, (mesh.size(),))
    for part in list(module.modules()):
        if isinstance(part, Block):
            fully_shard(part, mesh=everyone)
    fully_shard(module, mesh=everyone)
    return module


def gather_full(tensor: Tensor) -> Tensor:
    """The full tensor of one that is shared out; all processes take part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def decay_at(num_updates: int, decay: float, warms_up: bool = True) -> float:
    """The decay of a moving average after so many updates, which at first is less: it forgets where it began.

    (1 + n) / (10 + n) until that is `decay`, as TensorFlow's ExponentialMovingAverage has it with num_updates.

    Args:
        warms_up: else it is `decay` from the beginning, as in runs of versions before.
    """
    return min(decay, (1 + num_updates) / (10 + num_updates)) if warms_up else decay


class ShardedAverage:
    """A moving average of parameters that are shared out, which it is too; the first update is a copy.

    What `torch.optim.swa_utils.AveragedModel` is to full ones, which copies modules; those here cannot be copied.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay, self.warms_up = decay, True
        self.num_updates = 0
        self.parts = {name: value.detach().clone() for name, value in module.named_parameters()}

    @torch.no_grad()
    def update_parameters(self, module: nn.Module) -> None:
        share = 1 - decay_at(self.num_updates, self.decay, self.warms_up) if self.num_updates else 1.0
        for name, value in module.named_parameters():
            self.parts[name].lerp_(value.detach(), share)
        self.num_updates += 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "num_updates": self.num_updates,
            "parts": {name: gather_full(part).cpu() for name, part in self.parts.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_updates = state["num_updates"]
        for name, part in self.parts.items():
            assert isinstance(part, DTensor)
            found = state["parts"][name].to(part.device)
            part.copy_(distribute_tensor(found, part.device_mesh, part.placements))
