"""The page of a student: what is in it, and, in a real browser, what it does."""

import base64
import gzip
import hashlib
import http.server
import io
import json
import re
import tarfile
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from browser import browse, until
from html_page import HOSTILE, Page
from onnx import TensorProto
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from PIL import Image
from students import of_teacher

from ibmd_cli.data.embedded import embedded_pairs
from ibmd_cli.errors import IbmdError, NotAvailable, UsageError
from ibmd_cli.export import demo_page
from ibmd_cli.export.demo_page import runtime, write_demo_page
from ibmd_cli.images.fit import to_uint8
from ibmd_cli.models.folder import load_model
from ibmd_cli.models.model import StudentModel

BUILTIN = "builtin:outline2emoji"


@pytest.fixture(scope="module")
def student() -> StudentModel:
    model = load_model(BUILTIN, "student")
    assert isinstance(model, StudentModel)
    return model


# -------------------------------------------------------------------------------------------------- the file


def package(cache: Path, **files: bytes) -> Path:
    """Put a package of these files where the runtime is looked for."""
    path = cache / "onnxruntime-web-1.30.0.tgz"
    cache.mkdir(exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for place, content in files.items():
            info = tarfile.TarInfo(f"package/dist/{demo_page.RUNTIME[place][0]}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and no npm."""
    monkeypatch.setenv("IBMD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "cache"


@pytest.fixture
def small_runtime(cache: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Two small files in the place of the runtime."""
    files = {"runtime": b"export const x = 1;", "wasm": bytes(range(256))}
    package(cache, **files)
    hashes = {place: hashlib.sha256(content).hexdigest() for place, content in files.items()}
    monkeypatch.setattr(demo_page, "RUNTIME", {place: (demo_page.RUNTIME[place][0], hashes[place]) for place in files})
    return files


def network(path: Path, inputs: dict[str, tuple]) -> Path:
    """An ONNX file with these inputs, which returns the first of them."""
    infos = [make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
    first, *_ = inputs
    out = make_tensor_value_info("x_0", *inputs[first])
    graph = make_graph([make_node("Identity", [first], ["x_0"])], "g", infos, [out])
    onnx.save(make_model(graph, opset_imports=[make_opsetid("", 17)], ir_version=10), path)
    return path


X_T = {"x_T": (TensorProto.FLOAT, ["batch", 3, "height", "width"])}
Z = {"z": (TensorProto.FLOAT, ["batch", 8, 1, 1])}


def part(page: str, name: str) -> str:
    """The text of a script element."""
    return re.search(rf'<script [^>]*id="{name}">(.*?)</script>', page, re.DOTALL)[1]


def test_a_page_holds_student_and_runtime(student: StudentModel, small_runtime: dict[str, bytes], tmp_path: Path):
    model = network(tmp_path / "student.onnx", {**X_T, **Z})
    named = of_teacher(student, reference=BUILTIN, name="</script><b>", task="a → b & c")
    write_demo_page(named, model, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "{{" not in page
    assert "<title>&lt;/script&gt;&lt;b&gt;</title>" in page
    assert "<p>a → b &amp; c. Draw" in page
    assert "from a teacher of OpenMoji 17 (https://openmoji.org). Licence of the student: CC-BY-SA-4.0." in page
    assert page.count("</script>") == page.count("<script")
    for name, content in {**small_runtime, "model": model.read_bytes()}.items():
        assert gzip.decompress(base64.b64decode(part(page, name))) == content
    config = json.loads(part(page, "config"))
    assert config["name"] == "</script><b>"
    assert config["inputs"] == {"x_T": [1, 3, 32, 32], "z": [1, 8, 1, 1]}
    assert config["examples"] == demo_page.DRAWINGS
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing comes from elsewhere


def test_no_text_of_a_student_is_taken_for_html(student: StudentModel, small_runtime: dict[str, bytes], tmp_path: Path):
    """Every string of its configuration that reaches the page holds tags, quotes and entities."""
    model = network(tmp_path / "student.onnx", {**X_T, **Z})
    changes = {"reference": HOSTILE, "name": HOSTILE, "task": HOSTILE, "licence": HOSTILE, "ibmd_version": HOSTILE}
    write_demo_page(of_teacher(student, **changes), model, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert page.tags.count("script") == page.source.count("</script") == 5
    assert page.text.count(HOSTILE) >= 4
    assert json.loads(part(page.source, "config"))["name"] == HOSTILE
    assert not re.search("[<>&]", part(page.source, "config"))


def test_examples_are_sources_of_the_student(student: StudentModel, small_runtime: dict[str, bytes], tmp_path: Path):
    image = {**student.config["image"], "source_scale": 4}
    enlarging = of_teacher(student, reference="builtin:emoji-sr4x", image=image, degradation="sr4x-pool")
    write_demo_page(enlarging, network(tmp_path / "student.onnx", X_T), tmp_path / "page.html")
    first, *others = json.loads(part((tmp_path / "page.html").read_text(), "config"))["examples"]
    with Image.open(io.BytesIO(base64.b64decode(first.removeprefix("data:image/png;base64,")))) as picture:
        pixels = np.array(picture)
    assert len(others) == 2
    assert pixels.shape == (8, 8, 3)
    x_T = embedded_pairs("emoji-sr4x").x_T[0].permute(1, 2, 0).numpy()
    assert (pixels.repeat(4, 0).repeat(4, 1) == x_T).all()
    other = of_teacher(student, reference="/home/me/teacher", degradation="jpeg-10")
    write_demo_page(other, network(tmp_path / "student.onnx", X_T), tmp_path / "page.html")
    assert json.loads(part((tmp_path / "page.html").read_text(), "config"))["examples"] == []


def test_what_a_page_has_no_place_for(
    student: StudentModel, small_runtime: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    page, model = tmp_path / "page.html", network(tmp_path / "student.onnx", X_T)
    for change in ({"mask": {"fill": "zero"}}, {"classes": 10}):
        with pytest.raises(UsageError, match="needs a mask or a class"):
            write_demo_page(of_teacher(student, reference=BUILTIN, **change), model, page)
    for inputs in (Z, {**X_T, "label": (TensorProto.INT64, ["batch"])}):
        with pytest.raises(IbmdError, match="a page needs x_T and noise"):
            write_demo_page(student, network(model, inputs), page)
    monkeypatch.setattr(demo_page, "LARGEST_MODEL", 100)
    with pytest.raises(UsageError, match="at most"):
        write_demo_page(student, model, page)
    assert not page.exists()


# ------------------------------------------------------------------------------------------------- the runtime


def npm(tmp_path: Path, script: str) -> None:
    """Put a program of this name on the path."""
    file = tmp_path / "bin" / "npm"
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def test_the_runtime_is_fetched_once_by_npm(small_runtime: dict[str, bytes], cache: Path, tmp_path: Path):
    whole = package(cache, **small_runtime).rename(tmp_path / "whole.tgz")
    expected = "pack --silent onnxruntime-web@1.30.0 --pack-destination"
    npm(tmp_path, f'[ "$1 $2 $3 $4" = "{expected}" ] && /bin/cp {whole} "$5/onnxruntime-web-1.30.0.tgz"')
    assert runtime() == small_runtime
    npm(tmp_path, "exit 1")
    assert runtime() == small_runtime
    assert [file.name for file in cache.iterdir()] == ["onnxruntime-web-1.30.0.tgz"]


def test_without_npm_or_network_it_is_said_what_to_do(cache: Path, tmp_path: Path):
    address = "https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-1.30.0.tgz"
    with pytest.raises(NotAvailable, match="install Node.js") as caught:
        runtime()
    assert f"Or put {address} at {cache}/onnxruntime-web-1.30.0.tgz" in str(caught.value)
    npm(tmp_path, "echo 'npm error code ENOTFOUND' >&2; echo more >&2; exit 7")
    with pytest.raises(NotAvailable, match=r"it failed \(npm error code ENOTFOUND\)") as caught:
        runtime()
    assert len(str(caught.value).splitlines()) == 1
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("damage", ["other", "missing", "cut", "text"])
def test_another_runtime_is_refused(small_runtime: dict[str, bytes], cache: Path, damage: str):
    if damage == "other":
        path = package(cache, **{**small_runtime, "wasm": b"other"})
    elif damage == "missing":
        path = package(cache, runtime=small_runtime["runtime"])
    else:
        path = package(cache, **small_runtime)
        path.write_bytes(path.read_bytes()[:100] if damage == "cut" else b"<html>")
    with pytest.raises(IbmdError, match=r"not onnxruntime-web 1\.30\.0 as published: delete it"):
        runtime()


# ------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def page(student: StudentModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the embedded student."""
    from ibmd_cli.export.config import ExportConfig
    from ibmd_cli.export.exporter import Exporter

    file = tmp_path_factory.mktemp("web") / "page.html"
    try:  # fp16, as the embedded weights are
        Exporter("builtin:outline2emoji").export(
            *ExportConfig("builtin:outline2emoji", output=file, dtype="fp16").files()
        )
    except NotAvailable as error:
        pytest.skip(str(error))
    return file


class Shown:
    """What a page shows: the student's input and output, and the pixels of its two canvases."""

    def __init__(self, driver: object) -> None:
        x_T, z, x_0, source, result = driver.execute_script(
            "const {inputs, x_0} = window.ibmd; return [inputs.x_T, inputs.z, x_0].map(t => Array.from(t.data))"
            ".concat(['board', 'result'].map(id => document.getElementById(id).toDataURL()))"
        )
        self.x_T, self.x_0 = (torch.tensor(v).reshape(1, 3, 32, 32) for v in (x_T, x_0))
        self.z = torch.tensor(z).reshape(1, 8, 1, 1)
        self.board, self.result = (
            torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(v.partition(",")[2]))).convert("RGB")))
            for v in (source, result)
        )

    @torch.no_grad()
    def check(self, student: StudentModel) -> None:
        """The source is the drawing, 16 × 16 of its pixels to one; the result is PyTorch's."""
        blocks = self.board.permute(2, 0, 1).float().reshape(3, 32, 16, 32, 16).mean((2, 4))
        assert ((self.x_T[0] + 1) * 127.5 - blocks).abs().max() <= 0.5001
        assert ((self.x_T + 1) * 127.5 % 1).minimum(1 - (self.x_T + 1) * 127.5 % 1).max() < 1e-3  # levels of a file
        x_0 = student.predictor(self.x_T, torch.ones(1), self.x_T, self.z).clamp(-1, 1)
        assert (self.x_0 - x_0).abs().max() < 1e-4  # float32 in another order of operations
        assert (self.result.permute(2, 0, 1).int() - to_uint8(x_0)[0].int()).abs().max() <= 1


