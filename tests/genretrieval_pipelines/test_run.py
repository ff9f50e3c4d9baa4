"""Whole runs on tiny shops. The graph runs in torch here: its export has tests of its own and takes longer."""

from __future__ import annotations

import io
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from genretrieval.bundle import MANIFEST, load_bundle
from genretrieval.errors import BundleError, BundleIncompleteError, DataError, InvalidInputError, RecipeError
from genretrieval.export import GraphBackend
from genretrieval.export.onnx import NamedGraph
from genretrieval.figures import Figure
from genretrieval.histories import LeaveOneOut
from genretrieval.request import Filters, HistoryEvent, RetrieveRequest
from genretrieval.retrieval import Retriever
from genretrieval.semantic_ids import SemanticIds
from genretrieval.training.data import HistoryDataset
from genretrieval_pipelines import run as run_module
from genretrieval_pipelines import train_generator
from genretrieval_pipelines.agreement import Agreement
from genretrieval_pipelines.draft import request_features
from genretrieval_pipelines.recipe import AblationSection, Recipe
from genretrieval_pipelines.run import evaluate_bundle, run
from genretrieval_pipelines.shop import open_shop
from genretrieval_pipelines.stages import training_set
from genretrieval_pipelines.synth import ShopConfig, synthesize

QUIET = Console(quiet=True)
RECIPE = Recipe.model_validate(
    {
        "embedding": [{"name": "hashing", "dim": 32}, {"name": "collaborative", "dim": 16}],
        "tokenizer": {"method": "rq_kmeans", "codebook_sizes": [8, 8, 8]},
        "generator": {
            "d_model": 32,
            "n_heads": 2,
            "d_ff": 64,
            "n_encoder_layers": 1,
            "n_decoder_layers": 1,
            "max_history": 10,
            "query_vocab_size": 300,
            "n_profile_buckets": 32,
            "max_past": 12,
            "n_past_tokens": 2,
            "n_experts": 4,
        },
        "training": {"epochs": 2, "evaluate_every": 1, "validation_users": 20},
        "stages": [
            {"objective": "alignment", "epochs": 1},
            {"objective": "cooccurrence", "epochs": 1},
            {"objective": "next_item"},
        ],
        "evaluation": {"beam_width": 20, "sasrec": {"dim": 16, "max_epochs": 1}},
    }
)


@pytest.fixture
def torch_graph(monkeypatch: pytest.MonkeyPatch) -> dict[str, NamedGraph]:
    """Keep the graph instead of exporting it."""
    kept: dict[str, NamedGraph] = {}

    def keep(graph: NamedGraph, example: object, path: Path) -> None:
        kept["graph"] = graph
        path.write_bytes(b"torch")

    monkeypatch.setattr(run_module, "export_graph", keep)
    return kept


@pytest.fixture(scope="module")
def demo_shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shop")
    synthesize(folder, ShopConfig(n_items=120, n_users=30, seed=3))
    return folder


def run_tiny(
    data: Path, folder: Path, kept: dict[str, NamedGraph], console: Console = QUIET, recipe: Recipe = RECIPE
) -> dict[str, Figure]:
    return run(
        recipe,
        data,
        folder / "bundle",
        folder / "work",
        open_backend=lambda _: GraphBackend(kept["graph"]),
        console=console,
    )


# One stage of a small model: for what happens around the training.
SMALL = Recipe.model_validate(
    {
        "embedding": [{"name": "hashing", "dim": 16}],
        "tokenizer": {"method": "rq_kmeans", "codebook_sizes": [8, 8], "iterations": 5},
        "generator": {"d_model": 16, "n_heads": 2, "d_ff": 16, "n_encoder_layers": 1, "n_decoder_layers": 1},
        "training": {"epochs": 1, "targets_per_batch": 128, "validation_users": 20},
        "stages": [{"objective": "next_item"}],
        "evaluation": {"beam_width": 10, "sasrec": {"dim": 8, "n_layers": 1, "n_heads": 1, "max_epochs": 1}},
    }
)
N_SMALL = 40


def write_small(folder: Path, *, items: pl.DataFrame | None = None, **columns: list[str | None]) -> Path:
    """A shop of 30 visitors with six clicks each, the `columns` of whose logs may be others."""
    folder.mkdir(exist_ok=True)
    rows = np.arange(30 * 6)
    clicked = np.random.default_rng(0).integers(0, N_SMALL - 1, len(rows))
    log = {
        "user_id": [f"u{row // 6}" for row in rows],
        "item_id": [f"i{item}" for item in clicked],
        "event": ["click"] * len(rows),
        "timestamp": (1_700_000_000 + 60 * rows).tolist(),
    }
    pl.DataFrame(log | columns).write_parquet(folder / "interactions.parquet")
    (small_items(N_SMALL) if items is None else items).write_parquet(folder / "items.parquet")
    return folder


