"""Data sets of the teachers, fetched from a server on this machine that does what real ones do wrong."""

import errno
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distilling import distill
from PIL import Image

from ibmd_cli import hub
from ibmd_cli.data import download
from ibmd_cli.data.download import data_folder, data_sets, fetch, to_fetch, unpack
from ibmd_cli.data.embedded import embedded_pairs, embedded_sources
from ibmd_cli.data.preprocessing import LAYOUTS, Preprocessing, read_normals
from ibmd_cli.data.sources import SourceImages
from ibmd_cli.errors import IbmdError, NotAvailable, UsageError
from ibmd_cli.models.published_teachers import published
from ibmd_cli.reporting import Reporter

QUIET = Reporter(quiet=True)


class Server:
    """Serves `content` with Range and ETag.

    Attributes:
        cuts: for each of the next transfers, the number of bytes after which the connection breaks.
        ranges: whether it knows Range.
        asked: the Range of each request.
    """

    def __init__(self) -> None:
        self.content, self.cuts, self.ranges = b"", list[int](), True
        self.asked: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                if self.path != "/set.tar.gz":
                    return self.send_error(404)
                outer.asked.append(wanted := self.headers["Range"])
                tag, size = f'"{hashlib.md5(outer.content).hexdigest()}"', len(outer.content)
                start = int(wanted.removeprefix("bytes=").removesuffix("-")) if outer.ranges else 0
                if self.headers.get("If-Range", tag) != tag:
                    start = 0
                if start >= size:
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{size}")
                    return self.end_headers()
                part = outer.content[start:]
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
                self.send_header("Content-Length", str(len(part)))
                self.send_header("ETag", tag)
                self.end_headers()
                self.wfile.write(part[: outer.cuts.pop(0)] if outer.cuts else part)

        self.host = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.host.server_port}/set.tar.gz"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(hub, "PAUSE", 0)
    served = Server()
    thread = threading.Thread(target=served.host.serve_forever, args=(0.02,))
    thread.start()
    yield served
    served.host.shutdown()
    thread.join()
    served.host.server_close()


def archive(**files: bytes) -> bytes:
    """Return a .tar.gz; `__` in a name stands for a slash."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name.replace("__", "/") + ".jpg")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def jpeg(i: int) -> bytes:
    """A drawing and its photo side by side, 64×32."""
    pair = torch.cat([embedded_sources()[i], embedded_pairs().x_0[i]], dim=2)
    buffer = io.BytesIO()
    Image.fromarray(pair.permute(1, 2, 0).numpy()).save(buffer, "jpeg")
    return buffer.getvalue()


ROW = {"title": "pairs", "licence": "MIT", "page": "p", "md5": "", "members": "*/train/*.jpg", "layout": "ab"}


@pytest.fixture
def pairs(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The data set `pairs`: three training pairs, a test pair; and the cache is empty."""
    server.content = archive(set__train__1=jpeg(0), set__train__2=jpeg(1), set__val__1=jpeg(2), set__train__3=jpeg(3))
    row = {**ROW, "url": server.url, "bytes": 10_000, "kept": 10_000, "images": 3, "normals": 0}
    write_table(tmp_path / "table.toml", row)
    monkeypatch.setattr(download, "TABLE", tmp_path / "table.toml")
    monkeypatch.setenv("IBMD_CACHE", str(tmp_path / "cache"))
    return row


