"""A folder means the same in every command: pairs, pictures side by side, plain folders, folders of classes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distilling import SMALL, distill, same
from PIL import Image
from torch import Tensor

from ibmd_cli.data.degradations import degrade
from ibmd_cli.data.embedded import embedded_pairs
from ibmd_cli.data.pairs import Pairs, open_pairs
from ibmd_cli.data.preprocessing import Preprocessing
from ibmd_cli.data.references import look_up_data, open_data_set
from ibmd_cli.data.sources import SourceImages
from ibmd_cli.errors import IbmdError, NotAvailable, UsageError
from ibmd_cli.images.fit import fit, to_image, to_uint8
from ibmd_cli.method.noise import stream
from ibmd_cli.reporting import Reporter
from ibmd_cli.training.config import DistillConfig
from ibmd_cli.training.loop import _fit

QUIET = Reporter(quiet=True)
COUNT = 6


def picture(x: Tensor) -> Image.Image:
    return Image.fromarray(x.permute(1, 2, 0).contiguous().numpy())


def save(image: Image.Image, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


def write(root: Path, kind: str, damaged: bool = False) -> Path:
    """Write six embedded pairs in a layout; the targets' files cannot be opened if `damaged`."""
    _, x_T, x_0 = embedded_pairs()
    for i in range(COUNT):
        source, target = picture(x_T[i]), picture(x_0[i])
        if kind == "ab":
            save(picture(torch.cat([x_T[i], x_0[i]], dim=2)), root / f"{i}.png")
            continue
        name = f"{i % 2}/{i}.png" if kind == "classes" else f"{i}.png"
        save(source, root / "source" / name)
        save(target, root / "target" / name)
        if damaged:
            (root / "target" / name).write_bytes(b"never opened")
    return root


@pytest.fixture
def teacher(tiny_config: dict) -> dict:
    return {**tiny_config, "image": {"size": 32, "channels": 3, "range": [-1, 1]}}


@pytest.mark.parametrize("kind", ["pairs", "classes"])
def test_students_learn_from_sources_and_never_open_targets(kind: str, teacher: dict, tmp_path: Path):
    folder = write(tmp_path / "data", kind, damaged=True)
    sources = SourceImages([str(folder)], teacher | {"classes": 2 if kind == "classes" else None}, QUIET)
    assert len(sources) == COUNT
    _, x_T, _ = embedded_pairs()
    order = sorted(range(COUNT), key=lambda i: (i % 2, i)) if kind == "classes" else range(COUNT)
    assert torch.equal(sources.pixels, x_T[list(order)])
    assert (sources.labels is None) == (kind == "pairs")
    assert not sources.broken


def test_a_run_on_pairs_is_one_on_their_sources(tiny_teacher: Path, tmp_path: Path):
    folder = write(tmp_path / "data", "pairs", damaged=True)
    runs = [("all", folder), ("sources", folder / "source")]
    for name, data in runs:
        assert distill("--teacher", tiny_teacher, "--data", data, *SMALL, "--out", tmp_path / name).exit_code == 0
    assert same(tmp_path / "all", tmp_path / "sources")


def test_targets_alone_are_degraded(teacher: dict, tmp_path: Path):
    folder = write(tmp_path / "data", "pairs")
    for file in (folder / "source").iterdir():
        file.write_bytes(b"never opened")
    sources = SourceImages([str(folder)], teacher, QUIET, "jpeg-10")
    _, _, x_0 = embedded_pairs()
    expected = degrade(x_0[:COUNT].float() / 127.5 - 1, "jpeg-10")
    assert torch.equal(sources.take(range(COUNT), stream(0)).x_T, expected)


def layouts(kind: str) -> dict[str, Any]:
    return {"layout": "ab" if kind == "ab" else ""}


@pytest.mark.parametrize("kind", ["pairs", "ab", "classes"])
def test_evaluation_and_training_see_the_same_pairs(kind: str, teacher: dict, tmp_path: Path):
    """`pairs` for a teacher's training, in memory and read as they are drawn, and `Pairs` for evaluation."""
    folder, config = write(tmp_path / "data", kind), {**teacher, "classes": 2 if kind == "classes" else None}
    options = {"degrade": "", "masks": "", "labels": "", "fit": "none", "seed": 0, **layouts(kind)}
    held_out = open_pairs(str(folder), config, **options).read(range(COUNT))
    sources = SourceImages([str(folder)], config, QUIET, **layouts(kind), targets=True)
    drawn, x_0 = sources.pairs(32, stream(0), flip=True)
    _, x_T, truth = embedded_pairs()
    order = sorted(range(COUNT), key=lambda i: (i % 2, i)) if kind == "classes" else list(range(COUNT))
    assert torch.equal(held_out.truth, truth[order])
    assert torch.equal(to_uint8(held_out.sources.x_T), x_T[order])
    both = torch.cat([x_T, truth], dim=1)[:COUNT]
    among = [x.numpy().tobytes() for x in (*both, *both.flip(3))]
    found = {among.index(x.contiguous().numpy().tobytes()) for x in to_uint8(torch.cat([drawn.x_T, x_0], dim=1))}
    assert len(found) > COUNT  # mirrored together, and not
    assert (drawn.label is None) == (kind != "classes")


