"""Text is UTF-8 in and out, whatever the machine's locale."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from ibmd_cli.data.embedded import embedded_pairs

PACKAGE = Path(__file__).parent.parent / "ibmd_cli"


def unsaid(tree: ast.AST) -> Iterator[int]:
    """Yield the lines of calls that read or write text in the encoding of the machine's locale."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        owner = call.func.value if isinstance(call.func, ast.Attribute) else None
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        arguments = (node for arg in [*call.args, *given.values()] for node in ast.walk(arg))
        modes = [node.value for node in arguments if isinstance(node, ast.Constant)]
        binary = any(isinstance(mode, str) and "b" in mode and len(mode) <= 3 for mode in modes)
        opens = name in ("open", "fdopen") and getattr(owner, "id", "") not in ("Image", "tarfile", "archive")
        opens = opens and not (name == "open" and getattr(owner, "id", "") == "os")
        runs = name in ("run", "Popen", "check_output") and "text" in given
        if "encoding" not in given and (name in ("read_text", "write_text") or runs or (opens and not binary)):
            yield call.lineno


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_every_text_file_is_read_and_written_with_its_encoding_said(file: Path):
    assert list(unsaid(ast.parse(file.read_text(encoding="utf-8")))) == []


TRAIN = "distill --steps 1 --bridge-steps 1 --batch-size 2 --nfe 1 --device cpu --data dätä/çà --out lauf-ü"
COMMANDS = [
    "--help",
    "distill --help",
    "distill --list-teachers",
    "distill --data dätä/çà --dry-run",
    TRAIN,
    TRAIN,  # finished already: what was written is read
    "sample --device cpu --student lauf-ü/student --input dätä/çà/source --output öut --grid blått.png",
    "eval --device cpu --teacher none --samples 2 --metric psnr --data dätä/çà --out maß",
    "export --student lauf-ü/student --output mödell.safetensors",
]
PROGRAM = """
import json, os, sys, warnings
from pathlib import Path
warnings.filterwarnings("error", category=EncodingWarning, module="ibmd_cli")  # other packages are theirs to mend
commands = json.loads(Path("commands.json").read_bytes())
from ibmd_cli.cli import main
for command in commands:
    sys.argv = ["ibmd", *(os.fsdecode(word.encode()) for word in command.split())]
    os.write(2, (command + "\\n").encode())
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
"""
LOCALES: dict[str, dict[str, str]] = {
    "every unsaid encoding is an error": {"PYTHONWARNDEFAULTENCODING": "1"},
    "Latin-1": {"LC_ALL": "de_DE.ISO-8859-1", "PYTHONUTF8": "0"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.fixture(scope="session")
def latin_1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Latin-1 locale."""
    folder = tmp_path_factory.mktemp("locales")
    made = folder / "de_DE.ISO-8859-1"
    subprocess.run(["localedef", "-i", "de_DE", "-f", "ISO-8859-1", str(made)], capture_output=True)
    if not made.is_dir():
        pytest.skip("localedef cannot make a Latin-1 locale here")
    return folder


@pytest.mark.parametrize("locale", LOCALES)
def test_commands_run_in_every_locale(locale: str, request: pytest.FixtureRequest, tmp_path: Path):
    environment = {**os.environ, **LOCALES[locale], "IBMD_CACHE": str(tmp_path / "cache"), "TERM": "dumb"}
    if locale == "Latin-1":
        environment["LOCPATH"] = str(request.getfixturevalue("latin_1"))
    names, x_T, x_0 = embedded_pairs()
    for side, images in (("source", x_T), ("target", x_0)):
        folder = tmp_path / "dätä" / "çà" / side
        folder.mkdir(parents=True)
        for i in range(2):
            Image.fromarray(images[i].permute(1, 2, 0).contiguous().numpy()).save(folder / f"{names[i]}-é.png")
    (tmp_path / "commands.json").write_text(json.dumps(COMMANDS), encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    written = done.stdout.splitlines()
    for name in ("lauf-ü/student", f"öut/{names[0]}-é.png", "mödell.safetensors"):
        assert any(name.encode() in line for line in written), name  # the bytes of the name, whatever the locale
        assert (tmp_path / name).exists()
    settings = json.loads((tmp_path / "lauf-ü" / "config.json").read_text(encoding="utf-8"))
    (data,) = settings["settings"]["data"]
    assert data.encode("latin-1" if locale == "Latin-1" else "utf-8", "surrogateescape") == "dätä/çà".encode()
    card = (tmp_path / "lauf-ü" / "student" / "README.md").read_text(encoding="utf-8")
    assert "Ã" not in card or locale == "Latin-1"
    json.loads((tmp_path / "maß" / "results.json").read_text(encoding="utf-8"))
