"""Which matrices of a graph are brought to 8 bits, and that the sums come out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx.parser
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from genretrieval.errors import BundleError
from genretrieval.export.quantise import _MATRIX, quantise
from genretrieval.model.search import RetrievalGraph

# Two matrices of layers, one of which two products share, and a head.
GRAPH = """
<ir_version: 9, opset_import: ["" : 18]>
made (float[B, 64] x) => (float[B, 32] scores)
{
    inner = Gemm <transB: int = 1> (x, "r.layers.0.inner")
    active = Relu (inner)
    once = Gemm (active, "r.layers.0.outer", x)
    again = Gemm <transB: int = 1> (once, "r.layers.0.inner")
    twice = Gemm (again, "r.layers.0.outer", once)
    scores = Gemm <transB: int = 1> (twice, "r.search.heads.0")
}
"""
SHAPES = {"r.layers.0.inner": (96, 64), "r.layers.0.outer": (96, 64), "r.search.heads.0": (32, 64)}


def made(path: Path, shapes: dict[str, tuple[int, int]]) -> Path:
    text, rng = GRAPH, np.random.default_rng(0)
    names = {name: name.replace(".", "_") for name in shapes}
    for name, plain in names.items():
        text = text.replace(f'"{name}"', plain)
    model = onnx.parser.parse_model(text)
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
        for i, name in enumerate(node.input):
            node.input[i] = {plain: name for name, plain in names.items()}.get(name, name)
    model.graph.initializer.extend(
        numpy_helper.from_array((rng.standard_normal(shape) / 8).astype(np.float32), name)
        for name, shape in shapes.items()
    )
    onnx.save(model, path)
    return path


def test_matrices_of_layers_become_int8_and_heads_stay(tmp_path) -> None:
    source = made(tmp_path / "fp32.onnx", SHAPES)
    assert quantise(source, tmp_path / "int8.onnx") == 4
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node)
    assert (kinds["MatMulInteger"], kinds["MatMul"]) == (4, 1)
    x = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    sessions = (ort.InferenceSession(tmp_path / f"{name}.onnx") for name in ("fp32", "int8"))
    before, after = (session.run(None, {"x": x})[0] for session in sessions)
    # Eight bits of each number, by the range of its row and column.
    np.testing.assert_allclose(after, before, atol=0.05 * np.abs(before).max())
    assert not np.array_equal(after, before)


def test_a_graph_whose_matrices_are_not_known_is_refused(tmp_path) -> None:
    source = made(tmp_path / "fp32.onnx", {name.replace("layers", "parts"): s for name, s in SHAPES.items()} | SHAPES)
    model = onnx.load(source)
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = name.replace("layers", "parts")
    onnx.save(model, source)
    with pytest.raises(BundleError, match="no matrix that is known to stand int8"):
        quantise(source, tmp_path / "int8.onnx")
    assert not (tmp_path / "int8.onnx").exists()


def test_all_matrices_of_layers_are_known_by_name(make_generator) -> None:
    names = [name for name, _ in RetrievalGraph(make_generator()).named_parameters()]
    known = {name for name in names if _MATRIX.search(name)}
    kinds = {name.rpartition(".")[2] for name in known}
    assert {"query", "key", "value", "output", "cross_query", "cross_output"} <= kinds
    assert not [name for name in known if "head" in name or "codes" in name or "mixture" in name]
    of_layers = {name for name in names if ".layers." in name and "mixture" not in name}
    assert of_layers <= known