def test_students_and_teachers_draw_the_same_sources(teacher: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write(tmp_path / "data", "pairs")
    batches = []
    for in_memory in (1 << 30, 0):
        monkeypatch.setattr("ibmd_cli.data.sources.IN_MEMORY", in_memory)
        for targets in (False, True):
            sources = SourceImages([str(folder)], teacher, QUIET, targets=targets)
            batches.append(sources.batch(16, stream(0), flip=True).x_T)
    assert all(torch.equal(batch, batches[0]) for batch in batches)


def test_pairs_of_degraded_images_have_the_clean_ones_as_targets(teacher: dict, tmp_path: Path):
    folder = write(tmp_path / "data", "pairs") / "target"
    drawn, x_0 = SourceImages([str(folder)], teacher, QUIET, "jpeg-10", targets=True).pairs(8, stream(0), flip=True)
    assert torch.equal(degrade(x_0, "jpeg-10"), drawn.x_T)


@pytest.mark.parametrize(
    ("kind", "degradation", "targets", "expected"),
    [
        ("pairs", "", False, "6 sources; 6 targets are not used by this objective"),
        ("pairs", "", True, "6 sources and 6 targets"),
        (
            "pairs",
            "jpeg-10",
            False,
            "6 targets, made into sources by jpeg-10; 6 sources are not used by this objective",
        ),
        ("ab", "", False, "6 sources; 6 targets are not used by this objective"),
        ("classes", "", False, "6 sources, of 2 classes; 6 targets are not used by this objective"),
        ("plain", "", False, "6 sources"),
        ("plain", "jpeg-10", False, "6 targets, made into sources by jpeg-10"),
    ],
)
def test_what_was_taken_is_described(
    kind: str, degradation: str, targets: bool, expected: str, teacher: dict, tmp_path: Path
):
    folder = write(tmp_path / "data", "pairs" if kind == "plain" else kind)
    folder = folder / "source" if kind == "plain" else folder
    config = teacher | {"classes": 2 if kind == "classes" else None}
    sources = SourceImages([str(folder)], config, QUIET, degradation, targets=targets, **layouts(kind))
    assert sources.describe() == [f"{folder}: {expected}"]


@pytest.mark.parametrize("targets", [False, True])
def test_pairs_further_down_are_not_taken_for_sources(targets: bool, tmp_path: Path):
    write(tmp_path / "data" / "train", "pairs")
    write(tmp_path / "data" / "test", "pairs")
    with pytest.raises(UsageError, match=r"holds pairs in .*data/test: give --data .*data/test"):
        open_data_set(str(tmp_path / "data"), Preprocessing(32), None, targets=targets)


@pytest.mark.parametrize(
    ("remove", "targets", "message"),
    [
        ("source", False, r"no folder .*data/source; expected source/ and target/ in it"),
        ("source", True, r"no folder .*data/source; expected source/ and target/ in it"),
        ("target", True, r"no folder .*data/target; expected source/ and target/ in it"),
        ("source/2.png", True, r"no partner of equal name for target/2\.png"),
        ("target/2.png", True, r"no partner of equal name for source/2\.png"),
    ],
)
def test_half_a_pair_is_refused_where_both_halves_are_needed(remove: str, targets: bool, message: str, tmp_path: Path):
    folder = write(tmp_path / "data", "pairs")
    (folder / remove).rename(tmp_path / "elsewhere")
    with pytest.raises(IbmdError, match=message):
        open_data_set(str(folder), Preprocessing(32), None, targets=targets)


def test_sources_without_targets_are_enough_for_students(tmp_path: Path):
    folder = write(tmp_path / "data", "pairs")
    (folder / "target" / "2.png").unlink()
    assert len(open_data_set(str(folder), Preprocessing(32), None)) == COUNT


def test_data_without_targets_are_refused_where_they_are_needed(tmp_path: Path):
    with pytest.raises(NotAvailable, match="--data builtin:outline2emoji: has sources alone"):
        open_data_set("builtin:outline2emoji", Preprocessing(32), None, targets=True)
    folder = write(tmp_path / "data", "pairs") / "source"
    with pytest.raises(NotAvailable, match=r"no folder .*; expected source/ and target/ in it"):
        open_data_set(str(folder), Preprocessing(32), None, targets=True)


def test_a_layout_does_not_go_with_folders_of_pairs(tmp_path: Path):
    folder = write(tmp_path / "data", "pairs")
    with pytest.raises(UsageError, match=r"holds source/ and target/: leave out --layout ab"):
        open_data_set(str(folder), Preprocessing(32, "ab"), None)


def test_pairs_of_unequal_shapes_are_named_and_counted(
    teacher: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("ibmd_cli.data.sources.LARGEST_BROKEN_SHARE", 0.2)
    folder = write(tmp_path / "data", "pairs")
    Image.new("RGB", (40, 32)).save(folder / "target" / "3.png")
    sources = SourceImages([str(folder)], teacher, QUIET, targets=True)
    assert list(sources.broken) == [3]
    assert "3.png: 32×32, but" in (told := capsys.readouterr().err)
    assert "is 40×32: expected equal shapes; another image is taken for it" in told


@pytest.mark.parametrize("mode", ["pad", "stretch", "crop"])
@pytest.mark.parametrize("layout", ["", "ab"])
def test_pictures_are_fitted_as_asked_in_training_and_evaluation(mode: str, layout: str, teacher: dict, tmp_path: Path):
    wide = picture(embedded_pairs().x_0[0]).resize((90, 40))
    other = picture(embedded_pairs().x_0[1]).resize((90, 40))
    if layout:
        both = Image.new("RGB", (180, 40))
        both.paste(wide, (0, 0))
        both.paste(other, (90, 0))
        save(both, tmp_path / "data" / "a.png")
    else:
        save(wide, tmp_path / "data" / "source" / "a.png")
        save(other, tmp_path / "data" / "target" / "a.png")
    expected = [to_uint8(fit(x, 32, mode)[0]) for x in (wide, other)]
    sources = SourceImages([str(tmp_path / "data")], teacher, QUIET, layout=layout, fit=mode, targets=True)
    assert torch.equal(sources.pixels[0], torch.cat(expected))
    found = open_data_set(str(tmp_path / "data"), Preprocessing(32, layout, fit=mode), None, targets=True)
    held_out = Pairs(found, 32, "", None, "", 0)
    batch = held_out.read([0])
    assert torch.equal(to_uint8(batch.sources.x_T[0]), expected[0])
    assert torch.equal(batch.truth[0], expected[1])


def test_previews_see_what_sample_sees_of_a_scan_that_is_not_square(tiny_teacher: Path, tmp_path: Path):
    """Sources of a run, the first row of its preview, are padded as `ibmd sample` pads; `--fit crop` crops them."""
    scan = picture(embedded_pairs().x_0[0]).resize((40, 60))
    save(scan, tmp_path / "scans" / "a.png")
    for mode, options in (("pad", []), ("crop", ["--fit", "crop"])):
        common = ["--teacher", tiny_teacher, "--data", tmp_path / "scans", *SMALL, *options, "--out", tmp_path / mode]
        assert distill(*common).exit_code == 0
        sheet = np.asarray(Image.open(tmp_path / mode / "previews" / "step-000000.png").convert("RGB"))
        times = 96 // 16  # small pictures are enlarged by repetition on a sheet
        seen = np.asarray(to_image(fit(scan, 16, mode)[0])).repeat(times, 0).repeat(times, 1)
        windows = np.lib.stride_tricks.sliding_window_view(sheet, (96, 96, 3))[:, :, 0]
        assert (windows == seen).all((2, 3, 4)).any(), mode


def test_runs_from_before_fit_was_a_setting_keep_what_they_had(tiny_teacher: Path, tmp_path: Path):
    save(picture(embedded_pairs().x_0[0]).resize((40, 60)), tmp_path / "scans" / "a.png")
    common = ["--teacher", tiny_teacher, "--data", tmp_path / "scans", *SMALL, "--out", tmp_path / "run"]
    assert _fit(DistillConfig(), tmp_path / "run") == "pad"
    assert distill(*common).exit_code == 0
    assert _fit(DistillConfig(), tmp_path / "run") == "pad"
    settings = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    del settings["settings"]["fit"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert _fit(DistillConfig(), tmp_path / "run") == "published"
    assert distill(*common).exit_code == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [([], "pad"), (["--fit", "stretch"], "stretch"), (["--degrade", "jpeg-10"], "published")],
)
def test_the_plan_says_what_is_taken(options: list[str], expected: str, tiny_teacher: Path, tmp_path: Path):
    folder = write(tmp_path / "data", "pairs", damaged=True)
    common = ["--teacher", tiny_teacher, "--data", folder, *options, "--out", tmp_path / "run"]
    plan = json.loads(distill(*common, "--dry-run", "--json").stdout)["plan"]
    assert plan["images that are not square"] == expected
    taken = "6 targets, made into sources by jpeg-10; 6 sources" if "--degrade" in options else "6 sources; 6 targets"
    assert plan["data"] == [f"{folder}: {taken} are not used by this objective"]


@pytest.mark.parametrize(
    ("kind", "layout", "hints"), [("ab", "", 1), ("ab", "ab", 0), ("ab and one more", "", 0), ("pairs", "", 0)]
)
def test_pictures_side_by_side_without_a_layout_are_pointed_out(
    kind: str, layout: str, hints: int, teacher: dict, tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder = write(tmp_path / "data", kind.partition(" ")[0])
    if "more" in kind:
        save(picture(embedded_pairs().x_0[0]), folder / "more.png")
    SourceImages([str(folder)], teacher, Reporter(), layout=layout)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("twice as wide as high: of pairs side by side? Then give --layout ab") == hints
    told = look_up_data([str(folder)], teacher, "", layout, "")
    assert sum("--layout ab" in line for line in told) == hints
