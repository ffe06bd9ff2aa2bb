"""Large sets are read as they are drawn: the same batches as from memory, whatever reads them and whatever breaks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from distilling import SMALL, distill, interrupt, log, same
from PIL import Image
from torch import Tensor

import ibmd_cli.data.sources
from ibmd_cli.data.preprocessing import Preprocessing
from ibmd_cli.data.references import open_data_set
from ibmd_cli.data.sources import Reader, SourceImages, count_workers
from ibmd_cli.errors import IbmdError
from ibmd_cli.images.fit import to_image
from ibmd_cli.method.noise import BatchStreams
from ibmd_cli.reporting import Reporter

QUIET = Reporter(quiet=True)
COUNT, SIZE = 20, 32


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twenty pictures of noise in folders of classes, of which the sixth and the last are damaged."""
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        folder = tmp_path / "photos" / str(i % 4)
        folder.mkdir(parents=True, exist_ok=True)
        to_image(torch.from_numpy(rng.uniform(-1, 1, (3, 40, 48))).float()).save(folder / f"{i:02}.png")
    for row in (5, COUNT - 1):
        file = sorted((tmp_path / "photos").rglob("*.png"))[row]
        file.write_bytes(file.read_bytes()[:2000])
    return tmp_path / "photos"


@pytest.fixture
def teacher(tiny_config: dict, monkeypatch: pytest.MonkeyPatch) -> dict:
    """One of 32 pixels that fills holes and has four classes; a tenth of the images may be broken."""
    monkeypatch.setattr(ibmd_cli.data.sources, "LARGEST_BROKEN_SHARE", 0.1)
    return tiny_config | {"image": {"size": SIZE}, "classes": 4, "mask": {"fill": "noise"}}


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every set a large one."""
    monkeypatch.setattr(ibmd_cli.data.sources, "IN_MEMORY", 0)


def streams(batch: int) -> BatchStreams:
    return BatchStreams(range(4), 0, "test", batch)


def batches(sources: SourceImages, count: int = 12) -> list[tuple[Tensor, ...]]:
    drawn = [sources.batch(4, streams(i), flip=True) for i in range(count)]
    return [(batch.x_T, batch.label, batch.mask) for batch in drawn]


def equal(one: list[tuple[Tensor, ...]], other: list[tuple[Tensor, ...]]) -> bool:
    return all(torch.equal(x, y) for a, b in zip(one, other, strict=True) for x, y in zip(a, b, strict=True))


def make(photos: Path, teacher: dict, workers: int = 0) -> SourceImages:
    return SourceImages([str(photos)], teacher, QUIET, "inpaint-center", workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_large_sets_give_the_batches_of_small_ones(
    workers: int, photos: Path, teacher: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    in_memory = make(photos, teacher)
    assert in_memory.loader is None
    expected, told = batches(in_memory), capsys.readouterr().err
    monkeypatch.setattr(ibmd_cli.data.sources, "IN_MEMORY", 3 * SIZE**2 * COUNT - 1)
    large = make(photos, teacher, workers)
    assert large.loader is not None
    assert large.inputs == in_memory.inputs
    large.expect(4, (streams(i) for i in range(12)))
    assert equal(batches(large), expected)
    assert large.loader.unforeseen == (0 if workers else 12)
    assert torch.equal(large.take([3, 7], streams(0)[:2]).x_T, in_memory.take([3, 7], streams(0)[:2]).x_T)
    large.close()
    assert sorted(capsys.readouterr().err.splitlines()) == sorted(told.splitlines())  # each broken image once
    assert told.count("; another image is taken for it") == 2


def test_broken_images_give_way_to_the_next(photos: Path):
    how = Preprocessing(SIZE)
    reader = Reader([open_data_set(str(photos), how, 4), open_data_set(str(photos / "0"), how, None)])
    batch = reader[[4, 5, 19, 20]]
    assert (batch.asked, batch.rows, sorted(batch.broken)) == ([4, 5, 19, 20], [4, 6, 20, 20], [5, 19])
    assert "damaged or incomplete" in batch.broken[5]
    assert torch.equal(batch.pixels, torch.stack([reader.read(row)[0] for row in (4, 6, 20, 20)]))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("in_memory", [True, False])
def test_notes_of_images_are_counted_and_said_once_per_kind(
    in_memory: bool, workers: int, photos: Path, teacher: dict, monkeypatch: pytest.MonkeyPatch, capfd
):
    if not in_memory:
        monkeypatch.setattr(ibmd_cli.data.sources, "IN_MEMORY", 0)
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black")]
    for i in range(3):
        frames[0].save(photos / "0" / f"a{i}.gif", save_all=True, append_images=frames[1:])
    frames[0].save(photos / "1" / "b.png", icc_profile=b"no profile")
    sources = SourceImages([str(photos)], teacher, Reporter(), "inpaint-center", workers=workers)
    halves = [list(range(len(sources))[i::2]) for i in range(2)]
    for rows in halves * 2:  # a second time, nothing is new
        sources.take(rows, BatchStreams(range(len(rows)), 0, "test", 0))
    sources.close()
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("--data: ")]
    names = [str(photos / "0" / f"a{i}.gif") for i in range(3)]
    assert f"--data: {names[0]} and 2 others: several frames or pages: of such files the first one counts" in told
    assert sum("profile is ignored" in line for line in told) == 1
    assert len(told) <= (2 if in_memory else 3)


def test_too_many_broken_images_stop_a_run_as_they_come(photos: Path, teacher: dict, large: None, capsys):
    sources = make(photos, teacher)
    for i in range(3):
        sources.batch(4, streams(i), flip=False)
    gone = sorted(photos.rglob("*.png"))[8:12]
    for file in gone:
        file.unlink()
    with pytest.raises(IbmdError, match=r"of 20 images cannot be read, more than 10%: mend or remove them \(the first"):
        sources.take(range(COUNT), streams(0))
    said = capsys.readouterr().err
    assert not any(f"/{file.name}" in said for file in gone), "said to be skipped, and then the run stopped"


def test_a_disk_that_is_gone(photos: Path, teacher: dict, large: None, monkeypatch: pytest.MonkeyPatch):
    sources = make(photos, teacher)
    monkeypatch.setattr(ibmd_cli.data.sources, "LARGEST_BROKEN_SHARE", 2.0)
    photos.rename(photos.with_name("elsewhere"))
    with pytest.raises(IbmdError, match=r"100 images in a row cannot be read \(.*No such file"):
        sources.batch(4, streams(0), flip=False)


@pytest.mark.slow
def test_workers_that_die_are_done_without(
    photos: Path, teacher: dict, large: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    sources = make(photos, teacher, workers=1)
    sources.expect(4, (streams(i) for i in range(30)))
    first = batches(sources, 1)
    assert sources.loader is not None
    (worker,) = sources.loader.ahead._workers  # type: ignore[attr-defined]
    os.kill(worker.pid, signal.SIGKILL)
    drawn = batches(sources, 12)
    assert equal(drawn[:1], first)
    sources.close()
    monkeypatch.setattr(ibmd_cli.data.sources, "IN_MEMORY", 1 << 30)
    assert "this one reads them now, which is slower" in capsys.readouterr().err
    assert equal(drawn, batches(make(photos, teacher), 12))


@pytest.mark.slow
def test_workers_leave_interrupts_to_the_training(photos: Path, teacher: dict, large: None):
    sources = make(photos, teacher, workers=1)
    sources.expect(4, (streams(i) for i in range(30)))
    batches(sources, 1)
    assert sources.loader is not None
    (worker,) = sources.loader.ahead._workers  # type: ignore[attr-defined]
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    batches(sources, 12)
    assert worker.is_alive()
    sources.close()
    worker.join(10)
    assert not worker.is_alive()


def test_number_of_workers():
    cores = len(os.sched_getaffinity(0))
    assert [count_workers(asked, 1) for asked in (0, 3)] == [0, 3]
    assert count_workers(-1, 1) == min(8, cores - 1)
    assert count_workers(-1, 100) == 0


# ------------------------------------------------------------------------------------------------------- in a run


@pytest.mark.slow
def test_run_on_a_large_set_is_foreseen_and_resumed(
    tiny_teacher: Path, drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    common = [
        "--teacher",
        tiny_teacher,
        "--data",
        drawings,
        *SMALL,
        "--micro-batch",
        2,
        "--bridge-warmup",
        3,
        "--quiet",
    ]
    assert distill(*common, "--out", tmp_path / "small").exit_code == 0
    monkeypatch.setattr(ibmd_cli.data.sources, "IN_MEMORY", 0)
    loaders = []
    expect = SourceImages.expect

    def remember(self: SourceImages, *arguments: object) -> None:
        loaders.append(self.loader)
        expect(self, *arguments)
        self.loader.unforeseen = 0  # what was read before the training

    monkeypatch.setattr(SourceImages, "expect", remember)
    interrupt(monkeypatch, [*common, "--workers", 0, "--out", tmp_path / "large"], 3)
    assert distill(*common, "--workers", 1, "--out", tmp_path / "large").exit_code == 0
    # The preview reads its sources before the training, so nothing comes out of turn.
    assert [loader.unforeseen for loader in loaders][1] == 0
    assert same(tmp_path / "small", tmp_path / "large")
    assert (
        log(tmp_path / "small", ("seconds", "images_per_second", "peak_memory_bytes"))[-1]["student_loss"]
        == (log(tmp_path / "large")[-1]["student_loss"])
    )


@pytest.mark.parametrize("what", ["data", "teacher"])
def test_changed_inputs_are_not_continued_with(what: str, tiny_teacher: Path, drawings: Path, tmp_path: Path):
    common = ["--teacher", tiny_teacher, "--data", drawings, *SMALL, "--out", tmp_path / "run", "--quiet"]
    assert distill(*common).exit_code == 0
    if what == "data":
        next(drawings.iterdir()).unlink()
        changed = r"drawings: 8 images, sha256 \w+ there, 7 images, sha256 \w+ here"
    else:
        weights = tiny_teacher / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        changed = r"tiny-teacher: sha256 \w+ there, sha256 \w+ here"
    with pytest.raises(IbmdError, match=f"teacher or data changed .*{changed}.*put them back, or give another --out"):
        distill(*common, "--steps", 4)


@pytest.mark.slow
def test_workers_end_with_a_killed_run(tiny_teacher: Path, drawings: Path, tmp_path: Path):
    code = "import ibmd_cli.data.sources; ibmd_cli.data.sources.IN_MEMORY = 0; from ibmd_cli.cli import main; main()"
    (tmp_path / "run.py").write_text(f"if __name__ == '__main__':\n    {code}\n")
    arguments = ["--teacher", tiny_teacher, "--data", drawings, *SMALL, "--steps", 10_000, "--workers", 2]
    command = [sys.executable, tmp_path / "run.py", "distill", *arguments, "--out", tmp_path / "run", "--device", "cpu"]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL)
    for _ in range(3000):
        time.sleep(0.2)
        if (tmp_path / "run" / "checkpoints" / "step-000002").exists():
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 300
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(Path(f"/proc/{child}").exists() for child in children)


@pytest.mark.slow
def test_benchmark_of_reading():
    script = Path(__file__).parents[2] / "examples" / "benchmarks" / "source_images.py"
    small = ["--count", "20", "--batches", "1", "--batch-size", "4", "--rounds", "1"]
    done = subprocess.run([sys.executable, script, *small], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split(" ")[0] for line in done.stdout.splitlines()[3:]] == ["memory", "read", "1"]
