"""`ibmd eval` end to end on a few embedded drawings, its refusals, and the mosaics that it reads."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from parity.measuring import images as ruled_images
from parity.measuring import rule, shapes_of
from PIL import Image
from typer.testing import CliRunner, Result

from ibmd_cli.cli import app, main
from ibmd_cli.data.degradations import degrade
from ibmd_cli.data.embedded import embedded_pairs, embedded_sources
from ibmd_cli.data.pairs import batches, floats, open_pairs
from ibmd_cli.errors import IbmdError, NotAvailable, UsageError
from ibmd_cli.evaluation.fid_reference import read_reference
from ibmd_cli.evaluation.measure import Measurement, _compare_seen
from ibmd_cli.evaluation.protocols import cautions, protocols
from ibmd_cli.files import assets, sha256
from ibmd_cli.images.grids import labelled_grid
from ibmd_cli.method.noise import randn, stream
from ibmd_cli.metrics import weights
from ibmd_cli.metrics.classifiers import InceptionV3
from ibmd_cli.metrics.distances import frechet, inception_score, kid_terms, moments
from ibmd_cli.metrics.features import Inception, Network, Seen
from ibmd_cli.metrics.scores import DEFAULT, METRICS
from ibmd_cli.models.folder import load_model, load_student, save_model
from ibmd_cli.models.model import TeacherModel
from ibmd_cli.networks.predictor import make_predictor
from ibmd_cli.reporting import Reporter


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
    nfe = ["--teacher-nfe", 2, "--teacher-nfe", "1,3"]
    result = run("--data", data, *nfe, "--samples", 2, "--out", out, "--json")
    return json.loads(result.stdout), out


def test_notes_of_images_are_counted_and_said_once_per_kind(tmp_path: Path):
    pairs = write_pairs(tmp_path / "pairs", 3)
    files = [file for side in ("source", "target") for file in sorted((pairs / side).iterdir())]
    for file in files[1:]:
        with Image.open(file) as image:
            image.load()
            image.save(file, icc_profile=b"no profile")
    told = run("--data", pairs.as_uri(), "--teacher", "none", "--metric", "psnr").stderr
    note = f"--data: {files[3]} and 4 others: its colour profile is ignored (damaged profile)"
    assert told.replace("\n", " ").count(note) == 1


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
        for name in DEFAULT:
            assert row[name]["low"] <= row[name]["value"] <= row[name]["high"], (row["nfe"], name)
            assert "n=12 pairs" in results["protocol"][name]
            assert row[name].keys() == {"value", "low", "high"}
        assert row["ms_per_image"] > 0
        assert row["images_per_second"] == pytest.approx(1000 / row["ms_per_image"])
        assert row["peak_mib"] >= row["parameters"] * 4 / 2**20
        assert len(row["sha256"]) == 64
    assert results["rows"][1]["samples"] == 1  # the teacher in one call has no randomness
    assert results["rows"][1]["diversity"]["value"] == 0
    assert results["rows"][2]["diversity"]["value"] > 0
    assert results["floor"]["kid_efflite0"]["images"] == 6
    assert results["floor"]["psnr"]["kind"] == "unrelated"
    assert results["floor"]["psnr"]["value"] < min(row["psnr"]["value"] for row in results["rows"])
    assert results["settings"]["images"] == 12
    assert list(results["metrics"]) == [name for name in METRICS if name in DEFAULT]
    assert all(metric["not_comparable"] for metric in results["metrics"].values())
    assert not (out / "parts").exists()


def test_differences_are_those_of_the_rows(evaluated: tuple[dict, Path]):
    results, _ = evaluated
    student, *teachers = results["rows"]
    for teacher, gap in zip(teachers, results["differences"], strict=True):
        assert gap["teacher_nfe"] == teacher["nfe"]
        assert (gap["row"], results["rows"][gap["against"]]) == (0, teacher)
        for name in DEFAULT:
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


def test_pictures_and_scores_of_images_belong_together(evaluated: tuple[dict, Path]):
    results, out = evaluated
    with (out / "scores.csv").open(newline="") as file:
        scores = {line["name"]: line for line in csv.DictReader(file)}
    assert len(scores) == 12
    by = f"0.{results['shown_by']}"
    assert by == "0.stlpips_alex"
    names, x_T, x_0 = embedded_pairs()
    order = sorted(scores, key=lambda name: float(scores[name][by]))
    for why, expected in (("best", order[:6]), ("worst", order[::-1][:6])):
        shown = [image for image in results["shown"] if image["why"] == why]
        assert [image["name"] for image in shown] == expected
        for image in shown:
            assert image["score"] == pytest.approx(float(scores[image["name"]][by]), rel=1e-4)
            row = names.index(image["name"].removesuffix(".png"))
            for kind, truth in (("source", x_T), ("truth", x_0)):
                assert np.array_equal(np.array(Image.open(out / image[kind])), truth[row].permute(1, 2, 0))
            assert [len(files) for files in image["rows"]] == [row["samples"] for row in results["rows"]]
            for file in image["rows"][0]:
                assert np.array(Image.open(out / file)).shape == (32, 32, 3)
    for k, row in enumerate(results["rows"]):
        mean = np.mean([float(line[f"{k}.psnr"]) for line in scores.values()])
        assert mean == pytest.approx(row["psnr"]["value"], rel=1e-4)


def test_best_and_worst_images_are_shown_with_one_draw(tmp_path: Path):
    data, out = write_pairs(tmp_path / os.fsdecode(b"pairs\xff"), 14), tmp_path / "out"
    first = sorted((data / "source").iterdir())[0].name
    hostile = os.fsdecode(b"0\xff\n.png")  # not UTF-8, two lines
    for side in ("source", "target"):
        (data / side / first).rename(data / side / hostile)
    results = json.loads(run("--data", data, "--teacher", "none", "--metric", "psnr", "--out", out, "--json").stdout)
    assert results["shown_by"] == "psnr"
    assert results["settings"]["data"] == rf"{tmp_path}/pairs\xff"
    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == results
    assert r"pairs\xff" in (out / "report.html").read_text(encoding="utf-8")
    even = {image["name"] for image in results["shown"] if image["why"] == "even"}
    assert len(even) == 12
    assert r"0\xff\n.png" in even
    with (out / "scores.csv").open(newline="", encoding="utf-8") as file:
        names = [line["name"] for line in csv.DictReader(file)]
    assert len(names) == 14
    assert even < set(names)
    extremes = [image for image in results["shown"] if image["why"] != "even"]
    assert [image["score"] for image in extremes[:6]] == sorted((i["score"] for i in extremes[:6]), reverse=True)
    assert min(i["score"] for i in extremes[:6]) >= max(i["score"] for i in extremes[6:])
    for image in results["shown"]:
        assert len(image["rows"][0]) == (4 if image["name"] in even else 1)
        assert all((out / file).is_file() for file in (image["source"], image["truth"], *image["rows"][0]))


def test_two_students_and_two_seeds(pairs: Path, tmp_path: Path):
    other = load_model("builtin:outline2emoji", "student")
    with torch.no_grad():
        for p in other.predictor.parameters():
            p.mul_(0.99)
    save_model(other, tmp_path / "other")
    common = ["--data", pairs, "--samples", 2, "--teacher-nfe", 1, "--metric", "psnr, diversity", "--json"]
    both = ["--student", "builtin:outline2emoji", "--student", tmp_path / "other"]
    results = json.loads(run(*common, *both, "--seeds", 2).stdout)
    assert [row["label"] for row in results["rows"]] == ["student A", "student B", "teacher"]
    assert [(gap["row"], gap["against"]) for gap in results["differences"]] == [(0, 2), (1, 2), (0, 1)]
    a, b, teacher = (row["psnr"] for row in results["rows"])
    assert results["differences"][2]["psnr"]["value"] == pytest.approx(a["value"] - b["value"], abs=1e-5)
    alone = [json.loads(run(*common, "--seed", seed).stdout)["rows"][0]["psnr"]["value"] for seed in (0, 1)]
    assert a["value"] == pytest.approx(sum(alone) / 2, rel=1e-5)  # see `same_scores`
    assert a["deviation"] == pytest.approx(abs(alone[0] - alone[1]) / 2**0.5, rel=1e-3)
    assert teacher["deviation"] == 0  # in one call it has no randomness
    with pytest.raises(UsageError, match="expected different students"):
        run(*common, *both[:2], *both[:2])


def test_batch_size_changes_nothing_but_time(evaluated: tuple[dict, Path], pairs: Path):
    other = json.loads(run("--data", pairs, "--teacher-nfe", 2, "--samples", 2, "--batch-size", 5, "--json").stdout)
    assert other["settings"]["batch_size"] == 4
    rows = {(row["model"], row["nfe"]): row for row in evaluated[0]["rows"]}
    for row in other["rows"]:
        for name in DEFAULT:
            same = rows[row["model"], row["nfe"]][name]
            # convolutions sum in another order for another batch: single pixels may round to the next level
            assert row[name] == pytest.approx(same, rel=2e-3, abs=2e-4), name


def test_table_is_plain_off_a_terminal(pairs: Path):
    result = run("--data", pairs, "--teacher-nfe", 1, "--samples", 2)
    assert "\x1b" not in result.stdout
    for text in ("student", "teacher", "kid_efflite0", "efflite0_", "halves of 6"):
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


def test_finished_evaluation_is_not_made_again(evaluated: tuple[dict, Path], pairs: Path):
    with pytest.raises(IbmdError, match="holds a finished evaluation"):
        run("--data", pairs, "--out", evaluated[1])


def test_students_of_another_teacher_are_pointed_out(pairs: Path):
    few = (
        "--data",
        pairs,
        "--teacher-nfe",
        1,
        "--samples",
        1,
        "--metric",
        "psnr",
        "--student",
        "builtin:outline2emoji",
    )
    assert "another teacher" not in run(*few).stderr
    for others in (["--teacher", "builtin:emoji-sr4x"], ["--student", "builtin:emoji-sr4x"]):
        said = " ".join(run(*few, *others).stderr.split())
        assert re.search(r"builtin:\S+ was distilled from another teacher, or other weights, than builtin:", said)


def test_pairs_without_partner_are_listed(pairs: Path):
    files = sorted((pairs / "source").iterdir())
    files[0].unlink()
    shutil.move(files[1], files[1].with_name("new.png"))
    with pytest.raises(IbmdError, match=rf"source/new\.png, target/{files[0].name}, target/{files[1].name}"):
        run("--data", pairs)


@pytest.mark.parametrize("images", [1, 2, 9])
def test_metrics_chosen_by_default_that_cannot_be_measured_are_left_out(tmp_path: Path, images: int):
    found = run("--data", write_pairs(tmp_path / "few", images), "--teacher", "none", "--samples", 1, "--json")
    results = json.loads(found.stdout)
    few = f"{images} pair{'s are' if images > 1 else ' is'} too few: 10 are needed"
    assert few in results["left_out"]["kid_efflite0"]
    assert "--samples 2" in results["left_out"]["energy_score"]
    assert not {"kid_efflite0", "energy_score", "diversity"} & results["metrics"].keys()
    assert {"psnr", "ssim"} < results["metrics"].keys()
    assert few in " ".join(found.stderr.split())
    assert "left out: energy_score, diversity: " in found.stderr  # a reason is told once
    assert f"on {images} pair" in found.stderr
    assert "1 pairs" not in found.stdout + found.stderr
    assert all((row["psnr"]["low"] is None) == (images < 5) for row in results["rows"])


@pytest.mark.parametrize(
    ("arguments", "metric", "mend"),
    [
        ([], "kid_efflite0", "give --data with more"),
        ([], "fd_efflite0", "give --data with more"),
        (["--samples", 1], "energy_score", "give --samples 2 or more"),
        (["--samples", 1], "diversity", "give --samples 2 or more"),
        ([], "resnet50_accuracy", "give --labels FILE"),
    ],
)
def test_a_metric_that_was_named_and_cannot_be_measured_is_refused(
    tmp_path: Path, arguments: list, metric: str, mend: str
):
    data = write_pairs(tmp_path / "few", 9)
    with pytest.raises(IbmdError, match=rf"^--metric {metric}: .*{mend}.*; or leave {metric} out$"):
        run("--data", data, "--teacher", "none", *arguments, "--metric", f"psnr,{metric}")


@pytest.mark.parametrize("empty", [("source", "target"), ("source",), ("target",)])
def test_empty_folders_are_named(pairs: Path, empty: tuple[str, ...]):
    for side in empty:
        shutil.rmtree(pairs / side)
        (pairs / side).mkdir()
    with pytest.raises(NotAvailable, match=rf"no images in {pairs / empty[0]}"):
        run("--data", pairs)


def test_pairs_of_other_formats_are_found_by_their_stems(pairs: Path):
    files = sorted((pairs / "target").iterdir())
    for file in files[:6]:
        Image.open(file).save(file.with_suffix(".bmp"))
        file.unlink()
    few = ["--teacher", "none", "--samples", 2, "--metric", "psnr", "--json"]
    assert json.loads(run("--data", pairs, *few).stdout)["settings"]["images"] == 12
    source = pairs / "source" / files[0].name
    Image.open(source).save(source.with_suffix(".webp"))  # which of the two is meant?
    with pytest.raises(IbmdError, match=rf"no partner of equal name for source/{files[0].name}, source/"):
        run("--data", pairs, *few)


@pytest.mark.parametrize("spelling", ["{}/", "{}/.", "./{}", "{}/../student", "{}/student"])
def test_one_student_in_two_spellings_is_one(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    save_model(load_student("builtin:outline2emoji"), folder / "student")
    if spelling == "{}/student":
        (folder / "config.json").write_text("{}")  # a run folder, which its student stands for
    else:
        folder = folder / "student"
    first = str(folder.relative_to(tmp_path))
    with pytest.raises(UsageError, match="expected different students"):
        run("--data", pairs, "--student", first, "--student", spelling.format(*[first] * spelling.count("{}")))


def test_copies_of_a_student_are_compared(tmp_path: Path, pairs: Path):
    for name in ("a", "b"):
        save_model(load_student("builtin:outline2emoji"), tmp_path / name)
    both = ["--student", tmp_path / "a", "--student", tmp_path / "b", "--teacher", "none", "--metric", "psnr"]
    results = json.loads(run("--data", pairs, *both, "--samples", 3, "--json").stdout)
    a, b = results["rows"]
    assert a["psnr"]["value"] == pytest.approx(b["psnr"]["value"], abs=1e-4)
    gap = results["differences"][0]
    assert gap["speed_up_range"][0] <= gap["speed_up"] <= gap["speed_up_range"][1]


@pytest.mark.parametrize("out", ["/proc/x", "/proc/x/y", "FILE/x"])
def test_a_folder_that_cannot_be_made_is_named_before_any_work(pairs: Path, tmp_path: Path, out: str):
    (tmp_path / "FILE").write_text("")
    out = out.replace("FILE", str(tmp_path / "FILE"))
    there = out.rpartition("/x")[0]
    with pytest.raises(IbmdError, match=f"^--out {out}: nothing can be written in {there}") as caught:
        run("--data", pairs, "--student", tmp_path / "gone", "--out", out)
    assert "No such file" not in str(caught.value)
    assert "give another --out" in str(caught.value)


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("LINK", "LINK is a link to nothing"),
        ("LINK/x", "LINK is a link to nothing"),
        ("x" * 300, "nothing can be written in TMP .*too long"),
        ("a/" + "x" * 300, "nothing can be written in TMP .*too long"),
        ("FILE", "nothing can be written in FILE"),
    ],
)
def test_a_name_that_no_folder_can_have_is_refused_before_any_work(pairs: Path, tmp_path: Path, out: str, words: str):
    (tmp_path / "FILE").write_text("")
    (tmp_path / "LINK").symlink_to(tmp_path / "nowhere")
    words = words.replace("TMP", str(tmp_path)).replace("LINK", f"{tmp_path}/LINK").replace("FILE", f"{tmp_path}/FILE")
    with pytest.raises(IbmdError, match=rf"^--out .*: {words}.*; give another --out$"):
        run("--data", pairs, "--student", tmp_path / "gone", "--out", tmp_path / out)
    assert {path.name for path in tmp_path.iterdir()} == {"FILE", "LINK", "pairs"}


@pytest.mark.parametrize("out", ["source/report", "target/a/b", "link/report", "source/../target"])
def test_a_report_among_the_images_that_are_read_is_refused(pairs: Path, out: str):
    """They would be taken for pairs the next time."""
    (pairs / "link").symlink_to(pairs / "source")
    with pytest.raises(IbmdError, match=rf"^--out {pairs / out}: "):
        run("--data", pairs, "--out", pairs / out)
    with pytest.raises(IbmdError, match=r"whose images are read; give another --out"):
        run("--data", pairs / "target", "--degrade", "jpeg-10", "--out", pairs / "target" / "report")
    with pytest.raises(IbmdError, match=r"whose images are read; give another --out"):
        run("--metric", "fid", "--reference", pairs / "target", "--out", pairs / "target" / "report")
    assert not any(path.is_dir() for side in ("source", "target") for path in (pairs / side).iterdir())


def test_sizes_must_agree(pairs: Path):
    file = sorted((pairs / "target").iterdir())[3]
    Image.open(file).resize((40, 32)).save(file)
    with pytest.raises(IbmdError, match=rf"target/{file.name}: 40×32, but the model is for 32×32: --fit crop"):
        run("--data", pairs)
    few = ["--teacher", "none", "--samples", 2, "--metric", "psnr", "--json"]
    assert json.loads(run("--data", pairs, "--fit", "crop", *few).stdout)["settings"]["images"] == 12


def test_images_must_be_of_the_models_size(pairs: Path):
    for file in pairs.rglob("*.png"):
        Image.open(file).resize((64, 64)).save(file)
    with pytest.raises(IbmdError, match=r"64×64, but the model is for 32×32"):
        run("--data", pairs)


def test_models_must_be_of_one_size(tiny_teacher: Path):
    with pytest.raises(IbmdError, match=r"for images of 16×16, student for 32×32"):
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
        (["--samples", 0], "--samples 0"),
        (["--seeds", 0], "--seeds 0"),
        (["--metric", "psnrr"], "--metric psnrr: no such metric: nearest: psnr"),
        (["--metric", "PSNR"], "--metric PSNR: no such metric: nearest: psnr$"),
        (["--metric", "Kid"], "--metric Kid: no such metric: nearest: kid$"),
        (["--metric", "psnr,,ssim"], "--metric psnr,,ssim: an empty name"),
        (["--metric", ""], "--metric : an empty name"),
        (["--metric", "all"], "--metric all: no such metric: expected one of: energy_score, .*psnr"),
        (["--protocol", "I2SB-SR"], "--protocol I2SB-SR: no such protocol: nearest: i2sb-sr$"),
        (["--protocol", "ddbm"], "--protocol ddbm: no such protocol: nearest: ddbm-"),
        (["--teacher-nfe", 0], "--teacher-nfe 0"),
        (["--teacher-nfe", "1,five"], "--teacher-nfe 1,five: expected whole numbers of at least 1"),
        (["--teacher-nfe", "1,"], "--teacher-nfe 1,: expected whole numbers"),
        (["--metric", "psnr,ssimm"], "--metric ssimm: no such metric: nearest: ssim"),
        (["--batch-size", 0], "--batch-size 0"),
        (["--student", ""], "--student '': an empty name"),
        (["--student", "builtin:outline2emoji", "--student", ""], "--student '': an empty name"),
        (["--teacher", ""], "--teacher '': an empty name"),
        (["--data", ""], "--data '': an empty name"),
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


def test_a_missing_extra_is_told_and_refused_where_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pairs: Path
):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    found = run("--data", pairs, "--teacher", "none", "--samples", 2, "--json")
    assert "left out: kid_efflite0, efflite0_distance: " in found.stderr
    assert "pip install 'ibmd-cli[eval]'" in found.stderr
    assert "psnr" in json.loads(found.stdout)["metrics"]
    monkeypatch.setattr(sys, "argv", ["ibmd", "eval", "--data", str(pairs), "--metric", "kid_efflite0"])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "pip install 'ibmd-cli[eval]'" in err


# ------------------------------------------------------------------------------------- interruption, several processes


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "ibmd_cli", "eval", "--device", "cpu", "--quiet", *map(str, arguments)]


FEW = ["--teacher-nfe", 10, "--samples", 2, "--batch-size", 2, "--metric", "kid_efflite0,psnr"]
KILLED = """
import os, signal
from ibmd_cli.evaluation import measure
from ibmd_cli.cli import main

