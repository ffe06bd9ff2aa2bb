"""Exported students compute what the student computes, whatever it takes, and run without PyTorch."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hubserver import File, HubServer, Repo
from PIL import Image
from students import STUDENTS, make_student
from typer.testing import CliRunner

import ibmd_cli.export.onnx
from ibmd_cli.cli import app
from ibmd_cli.data.degradations import fill_hole
from ibmd_cli.data.embedded import embedded_pairs
from ibmd_cli.devices import single_threaded
from ibmd_cli.errors import IbmdError, NotAvailable, UsageError
from ibmd_cli.export.exported import ExportedStudent
from ibmd_cli.export.onnx import make_graph, save_graph
from ibmd_cli.export.runner import load_exported, open_exported
from ibmd_cli.export.torch_export import Unrolled, export_program, torch_draw
from ibmd_cli.method.distillation import Sources
from ibmd_cli.method.noise import stream
from ibmd_cli.method.numpy_noise import Normals
from ibmd_cli.models.folder import load_model, save_model
from ibmd_cli.models.interface import describe_student, describe_tensors, noise_shapes
from ibmd_cli.models.model import StudentModel

EVERY_KIND = pytest.mark.parametrize(
    "name", [name if name == "one step" else pytest.param(name, marks=pytest.mark.slow) for name in STUDENTS]
)


def assert_same_translations(student: StudentModel, exported: ExportedStudent, tolerance: float, rng: str) -> None:
    """Compare on batches and sizes that were not traced, with the streams of `ibmd sample`."""
    side, classes, fill = student.image_size, student.config["classes"], (student.config["mask"] or {}).get("fill")
    step = student.predictor.backbone.size_multiple
    for shape in ((1, 3, side + 1, side), (1, 3, side, side - 1), (1, 1, side, side), (3, side, side), (1, 3, 0, side)):
        with pytest.raises(IbmdError, match=f"x_T of shape .*: expected .B, 3, H, W., .* multiples of {step}"):
            exported.translate(np.zeros(shape, np.float32), [torch_draw(7)])
    nothing = exported.translate(np.zeros((0, 3, side, side), np.float32), [])
    assert nothing.shape == (0, 3, side, side)
    for count, height, width in ((1, side, side), (3, side, side), (2, side + step, side + 2 * step)):
        x_T = torch.nn.functional.interpolate(embedded_pairs().x_T[:count].float() / 127.5 - 1, (height, width))
        mask = label = None
        streams = [stream(7, f"{i}.png", 1) for i in range(count)]
        if fill:
            mask = torch.zeros(count, 1, height, width)
            mask[..., 3:9, 5:12] = 1
        if classes:
            label = torch.arange(count) % classes
        filled = fill_hole(x_T, mask, fill, streams) if fill else x_T
        want = student.translate(Sources(filled, label, mask), streams).numpy()
        make = exported.stream if rng == "own" else torch_draw
        draws, holes = [make(7, f"{i}.png", 1) for i in range(count)], None if mask is None else mask.numpy()
        source = x_T.numpy() if holes is None else exported.fill_hole(x_T.numpy(), holes, draws)
        got = exported.translate(source, draws, holes, None if label is None else label.numpy())
        assert got.dtype == np.float32
        assert np.abs(got - want).max() < tolerance
        assert np.abs(want).min() < 0.9, "not saturated, or nothing was compared"


def blank_inputs(student: StudentModel, count: int, height: int = 16, width: int = 16) -> dict[str, np.ndarray]:
    """Zeros for everything that an exported student takes."""
    shapes = {"x_T": (3, height, width), **noise_shapes(student, (3, height, width))}
    if student.config["mask"]:
        shapes["mask"] = (1, height, width)
    inputs = {name: np.zeros((count, *shape), np.float32) for name, shape in shapes.items()}
    return inputs | ({"label": np.zeros(count, np.int64)} if student.config["classes"] else {})


def assert_damage_is_found(file: Path) -> None:
    """A bit flipped among the weights, where the file can still be read."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x40
    file.write_bytes(content)
    with pytest.raises(IbmdError, match="damaged"):
        load_exported(file)


