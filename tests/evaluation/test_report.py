"""`report.html`: one sound file that tells all of `results.json`, and, in a real browser, what it does."""

import base64
import hashlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import evaluated
import pytest
from browser import browse, until
from html_page import HOSTILE, Page, spoiled, strings
from PIL import Image

from ibmd_cli.evaluation import report as reports
from ibmd_cli.evaluation import tables
from ibmd_cli.evaluation.report import write_report
from ibmd_cli.html import asset

SHOWN = 5


def report(out: Path, results: dict, side: int = 8) -> Page:
    evaluated.write_pictures(out, results, side)
    write_report(out, results)
    return Page(out / "report.html")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation's folder with its report."""
    out = tmp_path_factory.mktemp("eval")
    results = evaluated.results(SHOWN)
    (out / "results.json").write_text(json.dumps(results))
    report(out, results)
    return out


@pytest.fixture
def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture
def page(folder: Path) -> Page:
    return Page(folder / "report.html")


# ------------------------------------------------------------------------------------------------------- the file


def test_nothing_is_loaded_from_elsewhere(page: Page):
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not re.search(r"url\(|@import", page.source)
    (script,) = re.findall(r"<script>(.*?)</script>", page.source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'content="(default-src [^"]+)"', page.source)
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_names_are_text(page: Page):
    """Also where they look like HTML, or like a place of the template."""
    assert page.tags.count("script") == 1
    assert page.text.count(HOSTILE) >= 6  # the data, a student, the command, protocols, settings, a source
    assert page.source.count("</script>") == 1
    assert "onerror" not in page.source


OURS = frozenset({"direction", "model", "kind", "why", "label", "shown_by"})
"""Strings that evaluations choose themselves."""


def test_no_text_of_the_results_is_taken_for_html(tmp_path: Path):
    """Every string that comes from outside holds tags, quotes and entities."""
    results = evaluated.results(2)
    for row in results["rows"]:
        row["label"] = row["label"] if row["label"] == "teacher" else HOSTILE + row["label"]
    for metric in results["metrics"].values():
        metric["label"] = HOSTILE + metric["label"]
    plain = {key: results.pop(key) for key in ("shown", "shown_by")}
    results = spoiled(results, OURS) | plain
    for entry in results["shown"]:
        entry["name"] = HOSTILE + entry["name"]
    page = report(tmp_path, results)
    assert page.tags.count("script") == 1
    assert page.source.count("<script") == page.source.count("</script>") == 1
    for text in strings({key: results[key] for key in ("settings", "protocol", "command", "ibmd_version")}):
        assert text in page.text
    for attribute in re.findall(r'\b(?:alt|title|aria-label)="([^"]*)"', page.source):
        assert "<" not in attribute
        assert ">" not in attribute


def typeset(text: str) -> str:
    """As on the page: true minus signs, and no place to break a line within an interval or a range."""
    text = text.replace("-", "−").replace(",", ",\N{NO-BREAK SPACE}")
    return re.sub(r"(?<=\d)–", "–\N{WORD JOINER}", text)


def test_tables_hold_the_results(page: Page, results: dict):
    labels, columns = tables.score_table(results)
    lines: dict[str, list] = {label: [] for label in labels}
    for label, *cells in page.rows:
        if label in lines:
            lines[label].append(cells)
    for (name, metric), label in zip(results["metrics"].items(), labels, strict=False):
        scores, first, second = lines[label]
        for cell, row in zip(scores, results["rows"], strict=False):
            expected = [tables.value(row[name], metric), tables.bounds(row[name], metric)]
            assert cell == typeset(" ".join(expected)).strip()
        gaps = sorted(results["differences"], key=lambda gap: gap["row"])  # a table for each student
        for cell, gap in zip([*first, *second], gaps, strict=True):
            assert cell.startswith(typeset(tables.value(gap[name], metric, "+")))
            assert cell.endswith(tables.verdict(gap[name], metric))
    assert lines["KID ×1000 ↓"][0][-1] == typeset("0.0 [-20.0,20.0] halves")
    assert lines["PSNR dB ↑*"][0][-1] == typeset("8.00 [7.00,9.00] unrelated")
    assert lines["KID ×1000 ↓"][0][1] == typeset("0.0 [-10.0,10.0]")
    assert labels[-3:] == ["ms/image", "images/s", "peak MiB"]
    for row in (-3, -2, -1):
        costs = [column.cells[row] for column in columns]
        assert lines[labels[row]] == [[*(typeset(f"{cell.text} {cell.small}".strip()) for cell in costs), ""]]


