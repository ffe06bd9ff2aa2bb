"""A small server that speaks the Hub's protocol as huggingface_hub uses it, on this machine, with faults on demand.

Like the real one it keeps small files itself (etag: the hash of a git blob) and sends clients to a storage host, here a
second port, for large ones (etag: SHA-256), in both directions. Its one user, `us`, has the token `TOKEN`. To teach it
more of the protocol, add a method and a row of `ROUTES`.
"""

import base64
import hashlib
import io
import json
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import yaml

LARGE = 100_000
TOKEN = "hf_test"
USER = "us"
LICENCES = {"mit", "apache-2.0", "cc-by-sa-4.0", "cc-by-nc-sa-4.0", "other"}


@dataclass
class File:
    """A file of a repository, and what is to go wrong with it.

    Attributes:
        content: what its metadata speak of.
        served: what is sent in its place, e.g. less of it.
        size: what the metadata give as its size.
        cuts: for each of the next transfers, the number of bytes after which the connection breaks.
        reset: breaks are resets (RST), not ends (FIN), of the connection.
    """

    content: bytes
    served: bytes | None = None
    size: int | None = None
    cuts: list[int] = field(default_factory=list)
    reset: bool = False

    @property
    def large(self) -> bool:
        return len(self.content) >= LARGE

    @property
    def etag(self) -> str:
        if self.large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    """A repository: its files, the names of its last commit, and whether a token is needed to read it.

    `messages` are those of the commits that were made here.
    """

    files: dict[str, File]
    revisions: tuple[str, ...] = ("main",)
    gated: bool = False
    private: bool = False
    messages: list[str] = field(default_factory=list)

    @property
    def commit(self) -> str:
        return hashlib.sha1(json.dumps({name: f.etag for name, f in self.files.items()}).encode()).hexdigest()


@dataclass(frozen=True)
class Request:
    """What a client asked for, and of which of the two hosts."""

    host: str
    method: str
    path: str
    range: str | None
    authorization: str | None


