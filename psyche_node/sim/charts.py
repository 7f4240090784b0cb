"""The report's charts as inline SVG, drawn by hand: no library, no request, colours from the page's style sheet.

A chart returns its markup and the data that the page's script needs to answer the pointer. Marks of one kind in one row
are a single path, so that 16 nodes over 400 rounds stay a page of a few hundred kilobytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup, escape

Point = tuple[float, float]

TOP = 20
"""Pixels above the first row of the members' charts, for the rounds' numbers."""

_SMALLEST = 0.8
"""Of the size that a chart of lines is drawn for: at this, its words of 11.5 pixels are still read."""

_LETTER = {"included": "i", "committed": "c", "trained": "t", "missed": "m", "void": "v"}


@dataclass(frozen=True, slots=True)
class Chart:
    """Markup, and the pointer's data: JSON-serialisable, no markup in it."""

    svg: Markup
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps ``[low, high]`` of the data to ``[start, end]`` in pixels, optionally by the logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self._map(self.low), self._map(self.high)
        share = (self._map(value) - low) / (high - low) if high > low else 0.5
        return round(self.start + share * (self.end - self.start), 2)

    def _map(self, value: float) -> float:
        return math.log10(max(value, 1e-12)) if self.log else value


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart: ``kind`` is its class in the style sheet, ``points`` are (x, y) in data units."""

    label: str
    kind: str
    points: Sequence[Point]
    marked: bool = False
    """Draw a dot at each point."""
    named: bool = True
    """Write the label at the line's end."""
    hover: bool = True
    """Show its value under the pointer."""


@dataclass(frozen=True, slots=True)
class Frame:
    """The plot area inside a view box of ``width`` x ``height`` pixels."""

    width: int
    height: int
    left: int = 52
    right: int = 128
    top: int = 18
    bottom: int = 34

    @property
    def x1(self) -> int:
        return self.width - self.right

    @property
    def y1(self) -> int:
        return self.height - self.bottom


