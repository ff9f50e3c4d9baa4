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
from genretrieval_serving.admin.snapshot import Items
from genretrieval_serving.admin.sql import SqlStore
from genretrieval_serving.admin.store import Call, Create
from genretrieval_serving.deployment import Arm, Deployment, Split
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


def arm_of(bundle: Any, backend: Any, uuid: str) -> Arm:
    return Arm(
        "loaded", Retriever(replace(bundle, manifest=bundle.manifest.model_copy(update={"uuid": uuid})), backend)
    )


@pytest.mark.parametrize("who", ["user_id", "query"])
def test_a_share_takes_in_more_as_it_grows_and_another_canary_takes_in_others(bundle, backend, who) -> None:
    primary, canary, other = (arm_of(bundle, backend, uuid) for uuid in ("p", "c", "o"))
    deployment = Deployment(primary)
    requests = [RetrieveRequest(**{who: f"{n}"}) for n in range(2000)]

    def taken(canary: Arm, share: float) -> set[int]:
        deployment.become(Split(primary, canary, share))
        return {n for n, request in enumerate(requests) if deployment.arm_for(request) == ("canary", canary)}

    tenth, half = taken(canary, 0.1), taken(canary, 0.5)
    # Five standard deviations.
    assert abs(len(tenth) - 200) < 5 * (2000 * 0.1 * 0.9) ** 0.5
    assert abs(len(half) - 1000) < 5 * (2000 * 0.25) ** 0.5
    assert tenth < half
    assert tenth == taken(canary, 0.1)
    assert len(taken(other, 0.1) & tenth) < 50
    assert (taken(canary, 0.0), taken(canary, 1.0)) == (set(), set(range(2000)))
    assert [arm.name for arm in deployment.arms] == ["primary", "canary"]
    deployment.become(Split(canary))
    assert (canary.name, deployment.arms) == ("primary", [canary])


def test_metrics_tell_arms_apart_while_one_takes_over(bundle, backend) -> None:
    primary, canary = (arm_of(bundle, backend, uuid) for uuid in "pc")
    deployment, metrics = Deployment(primary), Metrics()
    deployment.become(Split(primary, canary, 1.0))
    metrics.watch_arms(lambda: deployment.split.named)
    canary.name = "primary"  # in the middle of `become`
    assert deployment.arm_for(REQUEST) == ("canary", canary)
    found = metrics.text().decode()
    assert [found.count(f'catalogue_items{{arm="{name}"}}') for name in ("primary", "canary")] == [1, 1]


def test_a_state_of_the_catalogue_that_cannot_be_shown_leaves_the_one_before(
    bundle, backend, store, monkeypatch
) -> None:
    replica = Replica(store, Metrics())
    arm = Arm("primary", Retriever(bundle, backend), replica)
    shown, views = arm.shown, replica._views

    def on(*_: Any) -> Retriever:
        raise MemoryError

    monkeypatch.setattr(Retriever, "on", on)
    with pytest.raises(MemoryError):
        arm.show(shown.retriever.catalogue)
    assert (arm.shown, replica._views) == (shown, views)


def test_an_arm_that_waits_for_text_keeps_no_others_from_being_followed(bundle, backend, store, monkeypatch) -> None:
    replica = Replica(store, Metrics())
    followed_by: list[int] = []
    monkeypatch.setattr(Items, "prepare", lambda _: followed_by.append(len(replica._views)))
    Arm("loaded", Retriever(bundle, backend), replica, prepare_first=True)
    assert (followed_by, len(replica._views)) == ([0], 1)


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
