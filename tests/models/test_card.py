"""Model cards, read by huggingface_hub's own reader, and a student's way to the Hub and back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hubserver import TOKEN, HubServer
from huggingface_hub import ModelCard
from PIL import Image
from students import of_teacher

from ibmd_cli.errors import UsageError
from ibmd_cli.files import sha256
from ibmd_cli.models.card import HUB_LICENCES, publish, published_files, read_results, student_card
from ibmd_cli.models.folder import load_model
from ibmd_cli.models.model import StudentModel
from ibmd_cli.models.published_teachers import published
from ibmd_cli.models.references import load_teacher
from ibmd_cli.training.config import DistillConfig
from ibmd_cli.training.new_student import new_student

BUILTIN = "builtin:outline2emoji"


@pytest.fixture(scope="module")
def student() -> StudentModel:
    model = load_model(BUILTIN, "student")
    assert isinstance(model, StudentModel)
    return model


@pytest.fixture
def results(student: StudentModel, tmp_path: Path) -> Path:
    """The `results.json` of an evaluation, with its grid."""
    score = {"value": 1.5, "low": 1.25, "high": 1.75}
    row = {"reference": "x", "samples": 4, "energy_score": score, "psnr": score, "ms_per_image": 2.5}
    folder = tmp_path / "report"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "grid.png")
    content = {
        "schema": 1,
        "ibmd_version": "0.1.0",
        "settings": {"data": "/home/me/pairs", "images": 173, "device": "cpu", "threads": 2},
        "protocol": {"energy_score": "E|X-y|: n=173", "psnr": "dB, peak 255", "ms_per_image": "median"},
        "rows": [
            {"model": "student", "sha256": sha256(student.weights), "nfe": 1, **row},
            {"model": "student", "sha256": "0" * 64, "nfe": 1, **row, "ms_per_image": 987},
            {"model": "teacher", "sha256": "1" * 64, "nfe": 20, **row, "psnr": {**score, "value": 17.25}},
        ],
    }
    (folder / "results.json").write_text(json.dumps(content))
    return folder / "results.json"


# ------------------------------------------------------------------------------------------------------- cards


def test_the_hub_understands_the_card(student: StudentModel):
    card = ModelCard(student_card(student))
    assert card.data.license == "cc-by-sa-4.0"
    assert card.data.pipeline_tag == "image-to-image"
    assert card.data.library_name == "ibmd"
    assert "one-step" in card.data.tags
    assert card.data.base_model is None
    assert "openmoji.org" in card.text  # whose licence asks for its name
    assert "## Figures" not in card.text
    for key, value in student.config["training"].items():
        assert f"| {key} | `{value}` |" in card.text


@pytest.mark.parametrize("alias", list(published()))
def test_the_licence_of_a_published_teacher_follows_its_student(student: StudentModel, alias: str):
    row = published()[alias]
    own = of_teacher(student, reference=f"hub:{alias}", licence=row["licence"])
    by_preset = of_teacher(student, reference="/home/me/latest.pt", licence=row["licence"], training={"preset": alias})
    for model in (own, by_preset):
        card = ModelCard(student_card(model))
        expected = {"ddbm": "mit", "dbim": "other", "i2sb": "cc-by-nc-sa-4.0"}[row["family"]]
        assert card.data.license == expected
        assert card.data.base_model == row.get("repo")
        assert card.data.to_dict().get("base_model_relation") == ("finetune" if "repo" in row else None)
        assert row["title"] in card.text
        assert (row.get("url") or f"https://huggingface.co/{row['repo']}") in card.text
        licence = card.text.split("## Licence")[1]
        assert row["licence"] in licence
        if row["family"] == "i2sb":
            assert "not for commercial use" in licence
        if row["family"] == "dbim":
            assert card.data.license_name == "not-stated-by-its-authors"
            assert "Ask the authors" in licence


def test_a_licence_without_a_name_on_the_hub(student: StudentModel):
    card = ModelCard(student_card(of_teacher(student, reference="/home/me/own", licence="House Rules, 2nd ed.")))
    assert (card.data.license, card.data.license_name) == ("other", "house-rules-2nd-ed.")
    assert "That of its teacher: House Rules, 2nd ed." in card.text
    assert "/home/me" not in card.text.split("## Settings")[0]
    assert all(name == name.lower() for name in HUB_LICENCES)


def test_a_teacher_on_the_hub_is_the_base_model(student: StudentModel):
    card = ModelCard(student_card(of_teacher(student, reference="hf://a/b@v1/x.pt", licence="MIT")))
    assert (card.data.base_model, card.data.license) == ("a/b", "mit")


def test_distillation_hands_the_licence_on(tiny_teacher: Path):
    config = json.loads((tiny_teacher / "config.json").read_text())
    (tiny_teacher / "config.json").write_text(json.dumps({**config, "licence": "CC-BY-NC-SA-4.0"}))
    settings = DistillConfig(teacher=str(tiny_teacher))
    new = new_student(settings, load_teacher(str(tiny_teacher)))
    assert new.config["licence"] == "CC-BY-NC-SA-4.0"
    assert ModelCard(student_card(new)).data.license == "cc-by-nc-sa-4.0"


def test_what_a_student_takes_is_said(student: StudentModel):
    plain = student_card(student)
    assert "--mask" not in plain
    assert "--label" not in plain
    assert "--degrade" not in plain
    config = student.config
    filling = of_teacher(
        student, reference=BUILTIN, mask={"fill": "zero"}, classes=1000, degradation="inpaint-center",
        image={**config["image"], "source_scale": 4},
        sampling={**config["sampling"], "timesteps": [1.0, 0.5], "noise": {"channels": 0, "grid": 32}},
    )  # fmt: skip
    card = student_card(filling, reference="hf://us/student")
    for said in (
        "in 2 network evaluations per image",
        "ibmd sample --student hf://us/student --input SOURCE.png --mask HOLE.png --label 0\n",
        "ibmd sample --student hf://us/student --input CLEAN.png --degrade inpaint-center --label 0\n",
        'student(Image.open("SOURCE.png"), mask=Image.open("HOLE.png"), label=0)',
        "RGB image of 8×8 pixels, degraded as by `inpaint-center`, and a mask of its hole, and a class, 0 … 999",
        "no z, and the noise between its 2 steps",
    ):
        assert said in card


# ----------------------------------------------------------------------------------------------------- figures


def test_figures_stand_in_the_card_with_their_protocols(student: StudentModel, results: Path):
    files = published_files(student, "hf://us/student", results)
    card = ModelCard(files["README.md"].decode())
    figures = {result.metric_type: result for result in card.data.eval_results}
    assert set(figures) == {"energy_score", "psnr"}
    assert figures["energy_score"].metric_value == 1.5
    assert figures["energy_score"].metric_args == {"protocol": "E|X-y|: n=173"}
    assert figures["energy_score"].dataset_name == "pairs"
    assert "on 173 pairs of pairs, with 95 % intervals; times on cpu, 2 threads" in card.text
    assert "| student | 1 | 1.5 [1.25, 1.75] | 1.5 [1.25, 1.75] | 2.5 |" in card.text
    assert "| teacher | 20 | 1.5 [1.25, 1.75] | 17.25 [1.25, 1.75] | 2.5 |" in card.text
    assert "- `psnr`: dB, peak 255\n- `ms_per_image`: median" in card.text
    assert "987" not in card.text  # of another student in the same file
    assert "![Sources, teacher, student](grid.png)" in card.text
    assert files["grid.png"] == results.with_name("grid.png")
    results.with_name("grid.png").unlink()
    files = published_files(student, "hf://us/student", results)
    assert "grid.png" not in files
    assert "grid.png" not in files["README.md"].decode()


@pytest.mark.parametrize(
    ("images", "threads", "ms", "low", "words"),
    [
        (1, 1, 1234.5, None, "on 1 pair of pairs, too few for intervals; times on cpu, 1 thread."),
        (4, 2, 0.0123, None, "on 4 pairs of pairs, too few for intervals; times on cpu, 2 threads."),
        (1234, 1, 98765.0, 1.25, "on 1,234 pairs of pairs, with 95 % intervals; times on cpu, 1 thread."),
    ],
)
def test_figures_say_what_is_there(
    student: StudentModel, results: Path, images: int, threads: int, ms: float, low: float | None, words: str
):
    """One thing is singular, an interval may be missing, and no time has an exponent."""
    content = json.loads(results.read_text())
    content["settings"] |= {"images": images, "threads": threads}
    for row in content["rows"]:
        row["ms_per_image"] = ms
        row["psnr"] |= {"low": low, "high": low}
        row["energy_score"] |= {"low": None, "high": None}
    results.write_text(json.dumps(content))
    card = student_card(student, results=read_results(results, student))
    assert words in card
    shown = {1234.5: "1,200", 0.0123: "0.012", 98765.0: "99,000"}[ms]
    interval = "" if low is None else " [1.25, 1.25]"
    assert f"| student | 1 | 1.5 | 1.5{interval} | {shown} |" in card


def test_figures_of_another_student_are_refused(student: StudentModel, results: Path):
    content = json.loads(results.read_text())
    content["rows"] = content["rows"][1:]
    results.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"about another student \(SHA-256 000000000000; this one is [0-9a-f]{12}\)"):
        read_results(results, student)
    results.write_text(json.dumps({**content, "schema": 99}))
    with pytest.raises(UsageError, match="not results of ibmd eval"):
        read_results(results, student)
    results.write_text('{"rows": {}}')
    with pytest.raises(UsageError, match="not results of ibmd eval"):
        read_results(results, student)
    with pytest.raises(UsageError, match="no such file"):
        read_results(results.parent, student)


# ------------------------------------------------------------------------------------------------- publication


def test_a_dry_run_tells_everything_and_sends_nothing(results: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ibmd_cli.models.card.push", None)  # calling it would fail
    plan = publish(BUILTIN, "us/student", results=results, dry_run=True)
    assert (plan["url"], plan["private"], plan["reference"]) == (None, True, "hf://us/student")
    assert [file["path"] for file in plan["files"]] == ["README.md", "config.json", "model.safetensors", "grid.png"]
    assert all(file["bytes"] > 0 for file in plan["files"])
    assert plan["card"].startswith("---\n")
    with pytest.raises(UsageError, match="expected OWNER/REPO"):
        publish(BUILTIN, "student", dry_run=True)


def test_what_is_published_is_the_student(student: StudentModel, tmp_path: Path):
    for path, content in published_files(student, "hf://us/student").items():
        (tmp_path / path).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    again = load_model(str(tmp_path), "student")
    assert again.config == student.config
    assert sha256(again.weights) == sha256(student.weights)


@pytest.mark.slow  # three programs
def test_a_student_goes_to_the_hub_and_back(drawings: Path, tmp_path: Path):
    """As its card says: the lines of its examples are run."""
    source = tmp_path / "SOURCE.png"
    source.write_bytes((drawings / "drawing-3.png").read_bytes())
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    with HubServer({}) as hub:
        environ = kept | {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "IBMD_CACHE": str(tmp_path / "ibmd"),
            "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "no_proxy": "127.0.0.1,localhost",
        }  # fmt: skip

        def run(*command: str) -> str:
            done = subprocess.run(command, capture_output=True, text=True, env=environ, cwd=tmp_path, timeout=600)
            assert done.returncode == 0, done.stderr
            return done.stdout

        code = "from ibmd_cli.models.card import publish; print(publish('builtin:outline2emoji', 'us/student')['url'])"
        assert run(sys.executable, "-c", code) == f"{hub.url}/us/student\n"
        card = hub.repos["us/student"].files["README.md"].content.decode()
        (command,) = [line for line in card.splitlines() if line.startswith("ibmd ")]
        assert run(sys.executable, "-m", "ibmd_cli", *command.split()[1:]) == "SOURCE.ibmd.png\n"
        python = card.split("```python\n")[1].split("```")[0]
        run(sys.executable, "-c", f"{python}\nresult.save('python.png')")
    from ibmd_cli import Student as Translator

    translate = Translator.from_pretrained(BUILTIN, device="cpu")
    with Image.open(source) as image:
        for name, own in (
            ("SOURCE.ibmd.png", translate(image, names=["SOURCE.png"])),
            ("python.png", translate(image)),
        ):
            with Image.open(tmp_path / name) as theirs:
                difference = np.asarray(own).astype(int) - np.asarray(theirs)
            # In another process a convolution's last bits may differ: single pixels round to the next level.
            assert np.abs(difference).max() <= 1
            assert np.count_nonzero(difference) <= 3
