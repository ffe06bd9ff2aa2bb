"""Rebuild the outline -> colour emoji data set (32x32 pairs) from the OpenMoji npm package.

The script reads the line drawings and the coloured emoji of OpenMoji 17.0.0 straight from the npm tarball,
filters them, groups near-identical drawings, splits by group into train / val / test, rasterises exactly
aligned pairs on white with resvg (training pairs in random poses and stroke widths, too) and writes

* ``{train,val,test}.npz``: ``x_T`` (N,32,32), ``x_0`` (N,32,32,3), ``names``, ``variant`` (variant-major);
* ``assets/``: PNG mosaics of the outlines and held-out targets, ``pairs.json`` naming the tiles, attribution.

Everything is deterministic: the split depends on the code points only, a pose on (code points, variant).

    pip install numpy pillow resvg_py
    python examples/emoji/make_data.py --out build/outline2emoji
"""

import argparse
import hashlib
import io
import json
import math
import random
import re
import subprocess
import tarfile
from collections import Counter, defaultdict
from itertools import combinations
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

VERSION = "17.0.0"
TILE, OVERSAMPLE, COLUMNS = 32, 3, 64
SOURCE_VARIANTS = 6
MIN_DIFFERENCE = 0.02  # mean |x_0 - x_T| in [0, 1] below which a pair is "not coloured"
SAME_OUTLINE = 0.93  # cosine of centred outlines above which two drawings are near-identical
FLAG_LIKE = 0.8  # cosine with a blank flag above which a drawing is dropped
MAX_HELD_OUT = 6  # larger groups (families, squares, ...) always go to train, lest they dominate val or test
BLANK_FLAG = (
    '<svg viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg">'
    '<rect x="5" y="17" width="62" height="38" fill="none" stroke="#000" stroke-width="2"/></svg>'
)
# Joiner, variation selector, skin tones, gender signs, man / woman / person: not what an emoji is about.
MODIFIERS = {"200D", "FE0F", "2640", "2642", "1F468", "1F469", "1F9D1", *(f"1F3F{i}" for i in "BCDEF")}
ATTRIBUTION = f"""# Attribution

The images in this folder are derived from [OpenMoji](https://openmoji.org) {VERSION} - the open-source emoji
and icon project, licence [CC BY-SA 4.0](https://creativecommons.org/licenses/by-sa/4.0/).

Changes: a selection of the line drawings (`black/svg`) and of the coloured emoji (`color/svg`) was rasterised
to {TILE}x{TILE} pixels on white and arranged in mosaics; `sources.png` also holds rotated, scaled and shifted
versions with other stroke widths. These derived images are under CC BY-SA 4.0, too.
"""

Task = tuple[str, str, str, int]  # name, outline SVG, colour SVG, number of variants


def read_tarball(path: Path) -> tuple[list[dict[str, str]], dict[str, str], dict[str, str]]:
    """Read the emoji table and the SVG texts (outlines, colours; keyed by hexcode) from the npm tarball."""
    table: list[dict[str, str]] = []
    svgs: dict[str, dict[str, str]] = {"package/black/svg": {}, "package/color/svg": {}}
    with tarfile.open(path) as tar:
        for member in tar:
            folder, _, file = member.name.rpartition("/")
            if folder in svgs and file.endswith(".svg"):
                svgs[folder][file.removesuffix(".svg")] = tar.extractfile(member).read().decode()
            elif member.name == "package/data/openmoji.json":
                table = json.load(tar.extractfile(member))
    return table, svgs["package/black/svg"], svgs["package/color/svg"]


def pose(name: str, variant: int) -> tuple[str, float]:
    """Draw the SVG transform and the stroke-width factor of a variant; variant 0 is the canonical view."""
    if variant == 0:
        return "", 1.0
    rng = random.Random(f"{name}/{variant}")
    angle = rng.uniform(-12, 12)
    scale = math.exp(rng.uniform(math.log(0.85), math.log(1.15)))
    stretch = math.sqrt(rng.uniform(0.93, 1.07))
    x, y = 36 + rng.uniform(-3, 3), 36 + rng.uniform(-3, 3)
    stroke = rng.uniform(0.8, 1.35)
    matrix = f"translate({x} {y}) rotate({angle}) scale({scale * stretch} {scale / stretch}) translate(-36 -36)"
    return matrix, stroke