def small_items(n: int) -> pl.DataFrame:
    return pl.DataFrame({"item_id": [f"i{row}" for row in range(n)], "title": [f"red shoe {row}" for row in range(n)]})


def test_logs_become_a_bundle_with_figures_beside_baselines(
    demo_shop: Path, tmp_path: Path, torch_graph: dict[str, NamedGraph]
) -> None:
    figures = run_tiny(demo_shop, tmp_path, torch_graph)
    rows = ("quality", "quality.blend_markov", "oracle", "baseline.popularity", "baseline.markov", "baseline.sasrec")
    searches = ("baseline.bm25", "baseline.dense", "baseline.popularity_per_query")
    for row in (*rows, *searches):
        assert 0 <= figures[f"{row}.recall10"].value <= 1
    assert figures["quality.invalid_rate"].value == 0
    assert figures["oracle.recall10"].value > figures["baseline.popularity.recall10"].value

    bundle = load_bundle(tmp_path / "bundle")
    assert bundle.manifest.reads_queries
    assert bundle.manifest.n_items == 120
    assert {"generator.safetensors", "codebooks.safetensors", "config.yaml", "metrics.json", "README.md"} <= set(
        bundle.manifest.files
    )
    retriever = Retriever(bundle, GraphBackend(torch_graph["graph"]))
    items = pl.read_parquet(demo_shop / "items.parquet")
    brand = items["brand"][0]
    request = RetrieveRequest(
        query=items["title"][0],
        history=[HistoryEvent(item_id=items["item_id"][3], event="click"), HistoryEvent(item_id="gone")],
        filters=Filters(attributes={"brand": [brand]}),
        exclude_item_ids=[items["item_id"][0]],
        top_k=5,
    )
    [response] = retriever.retrieve([request])
    brands = dict(items.select("item_id", "brand").iter_rows())
    assert {brands[item.item_id] for item in response.items} <= {brand}
    assert items["item_id"][0] not in {item.item_id for item in response.items}
    assert response.missing_ids == ["gone"]


def test_what_each_stage_learns_from(demo_shop: Path, tmp_path: Path) -> None:
    shop = open_shop(demo_shop, tmp_path)
    held_out = pl.DataFrame({"query": [shop.items["title"][0]], "item_row": [0], "split": ["test"]})
    pairs = held_out.with_columns(pl.col("item_row").cast(pl.Int32))
    shop = replace(shop, pairs=pairs)
    ids = SemanticIds(np.arange(120, dtype=np.int32)[:, None], (120,))
    features = request_features(RECIPE, shop)
    sets = {
        name: training_set(RECIPE, shop, ids, features, name) for name in ("alignment", "cooccurrence", "next_item")
    }

    def taught(dataset: HistoryDataset) -> set[tuple[str, int]]:
        h, w = dataset.histories, dataset.windows
        assert (w.lengths == 1).all()
        assert (h.events[w.starts] == -1).all()
        return {(h.queries[h.query_rows[p]], int(h.items[p])) for p in w.starts.tolist()}

    title = shop.items["title"].to_list()
    assert {(title[row], row) for row in range(1, 120) if title[row] != title[0]} <= taught(sets["alignment"])
    # What a made query is held out for is not learnt either.
    assert all(query != title[0] for query, _ in taught(sets["alignment"]))
    trained = LeaveOneOut(shop.histories).trained()
    rows = shop.histories.query_rows
    asked = np.flatnonzero(trained & (rows != -1))
    expected = {(shop.histories.queries[rows[p]], int(shop.histories.items[p])) for p in asked.tolist()}
    assert taught(sets["cooccurrence"]) == expected
    learnt = sum(
        int(entry["learn"].sum()) for entry in map(sets["next_item"].__getitem__, range(len(sets["next_item"])))
    )
    assert learnt == trained.sum()


