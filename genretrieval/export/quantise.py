"""int8 for CPUs: the layers' matrices of a retrieval graph as 8-bit integers, one scale a column.

What goes into a product is brought to 8 bits by its own range at every call. Embeddings, output heads, routers and
experts of a mixture and the dense head stay in float32: they are lookups, or decide between items by small differences.
Whether the answers are still good enough is for a measurement to say (`genretrieval export`).
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from genretrieval.errors import BundleError

# What `genretrieval.model.search` calls the matrices of its layers.
_MATRIX = re.compile(r"\.(layers\.\d+\.(query|key|value|output|inner|outer|cross_query|cross_output)|cross_kv\.\d+)$")


def quantise(source: Path, target: Path) -> int:
    """Write a retrieval graph again with its layers' matrices in int8.

    Args:
        source: ``retriever.onnx`` in float32.
        target: file to write.

    Returns:
        Matrix products that are done in int8.

    Raises:
        BundleError: the graph has none that could be.
    """
    model = onnx.load(source)
    products = _as_products(model)
    if not products:
        raise BundleError(
            f"{source} has no matrix that is known to stand int8; it was exported by another version. Export it again"
        )
    # It asks for a preparation that `_as_products` does away with.
    logging.getLogger().addFilter(_no_advice)
    try:
        quantize_dynamic(
            model,
            target,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=products,
            per_channel=True,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
    finally:
        logging.getLogger().removeFilter(_no_advice)
    return len(products)


def _no_advice(record: logging.LogRecord) -> bool:
    return "pre-processing before quantization" not in record.getMessage()


def _as_products(model: ModelProto) -> list[str]:
    """Turn each Gemm with a constant matrix into a product and a sum, in place; names of those with a layer's matrix.

    onnxruntime quantises products alone, and turning Gemms into them itself it turns a matrix over once for each that
    shares it.
    """
    constant = {tensor.name: tensor for tensor in model.graph.initializer}
    turned: set[str] = set()
    nodes: list[NodeProto] = []
    products = []
    for node in model.graph.node:
        if node.op_type != "Gemm" or node.input[1] not in constant:
            nodes.append(node)
            continue
        settings = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert settings.get("alpha", 1.0) == settings.get("beta", 1.0) == 1.0
        assert not settings.get("transA")
        matrix = constant[node.input[1]]
        if settings.get("transB") and matrix.name not in turned:
            matrix.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(matrix).T.copy(), matrix.name))
            turned.add(matrix.name)
        to_add = node.input[2:]
        product = f"{node.output[0]}_product" if to_add else node.output[0]
        nodes.append(helper.make_node("MatMul", node.input[:2], [product], node.name))
        if to_add:
            nodes.append(helper.make_node("Add", [product, *to_add], node.output, f"{node.name}_sum"))
        if _MATRIX.search(matrix.name):
            products.append(node.name)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    # Shapes of the matrices as they lay before.
    del model.graph.value_info[:]
    return products
