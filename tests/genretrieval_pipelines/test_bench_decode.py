from __future__ import annotations

import numpy as np
import pytest
import torch

from genretrieval.catalogue import build_index
from genretrieval.export.onnx import GraphBackend
from genretrieval.export.t5 import t5_graph
from genretrieval.figures import Figure, lines
from genretrieval.semantic_ids import SemanticIds
from genretrieval_pipelines import bench_decode as bench

SIZES = (6, 5, 4)


def every_id() -> SemanticIds:
    codes = np.stack(np.meshgrid(*map(np.arange, SIZES), indexing="ij"), -1).reshape(-1, len(SIZES))
    return SemanticIds(codes.astype(np.int32), SIZES)


def test_prefix_table_lists_what_may_follow() -> None:
    index = build_index(SemanticIds(np.array([[0, 1], [0, 3], [2, 0]], np.int32), (3, 4)))
    assert bench.prefix_table(index, (2, 5)) == {(): [2, 4], (2,): [6, 8], (4,): [5]}


def test_hugging_face_and_our_graph_find_the_same() -> None:
    model = bench.random_t5(SIZES, n_layers=2, d_model=32)
    rng = np.random.default_rng(1)
    index = build_index(SemanticIds(every_id().codes[rng.random(120) < 0.5], SIZES))
    tokens = rng.integers(2, model.config.vocab_size, (3, 7))
    inputs = {"context_tokens": tokens, "beams": np.arange(8), **bench.open_catalogue(index, 3)}
    ours = bench.our_answer(GraphBackend(t5_graph(model, SIZES)).run(inputs), index)
    theirs = bench.HuggingFace(model, index).answer(tokens, 8)
    assert all(len(row) == 8 for row in ours.rows)
    bench.require_equal_answers(ours, theirs, "here")


def test_free_search_is_the_search_of_a_catalogue_that_holds_every_id() -> None:
    model = bench.random_t5(SIZES, n_layers=1, d_model=32)
    index = build_index(every_id())
    tokens = np.random.default_rng(2).integers(2, model.config.vocab_size, (2, 5))
    inputs = {"context_tokens": tokens, "beams": np.arange(9), **bench.open_catalogue(index, 2)}
    constrained = GraphBackend(t5_graph(model, SIZES)).run(inputs)
    free = GraphBackend(bench.free_t5_graph(model, SIZES)).run(inputs)
    np.testing.assert_allclose(free.scores, constrained.scores, atol=1e-5)


def answer(**scores: float) -> bench.Answer:
    return bench.Answer(({tuple(map(ord, name)): score for name, score in scores.items()},))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"a": -1.0, "b": -2.0}, {"a": -1.0, "c": -2.0}),  # c and b tie for the last beam
        ({"a": -1.0, "b": -2.0}, {"a": -1.00005, "b": -2.0}),
    ],
)
def test_answers_within_rounding_are_equal(ours: dict[str, float], theirs: dict[str, float]) -> None:
    bench.require_equal_answers(answer(**ours), answer(**theirs), "here")


@pytest.mark.parametrize(
    "theirs",
    [{"a": -1.0, "c": -1.9}, {"a": -1.0, "b": -2.1}],
)
def test_no_speed_for_unequal_answers(theirs: dict[str, float]) -> None:
    with pytest.raises(bench.DifferentAnswersError, match="differ at here, row 0"):
        bench.require_equal_answers(answer(a=-1.0, b=-2.0), answer(**theirs), "here")


def test_contenders_take_turns() -> None:
    calls: list[str] = []
    contenders = [bench.Contender(name, lambda name=name: calls.append(name)) for name in "ab"]
    times = bench.take_turns(contenders, rounds=2)
    assert calls == ["a", "b", *"aabb" * 2]
    assert set(times) == {"a", "b"}
    for figure in times.values():
        assert figure.unit == "ms"
        assert figure.spread is not None
        assert figure.spread[0] <= figure.value <= figure.spread[1]


def test_flops_by_hand() -> None:
    # One layer, one level, width 2, feed-forward 3, 5 context tokens, vocabulary 7, one query.
    encoder = 5 * (2 * 4 * 4 + 2 * 2 * 2 * 3 + 4 * 5 * 2)
    cross_keys_values = 2 * 5 * 2 * (2 * 2)
    decoder = 2 * 6 * 4 + 2 * 2 * 2 * 3 + 4 * 5 * 2
    head = 2 * 2 * 7
    flops = bench.t5_search_flops(5, 50, 7, n_levels=1, n_layers=1, d=2, d_ff=3)
    assert flops == encoder + cross_keys_values + decoder + head


def test_skew_widens_the_deeper_levels() -> None:
    uniform = bench.random_index(3000, (16, 16, 16, 16))
    skewed = bench.random_index(3000, (16, 16, 16, 16), skewed=True)
    assert uniform.n_items == skewed.n_items == 3000
    assert skewed.max_children[2] > uniform.max_children[2]


def test_gemm_rate_is_the_best_shape() -> None:
    times = {f"gemm.{m}x{k}x{n}": Figure(2 * m * k * n / 1e6, "ms") for m, k, n in bench.GEMM_SHAPES}
    assert bench.gemm_rate(times) == pytest.approx(1.0)
    m, k, n = bench.GEMM_SHAPES[1]
    times[f"gemm.{m}x{k}x{n}"] = Figure(m * k * n / 1e6, "ms")
    assert bench.gemm_rate(times) == pytest.approx(2.0)


def test_gemm_contenders_run_and_figures_can_be_printed() -> None:
    for contender in bench.gemm_contenders()[1:]:
        (product,) = contender.call()  # type: ignore[misc]
        assert np.isfinite(product).all()
    assert lines({"decode.latency_ratio.n1000000_over_n12000.b1.k50": Figure(1.0, "ratio")})


def test_random_models_are_the_sizes_that_are_named() -> None:
    model = bench.random_t5(bench.SIZES_4X256)
    assert model.config.vocab_size == 1026
    assert model.generation_config.eos_token_id is None
    generator = bench.random_generator((8, 8))
    assert isinstance(generator, torch.nn.Module)
    assert (generator.config.n_encoder_layers, generator.config.n_decoder_layers) == (2, 2)