write, files = measure.save_file, []

def save_file(tensors, file, metadata):
    write(tensors, file, metadata)
    files.append(file)
    if len(files) == 3:  # which has not got its name yet
        os.kill(os.getpid(), signal.SIGKILL)

measure.save_file = save_file
main()
"""


def same_scores(some: dict, others: dict) -> None:
    """A convolution's last bits differ with where its memory lies: features by 1e-6, a rare pixel by a grey level."""
    for ours, theirs in zip(some["rows"], others["rows"], strict=True):
        for metric, tolerance in (("psnr", 1e-4), ("kid_efflite0", 1e-5)):
            for figure in ("value", "low", "high"):
                assert ours[metric][figure] == pytest.approx(theirs[metric][figure], rel=tolerance, abs=tolerance)


@pytest.mark.slow
def test_interrupted_evaluation_continues_to_the_same_scores(pairs: Path, tmp_path: Path):
    out = tmp_path / "out"
    arguments = ["--data", pairs, *FEW]
    _, _, _, *words = command(*arguments, "--out", out)
    assert subprocess.run([sys.executable, "-c", KILLED, *words]).returncode == -signal.SIGKILL
    kept = {file: file.stat().st_mtime_ns for file in out.glob("parts/0*.safetensors")}
    assert len(kept) == 2
    assert len(list(out.glob("parts/.*"))) == 1  # half a part, which is not taken for one
    with pytest.raises(IbmdError, match="a part of another evaluation: --seed 0 before, 1 now"):
        run(*arguments, "--seed", 1, "--out", out)
    assert {file: file.stat().st_mtime_ns for file in out.glob("parts/0*.safetensors")} == kept
    min(kept).write_bytes(b"damaged: is measured again")
    result = run(*arguments, "--out", out)
    assert "2 pairs measured before: continuing" in result.stderr
    whole = json.loads(run(*arguments, "--json").stdout)
    continued = json.loads((out / "results.json").read_text())
    same_scores(continued, whole)
    assert not (out / "parts").exists()


