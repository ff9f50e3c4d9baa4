"""Arms: what a request is answered by while catalogue and admin state change under it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import polars as pl
import pytest

from genretrieval.request import RetrieveRequest
from genretrieval.retrieval import Retriever
from genretrieval_serving.admin.replica import Replica
from genretrieval_serving.admin.resources import Kind, RuleFields
from genretrieval_serving.admin.sql import SqlStore
from genretrieval_serving.admin.store import Call, Create
from genretrieval_serving.deployment import Arm
from genretrieval_serving.observability import Metrics

ACME = {"kind": "block", "items": {"text": "acme"}}
REQUEST = RetrieveRequest(query="shoes")


@pytest.fixture
def store(tmp_path: Any) -> Any:
    store = SqlStore.open(f"sqlite:///{tmp_path}/admin.db")
    yield store
    store.close()


def block(store: SqlStore, id_: str, **effect: Any) -> None:
    store.apply(Call("test"), [Create(Kind.RULES, id_, RuleFields(effect={"kind": "block", "items": effect}))])


def test_model_and_admin_state_are_of_one_state_of_the_catalogue(bundle, backend, store) -> None:
    replica = Replica(store, Metrics())
    block(store, "acme", text="acme")
    block(store, "first", item_ids=["item-0"])
    replica.refresh()
    arm = Arm("primary", Retriever(bundle, backend), replica)
    before = arm.answering(REQUEST)
    assert before.edits.blocked.tolist() == [0, *range(3, 24, 3)]
    brand = pl.when(pl.col("item_id") == "item-1").then(pl.lit("Acme")).otherwise(None).alias("brand")
    catalogue = replace(before.retriever.catalogue, table=before.retriever.catalogue.table.with_columns(brand))
    arm.show(catalogue)
    after = arm.answering(REQUEST)
    assert after.retriever.catalogue is catalogue
    assert after.edits.blocked.tolist() == [0, 1]
    assert before.retriever.catalogue is not catalogue
    block(store, "second", item_ids=["item-2"])
    replica.refresh()
    assert arm.answering(REQUEST).edits.blocked.tolist() == [0, 1, 2]
    assert len(replica._views) == 1
    arm.close()
    arm.show(before.retriever.catalogue)
    assert arm.retriever is after.retriever
    assert replica._views == ()
