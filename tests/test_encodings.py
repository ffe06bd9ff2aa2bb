"""Text is UTF-8 in and out, whatever the machine's locale."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

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