def write_table(file: Path, row: dict[str, Any]) -> None:
    file.write_text("[pairs]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in row.items()))


def cached(tmp_path: Path) -> list[str]:
    folder = tmp_path / "cache" / "datasets"
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


# ------------------------------------------------------------------------------------------------------ the table


def test_table_of_data_sets():
    rows = data_sets()
    assert set(rows) == {"edges2handbags", "diode", "imagenet"}
    for row in rows.values():
        assert set(row) - {"how"} == {*ROW, "url", "bytes", "kept", "images", "normals"}
        assert row["layout"] in LAYOUTS
        assert bool(row["url"]) != ("how" in row)
    assert {row["title"].split()[0] for row in rows.values()} <= {"edges2handbags", "surface", "ImageNet"}
    assert {published()[alias]["image_size"] for alias in ("ddbm-diode",)} == {rows["diode"]["normals"]}


def test_what_must_be_got_by_hand_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("IBMD_CACHE", str(tmp_path))
    with pytest.raises(NotAvailable, match=r"research alone.*--data FOLDER; see https://image-net\.org"):
        fetch(["dataset:imagenet"], QUIET, yes=True)
    (told,) = to_fetch(["dataset:imagenet", "some/folder"])
    assert (told["how"], told["bytes"]) == ("by hand", 147_897_477_120)


def test_dry_run_tells_and_fetches_nothing(server: Server, pairs: dict, tiny_teacher: Path, tmp_path: Path):
    common = ["--teacher", tiny_teacher, "--data", "dataset:pairs", "--out", tmp_path / "run"]
    told = json.loads(distill(*common, "--dry-run", "--json").stdout)
    assert {
        "files": ["set.tar.gz"],
        "url": server.url.rpartition("/")[0],
        "bytes": 10_000,
        "licence": "MIT",
        "how": "by ibmd",
    } in (told["plan"]["files to download"])
    assert server.asked == []
    with pytest.raises(UsageError, match=r"dataset:pairs: pairs, about 0.0 GB, licence: MIT.*add --yes to fetch it"):
        distill(*common)
    assert server.asked == []
    with pytest.raises(NotAvailable, match=r"no data set dataset:paris: nearest: pairs"):
        distill(*common[:2], "--data", "dataset:paris", "--out", tmp_path / "run")


# ------------------------------------------------------------------------------------------------------- the whole


def test_data_set_is_fetched_and_trained_on(
    server: Server, pairs: dict, tiny_config: dict, tiny_teacher: Path, tmp_path: Path
):
    settings = ["--steps", 1, "--bridge-steps", 1, "--batch-size", 2, "--quiet"]
    run = ["--teacher", tiny_teacher, "--data", "dataset:pairs", "--out", tmp_path / "run", *settings]
    assert distill(*run, "--yes").exit_code == 0
    assert cached(tmp_path) == [*(f"pairs/images/set/train/{i}.jpg" for i in (1, 2, 3)), "pairs/lock"]
    assert to_fetch(["dataset:pairs"]) == []
    sources = SourceImages(["dataset:pairs"], tiny_config, QUIET)
    left = Image.open(io.BytesIO(jpeg(3))).crop((0, 0, 32, 32))
    assert torch.equal(sources.pixels[2], Preprocessing(16, "ab")(Image.open(io.BytesIO(jpeg(3))), "x"))
    assert np.abs(np.array(left.resize((16, 16))).transpose(2, 0, 1) - sources.pixels[2].numpy().astype(int)).max() < 2
    assert distill(*run).exit_code == 0  # it is there: not asked, not fetched again
    assert len(server.asked) == 1
    with pytest.raises(UsageError, match="--degrade jpeg-10: --data dataset:pairs are sources already"):
        distill(*run, "--out", tmp_path / "other", "--degrade", "jpeg-10")


def test_surface_normals_become_pictures_as_they_arrive(
    server: Server, pairs: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    content = io.BytesIO()
    np.save(content, np.random.default_rng(0).uniform(-1, 1, (24, 32, 3)))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in ("train/outdoor/s/a_normal.npy", "train/indoors/s/a_normal.npy"):
            info = tarfile.TarInfo(name)
            info.size = len(content.getvalue())
            tar.addfile(info, io.BytesIO(content.getvalue()))
    server.content = buffer.getvalue()
    md5 = hashlib.md5(server.content).hexdigest()
    row = {**pairs, "members": data_sets_of_the_package()["diode"]["members"], "images": 0, "normals": 16, "md5": md5}
    write_table(tmp_path / "table.toml", row)
    fetch(["dataset:pairs"], QUIET, yes=True)
    (file,) = data_folder("pairs").rglob("*.*")
    assert file.name == "a_normal.png"
    assert "outdoor" in str(file)
    content.seek(0)
    assert np.array_equal(np.array(Image.open(file)), np.array(read_normals(content, "a", 16)))


def data_sets_of_the_package() -> dict[str, Any]:
    return tomllib.loads((Path(download.__file__).parent / "datasets.toml").read_text())


def test_asks_at_a_terminal(server: Server, pairs: dict, tmp_path: Path):
    code = (
        "from pathlib import Path; from ibmd_cli.data import download; from ibmd_cli.reporting import Reporter\n"
        f"download.TABLE = Path({str(tmp_path / 'table.toml')!r})\n"
        "for answer in 'no', 'yes':\n"
        "    try:\n"
        "        download.fetch(['dataset:pairs'], Reporter(), yes=False)\n"
        "    except download.UsageError as error:\n"
        "        print(error)"
    )
    master, terminal = os.openpty()
    os.write(master, b"n\ny\n")
    process = subprocess.run([sys.executable, "-c", code], stdin=terminal, capture_output=True, text=True)
    os.close(master)
    os.close(terminal)
    assert process.stdout == "dataset:pairs: not fetched; give your own images: --data FOLDER\n", process.stderr
    assert process.stderr.count("licence: MIT") == process.stderr.count("Fetch it? [y/N]") == 2
    assert len(cached(tmp_path)) == 4, process.stderr


# -------------------------------------------------------------------------------------------------- what goes wrong


def test_transfer_goes_on_where_it_broke(server: Server, pairs: dict, tmp_path: Path):
    server.cuts = [100, 0, 700]
    fetch(["dataset:pairs"], QUIET, yes=True)
    assert server.asked == ["bytes=0-", "bytes=100-", "bytes=100-", "bytes=800-"]
    assert len(cached(tmp_path)) == 4


def test_later_run_goes_on_where_the_first_gave_up(server: Server, pairs: dict, tmp_path: Path):
    server.cuts = [300, *[0] * hub.MOST_TRIES]
    with pytest.raises(NotAvailable, match="the connection broke: is there a network"):
        fetch(["dataset:pairs"], QUIET, yes=True)
    assert not (tmp_path / "cache" / "datasets" / "pairs" / "images").exists()
    server.asked.clear()
    fetch(["dataset:pairs"], QUIET, yes=True)
    assert server.asked == ["bytes=300-"]
    assert len(cached(tmp_path)) == 4


@pytest.mark.parametrize("changed", [True, False], ids=["changed", "no Range"])
def test_file_that_changed_or_a_server_without_ranges(changed: bool, server: Server, pairs: dict, tmp_path: Path):
    whole = server.content
    if changed:
        server.content = os.urandom(5000)
    server.ranges = changed
    server.cuts = [400, *[0] * hub.MOST_TRIES]
    with pytest.raises(NotAvailable):
        fetch(["dataset:pairs"], QUIET, yes=True)
    server.content = whole
    fetch(["dataset:pairs"], QUIET, yes=True)
    assert len(cached(tmp_path)) == 4


def test_transfer_that_was_complete_already(server: Server, tmp_path: Path):
    server.content = b"x" * 1000
    (tmp_path / "file.part").write_bytes(server.content)
    hub.fetch_file(server.url, tmp_path / "file", QUIET, "")
    assert (tmp_path / "file").read_bytes() == server.content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"md5": "0" * 32}, r"damaged on the way: its md5 is [0-9a-f]{32}, expected 0{32}: try again"),
        ({"images": 4}, "3 images in it, expected 4: deleted; try again"),
        ({"bytes": 10**18}, r"the disk is full \(1000000000.0 GB are needed"),
    ],
)
def test_data_that_are_not_what_they_should_be(change: dict, message: str, server: Server, pairs: dict, tmp_path: Path):
    write_table(tmp_path / "table.toml", pairs | change)
    with pytest.raises(IbmdError, match=message):
        fetch(["dataset:pairs"], QUIET, yes=True)
    assert [name for name in cached(tmp_path) if name.endswith((".jpg", ".part"))] == []
    assert not (tmp_path / "cache" / "datasets" / "pairs" / "images").exists()


