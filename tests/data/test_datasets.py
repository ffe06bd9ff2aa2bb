"""Pictures become sources as the teachers' authors made them; classes; data sets of the library `datasets`."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hubserver import File, HubServer, Repo
from PIL import Image

from ibmd_cli.data.embedded import embedded_pairs, enlarge
from ibmd_cli.data.preprocessing import Preprocessing, read_normals
from ibmd_cli.data.references import check_sources, open_data_set, rows_of
from ibmd_cli.errors import IbmdError, NotAvailable, UsageError
from ibmd_cli.evaluation.config import EvalConfig
from ibmd_cli.images.fit import to_uint8
from ibmd_cli.reporting import Reporter
from ibmd_cli.training.config import DistillConfig

SIZE = 16


def picture(i: int, scale: int = 4) -> Image.Image:
    return Image.fromarray(enlarge(embedded_pairs().x_0[i : i + 1], scale)[0].permute(1, 2, 0).numpy())


def save(image: Image.Image, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)
    return file.parent


# ------------------------------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize(("layout", "side"), [("ab", 0), ("ba", 1)])
def test_halves_of_pairs_are_scaled_by_a_bicubic_filter(layout: str, side: int, tmp_path: Path):
    a, b = picture(0), picture(1)  # 128×128
    pair = Image.new("RGB", (257, 128))  # an odd width: the middle column is the right one's
    pair.paste(a, (0, 0))
    pair.paste(b, (128, 0))
    records = open_data_set(str(save(pair, tmp_path / "pairs" / "1_AB.png")), Preprocessing(SIZE, layout), None)
    half = pair.crop([(0, 0, 128, 128), (128, 0, 257, 128)][side])
    assert torch.equal(records.read(0), to_uint8(half.resize((SIZE, SIZE), Image.Resampling.BICUBIC)))


def test_a_single_picture_is_no_pair(tmp_path: Path):
    records = open_data_set(str(save(Image.new("RGB", (8, 9)), tmp_path / "a.png")), Preprocessing(SIZE, "ab"), None)
    with pytest.raises(IbmdError, match=r"a\.png: 8×9 pixels: expected two pictures side by side"):
        records.read(0)


def test_photos_that_will_be_degraded_are_cut_as_by_torchvision():
    photo = picture(0).crop((0, 0, 128, 75))
    x = Preprocessing(32, degradation="jpeg-5")(photo, "photo")
    # Resize(32): int(32 · 128 / 75) = 54; CenterCrop(32): round((54 − 32) / 2) = 11
    expected = photo.resize((54, 32), Image.Resampling.BILINEAR).crop((11, 0, 43, 32))
    assert torch.equal(x, to_uint8(expected))


# ------------------------------------------------------------------------------------------------------ normals


def normals(height: int = 24, width: int = 32) -> np.ndarray:
    """Unit vectors, and a corner without any."""
    n = np.random.default_rng(0).standard_normal((height, width, 3))
    n /= np.linalg.norm(n, axis=2, keepdims=True)
    n[:5, :7] = 0
    return n.astype(np.float32)


def test_normals_are_coloured_as_ddbm_does(tmp_path: Path):
    n = normals()
    np.save(tmp_path / "a_normal.npy", n)
    image = np.array(read_normals(tmp_path / "a_normal.npy", "a", SIZE))
    seen = [[n[row * 24 // SIZE, column * 32 // SIZE] for column in range(SIZE)] for row in range(SIZE)]
    smallest = np.min(seen)  # INTER_NEAREST of OpenCV: floor(i · from / to)
    for row in range(SIZE):
        for column in range(SIZE):
            expected = ((seen[row][column] - smallest) / 2).clip(0, 1) * 255 if np.any(seen[row][column]) else 0
            assert np.abs(image[row, column] - np.floor(expected)).max() <= 1  # the last bit of a float32
    assert (image[:3, :3] == 0).all()


def test_normal_maps_are_found_among_other_files(tmp_path: Path):
    np.save(tmp_path / "a_normal.npy", normals())
    picture_of_b = read_normals(tmp_path / "a_normal.npy", "a", SIZE)
    save(picture_of_b, tmp_path / "b_normal.png")
    save(Image.new("RGB", (24, 24), "red"), tmp_path / "a_normal.png")  # the numbers of a are there, too
    save(Image.new("RGB", (24, 24), "red"), tmp_path / "a.png")
    np.save(tmp_path / "a_depth.npy", np.zeros((3, 3)))
    records = open_data_set(str(tmp_path), Preprocessing(SIZE, "normals"), None)
    assert len(records) == 2
    assert torch.equal(records.read(0), records.read(1))
    assert torch.equal(records.read(0), to_uint8(picture_of_b))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((4, 4)), r"shape \(4, 4\): expected finite surface normals"),
        (np.full((4, 4, 3), np.nan), "expected finite surface normals"),
        (np.array([{}]), "no file of NumPy, or a damaged one"),  # would run code
    ],
)
def test_arrays_that_are_no_normals(content: np.ndarray, message: str, tmp_path: Path):
    np.save(tmp_path / "x_normal.npy", content)
    with pytest.raises(IbmdError, match=message):
        open_data_set(str(tmp_path), Preprocessing(SIZE, "normals"), None).read(0)
    (tmp_path / "x_normal.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(IbmdError, match="no file of NumPy"):
        open_data_set(str(tmp_path), Preprocessing(SIZE, "normals"), None).read(0)


def test_folder_without_normals(tmp_path: Path):
    save(Image.new("RGB", (24, 24)), tmp_path / "a.png")
    with pytest.raises(NotAvailable, match=r"no surface normals \(\*_normal\.npy, \*_normal\.png\) in it"):
        open_data_set(str(tmp_path), Preprocessing(SIZE, "normals"), None)


# ------------------------------------------------------------------------------------------------------- classes


@pytest.fixture
def three(tmp_path: Path) -> Path:
    for name in ("x/a.png", "x/b.png", "y/a.png"):
        save(picture(0), tmp_path / "three" / name)
    return tmp_path / "three"


def test_classes_from_a_file(three: Path, tmp_path: Path):
    file = tmp_path / "classes.csv"
    file.write_text(f'x/a.png,7\n"x/b.png",0\n{three}/y/a.png,9\nother.png,1\n')
    assert open_data_set(str(three), Preprocessing(SIZE), 10, str(file)).labels == [7, 0, 9]
    with pytest.raises(UsageError, match=r"--labels .*: classes 0 … 9: the teacher has 0 … 8"):
        open_data_set(str(three), Preprocessing(SIZE), 9, str(file))
    file.write_text("x/a.png,7\n")
    with pytest.raises(IbmdError, match=r"x/b\.png: no class for it in .*classes\.csv"):
        open_data_set(str(three), Preprocessing(SIZE), 10, str(file))
    file.write_text("x/a.png,seven\n")
    with pytest.raises(UsageError, match=r"--labels .*: expected lines PATH,CLASS"):
        open_data_set(str(three), Preprocessing(SIZE), 10, str(file))
    with pytest.raises(UsageError, match=r"--labels .*: cannot be read"):
        open_data_set(str(three), Preprocessing(SIZE), 10, str(tmp_path / "absent.csv"))


def test_digest_tells_names_and_sizes_not_the_place(three: Path, tmp_path: Path):
    def digest(folder: Path) -> str:
        return open_data_set(str(folder), Preprocessing(SIZE), None).digest

    before = digest(three)
    three = three.rename(tmp_path / "elsewhere")
    assert digest(three) == before
    (three / "x" / "a.png").rename(three / "x" / "c.png")
    assert digest(three) != before
    (three / "x" / "c.png").rename(three / "x" / "a.png")
    assert digest(three) == before
    save(Image.new("RGB", (9, 9)), three / "x" / "a.png")
    assert digest(three) != before


# --------------------------------------------------------------------------------- the library `datasets`, offline


@pytest.mark.parametrize("paired", [False, True])
def test_what_is_passed_over_in_a_folder_is_described_and_named_where_nothing_is_left(paired: bool, tmp_path: Path):
    folders = [tmp_path / side for side in ("source", "target")] if paired else [tmp_path]
    for folder in folders:
        folder.mkdir(exist_ok=True)
        (folder / "a.heic").touch()
    with pytest.raises(NotAvailable, match=r"no images in .*; passed over \d files? \(\.heic\): expected PNG, JPEG"):
        open_data_set(str(tmp_path), Preprocessing(SIZE), None)
    for folder in folders:
        save(picture(0), folder / "b.png")
    told = open_data_set(str(tmp_path), Preprocessing(SIZE), None).describe(["source"])
    assert "1 source" in told
    assert f"; passed over {'2 files' if paired else '1 file'} (.heic): expected PNG, JPEG" in told


@pytest.mark.parametrize("scheme", ["https", "s3"])
def test_addresses_of_data_are_refused_by_name(scheme: str):
    refused: tuple[Callable[[str], object], ...] = (
        lambda data: check_sources([data], {}, "", Reporter(quiet=True)),
        lambda data: DistillConfig(data=("preset", data)),
        lambda data: EvalConfig(data=data),
    )
    for call in refused:
        with pytest.raises(UsageError, match=rf"--data {scheme}://x\.org/a: addresses \({scheme}://\) are not read"):
            call(f"{scheme}://x.org/a")


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("file:///a/b%20c", "/a/b c"), ("FILE://localhost/a", "/a"), ("~/a", "/home/someone/a"), ("'/a b'", "/a b"),
        ("preset", "preset"), ("builtin:emoji", "builtin:emoji"), ("dataset:x", "dataset:x"),
        ("hf://datasets/a/b", "hf://datasets/a/b"),
    ],
)  # fmt: skip
def test_data_are_named_as_inputs_of_sample_are(text: str, path: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert DistillConfig(data=(text,)).data == (path,)
    assert EvalConfig(data=text).data == path


@pytest.mark.parametrize("reference", ["hf://datasets/name", "hf://datasets/", "hf://owner/name"])
def test_references_of_data_sets(reference: str):
    with pytest.raises(UsageError, match="expected hf://datasets/OWNER/NAME"):
        open_data_set(reference, Preprocessing(SIZE), None)


needs_datasets = pytest.mark.skipif(not find_spec("datasets"), reason="needs the extra 'datasets'")


@pytest.mark.skipif(bool(find_spec("datasets")), reason="the extra 'datasets' is installed")
def test_data_sets_without_their_library():
    with pytest.raises(NotAvailable, match=r"pip install 'ibmd-cli\[datasets\]'"):
        open_data_set("hf://datasets/owner/name", Preprocessing(SIZE), None)


def table(tmp_path: Path, **columns: str):
    """Three pictures and their classes, written as Parquet and read back."""
    import datasets

    files = [str(save(picture(i), tmp_path / f"{i}.png") / f"{i}.png") for i in range(3)]
    kinds = {"image": datasets.Image(), "class": datasets.ClassLabel(names=["a", "b"])}
    features = datasets.Features({name: kinds[kind] for name, kind in columns.items()})
    values = {"image": files, "class": [1, 0, 1]}
    made = datasets.Dataset.from_dict({name: values[kind] for name, kind in columns.items()}, features)
    made.to_parquet(str(tmp_path / "made.parquet"))
    return datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "made.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )


@needs_datasets
def test_rows_of_a_data_set(tmp_path: Path):
    rows = rows_of("hf://datasets/o/n", table(tmp_path, image="image", label="class"), None, Preprocessing(SIZE), 2)
    assert (len(rows), rows.labels) == (3, [1, 0, 1])
    for i in range(3):
        assert torch.equal(rows.read(i), Preprocessing(SIZE)(picture(i), "by hand"))
    with pytest.raises(UsageError, match="classes 0 … 1: the teacher has 0 … 0"):
        rows_of("hf://datasets/o/n", rows.table.add_column("label", [1, 0, 1]), None, Preprocessing(SIZE), 1)


@needs_datasets
def test_column_of_images_is_chosen(tmp_path: Path):
    made = table(tmp_path, before="image", after="image")
    assert len(rows_of("hf://datasets/o/n", made, "after", Preprocessing(SIZE), None)) == 3
    for column in (None, "other"):
        with pytest.raises(UsageError, match="choose its column of images by #COLUMN: it has before, after"):
            rows_of("hf://datasets/o/n", made, column, Preprocessing(SIZE), None)
    with pytest.raises(UsageError, match="expected one column of classes, found none"):
        rows_of("hf://datasets/o/n", made, "after", Preprocessing(SIZE), 2)


@needs_datasets
def test_row_that_is_no_image(tmp_path: Path):
    import datasets

    (tmp_path / "bad.png").write_text("no image")
    made = datasets.Dataset.from_dict({"image": [str(tmp_path / "bad.png"), None]}).cast_column(
        "image", datasets.Image()
    )
    rows = rows_of("hf://datasets/o/n", made, None, Preprocessing(SIZE), None)
    with pytest.raises(IbmdError, match=r"bad\.png: not an image"):
        rows.read(0)
    with pytest.raises(IbmdError, match="row 1: no image in it"):
        rows.read(1)


IN_A_PROCESS = """
import torch
import ibmd_cli.data.sources
from ibmd_cli.data.sources import SourceImages
from ibmd_cli.method.noise import stream
from ibmd_cli.reporting import Reporter

