"""Images of every size through models of every kind: tiles, holes, classes, low resolution, scarce memory."""

import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import ibmd_cli
from ibmd_cli.errors import IbmdError, UsageError
from ibmd_cli.images.decode import Picture, read_picture, to_picture
from ibmd_cli.images.fit import to_image, to_tensor, to_uint8
from ibmd_cli.images.tiles import Tiles, starts
from ibmd_cli.method.noise import randn, stream
from ibmd_cli.models.folder import load_model, save_model
from ibmd_cli.models.model import StudentModel, TeacherModel
from ibmd_cli.networks.predictor import make_predictor
from ibmd_cli.sampling.engine import TorchEngine
from ibmd_cli.sampling.plan import Job
from ibmd_cli.sampling.translator import FIT_MODES, Translator

ALPHA = ["white", "keep", "drop"]


def noisy(*size: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(sum(size)).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


@pytest.fixture
def make(tiny_config):
    """Build a teacher of 16×16 pixels with random weights, from changes to its configuration."""

    def build(**changes: object) -> TeacherModel:
        config = json.loads(json.dumps(tiny_config | changes))
        predictor = make_predictor(config).eval().requires_grad_(False)
        for name, p in predictor.named_parameters():
            draw = randn(p.shape, stream(0, name))
            p.copy_(1 + 0.1 * draw if p.ndim == 1 and name.endswith("weight") else 0.1 * draw)
        return TeacherModel(predictor, config)

    return build


def translator_of(model: StudentModel | TeacherModel, nfe: int | None = None, **options: object) -> Translator:
    return Translator(TorchEngine(model, nfe), **options)


def translate(translator: Translator, image: Image.Image, name: str = "x.png", **beside: object) -> Image.Image:
    (piece,) = translator.run([translator.prepare(Picture(image), Job(name), **beside)])
    return translator.finish(piece)


# ------------------------------------------------------------------------------------------------------- tiles


@settings(deadline=None, max_examples=200)
@given(st.integers(4, 40), st.integers(0, 300))
def test_tiles_cover_an_axis_and_overlap(side: int, more: int):
    places = starts(side + more, side)
    assert places[0] == 0
    assert places[-1] == more
    assert places == sorted(set(places))
    steps = [b - a for a, b in zip(places[:-1], places[1:], strict=True)]
    assert all(step <= side - side // 4 for step in steps)


@settings(deadline=None, max_examples=60)
@given(st.integers(8, 60), st.integers(8, 60), st.sampled_from([1, 4]))
def test_tiles_that_stay_as_they_are_blend_into_the_canvas(height: int, width: int, scale: int):
    x = np.random.default_rng(0).random((3, height, width), dtype=np.float32)
    tiles = Tiles(height, width, 8, scale)
    result = tiles.blank(3)
    for i in range(len(tiles)):
        tiles.add(result, i, tiles.cut(x, i).repeat(scale, 1).repeat(scale, 2))
    want = x.repeat(scale, 1).repeat(scale, 2)
    if len(tiles) == 1:
        np.testing.assert_array_equal(result, want)
    np.testing.assert_allclose(result, want, atol=1e-6)  # float32 sums of up to four weights


def test_blending_has_no_seams():
    """Tiles of opposite colours: nowhere does the result step by more than the window's steepest slope."""
    tiles = Tiles(32, 200, 32)
    result = tiles.blank(1)
    for i in range(len(tiles)):
        tiles.add(result, i, np.full((1, 32, 32), i % 2, np.float32))
    assert np.abs(np.diff(result, axis=2)).max() < 0.3  # over an overlap of at least 8 pixels; a seam would be 1
    assert np.abs(np.diff(result, axis=1)).max() < 1e-6


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (17, 16), (401, 7), (50, 33)])
@pytest.mark.parametrize("restore", [False, True])
def test_tiled_images_keep_their_size(make, size, restore):
    translator = translator_of(make(), fit="tile", restore_size=restore, nfe=1)
    assert translate(translator, noisy(*size)).size == size


@pytest.fixture
def models(tiny_config) -> dict[int, TeacherModel]:
    """Teachers of 16×16 pixels, of one scale and of four, that leave sources as they are."""
    image = {"size": 16, "channels": 3, "range": [-1, 1]}
    made = {}
    for scale in (1, 4):
        config = json.loads(json.dumps(tiny_config | {"image": image | {"source_scale": scale}}))
        made[scale] = TeacherModel(make_predictor(config).eval().requires_grad_(False), config)
        made[scale].predictor.forward = lambda x_t, t, x_T, label=None: x_T
    return made