class HubServer:
    """The Hub (`url`) and its storage host, serving `repos`; `requests` is what was asked.

    A context manager: both listen on free ports of 127.0.0.1 while it is entered. The connection of the next request
    whose line ("POST /api/…") contains the first of `breaks` is cut: when it has been carried out, but not answered, if
    that ends in "!", else before anything of it is read.
    """

    def __init__(self, repos: dict[str, Repo]) -> None:
        self.repos, self.requests = repos, list[Request]()
        self.uploads: dict[str, bytes] = {}
        self.breaks: list[str] = []
        self._hosts = {name: ThreadingHTTPServer(("127.0.0.1", 0), self._handler(name)) for name in ("hub", "storage")}
        self.url = f"http://127.0.0.1:{self._hosts['hub'].server_port}"
        self.storage = f"http://localhost:{self._hosts['storage'].server_port}"  # by another name: it is another host

    def __enter__(self) -> "HubServer":
        self._threads = [threading.Thread(target=host.serve_forever, args=(0.05,)) for host in self._hosts.values()]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for host, thread in zip(self._hosts.values(), self._threads, strict=True):
            host.shutdown()
            thread.join()
            host.server_close()

    def ranges(self, host: str = "storage") -> list[str | None]:
        """The ranges of the transfers that were asked of a host, in order."""
        return [request.range for request in self.requests if request.host == host and request.method == "GET"]

    def _handler(self, host: str) -> type:
        return type("Handler", (_Handler,), {"server_of": self, "host": host})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: HubServer
    host: str

    def log_message(self, *_: object) -> None:
        pass

    def _route(self) -> None:
        asked = self.headers.get
        request = Request(self.host, self.command, self.path, asked("Range"), asked("Authorization"))
        self.server_of.requests.append(request)
        breaks = self.server_of.breaks
        is_cut = bool(breaks) and breaks[0].rstrip("!") in f"{self.command} {self.path}"
        if is_cut:
            self.close_connection = True
            if not breaks.pop(0).endswith("!"):
                self.connection.close()
                return
            self.wfile = io.BytesIO()  # the answer goes nowhere
        for host, methods, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, self.path.partition("?")[0])
            if host == self.host and self.command in methods and match:
                answer(self, **{key: unquote(value) for key, value in match.groupdict().items()})
                break
        else:
            self._refuse(404, "", f"no route for {self.command} {self.path}")

    do_GET = do_HEAD = do_POST = do_PUT = _route

    # ---- answers of the Hub

    def resolve(self, repo: str, revision: str, file: str) -> None:
        """Metadata of a file; and the file itself, or where it is kept."""
        known = self._find(repo)
        if known is None:
            return None
        if known.gated and not self._is_authorised():
            return self._refuse(401, "GatedRepo", f"Access to model {repo} is restricted.")
        if revision not in (*known.revisions, known.commit):
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if file not in known.files:
            return self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": known.commit})
        entry = known.files[file]
        headers = {"X-Repo-Commit": known.commit, "ETag": f'"{entry.etag}"'}
        if not entry.large:
            return self._send(entry, headers)
        headers |= {
            "X-Linked-ETag": f'"{entry.etag}"',
            "X-Linked-Size": str(entry.size or len(entry.content)),
            "Location": f"{self.server_of.storage}/{entry.etag}",
            "Content-Length": "0",
        }
        return self._head(302, headers)

    def describe(self, repo: str) -> None:
        """What the Hub says of a repository."""
        if (known := self._find(repo)) is not None:
            self._json(
                200, {"id": repo, "modelId": repo, "private": known.private, "sha": known.commit, "siblings": []}
            )

    def describe_data(self, repo: str) -> None:
        """What the Hub says of a data set."""
        if (known := self._find(repo)) is not None:
            told = {"id": repo.removeprefix("datasets/"), "private": known.private, "sha": known.commit, "tags": []}
            self._json(200, told | {"siblings": [{"rfilename": name} for name in known.files]})

    def tree(self, repo: str, revision: str, folder: str = "") -> None:
        """The files and folders in a folder of a data set."""
        if (known := self._find(repo)) is None:
            return
        inside = [name for name in known.files if name.startswith(folder)]
        if folder and not inside:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        deep = "recursive=true" in self.path.lower()
        here = [name for name in inside if deep or "/" not in name.removeprefix(folder).lstrip("/")]
        folders = {folder + name.removeprefix(folder).split("/")[0] for name in inside if name not in here}
        files = [(name, known.files[name]) for name in here]
        found = [{"type": "file", "path": name, "size": len(f.content), "oid": f.etag} for name, f in files]
        self._json(200, found + [{"type": "directory", "path": name, "oid": "0" * 40} for name in sorted(folders)])

    def create(self) -> None:
        """Make a repository."""
        asked = json.loads(self._body())
        repo = f"{asked['organization']}/{asked['name']}"
        if not self._may_write(repo):
            return
        url = f"{self.server_of.url}/{repo}"
        if repo in self.server_of.repos:
            return self._json(409, {"error": "You already created this model repo", "url": url})
        self.server_of.repos[repo] = Repo({}, private=asked.get("visibility") == "private")
        self._json(200, {"url": url, "name": repo})

    def validate(self) -> None:
        """Check the front matter of a card."""
        _, front, _ = json.loads(self._body())["content"].split("---\n", 2)
        licence = yaml.safe_load(front).get("license")
        errors = [] if licence in LICENCES else [{"message": f'"license" must be one of {sorted(LICENCES)}'}]
        self._json(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        """Tell which files are to be sent to the storage host, and which are there already."""
        asked = json.loads(self._body())["files"]
        if self._may_write(repo):
            known = self.server_of.repos[repo].files
            answers = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] >= LARGE else "regular",
                    "shouldIgnore": False,
                    "oid": known[file["path"]].etag if file["path"] in known else None,
                }
                for file in asked
            ]
            self._json(200, {"files": answers})

    def batch(self, repo: str) -> None:
        """Tell where large files are to be sent."""
        asked = json.loads(self._body())["objects"]
        if self._may_write(repo):
            verify = {"href": f"{self.server_of.url}/{repo}/verify"}
            for wanted in asked:
                if wanted["oid"] not in self.server_of.uploads:
                    upload = {"href": f"{self.server_of.storage}/{wanted['oid']}"}
                    wanted["actions"] = {"upload": upload, "verify": verify}
            self._json(200, {"transfer": "basic", "objects": asked})

    def verify(self, repo: str) -> None:
        """Tell whether a large file arrived."""
        asked = json.loads(self._body())
        arrived = len(self.server_of.uploads.get(asked["oid"], b"")) == asked["size"]
        self._json(200 if arrived else 404, {})

    def commit(self, repo: str, revision: str) -> None:
        """Change files, all of them or none."""
        lines = [json.loads(line) for line in self._body().splitlines()]
        if not self._may_write(repo):
            return
        header, *changes = [(line["key"], line["value"]) for line in lines]
        contents = {
            value["path"]: base64.b64decode(value["content"]) if key == "file" else self.server_of.uploads[value["oid"]]
            for key, value in changes
        }
        known = self.server_of.repos[repo]
        known.files = {**known.files, **{path: File(content) for path, content in contents.items()}}
        known.messages.append(header[1]["summary"])
        url = f"{self.server_of.url}/{repo}/commit/{known.commit}"
        self._json(200, {"commitUrl": url, "commitOid": known.commit})

    # ---- answers of the storage host

    def keep(self, etag: str) -> None:
        """Take the content of a large file."""
        content = self._body()
        right = hashlib.sha256(content).hexdigest() == etag
        if right:
            self.server_of.uploads[etag] = content
        self._json(200 if right else 400, {})

    def blob(self, etag: str) -> None:
        """The content of a large file."""
        self._send(next(f for repo in self.server_of.repos.values() for f in repo.files.values() if f.etag == etag), {})

    # ---- means

    def _is_authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _find(self, repo: str) -> Repo | None:
        """Return a repository that the client may see; otherwise tell that there is none."""
        known = self.server_of.repos.get(repo)
        if known is None or (known.private and not self._is_authorised()):
            self._refuse(404 if self._is_authorised() else 401, "RepoNotFound", "Repository not found")
            return None
        return known

    def _may_write(self, repo: str) -> bool:
        """Tell whether the client may write to a repository, and tell it if it may not."""
        if not self._is_authorised():
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif not repo.startswith(f"{USER}/"):
            self._refuse(403, "", f"You don't have the rights to write to {repo}")
        else:
            return True
        return False

    def _body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        parts = []
        while size := int(self.rfile.readline(), 16):  # Transfer-Encoding: chunked
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _json(self, status: int, content: dict) -> None:
        data = json.dumps(content).encode()
        self._head(status, {"Content-Type": "application/json", "Content-Length": str(len(data))})
        self.wfile.write(data)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def _refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        told = {"X-Error-Code": code, "X-Error-Message": message, "Content-Length": "0", **(headers or {})}
        self._head(status, told)

    def _send(self, entry: File, headers: dict[str, str]) -> None:
        whole = entry.content if entry.served is None else entry.served
        first = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "bytes=0-")[1])
        part = whole[first:]
        headers = {**headers, "Content-Length": str(len(part)), "Accept-Ranges": "bytes"}
        if "Range" in self.headers:
            headers["Content-Range"] = f"bytes {first}-{len(whole) - 1}/{len(whole)}"
        self._head(206 if "Range" in self.headers else 200, headers)
        if self.command == "HEAD":
            return
        if not entry.cuts:
            self.wfile.write(part)
            return
        self.wfile.write(part[: entry.cuts.pop(0)])
        self.wfile.flush()
        if entry.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()


