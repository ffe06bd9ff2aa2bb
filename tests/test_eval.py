"""`ibmd eval` end to end on a few embedded drawings, its refusals, and the mosaics that it reads."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from ibmd_cli.cli import app, main
from ibmd_cli.errors import IbmdError, NotAvailable, UsageError
from ibmd_cli.models import assets, load_model, save_model
from ibmd_cli.mosaics import embedded_pairs, embedded_sources, labelled_grid

SCORES = ("energy_score", "kid_efflite0", "efflite0_distance", "psnr", "diversity")


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, ["eval", "--device", "cpu", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def write_pairs(folder: Path, n: int) -> Path:
    names, x_T, x_0 = embedded_pairs()
    for side, images in (("source", x_T), ("target", x_0)):
        (folder / side).mkdir(parents=True)
        for name, image in list(zip(names, images, strict=True))[:n]:
            Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(folder / side / f"{name}.png")
    return folder


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "pairs", 12)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """Results of a small run, and its folder."""
    folder = tmp_path_factory.mktemp("eval")
    data, out = write_pairs(folder / "pairs", 12), folder / "out"
    nfe = ["--teacher-nfe", 2, "--teacher-nfe", 1, "--teacher-nfe", 3]
    result = run("--data", data, *nfe, "--samples", 2, "--out", out, "--json")
    return json.loads(result.stdout), out


# --------------------------------------------------------------------------------------------------------- results


def test_results_have_their_schema(evaluated: tuple[dict, Path]):
    results, out = evaluated
    assert results["schema"] == 1
    assert json.loads((out / "results.json").read_text()) == results
    assert [(row["model"], row["nfe"]) for row in results["rows"]] == [
        ("student", load_model("builtin:outline2emoji", "student").nfe),
        *(("teacher", nfe) for nfe in (1, 2, 3)),
    ]
    for row in results["rows"]:
        for name in SCORES:
            assert row[name]["low"] <= row[name]["value"] <= row[name]["high"], (row["nfe"], name)
            assert "n=12 pairs" in results["protocol"][name]
        assert row["ms_per_image"] > 0
        assert len(row["sha256"]) == 64
    assert results["rows"][1]["samples"] == 1  # the teacher in one call has no randomness
    assert results["rows"][1]["diversity"]["value"] == 0
    assert results["rows"][2]["diversity"]["value"] > 0
    assert results["floor"]["kid_efflite0"]["images"] == 6
    assert results["settings"]["images"] == 12


def test_differences_are_those_of_the_rows(evaluated: tuple[dict, Path]):
    results, _ = evaluated
    student, *teachers = results["rows"]
    for teacher, gap in zip(teachers, results["differences"], strict=True):
        assert gap["teacher_nfe"] == teacher["nfe"]
        for name in SCORES:
            assert gap[name]["value"] == pytest.approx(student[name]["value"] - teacher[name]["value"], abs=1e-6)
        assert gap["speed_up"] == pytest.approx(teacher["ms_per_image"] / student["ms_per_image"])
    assert results["differences"][0]["diversity_ratio"] is None


def test_grid_shows_sources_first_and_truth_last(evaluated: tuple[dict, Path]):
    picture = np.array(Image.open(evaluated[1] / "grid.png"))
    _, x_T, x_0 = embedded_pairs()
    step = 96 + 4
    assert len(picture) == 4 + 5 * step  # source, teacher at 1 and at 3 NFE, student, truth
    last = slice(-step, -4)  # the twelfth pair
    assert np.array_equal(picture[4:100:3, last][:, ::3], x_T[11].permute(1, 2, 0).numpy())
    assert np.array_equal(picture[-step:-4:3, last][:, ::3], x_0[11].permute(1, 2, 0).numpy())


def test_batch_size_changes_nothing_but_time(evaluated: tuple[dict, Path], pairs: Path):
    other = json.loads(run("--data", pairs, "--teacher-nfe", 2, "--samples", 2, "--batch-size", 5, "--json").stdout)
    assert other["settings"]["batch_size"] == 4
    rows = {(row["model"], row["nfe"]): row for row in evaluated[0]["rows"]}
    for row in other["rows"]:
        for name in SCORES:
            same = rows[row["model"], row["nfe"]][name]
            # convolutions sum in another order for another batch: single pixels may round to the next level
            assert row[name] == pytest.approx(same, rel=2e-3, abs=2e-4), name


def test_table_is_plain_off_a_terminal(pairs: Path):
    result = run("--data", pairs, "--teacher-nfe", 1, "--samples", 2)
    assert "\x1b" not in result.stdout
    for text in ("student", "teacher", "kid_efflite0", "efflite0_", "halves of 6", "1 NFE", "faster"):
        assert text in result.stdout
    assert "FID" not in result.stdout
    assert "evaluating on 12 pairs" in result.stderr


def test_student_or_teacher_alone(pairs: Path):
    common = ["--data", pairs, "--samples", 2, "--json", "--quiet"]
    alone = run(*common, "--teacher", "none")
    assert [row["model"] for row in json.loads(alone.stdout)["rows"]] == ["student"]
    assert json.loads(alone.stdout)["differences"] == []
    assert alone.stderr == ""
    alone = run(*common, "--student", "none", "--teacher-nfe", 2)
    assert [(row["model"], row["nfe"]) for row in json.loads(alone.stdout)["rows"]] == [("teacher", 2)]


# -------------------------------------------------------------------------------------------------------- refusals


def test_existing_output_is_refused(pairs: Path):
    with pytest.raises(IbmdError, match=r"exists and is not an empty folder; give another --out"):
        run("--data", pairs, "--out", pairs)
    with pytest.raises(IbmdError, match="--out"):
        run("--data", pairs, "--out", next((pairs / "source").iterdir()))


def test_pairs_without_partner_are_listed(pairs: Path):
    files = sorted((pairs / "source").iterdir())
    files[0].unlink()
    shutil.move(files[1], files[1].with_name("new.png"))
    with pytest.raises(IbmdError, match=rf"source/new\.png, target/{files[0].name}, target/{files[1].name}"):
        run("--data", pairs)


def test_too_few_pairs_are_refused_with_the_number_needed(tmp_path: Path):
    with pytest.raises(IbmdError, match=r"9 pairs are too few for kid_efflite0: 10 are needed"):
        run("--data", write_pairs(tmp_path / "few", 9))


def test_sizes_must_agree(pairs: Path):
    file = sorted((pairs / "target").iterdir())[3]
    Image.open(file).resize((40, 32)).save(file)
    with pytest.raises(IbmdError, match=rf"target/{file.name} is of 40×32, others of 32×32"):
        run("--data", pairs)


def test_images_must_be_of_the_models_size(pairs: Path):
    for file in pairs.rglob("*.png"):
        Image.open(file).resize((64, 64)).save(file)
    with pytest.raises(IbmdError, match=r"images of 64×64, but the model is for 32×32"):
        run("--data", pairs)


def test_models_must_be_of_one_size(tiny_teacher: Path):
    with pytest.raises(IbmdError, match=r"for images of 16×16, the student for 32×32"):
        run("--teacher", tiny_teacher)


def test_absent_things_are_named(tmp_path: Path):
    with pytest.raises(NotAvailable, match=r"builtin:outline2emoji"):
        run("--data", "builtin:outline2emojis")
    with pytest.raises(NotAvailable, match=r"expected source/ and target/"):
        run("--data", tmp_path)
    student = load_model("builtin:outline2emoji", "student")
    student.config["teacher"]["reference"] = str(tmp_path / "gone")
    save_model(student, tmp_path / "student")
    with pytest.raises(NotAvailable, match=r"name it with --teacher"):
        run("--student", tmp_path / "student")


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["--samples", 1], "--samples 1"),
        (["--teacher-nfe", 0], "--teacher-nfe 0"),
        (["--batch-size", 0], "--batch-size 0"),
        (["--student", "none", "--teacher", "none"], "--student none --teacher none"),
        (["--device", "abacus"], "--device 'abacus'"),
    ],
)
def test_settings_that_cannot_be_meant(arguments: list, flag: str):
    with pytest.raises(UsageError, match=flag):
        run(*arguments)


def test_damaged_weights_are_noticed(tmp_path: Path, pairs: Path):
    student = load_model("builtin:outline2emoji", "student")
    with torch.no_grad():
        next(student.predictor.parameters()).fill_(torch.nan)
    save_model(student, tmp_path / "student")
    with pytest.raises(IbmdError, match=r"student: its output is not finite"):
        run("--student", tmp_path / "student", "--teacher", "none", "--data", pairs)


def test_missing_extra_is_one_line_and_exit_4(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    monkeypatch.setattr(sys, "argv", ["ibmd", "eval"])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "pip install 'ibmd-cli[eval]'" in err


# --------------------------------------------------------------------------------------------------------- mosaics


def test_embedded_pairs_are_the_tiles_of_the_mosaics():
    names, x_T, x_0 = embedded_pairs()
    assert x_T.shape == x_0.shape == (len(names), 3, 32, 32)
    assert x_T.dtype == x_0.dtype == torch.uint8
    mosaic = np.array(Image.open(assets() / "outline2emoji" / "test-targets.png"))
    assert np.array_equal(x_0[66].permute(1, 2, 0), mosaic[32:64, 64:96])  # 64 columns: row 1, column 2
    lines = x_T[:, 0] < 40  # where the drawing is black, so is the coloured version
    assert (x_0.float().mean(1)[lines] < 90).float().mean() > 0.95


def test_embedded_sources_do_not_hold_test_drawings():
    sources = embedded_sources()
    index = json.loads((assets() / "outline2emoji" / "pairs.json").read_text())
    assert sources.shape == (index["sources"]["variants"] * len(index["sources"]["names"]), 3, 32, 32)
    assert not set(index["sources"]["names"]) & set(index["test"]["names"])
    seen = {x.numpy().tobytes() for x in sources[:, 0]}
    assert not any(x.numpy().tobytes() in seen for x in embedded_pairs().x_T[:, 0])


def test_labelled_grid_of_large_images_is_not_enlarged():
    rows = {"a": torch.zeros(2, 3, 128, 128, dtype=torch.uint8), "longer": torch.zeros(2, 3, 128, 128).byte()}
    picture = labelled_grid(rows)
    assert picture.height == 4 + 2 * 132
    assert picture.width > 2 * 132
