"""An objective as Fabric trains it: optimiser, moving average, and the weights that are kept."""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from vqvae.training.objectives import CodebookObjective, DraftObjective, PriorObjective, RateAwareObjective
from vqvae.training.optimisers import can_fuse, make_optimiser
from vqvae.training.options import FitConfig
from vqvae.training.sharding import ShardedAverage, decay_at, gather_full

Objective = CodebookObjective | RateAwareObjective | PriorObjective | DraftObjective


class Average(AveragedModel):
    """A moving average of a module's parameters, of which the first is a copy; buffers are those of the last step.

    It differs from torch's in where it counts: the count stays on the CPU, where it is read, so that a step on a GPU
    does not wait for it.

    Attributes:
        warms_up: whether the first updates have less decay.
    """

    def __init__(self, module: nn.Module, decay: float):
        super().__init__(module)
        self.decay, self.warms_up = decay, True

    def place(self, device: torch.device) -> None:
        """Move there what is averaged."""
        self.module.to(device)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        number = int(self.n_averaged)
        share = 1 - decay_at(number, self.decay, self.warms_up) if number else 1.0
        averages: list[Tensor] = list(self.module.parameters())
        # Weights may be of half precision (--precision bf16-true), in which an average would stand still.
        values = [value.to(kept.dtype) for kept, value in zip(averages, model.parameters(), strict=True)]
        torch._foreach_lerp_(averages, values, share)
        for kept, last in zip(self.module.buffers(), model.buffers(), strict=True):
            kept.copy_(last)
        self.n_averaged += 1


