"""A student as one ONNX graph: the inputs and the output that `programs` describes, opset 20, its `config.json` inside.

Everything that does not depend on the inputs is computed here once (the embeddings of the times are most of it). The
graph computes in float32; weights may be stored in fewer bits, and are widened when a session starts:

    fp16, bf16  a Cast at each weight
    int8        for each output channel a scale, max |w| / 127, and a DequantizeLinear at each weight

Dynamic quantisation (ONNX Runtime's `quantize_dynamic`), which makes the activations int8 too, is not offered: on the
embedded student it lost 6 dB more and took five times as long.
"""

import copy
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ibmd_cli import __version__
from ibmd_cli.errors import IbmdError, NotAvailable
from ibmd_cli.export.exported import INPUTS, METADATA, sealed
from ibmd_cli.export.torch_export import Say, trace
from ibmd_cli.models.interface import describe_student, describe_tensors, noise_shapes
from ibmd_cli.models.model import StudentModel

try:
    import ml_dtypes
    import onnx
    import onnxruntime
    import onnxscript  # noqa: F401 (torch.onnx needs it)
except ImportError as error:
    raise NotAvailable(f"--format onnx: needs {error.name}: pip install 'ibmd-cli[onnx]'") from error


OPSET = 20
"""What PyTorch chooses. From 21 on there is GroupNormalization, which ONNX Runtime 1.32 takes apart again on the CPU:
twice as many nodes, and no faster."""
OPSETS = range(18, 21)
DTYPES = ("fp32", "fp16", "bf16", "int8")
MAX_BYTES = 2**31 - 1  # of a protocol buffer
SMALL = 1024  # numbers: biases and norms stay float32


def save_graph(model: onnx.ModelProto, file: Path, dtype: str = "fp32") -> None:
    """Write a graph with its weights in `dtype`, one of `DTYPES`, after ONNX's own checks and shape inference.

    Raises:
        IbmdError: the file would be larger than ONNX allows, 2 GiB.
    """
    model = store(model, dtype)
    if model.ByteSize() > MAX_BYTES:
        raise IbmdError(f"{file}: {model.ByteSize() / 2**30:.1f} GiB, and ONNX allows 2 in a file: use another --dtype")
    onnx.checker.check_model(model, full_check=True)
    file.write_bytes(sealed(model.SerializeToString()))


def make_graph(
    student: StudentModel, opset: int = OPSET, noise_inside: bool = False, say: Say = lambda step: None
) -> onnx.ModelProto:
    """Return the graph of a student on the CPU, with nothing left to compute before inputs are known.

    Args:
        student: whose.
        opset: version of ONNX's operators, in `OPSETS`.
        noise_inside: z and eps are no inputs but drawn by the graph, and outputs after x_0.
        say: told of each step before it begins.
    """
    say("tracing the network")
    program = trace(student, noise_inside=noise_inside)
    names = [name for name in INPUTS if name.lower() in {node.name for node in program.graph.nodes}]
    drawn = list(noise_shapes(student, (3, 1, 1))) if noise_inside else []
    say("translating it into ONNX (the longest step: about a minute)")
    with _silence():
        options: dict[str, Any] = {"opset_version": opset, "input_names": names, "output_names": ["x_0", *drawn]}
        exported = torch.onnx.export(program, dynamo=True, verbose=False, **options)
    assert exported is not None
    say("computing what does not depend on the image")
    model = _fold(exported.model_proto)
    _guard(model, student.predictor.backbone.size_multiple)
    _describe(model, student, noise_inside)
    return model


def _describe(model: onnx.ModelProto, student: StudentModel, noise_inside: bool) -> None:
    """Write into a graph what its tensors are, for readers and for `load`, and the lowest IR version that holds it."""
    texts = describe_tensors(student)
    for value in (*model.graph.input, *model.graph.output):
        value.ClearField("metadata_props")
        value.doc_string = texts[value.name]
        dims = value.type.tensor_type.shape.dim
        for i, name in enumerate(("batch", "", "height", "width")[: len(dims)]):
            if dims[i].dim_param:
                dims[i].dim_param = name
    model.doc_string = model.graph.doc_string = describe_student(student, noise_inside)
    config = json.dumps(student.config, ensure_ascii=False)
    multiple = str(student.predictor.backbone.size_multiple)
    onnx.helper.set_model_props(model, {METADATA: config, "size_multiple": multiple})
    model.ir_version = onnx.helper.find_min_ir_version_for(model.opset_import)


