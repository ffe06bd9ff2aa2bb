"""What tests of pages share: a strict reader of HTML, and names that would break a careless page."""

from html.parser import HTMLParser
from pathlib import Path

HOSTILE = """"><script>alert('x')</script>&amp;{{script}} [/red] a/b.png"""
"""As a file's name: HTML, an entity, a place of our template, a style of rich."""

VOID = {"br", "img", "input", "link", "meta", "wbr"}
"""Elements that have no end."""


class Page(HTMLParser):
    """Checks that elements are closed in order, and keeps tags, addresses and text.

    Attributes:
        tags: all that begin.
        addresses: of pictures and links.
        text: what is between the tags.
        rows: of all tables, the texts of their cells.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.stack: list[str] = []
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.stack == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [str(value) for name, value in attributes if name in ("src", "href", "data", "action")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "td" in self.stack or "th" in self.stack:
            self.rows[-1][-1] += ("" if not self.rows[-1][-1] else " ") + data


def spoiled(value: object, keep: frozenset[str] = frozenset()) -> object:
    """Return JSON with `HOSTILE` before every string, but for those under the keys in `keep`."""
    if isinstance(value, dict):
        return {key: one if key in keep else spoiled(one, keep) for key, one in value.items()}
    if isinstance(value, list):
        return [spoiled(one, keep) for one in value]
    return HOSTILE + value if isinstance(value, str) else value


def strings(value: object, keep: frozenset[str] = frozenset()) -> list[str]:
    """List the strings of JSON, but for those under the keys in `keep`."""
    if isinstance(value, dict):
        return [text for key, one in value.items() if key not in keep for text in strings(one, keep)]
    if isinstance(value, list):
        return [text for one in value for text in strings(one, keep)]
    return [value] if isinstance(value, str) else []