SIDES = st.integers(1, 50)
MODES = st.sampled_from(["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SIDES, SIDES, MODES, st.sampled_from(FIT_MODES), st.booleans(), st.sampled_from([1, 4]), st.sampled_from(ALPHA))
def test_results_have_the_size_and_transparency_of_the_rule(models, width, height, mode, fit, restore, scale, alpha):
    """And a model that changes nothing gives an image back that is flat."""
    base = Image.new("RGBA" if mode in ("RGBA", "LA") else "RGB", (width, height), (200, 80, 40))
    image = base.convert(mode, dither=Image.Dither.NONE)
    picture = to_picture(image, "x", alpha)
    translator = translator_of(models[scale], fit=fit, restore_size=restore, nfe=1)
    (piece,) = translator.run([translator.prepare(picture, Job("x"))])
    result = translator.finish(piece)
    own = (scale * width, scale * height) if fit == "tile" else (16, 16)
    assert result.size == ((width, height) if restore else own)
    assert (result.mode == "RGBA") == (alpha == "keep" and mode in ("RGBA", "LA"))
    if not (fit == "crop" and restore):  # what was not seen is white
        assert [colour for _, colour in result.convert("RGB").getcolors()] == [picture.rgb.getpixel((0, 0))]


def test_one_tile_is_the_image(make):
    model, image = make(), noisy(16, 16)
    tiled, padded = (translate(translator_of(model, fit=fit), image) for fit in ("tile", "pad"))
    assert tiled.tobytes() == padded.tobytes()


def test_tiles_change_no_bit_with_their_company(make):
    model = make()
    translator = translator_of(model, fit="tile")
    images = {f"{i}.png": noisy(20 + 7 * i, 30) for i in range(4)}
    pieces = [translator.prepare(Picture(image), Job(name)) for name, image in images.items()]
    together = {piece.name: translator.finish(piece).tobytes() for piece in translator.run(pieces)}
    for name in reversed(images):
        assert translate(translator_of(model, fit="tile"), images[name], name).tobytes() == together[name]


# ---------------------------------------------------------------------------------------------- low resolution


def test_super_resolution_takes_low_resolution_as_it_is(make):
    model = make(image={"size": 16, "channels": 3, "range": [-1, 1], "source_scale": 4})
    seen = []
    model.predictor.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    low = noisy(4, 4)
    assert translate(translator_of(model, nfe=1), low).size == (16, 16)
    assert torch.equal(seen[0][0], to_tensor(low.resize((16, 16), Image.Resampling.NEAREST)))
    assert translate(translator_of(model, nfe=1, fit="tile"), noisy(9, 5)).size == (36, 20)
    assert translate(translator_of(model, nfe=1, fit="tile", restore_size=True), noisy(9, 5)).size == (9, 5)
    assert translate(translator_of(model, nfe=1, restore_size=True), noisy(9, 5)).size == (9, 5)
    # a clean image, to be degraded first, has the model's full size
    seen.clear()
    clean = noisy(16, 16)
    translate(translator_of(model, nfe=1, degradation="sr4x-pool"), clean)
    pooled = torch.nn.functional.avg_pool2d(to_tensor(clean)[None], 4)
    assert torch.allclose(seen[0][:1], pooled.repeat_interleave(4, 2).repeat_interleave(4, 3), atol=1e-6)


# ------------------------------------------------------------------------------------------- holes and classes


@pytest.mark.parametrize("fill", ["noise", "zero"])
@pytest.mark.parametrize("fit", ["pad", "stretch", "crop", "tile"])
def test_known_pixels_come_back_to_the_bit(make, fill, fit):
    model, image = make(mask={"fill": fill}), noisy(16, 16)
    mask = Image.new("L", (16, 16))
    mask.paste(255, (3, 5, 9, 12))
    result = np.asarray(translate(translator_of(model, fit=fit, nfe=2), image, mask=mask))
    hole = np.asarray(mask) > 0
    assert (result == np.asarray(image))[~hole].all()
    assert (result != np.asarray(image))[hole].mean() > 0.9
    again = translate(translator_of(model, fit=fit, nfe=2), image, mask=mask.resize((64, 64), Image.Resampling.NEAREST))
    assert again.tobytes() == result.tobytes()


@pytest.mark.parametrize("fit", ["pad", "crop", "tile"])
def test_known_pixels_come_back_in_the_size_of_the_image(make, fit):
    image, mask = noisy(50, 40), Image.new("1", (50, 40))
    mask.paste(1, (20, 15, 30, 25))
    model = make(mask={"fill": "noise"})
    result = np.asarray(translate(translator_of(model, fit=fit, nfe=2, restore_size=True), image, mask=mask))
    assert (result == np.asarray(image))[~np.asarray(mask)].all()
    assert (result != np.asarray(image))[np.asarray(mask)].any()


def test_what_a_model_needs_is_asked_for(make):
    image, mask = noisy(16, 16), Image.new("1", (16, 16), 1)
    with pytest.raises(IbmdError, match="takes no --mask"):
        translate(translator_of(make()), image, mask=mask)
    with pytest.raises(IbmdError, match="say where with --mask"):
        translate(translator_of(make(mask={"fill": "zero"})), image)
    with pytest.raises(IbmdError, match="has no classes"):
        translate(translator_of(make()), image, label=1)
    for label in (None, -1, 5):
        with pytest.raises(IbmdError, match="needs a class from 0 to 4"):
            translate(translator_of(make(classes=5)), image, label=label)
    with pytest.raises(UsageError, match="no degradation 'jpeg-7': nearest"):
        translator_of(make(), degradation="jpeg-7")


def test_alpha_follows_the_image(make):
    rgba = noisy(30, 20).convert("RGBA")
    alpha = Image.linear_gradient("L").resize((30, 20))
    model = make()

    def run(**options: object) -> Image.Image:
        translator = translator_of(model, nfe=1, **options)
        (piece,) = translator.run([translator.prepare(Picture(rgba.convert("RGB"), alpha), Job("x"))])
        return translator.finish(piece)

    for options in ({"restore_size": True}, {"fit": "tile"}):
        assert run(**options).getchannel("A").tobytes() == alpha.tobytes()
    small = run(fit="stretch")
    assert small.mode == "RGBA"
    assert np.abs(np.asarray(small.getchannel("A")).astype(int)[:, 0] - np.linspace(0, 255, 16)).max() < 20


# ------------------------------------------------------------------------------------------------------ memory


def test_scarce_memory_halves_the_batch(make, monkeypatch):
    """A hook refuses batches of more than three, as a GPU does whose memory is full."""
    model, warnings = make(), []

    def full(_, inputs) -> None:
        if len(inputs[0]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model.predictor.register_forward_pre_hook(full)
    translator = translator_of(model, warn=warnings.append)
    translator.size = 8
    pieces = [translator.prepare(Picture(noisy(16, 16)), Job(f"{i}.png")) for i in range(11)]
    assert len(list(translator.run(pieces))) == 11
    assert [w.split(": ")[1] for w in warnings] == [
        "from here on 4 images at a time (last bits may differ); --batch-size 4 avoids it",
        "from here on 2 images at a time (last bits may differ); --batch-size 2 avoids it",
    ]
    translator.size, batch = 8, translator._batch

    def lessened(group, size):
        """As when another thread lessens the size to 1 during the first batch."""
        if size == 8:
            translator.size = 1
        return batch(group, size)

    monkeypatch.setattr(translator, "_batch", lessened)
    translator._network([(piece, 0) for piece in pieces])
    assert translator.size == 1
    monkeypatch.undo()
    translator.size = 1
    model.predictor.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(MemoryError, match="out of memory"):
        next(translator.run(pieces))


# ------------------------------------------------------------------------------------------------- from Python


@pytest.fixture(scope="module")
def student() -> "ibmd_cli.Student":
    return ibmd_cli.Student.from_pretrained("builtin:outline2emoji", device="cpu")


def test_pillow_images(student, drawings):
    images = [Image.open(file) for file in sorted(drawings.iterdir())]
    one = student(images[0].convert("P"))
    assert (one.mode, one.size) == ("RGB", (32, 32))
    several = student(images, names=[f"{i}" for i in range(8)])
    assert several[0].tobytes() == student(images[0]).tobytes()
    assert several[5].tobytes() == student(images[5], names=["5"]).tobytes()
    assert student(images[0].resize((50, 20)), restore_size=True).size == (50, 20)
    assert student(images[0], seed=1).tobytes() != several[0].tobytes()
    with pytest.raises(IbmdError, match="names: 1 of them for 8 images"):
        student(images, names=["x"])
    with pytest.raises(UsageError, match="expected pad"):
        student(images, fit="square")


def test_tensors(student, drawings):
    images = [Image.open(file).convert("RGB") for file in sorted(drawings.iterdir())]
    x_T = torch.stack([to_tensor(image) for image in images])
    x_0 = student(x_T)
    assert x_0.shape == x_T.shape
    assert x_0.abs().max() <= 1
    for i, image in enumerate(student(images)):
        assert to_image(x_0[i]).tobytes() == image.tobytes()
    assert student(torch.zeros(1, 3, 40, 70), fit="tile").shape == (1, 3, 40, 70)
    for shape in ((1, 3, 40, 40), (1, 1, 32, 32)):
        with pytest.raises(IbmdError, match=r"expects \[3, 32, 32\]"):
            student(torch.zeros(shape))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (None, "NoneType: expected a Pillow image"),
        ("drawing.png", "str: expected a Pillow image"),
        (np.zeros((32, 32, 3), np.uint8), "ndarray: expected a Pillow image"),
        ([], "list: expected a Pillow image, one or more in a list"),
        ([Image.new("RGB", (9, 9)), "x"], "list: expected"),
        (torch.zeros(0, 3, 32, 32), "expected one or more images"),
        (
            torch.zeros(3, 32, 32),
            r"of shape \[3, 32, 32\] and torch.float32: expected one or more images \(B, 3, H, W\)",
        ),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"torch.uint8: expected .* of finite floats in \[-1, 1\]"),
        (torch.full((1, 3, 32, 32), torch.nan), "finite"),
        (Image.new("RGB", (0, 0)), "0: 0×0 pixels: expected one or more"),
    ],
)
def test_what_a_student_does_not_take(student, images, message):
    with pytest.raises(IbmdError, match=message):
        student(images)