@pytest.mark.slow
def test_processes_share_the_work(pairs: Path, tmp_path: Path):
    arguments = ["--data", pairs, *FEW]
    done = subprocess.run(command(*arguments, "--processes", 2, "--out", tmp_path / "out"), capture_output=True)
    assert done.returncode == 0, done.stderr
    shared = json.loads((tmp_path / "out" / "results.json").read_text())
    alone = json.loads(run(*arguments, "--json").stdout)
    assert shared["settings"]["processes"] == 2
    same_scores(shared, alone)


def test_processes_need_a_folder(pairs: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="several processes need --out"):
        run("--data", pairs)


# ------------------------------------------------------------------------------------- protocols, weights, references


def test_protocols_follow_their_facts():
    table = protocols()
    assert set(table) == {"ddbm-e2h", "ddbm-diode", "dbim-inpaint", "i2sb-sr", "i2sb-restore"}
    for protocol in table.values():
        assert set(protocol.metrics) <= set(METRICS)
        assert protocol.uint8 == "truncate"
    assert {name: p.inception for name, p in table.items()}["ddbm-e2h"] == "tensorflow"
    assert table["i2sb-sr"].images == 50_000


def test_a_figure_is_comparable_only_if_all_is_as_published():
    e2h = protocols()["ddbm-e2h"]
    right = {"images": 138_567, "size": 64, "samples": 1, "reference": Path("edges2handbags_ref_64_data.npz")}
    names = ["fid", "lpips_vgg", "psnr", "kid_efflite0"]
    found = cautions(names, e2h, **right)
    assert found["fid"] is found["lpips_vgg"] is None
    assert found["psnr"] == "ddbm-e2h does not measure it"
    assert "network" in found["kid_efflite0"]
    for key, value, reason in (
        ("images", 50_000, "50,000 images, ddbm-e2h has 138,567"),
        ("size", 32, "32 pixels, ddbm-e2h has 64"),
        ("samples", 4, "4 samples"),
        ("reference", None, "reference these targets, expected edges2handbags_ref_64_data.npz"),
    ):
        assert reason in cautions(names, e2h, **{**right, key: value})["fid"]
    assert cautions(["lpips_vgg"], e2h, **{**right, "reference": None})["lpips_vgg"] is None
    assert "no --protocol" in cautions(["fid"], None, **right)["fid"]


