"""Charts: positions of ticks, points and bars."""

import re
from html.parser import HTMLParser

import pytest

from ospo_fast.report import charts


def elements(svg, tag):
    found = []

    class Parser(HTMLParser):
        def handle_starttag(self, name, attributes):
            if name == tag:
                found.append(dict(attributes))

    Parser().feed(str(svg))
    return found


def test_ticks_are_round_and_inside():
    assert charts.ticks(0, 100, 5) == pytest.approx([0, 20, 40, 60, 80, 100])
    assert charts.ticks(0.42, 0.61, 5) == pytest.approx([0.45, 0.5, 0.55, 0.6])
    assert charts.ticks(3, 3, 5) == [3]  # one step only


def test_numbers_have_at_most_three_digits():
    values = (0, 0.5, 12.345, 1234, 2e-5, -0.25, 3.2e7)
    assert [charts.format_number(value) for value in values] == [
        "0", "0.5", "12.3", "1,234", "2e-05", "-0.25", "3.2e+07",
    ]  # fmt: skip


def test_smooth_keeps_a_straight_line_between_the_ends():
    values = [2.0 * x for x in range(20)]
    assert charts.smooth(values, 5)[2:-2] == pytest.approx(values[2:-2])
    assert charts.smooth(values, 5)[0] == pytest.approx(2.0)  # mean of the first three


def test_thinning_keeps_the_mean():
    points = [(float(x), float(x % 7)) for x in range(1000)]
    thin = charts.thin(points, 100)
    assert len(thin) == 100
    assert sum(y for _, y in thin) / 100 == pytest.approx(sum(y for _, y in points) / 1000)
    assert charts.thin(points[:50], 100) == points[:50]


def test_line_spans_the_chart():
    svg = charts.line_chart([(step, step / 10) for step in range(11)], label="rise")
    (path,) = elements(svg, "path")
    points = [tuple(map(float, point.split(","))) for point in path["d"][1:].split()]
    assert points[0][0] == charts.LEFT
    assert points[-1][0] == charts.WIDTH - charts.RIGHT
    heights = [y for _, y in points]
    assert heights == sorted(heights, reverse=True)
    assert all(charts.TOP <= y <= charts.HEIGHT - charts.BOTTOM for y in heights)


def test_only_points_with_an_error_have_a_bar():
    svg = charts.line_chart([(0, 0.4), (10, 0.5)], label="alignment", errors=[0.1, None], markers=True)
    whiskers = [line for line in elements(svg, "line") if line.get("class") == "whisker"]
    dots = [dot for dot in elements(svg, "circle") if dot.get("class") == "dot"]
    assert len(whiskers) == 1
    assert len(dots) == 2
    low, high, middle = float(whiskers[0]["y1"]), float(whiskers[0]["y2"]), float(dots[0]["cy"])
    assert low - middle == pytest.approx(middle - high, abs=0.11)
    assert float(dots[1]["cy"]) == pytest.approx(high, abs=0.11)  # 0.4 + 0.1 is the second point


def test_constant_and_single_values_give_finite_positions():
    for points in ([(1, 0.0)], [(1, 5.0), (2, 5.0)], [(0, 1.0), (1, 1.0)], [(1, 2.0**63)], [(1, -(2.0**63))]):
        assert not re.search(r"nan|inf", str(charts.line_chart(points, label="flat", bounds=(0, 1))))


def test_labels_are_escaped():
    assert "<b>" not in charts.line_chart([(0, 1), (1, 2)], label='"><b>')


def test_histogram_counts_each_value_once():
    svg = charts.histogram([0.0, 0.04, 0.5, 1.0], label="cover", bins=10)
    bars = [bar for bar in elements(svg, "rect") if bar["class"] == "block"]
    full = charts.HEIGHT - charts.TOP - charts.BOTTOM
    assert [round(2 * float(bar["height"]) / full) for bar in bars] == [2, 0, 0, 0, 0, 1, 0, 0, 0, 1]
