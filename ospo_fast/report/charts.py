"""Line charts and histograms as inline SVG. Colors are CSS classes, so that light and dark schemes apply."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    ToPosition = Callable[[float, float], tuple[float, float]]  # value to position in the SVG

WIDTH, HEIGHT = 320, 168
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 24


def format_number(value: float) -> str:
    """Format a number with at most three significant digits: 0.42, 12.5, 1,234, 2e-05."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e6:
        return f"{value:.2g}"
    return f"{value:,.0f}" if size >= 100 else f"{value:.3g}"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return about `count` round numbers in [low, high], 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def thin(points: Sequence[tuple[float, float]], limit: int = 480) -> list[tuple[float, float]]:
    """Return at most `limit` points: the means of equal groups of neighbors."""
    size = math.ceil(len(points) / limit) if points else 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centered moving average. At both ends the window is cut, not padded."""
    half = window // 2
    windows = (values[max(0, index - half) : index + half + 1] for index in range(len(values)))
    return [sum(part) / len(part) for part in windows]


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

    Args:
        points: (step, value), finite, by ascending step.
        label: for screen readers.
        errors: half of the length of each point's error bar; only with markers.
        markers: show each of up to 480 points as a dot.
        noisy: show more than 30 points without markers as a pale line with its moving average.
        bounds: limits of the value axis, such as (0, 1) for an accuracy.

    """
    markers = markers and len(points) <= 480
    if not markers:
        points, errors = thin(points), None
    xs, ys = [x for x, _ in points], [y for _, y in points]
    spread = [error or 0.0 for error in errors] if errors else [0.0] * len(ys)
    ends = list(zip(ys, spread, strict=True))
    low, high = _range(min(y - e for y, e in ends), max(y + e for y, e in ends), bounds)
    first, last = min(xs), max(xs)

    def project(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first) if last > first else 0.5
        up = (min(max(y, low), high) - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [_axes(low, high, first, last, project)]
    positions = [project(x, y) for x, y in points]
    if markers:
        parts.append(_path(positions, "line"))
        for (x, y), (_, value), error in zip(positions, points, spread, strict=True):
            if error:
                parts.append(
                    f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{project(first, value - error)[1]:.1f}" '
                    f'y2="{project(first, value + error)[1]:.1f}"/>'
                )
            parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>')
    elif noisy and len(points) > 30:
        mean = smooth(ys, max(3, len(ys) // 20) | 1)
        parts += [
            _path(positions, "line pale"),
            _path([project(*point) for point in zip(xs, mean, strict=True)], "line"),
        ]
    else:
        parts.append(_path(positions, "line"))
    parts.append(f'<g class="cursor" hidden><line y1="{TOP}" y2="{HEIGHT - BOTTOM}"/><circle r="3.4"/></g>')
    readings = (  # for the value under the pointer
        f"{x:.1f} {y:.1f} {step:.6g} {value:.4g}" for (x, y), (step, value) in zip(positions, points, strict=True)
    )
    return _svg(parts, label, f' data-points="{";".join(readings)}"')


def histogram(values: Sequence[float], *, label: str, bins: int = 20) -> Markup:
    """The number of values in each of `bins` equal parts of [0, 1], as an <svg> element."""
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


def _range(low: float, high: float, bounds: tuple[float | None, float | None]) -> tuple[float, float]:
    def clamp(value: float) -> float:
        value = value if bounds[0] is None else max(value, bounds[0])
        return value if bounds[1] is None else min(value, bounds[1])

    low, high = clamp(low), clamp(high)  # before the pad is added, so that values beyond a bound leave a range
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return clamp(low - pad), clamp(high + pad)


def _axes(low: float, high: float, first: float, last: float, project: ToPosition, *, whole: bool = False) -> str:
    parts = []
    for value in ticks(low, high, 3 if whole else 5):
        if whole and value != int(value):
            continue
        y = project(first, value)[1]
        parts.append(
            f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{format_number(value)}</text>'
        )
    for value in ticks(first, last, 4):
        x = project(value, low)[0]
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{format_number(value)}</text>'
        )
    return "".join(parts)


def _path(positions: Sequence[tuple[float, float]], name: str) -> str:
    return f'<path class="{name}" d="M{" ".join(f"{x:.1f},{y:.1f}" for x, y in positions)}"/>'


def _svg(parts: Sequence[str], label: str, attributes: str) -> Markup:
    return Markup(  # all parts are made from numbers in this module; the label is escaped
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}"{attributes}>'
        f"{''.join(parts)}</svg>"
    )
