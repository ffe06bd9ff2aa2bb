"""Make pairs of pictures to train teachers of one's own with: three kinds of real data from package registries.

    python examples/own_pairs/make_pairs.py icons --out build/pairs/icons
    python examples/own_pairs/make_pairs.py photos --out build/pairs/photos
    python examples/own_pairs/make_pairs.py grey --out build/pairs/grey

icons   line drawings and their coloured originals: Noto Emoji (npm @iconify-json/noto, Apache-2.0), 64×64 pixels
photos  squares of photographs, targets alone: `--degrade` makes the sources (Debian gcompris-qt-data, licences in
        ATTRIBUTION.md), 64×64 pixels
grey    the same squares: the source is the brightness alone (one channel), the target has its colours

Each folder has `train/` and `test/`, divided by concept (all cats on one side) or by photograph, each with `source/`
and `target/` (photos: pictures alone). Needs npm, or apt-get, and `pip install '.[data]'`.
"""

import argparse
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image
from svg_lines import line_art, rasterise, wrap

sys.path.append(str(Path(__file__).parents[1] / "rehearsals"))
import make_photos  # noqa: E402 (it stands beside this folder)

NOTO = "@iconify-json/noto@1.2.9"
SIDE = 64
LINE = 0.022
"""Width of a line, as a share of the picture's side."""
LEAST_CHROMA = 6.0
INK = (0.01, 0.30)
"""Mean share of ink in a drawing that is used."""
LEFT_OUT = re.compile(r"flag|skin-tone|keycap|button|blood-type|input-|square-|circled|zodiac|o-clock|thirty|clock")
CONCEPTS = ("cat", "face", "heart", "hand", "moon", "mail", "couple", "person", "man", "woman")
"""Words that name the concept wherever they stand, in this order: all `cat-with-…` stand on one side."""
SHRINK = 3
"""Photographs are made so many times smaller, which removes the traces of their own compression."""


LEAST_CONTRAST = 20
"""Standard deviation of a square's brightness, in levels; flatter ones (sky) are left out."""


def held_out(concept: str) -> bool:
    """Tell whether a concept belongs to the test split: one of ten, by its hash."""
    return hashlib.sha256(concept.encode()).digest()[0] % 10 == 0


def read_icons(scratch: Path) -> Iterator[tuple[str, str]]:
    """Fetch the icon set from npm and yield name and SVG of each icon that is used."""
    subprocess.run(["npm", "pack", "--silent", NOTO], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(next(scratch.glob("*.tgz"))) as tar:
        content = tar.extractfile("package/icons.json")
        assert content is not None
        icons = json.load(content)
    for name, icon in sorted(icons["icons"].items()):
        if not icon.get("hidden") and not LEFT_OUT.search(name):
            size = icon.get("width", icons["width"]), icon.get("height", icons["height"])
            yield name, wrap(icon["body"], *size)


def draw(icon: tuple[str, str]) -> tuple[str, Image.Image, Image.Image] | None:
    """Render an icon as (name, drawing, colours), or nothing if it is grey or mostly ink."""
    name, svg = icon
    side = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])  # type: ignore[index]
    target, source = rasterise(svg, SIDE), rasterise(line_art(svg, LINE * side), SIDE).convert("L")
    pixels = np.asarray(target).astype(float)
    chroma, ink = np.ptp(pixels, axis=2).mean(), 1 - np.asarray(source).mean() / 255
    return (name, source, target) if chroma > LEAST_CHROMA and INK[0] < ink < INK[1] else None


def make_icons(out: Path, processes: int) -> dict[str, int]:
    counts = {"train": 0, "test": 0}
    with tempfile.TemporaryDirectory() as scratch, Pool(processes) as pool:
        for pair in pool.imap(draw, read_icons(Path(scratch)), chunksize=16):
            if pair:
                name, source, target = pair
                words = name.split("-")
                concept = next((word for word in CONCEPTS if word in words), words[-1])
                split = "test" if held_out(concept) else "train"
                save(out / split / "source" / f"{name}.png", source)
                save(out / split / "target" / f"{name}.png", target)
                counts[split] += 1
    (out / "ATTRIBUTION.md").write_text(
        "Noto Emoji, Google Inc., Apache-2.0, https://github.com/googlefonts/noto-emoji; drawings derived from it.\n",
        encoding="utf-8",
    )
    return counts


def make_squares(out: Path, grey: bool) -> dict[str, int]:
    counts, lines = {"train": 0, "test": 0}, []
    with tempfile.TemporaryDirectory() as scratch:
        archives = make_photos.fetch(Path(scratch))
        for label, names in make_photos.CLASSES.items():
            files = [pair for name in names for pair in make_photos.read_rcc(archives / f"{name}.rcc")]
            readme = "\n\n".join(content.decode() for path, content in files if path.endswith("/README"))
            photos = sorted((path, content) for path, content in files if path.endswith(".webp"))
            for i, (path, content) in enumerate(photos):
                split = "test" if i % make_photos.HELD_OUT == 0 else "train"
                lines.append(f"- {label}, {split}: {make_photos.attribution(readme, path)}")
                for number, square in enumerate(squares(Image.open(io.BytesIO(content)).convert("RGB"))):
                    name = f"{label}-{Path(path).stem}-{number:03}.png"
                    folder = out / split / ("target" if grey else "")
                    save(folder / name, square)
                    if grey:
                        save(out / split / "source" / name, square.convert("L"))
                    counts[split] += 1
    (out / "ATTRIBUTION.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return counts


def squares(photo: Image.Image) -> Iterator[Image.Image]:
    """Yield half-overlapping squares of a photograph that show something."""
    small = photo.resize((photo.width // SHRINK, photo.height // SHRINK), Image.Resampling.LANCZOS)
    for top in range(0, small.height - SIDE + 1, SIDE // 2):
        for left in range(0, small.width - SIDE + 1, SIDE // 2):
            square = small.crop((left, top, left + SIDE, top + SIDE))
            if np.asarray(square.convert("L")).std() > LEAST_CONTRAST:
                yield square


def save(file: Path, image: Image.Image) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("icons", "photos", "grey"))
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    counts = (
        make_icons(args.out, args.processes) if args.kind == "icons" else make_squares(args.out, args.kind == "grey")
    )
    print(f"{args.out}: {counts['train']} to train with, {counts['test']} held out; licences in ATTRIBUTION.md")


if __name__ == "__main__":
    main()
