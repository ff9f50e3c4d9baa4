"""The exported graph answers as the torch graph does, at every size that it was not traced with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from numpy.typing import NDArray

from genretrieval.catalogue import build_index, closed_inputs, graph_inputs, mask_inputs
from genretrieval.export.onnx import OPSET, OUTPUTS, GraphBackend, NamedGraph, example_inputs, export_graph, named_graph
from genretrieval.model import GeneratorConfig
from genretrieval.retrieval import CLOSED_BELOW, Leaves

SIZES = (12, 16, 14)
NOTHING_ELSE = {
    "query_vocab_size": 0, "n_profile_buckets": 0, "n_items": 0, "n_scenarios": 0, "n_past_tokens": 0, "max_past": 0,
    "n_experts": 0,
}  # fmt: skip

RECIPES = sorted(
    path
    for path in (Path(__file__).parents[2] / "configs").glob("*.yaml")
    if "stages" in yaml.safe_load(path.read_text("utf-8"))  # tokenizers.yaml is no recipe and ships no graph
)


class Exported:
    """A torch graph and the session of its export."""

    def __init__(self, graph: NamedGraph, path: Path) -> None:
        export_graph(graph, example_inputs(graph, 2), path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.graph, self.path = graph, path
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(self, inputs: dict[str, NDArray[Any]]) -> Leaves:
        return Leaves(*self.session.run(list(self.graph.outputs), {name: inputs[name] for name in self.graph.names}))


@pytest.fixture(scope="module")
def whole(make_generator: Any, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Queries, profile, a past, scenarios, dense head and all."""
    generator = make_generator(codebook_sizes=SIZES)
    return Exported(named_graph(generator), tmp_path_factory.mktemp("export") / "retriever.onnx")


