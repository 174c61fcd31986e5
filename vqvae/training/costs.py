"""How long a run takes, by what its steps cost; and `--time-budget`, which sets how many steps there are by it.

With c1, c2 seconds a step of the codebook and of the prior, e seconds for all else that is still to come (encoding the
training images, the evaluation), and n1, n2 the steps that the options ask for, a budget of B seconds takes

    k = (B - e) / (n1 c1 + n2 c2),    floor(k n1) and floor(k n2) steps

so that the stages keep their proportions. The costs are measured before the first step, on weights that are thrown away
(`vqvae.training.rehearsal`): every step that counts is one of a run of the settled length, whose learning rates,
discriminator and prior in the loop follow that length from the beginning. What was settled is the run's `num_steps`
from then on; it is in its state/run.json, and a run that is resumed is not settled again.
"""

import dataclasses
import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from vqvae.training.options import FitConfig, Run
from vqvae.training.progress import duration

# A shorter run has no use for as long a warm-up as a longer one.
WARM_UP = 0.1
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
# A year.
_MOST = 366 * 24 * 3600.0
_TIME = re.compile(r"(\d+(?:\.\d+)?)([smh])")


def seconds_of(text: str) -> float:
    """The seconds of a time such as 90s, 20m, 1.5h or 1h30m. ValueError for anything else, and for no time at all."""
    plain = text.strip().lower()
    parts = _TIME.findall(plain)
    total = math.fsum(float(number) * _UNITS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != plain or not 0 < total <= _MOST:
        raise ValueError(f"got --time-budget {text!r:.80}, expected a time such as 90s, 20m or 1.5h, of a year at most")
    return total


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What the stages of a run cost, in seconds; 0 for what it does not do.

    Attributes:
        codebook, prior: a step, with its share of validations.
        encoding: of the images that a prior is trained on, all of them.
        evaluation: of all test images.
    """

    codebook: float = 0.0
    prior: float = 0.0
    encoding: float = 0.0
    evaluation: float = 0.0

    @property
    def fixed(self) -> float:
        """What does not depend on the number of steps."""
        return self.encoding + self.evaluation


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What a run has before it.

    Attributes:
        wanted: its stages.
        costs: what they cost; None where that was not measured.
    """

    run: Run | None = None
    wanted: Collection[str] = ()
    costs: Costs | None = None

    def told(self, stage: str, seconds: float) -> str:
        """A line on how long the whole takes, when a stage has so many seconds to go."""
        parts = {stage: seconds}
        later = [each for each in ("prior", "evaluate") if each in self.wanted and each != stage]
        if later and (self.costs is None or self.run is None):
            return f"about {duration(seconds)} to go for the {stage}, and then what comes after it"
        if self.costs is not None and self.run is not None:
            if "prior" in later:
                parts |= {"encoding": self.costs.encoding, "prior": self.run.prior_fit.num_steps * self.costs.prior}
            if "evaluate" in later:
                parts |= {"evaluation": self.costs.evaluation}
        of = ", ".join(f"{name} {duration(each)}" for name, each in parts.items())
        return f"about {duration(sum(parts.values()))} to go: {of}"


def settled(run: Run, wanted: Collection[str], costs: Costs, left: float) -> Run:
    """The run with as many steps as fit.

    Args:
        wanted: its stages.
        left: seconds that are left of the budget.

    Raises:
        ValueError: not one step of each stage fits.
    """
    stages = {"codebook": run.codebook_fit, "prior": run.prior_fit}
    asked = {name: fit for name, fit in stages.items() if name in wanted}
    steps = sum(fit.num_steps * getattr(costs, name) for name, fit in asked.items())
    share = (left - costs.fixed) / steps
    found = {name: math.floor(share * fit.num_steps) for name, fit in asked.items()}
    if min(found.values()) < 1:
        least = max(math.ceil(1 / fit.num_steps * steps) for fit in asked.values()) + costs.fixed
        raise ValueError(
            f"--time-budget {run.time_budget} is too short: {duration(left)} of it are left after loading and "
            f"timing, and what is to be done beside training takes {duration(costs.fixed)}, with one step of each "
            f"stage {duration(least)}; expected more"
        )
    fits: dict[str, Any] = {f"{name}_fit": _of_length(asked[name], number) for name, number in found.items()}
    return dataclasses.replace(run, **fits)


def _of_length(options: FitConfig, num_steps: int) -> FitConfig:
    warm = min(options.num_warmup, math.ceil(WARM_UP * num_steps))
    return dataclasses.replace(options, num_steps=num_steps, num_warmup=warm)


def told(run: Run, wanted: Collection[str], costs: Costs) -> str:
    """A line on what was settled."""
    parts = [
        f"{fit.num_steps:,} steps of the {name} at {cost * 1000:.3g} ms"
        for name, fit, cost in (
            ("codebook", run.codebook_fit, costs.codebook),
            ("prior", run.prior_fit, costs.prior),
        )
        if name in wanted
    ]
    beside = f", and {duration(costs.fixed)} for encoding and evaluation" if costs.fixed else ""
    return f"time budget {run.time_budget}: {' and '.join(parts)}{beside}"
