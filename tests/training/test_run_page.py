"""`run.html`: one sound file with nothing loaded from elsewhere, that tells how a run goes; and trackers."""

import json
import re
from pathlib import Path

import pytest
from browser import browse
from distilling import SMALL, distill, interrupt, log
from html_page import HOSTILE, Page
from PIL import Image

from ibmd_cli.errors import UsageError
from ibmd_cli.training.log import WINDOW
from ibmd_cli.training.run_page import PREVIEWS, WIDEST, write_page

CHARTS = 5  # the lag is seen after 50 steps only


@pytest.fixture
def arguments(tiny_teacher: Path, drawings: Path) -> list[object]:
    return ["--teacher", tiny_teacher, "--data", drawings, *SMALL, "--quiet"]


def test_page_of_a_run(arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "a<b>&c"
    interrupt(monkeypatch, [*arguments, "--out", out], 3)
    assert "interrupted at" in Page(out / "run.html").text
    distill(*arguments, "--out", out)
    page = Page(out / "run.html")
    assert "finished at" in page.text
    assert out.name in page.text  # escaped, or it would have become a tag
    assert "4 of 4" in page.text
    assert page.tags.count("svg") == CHARTS
    assert page.tags.count("img") == 3
    assert "script" not in page.tags
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not re.search(r"url\(|@import", page.source)
    settings = json.loads((out / "config.json").read_text())["settings"]
    rows = re.findall(r"<tr class=\"\w+\"><td>(\w+)</td><td>(.*?)</td><td>(\w+)</td>", page.source)
    assert [name for name, _, _ in rows] == list(settings)
    assert {name: origin for name, _, origin in rows}["steps"] == "flag"
    assert "refresh" not in page.source


def test_running_page_loads_itself_again(tmp_path: Path):
    page = written(tmp_path, [], "running")
    assert '<meta http-equiv="refresh"' in page.source
    assert "0 of 12" in page.text
    assert "<a>: 12 images" in page.text


def written(out: Path, lines: list[dict], status: str) -> Page:
    settings = {"teacher": "builtin:x", "steps": 12, "data": ["a", "b"]}
    origins, inputs = dict.fromkeys(settings, "flag"), {"<a>": "12 images"}
    content = {"ibmd_version": "0", "settings": settings, "origins": origins, "inputs": inputs}
    (out / "config.json").write_text(json.dumps(content))
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_page(out, status)
    return Page(out / "run.html")


def line(step: int, **values: object) -> dict:
    return {
        **{"step": step, "bridge_loss": 0.1, "student_loss": 0.01, "bridge_lag": None, "lr": 1e-4, "images": step},
        **{"images_per_second": 1.0, "seconds": float(step), "peak_memory_bytes": 1, "skipped": 0},
        **values,
    }


def test_long_run_makes_a_small_page(tmp_path: Path):
    page = written(tmp_path, [line(step, student_loss=step % 17 - 8) for step in range(1, 20_001)], "finished")
    assert len(page.source) < 300_000


def test_what_is_missing_or_wrong_is_shown(tmp_path: Path):
    lines = [line(1, student_loss=None), line(2, bridge_loss=None, warnings=["a <sign> of trouble"]), line(3)]
    page = written(tmp_path, lines, "stopped: x < y")
    assert "stopped: x < y" in page.text
    assert "a <sign> of trouble" in page.text
    assert page.tags.count("svg") == CHARTS - 1  # of curves that have values


def test_a_running_page_says_when_curves_begin(tmp_path: Path):
    page = written(tmp_path, [line(1), line(2)], "running")
    assert f"from step {WINDOW} on" in page.text
    assert "with each preview" in page.text
    assert "time left, about" in page.text


@pytest.mark.parametrize("status", ["finished", "interrupted", "stopped: x"])
def test_at_its_end_a_page_promises_nothing(tmp_path: Path, status: str):
    page = written(tmp_path, [line(step) for step in range(1, 13)], status)
    for text in ("time left", "no values yet", "from step", "with each preview"):
        assert text not in page.text


def test_no_text_of_a_run_is_taken_for_html(tmp_path: Path):
    """Every string that comes from outside holds tags, quotes and entities, and so do the names of settings."""
    out = tmp_path / HOSTILE.replace("/", "\u2044")
    out.mkdir()
    settings = {"teacher": HOSTILE, "steps": 12, "data": [HOSTILE, "b"], HOSTILE: HOSTILE}
    run = {"ibmd_version": HOSTILE, "settings": settings, "origins": {"teacher": HOSTILE}, "inputs": {HOSTILE: HOSTILE}}
    (out / "config.json").write_text(json.dumps(run))
    (out / "metrics.jsonl").write_text(json.dumps(line(1, warnings=[HOSTILE])) + "\n")
    write_page(out, f"stopped: {HOSTILE}")
    page = Page(out / "run.html")
    assert "script" not in page.tags
    assert "<script" not in page.source
    assert page.text.count(HOSTILE) >= 10


def test_what_is_small_or_alone_is_seen(tmp_path: Path):
    page = written(tmp_path, [line(step, lr=2e-5 * step) for step in range(1, 13)], "finished")
    assert ">1e−4<" in page.source
    assert not re.search(r">0\.000\d+<", page.source)  # as wide as that, it was cut at the left
    page = written(tmp_path, [line(1), line(2, diversity=0.1, teacher_diversity=0.2)], "finished")
    assert re.search(r'class="a dot" points="(\S+) \1"', page.source)  # a point alone would not be drawn


def test_many_wide_previews(tmp_path: Path):
    (tmp_path / "previews").mkdir()
    for step in range(0, 100, 5):
        Image.effect_noise((2 * WIDEST, 100), 20).save(tmp_path / "previews" / f"step-{step:06d}.png")
    page = written(tmp_path, [], "finished")
    steps = [int(step) for step in re.findall(r"<figcaption>step (\d+)", page.source)]
    assert len(steps) == PREVIEWS
    assert (steps[0], steps[-1]) == (95, 0)
    assert len(page.source) < PREVIEWS * 2 * WIDEST * 50


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_fits_its_window(tmp_path: Path, width: int):
    out = tmp_path / ("long-" * 40)
    (out / "previews").mkdir(parents=True)
    Image.effect_noise((1000, 300), 20).save(out / "previews" / "step-000000.png")
    written(out, [line(step, bridge_lag=step / 99, diversity=0.1) for step in range(1, 100)], "stopped: " + "x" * 200)
    with browse(tmp_path, width, 740, phone=width < 500) as driver:
        driver.get((out / "run.html").as_uri())
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        assert len(driver.find_elements("css selector", "svg")) == CHARTS + 1
        assert driver.get_log("browser") == []


# ------------------------------------------------------------------------------------------------------- trackers


def test_tensorboard_gets_the_log(arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    command = [*arguments, "--track", "tensorboard", "--checkpoint-every", 2, "--out", tmp_path / "run"]
    interrupt(monkeypatch, command, 3)
    distill(*command)
    (folder,) = (tmp_path / "run" / "tensorboard").iterdir()
    events = accumulator.EventAccumulator(str(folder)).Reload()
    for name in ("bridge_loss", "student_loss", "lr", "skipped"):
        seen = [(event.step, event.value) for event in events.Scalars(name)]
        assert seen == [(line["step"], pytest.approx(line[name])) for line in log(tmp_path / "run")]


def test_tracker_that_is_not_installed(arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ibmd_cli.training.accelerator.find_spec", lambda _: None)
    with pytest.raises(UsageError, match="--track wandb: it is not installed: pip install wandb"):
        distill(*arguments, "--track", "wandb", "--out", tmp_path / "run")
    with pytest.raises(UsageError, match="--track mlflow: expected tensorboard or wandb"):
        distill(*arguments, "--track", "mlflow", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