class Learner:
    """What one fit trains, on one device or many.

    Attributes:
        module: the objective to call, wrapped by Fabric.
        optimizer: over its parameters (`vqvae.training.optimisers`).
        rates: the learning rate of each of its groups, where it is whole.
        state: what a checkpoint holds of them.
    """

    def __init__(self, fabric: Fabric, objective: Objective, options: FitConfig):
        self.fabric = fabric
        self.objective = objective
        self.options = options
        # Modules that are shared out cannot be copied, so their copy comes before.
        self.copy = copy.deepcopy(objective) if isinstance(fabric.strategy, ModelParallelStrategy) else None
        self.average: Average | ShardedAverage | None = None
        self._warms_up = True
        if options.ema is not None and self.copy is None:
            self.average = Average(objective, options.ema)
        self.module: Any
        self.optimizer: Any
        if self.copy is None:
            fused = can_fuse(fabric.device, str(fabric.strategy.precision.precision))
            self.module, self.optimizer = fabric.setup(objective, self._optimiser(options, fused))
        else:  # the optimiser is for the parameters that sharing out leaves
            self.module = fabric.setup_module(objective)
            self.optimizer = fabric.setup_optimizers(self._optimiser(options, fused=False))
            if options.ema is not None:
                self.average = ShardedAverage(objective, options.ema)
        self.state: dict[str, Any] = {"module": self.module, "optimizer": self.optimizer}
        self.rival: Any = None
        if objective.rival is not None:
            self.rival_rate = objective.rival.options.learning_rate
            rival_optimizer = torch.optim.AdamW(objective.rival.parameters(), lr=self.rival_rate, betas=(0.5, 0.9))
            self.rival, self.rival_optimizer = fabric.setup(objective.rival, rival_optimizer)
            self.state |= {"rival": self.rival, "rival_optimizer": self.rival_optimizer}
        if isinstance(self.average, Average):
            self.average.place(fabric.device)
        if self.average is not None:
            self.state["average"] = self.average

    def _optimiser(self, options: FitConfig, fused: bool) -> torch.optim.Optimizer:
        found, self.rates = make_optimiser(
            self.objective,
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
            muon=options.muon,
            fused=fused,
        )
        return found

    @property
    def warms_up(self) -> bool:
        """Whether the moving average has less decay in its first updates; not in runs that began before that was so."""
        return self._warms_up

    @warms_up.setter
    def warms_up(self, value: bool) -> None:
        self._warms_up = value
        if self.average is not None:
            self.average.warms_up = value

    def clip(self, max_norm: float) -> Tensor:
        """Clip the gradients; the norm that they had."""
        norm = self.fabric.clip_gradients(self.module, self.optimizer, max_norm=max_norm, error_if_nonfinite=False)
        assert norm is not None
        return gather_full(norm)

    def set_rate(self, share: float) -> None:
        """Take so large a share of the learning rates."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share
        if self.rival is not None:
            for group in self.rival_optimizer.param_groups:
                group["lr"] = self.rival_rate * share

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.objective.update()
        if self.average is not None:
            self.average.update_parameters(self.objective)

    def accumulating(self, more: bool) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward of a batch after which `more` follow in the step: processes wait for the last."""
        return self._apart(self.module, more)

    def _apart(self, module: Any, more: bool) -> contextlib.AbstractContextManager[None]:
        # Not `enabled=more`: after a block that is not enabled Fabric leaves sharded weights without synchronisation.
        return self.fabric.no_backward_sync(module) if more else contextlib.nullcontext()

    def step_rival(self) -> dict[str, Tensor]:
        """A step of the discriminator, where there is one and the step showed it something; what it thought of that."""
        rival = self.objective.rival
        if rival is None or not rival.seen:
            return {}
        seen = list(rival.seen)
        rival.seen.clear()
        found = []
        for number, (real, fake) in enumerate(seen, 1):
            with self._apart(self.rival, number < len(seen)):
                out = self.rival(real, fake)
                self.fabric.backward(out["objective"] / len(seen))
            found.append({name: value.detach() for name, value in out.items()})
        out = mean_terms(found)
        norm = self.fabric.clip_gradients(
            self.rival, self.rival_optimizer, max_norm=self.options.max_norm, error_if_nonfinite=False
        )
        if norm is None or not torch.isfinite(out["objective"] + norm):
            raise ValueError(f"the discriminator diverged, at --looks.learning-rate {self.rival_rate:g}")
        self.rival_optimizer.step()
        self.rival_optimizer.zero_grad()
        means = self.fabric.all_reduce(torch.stack([out["real"], out["fake"]]), reduce_op="mean")
        assert isinstance(means, Tensor)
        rival.update(means)
        if self.fabric.is_global_zero:
            rival.tell()
        figures = {"objective": out["objective"], "real": means[0], "fake": means[1], "gradient": norm}
        return {f"discriminator/{name}": each.detach() for name, each in figures.items()}

    def ema_weights(self) -> Any:
        """The objective with the weights that are kept, in full; all processes take part."""
        if self.copy is None:
            return self.average.module if isinstance(self.average, Average) else self.objective
        values = self.objective.state_dict()
        if isinstance(self.average, ShardedAverage):
            values |= self.average.parts
        self.copy.load_state_dict({name: gather_full(value) for name, value in values.items()})
        return self.copy.to(self.fabric.device)

    @staticmethod
    def finished(objective: Objective, held: Mapping[str, Any]) -> Any:
        """The objective with the weights that a checkpoint of the last step keeps, in the type that they have there."""
        weights = kept_weights(held)
        floating = next((each.dtype for each in weights.values() if each.is_floating_point()), torch.float32)
        objective.to(floating).load_state_dict(weights)
        return objective

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[Any]:
        """`kept` to look at: in evaluation mode, without gradients, as precise as training is."""
        kept = self.ema_weights()
        kept.eval()
        with torch.no_grad(), self.fabric.autocast():
            yield kept
        kept.train()
        if self.copy is not None:
            self.copy.cpu()


def kept_weights(held: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of an objective, by name, that a checkpoint keeps: of the moving average where there is one."""
    weights: dict[str, Tensor] = dict(held["module"])
    average = held.get("average", {})
    if "parts" in average:  # a `ShardedAverage`
        return weights | average["parts"]
    prefix = "module."
    averaged = {name.removeprefix(prefix): each for name, each in average.items() if name.startswith(prefix)}
    return averaged or weights


def mean_terms(found: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Terms of a step, of those of its batches, which have the same names."""
    if len(found) == 1:
        return dict(found[0])
    return {name: torch.stack([each[name] for each in found]).mean(0) for name in found[0]}
