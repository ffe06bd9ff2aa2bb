"""The rehearsals of Table 7: their photos, their teachers' start, and a row from end to end at the smallest size."""

import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from ibmd_cli.cli import app
from ibmd_cli.data.embedded import embedded_pairs
from ibmd_cli.models.folder import load_model, save_model
from ibmd_cli.models.model import TeacherModel
from ibmd_cli.networks.predictor import make_predictor

FOLDER = Path(__file__).parents[2] / "examples" / "rehearsals"
sys.path.insert(0, str(FOLDER))
import make_photos  # noqa: E402
import rehearse  # noqa: E402


def archive(files: dict[str, bytes], packed: bool) -> bytes:
    """Write Qt resources: the root, a folder `photos`, and files in it."""
    names, contents, nodes = b"", b"", []

    def name(text: str) -> int:
        nonlocal names
        names += struct.pack(">HI", len(text), 0) + text.encode("utf-16-be")
        return len(names) - 6 - 2 * len(text)

    nodes += [struct.pack(">IHII8x", name(""), 2, 1, 1), struct.pack(">IHII8x", name("photos"), 2, len(files), 2)]
    for path, content in files.items():
        payload = struct.pack(">I", len(content)) + zlib.compress(content) if packed else content
        nodes.append(struct.pack(">IHHHI8x", name(path), packed, 0, 0, len(contents)))
        contents += struct.pack(">I", len(payload)) + payload
    tree = b"".join(nodes)
    head = struct.pack(">4s4I", b"qres", 3, 20, 20 + len(tree), 20 + len(tree) + len(contents))
    return head + tree + contents + names


@pytest.mark.parametrize("packed", [False, True])
def test_archives_of_qt_are_read(tmp_path: Path, packed: bool):
    files = {"README": b"notes", "größe.webp": bytes(300)}
    file = tmp_path / "x.rcc"
    file.write_bytes(archive(files, packed))
    assert dict(make_photos.read_rcc(file)) == {f"photos/{name}": content for name, content in files.items()}


def test_normals_of_a_slope_are_those_of_its_plane():
    across, down = 0.01, -0.02  # of brightness in [-1, 1], a pixel
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    found = make_photos.normals((across * x + down * y).expand(1, 3, 16, 16))[..., 1:-1, 1:-1]
    plane = torch.tensor([-across * make_photos.RELIEF / 2, -down * make_photos.RELIEF / 2, 1.0])
    assert torch.allclose(found, (plane / plane.norm())[None, :, None, None].expand_as(found), atol=1e-6)


def test_every_photo_is_named_with_author_and_licence():
    readme = "Copyright: A\nLicense: CC0-1.0\nSource: https://a\nFiles:\na.webp\n\nCopyright: B\nFiles: b.webp"
    assert make_photos.attribution(readme, "x/a.webp") == "a.webp: A, CC0-1.0, https://a"
    assert make_photos.attribution(readme, "x/b.webp") == "b.webp: B, ?, gcompris-qt-data"


def test_a_teacher_starts_as_the_one_that_it_starts_from(tmp_path: Path):
    config = rehearse.describe("i2sb-inpaint-center", 4)
    predictor = make_predictor(config).eval()
    torch.nn.init.normal_(predictor.backbone.out[2].weight)
    save_model(TeacherModel(predictor, config), tmp_path / "start")
    wider = make_predictor(rehearse.describe("dbim-imagenet-inpaint-center", 4)).eval()
    torch.nn.init.zeros_(wider.backbone.label_emb.weight)
    rehearse.start_from(wider, tmp_path / "start")
    x, other, c_noise = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32), torch.tensor([1.0, 500.0])
    with torch.no_grad():
        want = predictor.backbone(x, c_noise)
        found = wider.backbone(torch.cat([x, other], dim=1), c_noise, torch.tensor([0, 1]))
    assert torch.allclose(found, want, atol=1e-5)


def test_a_teacher_of_ones_own_takes_the_settings_of_a_preset(tiny_teacher: Path, drawings: Path):
    plan = ["distill", "--teacher", tiny_teacher, "--preset", "ddbm-diode", "--data", drawings, "--dry-run", "--json"]
    for nfe, steps in ((1, 3700), (2, 500)):
        result = CliRunner().invoke(app, [*map(str, plan), "--nfe", str(nfe)])
        assert result.exit_code == 0, result.output
        settings = json.loads(result.stdout)["settings"]
        assert (settings["steps"], settings["lr"], settings["batch_size"]) == (steps, 1e-5, 256)


@pytest.mark.slow
def test_a_row_runs_from_end_to_end(tmp_path: Path):
    _, _, x_0 = embedded_pairs()
    for split, first in (("train", 0), ("test", 24)):
        for i, pixels in enumerate(x_0[first : first + 24]):
            file = tmp_path / "photos" / split / f"class{i % 2}" / f"photo{i // 4}-00-{i % 4:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(file)
    row, out = "dbim-imagenet-inpaint-center-4step", tmp_path / "out"
    settings = ["--data", tmp_path, "--out", out, "--scale", 0, "--per-photo", 2, "--threads", 1]
    for _ in range(2):  # the second time, there is nothing left to do but the table
        done = subprocess.run(
            [sys.executable, FOLDER / "rehearse.py", row, *map(str, settings)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert f"| {row} | 1 |" in done.stdout
    student = load_model(str(out / row), "student")
    assert (student.nfe, student.config["classes"], student.config["mask"]) == (4, 2, {"fill": "zero"})
    assert student.config["training"]["bridge_steps"] == 1  # of the preset
    (result,) = json.loads((out / "results.json").read_text())
    assert result["squares"] == 2 * result["photos"]
    assert (out / "results.png").is_file()
