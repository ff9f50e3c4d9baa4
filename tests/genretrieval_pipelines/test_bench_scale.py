from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from genretrieval.bundle import CATALOGUE, KEYWORDS, load_bundle
from genretrieval.export.onnx import GraphBackend, named_graph
from genretrieval.model import Generator
from genretrieval.request import RetrieveRequest
from genretrieval.retrieval import Retriever
from genretrieval_pipelines import bench_scale, random_bundle
from genretrieval_pipelines.random_bundle import SHAPES, RandomBundle
from genretrieval_pipelines.random_bundle import random_bundle as make_bundle


@pytest.fixture
def unexported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are run with torch instead: an export takes longer than all else."""
    monkeypatch.setattr(RandomBundle, "export", lambda *_: None)


def test_every_figure_is_there(unexported: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_scale, "_USERS", 8)
    config = make_bundle(100, "4x256", d_model=16).config
    past = make_bundle(100, "4x256", d_model=16, max_history=3, max_past=5).config
    monkeypatch.setattr(bench_scale, "HISTORY_LENGTHS", (3, 8))
    backends = iter([GraphBackend(named_graph(Generator(of_graph).eval())) for of_graph in (config, past)])
    figures = bench_scale.bench_scale([200, 400], 2, lambda _: next(backends), Console(quiet=True))
    row = figures["scale.filter_bytes_per_item.4x256.n400"].value
    assert row < 4.2
    assert figures["scale.index_bytes_per_item.4x256.n400"].value > row
    for name in (
        "resident_bytes_per_item.4x256.n200", "index_bytes_per_item.keyword.n400", "index_bytes_per_item.rq_opq.n400",
        "rebuild_s.n400", "latency_ratio.n400_over_n200", "exclusions_ratio.100_found", "exclusions_ratio.100_drawn",
        "exclusions_ratio.100_of_history", "new_filter_ms.n400", "filters_ratio.eight_over_one",
        "filters_ratio.selects_10_over_none", "history_cost.8_over_3",
    ):  # fmt: skip
        assert f"scale.{name}" in figures, name


def test_each_turn_times_requests_that_were_not_just_answered() -> None:
    class Answering:
        def __init__(self) -> None:
            self.asked: list[str | None] = []

        def retrieve(self, requests: list[RetrieveRequest]) -> None:
            self.asked += [request.query for request in requests]

    one, ticks = Answering(), count()
    contender: Any = bench_scale.Contender(one, [[RetrieveRequest(query=word)] for word in "abc"])  # type: ignore[arg-type]
    times = bench_scale.take_turns({"one": contender}, 2, lambda: float(next(ticks)))
    assert "".join(map(str, one.asked)) == "abcabc"
    assert times["one"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_random_bundle_can_be_opened(tmp_path: Path, unexported: None, shape: random_bundle.Shape) -> None:
    def without_graph(self: RandomBundle, path: Path, seed: int = 0) -> None:
        path.write_bytes(b"")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RandomBundle, "export", without_graph)
        random_bundle.write_random_bundle(tmp_path / "bundle", 300, shape, reserved_slots=5)
    bundle = load_bundle(tmp_path / "bundle")
    assert ((tmp_path / "bundle" / KEYWORDS).exists(), (tmp_path / "bundle" / CATALOGUE).exists()) == (
        shape == "keyword", True,
    )  # fmt: skip
    retriever = Retriever(bundle, GraphBackend(named_graph(Generator(make_bundle(300, shape).config).eval())))
    assert retriever.catalogue.index.n_items == 300
    assert len(retriever.catalogue.index.keyword_leaves) == (15 if shape == "keyword" else 0)
    same = make_bundle(300, shape, reserved_slots=5)
    assert (retriever.catalogue.ids.codes == np.asarray(same.table["semantic_id"].to_list())).all()
    assert same.item_vectors() is None
