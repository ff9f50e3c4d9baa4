"""A bundle in int8 is written only where it finds what it found."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from numpy.typing import NDArray
from rich.console import Console

from genretrieval.bundle import CATALOGUE, CONFIG, GRAPH, MODEL_CARD, Manifest, load_bundle, write_bundle
from genretrieval.errors import BundleError
from genretrieval.retrieval import Leaves
from genretrieval_pipelines import int8
from genretrieval_pipelines.bench_int8 import bench_int8
from genretrieval_pipelines.recipe import Recipe
from genretrieval_pipelines.synth import ShopConfig, synthesize
from genretrieval_serving.backend import OnnxBackend

SIZES = (12, 12, 2)
N_ITEMS = 120


@dataclass
class Ranking:
    """Orders leaves by chance, of a history always alike; what has no seed finds nothing."""

    seed: int

    def run(self, inputs: dict[str, NDArray[Any]]) -> Leaves:
        n, beams, n_leaves = len(inputs["mask_row"]), len(inputs["beams"]), inputs["token_2"].shape[0]
        leaves = np.zeros((n, beams), np.int64)
        for row, codes in enumerate(inputs["history_codes"].reshape(n, -1)):
            leaves[row] = np.random.default_rng([self.seed, int(codes.sum())]).permutation(n_leaves)[:beams]
        scores = np.tile(-np.arange(beams, dtype=np.float32), (n, 1)) - (0 if self.seed else 2e9)
        return Leaves(leaves, scores, np.repeat(scores[..., None], 3, -1))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    synthesize(folder / "shop", ShopConfig(n_items=N_ITEMS, n_users=60, seed=3))
    items = pl.read_parquet(folder / "shop" / "items.parquet")["item_id"]
    rows = np.arange(N_ITEMS)
    codes = np.stack([rows % 12, rows // 12, np.zeros(N_ITEMS, int)], 1)
    recipe = Recipe.model_validate({"embedding": [{"name": "hashing"}], "evaluation": {"beam_width": 20}})
    manifest = Manifest(
        genretrieval_version="0.1.0",
        n_items=N_ITEMS,
        codebook_sizes=SIZES,
        opset=18,
        minimum_onnxruntime="1.20",
        graph_inputs=("history_codes", "beams", "mask_row", "token_2"),
        max_history=10,
        max_query_tokens=4,
        reads_queries=False,
        beam_width=20,
        exclude_seen=True,
    )
    with write_bundle(folder / "bundle", manifest) as path:
        pl.DataFrame(
            {"item_id": items, "semantic_id": pl.Series(codes.tolist(), dtype=pl.List(pl.Int32)), "popularity": rows}
        ).write_parquet(path / CATALOGUE)
        (path / GRAPH).write_bytes(b"\x01")
        (path / MODEL_CARD).write_text("# A shop\n")
        record = {"recipe": recipe.dump(), "data": str(folder / "shop"), "work": str(folder / "work")}
        (path / CONFIG).write_text(yaml.safe_dump(record))
    return folder / "bundle"


def export(bundle: Path, output: Path, monkeypatch: pytest.MonkeyPatch, seed: int, at_least: float) -> dict[str, Any]:
    def write(_: Path, target: Path) -> int:
        return target.write_bytes(bytes([seed])) + 6

    monkeypatch.setattr(int8, "quantise", write)
    monkeypatch.setattr(int8, "_ROUNDS", 1)
    return int8.export_int8(
        bundle,
        output,
        data=None,
        min_recall_ratio=at_least,
        open_backend=lambda path: Ranking(path.read_bytes()[0]),
        console=Console(quiet=True),
    )


def test_what_finds_the_same_is_written(bundle, tmp_path, monkeypatch) -> None:
    figures = export(bundle, tmp_path / "int8", monkeypatch, seed=1, at_least=1.0)
    assert figures["int8.recall10_ratio"].value == figures["int8.kept10"].value == 1.0
    assert figures["int8.speedup.b8"].value > 0
    before, after = load_bundle(bundle).manifest, load_bundle(tmp_path / "int8").manifest
    assert (after.precision, after.parent_uuid) == ("int8", before.uuid)
    assert after.uuid != before.uuid
    assert after.metrics["int8.recall10_ratio"] == 1.0
    assert "7 matrix products in int8" in (tmp_path / "int8" / MODEL_CARD).read_text()
    with pytest.raises(BundleError, match="is in int8 already"):
        export(tmp_path / "int8", tmp_path / "again", monkeypatch, seed=1, at_least=0.0)


def test_what_finds_less_is_not_written(bundle, tmp_path, monkeypatch) -> None:
    worse = export(bundle, tmp_path / "int8", monkeypatch, seed=0, at_least=0.0)
    assert worse["int8.recall10_ratio"].value == worse["int8.kept10"].value == 0.0
    with pytest.raises(BundleError, match=r"was not written: Recall@10 falls from .* at least 0.99"):
        export(bundle, tmp_path / "refused", monkeypatch, seed=0, at_least=0.99)
    assert not (tmp_path / "refused").exists()


def test_a_bundle_that_no_run_wrote_cannot_be_measured(bundle, tmp_path, monkeypatch) -> None:
    opened = load_bundle(bundle)
    with write_bundle(tmp_path / "bare", opened.manifest) as path:
        for name in (CATALOGUE, GRAPH):
            (path / name).write_bytes((bundle / name).read_bytes())
    with pytest.raises(BundleError, match="no run wrote it"):
        export(tmp_path / "bare", tmp_path / "int8", monkeypatch, seed=1, at_least=0.0)


@pytest.mark.slow
def test_both_graphs_of_a_width_are_timed() -> None:
    figures = bench_int8([16], 1, partial(OnnxBackend, threads=1), Console(quiet=True))
    for batch in (1, 8):
        fp32, int8 = (figures[f"int8.ms.{name}.d16.b{batch}"].value for name in ("fp32", "int8"))
        assert figures[f"int8.speedup.d16.b{batch}"].value == pytest.approx(fp32 / int8)
