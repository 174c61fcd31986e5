"""How far something has come: a bar at a terminal, and anywhere else a line every so often.

    codebook: step 1 of 3,200; objective 5.29 distortion 5.2
    codebook: step 1,180 of 3,200, 1,264 img/s, 51 s left; objective 3.2 distortion 3.15
    encode train: 63,000 of 200,000 img, 2,100 img/s, 1 min 5 s left

Rates are means over the steps of this session after its first, with the validations among them.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Mapping

from tqdm import tqdm

# Between two lines, where nobody sits at a terminal.
SECONDS = 30.0
# Steps and seconds after which it is known how long the others take.
FIRST_STEPS = 5
FIRST_SECONDS = 5.0


def duration(seconds: float) -> str:
    """A time as people say it: 8 s, 5 min 20 s, 2 h 5 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        minutes, rest = divmod(whole, 60)
        return f"{minutes} min {rest} s" if rest and minutes < 10 else f"{round(whole / 60)} min"
    hours, minutes = divmod(round(whole / 60), 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def say(text: str) -> None:
    """A line on stderr, clear of a bar."""
    tqdm.write(text, file=sys.stderr)
    with contextlib.suppress(OSError):
        sys.stderr.flush()


class Progress:
    """A bar, or lines. To be used in a `with`.

    Args:
        name: what is under way.
        total: how many things in all, such as images.
        unit: what a thing is called.
        start: how many were done before.
        each: things a step, for what goes in steps; its first step has a line of its own.
        shown: False shows nothing, as on other processes than the first.
        outlook: is told once, after the first steps, how many seconds the rest takes; what it gives is said.
    """

    def __init__(
        self,
        name: str,
        total: int,
        unit: str,
        *,
        start: int = 0,
        each: int | None = None,
        shown: bool = True,
        outlook: Callable[[float], str] | None = None,
    ):
        self.name, self.total, self.unit, self.each, self.done = name, total, unit, each, start
        self.outlook = outlook if shown else None
        self.text = ""
        self.bar = tqdm(
            total=total, initial=start, desc=name, unit=unit, unit_scale=True, disable=None if shown else True
        )
        self.has_lines = shown and bool(self.bar.disable)
        self.spoke = time.monotonic()
        # When the first step was done, which takes longer than others, and how many things were then.
        self.first: tuple[float, int] | None = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def update(self, num: int = 1, figures: Mapping[str, float] | None = None) -> None:
        """So many more things are done.

        Args:
            figures: to show; those of the last time unless given. What has a slash in its name is not shown.
        """
        self.done += num
        now = time.monotonic()
        if figures is not None:
            self.text = " ".join(f"{name} {value:.3g}" for name, value in figures.items() if "/" not in name)
            self.bar.set_postfix_str(self.text, refresh=False)
        self.bar.update(num)
        if self.first is None:
            self.first = (now, self.done)
            if self.has_lines and self.each is not None:
                self._line(now)
            return
        if self.has_lines and now - self.spoke >= SECONDS:
            self._line(now)
        began, before = self.first
        is_measured = now - began >= FIRST_SECONDS and self.done - before >= FIRST_STEPS * (self.each or 1)
        if self.outlook is not None and is_measured:
            told = self.outlook((self.total - self.done) / self._rate(now))
            self.outlook = None
            say(told)

    def _rate(self, now: float) -> float:
        """Things a second."""
        began, before = self.first or (now, self.done)
        return (self.done - before) / max(now - began, 1e-9)

    def _line(self, now: float) -> None:
        self.spoke = now
        at, of, unit = self.done, self.total, f" {self.unit}"
        if self.each is not None:
            at, of, unit = at // self.each, of // self.each, ""
        parts = [f"{self.name}: {'' if self.each is None else 'step '}{at:,} of {of:,}{unit}"]
        if rate := self._rate(now):
            shown = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
            parts += [f"{shown} {self.unit}/s", f"{duration((self.total - self.done) / rate)} left"]
        say(", ".join(parts) + (f"; {self.text}" if self.text else ""))
