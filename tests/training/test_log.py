"""The signs of trouble in a run's log: seen when they begin, once, and not where there is none."""

import pytest

from ibmd_cli.training.log import GROWN, LAG, WINDOW, Watch

STEPS = 400


def watch(lines: list[dict]) -> tuple[list[dict], list[str]]:
    """Return the lines with what `Watch` adds to them, and the warnings."""
    eye, seen = Watch(STEPS), []
    for step, line in enumerate(lines, 1):
        line = {"step": step, "bridge_loss": 0.1, "student_loss": 0.01, "skipped": 0, **line}
        seen.append(line | eye.look(line))
    return seen, [text for line in seen for text in line.get("warnings", [])]


def test_a_lagging_bridge_model_is_pointed_out_once_each_time():
    behind, fine = [{"student_loss": -2 * LAG * 0.1}] * 2 * WINDOW, [{}] * 2 * WINDOW
    seen, warnings = watch([*fine, *behind, *fine, *behind])
    assert len(warnings) == 2
    assert all("the bridge model lags" in text and "--bridge-steps" in text for text in warnings)
    assert seen[WINDOW - 2]["bridge_lag"] is None
    assert seen[2 * WINDOW - 1]["bridge_lag"] == pytest.approx(-0.1)
    assert seen[4 * WINDOW - 1]["bridge_lag"] == pytest.approx(2 * LAG)


def test_noise_about_zero_is_no_lag():
    """The student's loss has both signs at the optimum of both players."""
    assert watch([{"student_loss": 0.1 * (-1) ** k} for k in range(4 * WINDOW)])[1] == []


def test_losses_that_are_not_finite_are_left_out_of_the_lag():
    lines = [{"student_loss": None} if k % 2 else {"student_loss": -0.02} for k in range(WINDOW)]
    assert watch(lines)[0][-1]["bridge_lag"] == pytest.approx(0.2)
    assert watch([{"student_loss": None}] * WINDOW)[0][-1]["bridge_lag"] is None


def measured(*values: float, first: int = 1, every: int = 10, teacher: float = 0.1) -> list[dict]:
    lines: list[dict] = [{} for _ in range(first + every * len(values))]
    for i, value in enumerate(values):
        lines[first + every * i - 1] = {"diversity": value, "teacher_diversity": teacher}
    return lines


@pytest.mark.parametrize(
    ("lines", "steps"),
    [
        (measured(0.0, 0.02, 0.08, 0.11, 0.09), []),  # as a run of the embedded teacher
        (measured(0.02, 0.1, 0.02, 0.02, 0.1, 0.02), [21, 51]),  # fell twice
        (measured(0.001, 0.001, first=STEPS // 2), [STEPS // 2]),  # never grew, though there was time
        (measured(0.001, 0.002, first=GROWN - 11), []),  # may yet grow
        (measured(0.1, 0.1, first=STEPS // 2, teacher=0.0), []),  # of a teacher without noise
    ],
)
def test_collapse_of_diversity(lines: list[dict], steps: list[int]):
    seen, warnings = watch(lines)
    assert [line["step"] for line in seen if "warnings" in line] == steps
    assert all("it collapses" in text for text in warnings)


def test_skipped_steps_are_pointed_out_once_in_a_row():
    seen, warnings = watch([{"skipped": count} for count in (0, 1, 2, 2, 3, 3)])
    assert [line["step"] for line in seen if "warnings" in line] == [2, 5]
    assert all("not finite" in text for text in warnings)


def test_a_continued_run_sees_what_an_uninterrupted_one_sees():
    lines = [{"student_loss": -0.02, "skipped": k // 7} for k in range(2 * WINDOW)]
    seen, _ = watch(lines)
    half = WINDOW + 10
    eye = Watch(STEPS, seen[:half])
    assert [line | eye.look(line) for line in seen[half:]] == seen[half:]