def rasterise(svg: str, transform: str = "", stroke: float = 1.0) -> Image.Image:
    """Render an OpenMoji SVG on white, its content transformed and all its strokes widened.

    Args:
        svg: SVG text with the usual 72x72 view box; the view is cropped to the central 64x64 units.
        transform: Value of an SVG ``transform`` attribute.
        stroke: Factor of all stroke widths (also of the implicit width 1).

    Returns:
        RGB image of TILE x TILE pixels, box-filtered from an OVERSAMPLE times larger rendering.
    """
    svg = re.sub(r'(stroke-width\s*[=:]\s*"?\s*)([\d.]+)', lambda m: f"{m[1]}{float(m[2]) * stroke:.5f}", svg)
    svg = svg.replace('viewBox="0 0 72 72"', 'viewBox="4 4 64 64"')
    svg = re.sub(r"<svg[^>]*>", rf'\g<0><g transform="{transform}" stroke-width="{stroke}">', svg, count=1)
    svg = "</g></svg>".join(svg.rsplit("</svg>", 1))
    size = TILE * OVERSAMPLE
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGB").reduce(OVERSAMPLE)


def render(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Render the first variants of a pair: outlines (V,32,32) and colours (V,32,32,3), both uint8."""
    name, outline, colour, variants = task
    poses = [pose(name, v) for v in range(variants)]
    x_t = np.stack([np.asarray(rasterise(outline, *p).convert("L")) for p in poses])
    return x_t, np.stack([np.asarray(rasterise(colour, *p)) for p in poses])


def render_all(tasks: list[Task], processes: int) -> tuple[np.ndarray, np.ndarray]:
    """Render many pairs in parallel, variant-major: x_T (V,N,32,32) and x_0 (V,N,32,32,3)."""
    with Pool(processes) as pool:
        x_t, x_0 = zip(*pool.imap(render, tasks, chunksize=8), strict=True)
    return np.stack(x_t, axis=1), np.stack(x_0, axis=1)


def unit_vectors(outlines: np.ndarray) -> np.ndarray:
    """Flatten outlines (N,32,32) to centred vectors of length 1."""
    flat = outlines.reshape(len(outlines), -1).astype(np.float32)
    flat -= flat.mean(axis=1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)


def base_code(name: str) -> str:
    """First code point of an emoji that is no modifier: links man, woman and person of one profession."""
    codes = name.split("-")
    return next((code for code in codes if code not in MODIFIERS), codes[0])


def group_pairs(names: list[str], outlines: np.ndarray) -> list[list[int]]:
    """Union-find over near-identical outlines and equal base code points; returns index groups."""
    root = list(range(len(names)))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = i = root[root[i]]
        return i

    vectors = unit_vectors(outlines)
    links = np.argwhere(np.triu(vectors @ vectors.T > SAME_OUTLINE, k=1)).tolist()
    by_base: dict[str, list[int]] = defaultdict(list)
    for i, name in enumerate(names):
        by_base[base_code(name)].append(i)
    links += [pair for members in by_base.values() for pair in combinations(members, 2)]
    for i, j in links:
        root[find(i)] = find(j)
    groups: dict[int, list[int]] = defaultdict(list)
    for i in range(len(names)):
        groups[find(i)].append(i)
    return list(groups.values())


def split_of(group: list[int], names: list[str]) -> str:
    """Choose the split of a group from the hash of its smallest hexcode; large groups go to train."""
    if len(group) > MAX_HELD_OUT:
        return "train"
    digest = hashlib.sha256(min(names[i] for i in group).encode()).digest()
    return {0: "val", 1: "test"}.get(int.from_bytes(digest[:8], "big") % 10, "train")


def select(
    table: list[dict[str, str]], outlines: dict[str, str], colours: dict[str, str], processes: int
) -> tuple[list[str], np.ndarray]:
    """Filter the emoji and return the sorted hexcodes kept and their canonical outlines (N,32,32)."""
    emoji = [e for e in table if e["skintone"] == ""]
    print(f"{len(table)} emoji, {len(emoji)} without skin tone", end=", ")
    emoji = [e for e in emoji if e["group"] not in ("flags", "component") and "flag" not in e["subgroups"]]
    names = sorted(e["hexcode"] for e in emoji if e["hexcode"] in outlines and e["hexcode"] in colours)
    print(f"{len(names)} no flag / component", end=", ")
    x_t, x_0 = (a[0] for a in render_all([(n, outlines[n], colours[n], 1) for n in names], processes))

    difference = np.abs(x_0.astype(np.float32) - x_t[..., None]).mean(axis=(1, 2, 3)) / 255
    keep = difference >= MIN_DIFFERENCE
    print(f"{keep.sum()} coloured", end=", ")
    first = {image.tobytes(): i for i, image in reversed(list(enumerate(x_0)))}
    keep &= np.isin(np.arange(len(names)), list(first.values()))
    print(f"{keep.sum()} unique", end=", ")
    flag = np.asarray(rasterise(BLANK_FLAG).convert("L"))[None]
    keep &= (unit_vectors(x_t) @ unit_vectors(flag).T)[:, 0] < FLAG_LIKE
    print(f"{keep.sum()} not a blank flag")
    return [name for name, k in zip(names, keep, strict=True) if k], x_t[keep]


def save_mosaic(tiles: np.ndarray, path: Path) -> None:
    """Save tiles (N,32,32[,3]) as an optimised PNG of COLUMNS columns, row by row, padded with white."""
    rows = -(-len(tiles) // COLUMNS)
    grid = np.full((rows * COLUMNS, *tiles.shape[1:]), 255, np.uint8)
    grid[: len(tiles)] = tiles
    grid = grid.reshape(rows, COLUMNS, *tiles.shape[1:]).swapaxes(1, 2)
    Image.fromarray(grid.reshape(rows * TILE, COLUMNS * TILE, *tiles.shape[3:])).save(path, optimize=True)


def main() -> None:
    """Build the data set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/outline2emoji"), help="output folder")
    parser.add_argument("--tarball", type=Path, help=f"openmoji-{VERSION}.tgz; fetched with npm if not given")
    parser.add_argument("--variants", type=int, default=32, help="variants of each training pair")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    assets = args.out / "assets"
    assets.mkdir(parents=True, exist_ok=True)
    if args.tarball is None:
        subprocess.run(["npm", "pack", f"openmoji@{VERSION}"], cwd=args.out, check=True)
        args.tarball = args.out / f"openmoji-{VERSION}.tgz"

    table, outlines, colours = read_tarball(args.tarball)
    annotations = {e["hexcode"]: e["annotation"] for e in table}
    names, canonical = select(table, outlines, colours, args.processes)
    groups = group_pairs(names, canonical)
    members: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for group in groups:
        members[split_of(group, names)] += [names[i] for i in group]
    counts = Counter(split_of(group, names) for group in groups)
    print(f"{len(groups)} groups {dict(counts)}, largest {sorted(map(len, groups))[:-6:-1]}")

    pairs: dict[str, object] = {"tile": TILE, "columns": COLUMNS}
    for split, unsorted in members.items():
        split_names, variants = sorted(unsorted), args.variants if split == "train" else 1
        tasks = [(n, outlines[n], colours[n], variants) for n in split_names]
        x_t, x_0 = render_all(tasks, args.processes)
        np.savez(
            args.out / f"{split}.npz",
            x_T=x_t.reshape(-1, TILE, TILE),
            x_0=x_0.reshape(-1, TILE, TILE, 3),
            names=np.tile(split_names, variants),
            variant=np.repeat(np.arange(variants, dtype=np.uint8), len(split_names)),
        )
        if split == "train":
            kept = min(SOURCE_VARIANTS, variants)
            save_mosaic(x_t[:kept].reshape(-1, TILE, TILE), assets / "sources.png")
            pairs["sources"] = {"names": split_names, "variants": kept}
            a, b = x_0[0] / 127.5 - 1, x_t[0, ..., None] / 127.5 - 1
            print(f"E x0^2 {np.mean(a * a):.4f}, E xT^2 {np.mean(b * b):.4f}, E x0 xT {np.mean(a * b):.4f}")
        else:
            save_mosaic(x_t[0], assets / f"{split}-sources.png")
            save_mosaic(x_0[0], assets / f"{split}-targets.png")
            pairs[split] = {"names": split_names, "annotations": [annotations[n] for n in split_names]}
        print(f"{split}: {len(split_names)} pairs x {variants} variants")
    pairs |= {"openmoji": VERSION, "licence": "CC BY-SA 4.0"}
    (assets / "pairs.json").write_text(json.dumps(pairs, ensure_ascii=False, indent=1) + "\n")
    (assets / "ATTRIBUTION.md").write_text(ATTRIBUTION)
    for path in sorted(p for p in args.out.rglob("*") if p.is_file()):
        print(f"{path.stat().st_size / 1024:10.1f} KiB  {path.relative_to(args.out)}")


if __name__ == "__main__":
    main()