def test_words_and_origins(page: Page, results: dict):
    for gap, _ in tables.against_best(results):
        assert typeset(tables.bounds(gap["energy_score"], results["metrics"]["energy_score"], "+")) in page.text
    for text in (*results["protocol"].values(), results["command"], *(row["sha256"] for row in results["rows"])):
        assert text in page.text
    assert "1, 10, 100 NFE" not in page.text  # the fixture's weights differ
    assert "student builtin:student and runs/" in page.text
    assert "not measured: is: needs 5,000 images, there are 1,234" in page.text
    assert "* not comparable with published figures: energy score, PSNR (no published figure uses it)" in page.text


def test_pictures_are_the_files(page: Page, results: dict, folder: Path):
    found = {base64.b64decode(address.split(",")[1]) for address in page.addresses if len(address) > 20}
    for entry in results["shown"]:
        for file in (entry["source"], entry["truth"], entry["rows"][0][0], entry["rows"][2][0], entry["rows"][4][0]):
            assert (folder / file).read_bytes() in found
    several = results["shown"][: reports.SEVERAL]
    for file in (file for entry in several for i in (0, 1, 4) for file in entry["rows"][i]):
        assert (folder / file).read_bytes() in found
    assert page.source.count('class="pixels"') == 3 * SHOWN * 6 + len(several) * 3 * 6


def test_large_pictures_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reports, "MOST_BYTES", 60_000)
    results = evaluated.results(SHOWN)
    page = report(tmp_path, results, side=600)
    assert 20_000 < len(page.source) < 100_000
    assert "more in the folder images" in page.text
    assert page.tags.count("table") == 3 + 6 + 2  # none is empty
    uri = next(address for address in page.addresses if address.startswith("data:image/webp"))
    with Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) as image:
        assert image.size == (reports.WIDEST, reports.WIDEST)
    assert "pixels" not in re.findall(r"<img[^>]*>", page.source)[0]


@pytest.mark.parametrize("model", ["student A", "teacher"])
def test_one_model_alone(tmp_path: Path, model: str):
    results = evaluated.results(1)
    keep = [i for i, row in enumerate(results["rows"]) if row["label"] == model]
    results["rows"] = [results["rows"][i] for i in keep]
    for entry in results["shown"]:
        entry["rows"] = [entry["rows"][i] for i in keep]
    results |= {"differences": [], "floor": {}}
    page = report(tmp_path, results)
    assert "minus" not in page.text
    assert "Quality against" in page.text
    assert page.text.count("one source, several z") == 1


def test_the_ratio_of_diversities_is_shown_where_diversity_is(page: Page, tmp_path: Path):
    assert "diversity, ratio" in page.text
    results = evaluated.results()
    del results["metrics"]["diversity"], results["protocol"]["diversity"]
    assert "diversity" not in report(tmp_path, results).text


def test_no_pictures(tmp_path: Path):
    page = report(tmp_path, evaluated.results())
    assert page.tags.count("img") == 1  # the empty one for large pictures
    assert "#pictures" not in page.addresses


# --------------------------------------------------------------------------------------------------------- charts


def test_marks_lie_where_the_values_are(page: Page, results: dict):
    svg = re.search(r'<svg [^>]*aria-label="energy score against nfe">.*?</svg>', page.source)[0]
    marks = {
        title.split(":")[0]: (float(x), float(y), float(low), float(high))
        for title, low, high, x, y in re.findall(
            r'<title>(.*?)</title>.*?class="bar" x1="[\d.]+" x2="[\d.]+" y1="([\d.]+)" y2="([\d.]+)"/>'
            r"<path [^>]*translate\(([\d.]+) ([\d.]+)\)",
            svg,
        )
    }
    assert len(marks) == len(results["rows"])
    x = [marks[f"teacher, {nfe} NFE"][0] for nfe in (1, 10, 100)]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)  # a log scale
    assert marks["student A, 1 NFE"][0] == pytest.approx(x[0] - 6, abs=0.2)  # aside
    y = {tables.named(row): row["energy_score"]["value"] for row in results["rows"]}
    step = (marks["teacher, 1 NFE"][1] - marks["teacher, 10 NFE"][1]) / (2.72 - 2.0)
    assert step < 0  # upwards
    for name, (_, middle, low, high) in marks.items():
        assert middle - marks["teacher, 10 NFE"][1] == pytest.approx(step * (y[name] - 2.0), abs=0.2)
        assert low - high == pytest.approx(-step * 0.4, abs=0.2)


