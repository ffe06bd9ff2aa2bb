"""The table of published teachers; and downloads and uploads, by the real huggingface_hub, of a server on this machine.

huggingface_hub reads its environment when it is imported, so these run in processes of their own.
"""

import gzip
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hubserver import TOKEN, File, HubServer, Repo

from ibmd_cli.data.degradations import DEGRADATIONS
from ibmd_cli.errors import NotAvailable, UsageError
from ibmd_cli.hub import cache_folder, parse_hf
from ibmd_cli.method.bridges import make_bridge
from ibmd_cli.models.published_teachers import find_published, published
from ibmd_cli.models.samplers import SAMPLERS
from ibmd_cli.models.upload import repository

LARGE = bytes(range(256)) * 100_000  # 25.6 MB: huggingface_hub keeps what it gets in pieces of 10 MiB
PIECE = 10 * 1024 * 1024
PRELUDE = """
import sys
from ibmd_cli.errors import IbmdError
from ibmd_cli.hub import download, snapshot
from ibmd_cli.models.upload import push
from ibmd_cli.models.published_teachers import find_published

def tell(function, *arguments, **options):
    try:
        print(function(*arguments, **options))
    except IbmdError as error:
        print(type(error).__name__, error)
"""

# ---------------------------------------------------------------------------------------------------- the table


def manifests() -> dict[str, dict]:
    with gzip.open(Path(__file__).parent / "parity" / "manifests.json.gz") as stream:
        return json.load(stream)


MANIFESTS = {
    "ddbm-edges2handbags": "ddbm_e2h64_vp_original",
    "ddbm-diode": "ddbm_diode256_vp_original",
    "dbim-imagenet-inpaint-center": "dbim_imagenet256_inpaint_center",
}


def test_the_table_holds_the_twelve_published_teachers():
    rows = published()
    tasks = ["jpeg-5", "jpeg-10", "sr4x-pool", "sr4x-bicubic", "blur-uni", "blur-gauss"]
    tasks += ["inpaint-center", "inpaint-freeform1020", "inpaint-freeform2030"]
    assert list(rows) == [*MANIFESTS, *(f"i2sb-{task}" for task in tasks)]
    assert len({frozenset(row) - {"repo", "file", "url", "files"} for row in rows.values()}) == 1  # the same keys
    # Table 7 distils eight of them: DDBM's two, DBIM's, and five of I2SB.
    assert sum(bool(row["paper_row"]) for row in rows.values()) == 8


@pytest.mark.parametrize("alias", list(published()))
def test_a_row_agrees_with_the_network_and_the_bridge(alias: str):
    row = published()[alias]
    shapes = manifests()[MANIFESTS.get(alias, "i2sb_imagenet256_uncond_net")]
    sizes = {key.removeprefix("diffusion_model."): shape for key, shape in shapes.items()}
    count = sum(math.prod(shape) for shape in sizes.values())
    assert row["parameters"] == count
    assert row["bytes"] == 4 * count * (2 if row["family"] == "i2sb" else 1)  # I2SB keeps the weights and their EMA
    assert row["conditional"] == (sizes["input_blocks.0.0.weight"][1] == 6)
    assert row["classes"] == (sizes["label_emb.weight"][0] if "label_emb.weight" in sizes else None)
    bridge = make_bridge(row["bridge"])
    assert {key: bridge.to_dict()[key] for key in row["bridge"]} == row["bridge"]
    if row["family"] == "i2sb":  # the noise-free ones are those of the wide schedule
        assert row["bridge"]["noise_free"] == (row["bridge"]["beta_max"] == 1.0)
        assert row["degradation"] == alias.removeprefix("i2sb-")
        assert row["source_scale"] == (4 if "sr4x" in alias else 1)
    sampler = SAMPLERS[row["sampling"]["sampler"]]
    assert bridge.whole_steps == sampler.whole_steps
    assert set(row["sampling"]) - {"sampler", "nfe"} <= set(sampler.options)
    assert row["degradation"] in ("", *DEGRADATIONS)
    assert (row["mask"] is not None) == ("inpaint" in alias)
    assert {"hub": {"repo", "file"}, "drive": {"url", "files"}}[row["where"]] <= set(row)


