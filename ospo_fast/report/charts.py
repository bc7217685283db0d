"""Line charts and histograms as inline SVG; colours are CSS classes, so that light and dark schemes apply."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Place = Callable[[float, float], tuple[float, float]]

WIDTH, HEIGHT = 320, 168
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 24


def short(value: float) -> str:
    """A number in at most three significant digits: 0.42, 12.5, 1,234, 2e-05."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e6:
        return f"{value:.2g}"
    return f"{value:,.0f}" if size >= 100 else f"{value:.3g}"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that lie in [low, high], about `count` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def thin(points: Sequence[tuple[float, float]], limit: int = 480) -> list[tuple[float, float]]:
    """At most `limit` points: means of neighbours in groups of equal size."""
    size = math.ceil(len(points) / limit) if points else 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred moving mean; at both ends the window is cut, not padded."""
    half = window // 2
    means = []
    for index in range(len(values)):
        part = values[max(0, index - half) : index + half + 1]
        means.append(sum(part) / len(part))
    return means


def line_chart(
    points: Sequence[tuple[float, float]],
    *,
    label: str,
    errors: Sequence[float | None] | None = None,
    markers: bool = False,
    noisy: bool = True,
    bounds: tuple[float | None, float | None] = (None, None),
) -> Markup:
    """One series over training steps, as an <svg> element.

    points (step, value), finite, by ascending step; errors: half-length of the error bar of each point; bounds: limits
    that the value axis never passes (an accuracy has none above 1). More than 30 points of a noisy series without
    markers are drawn pale, with their moving mean over them.
    """
    if not markers:
        points, errors = thin(points), None
    xs, ys = [x for x, _ in points], [y for _, y in points]
    spread = [error or 0.0 for error in errors] if errors else [0.0] * len(ys)
    low, high = _range(
        [y - e for y, e in zip(ys, spread, strict=True)], [y + e for y, e in zip(ys, spread, strict=True)], bounds
    )
    first, last = min(xs), max(xs)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first) if last > first else 0.5
        up = (min(max(y, low), high) - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [_axes(low, high, first, last, at)]
    places = [at(x, y) for x, y in points]
    if markers:
        parts.append(_path(places, "line"))
        for (x, y), (_, value), error in zip(places, points, spread, strict=True):
            if error:
                parts.append(
                    f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{at(first, value - error)[1]:.1f}" '
                    f'y2="{at(first, value + error)[1]:.1f}"/>'
                )
            parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>')
    elif noisy and len(points) > 30:
        mean = smooth(ys, max(3, len(ys) // 20) | 1)
        parts += [_path(places, "line pale"), _path([at(x, y) for x, y in zip(xs, mean, strict=True)], "line")]
    else:
        parts.append(_path(places, "line"))
    parts.append('<g class="cursor" hidden><line/><circle r="3.4"/></g>')
    return _svg(parts, label, f' data-points="{_readings(points, places)}"')


def histogram(values: Sequence[float], *, label: str, bins: int = 20) -> Markup:
    """How often values in [0, 1] fall into each of `bins` equal parts, as an <svg> element."""
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, max(0, int(value * bins)))] += 1
    top = max(counts) or 1
    wide, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    parts = [_axes(0, top, 0, 1, lambda x, y: (LEFT + x * wide, HEIGHT - BOTTOM - y / top * tall), whole=True)]
    for index, count in enumerate(counts):
        high = count / top * tall
        parts.append(
            f'<rect class="block" x="{LEFT + index * wide / bins + 0.75:.2f}" y="{HEIGHT - BOTTOM - high:.2f}" '
            f'width="{wide / bins - 1.5:.2f}" height="{high:.2f}" rx="1"/>'
        )
    return _svg(parts, label, "")


def _readings(points: Sequence[tuple[float, float]], places: Sequence[tuple[float, float]]) -> str:
    return ";".join(
        f"{x:.1f} {y:.1f} {step:.6g} {value:.4g}" for (x, y), (step, value) in zip(places, points, strict=True)
    )


def _range(
    lows: Sequence[float], highs: Sequence[float], bounds: tuple[float | None, float | None]
) -> tuple[float, float]:
    low, high = min(lows), max(highs)
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - pad, high + pad
    if bounds[0] is not None:
        low = max(low, bounds[0])
    if bounds[1] is not None:
        high = min(high, bounds[1])
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _axes(low: float, high: float, first: float, last: float, at: Place, *, whole: bool = False) -> str:
    parts = []
    for value in ticks(low, high, 3 if whole else 5):
        if whole and value != int(value):
            continue
        y = at(first, value)[1]
        parts.append(
            f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{short(value)}</text>'
        )
    for value in ticks(first, last, 4):
        x = at(value, low)[0]
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{short(value)}</text>')
    return "".join(parts)


def _path(places: Sequence[tuple[float, float]], name: str) -> str:
    return f'<path class="{name}" d="M{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>'


def _svg(parts: Sequence[str], label: str, attributes: str) -> Markup:
    return Markup(  # every part is made here from numbers; the label is escaped
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}"{attributes}>'
        f"{''.join(parts)}</svg>"
    )
