"""From a trained generator to the graph that is served."""

from genretrieval.export.onnx import OPSET, GraphBackend, export_graph

__all__ = ["OPSET", "GraphBackend", "export_graph"]
