"""The verbs `items`, typed against a running server."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import polars as pl
import pytest
from typer.testing import CliRunner

from genretrieval.cli import app
from genretrieval.errors import InvalidInputError, NotFoundError, RequestError
from genretrieval_serving.admin.sql import SqlStore


def run(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def items(keyword_bundle: Any, serving: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Types a verb; what it printed."""
    url, changes = f"sqlite:///{tmp_path_factory.mktemp('items')}/admin.db", tmp_path_factory.mktemp("changes")
    with (
        closing(SqlStore.open(url)) as store,
        serving(keyword_bundle, store=store, catalogue_changes=changes) as running,
    ):

        def typed(*words: str) -> Any:
            printed = run("items", *words, "--endpoint", running.admin)
            return json.loads(printed[printed.index("{\n") :])  # the server's log goes there, too

        yield typed


def test_stock_removal_and_return(items) -> None:
    assert items("stock", "item-1", "item-2", "--out")["upserted"] == 2
    assert items("get", "item-1")["attributes"]["in_stock"] is False
    assert items("stock", "item-1", "--in")["catalogue_revision"] == 2
    assert items("get", "item-1")["attributes"]["in_stock"] is True
    assert items("remove", "item-1", "--validate-only")["file"] == ""
    assert items("remove", "item-1", "nobody")["missing_ids"] == ["nobody"]
    assert items("get", "item-1")["removed"]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_items_of_a_file(items, tmp_path, suffix) -> None:
    file = tmp_path / f"new.{suffix}"
    ids = pl.Series([[3, 3, 3], None], dtype=pl.List(pl.Int32()))
    table = pl.DataFrame({"item_id": [f"new-{suffix}", "item-3"], "semantic_id": ids, "price": [None, 5.5]})
    table.write_parquet(file) if suffix == "parquet" else table.write_ndjson(file)
    assert items("upsert", str(file))["upserted"] == 2
    assert items("get", f"new-{suffix}")["semantic_id"] == [3, 3, 3]
    assert items("get", "item-3")["attributes"]["price"] == 5.5


def test_what_is_refused(items, tmp_path) -> None:
    (tmp_path / "strange.jsonl").write_text('{"item_id": "item-1"}\n\n[1]\n')
    with pytest.raises(InvalidInputError, match=r"strange\.jsonl is not one JSON object a line"):
        items("upsert", str(tmp_path / "strange.jsonl"))
    with pytest.raises(InvalidInputError, match=r"none\.jsonl cannot be read"):
        items("upsert", str(tmp_path / "none.jsonl"))
    (tmp_path / "new.jsonl").write_text('{"item_id": "x"}')
    with pytest.raises(RequestError, match="has no semantic_id"):
        items("upsert", str(tmp_path / "new.jsonl"))
    with pytest.raises(NotFoundError):
        items("get", "x")


def test_compaction(tmp_path, keyword_bundle_path) -> None:
    command = ("items", "compact", str(tmp_path), "--bundle", str(keyword_bundle_path))
    then = time.time() - 2 * 86_400
    for minute in (1, 2):
        file = tmp_path / f"20260101T00{minute:02}00-stock.parquet"
        pl.DataFrame({"item_id": ["item-1"], "in_stock": [minute == 2]}).write_parquet(file)
        os.utime(file, (then, then))
    assert run(*command) == f"2 files are now {file.name}\n"
    assert [left.name for left in tmp_path.iterdir()] == [file.name]
    assert run(*command) == "fewer than two files are older than a day\n"
    with pytest.raises(InvalidInputError, match="is no folder"):
        run("items", "compact", str(tmp_path / "none"), "--bundle", str(keyword_bundle_path))
