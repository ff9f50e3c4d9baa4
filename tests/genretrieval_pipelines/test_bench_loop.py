"""Visitors of a made shop in front of pages that are not the shop's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from genretrieval.errors import DataError
from genretrieval.request import RetrievedItem, RetrieveRequest, RetrieveResponse
from genretrieval.schemas import EXPOSURE
from genretrieval_pipelines.bench_loop import LoopConfig, _Loop
from genretrieval_pipelines.synth import Oracle, ShopConfig, synthesize
from genretrieval_pipelines.synth.propensity import NOTHING, Truth
from genretrieval_pipelines.synth.visitors import Visitors

CONFIG = LoopConfig(ShopConfig(n_items=80, n_users=12, days=60, median_history=6.0, mean_history=9.0), held_out=0.3)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shop")
    synthesize(folder, CONFIG.shop)
    return folder


class Shelf:
    """Shows items in a fixed order, and remembers what it was asked and told."""

    def __init__(self, order: Sequence[str]) -> None:
        self.order = order
        self.requests: list[RetrieveRequest] = []
        self.events: list[Mapping[str, Any]] = []

    def retrieve(self, requests: Sequence[RetrieveRequest]) -> list[RetrieveResponse]:
        answers = []
        for request in requests:
            ids = [item for item in self.order if item not in request.exclude_item_ids][: request.top_k]
            items = [RetrievedItem(item_id=item, score=0.0, semantic_id=[], level_scores=[]) for item in ids]
            answers.append(RetrieveResponse(items=items, attribution_token=f"t{len(self.requests)}"))
            self.requests.append(request)
        return answers

    def record(self, events: Sequence[Mapping[str, Any]]) -> None:
        self.events += events


def test_visits_after_the_cut_happen_at_the_server(shop) -> None:
    loop = _Loop(shop, CONFIG)
    server = Shelf(loop.item_ids)
    assert loop.serve(server) == len(server.events)
    log = pl.read_parquet(shop / "interactions.parquet")
    met = {user for user, meets in zip(loop.user_ids, loop.meets.tolist(), strict=True) if meets}
    live = log.filter(pl.col("timestamp").min().over("request_id") >= loop.cut, pl.col("user_id").is_in(met))
    assert 0 < len(met) < 12
    assert len(server.requests) == live["request_id"].n_unique()
    asked = pl.DataFrame({"user": [r.user_id for r in server.requests]}).group_by("user").len().sort("user")
    there = live.group_by("user_id").agg(pl.col("request_id").n_unique()).sort("user_id")
    assert asked.rows() == there.rows()
    # Each page was seen as it was shown; of those that are not left, one item was taken.
    taken = [event for event in server.events if event["event"] != EXPOSURE]
    assert len(taken) == live.filter(pl.col("event") != EXPOSURE)["request_id"].n_unique()
    shown: dict[str, list[str]] = {}
    for event in server.events:
        if event["event"] == EXPOSURE:
            shown.setdefault(event["attribution_token"], []).append(event["item_id"])
    for token, request in ((f"t{n}", request) for n, request in enumerate(server.requests)):
        assert len(shown[token]) == 10
        assert not set(shown[token]) & set(request.exclude_item_ids)
        assert (request.query is None) == (request.scenario == "home")
    assert all(event["item_id"] in shown[event["attribution_token"]] for event in taken)
    # Nothing of the time after the cut is in a request: the server has it.
    assert all((e.timestamp or 0) < loop.cut for request in server.requests for e in request.history)
    user = taken[-1]["user_id"]
    mine = [event["item_id"] for event in taken if event["user_id"] == user]
    assert [e.item_id for e in loop.since[loop.user_ids.index(user)]] == mine


def test_the_logs_of_both_parts_are_the_shops(shop, tmp_path) -> None:
    loop = _Loop(shop, CONFIG)
    log = pl.read_parquet(shop / "interactions.parquet")
    earlier = pl.read_parquet(loop.write_logs(tmp_path / "a", loop.before) / "interactions.parquet")
    both = pl.read_parquet(loop.write_logs(tmp_path / "b", loop.before_or_met) / "interactions.parquet")
    assert earlier.columns == log.columns or set(earlier.columns) == set(log.columns)
    assert len(earlier) < len(both) < len(log)
    assert earlier.join(log, on=log.columns, how="anti", nulls_equal=True).is_empty()
    assert both["request_id"].n_unique() == earlier["request_id"].n_unique() + len(loop.visits)


def test_better_pages_are_worth_more(shop) -> None:
    loop = _Loop(shop, CONFIG)
    best = np.argsort(-loop.truth.popularity)
    by_popularity = Shelf([loop.item_ids[row] for row in best])
    worst, in_order = Shelf([loop.item_ids[row] for row in best[::-1]]), Shelf(loop.item_ids)
    figures = loop.compare({"first": [worst, worst], "second": [by_popularity, in_order]})
    assert figures["loop.utility.second"].value > figures["loop.utility.first"].value > 0
    gain = figures["loop.gain.second"]
    assert gain.value == pytest.approx(figures["loop.utility.second"].value - figures["loop.utility.first"].value)
    assert gain.spread is not None
    by_seed = figures["loop.gain.second.by_seed"]
    assert by_seed.spread is not None
    assert by_seed.spread[0] < by_seed.value < by_seed.spread[1]
    assert by_seed.value == pytest.approx(gain.value)
    assert {request.user_id for request in by_popularity.requests} == set(loop.user_ids)
    assert sum(request.query is not None for request in by_popularity.requests) == 12


def test_what_visitors_want_is_what_the_oracle_says(shop) -> None:
    truth = Truth.load(shop)
    visitors = Visitors(truth, CONFIG.shop, [np.asarray([3, 5, 3], np.int64)] * 12, seed=0)
    users, times = np.asarray([4], np.int64), np.asarray([truth.end - 1], np.int64)
    wanted = visitors.want(users, times)
    expected = Oracle(truth).scores(str(truth.user_ids[4]), int(times[0]), None, np.asarray([3, 5, 3]))
    assert np.exp(wanted[0] - wanted.max()) == pytest.approx(expected, abs=1e-6)
    queries, searched = visitors.type(wanted)
    expected = Oracle(truth).scores(str(truth.user_ids[4]), int(times[0]), queries[0], np.asarray([3, 5, 3]))
    assert np.exp(searched[0] - searched.max()) == pytest.approx(expected, abs=1e-6)


def test_an_empty_page_is_left_and_a_choice_is_remembered(shop) -> None:
    truth = Truth.load(shop)
    visitors = Visitors(truth, CONFIG.shop, [np.empty(0, np.int64)] * 12, seed=0)
    pages = np.full((2, 10), NOTHING, np.int64)
    pages[1, 4] = 7
    places, _ = visitors.take(np.asarray([0, 1]), np.zeros((2, 80), np.float32), pages)
    assert places.tolist() == [NOTHING, 4]
    assert visitors.histories[:2] == [[], [7]]
    with pytest.raises(DataError, match="another size"):
        Visitors(truth, ShopConfig(n_items=90, n_users=12), [], seed=0)


@pytest.mark.parametrize("changes", [{"cut": 0.0}, {"held_out": 1.0}, {"seeds": 0}])
def test_a_share_must_leave_something(changes) -> None:
    with pytest.raises(DataError, match=r"between 0 and 1|at least once"):
        LoopConfig(**changes)
