"""How figures are written: numbers, the sentence that sums them up, and tables for terminals of any width."""

import io
import re
from pathlib import Path

import evaluated
import pytest
from html_page import Page
from rich.console import Console

from ibmd_cli.evaluation import tables
from ibmd_cli.evaluation.report import write_report


@pytest.fixture
def results() -> dict:
    return evaluated.results()


def shown(results: dict, width: int) -> str:
    """What a terminal of this width shows."""
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(tables.layout(results))
    return console.file.getvalue()


def test_numbers(results: dict):
    kid, psnr, diversity = (results["metrics"][name] for name in ("kid", "psnr", "diversity"))
    assert tables.heading_of(kid) == "KID ×1000 ↓"
    assert tables.heading_of(diversity) == "diversity"
    assert tables.score_table(results).labels[2] == "PSNR dB ↑*"
    assert tables.value({"value": -0.00001}, kid) == "0.0"  # not -0.0
    assert tables.value({"value": 0.0968, "deviation": 0.002}, kid) == "96.8 ±2.0"
    assert tables.bounds({"low": -0.01, "high": 0.02}, kid, "+") == "[-10.0,+20.0]"
    assert tables.bounds({"low": None, "high": None}, kid) == ""
    assert tables.value({"value": 17.346}, psnr, "+") == "+17.35"


@pytest.mark.parametrize(
    ("direction", "low", "high", "word"),
    [
        ("low", -2, -1, "better"),
        ("low", 1, 2, "worse"),
        ("high", 1, 2, "better"),
        ("high", -2, -1, "worse"),
        ("low", -1, 2, ""),
        ("", 1, 2, ""),
        ("low", None, None, ""),
    ],
)
def test_a_difference_counts_if_its_interval_leaves_zero_out(direction: str, low: float, high: float, word: str):
    value = 1 if low is None else (low + high) / 2
    assert tables.verdict({"value": value, "low": low, "high": high}, {"direction": direction}) == word


def test_the_ratio_of_diversities_is_shown_where_diversity_is(results: dict):
    assert "diversity, ratio" in shown(results, 100)
    del results["metrics"]["diversity"]
    text = shown(results, 100)
    assert "diversity" not in text
    assert "times as fast" in text


def test_best_is_best_as_it_is_shown(results: dict):
    assert tables.best(results, "energy_score") == [3, 4]  # 2.00 and 2.001, shown alike
    assert tables.best(results, "psnr") == [2]
    assert tables.best(results, "diversity") == []
    del results["rows"][1:]
    assert tables.best(results, "psnr") == []  # of one row none is best


def test_the_sentence_compares_with_the_teacher_at_its_best(results: dict):
    first, second = tables.against_best(results)
    assert [(gap["against"], name) for gap, name in (first, second)] == [(3, "energy_score")] * 2
    assert tables.sentence(results, *first) == (
        "The energy score of student A is 2.06 with one evaluation per image; the teacher's best is 2.00 with 10 "
        "evaluations. The difference is +0.06 [-0.14,+0.26], not resolved. Student A is 10 times as fast "
        "(9.2–11 over the timed calls)."
    )
    assert "+0.46 [+0.26,+0.66], in favour of the teacher. Student B is 5.0 times" in tables.sentence(results, *second)
    first[0]["energy_score"].update(value=-0.5, low=-0.6, high=-0.4)
    results["rows"][0]["label"] = "student"
    assert "in favour of the student. The student is" in tables.sentence(results, *first)
    first[0]["energy_score"].update(low=None, high=None)
    assert "The difference is -0.50. The student is" in tables.sentence(results, *first)


@pytest.mark.parametrize(
    ("ratio", "spread", "words"),
    [
        (5.29, [4.42, 6.1], "The student is 5.3 times as fast (4.4–6.1 over the timed calls)"),
        (104.2, [98.7, 110.0], "The student is 100 times as fast (99–110 over the timed calls)"),
        (0.898, [0.88, 0.92], "The student takes 1.1 times as long (1.1)"),
        (1.2, [0.95, 1.4], "No difference in speed is resolved (0.95–1.4 times as fast over the timed calls)"),
        (1.01, [1.001, 1.02], "No difference in speed is resolved (1.0 times as fast over the timed calls)"),
        (3.0, None, "There are too few timed calls to compare speeds"),
    ],
)
def test_speed_is_told_as_finely_as_timed_calls_carry(
    results: dict, tmp_path: Path, ratio: float, spread: list | None, words: str
):
    gap = {"speed_up": ratio, "speed_up_range": spread}
    assert tables.speed("the student", gap) == words
    for one in results["differences"]:
        one |= gap
    write_report(tmp_path, results)
    page = Page(tmp_path / "report.html").text
    assert not re.search(r"[1-9]\.\d\d+×|0\.\d{3,}×", page.replace("1.05×", ""))  # the ratio of diversities
    assert "0.898" not in page
    facts = set(re.findall(r"the (speed|time) of the teacher", page))
    assert facts == (
        {"speed"} if "as fast" in words[:40] and "No" not in words else {"time"} if "long" in words else set()
    )