def test_protocol_reads_pairs_side_by_side_and_says_what_it_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    names, x_T, x_0 = embedded_pairs()
    for name, a, b in list(zip(names, x_T, x_0, strict=True))[:12]:
        both = torch.cat([a, b], dim=2).permute(1, 2, 0).contiguous()
        (tmp_path / "ab").mkdir(exist_ok=True)
        Image.fromarray(both.numpy()).save(tmp_path / "ab" / f"{name}.png")
    found = run("--data", tmp_path / "ab", "--protocol", "ddbm-e2h", "--teacher", "none", "--json")
    results = json.loads(found.stdout)
    assert list(results["metrics"]) == ["mse"]
    assert results["left_out"]["fid"] == "12 pairs are too few: 2049 are needed, give --data with more"
    assert "fetch https://download.pytorch.org/models/vgg16-397923af.pth" in results["left_out"]["lpips_vgg"]
    assert found.stderr.count("left out: ") == 3
    assert "12 images, ddbm-e2h has 138,567" in results["metrics"]["mse"]["not_comparable"]
    assert "truncated" in results["protocol"]["mse"]
    assert "enlargement to 224" in results["protocol"]["mse"]
    with pytest.raises(IbmdError, match="--metric fid: 12 pairs are too few: 2049 are needed"):
        run("--data", tmp_path / "ab", "--protocol", "ddbm-e2h", "--metric", "fid")
    with pytest.raises(NotAvailable, match="--metric lpips_vgg: no weights of VGG16 here"):
        run("--data", tmp_path / "ab", "--protocol", "ddbm-e2h", "--metric", "lpips_vgg")


