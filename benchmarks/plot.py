"""Curves of growth as a small SVG: both axes logarithmic, one panel per question."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Curves", "draw"]

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 420, 260, 64, 40, 40
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")


@dataclass(frozen=True, slots=True)
class Curves:
    """One panel. `lines`: ``dict[name, points]``, a point is (x, y), both above 0."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


def draw(panels: Sequence[Curves]) -> str:
    """The panels beside each other."""
    parts = [
        f'<g transform="translate({WIDTH * n},0)">{_panel(p)}</g>' for n, p in enumerate(panels)
    ]
    size = f'width="{WIDTH * len(panels)}" height="{HEIGHT}"'
    style = 'font-family="sans-serif" font-size="11"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )


def _panel(curves: Curves) -> str:
    points = [point for line in curves.lines.values() for point in line if min(point) > 0]
    left, right = _decades([x for x, _ in points])
    low, high = _decades([y for _, y in points])

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - left) / (right - left)
        up = (math.log10(y) - low) / (high - low)
        return (
            LEFT + across * (WIDTH - LEFT - 20),
            HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - TOP),
        )

    out = [_text(LEFT, 16, curves.title, "bold"), _text(LEFT, HEIGHT - 8, curves.x)]
    out.append(_text(4, TOP - 10, curves.y))
    for power in range(left, right + 1):
        x, _ = at(10.0**power, 10.0**low)
        out += [
            _line((x, TOP), (x, HEIGHT - BOTTOM)),
            _text(x - 8, HEIGHT - BOTTOM + 14, f"{10.0**power:g}"),
        ]
    for power in range(low, high + 1):
        _, y = at(10.0**left, 10.0**power)
        out += [_line((LEFT, y), (WIDTH - 20, y)), _text(4, y + 4, f"{10.0**power:g}")]
    for n, (name, line) in enumerate(curves.lines.items()):
        colour = COLOURS[n % len(COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*p) for p in line if min(p) > 0))
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out.append(_text(LEFT + 8, TOP + 14 + 14 * n, name, colour=colour))
    return "".join(out)


def _decades(values: Sequence[float]) -> tuple[int, int]:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)


def _line(start: tuple[float, float], end: tuple[float, float]) -> str:
    (x1, y1), (x2, y2) = start, end
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#ddd"/>'


def _text(x: float, y: float, text: str, weight: str = "normal", colour: str = "black") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-weight="{weight}" fill="{colour}">'
        f"{html.escape(text)}</text>"
    )