def test_no_ratio_of_speeds_without_its_spread(results: dict):
    """Of fewer than three timed calls it may be chance, as between a student and its copy."""
    assert "10×" in shown(results, 200)
    assert "no range" not in shown(results, 200)
    for one in results["differences"]:
        one["speed_up_range"] = None
    for row in results["rows"]:
        row["ms_range"] = None
    text = shown(results, 200)
    assert "10×" not in text
    assert "below them the range" not in text
    assert "of fewer than three timed calls, no range and no comparison" in text


def test_equal_network_calls_are_not_contrasted(results: dict, tmp_path: Path):
    results["rows"][0]["nfe"] = results["rows"][3]["nfe"]
    write_report(tmp_path, results)
    page = Page(tmp_path / "report.html").text
    assert "per image, as the teacher" in page
    assert "instead of 10 NFE" in page  # the other student
    assert "10 NFEper image, instead of 10 NFE" not in page


@pytest.mark.parametrize(("images", "word"), [(1, "1 pair"), (2, "2 pairs"), (1234, "1,234 pairs")])
def test_tables_say_what_is_there(results: dict, tmp_path: Path, images: int, word: str):
    """One thing is singular, and no interval is announced where there is none."""
    results["settings"] |= {"images": images, "threads": images}
    results["floor"] = {}
    for row in results["rows"]:
        for name in results["metrics"]:
            row[name] |= {"low": None, "high": None}
    write_report(tmp_path, results)
    for text in (" ".join(shown(results, 1000).split()), " ".join(Page(tmp_path / "report.html").text.split())):
        assert re.search(rf"(?<![\d,]){word}\b", text)
        assert "95 % interval]" not in text
        assert f"no intervals: {word}, 5 are needed" in text
        assert ("1 threads" in text, "(s)" in text) == (False, False)


def test_higher_may_be_better(results: dict):
    results["metrics"] = {name: results["metrics"][name] for name in ("diversity", "psnr")}
    assert [gap["against"] for gap, _ in tables.against_best(results)] == [2, 2]
    assert "The PSNR of student A is 17.33" in tables.sentence(results, *tables.against_best(results)[0])
    results["metrics"] = {"diversity": results["metrics"]["diversity"]}
    assert tables.against_best(results) == []


@pytest.mark.parametrize("width", [40, 72, 100, 200])
def test_tables_fit_any_terminal_and_lose_nothing(results: dict, width: int):
    text = shown(results, width)
    assert max(map(len, text.splitlines())) <= width
    words = set(text.split())
    for row in results["rows"]:
        for name, metric in results["metrics"].items():
            assert tables.number(row[name]["value"], metric) in words
    for gap in results["differences"]:
        for name, metric in results["metrics"].items():
            assert {
                tables.number(gap[name]["value"], metric, "+"),
                *tables.bounds(gap[name], metric, "+").split(),
            } <= words
    assert text.count("energy score ↓*") == {40: 12, 72: 5, 100: 3, 200: 2}[width]  # a table each


def test_what_else_a_terminal_shows(results: dict):
    text = " ".join(shown(results, 1000).split())
    assert "KID of real images, halves of 617: 0.0 [-20.0,20.0]" in text
    assert "PSNR of unrelated real images: 8.00 [7.00,9.00]" in text
    assert "* not comparable with published figures: energy score, PSNR (no published figure uses it)" in text
    assert "not measured: is: needs 5,000 images, there are 1,234" in text
    assert "student A: builtin:student student B: runs/" in text
    assert "over 3 seeds" not in text
    results["settings"]["seeds"] = 3
    assert "±: standard deviation over 3 seeds" in shown(results, 100)
    assert evaluated.HOSTILE in text  # nothing in it is taken for a style
    assert re.search(r"peak MiB +– +512 +512", shown(results, 200))


def test_results_of_one_model(results: dict):
    del results["rows"][1:]
    results |= {"differences": [], "floor": {}}
    text = shown(results, 80)
    assert "2.06" in text
    assert "peak" not in text  # unknown for all rows
    assert "differences" not in text