def test_sources_are_made_of_clean_images_as_asked(pairs: Path):
    config = load_model("builtin:outline2emoji", "student").config
    options = {"masks": "", "labels": "", "layout": "", "fit": "none", "seed": 0}
    made = open_pairs(str(pairs / "target"), config, degrade="jpeg-10", **options)
    batch = made.read([3, 4])
    assert torch.equal(batch.sources.x_T, degrade(floats(batch.truth), "jpeg-10"))
    assert list(batch.names) == sorted(file.name for file in (pairs / "target").iterdir())[3:5]
    filling = {**config, "mask": {"fill": "noise"}}
    made = open_pairs(str(pairs / "target"), filling, degrade="inpaint-center", **options)
    batch, again = made.read([3, 4]), made.read([4])
    hole = batch.sources.mask.expand_as(batch.sources.x_T) > 0.5
    assert torch.equal(batch.sources.x_T[~hole], floats(batch.truth)[~hole])
    assert batch.sources.x_T[hole].std() > 0.9
    assert torch.equal(again.sources.x_T[0], batch.sources.x_T[1])  # the noise is the image's own
    for wrong, degradation in ((config, "inpaint-center"), (filling, "jpeg-10")):
        with pytest.raises(UsageError, match="fill"):
            open_pairs(str(pairs / "target"), wrong, degrade=degradation, **options)