def after(driver: object, action: object) -> Shown:
    """Do something and wait for the student's answer."""
    before = driver.execute_script("return window.ibmd_before = window.ibmd, 1")
    assert before
    action()
    until(driver, "window.ibmd !== window.ibmd_before")
    return settled(driver)


def settled(driver: object) -> Shown:
    """Wait until the student is idle, and nothing changes any more."""
    assert until(driver, "document.body.dataset.state") == "ready", driver.find_element("id", "status").text
    idle = "document.getElementById('result').ariaBusy === 'false'"
    while True:
        until(driver, idle)
        driver.execute_script("window.ibmd_before = window.ibmd")
        driver.execute_async_script("setTimeout(arguments[0], 400)")
        if driver.execute_script(f"return window.ibmd === window.ibmd_before && {idle}"):
            return Shown(driver)


def drag(driver: object, kind: str, *points: tuple[float, float]) -> None:
    """Move the pressed mouse or a finger over the drawing; points in fractions of its side."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.actions.pointer_input import PointerInput

    board = driver.find_element("id", "board")
    side = board.rect["width"]
    chain = ActionChains(driver, duration=20, devices=[PointerInput(kind, "finger")])
    pointer = chain.w3c_actions.pointer_action
    for i, (x, y) in enumerate(points):
        pointer.move_to(board, (x - 0.5) * side, (y - 0.5) * side)
        if i == 0:
            pointer.pointer_down()
    pointer.pointer_up()
    chain.perform()


@pytest.mark.slow
def test_one_draws_and_sees_the_result(student: StudentModel, page: Path, tmp_path: Path):
    with browse(tmp_path) as driver:
        driver.get(page.as_uri())
        click = {e.get_attribute("id"): e.click for e in driver.find_elements("tag name", "button")}
        example = settled(driver)
        example.check(student)
        assert (example.board == 0).any()

        drawn = after(driver, lambda: drag(driver, "mouse", (0.1, 0.1), (0.5, 0.1), (0.9, 0.15)))
        drawn.check(student)
        assert (drawn.x_T[0, :, 3, 5:15] < 0).all()  # a black line
        assert (drawn.board[120:] == 255).all()  # nothing of the example, below the stroke
        assert torch.equal(drawn.z, example.z)
        assert not torch.equal(drawn.result, example.result)

        driver.execute_script("document.getElementById('width').value = 8")
        click["eraser"]()
        erased = after(driver, lambda: drag(driver, "mouse", (0.1, 0.1), (0.5, 0.1)))
        erased.check(student)
        assert (erased.x_T[0, :, 3, 5:12] == 1).all()
        assert torch.equal(after(driver, click["undo"]).x_T, drawn.x_T)
        assert (after(driver, click["clear"]).x_T == 1).all()
        assert torch.equal(after(driver, click["undo"]).x_T, drawn.x_T)
        assert torch.equal(after(driver, click["undo"]).board, example.board)

        draws = [after(driver, click["again"]) for _ in range(8)]
        for one in draws:
            assert torch.equal(one.x_T, example.x_T)
        assert len({tuple(one.z.flatten().tolist()) for one in draws}) == 8
        numbers = torch.cat([one.z.flatten() for one in draws])  # 64 standard normal ones
        assert numbers.mean().abs() < 0.4
        assert 0.75 < numbers.std() < 1.25
        draws[-1].check(student)

        resources = driver.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
        assert [name for name in resources if not name.startswith(("data:", "blob:"))] == []
        assert driver.get_log("browser") == []


@pytest.mark.slow
def test_pictures_come_in_and_go_out(student: StudentModel, page: Path, drawings: Path, tmp_path: Path):
    with browse(tmp_path) as driver:
        driver.get(page.as_uri())
        settled(driver)
        file = drawings / "drawing-3.png"
        opened = after(driver, lambda: driver.find_element("id", "open").send_keys(str(file)))
        opened.check(student)
        with Image.open(file) as image:
            assert torch.equal(to_uint8(opened.x_T)[0], to_uint8(image.convert("RGB")))  # what `ibmd sample` reads
        driver.find_element("id", "save").click()
        saved = tmp_path / "downloads" / "outline2emoji-1step.png"
        for _ in range(1200):  # a minute, on a busy machine
            if saved.is_file():
                break
            time.sleep(0.05)
        with Image.open(saved) as image:
            assert torch.equal(torch.from_numpy(np.array(image.convert("RGB"))), opened.result)
        (tmp_path / "text.png").write_text("not a picture")
        driver.find_element("id", "open").send_keys(str(tmp_path / "text.png"))
        until(driver, "document.body.dataset.state === 'failed'")
        assert "text.png: not a picture" in driver.find_element("id", "status").text


@pytest.mark.slow
def test_on_a_phone_from_a_server(student: StudentModel, page: Path, tmp_path: Path):
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=page.parent)
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        with browse(tmp_path, 375, 667, phone=True) as driver:
            driver.get(f"http://127.0.0.1:{server.server_port}/page.html")
            settled(driver).check(student)
            after(driver, lambda: drag(driver, "touch", (0.1, 0.9), (0.9, 0.9))).check(student)
            scrolled = driver.execute_script("return [scrollX, scrollY, document.documentElement.scrollWidth]")
            assert scrolled == [0, 0, 375]
            for element in driver.find_elements("css selector", "canvas, button"):  # all at hand, without scrolling
                box = element.rect
                assert box["x"] >= 0
                assert box["x"] + box["width"] <= 375
                assert box["y"] + box["height"] <= 667
                assert element.tag_name == "canvas" or box["height"] >= 40
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_a_damaged_page_says_so(page: Path, tmp_path: Path):
    text = page.read_text()
    junk = base64.b64encode(gzip.compress(b"junk")).decode()
    (tmp_path / "page.html").write_text(text.replace(part(text, "model"), junk))
    with browse(tmp_path) as driver:
        driver.get((tmp_path / "page.html").as_uri())
        until(driver, "document.body.dataset.state === 'failed'")
        assert "This browser cannot run the student" in driver.find_element("id", "status").text
