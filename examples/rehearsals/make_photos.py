"""Make the images of the rehearsals: squares of real photos, edges and normals to go with them.

The 115 photos are those of the Debian package gcompris-qt-data, public domain or CC, mostly from Wikimedia Commons.
They are made four times smaller, which removes the traces of their own compression, and cut into squares. Photos, not
squares, are divided: of every five photos of a class, one is held out.

    python examples/rehearsals/make_photos.py --out build/rehearsals/data

    photos/{train,test}/CLASS/PHOTO-ROW-COLUMN.png    targets, or clean images to be degraded
    edges/…, normals/…                                sources of the same names
    ATTRIBUTION.md                                    author, licence and page of each photo

Edges are those of `--degrade edges`, found on whole photos (two minutes). DIODE's surface normals were measured with a
laser. Here there are none: the brightness of a photo is taken for a height, and these are the normals of that relief.
"""

import argparse
import io
import re
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ibmd_cli.data.degradations import degrade
from ibmd_cli.images.fit import to_uint8

PACKAGE = "gcompris-qt-data"
CLASSES = {
    "animals": ("explore_world_animals", "explore_farm_animals"),
    "monuments": ("explore_monuments",),
    "music": ("explore_world_music",),
    "wildlife": ("erase",),
}
"""Class → the package's archives of it."""
SIZE = 32
SHRINK = 4
HELD_OUT = 5
"""One photo in this many."""
LEAST_CONTRAST = 0.1
"""Standard deviation of a square, in units of [-1, 1]; flatter ones (sky) are left out."""
RELIEF = 4.0
"""Height of white above black, in pixels, for the normals."""


def read_rcc(file: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the path and content of each file in an archive of Qt's resources.

    The archive has three parts: a tree of nodes of 22 bytes, names (length, hash, UTF-16) and contents (length, bytes).
    """
    archive = file.read_bytes()
    magic, version, tree, contents, names = struct.unpack_from(">4s4I", archive)
    if magic != b"qres" or version != 3:
        raise SystemExit(f"{file}: expected an archive of Qt resources, version 3")

    def walk(number: int, path: str) -> Iterator[tuple[str, bytes]]:
        node = tree + 22 * number
        name_at, flags = struct.unpack_from(">IH", archive, node)
        (length,) = struct.unpack_from(">H", archive, names + name_at)
        start = names + name_at + 6
        path += archive[start : start + 2 * length].decode("utf-16-be")
        if flags & 2:  # a folder
            count, first = struct.unpack_from(">II", archive, node + 6)
            for child in range(first, first + count):
                yield from walk(child, f"{path}/" if path else "")
            return
        (at,) = struct.unpack_from(">I", archive, node + 10)
        (length,) = struct.unpack_from(">I", archive, contents + at)
        content = archive[contents + at + 4 : contents + at + 4 + length]
        yield path, zlib.decompress(content[4:]) if flags & 1 else content

    yield from walk(0, "")


def fetch(folder: Path) -> Path:
    """Fetch and unpack the package; return the folder of its archives."""
    subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True, capture_output=True)
    package = next(folder.glob(f"{PACKAGE}_*.deb"))
    subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
    return folder / "usr/share/gcompris-qt/rcc"


def shrink(image: Image.Image) -> Tensor:
    """Return a photo at a quarter of its size, cut to multiples of 16 pixels, (1, 3, H, W) in [-1, 1]."""
    small = image.convert("RGB").resize((image.width // SHRINK, image.height // SHRINK), Image.Resampling.LANCZOS)
    x = to_uint8(small).float() / 127.5 - 1
    return x[None, :, : x.shape[1] // 16 * 16, : x.shape[2] // 16 * 16]


def normals(photo: Tensor) -> Tensor:
    """Return the unit normals of a photo's brightness taken for a height, (1, 3, H, W) in [-1, 1]."""
    height = RELIEF * (photo.mean(1, keepdim=True) + 1) / 2
    padded = F.pad(height, [1] * 4, mode="replicate")
    across = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    return F.normalize(torch.cat([-across, -down, torch.ones_like(height)], dim=1), dim=1)


def save_squares(folders: dict[str, Path], name: str, images: dict[str, Tensor]) -> int:
    """Cut a photo and what goes with it into the same squares and save them; return how many."""
    count = 0
    _, _, height, width = images["photos"].shape
    for top in range(0, height - SIZE + 1, SIZE):
        for left in range(0, width - SIZE + 1, SIZE):
            square = (0, slice(None), slice(top, top + SIZE), slice(left, left + SIZE))
            if images["photos"][square].std() < LEAST_CONTRAST:
                continue
            for kind, x in images.items():
                pixels = to_uint8(x[square]).permute(1, 2, 0).contiguous().numpy()
                Image.fromarray(pixels).save(folders[kind] / f"{name}-{top // SIZE:02}-{left // SIZE:02}.png")
            count += 1
    return count


def attribution(readme: str, path: str) -> str:
    """Return author, licence and page of a photo from the archive's own notes: blocks of lines, one block for each."""
    name = Path(path).name
    block = next((b for b in re.split(r"\n\s*\n", readme) if name in b), "")
    facts = dict(re.findall(r"^(Copyright|License|Source): *(.+)$", block, re.MULTILINE))
    return f"{name}: {facts.get('Copyright', '?')}, {facts.get('License', '?')}, {facts.get('Source', PACKAGE)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/rehearsals/data"))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines, counts = [], {"train": 0, "test": 0}
    with tempfile.TemporaryDirectory() as scratch:
        archives = fetch(Path(scratch))
        for label, names in CLASSES.items():
            files = [pair for name in names for pair in read_rcc(archives / f"{name}.rcc")]
            readme = "\n\n".join(content.decode() for path, content in files if path.endswith("/README"))
            photos = sorted((path, content) for path, content in files if path.endswith(".webp"))
            for i, (path, content) in enumerate(photos):
                split = "test" if i % HELD_OUT == 0 else "train"
                photo = shrink(Image.open(io.BytesIO(content)))
                images = {"photos": photo, "edges": degrade(photo, "edges"), "normals": normals(photo)}
                folders = {kind: args.out / kind / split / label for kind in images}
                for folder in folders.values():
                    folder.mkdir(parents=True, exist_ok=True)
                counts[split] += save_squares(folders, Path(path).stem, images)
                lines.append(f"- {label}, {split}: {attribution(readme, path)}")
            print(f"{label}: {len(photos)} photos", flush=True)
    (args.out / "ATTRIBUTION.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"{counts['train']} squares to train with, {counts['test']} held out; every photo's licence: ATTRIBUTION.md")


if __name__ == "__main__":
    main()