@pytest.mark.slow
def test_inception_metrics_of_given_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """FID, KID and IS by the command are those of the features of the pictures that it shows."""
    for name in ("fid", "is"):
        monkeypatch.setitem(METRICS, name, replace(METRICS[name], needs=8))  # the weights are a rule, the images ten
    state = rule(shapes_of(InceptionV3()))
    torch.save(state, file := tmp_path / "inception.pth")
    monkeypatch.setitem(weights.FILES, "inception", weights.FILES["inception"]._replace(digest=sha256(file)[:8]))
    network = Inception(state, "0")
    names, _, x_0 = embedded_pairs()
    truth = network(x_0[10:30]).pooled
    law = moments([truth])
    np.savez(tmp_path / "reference.npz", mu=law.mean.numpy(), sigma=law.covariance.numpy())
    arguments = ["--data", write_pairs(tmp_path / "ten", 10), "--teacher", "none", "--samples", 1]
    arguments += ["--metric", "kid", "--metric", "fid", "--metric", "is", "--weights", file]
    arguments += ["--reference", tmp_path / "reference.npz", "--out", tmp_path / "out", "--json"]
    results = json.loads(run(*arguments).stdout)
    drawn = {image["name"]: image["rows"][0][0] for image in results["shown"]}
    order = sorted(range(10), key=lambda i: f"{names[i]}.png")
    x = [torch.from_numpy(np.array(Image.open(tmp_path / "out" / drawn[f"{names[i]}.png"]))) for i in order]
    seen, targets = network(torch.stack(x).permute(0, 3, 1, 2)), network(x_0[order])
    terms = kid_terms(seen.pooled[None], targets.pooled, usual=True)
    (row,) = results["rows"]
    assert row["kid"]["value"] == pytest.approx((terms.sum() - terms.trace()).item() / (10 * 9), rel=1e-3)
    assert row["fid"]["value"] == pytest.approx(frechet(moments([seen.pooled]), law), rel=1e-3)
    assert row["is"] == {"value": pytest.approx(inception_score(seen.logits), rel=1e-3), "low": None, "high": None}
    assert "reference.npz" in results["protocol"]["fid"]
    with pytest.raises(UsageError, match=r"reference.npz: is of the FID, which is not measured"):
        run(*arguments[:6], "--metric", "psnr", "--reference", tmp_path / "reference.npz")


