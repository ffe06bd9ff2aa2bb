"""The pictures of an evaluation's report: what is shown, as HTML tables with the pictures inside."""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ibmd_cli.evaluation import tables
from ibmd_cli.html import data_uri

MOST_BYTES = 8_000_000
"""Of all pictures on the page."""
WIDEST = 512
"""Pixels; wider pictures are scaled down."""
SMALL = 128
"""Pixels; pictures up to this size stay as they are and are enlarged by repetition of pixels."""
SEVERAL = 4
"""Sources of which several draws are shown."""

Data = Mapping[str, Any]


class Picture(NamedTuple):
    """A picture in a table.

    Attributes:
        file: relative to the folder of the evaluation.
        alt: what it is.
        note: stands below it.
    """

    file: str
    alt: str
    note: str


@dataclass
class Album:
    """Pictures of sources, a row each.

    Attributes:
        title: stands above it.
        heads: of the columns.
        rows: pictures, as many as heads.
        left_out: rows for which there was no room.
    """

    title: str
    heads: list[str]
    rows: list[list[Picture]]
    left_out: int = 0


def picture_section(out: Path, results: Data) -> Iterator[str]:
    """Yield the pictures of an evaluation as a section of its report; nothing if there are none.

    Args:
        out: folder with the files that `results["shown"]` names.
        results: the content of `results.json`, see `evaluation`.
    """
    albums = [album for album in (*_by_model(results), *_by_draw(results)) if album.rows]
    if not albums:
        return
    images = _embed(out, albums)
    yield '<section id="pictures"><h2>Pictures</h2><div class="side">'
    yield from _table(albums[0], images)
    yield from _comparison(albums[0])
    yield '</div><div class="many">'
    for album in albums[1:]:
        yield from _table(album, images)
    yield "</div></section>"


# ------------------------------------------------------------------------------------------------ what is shown


def _by_model(results: Data) -> Iterator[Album]:
    """Yield the teacher at fewest and at most calls beside the students: for sources by chance, the best, the worst."""
    columns = [*_rows(results, "teacher")[:1], *_rows(results, "teacher")[1:][-1:], *_rows(results, "student")]
    names = [tables.named(results["rows"][i]) for i in columns]
    metric = results["metrics"].get(results["shown_by"])
    for why in ("even", "best", "worst"):
        album = Album("evenly spaced over the pairs", ["source", *names, "truth"], [])
        if why != "even":
            album.title = f"{why} {tables.heading(metric)} of {tables.named(results['rows'][0])}" if metric else why
        for entry in results["shown"]:
            if entry["why"] == why:
                score = "" if metric is None or entry["score"] is None else tables.number(entry["score"], metric)
                cells = [(entry["rows"][i][0], score if i == 0 and why != "even" else "") for i in columns]
                album.rows.append(_row(entry, names, cells))
        yield album


def _by_draw(results: Data) -> Iterator[Album]:
    """Yield for each student, and for the teacher at most calls, several draws of some sources."""
    for i in [*_rows(results, "student"), *_rows(results, "teacher")[-1:]]:
        entries = [entry for entry in results["shown"] if entry["why"] == "even" and len(entry["rows"][i]) > 1]
        name = tables.named(results["rows"][i])
        draws = [f"z {k + 1}" for k in range(len(entries[0]["rows"][i]))] if entries else []
        rows = [
            _row(entry, [f"{name}, {draw}" for draw in draws], [(file, "") for file in entry["rows"][i]])
            for entry in entries[:SEVERAL]
        ]
        yield Album(f"one source, several z: {name}", ["source", *draws, "truth"], rows)


def _rows(results: Data, model: str) -> list[int]:
    return [i for i, row in enumerate(results["rows"]) if row["model"] == model]


def _row(entry: Data, names: Sequence[str], cells: Sequence[tuple[str, str]]) -> list[Picture]:
    """Return the pictures of a source: itself, files with their notes, and the truth."""
    name = entry["name"]
    middle = [Picture(file, f"{name}: {of}", note) for of, (file, note) in zip(names, cells, strict=True)]
    source = Picture(entry["source"], f"{name}: source", name)
    return [source, *middle, Picture(entry["truth"], f"{name}: truth", "")]


def _embed(out: Path, albums: Sequence[Album]) -> dict[str, str]:
    """Read the pictures, and shorten the albums until they fit on the page.

    Returns:
        file → the beginning of an `img` element.
    """
    files = [picture.file for album in albums for row in album.rows for picture in row]
    images = {file: _image(out / file) for file in set(files)}
    share = MOST_BYTES / sum(len(images[file]) for file in files)
    for album in albums:
        room = max(1, min(len(album.rows), int(share * len(album.rows))))
        album.rows, album.left_out = album.rows[:room], len(album.rows) - room
    return images


def _image(file: Path) -> str:
    with Image.open(file) as image:
        if max(image.size) <= SMALL:
            return f'<img class="pixels" data-zoom src="{data_uri(file.read_bytes())}"'
        image.thumbnail((WIDEST, WIDEST), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, format="webp", quality=90)
    return f'<img data-zoom src="{data_uri(buffer.getvalue(), "image/webp")}"'


# ----------------------------------------------------------------------------------------------------------- HTML


def _table(album: Album, images: Mapping[str, str]) -> Iterator[str]:
    note = f" <small>and {album.left_out} more in the folder images</small>" if album.left_out else ""
    yield f'<figure><figcaption>{escape(album.title)}{note}</figcaption><table class="pictures"><thead><tr>'
    yield from (f'<th scope="col">{escape(head).replace(", ", "<br>")}</th>' for head in album.heads)
    yield "</tr></thead><tbody>"
    for row in album.rows:
        yield "<tr>"
        for picture in row:
            note = f'<small title="{escape(picture.note)}">{escape(picture.note)}</small>' if picture.note else ""
            yield f'<td>{images[picture.file]} alt="{escape(picture.alt)}">{note}</td>'
        yield "</tr>"
    yield "</tbody></table></figure>"


def _comparison(album: Album) -> Iterator[str]:
    """Yield what the script needs to lay two columns of an album over each other."""
    sources = [row[0].note for row in album.rows]
    last = len(album.heads) - 2
    student = next((i for i, head in enumerate(album.heads) if head.startswith("student")), last)
    yield '<figure class="compare" hidden><figcaption>Before and after</figcaption><div class="controls">'
    yield _select("left", album.heads, 0) + _select("right", album.heads, student)
    yield _select("source", sources, 0)
    yield '<button value="-1" aria-label="previous source">←</button>'
    yield '<button value="1" aria-label="next source">→</button></div>'
    yield '<div class="stage"><img alt=""><img class="over" alt=""><i></i><b></b><b></b>'
    yield '<input type="range" value="50" step="0.5" aria-label="how much of the left picture is seen"></div></figure>'


def _select(label: str, names: Sequence[str], chosen: int) -> str:
    options = [f"<option{' selected' if i == chosen else ''}>{escape(name)}</option>" for i, name in enumerate(names)]
    return f"<label>{label}<select>{''.join(options)}</select></label>"