def test_damaged_archive(server: Server, pairs: dict, tmp_path: Path):
    server.content = server.content[: len(server.content) // 2]
    with pytest.raises(IbmdError, match=r"set\.tar\.gz: damaged .*deleted; try again"):
        fetch(["dataset:pairs"], QUIET, yes=True)
    assert cached(tmp_path) == ["pairs/lock"]


def test_no_such_file_and_no_server(server: Server, tmp_path: Path):
    with pytest.raises(NotAvailable, match="the server says 404 Not Found"):
        hub.fetch_file(server.url.replace("set", "other"), tmp_path / "x", QUIET, "")
    with pytest.raises(NotAvailable, match="refused.*is there a network"):
        hub.fetch_file("http://127.0.0.1:9/set.tar.gz", tmp_path / "x", QUIET, "")


def test_disk_that_fills_up(server: Server, pairs: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(download, "unpack", full)
        with pytest.raises(IbmdError, match="the disk is full .*No space left.*IBMD_CACHE"):
            fetch(["dataset:pairs"], QUIET, yes=True)
    server.asked.clear()
    (tmp_path / "cache" / "datasets" / "pairs" / ".ibmd-killed.tmp").mkdir()
    fetch(["dataset:pairs"], QUIET, yes=True)  # the archive is still there
    assert server.asked == []
    assert len(cached(tmp_path)) == 4


def test_cache_that_cannot_be_written(server: Server, pairs: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("IBMD_CACHE", str(tmp_path / "file"))
    with pytest.raises(IbmdError, match=r"dataset:pairs: cannot be written \(Not a directory\)"):
        fetch(["dataset:pairs"], QUIET, yes=True)


def test_two_at_once_fetch_once(server: Server, pairs: dict, tmp_path: Path):
    threads = [threading.Thread(target=fetch, args=(["dataset:pairs"], QUIET, True)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.asked) == 1
    assert len(cached(tmp_path)) == 4


@pytest.mark.parametrize("damage", ["a byte", "the checksum", "the end"])
def test_archive_is_compared_with_its_checksum(damage: str, tmp_path: Path):
    file = tmp_path / "a.tar.gz"
    with gzip.open(file, "wb", compresslevel=0) as plain:  # bytes as they are, so that only the checksum tells
        plain.write(gzip.decompress(archive(in__train__a=b"precious" * 500)))
    content = bytearray(file.read_bytes())
    if damage == "a byte":
        content[content.index(b"precious")] ^= 1
    elif damage == "the checksum":
        content[-8] ^= 1
    file.write_bytes(content[:-4] if damage == "the end" else content)
    with pytest.raises(IbmdError, match="damaged"):
        unpack(file, tmp_path, "*train/*.jpg", 0, QUIET)


@pytest.mark.parametrize("name", ["../train/a.jpg", "/train/a.jpg", "link/train/a.jpg"])
def test_archive_cannot_write_elsewhere(name: str, tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "elsewhere")
        tar.addfile(link)
        info = tarfile.TarInfo(name)
        info.size = 4
        tar.addfile(info, io.BytesIO(b"evil"))
    (tmp_path / "in").mkdir()
    (tmp_path / "elsewhere").mkdir()
    with suppress(IbmdError):  # or it is written inside
        unpack(tmp_path / "a.tar.gz", tmp_path / "in", "*train/*.jpg", 0, QUIET)
    written = [path for path in tmp_path.rglob("a.jpg") if not path.is_relative_to(tmp_path / "in")]
    assert written == []
    assert not (Path("/train/a.jpg")).exists()