class Means(Network):
    """Features for tests: means of the quarters of an image."""

    weights, about, at_once = "0", "means", 5

    def __call__(self, images: torch.Tensor) -> Seen:
        assert len(images) <= self.at_once
        return Seen(torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1))


def test_references_are_read_in_all_forms_and_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("IBMD_CACHE", str(tmp_path / "cache"))
    reference = ruled_images("reference", 12, 64)
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(reference):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "folder" / f"{i:02d}.png")
    pooled = torch.cat([Means()(part).pooled for part in reference.split(5)])
    expected = moments([pooled])
    arrays = {"arr_0": reference.permute(0, 2, 3, 1).numpy()}
    statistics = {"mu": expected.mean.numpy(), "sigma": expected.covariance.numpy()}
    for name, content in (("images", arrays), ("statistics", statistics), ("features", {"pool_3": pooled.numpy()})):
        np.savez(tmp_path / f"{name}.npz", **content)
    for name in ("folder", "images.npz", "statistics.npz", "features.npz"):
        found = read_reference(tmp_path / name, Means(), Reporter(quiet=True))
        assert torch.allclose(found.mean, expected.mean), name
        assert torch.allclose(found.covariance, expected.covariance), name
    assert len(list((tmp_path / "cache" / "references").iterdir())) == 2

    def never(*_: object) -> Seen:
        raise AssertionError("computed again")

    monkeypatch.setattr(Means, "__call__", never)
    for name in ("folder", "images.npz"):
        assert read_reference(tmp_path / name, Means(), Reporter(quiet=True)).images == 12
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    (tmp_path / "broken.npz").write_bytes(b"PK")
    for name, message in (
        ("other.npz", r"holds x: expected mu and sigma"),
        ("broken.npz", r"cannot be read"),
        ("gone", r"no such file or folder"),
    ):
        with pytest.raises(IbmdError, match=message):
            read_reference(tmp_path / name, Means(), Reporter(quiet=True))


