"""Inputs that a model was not made for, and what is said of results: size, how to go on, what makes them repeatable."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from ibmd_cli import __version__
from ibmd_cli.data.embedded import embedded_sources
from ibmd_cli.sampling.inputs import unlike


def page(paper: object = "white", pen: object = "black", width: int = 8) -> Image.Image:
    image = Image.new("RGB", (500, 400), paper)
    ImageDraw.Draw(image).ellipse((100, 100, 400, 300), outline=pen, width=width)
    return image


def scan(paper: int = 245, pen: int = 40, width: int = 3, noise: float = 5, size: tuple[int, int] = (1240, 1754)):
    """A page from a scanner: noise of the paper, and a line."""
    image = Image.new("L", size, paper)
    ImageDraw.Draw(image).ellipse((200, 300, size[0] - 200, size[1] - 300), outline=pen, width=width)
    grain = noise * np.random.default_rng(0).standard_normal((size[1], size[0]))
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8)).convert("RGB")


def hatched(step: int, share: float = 1.0) -> Image.Image:
    """Fine lines over a share of a page: at a smaller size, grey."""
    image = Image.new("RGB", (800, 800), "white")
    for x in range(-800, round(800 * share), step):
        ImageDraw.Draw(image).line((x, 0, x + 800, 800), "black")
    return image


def night() -> Image.Image:
    """A dark photo: shades of every kind up to a few lights."""
    shades = np.random.default_rng(0).gamma(1.5, 30, (40, 60)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(shades).resize((600, 400), Image.Resampling.BICUBIC).convert("RGB")


UNLIKE = {
    "empty": [
        Image.new("RGB", (90, 70), "white"),
        Image.new("RGB", (9, 9), "black"),
        Image.new("RGB", (1, 1)),
        scan(pen=245),
        scan(pen=235, noise=8),
    ],
    "light on dark": [
        page("black", "white"),
        page((30, 40, 60), (250, 250, 200)),
        ImageOps.invert(page(width=2)),
        ImageOps.invert(scan()),
        ImageOps.invert(hatched(8)),
    ],
    "photo": [
        Image.effect_noise((300, 300), 60).convert("RGB"),
        Image.linear_gradient("L").convert("RGB"),
        Image.merge("RGB", [Image.linear_gradient("L").rotate(90 * i) for i in range(3)]),
        page((150, 150, 150)),
        page((240, 225, 150)),
        night(),
    ],
    "": [
        page(),
        page(width=2),
        page((235, 235, 235)),
        page("white", "blue"),
        page((250, 248, 240), (80, 80, 80)),
        *(scan(), scan(width=2, size=(2480, 3508)), scan(pen=150), hatched(2), hatched(4), hatched(4, 0.3), hatched(9)),
    ],
}


@pytest.mark.parametrize("kind", UNLIKE)
def test_kinds_of_inputs(kind):
    assert [unlike(image) for image in UNLIKE[kind]] == [kind] * len(UNLIKE[kind])


def test_drawings_are_taken_for_drawings():
    sources = [Image.fromarray(x.permute(1, 2, 0).contiguous().numpy()) for x in embedded_sources()[:300]]
    assert sum(unlike(image) == "" for image in sources) >= 295
    assert sum(unlike(ImageOps.invert(image)) == "light on dark" for image in sources) >= 285


def test_inputs_that_the_model_was_not_made_for_are_said_once_per_kind(sample, drawings):
    Path("in").mkdir()
    for kind, images in UNLIKE.items():
        for i, image in enumerate(images):
            image.save(f"in/{kind.replace(' ', '-') or 'fine'}-{i}.png")
    result = sample("-i", "in", "-o", "out/", "--json")
    assert result.code == 0
    for line in result.lines:
        kind = Path(line["input"]).stem.rpartition("-")[0].replace("light-on-dark", "light on dark")
        assert line["unlike"] == (None if kind == "fine" else kind)
    warnings = [line for line in result.err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 3
    assert sum("5 inputs, as in/empty-0.png: each shows nothing" in line for line in warnings) == 1
    assert sum("5 inputs, as in/light-on-dark-0.png" in line and "invert it" in line for line in warnings) == 1
    assert sum("6 inputs, as in/photo-0.png" in line for line in warnings) == 1
    one = sample("-i", "in/empty-0.png", "-o", "one.png")
    assert "warning: in/empty-0.png shows nothing, and the model was made for dark lines on white paper" in one.err


def test_models_of_other_inputs_say_nothing_of_them(sample, student):
    Image.new("RGB", (20, 20)).save("dark.png")
    assert "warning" not in sample("-i", "dark.png", "--student", student).err
    assert "warning" not in sample("-i", "dark.png", "--student", "builtin:emoji-sr4x", "-o", "x.png").err


def test_tiles_are_refused_where_a_model_must_see_all(sample, drawings, tmp_path, student):
    Image.new("RGB", (100, 100), "white").save("large.png")
    refused = sample("-i", "large.png", "--fit", "tile")
    assert (refused.code, refused.stdout) == (2, b"")
    assert "must see a whole image at once: choose pad, crop or stretch" in refused.err
    assert sample("-i", "large.png", "--fit", "tile", "--student", "builtin:emoji-sr4x", "-o", "x.png").code == 0
    config = json.loads((student / "config.json").read_text())
    for tiles, code in ((True, 0), (False, 2)):
        config["image"]["tiles"] = tiles
        (student / "config.json").write_text(json.dumps(config))
        assert sample("-i", "large.png", "--fit", "tile", "--student", student, "-o", f"{tiles}.png").code == code


def test_the_end_says_what_size_came_out_and_how_to_get_others(sample, drawings):
    own = sample("-i", drawings, "-o", "a/", "--seed", 6).err.splitlines()[-1]
    assert own.startswith("results have the model's 32×32 pixels (--restore-size scales them")
    assert own.endswith("other results: --seed 7, or --variants 4")
    restored = sample("-i", drawings, "-o", "b/", "--restore-size").err.splitlines()[-1]
    assert restored.startswith("made at 32×32 pixels and scaled, so lines finer than that are blurred")
    assert "other results" not in sample("-i", drawings, "-o", "b/", "--on-exists", "skip").err


def test_what_makes_a_result_repeatable_is_in_json_and_in_the_file(sample, drawings):
    source = drawings / "drawing-3.png"
    line = sample("-i", source, "-o", "a.png", "--seed", 5, "--variants", 2, "--json").lines[1]
    assert (line["seed"], line["variant"], line["name"], line["version"]) == (5, 2, "drawing-3.png", __version__)
    assert line["model"] == "builtin:outline2emoji"
    assert len(line["model_sha256"]) == 64
    with Image.open(line["output"]) as image:
        said = image.info["Software"]
    want = f"ibmd {__version__} builtin:outline2emoji sha256={line['model_sha256'][:16]} nfe=1 seed=5 variant=2"
    assert said == f"{want} name=drawing-3.png"
    assert sample("-i", source, "-o", "-", "--metadata", "drop", "--seed", 5).stdout[:4] == b"\x89PNG"
    dropped = sample("-i", source, "-o", "-", "--metadata", "drop").stdout
    with Image.open(io.BytesIO(dropped)) as image:
        assert image.info["Software"].startswith("ibmd ")