def test_damaged_and_large_images_from_python(student, drawings):
    file = drawings / "drawing-0.png"
    with pytest.raises(IbmdError, match=r"in Python, max_pixels"):
        read_picture(file, max_pixels=1000)
    file.write_bytes(file.read_bytes()[:-60])
    with Image.open(file) as lazy, pytest.raises(IbmdError, match="0: damaged or incomplete"):
        student(lazy)


def test_images_become_what_the_command_makes_of_them(student, drawings, tmp_path, capfdbinary):
    from ibmd_cli.reporting import Reporter
    from ibmd_cli.sampling.config import SampleConfig
    from ibmd_cli.sampling.pipeline import sample

    assert sample(SampleConfig(inputs=(str(drawings),), output=str(tmp_path / "out")), Reporter(quiet=True)) == 0
    files = sorted(drawings.iterdir())
    made = student([Image.open(file) for file in files], names=[file.name for file in files])
    for file, image in zip(files, made, strict=True):
        assert read_picture(tmp_path / "out" / file.name).rgb.tobytes() == image.tobytes()


def test_inpainting_student_from_python(make, tmp_path, tiny_config):
    config = make(mask={"fill": "noise"}).config | {
        "format": "ibmd-student",
        "sampling": {
            "timesteps": [1.0], "noise": {"channels": 0, "grid": 0}, "rollout": "chain", "transition": "marginal",
        },
    }  # fmt: skip
    save_model(StudentModel(make().predictor, config), tmp_path / "filler")
    student = ibmd_cli.Student.from_pretrained(str(tmp_path / "filler"), device="cpu")
    x, mask = to_tensor(noisy(16, 16))[None], torch.zeros(1, 1, 16, 16)
    mask[..., 4:9] = 1
    x_0 = student(x, mask=mask)
    known = mask.expand_as(x) == 0
    assert torch.equal(x_0[known], x[known])
    image = student(to_image(x[0]), mask=Image.fromarray((mask[0, 0] * 255).byte().numpy()))
    assert torch.equal(to_uint8(image), to_uint8(x_0[0]))


def test_import_stays_light():
    import subprocess
    import sys

    code = "import sys, ibmd_cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert not hasattr(ibmd_cli, "TeacherModel")


def test_only_students(tiny_teacher):
    with pytest.raises(IbmdError, match="where a student is needed"):
        ibmd_cli.Student.from_pretrained(str(tiny_teacher))
    assert isinstance(load_model(str(tiny_teacher)), TeacherModel)