@pytest.fixture(scope="module")
def plain(make_generator: Any, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """History alone, two levels, one layer each."""
    generator = make_generator(
        codebook_sizes=(12, 16),
        **NOTHING_ELSE,
        n_encoder_layers=1,
        n_decoder_layers=1,
    )
    return Exported(named_graph(generator), tmp_path_factory.mktemp("export") / "retriever.onnx")


def assert_parity(
    exported: Exported,
    make_ids: Any,
    requests: dict[str, NDArray[Any]],
    n_items: int,
    width: int,
    n_masks: int,
) -> None:
    """Scores within 1e-4, and equal leaves wherever the gap to the scores beside them is larger than 1e-5."""
    sizes = exported.graph.retrieval.search.codebook_sizes
    index = build_index(make_ids(n_items, seed=n_items, sizes=sizes))
    rng = np.random.default_rng(width)
    masks = [rng.random(index.n_leaves) < share for share in np.linspace(1.0, 0.05, n_masks)]
    nodes = [index.allowed_nodes(mask) for mask in masks]
    mask_row = rng.integers(0, n_masks, len(requests["history_codes"]))
    entered = rng.random((len(mask_row), index.n_leaves)) < rng.choice([0.3, 0.9, 1.0], (len(mask_row), 1))
    excluded = [np.flatnonzero(~row) for row in entered]
    inputs = {
        **requests,
        **graph_inputs(index),
        **mask_inputs(nodes),
        **closed_inputs([index.closed_with(leaves, nodes[m]) for leaves, m in zip(excluded, mask_row, strict=True)]),
        "beams": np.arange(width),
        "mask_row": mask_row,
    }
    expected, found = GraphBackend(exported.graph).run(inputs), exported.run(inputs)
    for one, other in zip(expected, found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
    if expected.user is not None:
        np.testing.assert_allclose(found.user, expected.user, rtol=0, atol=1e-4)
    live = expected.scores > CLOSED_BELOW
    assert np.array_equal(live, found.scores > CLOSED_BELOW)
    np.testing.assert_allclose(found.scores[live], expected.scores[live], rtol=0, atol=1e-4)
    gaps = np.diff(expected.scores, axis=1, prepend=np.inf, append=-np.inf)
    clear = live & (-gaps[:, :-1] > 1e-5) & (-gaps[:, 1:] > 1e-5)
    assert np.array_equal(found.leaves[clear], expected.leaves[clear])
    np.testing.assert_allclose(found.level_scores[clear], expected.level_scores[clear], rtol=0, atol=1e-4)
    for leaves, alive, row, own in zip(found.leaves, live, mask_row, entered, strict=True):
        allowed = masks[row] & own
        assert allowed[leaves[alive]].all()
        assert alive.sum() == len(set(leaves[alive])) <= min(width, allowed.sum())


@pytest.mark.parametrize(
    ("n_items", "n", "length", "n_query_tokens", "width", "n_masks"),
    [
        (300, 1, 1, 1, 1, 1),
        (300, 1, 8, 3, 10, 2),
        (300, 3, 2, 1, 5, 3),
        (2000, 8, 8, 6, 50, 4),
        (2000, 3, 1, 2, 100, 1),
        (5, 8, 5, 4, 20, 2),
        (1, 1, 3, 2, 1, 1),
        (1, 3, 1, 1, 7, 2),
    ],
)
def test_parity(
    whole: Exported,
    make_generator: Any,
    make_ids: Any,
    make_requests: Any,
    n_items: int,
    n: int,
    length: int,
    n_query_tokens: int,
    width: int,
    n_masks: int,
) -> None:
    config = make_generator(codebook_sizes=SIZES).config
    requests = make_requests(config, n, length, n_query_tokens, seed=n_items + n, n_past=3 * length)
    assert_parity(whole, make_ids, requests, n_items, width, n_masks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_items", "n", "length", "width", "n_masks"),
    [(150, 1, 1, 1, 1), (150, 3, 7, 10, 2), (190, 8, 2, 50, 3), (1, 3, 1, 5, 1)],
)
def test_parity_without_queries_and_profile(
    plain: Exported, make_ids: Any, make_requests: Any, n_items: int, n: int, length: int, width: int, n_masks: int
) -> None:
    config = GeneratorConfig(codebook_sizes=(12, 16), n_events=3, n_gaps=4)
    requests = make_requests(config, n, length, seed=n)
    assert_parity(plain, make_ids, requests, n_items, width, n_masks)


def as_shipped(recipe: Path, *, bare_logs: bool) -> dict[str, Any]:
    """The parts that a recipe's model has, at a size that is quick to export; bare logs are items and times alone."""
    content = yaml.safe_load(recipe.read_text("utf-8"))
    sizes = content["generator"]
    kept = ("n_encoder_layers", "n_decoder_layers", "n_query_layers", "n_experts", "experts_per_token")
    # What a recipe does not say is what its section says by default, which has no experts.
    changes = {"n_experts": 0} | {name: sizes[name] for name in kept if name in sizes}
    if not sizes.get("max_past"):
        changes |= {"n_past_tokens": 0, "max_past": 0}
    if not sizes.get("dense_head", True):
        changes |= {"n_items": 0, "content_dim": 0}
    if not sizes.get("scenario", True) or bare_logs:
        changes["n_scenarios"] = 0
    if bare_logs:
        changes |= {"query_vocab_size": 0, "n_profile_buckets": 0}
    elif content["tokenizer"]["method"] == "keyword_aligned":
        changes["n_query_codes"] = sum(SIZES[:2])  # all levels but the one that tells collisions apart
    return changes


def shipped_variants() -> Iterator[Any]:
    """What recipes ship and what is left of them on bare logs, each once; experts and a past are in `whole` already."""
    seen: list[dict[str, Any]] = []
    for bare_logs in (False, True):
        for recipe in RECIPES:
            changes = as_shipped(recipe, bare_logs=bare_logs)
            if changes not in seen:
                seen.append(changes)
                marks = pytest.mark.slow if bare_logs or changes["n_experts"] else ()
                yield pytest.param(changes, id=recipe.stem + (", bare logs" if bare_logs else ""), marks=marks)


def test_there_are_recipes_whose_variants_are_compared() -> None:
    assert {"tiny", "next_item", "demo", "keyword_aligned"} <= {recipe.stem for recipe in RECIPES}


@pytest.mark.parametrize("changes", list(shipped_variants()))
def test_parity_of_what_recipes_ship(
    changes: dict[str, Any], make_generator: Any, make_ids: Any, make_requests: Any, tmp_path: Path
) -> None:
    generator = make_generator(codebook_sizes=SIZES, **changes)
    exported = Exported(named_graph(generator), tmp_path / "retriever.onnx")
    for n_items, n, length, width, n_masks in ((300, 3, 6, 10, 2), (2000, 1, 1, 50, 1)):
        requests = make_requests(generator.config, n, length, 4, seed=n_items, n_past=3 * length)
        assert_parity(exported, make_ids, requests, n_items, width, n_masks)


def test_the_graph_says_what_it_reads(whole: Exported) -> None:
    model = onnx.load(whole.path)
    assert tuple(value.name for value in model.graph.input) == whole.graph.names
    assert tuple(value.name for value in model.graph.output) == (*OUTPUTS, "user")
    assert {o.version for o in model.opset_import if o.domain in ("", "ai.onnx")} == {OPSET}
    # Weights, the only thing that a bundle's graph owns, are inside the file.
    assert all(not tensor.external_data for tensor in model.graph.initializer)
    # The catalogue index is none of them: it is an input.
    sizes = {value.name: [d.dim_param for d in value.type.tensor_type.shape.dim] for value in model.graph.input}
    for name in ("token_0", "child_start_1", "slot_2", "beams", "mask_row"):
        assert all(sizes[name]), name
    for name in ("allowed_2", "history_mask", "query_tokens"):
        assert all(sizes[name]), name
    assert all(sizes["history_codes"][:2])


def test_a_graph_asks_for_what_its_model_reads(make_generator: Any) -> None:
    plain, everything = (
        named_graph(make_generator(**NOTHING_ELSE)),
        named_graph(make_generator()),
    )
    past = {"past_codes", "past_events", "past_mask", "past_vectors"}
    optional = {"query_tokens", "query_mask", "profile", "history_vectors", "scenario", *past}
    assert not optional & set(plain.names)
    assert set(everything.names) - set(plain.names) == optional
    assert plain.outputs == OUTPUTS


def test_the_example_has_no_two_equal_dimensions(make_generator: Any) -> None:
    graph = named_graph(make_generator())
    example = example_inputs(graph, 2)
    assert tuple(example) == graph.names
    sizes = [
        example["history_codes"].shape[0],
        example["history_codes"].shape[1],
        example["query_tokens"].shape[1],
        len(example["beams"]),
        len(example["allowed_0"]),
        example["closed_child_0"].shape[1],
    ]
    assert len({*sizes, 1}) == len(sizes) + 1


def test_the_trained_model_is_left_as_it_was(make_generator: Any, make_requests: Any) -> None:
    generator = make_generator()
    before = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    encoder = generator.context.encoder
    named_graph(generator)
    assert generator.context.encoder is encoder
    assert all(torch.equal(before[name], tensor) for name, tensor in generator.state_dict().items())
