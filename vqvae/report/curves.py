"""The figures of a training as curves, from its metrics.csv."""

import csv
import math
from pathlib import Path
from typing import NamedTuple

from vqvae.report.charts import Series, lines
from vqvae.report.markup import Markup

Points = list[tuple[float, float]]
_COLUMNS = 5
_BIT = 1 / math.log(2)


class Curve(NamedTuple):
    """How a figure is shown.

    Attributes:
        title: what it is called.
        unit: of the vertical axis.
        factor: from what is written to that unit.
    """

    title: str
    unit: str
    factor: float = 1.0


# Those that come first; the rest is shown where it is asked for.
MAIN = {
    "distortion": Curve("Distortion", "bits/dim", _BIT),
    "rate": Curve("Rate", "bits/dim", _BIT),
    "psnr": Curve("PSNR", "dB"),
    "usage": Curve("Usage of codes", "share"),
    "perplexity": Curve("Perplexity of codes", "codes"),
}
OF_PRIOR = MAIN | {"rate": Curve("Rate", "bits a position", _BIT)}
# Told elsewhere.
LEFT_OUT = ("seconds",)


class Curves:
    """What metrics.csv has: by stage and name, the points of each split.

    Attributes:
        stages: in the order in which they began.
    """

    def __init__(self, found: dict[tuple[str, str], dict[str, Points]]):
        self._found = found
        self.stages = list(dict.fromkeys(stage for stage, _ in found))

    @classmethod
    def read(cls, folder: Path) -> "Curves":
        """Of a run; none where it has no metrics.csv. A line that is no figure is left out."""
        found: dict[tuple[str, str], dict[str, Points]] = {}
        path = folder / "metrics.csv"
        if path.is_file():
            with path.open(newline="", encoding="utf-8", errors="replace") as file:
                for row in csv.reader(file):
                    if len(row) != _COLUMNS:
                        continue
                    stage, step, split, name, value = row
                    try:
                        point = (float(int(step)), float(value))
                    except ValueError:
                        continue
                    found.setdefault((stage, name), {}).setdefault(split, []).append(point)
        return cls(found)

    def points(self, stage: str, name: str, split: str) -> Points:
        """Step and value, in the unit that is shown."""
        factor = shown_as(stage, name).factor
        return [(step, value * factor) for step, value in self._found.get((stage, name), {}).get(split, [])]

    def names(self, stage: str) -> tuple[list[str], list[str]]:
        """The figures of a stage: those that come first, and the rest."""
        known = [name for at, name in self._found if at == stage and name not in LEFT_OUT]
        return [name for name in MAIN if name in known], [name for name in known if name not in MAIN]

    def chart(self, stage: str, name: str) -> Markup:
        """A figure of a stage, on training and on test images."""
        curve = shown_as(stage, name)
        series = [
            Series("training images", self.points(stage, name, "train"), 5, True),
            Series("test images", self.points(stage, name, "test"), 0),
        ]
        return lines(f"{curve.title}, {stage}", series, "step", curve.unit)


def shown_as(stage: str, name: str) -> Curve:
    """How a figure of a stage is shown."""
    return (OF_PRIOR if stage == "prior" else MAIN).get(name, Curve(name, ""))