def _guard(model: onnx.ModelProto, multiple: int) -> None:
    """Let a graph refuse sides that are no multiples by a node whose name says so, and answer no images with none.

    Runtimes cannot reshape what is empty, so a blank image joins an empty batch, and its result is cut off.
    """
    graph, kinds = model.graph, {onnx.TensorProto.FLOAT: "float", onnx.TensorProto.INT64: "int64"}
    inner = {value.name: f"guard_{value.name}" for value in (*graph.input, *graph.output)}
    for own in graph.node:
        own.input[:] = [inner.get(name, name) for name in own.input]
        own.output[:] = [inner.get(name, name) for name in own.output]
    before = _GUARD.format(multiple)
    for value in graph.input:
        padded = "guard_padded" if value.name == "x_T" else inner[value.name]
        before += _PAD.format(value.name, kinds[value.type.tensor_type.elem_type], padded)
        for name in {padded, inner[value.name]}:  # old runtimes do not find the rank
            known = graph.value_info.add()
            known.CopyFrom(value)
            known.name = name
            known.type.tensor_type.shape.dim[0].Clear()
    after = "".join(f"{v.name} = Slice({inner[v.name]}, guard_0, guard_batch, guard_0)\n" for v in graph.output)
    heads, ends = (list(map(onnx.parser.parse_node, text.split("\n")[:-1])) for text in (before + _SIDES, after))
    heads[-2].name = f"height_and_width_must_be_multiples_of_{multiple}"
    nodes = [*heads, *graph.node, *ends]
    del graph.node[:]
    graph.node.extend(nodes)


_GUARD = """guard_0 = Constant<value_ints: ints = [0]>()
guard_1 = Constant<value_ints: ints = [1]>()
guard_unit = Constant<value_ints: ints = [{}]>()
guard_batch = Shape<start: int = 0, end: int = 1>(x_T)
guard_lacking = Sub(guard_1, guard_batch)
guard_more = Max(guard_lacking, guard_0)
"""
_PAD = """guard_{0}_rest = Shape<start: int = 1>({0})
guard_{0}_shape = Concat<axis: int = 0>(guard_more, guard_{0}_rest)
guard_{0}_blank = ConstantOfShape<value: tensor = {1}[1] {{0}}>(guard_{0}_shape)
{2} = Concat<axis: int = 0>({0}, guard_{0}_blank)
"""
_SIDES = """guard_all = Shape(guard_padded)
guard_planes = Shape<end: int = 2>(guard_padded)
guard_sides = Shape<start: int = 2>(guard_padded)
guard_cells = Div(guard_sides, guard_unit)
guard_whole = Mul(guard_cells, guard_unit)
guard_shape = Concat<axis: int = 0>(guard_planes, guard_whole)
guard_fits = Reshape(guard_padded, guard_shape)
guard_x_T = Reshape(guard_fits, guard_all)
"""


def _fold(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace what depends on constants alone by its value, with ONNX Runtime's own folding, which knows no limit."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC  # fit for any processor
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = f"{folder}/folded.onnx"
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        folded = onnx.load(options.optimized_model_filepath)
    used = {node.domain for node in folded.graph.node}
    for domain in [o for o in folded.opset_import if o.domain not in used]:
        folded.opset_import.remove(domain)
    del folded.graph.value_info[:]
    folded.producer_name, folded.producer_version = "ibmd", __version__
    return folded


def store(model: onnx.ModelProto, dtype: str) -> onnx.ModelProto:
    """Return a copy of a graph whose weights are kept in `dtype`, one of `DTYPES`."""
    model = copy.deepcopy(model)
    if dtype == "fp32":
        return model
    graph, nodes = model.graph, []
    for tensor in list(graph.initializer):
        weight = onnx.numpy_helper.to_array(tensor)
        if weight.dtype != np.float32 or weight.ndim < 2 or weight.size < SMALL:
            continue
        name, stored = tensor.name, f"{tensor.name}.{dtype}"
        if dtype == "int8":
            scale = np.abs(weight).max(axis=tuple(range(1, weight.ndim)), keepdims=True) / 127
            scale[scale == 0] = 1
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.rint(weight / scale).astype(np.int8), stored))
            graph.initializer.append(onnx.numpy_helper.from_array(scale.ravel(), f"{name}.scale"))
            nodes.append(onnx.helper.make_node("DequantizeLinear", [stored, f"{name}.scale"], [name], axis=0))
        else:
            narrow = np.float16 if dtype == "fp16" else ml_dtypes.bfloat16
            tensor.CopyFrom(onnx.numpy_helper.from_array(weight.astype(narrow), stored))
            nodes.append(onnx.helper.make_node("Cast", [stored], [name], to=onnx.TensorProto.FLOAT))
    nodes += graph.node
    del graph.node[:]
    graph.node.extend(nodes)
    return model


@contextmanager
def _silence() -> Iterator[None]:
    """Keep back what PyTorch's exporter says of itself and of packages that are not there."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)
