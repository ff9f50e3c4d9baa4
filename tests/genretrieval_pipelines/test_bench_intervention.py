"""Words held out, struck, bound and asked for: on a tiny shop, with a server that is none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from genretrieval.bundle import GRAPH, load_bundle
from genretrieval.catalogue import reserved_paths
from genretrieval.edits import BoundKeyword, Edits
from genretrieval.errors import DataError
from genretrieval.export import GraphBackend
from genretrieval.export.onnx import NamedGraph
from genretrieval.keywords import normalise
from genretrieval.request import RetrieveRequest, RetrieveResponse
from genretrieval.retrieval import Backend, Retriever
from genretrieval_pipelines import run as run_module
from genretrieval_pipelines.bench_intervention import InterventionConfig, bench_intervention, hold_out, strike
from genretrieval_pipelines.recipe import Recipe
from genretrieval_pipelines.synth import ShopConfig, synthesize

RECIPE = Recipe.model_validate(
    {
        "embedding": [{"name": "hashing", "dim": 32}, {"name": "collaborative", "dim": 16}],
        "tokenizer": {"method": "keyword_aligned", "reserved_slots": 2},
        "generator": {
            "d_model": 32, "n_heads": 2, "d_ff": 64, "n_encoder_layers": 1, "n_decoder_layers": 1, "max_history": 10,
            "query_vocab_size": 300, "n_profile_buckets": 32, "dropout": 0.0,
        },
        "training": {"epochs": 3, "evaluate_every": 3, "validation_users": 10, "learning_rate": 0.01},
        "stages": [
            {"objective": "alignment", "self_routing": 0.3},
            {"objective": "next_item", "made_queries": 0.3, "self_routing": 0.3},
        ],
        "evaluation": {"beam_width": 20},
    }
)  # fmt: skip
ITEMS = pl.DataFrame(
    {
        "item_id": [f"i{row}" for row in range(40)],
        "title": [f"{('Lumo', 'Vanta')[row % 2]} Lamp {row}" if row < 8 else f"Plain Chair {row}" for row in range(40)],
        "brand": [("Lumo", "Vanta")[row % 2] if row < 8 else "Plain" for row in range(40)],
        "categories": [["Home", "Lamps" if row < 8 else "Chairs"] for row in range(40)],
    }
)
CONFIG = InterventionConfig(n_words=10, min_items=3, max_share=0.15)


def test_words_of_few_items_are_held_out_with_every_item_that_says_them() -> None:
    held_out = hold_out(ITEMS, CONFIG)
    assert held_out.words == ["lumo", "vanta"]
    assert [rows.tolist() for rows in held_out.rows] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    with pytest.raises(DataError, match="nothing to hold out"):
        hold_out(ITEMS, InterventionConfig(min_items=30, max_share=0.1))


def test_struck_words_are_in_no_text_and_no_query_and_all_items_stay(tmp_path: Path) -> None:
    source = tmp_path / "logs"
    source.mkdir()
    ITEMS.with_columns(pl.col("brand").cast(pl.Categorical)).write_parquet(source / "items.parquet")
    queries = ["a lumo lamp", "LUMO", None, "chair"]
    pl.DataFrame(
        {
            "user_id": ["u"] * 4,
            "item_id": ["i0"] * 4,
            "event": ["click"] * 4,
            "timestamp": [1, 2, 3, 4],
            "query": queries,
        }
    ).write_parquet(source / "interactions.parquet")
    pl.DataFrame({"query_id": ["1", "2"], "query": ["lumo", "Lumo chair"]}).write_parquet(source / "queries.parquet")
    strike(source, tmp_path / "struck", ["lumo"])
    assert pl.read_parquet(tmp_path / "struck" / "queries.parquet")["query"].to_list() == ["item", "chair"]
    items = pl.read_parquet(tmp_path / "struck" / "items.parquet")
    assert items["item_id"].to_list() == ITEMS["item_id"].to_list()
    assert items["title"][0] == "lamp 0"
    assert items["brand"].to_list()[:2] == [None, "vanta"]
    struck = pl.read_parquet(tmp_path / "struck" / "interactions.parquet")
    assert struck["query"].to_list() == ["a lamp", None, None, "chair"]


class InProcess:
    """A server that is none: the words of a query decide what is bound."""

    def __init__(self, retriever: Retriever) -> None:
        manifest = retriever.bundle.manifest
        paths = reserved_paths(manifest.codebook_sizes, manifest.reserved_slots)
        self.slots = [(int(path.argmax()), int(path.max())) for path in paths]
        self.retriever = retriever
        self.n_slots = len(self.slots)
        self.bound: dict[str, BoundKeyword] = {}
        self.most = 0

    def bind(self, words: Mapping[str, Sequence[str]]) -> None:
        item_ids = self.retriever.catalogue.item_ids
        self.most = max(self.most, len(words))
        self.bound = {
            word: BoundKeyword(word, word, *slot, np.sort(item_ids.rows_of(ids)))
            for (word, ids), slot in zip(words.items(), self.slots, strict=False)
        }

    def retrieve(self, requests: Sequence[RetrieveRequest]) -> list[RetrieveResponse]:
        edits = [
            Edits(bound=(self.bound[q],)) if (q := normalise(r.query or "")) in self.bound else Edits()
            for r in requests
        ]
        return self.retriever.retrieve(requests, edits)


def test_the_whole_bench_on_a_tiny_shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synthesize(tmp_path / "shop", ShopConfig(n_items=120, n_users=30, seed=3))
    graphs: dict[str, NamedGraph] = {}

    def keep(graph: NamedGraph, example: object, path: Path) -> None:
        path.write_bytes(str(len(graphs)).encode())
        graphs[str(len(graphs))] = graph

    monkeypatch.setattr(run_module, "export_graph", keep)

    def open_graph(path: Path) -> Backend:
        return GraphBackend(graphs[path.read_text()])

    servers: list[InProcess] = []

    @contextmanager
    def serve(bundle: Path) -> Iterator[InProcess]:
        servers.append(InProcess(Retriever(load_bundle(bundle), open_graph(bundle / GRAPH))))
        yield servers[-1]

    figures = bench_intervention(
        RECIPE,
        tmp_path / "shop",
        tmp_path / "work",
        open_backend=open_graph,
        serve_live=serve,
        console=Console(quiet=True),
        config=InterventionConfig(n_words=30, min_items=2, max_share=0.1, n_untouched=10, n_cases=20),
    )
    value = {name: figure.value for name, figure in figures.items()}
    assert value["intervention.words"] > servers[0].n_slots >= servers[0].most
    assert value["intervention.kae.bound.ihr10"] == value["intervention.control.bound.ihr10"] == 1.0
    assert value["intervention.kae.routed.ihr10"] > value["intervention.kae.unbound.ihr10"]
    assert value["intervention.untouched.equal"] == 1.0
    assert 0 < value["intervention.random.expected.ihr10"] < 1
    assert {f"intervention.{name}.closed.ihr10" for name in ("rq_kmeans", "rq_opq", "bm25")} <= set(value)


def test_a_recipe_without_slots_is_refused(tmp_path: Path) -> None:
    content = RECIPE.model_dump(exclude={"ablation"}) | {
        "tokenizer": {"method": "rq_kmeans"},
        "stages": [{"objective": "next_item"}],
    }
    with pytest.raises(DataError, match="keyword_aligned"):
        bench_intervention(
            Recipe.model_validate(content),
            tmp_path,
            tmp_path / "work",
            open_backend=lambda path: pytest.fail("nothing is trained"),
            serve_live=lambda path: pytest.fail("nothing is served"),
            console=Console(quiet=True),
        )
