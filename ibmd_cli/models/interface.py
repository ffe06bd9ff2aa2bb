"""Interface of a student's tensors, for whoever has an exported file and nothing else: in words, and as a script.

The words and the script travel in the file itself (`ibmd export`) and in the model card. The script needs NumPy,
Pillow and ONNX Runtime, and makes the picture that `ibmd sample` makes, noise included.
"""

from collections.abc import Sequence
from math import prod

import jinja2

from ibmd_cli.files import assets
from ibmd_cli.models.model import StudentModel

FILL = {"zero": "0", "white": "1", "noise": "normal(3, {0}, {0})"}
"""What a hole is filled with, by the student's configuration, as NumPy."""


def noise_shapes(student: StudentModel, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of z and eps for one image of `shape` (3, H, W); without those that are not taken."""
    setup, calls = student.setup, student.nfe
    shapes: dict[str, tuple[int, ...]] = {}
    if setup.noise_shape is not None:
        shapes["z"] = (calls * setup.noise_shape[0], *setup.noise_shape[1:])
    if calls > 1 and not setup.bridge.noise_free:
        shapes["eps"] = ((calls - 1) * shape[0], *shape[1:])
    return shapes


def describe_tensors(student: StudentModel) -> dict[str, str]:
    """Describe the tensors that a student takes, and x_0, which it returns: one line by name."""
    side, scale, multiple = student.image_size, student.source_scale, student.predictor.backbone.size_multiple
    noise, calls = noise_shapes(student, (3, 0, 0)), student.nfe
    texts = {
        "x_T": f"Sources: float32 (B, 3, H, W), RGB, in [-1, 1]: level / 127.5 - 1. H and W are multiples of "
        f"{multiple}; the student was trained on {side} × {side}. B, the number of images, may be 0."
    }
    if scale > 1:
        texts["x_T"] += f" Images of {side // scale} × {side // scale} come {scale} times enlarged, by repetition."
    if "z" in noise:
        shape, each = (
            ", ".join(map(str, noise["z"])),
            f", those of the {calls} network calls in turn" if calls > 1 else "",
        )
        texts["z"] = f"Noise: float32 (B, {shape}), standard normal{each}. Another z gives another result."
    if "eps" in noise:
        texts["eps"] = f"Noise between the {calls} steps: float32 (B, {noise['eps'][0]}, H, W), standard normal."
    if student.config.get("mask"):
        filling = {"zero": "0", "white": "1", "noise": "standard normal numbers"}[student.config["mask"]["fill"]]
        texts["mask"] = f"Holes: float32 (B, 1, H, W), 1 = to be filled, else 0. x_T holds {filling} there."
    if student.config.get("classes"):
        texts["label"] = f"Classes: int64 (B,), from 0 to {student.config['classes'] - 1}."
    texts["x_0"] = "Results: float32 (B, 3, H, W), RGB, in [-1, 1]: level = round((x_0 + 1) * 127.5)."
    return texts


def describe_student(student: StudentModel, noise_inside: bool = False) -> str:
    """Describe a student to the reader of an exported file: task, tensors, how a picture becomes x_T, and a script."""
    texts = describe_tensors(student)
    side = student.image_size // student.source_scale
    inside = " z and eps are drawn in the file, and returned after x_0." if noise_inside else ""
    return "\n".join(
        [
            f"{student.name}: {student.config['task']}. x_0 = f({', '.join(name for name in texts if name != 'x_0')})."
            + inside,
            *(f"{name}: {text}" for name, text in texts.items()),
            f"`ibmd sample` reduces a picture so that its longer side is {side} (Pillow's HAMMING filter; BICUBIC to "
            "enlarge), and centres it on a square of the median colour of its border. Its noise depends on --seed, on "
            "the picture's name (the file's, or the path below the folder that was given) and on the number of the "
            "variant, from 1: their SHA-256 seeds MT19937. This script does the same for 8-bit sRGB pictures:",
            "",
            sample_script(student, noise_inside=noise_inside),
        ]
    )


def sample_script(student: StudentModel, file: str = "student.onnx", noise_inside: bool = False) -> str:
    """Return a Python script that does what `ibmd sample` does, with an ONNX file and without ibmd."""
    side, scale, config, calls = student.image_size, student.source_scale, student.config, student.nfe
    shapes = {} if noise_inside else noise_shapes(student, (3, side, side))
    fill = FILL[config["mask"]["fill"]].format(side) if config.get("mask") else ""
    z = student.setup.noise_shape if "z" in shapes else None
    single = calls == 1 and z is not None and prod(z) < 16 and "normal" not in fill  # one short draw: simpler
    draws = [f"normal{z}"] if z else []
    draws += [f"normal{(3, side, side)}"] if calls > 1 and not noise_inside else []
    values = {
        "file": file, "small": side // scale, "enlarged": f".repeat({scale}, 1).repeat({scale}, 2)" * (scale > 1),
        "pair": (prod(z) + 1) // 2 if single and z else 0, "draws": "" if single else ", ".join(draws), "calls": calls,
        "z": z, "eps": "eps" in shapes, "fill": fill, "classes": config.get("classes"),
    }  # fmt: skip
    text = (assets() / "export" / "sample.py.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(trim_blocks=True, autoescape=False)  # noqa: S701 (Python, not HTML)
    environment.filters["product"] = prod
    return environment.from_string(text).render(values)
