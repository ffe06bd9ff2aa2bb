"""Verified downloads from the Hub and from other servers.

A file is fetched by huggingface_hub into its own cache (`HF_HOME`, `HF_ENDPOINT`, `HF_HUB_OFFLINE` and tokens as
everywhere), and its hash compared, once, with the one that the Hub keeps of it. Every failure is one line.
"""

import errno
import hashlib
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import unquote
from urllib.request import Request, urlopen

from ibmd_cli import __version__
from ibmd_cli.errors import IbmdError, NotAvailable, UsageError
from ibmd_cli.files import atomic_file
from ibmd_cli.reporting import Reporter

MB = 1_000_000
BLOCK = 1 << 20  # bytes
TRIES = 3
"""Of the Hub."""
MOST_TRIES = 5
"""Of other servers, in a row, without a byte in between."""
PAUSE = 2.0  # seconds between them
PASSING = (408, 429, 500, 502, 503, 504)
"""What a server says when it is busy."""
LOST = {"NetworkError", "RemoteProtocolError"}
"""A connection that broke, where huggingface_hub did not mend it. Of httpx in its version 1, of httpx2 in version 2."""
HF = re.compile(
    r"hf://(?P<repo>[^\s/@]+/[^\s/@]+)(@(?P<revision>refs/(pr|convert)/[^\s/@]+|[^\s/@]+))?(/(?P<file>.+))?"
)

T = TypeVar("T")