def test_a_teacher_on_drive_is_told_in_one_line_with_what_to_do():
    with pytest.raises(NotAvailable) as caught:
        find_published("i2sb-jpeg-5")
    message = str(caught.value)
    for part in (
        "latest.pt and options.pkl",
        "https://drive.google.com/drive/folders/17bPMUX5yBcL8YTN8nbfJT6WHXU6CNLd7",
        "--teacher FOLDER --preset i2sb-jpeg-5",
    ):
        assert part in message
    assert "\n" not in message
    with pytest.raises(NotAvailable, match="--teacher FILE --preset dbim-imagenet-inpaint-center"):
        find_published("dbim-imagenet-inpaint-center")
    with pytest.raises(NotAvailable, match="nearest: i2sb-jpeg-5, i2sb-jpeg-10"):
        find_published("i2sb-jpeg5")


# --------------------------------------------------------------------------------------------------- references


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("hf://a/b", ("a/b", None, None)),
        ("hf://a-1/b.c_d@v1.0", ("a-1/b.c_d", "v1.0", None)),
        ("hf://a/b/x/y.pt", ("a/b", None, "x/y.pt")),
        ("hf://a/b@0123abc/x@y.pt", ("a/b", "0123abc", "x@y.pt")),
        ("hf://a/b@refs/pr/3/x.pt", ("a/b", "refs/pr/3", "x.pt")),
        ("hf://a/b@feature%2Fx/y.pt", ("a/b", "feature/x", "y.pt")),
    ],
)
def test_references_to_the_hub(reference: str, parts: tuple):
    assert parse_hf(reference) == parts


@pytest.mark.parametrize(
    "reference",
    ["a/b", "hf:/a/b", "hf://a", "hf://a/", "hf:///b", "hf://a/b@", "hf://a/b/", "hf://a/b@/x", "hf://a--b/c"]
    + ["hf://a/b/../x", "hf://a/b/x//y", "hf://a/b/./x", "hf://a/b/..\\x", "hf://datasets/a/b", "hf://a b/c", "hf://a/b\n"],
)  # fmt: skip
def test_malformed_references_are_refused(reference: str):
    with pytest.raises(UsageError, match="expected hf://OWNER/REPO") as caught:
        parse_hf(reference)
    assert len(str(caught.value).splitlines()) == 1


def test_cache_folder(monkeypatch: pytest.MonkeyPatch):
    for name in ("IBMD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() == Path.home() / ".cache" / "ibmd"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/ibmd")
    monkeypatch.setenv("IBMD_CACHE", "~/y")
    assert cache_folder() == Path.home() / "y"


# ---------------------------------------------------------------------------------------------------- downloads

Run = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    files = {"config.json": File(b'{"format": "ibmd-student"}'), "model.safetensors": File(LARGE)}
    files |= {"README.md": File(b"# A student\n"), "training.log": File(b"not wanted"), "e/m.pt": File(b"small")}
    with HubServer({"us/student": Repo(files, revisions=("main", "v1"))}) as server:
        yield server


@pytest.fixture
def run(hub: HubServer, tmp_path: Path) -> Run:
    """Run lines of code that use `ibmd_cli.hub`; stdout has what `tell` tells."""

    def run(code: str, check: bool = True, **environ: str) -> subprocess.CompletedProcess:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environ = {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "IBMD_CACHE": str(tmp_path / "ibmd"),
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "127.0.0.1,localhost", **environ,
        }  # fmt: skip
        command = [sys.executable, "-c", PRELUDE + code]
        done = subprocess.run(command, capture_output=True, text=True, env={**kept, **environ}, timeout=600)
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode == 0, done.stderr
        return done

    return run


def kept(tmp_path: Path) -> list[Path]:
    """The contents in the Hub's cache, whole or in part."""
    return list((tmp_path / "hf").glob("hub/models--*/blobs/*"))


