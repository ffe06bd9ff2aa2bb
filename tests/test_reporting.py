"""Progress and numbers: what is said before, between and after units of work, with a bar and in lines."""

import pytest

from ibmd_cli.reporting import Meter, rounded


@pytest.mark.parametrize("width", [30, 60, 80, 120])
def test_a_bar_has_count_and_what_is_left_before_all_else(width: int):
    meter = Meter("distilling", 20, "step")
    assert "  starting" in meter.line(width, fancy=False).plain
    meter.prepare("warm-up 3/40")
    assert "  warm-up 3/40" in meter.line(width, fancy=False).plain
    for step in range(20):
        meter.advance(1, bridge_loss=f"{step:.4f}")
        line = meter.line(width, fancy=False).plain
        assert len(line) <= width
        assert f"{step + 1}/20  " in line
        assert (" left" if step < 19 else " in ") in line
        assert "bridge loss" in line or width < 120


def test_lines_without_a_terminal_tell_what_goes_on_before_the_first_unit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Meter, "SECONDS", 0.0)
    told: list[str] = []
    meter = Meter("distilling", 2, "step", tell=told.append)
    meter.prepare("warm-up 1/2")
    meter.advance(2)
    assert told[0] == "distilling 0/2  warm-up 1/2"
    assert told[1].startswith("distilling 2/2  in 0:00")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123, "0.012"), (0.996, "1.0"), (5, "5.0"), (9.96, "10"), (14.4, "14"), (149, "150"), (123_456, "120,000")],
)
def test_two_digits_count(value: float, text: str):
    assert rounded(value) == text
