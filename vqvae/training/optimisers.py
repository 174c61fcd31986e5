"""AdamW, and beside it Muon for the matrices of a transformer, as one optimiser.

Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks") makes the momentum of a matrix
orthogonal before it steps, so that all directions of the matrix learn alike. It is for matrices between hidden vectors;
embeddings, logits, start tokens and all vectors stay with AdamW (Loshchilov & Hutter 2019). Both are torch's own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from priors.trunk import Trunk


class MuonAndAdamW(torch.optim.Optimizer):
    """Two optimisers that share what a checkpoint holds: the groups of parameters, Muon's first, and their state.

    Args:
        matrices: for Muon, at `muon_rate`.
        rest: for AdamW, by `adamw`, its options.
    """

    def __init__(self, matrices: Sequence[Tensor], rest: Sequence[Tensor], muon_rate: float, adamw: dict[str, Any]):
        self.muon = torch.optim.Muon(matrices, lr=muon_rate, weight_decay=adamw["weight_decay"])
        self.adamw = torch.optim.AdamW(rest, **adamw)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let both work on what this one holds, which loading replaces."""
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self.muon.state = self.adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self._share()
        loss = self.muon.step(closure)
        self.adamw.step()
        return loss


def matrices_of(module: nn.Module) -> list[nn.Parameter]:
    """The matrices between hidden vectors of all transformers in a module."""
    trunks = (part for part in module.modules() if isinstance(part, Trunk))
    return [weight for trunk in trunks for weight in trunk.parameters() if weight.ndim == 2]


def make_optimiser(
    module: nn.Module, *, learning_rate: float, weight_decay: float, muon: float | None, fused: bool
) -> tuple[torch.optim.Optimizer, list[float]]:
    """The optimiser of a module's parameters, and the learning rate of each of its groups.

    Args:
        muon: the rate of the matrices; None leaves them to AdamW.
        fused: one kernel for AdamW's step, where torch has one.
    """
    adamw = {"lr": learning_rate, "betas": (0.9, 0.95), "weight_decay": weight_decay, "fused": fused or None}
    if muon is None:
        return torch.optim.AdamW(module.parameters(), **adamw), [learning_rate]
    matrices = matrices_of(module)
    chosen = {id(weight) for weight in matrices}
    rest = [weight for weight in module.parameters() if id(weight) not in chosen]
    return MuonAndAdamW(matrices, rest, muon, adamw), [muon, learning_rate]


def can_fuse(device: torch.device, precision: str) -> bool:
    """Whether AdamW's step may be one kernel: not where gradients are scaled, as they are clipped by then."""
    return device.type in ("cpu", "cuda") and precision != "16-mixed"