def test_download_shows_plain_progress_and_is_verified_once(hub: HubServer, run: Run):
    done = run(
        """
import hashlib
path = download("us/student", "model.safetensors")
print(path)
real, hashlib.file_digest = hashlib.file_digest, None  # reading the file again would fail
print(download("us/student", "model.safetensors") == path)
hashlib.file_digest = real
path.resolve().write_bytes(b"?" * path.stat().st_size)  # the file changes: it is found out
tell(download, "us/student", "model.safetensors")
print(path.exists())
print(download("us/student", "model.safetensors", quiet=True) == path)
"""
    )
    path, again, changed, exists, mended = done.stdout.splitlines()
    assert Path(path).read_bytes() == LARGE
    assert (again, exists, mended) == ("True", "False", "True")
    assert changed.startswith("IbmdError hf://us/student/model.safetensors: its hash is ")
    assert hub.ranges() == [None, None]
    assert done.stderr.count("model.safetensors 26/26") == 1  # not for the quiet one
    assert "MB/s" in done.stderr
    assert "\x1b" not in done.stderr
    assert "\r" not in done.stderr


def test_progress_on_a_terminal_is_a_bar(run: Run):
    done = run(
        """
import pty, os
parent, child = os.openpty()
os.dup2(child, 2)
for name in ("CI", "NO_COLOR"):
    os.environ.pop(name, None)
os.environ["TERM"] = "xterm"
import threading
shown = []
def read():
    while b"END" not in b"".join(shown):
        shown.append(os.read(parent, 65536))
thread = threading.Thread(target=read)
thread.start()
tell(download, "us/student", "model.safetensors")
os.write(2, b"END")
thread.join()
print(b"26/26" in b"".join(shown), b"\\x1b[" in b"".join(shown))
"""
    )
    assert done.stdout.splitlines()[1] == "True True"


@pytest.mark.parametrize("reset", [False, True])
def test_a_broken_connection_is_mended(hub: HubServer, run: Run, reset: bool):
    file = hub.repos["us/student"].files["model.safetensors"]
    file.cuts, file.reset = [PIECE + 5_000_000], reset
    done = run("print(download('us/student', 'model.safetensors', quiet=True))")
    assert Path(done.stdout.strip()).read_bytes() == LARGE
    assert done.stderr == ""
    # After an end of the connection, only what had not come; huggingface_hub begins again after a reset.
    assert hub.ranges() == [None, None if reset else f"bytes={PIECE}-"]


def test_a_connection_that_breaks_every_time_is_given_up(hub: HubServer, run: Run, tmp_path: Path):
    file = hub.repos["us/student"].files["model.safetensors"]
    file.cuts, file.reset = [1000] * 10, True
    done = run("tell(download, 'us/student', 'model.safetensors', quiet=True)")
    assert done.stdout.startswith("NotAvailable hf://us/student/model.safetensors: cannot be fetched (ReadError")
    assert len(hub.ranges()) == 3
    assert kept(tmp_path) == []


def test_offline(hub: HubServer, run: Run, tmp_path: Path):
    code = "tell(download, 'us/student', 'e/m.pt'); tell(download, 'us/student', 'e/m.pt', revision='v1')"
    offline = run(code, HF_HUB_OFFLINE="1")
    assert hub.requests == []
    message = f"not in the cache {tmp_path}/hf/hub, and HF_HUB_OFFLINE is set: unset it"
    assert offline.stdout.splitlines()[0].startswith(f"NotAvailable hf://us/student/e/m.pt: {message}")
    assert offline.stdout.splitlines()[1].startswith(f"NotAvailable hf://us/student@v1/e/m.pt: {message}")
    online = run(code).stdout
    assert Path(online.splitlines()[0]).read_bytes() == b"small"
    del hub.requests[:]
    assert run(code, HF_HUB_OFFLINE="1").stdout == online
    assert hub.requests == []


