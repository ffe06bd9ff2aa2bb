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

import numpy as np
import torch

from ibmd_cli import __version__
from ibmd_cli.errors import IbmdError, NotAvailable
from ibmd_cli.export.exported import INPUTS, METADATA, sealed
from ibmd_cli.export.program import noise_shapes, trace
from ibmd_cli.models.model import Student

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


def export_onnx(
    student: Student, file: Path, *, dtype: str = "fp32", opset: int = OPSET, noise_inside: bool = False
) -> None:
    """Write a student as an ONNX file, for any number of images of any size that its network takes.

    Args:
        student: on the CPU.
        file: the file.
        dtype: of the weights, one of `DTYPES`.
        opset: version of ONNX's operators, in `OPSETS`.
        noise_inside: z and eps are no inputs but drawn by the graph, and outputs after x_0.

    Raises:
        IbmdError: see `save_graph`.
    """
    save_graph(make_graph(student, opset, noise_inside), file, dtype)


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


def make_graph(student: Student, opset: int = OPSET, noise_inside: bool = False) -> onnx.ModelProto:
    """Return the graph of a student, see `export_onnx`, with nothing left to compute before inputs are known."""
    program = trace(student, noise_inside=noise_inside)
    names = [name for name in INPUTS if name.lower() in {node.name for node in program.graph.nodes}]
    drawn = list(noise_shapes(student, (3, 1, 1))) if noise_inside else []
    with _silence():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=names,
            output_names=["x_0", *drawn],
            verbose=False,
        )
    assert exported is not None
    model = _fold(exported.model_proto)
    for value in (*model.graph.input, *model.graph.output):
        value.ClearField("metadata_props")
        dims = value.type.tensor_type.shape.dim
        for i, name in enumerate(("batch", "", "height", "width")[: len(dims)]):
            if dims[i].dim_param:
                dims[i].dim_param = name
    onnx.helper.set_model_props(model, {METADATA: json.dumps(student.config, ensure_ascii=False)})
    return model


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
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
