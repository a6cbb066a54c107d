"""Quality against steps, drawn by Pillow: lines through the medians, bars from least to most, horizontal lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#bcbd22", "#444444")
FINE = 3  # it is drawn this much larger and then reduced, for smooth lines
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, LEGEND = 860, 480, 70, 40, 50, 260
GREY = "#888888"


def plot(
    title: str,
    steps: Sequence[int],
    lines: Mapping[str, Sequence[Mapping[str, float] | None]],
    levels: Mapping[str, float],
) -> Image.Image:
    """Draw the plot; the vertical axis is logarithmic if all values are positive.

    lines: for each label a spread (median, least, most) or None at each of the steps. levels: horizontal lines.
    """
    values = [one[key] for line in lines.values() for one in line if one for key in ("least", "most")] + list(
        levels.values()
    )
    page = _Page(len(steps), values or [1.0])
    page.axes(title, steps)
    for i, (label, level) in enumerate(levels.items()):
        page.level(level, label, len(lines) + i)
    for i, (label, line) in enumerate(lines.items()):
        page.line(line, label, i, len(lines))
    return page.picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


class _Page:
    """A picture with axes: x is the index of a number of steps, y the value."""

    def __init__(self, places: int, values: Sequence[float]):
        self.picture = Image.new("RGB", (WIDTH * FINE, HEIGHT * FINE), "white")
        self.draw = ImageDraw.Draw(self.picture)
        self.font = ImageFont.load_default(13 * FINE)
        self.places, self.log = places, min(values) > 0
        low, high = self._scale(min(values)), self._scale(max(values))
        margin = (high - low) * 0.06 or 0.5
        self.low, self.high = low - margin, high + margin

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def x(self, place: float) -> float:
        return LEFT + (WIDTH - LEFT - LEGEND) * (place + 0.5) / self.places

    def y(self, value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (self.high - self._scale(value)) / (self.high - self.low)

    def text(self, x: float, y: float, text: str, anchor: str = "lm", fill: str = "black") -> None:
        self.draw.text((x * FINE, y * FINE), text, font=self.font, anchor=anchor, fill=fill)

    def stroke(self, points: Sequence[tuple[float, float]], fill: str, width: float = 1.5) -> None:
        self.draw.line([(x * FINE, y * FINE) for x, y in points], fill=fill, width=round(width * FINE), joint="curve")

    def axes(self, title: str, steps: Sequence[int]) -> None:
        right, foot = WIDTH - LEGEND, HEIGHT - BOTTOM
        self.stroke([(LEFT, TOP), (LEFT, foot), (right, foot)], GREY, 1)
        self.text(LEFT, TOP / 2, title)
        for place, k in enumerate(steps):
            self.text(self.x(place), foot + 16, str(k), "mm")
        self.text((LEFT + right) / 2, foot + 36, "steps", "mm")
        for value in ticks(self.low, self.high, self.log):
            self.stroke([(LEFT, self.y(value)), (right, self.y(value))], "#eeeeee", 1)
            self.text(LEFT - 6, self.y(value), f"{value:.3g}", "rm")

    def line(self, line: Sequence[Mapping[str, float] | None], label: str, number: int, count: int) -> None:
        colour = COLOURS[number % len(COLOURS)]
        aside = 0.3 * ((number + 0.5) / count - 0.5)  # so that bars do not hide one another
        points = [(self.x(place + aside), one) for place, one in enumerate(line) if one]
        self.stroke([(x, self.y(one["median"])) for x, one in points], colour)
        for x, one in points:
            self.stroke([(x, self.y(one["least"])), (x, self.y(one["most"]))], colour, 1)
            self.dot(x, self.y(one["median"]), colour, number)
        x, y = self.legend(label, number, colour)
        self.dot(x + 11, y, colour, number)

    def level(self, value: float, label: str, number: int) -> None:
        dash = 2 + 3 * (number % 2)
        for x in range(LEFT, WIDTH - LEGEND, 8):
            self.stroke([(x, self.y(value)), (x + dash, self.y(value))], GREY)
        self.legend(f"{label}: {value:.3g}", number, GREY, dash=dash)

    def dot(self, x: float, y: float, colour: str, number: int) -> None:
        """Draw a disc, or from the eleventh line on, when colours repeat, a square."""
        box = [(x - 3.5) * FINE, (y - 3.5) * FINE, (x + 3.5) * FINE, (y + 3.5) * FINE]
        (self.draw.ellipse if number < len(COLOURS) else self.draw.rectangle)(box, fill=colour)

    def legend(self, label: str, number: int, colour: str, dash: int = 8) -> tuple[float, float]:
        """Draw a row of the legend; returns the start of its stroke. dash: its length, of every eight."""
        left, y = WIDTH - LEGEND + 16, TOP + 6 + 19 * number
        for x in range(left, left + 24, 8):
            self.stroke([(x, y), (x + dash, y)], colour)
        self.text(left + 30, y, label)
        return left, y


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Round values on the scale: 1, 2, 5 times powers of ten if it is logarithmic, otherwise about six even ones."""
    if log:
        found = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
        return [value for value in found if low <= math.log10(value) <= high]
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step *= next((m for m in (1, 2, 5) if (high - low) / (m * step) <= 7), 10)
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step) + 1)]
