"""Pictures and files: decode, encode, find, fit to a size, cut into tiles, lay on sheets. Free of PyTorch on import."""

import tomllib
from functools import cache
from pathlib import Path
from typing import Any


@cache
def _tables() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name("tables.toml").read_text(encoding="utf-8"))


def table(name: str) -> Any:
    """Return a table of `tables.toml`."""
    return _tables()[name]
