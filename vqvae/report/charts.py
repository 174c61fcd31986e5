"""Charts as SVG inside the page: they take its font and its colours, by day and by night, and need no script.

Each is 360 by 220 units, so that on a narrow page one fills its width and letters stay as large as those around them.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from vqvae.report.markup import Markup, element, joined

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 24, 34
# Points that a curve is drawn with; a longer one is thinned.
MOST_POINTS = 240
# Colours that the page has for curves.
NUM_COLOURS = 6


class Series(NamedTuple):
    """A curve.

    Attributes:
        name: for the legend.
        points: x and y; those that are no finite number are left out.
        colour: which of the page's.
        faint: whether it stands behind the others.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    faint: bool = False


class _Frame:
    """Where numbers lie in a chart.

    Args:
        xs, ys: all that is to be seen.
        from_zero: whether the vertical axis begins at zero.
    """

    def __init__(self, xs: Iterable[float], ys: Iterable[float], *, from_zero: bool = False, fill: bool = True):
        self.x = _range(xs, pad=0.0 if fill else 0.04)
        low, high = _range(ys, pad=0.06)
        self.y = (0.0, high) if from_zero else (low, high)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The place of a point."""
        across, up = (_share(value, *ends) for value, ends in ((x, self.x), (y, self.y)))
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def axes(self, x_label: str, y_label: str) -> Markup:
        """Lines, numbers and names of both axes."""
        parts = []
        for value, text in _ticks(*self.y):
            _, y = self.at(self.x[0], value)
            parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=_number(y), y2=_number(y), class_="rule"))
            parts.append(element("text", text, x=LEFT - 6, y=_number(y + 3.5), text_anchor="end"))
        for value, text in _ticks(*self.x):
            x, _ = self.at(value, self.y[0])
            parts.append(element("text", text, x=_number(x), y=HEIGHT - BOTTOM + 14, text_anchor="middle"))
        parts.append(element("text", x_label, x=WIDTH - RIGHT, y=HEIGHT - 4, text_anchor="end"))
        parts.append(element("text", y_label, x=0, y=11))
        return joined(*parts)


def lines(title: str, series: Sequence[Series], x_label: str, y_label: str, *, is_training: bool = True) -> Markup:
    """Curves over each other.

    What a training does in its first steps may be far from all that follows, so the axis covers the last nine tenths of
    each curve, and what lies beyond is cut at the edge. What is no training is seen whole, and from zero on.
    """
    kept = [each._replace(points=_thinned(_finite(each.points))) for each in series]
    kept = [each for each in kept if each.points]
    if not kept:
        return Markup()
    late = [y for each in kept for _, y in each.points[len(each.points) // 10 if is_training else 0 :]]
    frame = _Frame((x for each in kept for x, _ in each.points), late, from_zero=not is_training)
    drawn = [
        element("path", d=_path(frame, each.points), class_=_style("curve", each))
        for each in kept
        if len(each.points) > 1
    ]
    single = [
        element("path", d=_dots(frame, each.points), class_=_style("dots", each))
        for each in kept
        if len(each.points) == 1
    ]
    return _figure(title, frame, drawn, x_label, y_label, kept if len(kept) > 1 else [], single)


def scatter(title: str, series: Sequence[Series], x_label: str, y_label: str) -> Markup:
    """A dot a point."""
    kept = [each._replace(points=_finite(each.points)) for each in series]
    kept = [each for each in kept if each.points]
    if not kept:
        return Markup()
    points = [point for each in kept for point in each.points]
    frame = _Frame((x for x, _ in points), (y for _, y in points), fill=False)
    drawn = [element("path", d=_dots(frame, each.points), class_=_style("dots", each)) for each in kept]
    return _figure(title, frame, [], x_label, y_label, kept if len(kept) > 1 else [], drawn)


def bars(title: str, edges: Sequence[float], heights: Sequence[float], x_label: str, y_label: str) -> Markup:
    """A bar between each two edges."""
    frame = _Frame(edges, heights, from_zero=True)
    drawn = []
    for start, end, height in zip(edges, edges[1:], heights, strict=False):
        (left, top), (right, bottom) = frame.at(start, height), frame.at(end, 0.0)
        size = {"width": _number(max(right - left - 1, 0.5)), "height": _number(bottom - top)}
        drawn.append(element("rect", x=_number(left), y=_number(top), **size, class_="bar c0"))
    return _figure(title, frame, drawn, x_label, y_label, [])


def histogram(title: str, values: Sequence[float], x_label: str, y_label: str, num_bins: int = 30) -> Markup:
    """How many values lie where."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return Markup()
    low, high = _range(known, pad=0.0)
    counts = [0.0] * num_bins
    for value in known:
        counts[min(num_bins - 1, int(_share(value, low, high) * num_bins))] += 1
    edges = [low + (high - low) * at / num_bins for at in range(num_bins + 1)]
    return bars(title, edges, counts, x_label, y_label)