@dataclass(slots=True)
class Canvas:
    """Collects SVG elements; every attribute and text is escaped here and nowhere else."""

    parts: list[Markup] = field(default_factory=list)

    def add(self, tag: str, text: str | None = None, **attributes: object) -> None:
        pairs = Markup(" ").join(
            Markup('{}="{}"').format(name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items()
        )
        body = Markup("") if text is None else escape(text)
        self.parts.append(Markup("<{} {}>{}</{}>").format(Markup(tag), pairs, body, Markup(tag)))

    def svg(self, box_width: float, box_height: float, label: str, **attributes: object) -> Markup:
        pairs = Markup("").join(
            Markup(' {}="{}"').format(name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items()
        )
        head = Markup('<svg viewBox="0 0 {:g} {:g}" role="img" aria-label="{}"{}>').format(
            box_width, box_height, label, pairs
        )
        return head + Markup("\n").join(self.parts) + Markup("</svg>")


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Return about ``count`` round numbers (1, 2, 2.5, 5 times a power of ten) inside ``[low, high]``."""
    if not high > low:
        return [low]
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.75), 10 * power)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 10) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def whole_ticks(high: int, count: int) -> list[int]:
    """Ticks for numbered rounds."""
    return sorted({round(tick) for tick in nice_ticks(0, high, count) if abs(tick - round(tick)) < 1e-6})


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move label positions apart to at least ``gap``, within ``[low, high]``, keeping their order."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed = [0.0] * len(wanted)
    floor = low
    for index in order:
        placed[index] = max(wanted[index], floor)
        floor = placed[index] + gap
    ceiling = high
    for index in reversed(order):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    return placed


def smooth(points: Sequence[Point], rounds: int) -> list[Point]:
    """Mean over a window of a fifteenth of the run, centred, so that the curve does not lag behind the points."""
    reach = max(1, rounds // 30)
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    result = []
    for index, (x, _) in enumerate(points):
        near = min(reach, index, len(points) - 1 - index)
        result.append((x, (sums[index + near + 1] - sums[index - near]) / (2 * near + 1)))
    return result


def polyline(points: Sequence[Point], x: Scale, y: Scale) -> str:
    return "M" + "L".join(f"{x(a):g} {y(b):g}" for a, b in points)


def _axes(
    canvas: Canvas,
    frame: Frame,
    x: Scale,
    y: Scale,
    y_ticks: Sequence[float],
    y_text: Callable[[float], str],
    rounds: int,
    x_label: str,
) -> None:
    for tick in y_ticks:
        canvas.add("line", class_="grid", x1=frame.left, x2=frame.x1, y1=y(tick), y2=y(tick))
        canvas.add("text", y_text(tick), class_="tick end", x=frame.left - 8, y=y(tick) + 4)
    canvas.add("line", class_="axis", x1=frame.left, x2=frame.x1, y1=frame.y1, y2=frame.y1)
    for number in whole_ticks(rounds, 8 if frame.width > 600 else 5):
        canvas.add("text", f"{number:,}", class_="tick mid", x=x(number), y=frame.y1 + 17)
    canvas.add("text", x_label, class_="tick end", x=frame.x1, y=frame.height - 2)


def line_chart(
    series: Sequence[Series],
    *,
    rounds: int,
    frame: Frame,
    name: str,
    label: str,
    y_text: Callable[[float], str],
    value_text: Callable[[float], str],
    log: bool = False,
    x_label: str = "round",
) -> Chart:
    """Draw lines over rounds, each named at its end, with a guide and the values under the pointer."""
    series = [one for one in series if one.points]
    values = [value for one in series for _, value in one.points]
    canvas = Canvas()
    x = Scale(0, max(rounds, 1), frame.left, frame.x1)
    if log:
        low, high = max(min(values), 1) / 2.5, max(values) * 1.6
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        y_ticks = [10.0**power for power in powers if low <= 10.0**power <= high]
    else:
        pad = (max(values) - min(values)) * 0.06 or 0.5
        low, high = max(0.0, min(values) - pad), max(values) + pad
        y_ticks = nice_ticks(low, high, 6)
    y = Scale(low, high, frame.y1, frame.top, log)
    _axes(canvas, frame, x, y, y_ticks, y_text, rounds, x_label)
    for one in series:
        canvas.add("path", class_=f"line {one.kind}", d=polyline(one.points, x, y))
        if one.marked and len(one.points) <= 80:
            for a, b in one.points:
                canvas.add("circle", class_=f"dot {one.kind}", cx=x(a), cy=y(b), r=2.6)
    named = [one for one in series if one.named]
    for one, place in zip(
        named, spread([y(s.points[-1][1]) for s in named], 31, frame.top + 4, frame.y1 - 18), strict=True
    ):
        canvas.add("text", one.label, class_=f"name {one.kind}", x=frame.x1 + 10, y=round(place, 1))
        canvas.add("text", value_text(one.points[-1][1]), class_="value", x=frame.x1 + 10, y=round(place + 14, 1))
    canvas.add("line", class_="guide", x1=0, x2=0, y1=frame.top, y2=frame.y1)
    data = {
        "kind": "line", "x0": frame.left, "x1": frame.x1, "rounds": max(rounds, 1), "unit": x_label,
        "series": [
            {"label": one.label, "kind": one.kind, "x": [a for a, _ in one.points],
             "text": [value_text(b) for _, b in one.points]}
            for one in series if one.hover
        ],
    }  # fmt: skip
    # Narrower, its words would be too small: the page scrolls it then.
    least = f"min-width: {round(frame.width * _SMALLEST)}px"
    return Chart(canvas.svg(frame.width, frame.height, label, data_chart=name, class_="chart", style=least), data)


def _strokes(spans: Sequence[tuple[float, float]], y: float) -> str:
    """One path of horizontal strokes, (start, end) in pixels: half the bytes of boxes."""
    return "".join(f"M{a:.1f} {y:g}H{b:.1f}" for a, b in spans)


def _runs(states: dict[int, str], wanted: str) -> list[tuple[int, int]]:
    """Return the half-open ranges of consecutive rounds in ``wanted`` state."""
    runs: list[tuple[int, int]] = []
    for number in sorted(states):
        if states[number] != wanted:
            continue
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs


@dataclass(frozen=True, slots=True)
class Row:
    """One member's row of the grid and of the lanes."""

    name: str
    states: dict[int, str]
    """State per round; a round without an entry: the member was not active."""
    training: Sequence[tuple[float, float]]
    """(start, end) in seconds."""
    waiting: Sequence[tuple[float, float]]
    marks: Sequence[tuple[float, str]]
    """(second, state) per round: where the lane gets the mark of what became of the update."""
    ended: tuple[float, int] | None
    """(second, round) at which its process died; None if it lived to the end."""


def _letters(row: Row, rounds: int) -> str:
    """One letter per round, for the page's script; a dot where the member was not active."""
    return "".join(_LETTER.get(row.states.get(number, ""), ".") for number in range(rounds))


def state_grid(rows: Sequence[Row], *, rounds: int, width: int, row_height: int) -> Chart:
    """Draw the fate of every update: a row per member, a column per round."""
    canvas, gap = Canvas(), 3
    x = Scale(0, max(rounds, 1), 0, width)
    cell = width / max(rounds, 1)
    hair = 1.0 if cell > 5 else 0.0
    centred = cell > 16  # else the first number would begin outside
    bottom = TOP + len(rows) * row_height
    for tick in whole_ticks(rounds - 1, 12):
        canvas.add(
            "text",
            f"{tick:,}",
            class_="tick mid" if tick or centred else "tick start",
            x=x(tick) + (cell / 2 if tick or centred else 0),
            y=11,
        )
    for index, row in enumerate(rows):
        y, height = TOP + index * row_height, row_height - gap
        canvas.add("rect", class_="lane", x=0, y=y, width=width, height=height)
        for state in sorted(set(row.states.values())):
            runs = _runs(row.states, state)
            if hair:
                runs = [(number, number + 1) for first, last in runs for number in range(first, last)]
            spans = [(x(first), x(last) - hair) for first, last in runs]
            canvas.add("path", class_=f"cell s-{state}", stroke_width=height, d=_strokes(spans, y + height / 2))
        if row.ended is not None:
            _cross(canvas, min(x(row.ended[1]) + cell / 2, width - 7), y + height / 2)
    canvas.add("rect", class_="cursor", x=0, y=TOP - 2, width=round(max(cell - hair, 2), 2), height=bottom - TOP + 1)
    data = {"kind": "grid", "rounds": rounds, "width": width, "top": TOP, "row": row_height,
            "names": [row.name for row in rows], "states": [_letters(row, rounds) for row in rows]}  # fmt: skip
    return Chart(_stretched(canvas, width, bottom, "Fate of every update", "grid"), data)


def lanes(
    rows: Sequence[Row], bounds: Sequence[tuple[int, float, float, bool]], *, width: int, row_height: int
) -> Chart:
    """Draw each member's time: training, waiting and what became of each update.

    ``bounds`` are (round, start, end, void) in seconds. The drawing is as wide as its rounds need to be read; the page
    scrolls it.
    """
    canvas = Canvas()
    first, last = bounds[0][1], max(bounds[-1][2], bounds[0][1] + 0.001)
    durations = sorted(end - start for _, start, end, _ in bounds)
    median = max(durations[len(durations) // 2], 1e-3)
    wide = round(max(float(width), min(14.0 * (last - first) / median, 60_000.0)))
    x = Scale(first, last, 0, wide)
    bottom = TOP + len(rows) * row_height
    labelled = -100.0
    for number, start, end, void in bounds:
        if void:
            canvas.add("rect", class_="voided", x=x(start), y=TOP - 3, width=round(x(end) - x(start), 2),
                       height=bottom - TOP + 3)  # fmt: skip
        if x(start) - labelled >= 30:
            canvas.add("text", str(number), class_="tick start", x=x(start) + 2, y=11)
            labelled = x(start)
    starts = "".join(f"M{x(start):.1f} {TOP - 3}V{bottom}" for _, start, _, _ in bounds)
    canvas.add("path", class_="rounds", d=starts)
    for index, row in enumerate(rows):
        bar = row_height - 12
        y = TOP + index * row_height + 2 + bar / 2
        for spans, kind in ((row.waiting, "wait"), (row.training, "train")):
            drawn = [(x(a), max(x(b), x(a) + 0.6)) for a, b in spans if b > a]
            if drawn:
                canvas.add("path", class_=f"bar {kind}", stroke_width=bar, d=_strokes(drawn, y))
        for state in sorted({state for _, state in row.marks}):
            marks = [(x(at) - 2.5, x(at) + 2.5) for at, value in row.marks if value == state]
            canvas.add("path", class_=f"cell s-{state}", stroke_width=3, d=_strokes(marks, y + bar / 2 + 3.5))
        if row.ended is not None and first <= row.ended[0]:
            at = min(x(min(row.ended[0], last)), wide - 7)
            canvas.add("rect", class_="dead", x=at, y=y - bar / 2, width=round(wide - at, 2), height=bar)
            _cross(canvas, at, y)
    data = {"kind": "lanes", "first": first, "last": last, "width": wide, "top": TOP, "row": row_height,
            "rounds": [[number, round(start, 3), round(end, 3)] for number, start, end, _ in bounds]}  # fmt: skip
    return Chart(_stretched(canvas, wide, bottom, "Members' time", "lanes", scrolls=wide > width), data)


def _stretched(canvas: Canvas, width: float, height: float, label: str, name: str, *, scrolls: bool = False) -> Markup:
    """A drawing as wide as the page, whose rows keep their height: the names beside it stay in line."""
    size = {"width": f"{width:.0f}"} if scrolls else {}
    return canvas.svg(width, height, label, data_chart=name, class_=f"chart rowed{' wide' * scrolls}",
                      preserveAspectRatio="none", height=f"{height:.0f}", **size)  # fmt: skip


def _cross(canvas: Canvas, x: float, y: float) -> None:
    canvas.add("circle", class_="killed-disc", cx=round(x, 2), cy=round(y, 2), r=6.5)
    canvas.add("path", class_="killed", d=f"M{x - 2.6:g} {y - 2.6:g}l5.2 5.2m0 -5.2l-5.2 5.2")


def gauge(marks: Sequence[tuple[str, float]], *, width: int = 240, height: int = 10) -> Markup:
    """Draw values on one line from 0 to the largest: ``marks`` are (kind, value)."""
    canvas = Canvas()
    top = max((value for _, value in marks), default=1.0) or 1.0
    x = Scale(0, top, 2, width - 2)
    canvas.add("rect", class_="track", x=0, y=height / 2 - 2, width=width, height=4, rx=2)
    if marks:
        kind, value = marks[0]
        canvas.add("rect", class_=f"fill {kind}", x=0, y=height / 2 - 2, width=x(value), height=4, rx=2)
    for kind, value in marks[1:]:
        canvas.add("rect", class_=f"fill {kind}", x=round(x(value) - 1.5, 2), y=0, width=3, height=height, rx=1.5)
    if marks:
        canvas.add("circle", class_=f"fill {marks[0][0]}", cx=x(marks[0][1]), cy=height / 2, r=4.5)
    return canvas.svg(width, height, "scale", class_="gauge")
