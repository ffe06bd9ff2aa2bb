"""What tests of pages share: a strict reader of HTML."""

from html.parser import HTMLParser
from pathlib import Path

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