def cache_folder() -> Path:
    """Return the folder of what is made once and kept: `$IBMD_CACHE`, `$XDG_CACHE_HOME/ibmd` or `~/.cache/ibmd`."""
    if own := os.environ.get("IBMD_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ibmd"


# ---------------------------------------------------------------------------------------------------------- the Hub


def parse_hf(reference: str) -> tuple[str, str | None, str | None]:
    """Split `hf://OWNER/REPO[@REVISION][/FILE]`.

    Args:
        reference: the text. A revision is a branch, tag or commit; a `/` in it is written `%2F`, save in `refs/pr/1`.

    Returns:
        OWNER/REPO, the revision or None, the path of the file in the repository or None.

    Raises:
        UsageError: it is not of this form.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    wrong = f"{reference!r}: expected hf://OWNER/REPO, hf://OWNER/REPO@REVISION or hf://OWNER/REPO[@REVISION]/FILE"
    match = HF.fullmatch(reference)
    if match is None:
        raise UsageError(wrong)
    repo, revision, file = match["repo"], match["revision"], match["file"]
    if repo.split("/")[0] in ("models", "datasets", "spaces", "buckets"):
        raise UsageError(f"{wrong}, of a model: leave out models/")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"{wrong} ({error})") from error
    if file is not None and {"", ".", ".."} & set(re.split(r"[/\\]", file)):
        raise UsageError(f"{wrong}; FILE may not have empty parts, '.' or '..'")
    return repo, None if revision is None else unquote(revision), file


def snapshot(repo: str, revision: str | None = None, *, quiet: bool = False) -> Path:
    """Fetch a model folder of ibmd from the Hub: config.json, model.safetensors, and README.md if there is one.

    Args:
        repo: OWNER/REPO.
        revision: branch, tag or commit; None for the main branch.
        quiet: show no progress.

    Returns:
        The folder in the cache of the Hub. All files are of one commit, whatever is pushed in the meantime.

    Raises:
        NotAvailable, IbmdError: those of `download`.
    """
    folder = download(repo, "config.json", revision=revision, quiet=quiet).parent  # …/snapshots/COMMIT
    download(repo, "model.safetensors", revision=folder.name, quiet=quiet)
    with suppress(NotAvailable):  # the card is for people
        download(repo, "README.md", revision=folder.name, quiet=quiet)
    return folder


def download(repo: str, file: str, *, revision: str | None = None, quiet: bool = False) -> Path:
    """Fetch a file from the Hub, or find it in the cache.

    A connection that breaks is taken up where it broke. The file's hash is compared with the Hub's when it comes, and
    again only if the file has changed.

    Args:
        repo: OWNER/REPO.
        file: path in the repository.
        revision: branch, tag or commit; None for the main branch.
        quiet: show no progress, nor what huggingface_hub has to say.

    Returns:
        The path in the cache of the Hub; read only.

    Raises:
        NotAvailable: there is no such repository, revision or file; it is gated; there is no network, or
            `HF_HUB_OFFLINE` is set, and the file is not in the cache.
        IbmdError: it came truncated or with a wrong hash, and is not kept; or the disk is full.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import are_progress_bars_disabled

    name = f"hf://{repo}{'@' + revision if revision else ''}/{file}"
    bar: Any = _bar(Reporter(quiet or are_progress_bars_disabled()), file)

    def fetch() -> Path:
        path = Path(hf_hub_download(repo, file, revision=revision, tqdm_class=bar))
        _verify_once(path, name, repo, file)
        return path

    with manners(quiet):
        return persist(fetch, lambda error: _explain(error, name, repo, revision))


def persist(call: Callable[[], T], explain: Callable[[Exception], IbmdError]) -> T:
    """Call until it succeeds, again only where the connection broke; else raise what `explain` makes of the error."""
    tries = TRIES
    while True:
        tries -= 1
        try:
            return call()
        except IbmdError:
            raise
        except Exception as error:
            if tries == 0 or not is_lost(error):
                raise explain(error) from error
            time.sleep(1)


def is_lost(error: Exception) -> bool:
    """Tell whether a connection broke."""
    return bool(LOST & {cls.__name__ for cls in type(error).__mro__})


@contextmanager
def manners(quiet: bool, bars: bool = True) -> Iterator[None]:
    """Have huggingface_hub refuse what the disk cannot hold, rather than warn; be silent, or show no bars, if asked."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    verbosity, hide = logging.get_verbosity(), not bars and not are_progress_bars_disabled()
    if quiet:
        logging.set_verbosity_error()
    if hide:
        disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Not enough free disk space")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if hide:
            enable_progress_bars()


def _explain(error: Exception, name: str, repo: str, revision: str | None) -> IbmdError:
    """Return the error to show for one of huggingface_hub's."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    said = next(iter(str(error).strip().splitlines()), type(error).__name__)
    match error:
        case errors.GatedRepoError():
            return NotAvailable(f"{name}: gated: accept its terms at {page}, then log in: hf auth login")
        case errors.RepositoryNotFoundError():
            return NotAvailable(f"{name}: no repository {page}; if it is private, log in: hf auth login")
        case errors.RevisionNotFoundError():
            return NotAvailable(f"{name}: no revision {revision!r}: see {page}/commits")
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled():
            if constants.HF_HUB_OFFLINE:
                return NotAvailable(
                    f"{name}: not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: "
                    "unset it, or fetch the file where there is a network"
                )
            why = next(iter(str(error.__cause__ or error).strip().splitlines()), "")
            return NotAvailable(
                f"{name}: not in the cache, and {constants.ENDPOINT} does not answer ({why}): "
                "is there a network, and is HF_ENDPOINT right?"
            )
        case errors.EntryNotFoundError():
            return NotAvailable(f"{name}: no such file: see {page}/tree/{revision or 'main'}")
        case OSError(errno=errno.ENOSPC | errno.EDQUOT | errno.EFBIG) | UserWarning():
            return IbmdError(
                f"{name}: the disk is full ({said}): make room, or set HF_HOME to a folder on another disk"
            )
        case OSError() if "Consistency check failed" in said:
            return IbmdError(f"{name}: truncated ({said}): try again")
    return NotAvailable(f"{name}: cannot be fetched ({type(error).__name__}: {said})")


# ----------------------------------------------------------------------------------------------------- other servers


def fetch_file(url: str, path: Path, reporter: Reporter, digest: str) -> None:
    """Fetch a file of any size from any server, from where an earlier transfer of it broke.

    Args:
        url: of the file.
        path: where to write it; it is called `path`.part until all of it is there.
        reporter: for progress.
        digest: what it is verified by, "md5:…" or "sha256:…" with the first digits at least; "": by nothing.

    Raises:
        NotAvailable: the server does not have it, or cannot be reached.
        IbmdError: it came damaged; it is not kept.
        OSError: it cannot be written.
    """
    # huggingface_hub takes at most 50 GB without the Hub's own protocol; pooch and torch.hub begin anew after a break.
    part, tries = path.with_name(f"{path.name}.part"), MOST_TRIES
    while True:
        start = part.stat().st_size if part.exists() else 0
        try:
            if _receive(url, part, start, reporter):
                break
            said = "the connection broke"
        except HTTPError as error:
            if error.code == 416 and error.headers.get("Content-Range", "").rpartition("/")[2] == str(start):
                break  # there is no more of it
            said = f"the server says {error.code} {error.reason}"
            if error.code not in PASSING:
                raise NotAvailable(f"{url}: {said}: is it still there?") from error
        except (HTTPException, URLError, TimeoutError, ConnectionError) as error:
            said = str(error) or type(error).__name__
        grown = (part.stat().st_size if part.exists() else 0) > start
        tries = MOST_TRIES if grown else tries - 1 if url.startswith("http") else 0
        if not tries:
            raise NotAvailable(f"{url}: {said}: is there a network? The same command goes on where it broke")
        time.sleep(PAUSE)
    algorithm, _, expected = digest.partition(":")
    if expected:
        reporter.note(f"verifying {path.name}")
        with part.open("rb") as stream:
            found = hashlib.file_digest(stream, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
        if not found.startswith(expected):
            part.unlink()
            raise IbmdError(f"{url}: damaged on the way: its {algorithm} is {found}, expected {expected}: try again")
    part.replace(path)
    part.with_suffix(".tag").unlink(missing_ok=True)


def _receive(url: str, path: Path, start: int, reporter: Reporter) -> bool:
    """Write what comes from byte `start` on to the end of `path`, or all of it anew; tell whether all of it came."""
    tag = path.with_suffix(".tag")
    headers = {"User-Agent": f"ibmd/{__version__}", "Range": f"bytes={start}-"}
    if start and tag.exists() and (mark := tag.read_text(encoding="utf-8")):
        headers["If-Range"] = mark  # if it has changed, all of it comes
    with urlopen(Request(url, headers=headers), timeout=60) as response:
        at = 0
        if response.status == 206:
            at = int(response.headers["Content-Range"].removeprefix("bytes ").partition("-")[0])
        length = response.headers.get("Content-Length")
        end = None if length is None else at + int(length)
        mark = response.headers.get("ETag", "W/")
        if mark.startswith("W/"):  # a weak one does not tell whether the bytes are the same
            mark = response.headers.get("Last-Modified", "")
        tag.write_text(mark, encoding="utf-8")
        bar = _bar(reporter, path.name.removesuffix(".part"))(total=end, initial=at)
        with open(path, "r+b" if path.exists() else "wb") as file, bar:
            file.seek(at)
            file.truncate()
            while True:
                try:
                    block = response.read(BLOCK)
                except OSError as error:  # not of the disk
                    raise URLError(error) from error
                if not block:
                    break
                file.write(block)
                bar.update(len(block))
                at += len(block)
    return end in (None, at)


# ---------------------------------------------------------------------------------------------------------- means


def _verify_once(path: Path, name: str, repo: str, file: str) -> None:
    """Compare a file of the Hub's cache with the hash that the Hub keeps of it, unless that was done before."""
    blob = path.resolve()
    record = cache_folder() / "verified" / hashlib.sha256(str(blob).encode()).hexdigest()
    stat = blob.stat()
    state = f"{stat.st_size} {stat.st_mtime_ns} {blob}\n"
    if record.is_file() and record.read_text(encoding="utf-8", errors="surrogateescape") == state:
        return
    expected = _expected_hash(path, repo, file)
    with blob.open("rb") as stream:
        if re.fullmatch("[0-9a-f]{64}", expected):  # a large file
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        elif re.fullmatch("[0-9a-f]{40}", expected):  # a small one, kept in git itself as a blob
            found = hashlib.sha1(f"blob {stat.st_size}\0".encode() + stream.read(), usedforsecurity=False).hexdigest()
        else:
            raise IbmdError(f"{name}: cannot be verified: the server names no hash of it, only {expected!r}")
    if found != expected:
        blob.unlink()
        path.unlink(missing_ok=True)
        raise IbmdError(f"{name}: its hash is {found}, expected {expected}: deleted; try again")
    with suppress(OSError), atomic_file(record) as new:  # where nothing can be kept, each use verifies
        new.write_text(state, encoding="utf-8", errors="surrogateescape")


def _expected_hash(path: Path, repo: str, file: str) -> str:
    """Return the Hub's hash of a file in its cache: the name of the blob that it links to, or else asked of the Hub."""
    if path.is_symlink():
        return path.readlink().name
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    commit = path.parents[file.count("/")].name  # …/snapshots/COMMIT/FILE
    return str(get_hf_file_metadata(hf_hub_url(repo, file, revision=commit)).etag)


def _bar(reporter: Reporter, file: str) -> type:
    """Return the class that huggingface_hub is to use for progress in place of tqdm's; its bars are `reporter`'s."""

    class Bar:
        def __init__(self, *, total: int | None = None, initial: int = 0, **_: Any) -> None:
            self.total, self.n = total or 0, initial
            self.stack = ExitStack()
            shown = reporter if self.total >= MB else Reporter(quiet=True)
            meter = shown.progress(file, _megabytes(self.total), "MB", _megabytes(initial))
            self.meter = self.stack.enter_context(meter)

        def update(self, n: int = 1) -> None:
            before, self.n = _megabytes(self.n), self.n + n
            if _megabytes(self.n) != before:
                self.meter.advance(_megabytes(self.n) - before)

        def ignore(self, *_: Any, **__: Any) -> None:
            """Bytes over the wire, which may be fewer than the file's, and the rate, which the meter finds itself."""

        update_transfer = set_postfix_str = set_transfer_postfix_str = ignore

        def close(self) -> None:
            self.stack.close()

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *_: object) -> None:
            self.close()

    return Bar


def _megabytes(n: int) -> int:
    return math.ceil(n / MB)
