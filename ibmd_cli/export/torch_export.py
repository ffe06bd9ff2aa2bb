"""A student as one function of tensors, which PyTorch can export, and PyTorch programs (.pt2) at work.

    x_0 = f(x_T[, z][, eps][, mask][, label])

All network calls of a student are in it, with the steps between them. `models.interface` describes the tensors.
"""

import copy
import json
import warnings
import zipfile
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.utils.parametrize import register_parametrization

from ibmd_cli.devices import single_threaded
from ibmd_cli.errors import IbmdError
from ibmd_cli.export.exported import INPUTS, METADATA, Draw, ExportedStudent, check
from ibmd_cli.method.distillation import Sources, run_steps
from ibmd_cli.method.noise import stream
from ibmd_cli.models.interface import describe_student, noise_shapes
from ibmd_cli.models.model import PRECISIONS, StudentModel

_aten = torch.ops.aten
Say = Callable[[str], None]


class Unrolled(nn.Module):
    """A student's network calls and the steps between them.

    Args:
        student: on the CPU; it is not changed.
        dtype: of the weights, a key of `DTYPES`; they are computed with in float32.
        noise_inside: z and eps are not given but drawn, and returned after x_0.
    """

    def __init__(self, student: StudentModel, dtype: str = "fp32", noise_inside: bool = False) -> None:
        super().__init__()
        self.student, self.noise_inside = student, noise_inside
        self.predictor = copy.deepcopy(student.predictor).to(PRECISIONS[dtype])
        if dtype != "fp32":
            for module in list(self.predictor.modules()):
                for name, _ in list(module.named_parameters(recurse=False)):
                    register_parametrization(module, name, _Widened(), unsafe=True)
        self.eval().requires_grad_(False)

    def forward(
        self,
        x_T: Tensor,
        z: Tensor | None = None,
        eps: Tensor | None = None,
        mask: Tensor | None = None,
        label: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Compute x_0."""
        setup = self.student.setup
        times = [torch.tensor([t]) for t in setup.timesteps]
        drawn = {}
        if self.noise_inside:
            shapes = noise_shapes(self.student, x_T.shape[1:])
            drawn = {name: torch.randn(x_T.shape[0], *shape) for name, shape in shapes.items()}
            z, eps = drawn.get("z"), drawn.get("eps")
        parts_of_z = iter([None] * len(times) if z is None else z.chunk(len(times), dim=1))
        # Without eps the bridge is free of noise: what is given in its place is not read.
        parts_of_eps = iter([x_T] * len(times) if eps is None else eps.chunk(len(times) - 1, dim=1))
        *_, x_0 = run_steps(
            self.predictor,
            setup,
            Sources(x_T, label, mask),
            times,
            lambda: next(parts_of_z),
            lambda: next(parts_of_eps),
        )
        x_0 = x_0.clamp(-1, 1)
        return (x_0, *drawn.values()) if drawn else x_0


class _Widened(nn.Module):
    """What a parameter that is kept in 16 bits is used as."""

    def forward(self, stored: Tensor) -> Tensor:
        return stored.float()


def trace(student: StudentModel, dtype: str = "fp32", noise_inside: bool = False) -> ExportedProgram:
    """Trace a student for any number of images, of any size that its network takes.

    Args:
        student: on the CPU.
        dtype: of the weights, a key of `DTYPES`.
        noise_inside: see `Unrolled`.

    Returns:
        A program that takes its inputs by name.
    """
    multiple = student.predictor.backbone.size_multiple
    side = max(student.image_size, 2 * multiple)  # a dimension of one unit would be taken for fixed
    batch, sides = Dim("batch"), {2: multiple * Dim("height"), 3: multiple * Dim("width")}
    inputs, shapes = {"x_T": torch.zeros(2, 3, side, side)}, {"x_T": {0: batch, **sides}}
    for name, shape in noise_shapes(student, (3, side, side)).items():
        if not noise_inside:
            inputs[name] = torch.zeros(2, *shape)
            shapes[name] = {0: batch} if name == "z" else {0: batch, **sides}
    if student.config.get("mask"):
        inputs["mask"], shapes["mask"] = torch.zeros(2, 1, side, side), {0: batch, **sides}
    if student.config.get("classes"):
        inputs["label"], shapes["label"] = torch.zeros(2, dtype=torch.int64), {0: batch}
    return torch.export.export(Unrolled(student, dtype, noise_inside), (), inputs, dynamic_shapes=shapes)


def export_program(
    student: StudentModel, file: Path, dtype: str = "fp32", noise_inside: bool = False, say: Say = lambda step: None
) -> None:
    """Write a student as a PyTorch program (.pt2), with its configuration and a description in it; see `trace`."""
    say("tracing the network")
    program = trace(student, dtype, noise_inside)
    say("writing")
    graph = program.graph
    for node in list(graph.nodes):
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):  # paths of this machine
            node.meta.pop(key, None)
        same = node.target is _aten.to.dtype and node.args[0].meta["val"].dtype == node.args[1]
        if node.target is _aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif same or node.target is _aten.dropout.default:  # does nothing
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    program.example_inputs = None
    with warnings.catch_warnings():  # that weights may be incomplete, if they are channels-last and on a GPU
        warnings.simplefilter("ignore")
        config = json.dumps(student.config, ensure_ascii=False)
        texts = {
            "README.md": describe_student(student, noise_inside),
            "size_multiple": str(student.predictor.backbone.size_multiple),
        }
        torch.export.save(program, file, extra_files={METADATA: config, **texts})


class ProgramStudent(ExportedStudent):
    """A student in a PyTorch program.

    torch.export.load can be made to run code by a file that is forged, so load only files of people you trust.

    Args:
        file: that `ibmd export --format torch-export` wrote.

    Raises:
        IbmdError: the file is no student, or damaged.
    """

    def __init__(self, file: Path) -> None:
        extra = {METADATA: ""}
        try:
            with zipfile.ZipFile(file) as archive:  # PyTorch does not look at the checksums
                if damaged := archive.testzip():
                    raise IbmdError(f"{file}: damaged ({damaged}); export or fetch it again")
        except (OSError, zipfile.BadZipFile, zlib.error) as error:
            raise IbmdError(f"{file}: PyTorch cannot read it ({error})") from error
        try:
            program = torch.export.load(file, extra_files=extra)
        except Exception as error:  # of many kinds
            raise IbmdError(f"{file}: PyTorch cannot read it ({str(error).splitlines()[0]})") from error
        self.module = _quickened(program.module(check_guards=False))
        names = [node.name for node in program.graph.nodes if node.op == "placeholder"]
        super().__init__(check(extra[METADATA], file), file, [n for n in INPUTS if n.lower() in names])

    def stream(self, seed: int, *place: int | str) -> Draw:
        """Return the random stream of a place, PyTorch's own."""
        return torch_draw(seed, *place)

    @torch.no_grad()
    def run(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Compute x_0, and what comes after it."""
        outputs = self.module(**{name: torch.from_numpy(v) for name, v in inputs.items()})
        return [v.numpy() for v in (outputs if isinstance(outputs, tuple) else (outputs,))]

    def spread(self) -> AbstractContextManager[int]:
        """Give each batch one thread of the CPU, see `translating.Engine`."""
        return single_threaded()


def torch_draw(seed: int, *place: int | str) -> Draw:
    """Return the random stream `noise.stream(seed, *place)` for exported students."""
    rng = stream(seed, *place)
    return lambda shape: torch.randn(*shape, generator=rng).numpy()


def _quickened(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Let a program on the CPU do what `networks.convolve` does, which cannot be exported; widen its weights once."""
    for node in module.graph.nodes:
        if node.target is _aten.conv2d.default and torch.backends.mkldnn.is_available():
            given = tuple(node.args)
            x, weight, bias, stride, padding, dilation, groups = given + _CONV2D[len(given) :]
            node.target = torch.mkldnn_convolution
            node.args = (x, weight, bias, padding, stride, dilation, groups)
        elif node.target is _aten.to.dtype and node.args[0].op == "get_attr":
            owner, _, name = node.args[0].target.rpartition(".")
            parameter = getattr(module.get_submodule(owner), name)
            parameter.data = parameter.data.to(node.args[1])
            node.replace_all_uses_with(node.args[0])
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


_CONV2D: tuple[Any, ...] = (None, None, None, (1, 1), (0, 0), (1, 1), 1)
"""Defaults of conv2d's arguments."""
