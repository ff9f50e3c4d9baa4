"""Export of the retrieval graph: the whole beam search as one ONNX file whose catalogue index is an input."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim

from genretrieval.catalogue import token_type
from genretrieval.model import Generator
from genretrieval.model.generator import request_tensors
from genretrieval.model.search import IndexTensors, RetrievalGraph, Retrieved
from genretrieval.retrieval import Leaves

# The first opset with the Attention operator.
OPSET = 23
MINIMUM_ONNXRUNTIME = "1.23"
OUTPUTS = ("leaves", "scores", "level_scores")
DENSE_OUTPUT = "user"


class NamedGraph(nn.Module):
    """A retrieval graph that takes its inputs by position, in the order of `names`.

    Args:
        graph: called with the request tensors by name, ``beams`` and the index.
        request_names: request tensors that the graph reads, in order.
        codebook_sizes: codes of each level.
        vector_dim: width of the item vectors that the graph reads and of the user vector that it returns; 0 for none.
    """

    def __init__(
        self,
        graph: nn.Module,
        request_names: tuple[str, ...],
        codebook_sizes: tuple[int, ...],
        vector_dim: int = 0,
    ) -> None:
        super().__init__()
        self.retrieval = graph
        self.request_names = request_names
        self.codebook_sizes = codebook_sizes
        self.vector_dim = vector_dim

    @property
    def n_levels(self) -> int:
        """Codes of a semantic ID."""
        return len(self.codebook_sizes)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of all outputs, in order."""
        return (*OUTPUTS, DENSE_OUTPUT) if self.vector_dim else OUTPUTS

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all inputs, in order."""
        kinds = ("token", "child_start", "slot", "allowed", "closed_parent", "closed_child")
        index = [f"{kind}_{level}" for kind in kinds for level in range(self.n_levels)]
        return (*self.request_names, "beams", "mask_row", *index)

    def forward(self, *inputs: Tensor) -> Retrieved:
        """Call the graph."""
        given = dict(zip(self.names, inputs, strict=True))
        request = {name: given[name] for name in self.request_names}
        levels = range(self.n_levels)
        index = IndexTensors(
            tokens=[given[f"token_{level}"] for level in levels],
            child_starts=[given[f"child_start_{level}"] for level in levels],
            slots=[given[f"slot_{level}"] for level in levels],
            allowed=[given[f"allowed_{level}"] for level in levels],
            mask_row_B=given["mask_row"],
            closed=[(given[f"closed_parent_{level}"], given[f"closed_child_{level}"]) for level in levels],
        )
        return self.retrieval(request, given["beams"], index)


def named_graph(generator: Generator) -> NamedGraph:
    """The retrieval graph of a generator, with the inputs that it reads and no others."""
    config = generator.config
    vector_dim = 2 * config.d_model if config.n_items else 0
    return NamedGraph(RetrievalGraph(generator).eval(), request_tensors(config), config.codebook_sizes, vector_dim)


def example_inputs(graph: NamedGraph, n_profile_features: int) -> dict[str, Tensor]:
    """Small inputs to trace with; every dynamic dimension differs from the others and from one."""
    rows, length, past, query, beams, mask_rows, closed = 3, 5, 8, 4, 6, 2, 7
    given: dict[str, Tensor] = {
        "context_tokens": torch.ones(rows, length, dtype=torch.long),
        "history_codes": torch.zeros(rows, length, graph.n_levels, dtype=torch.long),
        "history_events": torch.zeros(rows, length, dtype=torch.long),
        "history_gaps": torch.zeros(rows, length, dtype=torch.long),
        "history_mask": torch.ones(rows, length, dtype=torch.bool),
        "query_tokens": torch.ones(rows, query, dtype=torch.long),
        "query_mask": torch.ones(rows, query, dtype=torch.bool),
        "profile": torch.zeros(rows, n_profile_features, dtype=torch.long),
        "history_vectors": torch.zeros(rows, length, graph.vector_dim),
        "past_codes": torch.zeros(rows, past, graph.n_levels, dtype=torch.long),
        "past_events": torch.zeros(rows, past, dtype=torch.long),
        "past_mask": torch.ones(rows, past, dtype=torch.bool),
        "past_vectors": torch.zeros(rows, past, graph.vector_dim),
        "scenario": torch.zeros(rows, dtype=torch.long),
        "beams": torch.arange(beams),
        "mask_row": torch.zeros(rows, dtype=torch.long),
    }
    n_nodes = 1
    for level, size in enumerate(graph.codebook_sizes):
        given[f"child_start_{level}"] = torch.arange(n_nodes + 1, dtype=torch.int32) * 2
        n_nodes *= 2
        given[f"token_{level}"] = torch.from_numpy((np.arange(n_nodes) % 2).astype(token_type(size)))
        given[f"slot_{level}"] = torch.arange(2)
        given[f"allowed_{level}"] = torch.ones(mask_rows, n_nodes, dtype=torch.bool)
        for part in ("parent", "child"):
            given[f"closed_{part}_{level}"] = torch.full((rows, closed), -1)
    return {name: given[name] for name in graph.names}


def dynamic_dimensions(name: str) -> dict[int, Any]:
    """Which dimensions of an input may change from call to call."""
    kind, _, level = name.rpartition("_")
    if kind in ("token", "slot"):
        return {0: Dim.DYNAMIC}
    if kind == "child_start":
        # One root above level 0, any number of parents above the others.
        return {} if level == "0" else {0: Dim.DYNAMIC}
    if kind == "allowed":
        return {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    if name in ("beams", "mask_row", "profile", "scenario"):
        return {0: Dim.DYNAMIC}
    return {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}


def export_graph(graph: NamedGraph, example: dict[str, Tensor], path: Path) -> None:
    """Write `graph` to an ONNX file.

    Batch, history length, query length, beam width, number of masks and every size of the index stay dynamic.
    """
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # The exporter warns of its own internals, which a caller cannot act on.
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                graph,
                tuple(example.values()),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(example),
                output_names=list(graph.outputs),
                dynamic_shapes=(tuple(dynamic_dimensions(name) for name in example),),
                optimize=True,
                verbose=False,
            )
    finally:
        quiet.setLevel(level)
    assert program is not None
    model = program.model_proto
    onnx.save(model, path)


class GraphBackend:
    """Runs a `NamedGraph` with torch: the reference that the exported graph is compared with."""

    def __init__(self, graph: NamedGraph) -> None:
        """Keep the graph."""
        self.graph = graph

    @torch.inference_mode()
    def run(self, inputs: dict[str, NDArray[Any]]) -> Leaves:
        """Run one batch (see `genretrieval.retrieval.Backend`)."""
        found = self.graph(*(torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in self.graph.names))
        leaves, *scores = (part.numpy() for part in found if part is not None)
        return Leaves(leaves, *scores)