def test_what_is_not_there_is_told_in_one_line(hub: HubServer, run: Run):
    hub.repos["us/gated"] = Repo({"m.pt": File(b"m")}, gated=True)
    code = """
for repo, file, revision in [
    ("us/nothing", "m.pt", None), ("us/student", "nothing.pt", None), ("us/student", "e/m.pt", "nothing"),
    ("us/gated", "m.pt", None),
]:
    tell(download, repo, file, revision=revision)
"""
    repo, file, revision, gated = run(code).stdout.splitlines()
    assert repo.startswith(f"NotAvailable hf://us/nothing/m.pt: no repository {hub.url}/us/nothing; if it is private")
    assert file.startswith(f"NotAvailable hf://us/student/nothing.pt: no such file: see {hub.url}/us/student/tree/main")
    assert revision.startswith("NotAvailable hf://us/student@nothing/e/m.pt: no revision 'nothing'")
    assert gated.startswith(f"NotAvailable hf://us/gated/m.pt: gated: accept its terms at {hub.url}/us/gated")
    assert gated.endswith("hf auth login")
    *_, allowed = run(code, HF_TOKEN=TOKEN).stdout.splitlines()
    assert Path(allowed).read_bytes() == b"m"


def test_the_token_goes_to_the_hub_alone(hub: HubServer, run: Run):
    run("download('us/student', 'model.safetensors')", HF_TOKEN=TOKEN)
    sent = {(request.host, request.authorization) for request in hub.requests}
    assert sent == {("hub", f"Bearer {TOKEN}"), ("storage", None)}


@pytest.mark.parametrize(
    ("name", "served", "message"),
    [
        ("model.safetensors", LARGE[:-1], f"truncated (Consistency check failed: file should be of size {len(LARGE)}"),
        ("model.safetensors", LARGE[:-1] + b"?", "its hash is "),
        ("e/m.pt", b"smalL", "its hash is "),
    ],
)
def test_a_damaged_file_is_refused_and_not_kept(
    hub: HubServer, run: Run, tmp_path: Path, name: str, served: bytes, message: str
):
    file = hub.repos["us/student"].files[name]
    file.served = served
    code = f"tell(download, 'us/student', {name!r}, quiet=True)"
    assert run(code).stdout.startswith(f"IbmdError hf://us/student/{name}: {message}")
    assert kept(tmp_path) == []
    assert list(tmp_path.glob("ibmd/verified/*")) == []
    file.served = None
    assert Path(run(code).stdout.strip()).read_bytes() == file.content


def test_a_full_disk(hub: HubServer, run: Run, tmp_path: Path):
    # A limit on the size of files stands for a disk that fills up; one that is too small is seen beforehand.
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (12_000_000, 12_000_000))\n"
    code = "tell(download, 'us/student', 'model.safetensors', quiet=True)"
    full = run(limited + code).stdout
    hub.repos["us/student"].files["model.safetensors"].size = 10**18
    small = run(code).stdout
    for told in (full, small):
        assert told.startswith("IbmdError hf://us/student/model.safetensors: the disk is full (")
        assert len(told.splitlines()) == 1
    assert len(hub.ranges()) == 1
    assert kept(tmp_path) == []