ibmd_cli.data.sources.IN_MEMORY = 0
teacher = {"image": {"size": 16}, "classes": 2, "name": "t"}
sources = SourceImages(["hf://datasets/us/photos@main/train"], teacher, Reporter(quiet=True), workers=1)
sources.expect(4, iter([stream(0)]))
batch = sources.batch(4, stream(0), flip=False)
print(len(sources), sources.labels.tolist(), sources.loader.unforeseen, len(batch.x_T))
sources.close()
"""


@needs_datasets
@pytest.mark.slow
def test_data_set_from_the_hub_and_then_from_the_cache(tmp_path: Path):
    files = {f"train/{name}/{i}.png": File(encoded(i)) for i, name in enumerate("abb")}
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*"}
    with HubServer({"datasets/us/photos": Repo(files)}) as server:
        online = {**environment, "HF_ENDPOINT": server.url}
        done = subprocess.run([sys.executable, "-c", IN_A_PROCESS], env=online, capture_output=True, text=True)
        assert done.stdout == "3 [0, 1, 1] 0 4\n", done.stderr
        absent = IN_A_PROCESS.replace("us/photos", "us/absent")
        done = subprocess.run([sys.executable, "-c", absent], env=online, capture_output=True, text=True)
        assert "NotAvailable: --data hf://datasets/us/absent@main/train: cannot be loaded (" in done.stderr
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS],
        env={**online, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "3 [0, 1, 1] 0 4\n", done.stderr


def encoded(i: int) -> bytes:
    content = io.BytesIO()
    picture(i).save(content, "png")
    return content.getvalue()


@needs_datasets
def test_a_folder_that_the_library_would_take_for_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    save(picture(0), tmp_path / "owner" / "name" / "a.png")
    with pytest.raises(UsageError, match="the folder owner/name is here, and would be read instead"):
        open_data_set("hf://datasets/owner/name", Preprocessing(SIZE), None)
