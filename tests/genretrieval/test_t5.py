from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from transformers import T5Config, T5ForConditionalGeneration

from genretrieval.catalogue import NOTHING_CLOSED, CatalogueIndex, build_index, closed_inputs, graph_inputs, mask_inputs
from genretrieval.errors import InvalidInputError
from genretrieval.export.onnx import GraphBackend, NamedGraph, example_inputs, export_graph
from genretrieval.export.t5 import t5_graph, t5_level_offsets
from genretrieval.model.search import CLOSED
from genretrieval.semantic_ids import SemanticIds

SIZES = (8, 6, 4)


def t5(**changes: Any) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 2 + sum(SIZES),
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 1,
        "num_heads": 4,
        "decoder_start_token_id": 0,
        "initializer_factor": 2.0,
    }
    return T5ForConditionalGeneration(T5Config(**{**settings, **changes})).eval()


@pytest.fixture(scope="module")
def model() -> T5ForConditionalGeneration:
    return t5()


@pytest.fixture(scope="module")
def graph(model: T5ForConditionalGeneration) -> NamedGraph:
    return t5_graph(model, SIZES)


@pytest.fixture(scope="module")
def session(graph: NamedGraph, tmp_path_factory: pytest.TempPathFactory) -> ort.InferenceSession:
    path: Path = tmp_path_factory.mktemp("t5") / "t5.onnx"
    export_graph(graph, example_inputs(graph, n_profile_features=2), path)
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])


def catalogue(n_items: int, seed: int = 0) -> CatalogueIndex:
    rng = np.random.default_rng(seed)
    codes = np.stack([rng.integers(0, size, n_items) for size in SIZES], 1).astype(np.int32)
    return build_index(SemanticIds(codes, SIZES))


def request(index: CatalogueIndex, n_rows: int, length: int, beams: int) -> dict[str, NDArray[Any]]:
    """Every second row may see half of the leaves."""
    rng = np.random.default_rng(n_rows)
    tokens = rng.integers(2, 2 + sum(SIZES), (n_rows, length))
    tokens[-1, length // 2 + 1 :] = 0
    half = np.arange(index.n_leaves) % 2 == 0
    masks = [index.allowed_nodes(np.ones(index.n_leaves, bool)), index.allowed_nodes(half)]
    return {
        "context_tokens": tokens,
        "beams": np.arange(beams),
        "mask_row": np.arange(n_rows) % 2,
        **graph_inputs(index),
        **mask_inputs(masks),
        **closed_inputs([(NOTHING_CLOSED,) * index.n_levels] * n_rows),
    }


@torch.inference_mode()
def log_probability(model: T5ForConditionalGeneration, tokens: NDArray[Any], codes: NDArray[Any]) -> float:
    """Sum over the codes, straight from the T5: the oracle."""
    flat = torch.tensor([t5_level_offsets(SIZES)]) + torch.from_numpy(codes.astype(np.int64))[None]
    context = torch.from_numpy(tokens)[None]
    start = torch.zeros(1, 1, dtype=torch.long)
    logits = model(
        input_ids=context, attention_mask=(context != 0).long(), decoder_input_ids=torch.cat([start, flat[:, :-1]], 1)
    ).logits
    return float(logits.log_softmax(-1).gather(-1, flat[..., None]).sum())


@pytest.mark.parametrize(("n_items", "n_rows", "length", "beams"), [(60, 2, 9, 7), (5, 3, 2, 12), (1, 1, 4, 2)])
def test_onnxruntime_and_torch_find_the_same(
    graph: NamedGraph, session: ort.InferenceSession, n_items: int, n_rows: int, length: int, beams: int
) -> None:
    inputs = request(catalogue(n_items), n_rows, length, beams)
    expected = GraphBackend(graph).run(inputs)
    leaves, scores, level_scores = session.run(None, {name: inputs[name] for name in graph.names})
    real = expected.scores > CLOSED / 2
    assert ((scores > CLOSED / 2) == real).all()
    assert (leaves[real] == expected.leaves[real]).all()
    np.testing.assert_allclose(scores[real], expected.scores[real], atol=1e-4)
    np.testing.assert_allclose(level_scores[real], expected.level_scores[real], atol=1e-4)


def test_wide_search_ranks_every_allowed_leaf_by_the_t5s_own_probability(
    model: T5ForConditionalGeneration, graph: NamedGraph
) -> None:
    index = catalogue(25)
    inputs = request(index, n_rows=2, length=6, beams=40)
    found = GraphBackend(graph).run(inputs)
    for row in range(2):
        allowed = np.flatnonzero(np.arange(index.n_leaves) % 2 == 0) if row else np.arange(index.n_leaves)
        codes = index.leaf_codes(allowed)
        oracle = {
            int(leaf): log_probability(model, inputs["context_tokens"][row], code)
            for leaf, code in zip(allowed, codes, strict=True)
        }
        real = found.scores[row] > CLOSED / 2
        assert found.leaves[row][real].tolist() == sorted(oracle, key=lambda leaf: -oracle[leaf])
        np.testing.assert_allclose(found.scores[row][real], sorted(oracle.values(), reverse=True), atol=1e-4)
        np.testing.assert_allclose(found.level_scores[row][real].sum(-1), found.scores[row][real], atol=1e-4)


def test_padding_on_the_right_changes_nothing(graph: NamedGraph) -> None:
    index = catalogue(40)
    inputs = request(index, n_rows=1, length=5, beams=4)
    padded = dict(inputs, context_tokens=np.pad(inputs["context_tokens"], ((0, 0), (0, 3))))
    a, b = GraphBackend(graph).run(inputs), GraphBackend(graph).run(padded)
    assert (a.leaves == b.leaves).all()
    np.testing.assert_allclose(a.scores, b.scores, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feed_forward_proj": "gated-gelu"}, "feed_forward_proj gated-gelu"),
        ({"d_kv": 16}, "num_heads \\* d_kv 64"),
        ({"vocab_size": 19}, "has 19 tokens, but codebooks of \\(8, 6, 4\\) need 20"),
    ],
)
def test_a_t5_of_another_form_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        t5_graph(t5(**changes), SIZES)
