"""Pages: axes of charts, what is escaped, and that commands without a page do not load the template engine."""

import math
import subprocess
import sys

import pytest
from html_page import HOSTILE

from ibmd_cli.html import Axis, Chart, Line, Mark, across, draw, log_ticks, ticks, upwards, value_range


@pytest.mark.parametrize(
    "modules", ["ibmd_cli.cli", "ibmd_cli.sampling.pipeline, ibmd_cli.export.runner", "ibmd_cli.html"]
)
def test_templates_are_loaded_only_where_a_page_is_written(modules: str):
    code = f"import sys, {modules}; sys.exit('jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_texts_of_a_chart_are_escaped():
    mark = Mark("a", "M0 0z", HOSTILE, 50, 1.0, 0.5, None, level=True)
    svg = draw(Chart(HOSTILE, across(0, 2), upwards([0, 2]), [Line(HOSTILE, [(0, 1)])], [mark._replace(low=None)]))
    assert "<script" not in svg
    assert svg.count("&lt;script&gt;") == 3
    assert svg.startswith("<svg ")
    assert "\n" not in svg


def test_values_that_differ_by_rounding_alone_get_an_axis():
    """Means of a constant learning rate, as in run.html after 260 steps: 1e-4 and its two neighbours."""
    values = [1e-4, math.nextafter(1e-4, 0), math.nextafter(1e-4, 1)]
    low, high = value_range(values)
    assert low < min(values) < max(values) < high
    axis = upwards(values)
    assert axis.low < axis.high
    assert len({round(axis(value), 3) for value in values}) == 1


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-0.013, 0.021), (3e-5, 3e-4), (1, 1.0001), (-5, -1), (0, 7e9), (0.19, 0.61)]
)
def test_ticks(low: float, high: float):
    marks = ticks(low, high)
    assert 2 <= len(marks) <= 6
    assert marks[0] <= low + 1e-9 * (high - low)
    assert marks[-1] >= high - 1e-9 * (high - low)
    assert marks[-1] - marks[0] <= 3 * (high - low)


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [(0.6, 160, [1, 2, 5, 10, 20, 50, 100]), (0.6, 1.6, [1]), (0.6, 4.8, [1, 2, 3]), (1, 1e4, [1, 10, 100, 1e3, 1e4])],
)
def test_log_ticks(low: float, high: float, marks: list[float]):
    assert log_ticks(low, high) == pytest.approx(marks)


@pytest.mark.parametrize("low", [10**k * f for k in (-3, 0, 4) for f in (1, 1.7, 2.1, 4.9, 5.1, 9.9)])
def test_one_value_has_a_tick_nearby(low: float):
    assert log_ticks(low / 1.6, low * 1.6)


def test_axes():
    assert Axis(1, 100, 0, 200, (), log=True)(10) == pytest.approx(100)
    assert Axis(0, 4, 100, 0, ())(1) == 75
    assert Axis(0, 4, 100, 0, ())(9) == 0  # at the end, not outside
    assert across(0, 9).ticks == [0, 5]
    assert upwards([3.0]).low < 3 < upwards([3.0]).high