DATA = r"(?P<repo>datasets/[^/]+/[^/]+)"
ROUTES = [
    ("hub", ("GET", "HEAD"), r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.resolve),
    ("hub", ("GET",), r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/main)?", _Handler.describe),
    ("hub", ("GET", "HEAD"), rf"/{DATA}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.resolve),
    ("hub", ("GET",), rf"/api/{DATA}(/revision/[^/]+)?", _Handler.describe_data),
    ("hub", ("GET",), rf"/api/{DATA}/tree/(?P<revision>[^/]+)", _Handler.tree),
    ("hub", ("GET",), rf"/api/{DATA}/tree/(?P<revision>[^/]+)/(?P<folder>.+)", _Handler.tree),
    ("hub", ("POST",), r"/api/repos/create", _Handler.create),
    ("hub", ("POST",), r"/api/validate-yaml", _Handler.validate),
    ("hub", ("POST",), r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("hub", ("POST",), r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.batch),
    ("hub", ("POST",), r"/(?P<repo>[^/]+/[^/]+)/verify", _Handler.verify),
    ("hub", ("POST",), r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("storage", ("GET",), r"/(?P<etag>[0-9a-f]{64})", _Handler.blob),
    ("storage", ("PUT",), r"/(?P<etag>[0-9a-f]{64})", _Handler.keep),
]