def assert_starts_without_pytorch(file: Path, inputs: tuple[str, ...]) -> None:
    code = (
        "import sys, numpy as np; from pathlib import Path; from ibmd_cli.export.runner import load_exported\n"
        f"student = load_exported(Path({str(file)!r})); mask = label = None\n"
        f"if 'mask' in {inputs}: mask = np.ones((2, 1, 16, 16), np.float32)\n"
        f"if 'label' in {inputs}: label = np.zeros(2, np.int64)\n"
        "rng = [student.stream(0, i) for i in range(2)]\n"
        "x_0 = student.translate(np.zeros((2, 3, 16, 16), np.float32), rng, mask, label)\n"
        "assert x_0.shape == (2, 3, 16, 16); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ----------------------------------------------------------------------------------------------------- normals


def test_random_numbers_are_those_of_pytorch():
    for seed in range(20):
        rng, draw = stream(seed, "drawing.png", 1), Normals(seed, "drawing.png", 1)
        for size in (3, 1, 8, 5, 15, 16, 17, 31, 100, 3072, 7, 2, 1003):  # one by one below 16, and a pair kept
            numbers = draw((size,))
            assert numbers.dtype == np.float32
            np.testing.assert_allclose(numbers, torch.randn(size, generator=rng).numpy(), rtol=0, atol=3e-6)


def test_random_numbers_have_the_shape_that_is_asked_for():
    np.testing.assert_array_equal(Normals(1, "a")((3, 4, 5)).ravel(), Normals(1, "a")((60,)))
    assert not np.array_equal(Normals(1, "a")((8,)), Normals(1, "b")((8,)))


# -------------------------------------------------------------------------------------------------- every kind


@EVERY_KIND
def test_onnx_of_every_kind(tmp_path: Path, tiny_config: dict, name: str):
    student = make_student(tiny_config, **STUDENTS[name])
    graph, multiple = make_graph(student), student.predictor.backbone.size_multiple
    for dtype, tolerance in (("fp32", 2e-4), ("fp16", 0.01), ("bf16", 0.1), ("int8", 0.15)):
        save_graph(graph, tmp_path / f"{dtype}.onnx", dtype)
        # whoever has the file alone: no images, and sides that do not fit
        session = onnxruntime.InferenceSession(tmp_path / f"{dtype}.onnx", providers=["CPUExecutionProvider"])
        assert session.get_modelmeta().custom_metadata_map["size_multiple"] == str(multiple)
        assert session.run(["x_0"], blank_inputs(student, 0))[0].shape == (0, 3, 16, 16)
        for sides in ((16 + multiple // 2, 16), (16, 16 + multiple // 2)):
            with pytest.raises(Exception, match=f"height_and_width_must_be_multiples_of_{multiple}"):
                session.run(None, blank_inputs(student, 1, *sides))
        exported = load_exported(tmp_path / f"{dtype}.onnx")
        assert exported.config == student.config
        assert_same_translations(student, exported, tolerance, "torch's")
    assert_starts_without_pytorch(tmp_path / "int8.onnx", exported.inputs)
    model = onnx.load(tmp_path / "fp32.onnx")
    dims = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    image = ["batch", 3, "height", "width"]
    shapes = noise_shapes(student, (3, 16, 16))
    assert dims["x_T"] == dims["x_0"] == image
    assert set(dims) - {"x_T", "x_0"} == {
        *shapes,
        *(["mask"] if student.config["mask"] else []),
        *(["label"] if student.config["classes"] else []),
    }
    if "eps" in shapes:
        assert dims["eps"] == ["batch", 3 * (student.nfe - 1), "height", "width"]
    assert {o.domain for o in model.opset_import} == {""}
    texts = describe_tensors(student)
    assert {value.name: value.doc_string for value in (*model.graph.input, *model.graph.output)} == texts
    assert model.doc_string == model.graph.doc_string == describe_student(student)
    assert str(Path(__file__).parents[2]).encode() not in (tmp_path / "fp32.onnx").read_bytes()
    assert_damage_is_found(tmp_path / "int8.onnx")


@EVERY_KIND
def test_program_of_every_kind(tmp_path: Path, tiny_config: dict, name: str):
    student = make_student(tiny_config, **STUDENTS[name])
    before = {key: v.clone() for key, v in student.predictor.state_dict().items()}
    export_program(student, tmp_path / "student.pt2", "fp16")
    exported = load_exported(tmp_path / "student.pt2")
    assert exported.config == student.config
    assert all(torch.equal(v, before[key]) for key, v in student.predictor.state_dict().items())
    with torch.no_grad():
        for p in student.predictor.parameters():
            p.copy_(p.half().float())  # what the file holds
    assert_same_translations(student, exported, 1e-5, "own")
    texts = {"README.md": "", "size_multiple": ""}
    program = torch.export.load(tmp_path / "student.pt2", extra_files=texts)
    assert texts["README.md"] == describe_student(student)
    assert texts["size_multiple"] == str(student.predictor.backbone.size_multiple)
    with torch.no_grad():
        nothing = {name: torch.from_numpy(v) for name, v in blank_inputs(student, 0).items()}
        assert program.module()(**nothing).shape == (0, 3, 16, 16)
    assert str(Path(__file__).parents[2]).encode() not in (tmp_path / "student.pt2").read_bytes()
    assert_damage_is_found(tmp_path / "student.pt2")


@pytest.mark.parametrize("name", STUDENTS)
def test_unrolled_student_translates(tiny_config: dict, name: str):
    """The gate compares files with `Unrolled`: it is the student."""
    student = make_student(tiny_config, **STUDENTS[name])
    module = Unrolled(student)

    class Eager(ExportedStudent):
        stream, spread = staticmethod(torch_draw), staticmethod(single_threaded)

        def run(self, inputs):
            with torch.no_grad():
                return [module(**{key: torch.from_numpy(v) for key, v in inputs.items()}).numpy()]

    names = ["x_T", *noise_shapes(student, (3, 16, 16))]
    names += [key for key, own in (("mask", "mask"), ("label", "classes")) if student.config[own]]
    assert_same_translations(student, Eager(student.config, Path(), names), 1e-5, "own")


@pytest.mark.slow
def test_noise_inside(tmp_path: Path, tiny_config: dict):
    student = make_student(tiny_config, **STUDENTS["three steps"])
    inputs = {"x_T": np.zeros((64, 3, 16, 16), np.float32), "label": np.zeros(64, np.int64)}
    for file in (tmp_path / "student.onnx", tmp_path / "student.pt2"):
        if file.suffix == ".onnx":
            save_graph(make_graph(student, noise_inside=True), file)
        else:
            export_program(student, file, noise_inside=True)
        exported = open_exported(file)
        x_0, z, eps = exported.run(inputs)
        assert z.shape == (64, 6, 1, 1)
        assert eps.shape == (64, 6, 16, 16)
        for noise in (z, eps):
            deviation = noise.size**-0.5
            assert abs(noise.mean()) < 5 * deviation
            assert abs(noise.std() - 1) < 5 * deviation
        given = {key: torch.from_numpy(v) for key, v in {**inputs, "z": z, "eps": eps}.items()}
        with torch.no_grad():
            difference = np.abs(Unrolled(student)(**given).numpy() - x_0)
        # ONNX Runtime's rounding at single pixels depends on the noise, which cannot be chosen: 6e-5 to 6e-4 were seen,
        # with a root mean square of at most 1.1e-5. PyTorch's own kernels leave no room for that.
        if file.suffix == ".pt2":
            assert difference.max() < 2e-4
        assert np.sqrt(np.square(difference).mean()) < 5e-5
        assert not np.array_equal(exported.run(inputs)[1], z)
        with pytest.raises(IbmdError, match="draws its noise itself"):
            load_exported(file)


# ------------------------------------------------------------------------------------------ the embedded student


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """The embedded student, and its graph."""
    student = load_model("builtin:outline2emoji", "student")
    return student, make_graph(student)


@pytest.mark.slow
def test_weights_in_fewer_bits(tmp_path: Path, embedded):
    """On real drawings: sizes halve and halve again, and what is lost stays small."""
    student, graph = embedded
    x_T = embedded_pairs().x_T[:16].float() / 127.5 - 1
    want = student.translate(Sources(x_T), [stream(0, i) for i in range(16)]).numpy()
    sizes, psnr = {}, {}
    for dtype in ("fp32", "fp16", "bf16", "int8"):
        file = tmp_path / f"{dtype}.onnx"
        save_graph(graph, file, dtype)
        exported = load_exported(file)
        got = exported.translate(x_T.numpy(), [exported.stream(0, i) for i in range(16)])
        sizes[dtype], psnr[dtype] = file.stat().st_size, -10 * np.log10(np.mean((got - want) ** 2) / 4)
    assert sizes["fp32"] > 1.9 * sizes["fp16"] > 3.6 * sizes["int8"]
    assert psnr["fp32"] > 100
    assert psnr["fp16"] > 100, "the embedded student's weights are fp16 anyway"
    assert psnr["bf16"] > 60
    assert psnr["int8"] > 45


@pytest.mark.slow
def test_same_pictures_as_ibmd_sample(tmp_path: Path, embedded):
    """With streams of its own, without PyTorch: not one level of one pixel differs in these 32 pictures."""
    student, graph = embedded
    onnx.save(graph, tmp_path / "student.onnx")
    exported = load_exported(tmp_path / "student.onnx")
    x_T = embedded_pairs().x_T[:32].float() / 127.5 - 1
    want = student.translate(Sources(x_T), [stream(3, f"{i}.png", 1) for i in range(32)]).numpy()
    got = exported.translate(x_T.numpy(), [exported.stream(3, f"{i}.png", 1) for i in range(32)])
    levels = [np.rint((v + 1) * 127.5) for v in (want, got)]
    assert np.abs(got - want).max() < 1e-4
    assert np.mean(levels[0] != levels[1]) < 1e-4  # those that lay on the edge between two levels


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_threads_change_no_bit(tmp_path: Path, embedded, suffix: str):
    """So that several batches may be translated at once, a thread for each."""
    student, graph = embedded
    file = tmp_path / f"student{suffix}"
    save_graph(graph, file) if suffix == ".onnx" else export_program(student, file)
    torch.set_num_threads(2)
    exported = open_exported(file, threads=2)
    x_T = (embedded_pairs().x_T[:8].float() / 127.5 - 1).numpy()

    def translate(_=None) -> np.ndarray:
        return exported.translate(x_T, [exported.stream(3, i) for i in range(len(x_T))])

    want = translate()
    with exported.spread() as threads, ThreadPoolExecutor(2) as pool:
        assert threads == 2
        for got in pool.map(translate, range(4)):
            assert np.array_equal(got, want)
    assert np.array_equal(translate(), want)


@pytest.mark.slow
def test_ibmd_sample_takes_exported_files(tmp_path: Path, embedded, drawings: Path):
    """Seeds, variants, sizes: the pictures of the model folder, but for single levels of single pixels."""
    student, graph = embedded
    save_graph(graph, tmp_path / "student.onnx")
    export_program(student, tmp_path / "student.pt2")
    Image.effect_noise((80, 50), 90).convert("RGB").save(drawings / "large.png")
    folders = []
    for reference in ("builtin:outline2emoji", str(tmp_path / "student.onnx"), str(tmp_path / "student.pt2")):
        folder = tmp_path / f"out{reference[-4:]}"
        options = ["--seed", "5", "--variants", "2", "--fit", "stretch"]
        command = ["sample", str(drawings), "-o", f"{folder}/", "--student", reference, *options]
        assert CliRunner().invoke(app, command).exit_code == 0
        folders.append(folder)
    for folder in folders[1:]:
        assert_same_pictures(folders[0], folder)


# --------------------------------------------------------------------------------------------------- ibmd sample


def assert_same_pictures(folder: Path, other: Path) -> None:
    """Pixels may differ by a level where they lay on the edge between two."""
    names = sorted(file.name for file in folder.iterdir())
    assert names == sorted(file.name for file in other.iterdir())
    assert len(names) > 8
    pairs = [[np.asarray(Image.open(place / name)).astype(int) for place in (folder, other)] for name in names]
    differences = np.concatenate([np.abs(one - two).ravel() for one, two in pairs])
    assert differences.max() <= 1
    assert differences.mean() < 1e-3


@pytest.mark.slow
def test_ibmd_sample_does_all_without_pytorch(tmp_path: Path, tiny_config: dict, drawings: Path):
    """Holes, classes, variants, transparency, tiles, contact sheets; from a file, and from the Hub."""
    student = make_student(tiny_config, **STUDENTS["one step"])
    save_graph(make_graph(student), tmp_path / "student.onnx")
    save_model(student, tmp_path / "student")
    Image.effect_noise((50, 30), 90).convert("RGBA").save(drawings / "noise.png")
    every = ["--input", str(drawings), "--mask", "center", "--label", "3", "--variants", "2", "--seed", "5"]
    ways = [["--restore-size", "--alpha", "keep"], ["--fit", "tile"], ["--fit", "crop", "--grid", "{}/sheet.png"]]
    content = {"student.onnx": File((tmp_path / "student.onnx").read_bytes())}
    with HubServer({"us/student": Repo(content)}) as hub:
        environ = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1",
            "no_proxy": "127.0.0.1,localhost", "IBMD_CACHE": str(tmp_path / "ibmd"),
        }  # fmt: skip
        commands = []
        places = [("file", i, tmp_path / "student.onnx") for i in range(3)] + [
            ("hub", 0, "hf://us/student/student.onnx")
        ]
        for place, i, reference in places:
            out = tmp_path / f"{place}{i}"
            own = [word.format(out) for word in ways[i]]
            commands.append(["sample", *every, *own, "--student", str(reference), "--output", f"{out}/"])
        code = (
            "import json, sys; from typer.testing import CliRunner; from ibmd_cli.cli import app\n"
            "for command in json.loads(sys.argv[1]):\n"
            "    result = CliRunner().invoke(app, command); assert result.exit_code == 0, result.output\n"
            "sys.exit('torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code, json.dumps(commands)], env=environ, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    for i, way in enumerate(ways):
        out = tmp_path / f"folder{i}"
        own = [word.format(out) for word in way]
        command = ["sample", *every, *own, "--student", str(tmp_path / "student"), "--output", f"{out}/"]
        assert CliRunner().invoke(app, command).exit_code == 0
        for place in ("file", "hub") if i == 0 else ("file",):
            assert_same_pictures(out, tmp_path / f"{place}{i}")
    for option, message in ((["--nfe", "2"], "holds 1; leave --nfe out"), (["--device", "cuda"], "runs on the CPU")):
        result = CliRunner().invoke(app, [*commands[0][:-1], str(tmp_path / "new"), *option])
        assert isinstance(result.exception, UsageError)
        assert message in str(result.exception)

    # from Python
    x_T, mask = embedded_pairs().x_T[:3, :, :16, :16].float() / 127.5 - 1, torch.zeros(3, 1, 16, 16)
    mask[..., 4:12, 4:12] = 1
    exported = ibmd_cli.Student.from_pretrained(str(tmp_path / "student.onnx"))
    want, got = (one(x_T, mask=mask, label=3) for one in (ibmd_cli.Student(student), exported))
    assert (got - want).abs().max() < 2e-4
    with pytest.raises(UsageError, match="runs on the CPU"):
        ibmd_cli.Student.from_pretrained(str(tmp_path / "student.onnx"), device="cuda")


# ------------------------------------------------------------------------------------------------------ failures


@pytest.fixture
def other_model() -> onnx.ModelProto:
    """An ONNX file of somebody else."""
    value = onnx.helper.make_tensor_value_info("x_T", onnx.TensorProto.FLOAT, ["batch"])
    out = onnx.helper.make_tensor_value_info("x_0", onnx.TensorProto.FLOAT, ["batch"])
    node = onnx.helper.make_node("Identity", ["x_T"], ["x_0"])
    graph = onnx.helper.make_graph([node], "other", [value], [out])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)


def test_files_that_are_no_students(tmp_path: Path, other_model: onnx.ModelProto):
    with pytest.raises(NotAvailable, match="no such file"):
        load_exported(tmp_path / "absent.onnx")
    for suffix in (".onnx", ".pt2"):
        (tmp_path / f"text{suffix}").write_text("precious")
        with pytest.raises(IbmdError, match="cannot read it"):
            load_exported(tmp_path / f"text{suffix}")
    for props, message in (
        ({}, "holds no student"),
        ({"ibmd": "[1]"}, "holds no student"),
        ({"ibmd": json.dumps({"format": "ibmd-teacher", "format_version": 1})}, "holds no student"),
        ({"ibmd": json.dumps({"format": "ibmd-student", "format_version": 99})}, "format_version 99, .* pip install"),
        ({"ibmd": json.dumps({"format": "ibmd-student", "format_version": 1})}, "does not describe a student"),
    ):
        del other_model.metadata_props[:]
        onnx.helper.set_model_props(other_model, props)
        onnx.save(other_model, tmp_path / "other.onnx")
        with pytest.raises(IbmdError, match=message):
            load_exported(tmp_path / "other.onnx")


def test_file_beyond_what_onnx_holds(tmp_path: Path, other_model: onnx.ModelProto, monkeypatch):
    monkeypatch.setattr(ibmd_cli.export.onnx, "MAX_BYTES", other_model.ByteSize() - 1)
    with pytest.raises(IbmdError, match="ONNX allows 2 in a file"):
        save_graph(other_model, tmp_path / "large.onnx")
    assert list(tmp_path.iterdir()) == []