def test_floor_is_a_band(page: Page):
    assert len(re.findall(r'<rect class="band" x=', page.source)) == 2  # of KID, over NFE and over time


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(scheme: str):
    """WCAG 2.2, 1.4.3: a contrast of at least 4.5."""
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w+)", block))
        for block in re.findall(r":root {(.*?)}", asset("style.css"), re.DOTALL)
    )
    colours = light if scheme == "light" else light | dark

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for ground in ("paper", "card"):
        for text in ("ink", "soft", "a", "b", "c", "d", "warn", "good"):
            values = sorted([luminance(colours[ground]), luminance(colours[text])])
            assert (values[1] + 0.05) / (values[0] + 0.05) >= 4.5, (text, ground)


# ---------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture
def driver(folder: Path, tmp_path: Path) -> Iterator:
    with browse(tmp_path, 1280, 900) as driver:
        driver.get((folder / "report.html").as_uri())
        yield driver
        assert driver.get_log("browser") == []


def colours(driver: object, element: object) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The colours at the left and at the right of what a browser shows of an element, beside its labels."""
    with Image.open(io.BytesIO(element.screenshot_as_png)) as image:
        pixels = image.convert("RGB")
    return tuple(pixels.getpixel((round(f * pixels.width), pixels.height // 2)) for f in (0.2, 0.8))


def colour(folder: Path, file: str) -> tuple[int, ...]:
    with Image.open(folder / file) as image:
        return image.getpixel((0, 0))


@pytest.mark.slow
def test_slider_uncovers_one_picture_and_covers_the_other(driver: object, folder: Path, results: dict):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    stage = driver.find_element(By.CSS_SELECTOR, ".stage")
    slider = stage.find_element(By.TAG_NAME, "input")
    entry = results["shown"][0]
    source, student = colour(folder, entry["source"]), colour(folder, entry["rows"][0][0])
    assert colours(driver, stage) == (source, student)
    slider.send_keys(Keys.HOME)
    assert colours(driver, stage) == (student, student)
    slider.send_keys(Keys.END)
    assert colours(driver, stage) == (source, source)
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", stage)
    ActionChains(driver).move_to_element(stage).click().perform()
    assert abs(float(slider.get_attribute("value")) - 50) < 1  # where one points
    left, right, of = (Select(element) for element in driver.find_elements(By.CSS_SELECTOR, ".compare select"))
    left.select_by_visible_text("truth")
    right.select_by_visible_text("teacher, 100 NFE")
    of.select_by_visible_text(" ".join(HOSTILE.split()))
    entry = results["shown"][1]
    assert colours(driver, stage) == (colour(folder, entry["truth"]), colour(folder, entry["rows"][4][0]))
    driver.find_element(By.CSS_SELECTOR, ".compare button[value='1']").click()
    entry = results["shown"][2]
    assert colours(driver, stage) == (colour(folder, entry["truth"]), colour(folder, entry["rows"][4][0]))


@pytest.mark.slow
def test_a_picture_grows_and_shrinks(driver: object):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def caption() -> str:
        return driver.find_element(By.CSS_SELECTOR, "[data-caption]").text

    def press(key: str) -> None:
        driver.switch_to.active_element.send_keys(key)

    dialog = driver.find_element(By.TAG_NAME, "dialog")
    image = driver.find_elements(By.CSS_SELECTOR, "[data-zoom]")[0]
    assert not dialog.is_displayed()
    image.click()
    assert dialog.is_displayed()
    large = driver.find_element(By.CSS_SELECTOR, "[data-large]")
    assert large.get_attribute("src") == image.get_attribute("src")
    assert large.rect["width"] > 3 * image.rect["width"]
    seen = [caption()]
    for key in (Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ARROW_LEFT, Keys.ARROW_UP):
        press(key)
        seen.append(caption())
    name = " ".join(HOSTILE.split())
    first = "image-0: source"
    assert seen == [first, "image-0: teacher, 1 NFE", f"{name}: teacher, 1 NFE", f"{name}: source", first]
    press(Keys.ESCAPE)
    until(driver, "!document.querySelector('dialog').open")
    assert driver.switch_to.active_element == image
    press(Keys.ENTER)
    assert dialog.is_displayed()
    dialog.find_element(By.CSS_SELECTOR, "[data-go=close]").click()
    assert not dialog.is_displayed()


def which(driver: object, selector: str, condition: str) -> list[str]:
    """The elements for which a JavaScript expression of `e` and its `box` is true, spelled out."""
    code = (
        f"return [...document.querySelectorAll(`{selector}`)].filter(e => {{ const box = e.getBoundingClientRect(); "
        f"return {condition} }}).map(e => e.outerHTML.slice(0, 200))"
    )
    return driver.execute_script(code)


NOT_SEEN = "!e.checkVisibility({ visibilityProperty: true }) || !box.width || !box.height"
NOT_LOADED = "!e.complete || !e.naturalWidth"


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 800])
def test_on_a_phone_nothing_sticks_out(folder: Path, tmp_path: Path, width: int):
    with browse(tmp_path, width, 740, phone=True) as driver:
        driver.get((folder / "report.html").as_uri())
        assert driver.execute_script("return document.documentElement.scrollWidth") == width
        assert which(driver, "td img", NOT_LOADED) == []
        assert which(driver, "img, select, button, svg", f"box.left < 0 || box.right > {width}") == []
        assert driver.get_log("browser") == []


@pytest.mark.slow
@pytest.mark.parametrize(("width", "models"), [(400, 3), (400, 5), (320, 5), (1400, 5)])
def test_the_comparison_is_seen_whole_or_scrolls_visibly(tmp_path: Path, width: int, models: int):
    """Up to three models fit a phone; of more, the names of the rows stay in sight, and it is said that they scroll."""
    results = evaluated.results()
    if models == 3:
        results["rows"] = [results["rows"][i] for i in (0, 2, 3)]
        results["differences"] = [g | {"against": g["against"] - 1} for g in results["differences"][:2]]
    report(tmp_path, results)
    with browse(tmp_path, width, 740, phone=width < 500) as driver:
        driver.get((tmp_path / "report.html").as_uri())
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        wide = which(driver, ".scroll", "e.scrollWidth > e.clientWidth + 1")
        assert bool(wide) == (width < 500 and models > 3)
        if wide:
            assert which(driver, ".hint", "!e.checkVisibility()") == []
            driver.execute_script("document.querySelectorAll('.scroll').forEach(e => e.scrollLeft = 10000)")
        assert which(driver, ".figures tbody th", "box.left < 0 || box.left > 20 && innerWidth < 500") == []
        # no figure is broken into lines
        line = "parseFloat(getComputedStyle(e).lineHeight)"
        assert which(driver, ".facts b", f"box.height > 1.5 * {line}") == []
        cells = "(r => { r.selectNodeContents(e.firstChild); return r.getClientRects().length })(new Range())"
        assert which(driver, ".figures td", f"e.firstChild && {cells} > 1") == []


@pytest.mark.slow
def test_on_paper_all_is_there(driver: object):
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    metrics = {"width": 703, "height": 1032, "deviceScaleFactor": 1, "mobile": False}  # A4 less its margins, at 96 dpi
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    assert which(driver, "section, td img, td, dd, pre, .pair svg", "box.left < 0 || box.right > 703") == []
    assert which(driver, "section, td img, dd, pre, .pair svg", NOT_SEEN) == []
    assert which(driver, ".compare, nav, dialog", f"!({NOT_SEEN})") == []  # of no use there
    assert which(driver, "tr, .pair", "getComputedStyle(e).breakInside !== 'avoid'") == []
    pdf = base64.b64decode(driver.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"])
    assert b"/MediaBox [0 0 594" in pdf  # A4, 595 points wide


@pytest.mark.slow
def test_without_its_script_the_page_is_whole(folder: Path, tmp_path: Path):
    page = tmp_path / "page.html"
    page.write_text(re.sub("<script>.*</script>", "", (folder / "report.html").read_text(), flags=re.DOTALL))
    with browse(tmp_path) as driver:
        driver.get(page.as_uri())
        assert which(driver, "td img", NOT_LOADED) == []
        assert which(driver, "section, td img, .pair svg", NOT_SEEN) == []
        assert which(driver, ".compare, dialog", f"!({NOT_SEEN})") == []