def _figure(
    title: str,
    frame: _Frame,
    drawn: Sequence[Markup],
    x_label: str,
    y_label: str,
    named: Sequence[Series],
    over: Sequence[Markup] = (),
) -> Markup:
    """A chart with its title and its legend.

    Args:
        drawn: what is cut at the edges.
        named: what the legend has.
        over: what is not, such as dots, which would lose half of themselves there.
    """
    inside = element(
        "svg",
        *drawn,
        x=LEFT,
        y=TOP,
        width=WIDTH - LEFT - RIGHT,
        height=HEIGHT - TOP - BOTTOM,
        viewBox=f"{LEFT} {TOP} {WIDTH - LEFT - RIGHT} {HEIGHT - TOP - BOTTOM}",
    )
    picture = element(
        "svg",
        frame.axes(x_label, y_label),
        inside,
        *over,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=title,
    )
    legend = [element("span", element("i", class_=_style("chip", each)), each.name) for each in named]
    key = element("div", *legend, class_="legend") if legend else None
    return element("figure", element("figcaption", title), picture, key, class_="chart")


def _path(frame: _Frame, points: Sequence[tuple[float, float]]) -> str:
    placed = [frame.at(*point) for point in points]
    return "M" + "L".join(f"{_number(x)} {_number(y)}" for x, y in placed)


def _dots(frame: _Frame, points: Sequence[tuple[float, float]]) -> str:
    # Lines of no length with round ends: one path for all, which is a tenth of as many circles.
    return "".join(f"M{_number(x)} {_number(y)}h0" for x, y in (frame.at(*point) for point in points))


def _style(kind: str, series: Series) -> str:
    return f"{kind} c{series.colour % NUM_COLOURS}" + (" faint" if series.faint else "")


def _finite(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """No more than `MOST_POINTS`: the mean of each of as many stretches, and both ends."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil((len(points) - 2) / (MOST_POINTS - 2))
    stretches = [points[start : start + size] for start in range(1, len(points) - 1, size)]
    means = [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in stretches]
    return [points[0], *means, points[-1]]


def _range(values: Iterable[float], *, pad: float) -> tuple[float, float]:
    known = list(values)
    low, high = min(known), max(known)
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - max(abs(low) * 0.05, 1e-6), high + max(abs(high) * 0.05, 1e-6)
    room = (high - low) * pad
    return low - room, high + room


def _share(value: float, low: float, high: float) -> float:
    # An axis ends a little beyond the picture, so that a spike does not make numbers without end.
    return min(max((value - low) / (high - low), -2.0), 3.0)


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Round numbers on an axis, four or so, as they are written."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(each for each in (1, 2, 2.5, 5, 10) if each * power >= rough * 0.999)
    digits = -math.floor(math.log10(step) + 1e-9) + (1 if f"{step / power:.1f}" == "2.5" else 0)
    first = math.ceil(low / step - 1e-9)
    found = []
    for number in range(first, first + 9):
        value = number * step
        if value > high + 1e-9 * abs(high):
            break
        found.append((value, _short(value, max(0, digits))))
    return found


def _short(value: float, digits: int) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (abs(value) >= size and digits == 0 and value % (size / 10) == 0):
            return f"{value / size:g}{letter}"
    text = f"{value:.{min(digits, 6)}f}"
    return text.replace("-", "−") if float(text) else f"{0:.{min(digits, 6)}f}"


def _number(value: float) -> str:
    """A place in the picture, to a tenth of a unit."""
    text = f"{value:.1f}"
    return text.removesuffix(".0")
