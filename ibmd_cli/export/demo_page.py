"""A student as one HTML file: one draws in a browser and sees the result at once. No server, nothing to install.

The page (`assets/web/demo.html`) carries the student as ONNX and ONNX Runtime Web, which runs it; it works from a disk
as from any web server, and sends nothing anywhere. The runtime is fetched once, by npm.
"""

import base64
import gzip
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from ibmd_cli.data.embedded import embedded_pairs
from ibmd_cli.errors import IbmdError, NotAvailable, UsageError
from ibmd_cli.html import data_uri, render, write_html
from ibmd_cli.hub import cache_folder
from ibmd_cli.images.encode import encode
from ibmd_cli.models.card import describe_teacher
from ibmd_cli.models.model import StudentModel

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
RUNTIME = {
    "runtime": ("ort.wasm.bundle.min.mjs", "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90"),
    "wasm": ("ort-wasm-simd-threaded.wasm", "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2"),
}
"""Name in the template → file of the package's `dist`, and its SHA-256."""

LARGEST_MODEL = 200_000_000
"""Of a student in a page: browsers stumble over larger files."""

DRAWINGS = [
    "M36 8a28 28 0 1 0 .01 0zM26 27v7M46 27v7M22 44c6 9 22 9 28 0",
    "M36 24c-8-8-25-5-25 13 0 15 12 25 18 25 3 0 4-2 7-2s4 2 7 2c6 0 18-10 18-25 0-18-17-21-25-13zc0-6 2-10 6-14"
    "M40 15c3-7 9-8 14-8 0 6-5 10-14 8z",
    "M8 37c9-16 31-20 44-2 3-5 7-9 13-11-3 8-3 15 0 23-6-2-10-5-13-9-13 17-35 14-44-1zM20 33v1M31 28c3 6 3 11 0 17",
]
"""Examples, for students of drawings: SVG paths on 72×72."""


def write_demo_page(student: StudentModel, model: Path, page: Path) -> None:
    """Write the page of a student; one that is there is replaced.

    Args:
        student: for its configuration.
        model: the same student as ONNX. Its input `x_T` is the source, float32 (1, 3, H, W); all others are noise.
        page: the HTML file; about 4/3 of the compressed sizes of the model and of the runtime (3.7 MB).

    Raises:
        UsageError: the student needs a mask or a class, or is too large.
        NotAvailable: the extra `onnx` is not installed, or the runtime cannot be had.
        IbmdError: the runtime in the cache is not the expected one, or the model has inputs that a page cannot fill.
    """
    if student.config["mask"] or student.config["classes"]:
        raise UsageError(f"--format web: {student.name} needs a mask or a class, for which a page has no place")
    if (size := model.stat().st_size) > LARGEST_MODEL:
        raise UsageError(
            f"--format web: {student.name} has {size / 1e6:.0f} MB: a page holds {LARGEST_MODEL / 1e6:.0f} MB at most; "
            "export it as onnx"
        )
    config = student.config
    settings = {
        "name": student.name,
        "size": student.image_size,
        "source_scale": student.source_scale,
        "inputs": _inputs(model, student.image_size),
        "examples": _examples(config),
    }
    data = describe_teacher(config)["data"]
    about = (
        f"Distilled with ibmd {config['ibmd_version']}{f' from a teacher of {data}' if data else ''}. Licence of the "
        f"student: {config['licence']}. Run by ONNX Runtime Web {VERSION} (© Microsoft, MIT licence)."
    )
    text = render(
        "demo.html",
        title=student.name,
        task=config["task"].rstrip("."),
        about=about,
        config=settings,
        model=_pack(model.read_bytes()),
        **{name: _pack(content) for name, content in runtime().items()},
    )
    write_html(page, text)


def runtime() -> dict[str, bytes]:
    """Return the files of `RUNTIME`, from the cache or, the first time, by npm.

    Raises:
        NotAvailable: the package is not in the cache, and cannot be fetched.
        IbmdError: it is not the expected one.
    """
    package = cache_folder() / f"{PACKAGE}-{VERSION}.tgz"
    if not package.is_file():
        _fetch(package)
    wrong = f"{package}: not {PACKAGE} {VERSION} as published: delete it and run again"
    contents = {}
    try:
        with tarfile.open(package) as archive:
            for place, (file, digest) in RUNTIME.items():
                stream = archive.extractfile(f"package/dist/{file}")
                contents[place] = stream.read() if stream else b""
                if hashlib.sha256(contents[place]).hexdigest() != digest:
                    raise IbmdError(wrong)
    except (tarfile.TarError, KeyError, EOFError, OSError) as error:
        raise IbmdError(wrong) from error
    return contents


def _fetch(package: Path) -> None:
    wanted = (
        f"a page needs {PACKAGE} {VERSION}, which is fetched once by npm: %s. Or put "
        f"https://registry.npmjs.org/{PACKAGE}/-/{package.name} at {package}"
    )
    if (npm := shutil.which("npm")) is None:
        raise NotAvailable(wanted % "install Node.js")
    package.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=package.parent) as folder:
        command = [npm, "pack", "--silent", f"{PACKAGE}@{VERSION}", "--pack-destination", folder]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
        found = next(Path(folder).glob("*.tgz"), None)
        if done.returncode or found is None:
            said = next(iter(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
            raise NotAvailable(wanted % f"it failed ({said})")
        found.replace(package)


def _inputs(model: Path, side: int) -> dict[str, list[int]]:
    """Return the inputs of an ONNX file and their shapes for one image."""
    try:
        import onnxruntime
    except ImportError as error:
        raise NotAvailable("--format web needs ONNX Runtime: pip install 'ibmd-cli[onnx]'") from error
    inputs = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).get_inputs()
    shapes = {i.name: [1, *(n if isinstance(n, int) else side for n in i.shape[1:])] for i in inputs}
    if "x_T" not in shapes or any(i.type != "tensor(float)" for i in inputs):
        found = ", ".join(f"{i.name}: {i.type}" for i in inputs)
        raise IbmdError(f"{model}: has the inputs {found}; a page needs x_T and noise, all tensor(float)")
    return shapes


def _examples(config: dict[str, Any]) -> list[str]:
    """Return drawings as SVG paths; for students of other sources, a picture if one is embedded."""
    scale = config["image"].get("source_scale", 1)
    if scale == 1 and not config.get("degradation"):
        return DRAWINGS
    teacher = config["teacher"]["reference"]
    if not teacher.startswith("builtin:"):
        return []
    x_T = embedded_pairs(teacher.removeprefix("builtin:")).x_T[:3, :, ::scale, ::scale]
    return [data_uri(encode(Image.fromarray(x))) for x in x_T.permute(0, 2, 3, 1).contiguous().numpy()]


def _pack(content: bytes) -> str:
    """Compress bytes and write them in base 64: a page is text."""
    return base64.b64encode(gzip.compress(content, compresslevel=9, mtime=0)).decode()