def test_a_model_folder(hub: HubServer, run: Run):
    done = run("tell(snapshot, 'us/student', quiet=True); tell(snapshot, 'us/student', 'v1', quiet=True)")
    first, second = map(Path, done.stdout.splitlines())
    assert first == second
    assert first.name == hub.repos["us/student"].commit
    assert sorted(file.name for file in first.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert (first / "model.safetensors").read_bytes() == LARGE
    assert run("tell(snapshot, 'us/student', 'v1')", HF_HUB_OFFLINE="1").stdout.strip() == str(second)
    hub.repos["us/other"] = Repo({"weights.pt": File(b"w")})
    assert "hf://us/other/config.json: no such file" in run("tell(snapshot, 'us/other')").stdout
    del hub.repos["us/student"].files["README.md"]  # another commit, without a card
    folder = Path(run("tell(snapshot, 'us/student', quiet=True)").stdout.strip())
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_published_teacher_comes_from_its_repository(hub: HubServer, run: Run):
    hub.repos["alexzhou907/DDBM"] = Repo({"e2h_ema_0.9999_420000.pt": File(b"e2h")})
    told = run("tell(find_published, 'ddbm-edges2handbags'); tell(find_published, 'ddbm-diode')").stdout.splitlines()
    assert Path(told[0]).read_bytes() == b"e2h"
    assert told[1].startswith("NotAvailable hf://alexzhou907/DDBM/diode_ema_0.9999_440000.pt: no such file")


def test_without_symbolic_links_files_are_verified_too(hub: HubServer, run: Run, tmp_path: Path):
    code = "tell(download, 'us/student', 'e/m.pt')"
    path = Path(run(code, HF_HUB_DISABLE_SYMLINKS="1").stdout.strip())
    assert not path.is_symlink()
    path.write_bytes(b"other")
    assert "its hash is" in run(code, HF_HUB_DISABLE_SYMLINKS="1").stdout
    assert not path.exists()


@pytest.mark.slow  # huggingface_hub tries for 23 s
def test_no_network(run: Run):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, but nobody listens
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        done = run("tell(download, 'us/student', 'e/m.pt', quiet=True)", HF_ENDPOINT=url)
    assert done.stdout.startswith(f"NotAvailable hf://us/student/e/m.pt: not in the cache, and {url} does not answer (")
    assert done.stderr == ""


# ------------------------------------------------------------------------------------------------------ uploads

CARD = b"---\nlicense: mit\n---\n# A student\n"
PUSH = """
from pathlib import Path
weights = Path("WEIGHTS")
files = {"README.md": CARD, "config.json": b"{}", "model.safetensors": weights}
"""


@pytest.fixture
def pushing(run: Run, tmp_path: Path) -> Run:
    """Run lines of code that push `files`: two small ones and a large one."""
    weights = tmp_path / "weights"
    weights.write_bytes(LARGE)
    prelude = PUSH.replace("WEIGHTS", str(weights)).replace("CARD", repr(CARD))
    return lambda code, **environ: run(prelude + code, **{"HF_TOKEN": TOKEN, **environ})


def contents(repo: Repo) -> dict[str, bytes]:
    return {path: file.content for path, file in repo.files.items()}


PUSHED = {"README.md": CARD, "config.json": b"{}", "model.safetensors": LARGE}


def test_a_new_repository_is_private_and_filled_in_one_commit(hub: HubServer, pushing: Run):
    done = pushing(
        """
tell(push, files, "us/new")
tell(push, files, "hf://us/new", quiet=True)  # nothing has changed: nothing is done
files["config.json"] = b"[]"
tell(push, files, "us/new", quiet=True)
print(snapshot("us/new", quiet=True))
"""
    )
    *urls, folder = done.stdout.splitlines()
    assert urls == [f"{hub.url}/us/new"] * 3
    repo = hub.repos["us/new"]
    assert contents(repo) == {**PUSHED, "config.json": b"[]"}
    assert repo.private
    assert len(repo.messages) == 2
    assert (Path(folder) / "model.safetensors").read_bytes() == LARGE
    assert (Path(folder) / "config.json").read_bytes() == b"[]"
    assert [request.host for request in hub.requests if request.method == "PUT"] == ["storage"]  # the large file, once
    assert {request.authorization for request in hub.requests if request.host == "storage"} == {None}
    assert done.stderr == f"pushing 3 files, 25.6 MB, to {hub.url}/us/new\n"


def test_what_is_public_is_meant_to_be(hub: HubServer, pushing: Run):
    hub.repos["us/open"] = Repo({})
    hub.repos["us/closed"] = Repo({}, private=True)
    done = pushing(
        """
tell(push, files, "us/open")
tell(push, files, "us/open", public=True)
tell(push, files, "us/closed", public=True)
tell(push, files, "us/new", public=True)
"""
    )
    refused, *urls = done.stdout.splitlines()
    assert refused == "UsageError hf://us/open: is there, and public: add --public to push where all can read"
    assert urls == [f"{hub.url}/us/{name}" for name in ("open", "closed", "new")]
    assert [hub.repos[f"us/{name}"].private for name in ("open", "closed", "new")] == [False, True, False]
    assert [len(hub.repos[f"us/{name}"].messages) for name in ("open", "closed", "new")] == [1, 1, 1]
    warning = f"warning: hf://us/closed: is there, and stays private: make it public at {hub.url}/us/closed/settings"
    assert warning in done.stderr.splitlines()


def test_who_may_not_push_is_told_in_one_line(hub: HubServer, pushing: Run):
    hub.repos["them/theirs"] = Repo({})
    code = 'for repo in ("us/new", "them/new", "them/theirs"):\n    tell(push, files, repo, public=True)'
    nobody = pushing(code, HF_TOKEN="").stdout.splitlines()
    offline = pushing(code, HF_HUB_OFFLINE="1").stdout.splitlines()
    assert hub.requests == []
    stranger = pushing(code, HF_TOKEN="hf_other").stdout.splitlines()
    us, *them = pushing(code).stdout.splitlines()
    assert us == f"{hub.url}/us/new"
    for lines, expected in [
        (nobody, "not logged in: hf auth login, or set HF_TOKEN to a token that may write"),
        (offline, "HF_HUB_OFFLINE is set: unset it to push"),
        (stranger, f"{hub.url} does not accept this login (Invalid credentials in Authorization header): log in again"),
    ]:
        repos = ("us/new", "them/new", "them/theirs")
        for line, repo in zip(lines, repos, strict=True):
            assert line.startswith(f"NotAvailable hf://{repo}: {expected}")
    for line, repo in zip(them, ("them/new", "them/theirs"), strict=True):
        said = f"this login may not write there (You don't have the rights to write to {repo})"
        assert line.startswith(f"NotAvailable hf://{repo}: {said}: name a repository of your own")
    assert list(hub.repos) == ["us/student", "them/theirs", "us/new"]
    assert contents(hub.repos["them/theirs"]) == {}


@pytest.mark.parametrize("where", ["POST /api/repos/create!", "PUT /", "/commit/main", "/commit/main!"])
def test_a_push_whose_connection_breaks_is_taken_up(hub: HubServer, pushing: Run, where: str):
    hub.breaks = [where]
    done = pushing('tell(push, files, "us/new", quiet=True)')
    assert hub.breaks == []
    assert done.stdout == f"{hub.url}/us/new\n"
    assert contents(hub.repos["us/new"]) == PUSHED
    assert len(hub.repos["us/new"].messages) == 1


def test_a_push_that_cannot_end_leaves_nothing_half(hub: HubServer, pushing: Run):
    hub.repos["us/old"] = Repo({"config.json": File(b"old")}, private=True)
    hub.breaks = ["/commit/main"] * 3
    code = 'tell(push, files, "us/old", quiet=True)'
    told = pushing(code).stdout
    assert told.startswith(f"NotAvailable hf://us/old: the connection to {hub.url} broke, or there was none (")
    assert told.endswith("run the same command again\n")
    assert len(told.splitlines()) == 1
    assert contents(hub.repos["us/old"]) == {"config.json": b"old"}
    assert pushing(code).stdout == f"{hub.url}/us/old\n"
    assert contents(hub.repos["us/old"]) == PUSHED


def test_a_card_that_the_hub_refuses(hub: HubServer, pushing: Run):
    code = 'files["README.md"] = CARD.replace(b"mit", b"mine"); tell(push, files, "us/new", quiet=True)'
    told = pushing(code.replace("CARD", repr(CARD))).stdout
    assert told.startswith(
        'IbmdError hf://us/new: the Hub refuses it: Invalid metadata in README.md. - "license" must be'
    )
    assert len(told.splitlines()) == 1
    assert contents(hub.repos["us/new"]) == {}


@pytest.mark.parametrize("name", ["", "student", "us/student/x", "us/student@v1", "us/ student", "https://us/student"])
def test_names_of_repositories(name: str):
    assert repository("us/a-B_c.1") == repository("hf://us/a-B_c.1") == "us/a-B_c.1"
    with pytest.raises(UsageError, match="expected OWNER/REPO"):
        repository(name)
