"""From a trained generator to the graph that is served."""

from genretrieval.export.onnx import MINIMUM_ONNXRUNTIME, OPSET, GraphBackend, export_graph

__all__ = ["MINIMUM_ONNXRUNTIME", "OPSET", "GraphBackend", "export_graph"]