def test_teacher_that_fills_holes_of_classes(tmp_path: Path, tiny_config: dict):
    """Clean images in folders of classes, a hole in each, the class and the mask to the teacher."""
    tiny_config |= {"mask": {"fill": "zero"}, "classes": 2}
    tiny_config["network"]["num_classes"] = 2
    predictor = make_predictor(tiny_config).eval()
    with torch.no_grad():
        for name, p in predictor.named_parameters():
            p.copy_(0.3 * randn(p.shape, stream(0, name)))
    save_model(TeacherModel(predictor, tiny_config), tmp_path / "teacher")
    for i, image in enumerate(embedded_pairs().x_0[:10]):
        (tmp_path / "data" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        file = tmp_path / "data" / str(i % 2) / f"{i}.png"
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file)
    arguments = ["--student", "none", "--teacher", tmp_path / "teacher", "--teacher-nfe", 2, "--samples", 2]
    arguments += ["--data", tmp_path / "data", "--metric", "psnr"]
    out = tmp_path / "out"
    results = json.loads(run(*arguments, "--degrade", "inpaint-center", "--out", out, "--json").stdout)
    assert results["settings"]["degrade"] == "inpaint-center"
    shown = results["shown"][3]
    truth, drawn = (np.array(Image.open(out / file)).astype(int) for file in (shown["truth"], shown["rows"][0][0]))
    assert truth.shape == (16, 16, 3)
    inside = np.zeros((16, 16), dtype=bool)
    inside[4:12, 4:12] = True
    assert np.array_equal(drawn[~inside], truth[~inside])
    assert not np.array_equal(drawn[inside], truth[inside])
    with pytest.raises(UsageError, match=r"fills holes: give clean images and --degrade inpaint-"):
        run(*arguments)


class Brightness(Network):
    """A classifier for tests: class 1 if an image is bright."""

    weights, about = "0", "brightness"

    def __call__(self, images: torch.Tensor) -> Seen:
        bright = images.float().mean((1, 2, 3)) - 127
        return Seen(logits=torch.stack([-bright, bright], dim=1))


def test_accuracy_is_by_the_true_class_and_agreement_by_the_target(tmp_path: Path):
    """Clean images in folders 0/ and 1/; the "model" is given as its samples."""
    for label, levels in (("0", (10, 20, 30)), ("1", (200, 40, 250))):
        (tmp_path / label).mkdir()
        for i, level in enumerate(levels):
            Image.new("RGB", (32, 32), (level,) * 3).save(tmp_path / label / f"{i}.png")
    config = {**load_model("builtin:outline2emoji", "student").config, "classes": 2}
    batch = open_pairs(
        str(tmp_path), config, degrade="jpeg-10", masks="", labels="", layout="", fit="none", seed=0
    ).read(range(6))
    assert batch.sources.label.tolist() == [0, 0, 0, 1, 1, 1]
    dark = torch.zeros(1, 2, 6, 3, 32, 32, dtype=torch.uint8)  # one seed, two draws
    dark[0, 1, 5] = 255
    for metric, network, expected in (
        ("resnet50_accuracy", "resnet50", [1, 1, 1, 0, 0, 0.5]),
        ("efflite0_agreement", "efflite0", [1, 1, 1, 0, 1, 0.5]),  # the fifth target looks dark
    ):
        part = _compare_seen(network, Brightness(), [dark], batch, Measurement((metric,)))
        assert part[f"0.{metric}"].tolist() == [expected]


def test_batches_are_nearly_equal():
    assert [len(rows) for rows in batches(173, 64)] == [58, 58, 57]
    assert sum(batches(12, 5), []) == list(range(12))


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