def test_a_shop_without_queries_leaves_the_first_stages_out(demo_shop: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(demo_shop, data)
    interactions = pl.read_parquet(data / "interactions.parquet").drop("query", "scenario")
    interactions.write_parquet(data / "interactions.parquet")
    shop = open_shop(data, tmp_path / "work")
    ids = SemanticIds(np.arange(120, dtype=np.int32)[:, None], (120,))
    features = request_features(RECIPE, shop)
    assert (features.query_tokenizer, features.n_scenarios) == ("", 0)
    assert not len(training_set(RECIPE, shop, ids, features, "alignment"))
    assert not len(training_set(RECIPE, shop, ids, features, "cooccurrence"))
    assert len(training_set(RECIPE, shop, ids, features, "next_item"))


def test_a_second_run_repeats_the_figures_and_trains_nothing(
    demo_shop: Path, tmp_path: Path, torch_graph: dict[str, NamedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_tiny(demo_shop, tmp_path, torch_graph)
    monkeypatch.setattr(train_generator, "train", lambda *_, **__: pytest.fail("trained again"))
    assert run_tiny(demo_shop, tmp_path, torch_graph) == first


def test_a_stage_that_another_run_trains_is_waited_for(tmp_path: Path) -> None:
    told, entered = io.StringIO(), threading.Event()
    folder = tmp_path / "next_item-0"

    def second() -> None:
        with train_generator._alone(folder, Console(file=told)):
            entered.set()

    with train_generator._alone(folder, QUIET):
        thread = threading.Thread(target=second)
        thread.start()
        until = time.monotonic() + 30
        while not told.getvalue():
            assert time.monotonic() < until, "nothing is said of the wait"
            time.sleep(0.01)
        assert not entered.is_set()
    thread.join(10)
    assert entered.is_set()
    assert "another run is training next_item-0" in told.getvalue()


def test_an_ablation_is_no_work_for_several_processes_of_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "PartialState", lambda **_: SimpleNamespace(num_processes=2))
    recipe = RECIPE.model_copy(update={"ablation": AblationSection(seeds=[0, 1], rows={})})
    with pytest.raises(RecipeError, match=r"ablation\.jobs"):
        run(recipe, tmp_path / "logs", tmp_path / "bundle", tmp_path / "work", open_backend=GraphBackend, console=QUIET)  # type: ignore[arg-type]
    assert not (tmp_path / "work").exists()


def test_evaluation_of_a_bundle_agrees_with_its_run_and_with_a_second_retriever(
    demo_shop: Path, tmp_path: Path, torch_graph: dict[str, NamedGraph]
) -> None:
    figures = run_tiny(demo_shop, tmp_path, torch_graph)
    bundle = load_bundle(tmp_path / "bundle")
    offline = Retriever(bundle, GraphBackend(torch_graph["graph"])).retrieve
    live = Retriever(bundle, GraphBackend(torch_graph["graph"])).retrieve
    # The other side answers one request at a time, as a server may.
    agreement = Agreement(offline, lambda requests: [live([request])[0] for request in requests])
    report = evaluate_bundle(bundle, None, "validation", agreement, QUIET)
    assert report["rows"][0]["metrics"]["recall10"] == figures["quality.recall10"]
    counted = agreement.figures()
    assert counted["agreement.disagreeing"].value == 0
    assert counted["agreement.requests"].value > 0


def test_a_run_killed_while_it_writes_the_bundle_leaves_none(
    demo_shop: Path, tmp_path: Path, torch_graph: dict[str, NamedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "_model_card", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_tiny(demo_shop, tmp_path, torch_graph)
    with pytest.raises(BundleIncompleteError):
        load_bundle(tmp_path / "bundle")
    assert not list(tmp_path.glob(f"**/{MANIFEST}"))


@pytest.mark.parametrize("with_queries", [True, False], ids=["with queries", "without"])
def test_a_shop_too_young_to_be_measured_by_its_histories_is_served(
    demo_shop: Path, tmp_path: Path, torch_graph: dict[str, NamedGraph], with_queries: bool
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(demo_shop / "items.parquet", data)
    interactions = pl.read_parquet(demo_shop / "interactions.parquet").filter(pl.col("event") != "exposure")
    interactions = interactions.group_by("user_id", maintain_order=True).head(2)
    if not with_queries:
        interactions = interactions.drop("query")
    elif interactions["query"].null_count() == len(interactions):
        interactions = interactions.with_columns(pl.lit("lamp").alias("query"))
    interactions.write_parquet(data / "interactions.parquet")
    figures = run_tiny(data, tmp_path, torch_graph)
    assert ("quality.recall10" in figures) == (not with_queries)
    bundle = load_bundle(tmp_path / "bundle")
    assert ("Not measured" in (bundle.path / "README.md").read_text("utf-8")) == with_queries


@pytest.mark.parametrize("with_queries", [True, False], ids=["items and queries", "items alone"])
def test_a_shop_without_interactions_is_served_by_search(
    demo_shop: Path, tmp_path: Path, torch_graph: dict[str, NamedGraph], with_queries: bool
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(demo_shop / "items.parquet", data)
    items = pl.read_parquet(data / "items.parquet")
    if with_queries:
        words = items["title"].str.split(" ").list.first()
        queries = words.unique(maintain_order=True)
        ids = {query: f"q{i}" for i, query in enumerate(queries)}
        pl.DataFrame({"query_id": list(ids.values()), "query": list(ids)}).write_parquet(data / "queries.parquet")
        pl.DataFrame({"query_id": [ids[word] for word in words], "item_id": items["item_id"]}).write_parquet(
            data / "qrels.parquet"
        )
    figures = run_tiny(data, tmp_path, torch_graph)
    assert "baseline.bm25.recall10" in figures
    assert "baseline.markov.recall10" not in figures
    retriever = Retriever(load_bundle(tmp_path / "bundle"), GraphBackend(torch_graph["graph"]))
    [found, nobody] = retriever.retrieve([RetrieveRequest(query=items["title"][0]), RetrieveRequest()])
    assert len(found.items) == len(nobody.items) == 10
    assert np.isfinite([item.score for item in found.items]).all()


def test_what_was_set_aside_is_told_and_on_the_model_card(tmp_path: Path, torch_graph: dict[str, NamedGraph]) -> None:
    items = pl.concat([small_items(N_SMALL), small_items(3)])
    users = [None if row % 9 == 0 else f"u{row // 6}" for row in range(180)]
    data, told = write_small(tmp_path / "shop", items=items, user_id=users), io.StringIO()
    run_tiny(data, tmp_path, torch_graph, Console(file=told, width=80), SMALL)
    assert "interactions: 160 rows, 20 in quarantine" in told.getvalue()
    assert "20 rows quarantined, first 0, 9, 18, 27, 36)" in told.getvalue()
    assert f"rows in quarantine are in {tmp_path / 'work' / 'logs' / 'quarantine'}" in told.getvalue()
    card = (tmp_path / "bundle" / "README.md").read_text("utf-8")
    assert "| items | 43 | 40 | 3 |\n| interactions | 180 | 160 | 20 |" in card


def test_a_bundle_is_measured_by_other_logs_of_its_items_and_no_others(
    tmp_path: Path, torch_graph: dict[str, NamedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    figures = run_tiny(write_small(Path("shop")), Path(), torch_graph, recipe=SMALL)
    bundle = load_bundle(tmp_path / "bundle")
    retriever = Retriever(bundle, GraphBackend(torch_graph["graph"]))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    # Another shop under the very name.
    write_small(elsewhere / "shop", items=small_items(N_SMALL - 1))
    monkeypatch.chdir(elsewhere)

    def measured(data: Path | None) -> tuple[dict[str, Figure], str]:
        told = io.StringIO()
        console = Console(file=told, width=80)
        report = evaluate_bundle(bundle, data, "validation", retriever.retrieve, console)
        return report["rows"][0]["metrics"], told.getvalue()

    at_home = {name: figures[f"quality.{name}"] for name in ("recall10", "ndcg10", "sid_recall10")}
    own, told = measured(None)
    assert {name: own[name] for name in at_home} == at_home
    assert "items: 40 rows" in told
    assert "not those" not in told

    reverse = write_small(tmp_path / "reverse", items=small_items(N_SMALL)[::-1])
    other, told = measured(reverse)
    assert {name: other[name] for name in at_home} == at_home
    assert f"the logs in {reverse} are not those that {bundle.path} was trained on" in told

    with pytest.raises(DataError, match=r"catalogues: 1 items of the bundle are not in the logs \(first i39\)\."):
        measured(Path("shop"))
    more = write_small(tmp_path / "more", items=small_items(N_SMALL + 5)[1:])
    with pytest.raises(DataError, match=r"5 items of the logs are not in .*i40, i41, i42\) and 1 items .*first i0\)"):
        measured(more)


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    data, photos = write_small(tmp_path / "shop"), tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").write_bytes(b"cat")
    never = SimpleNamespace(data=data, open_backend=lambda _: pytest.fail("it went on"), console=QUIET)
    with pytest.raises(BundleError, match="is not a bundle"):
        run(SMALL, output=photos, work=tmp_path / "work", **vars(never))
    for output in (tmp_path / "bundle", tmp_path / "bundle" / "work"):
        with pytest.raises(InvalidInputError, match=r"work lies in .*, which is replaced whole"):
            run(SMALL, output=output, work=tmp_path / "bundle" / "work", **vars(never))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "shop"]


@pytest.mark.parametrize("name", ["popularity", "semantic_id"])
def test_an_attribute_with_a_name_of_the_catalogue_is_refused(tmp_path: Path, name: str) -> None:
    data = write_small(tmp_path / "shop", items=small_items(N_SMALL).with_columns(pl.lit(1).alias(name)))
    with pytest.raises(DataError, match=rf"items have the attribute {name}, .* Give it another name"):
        open_shop(data, tmp_path / "work")
